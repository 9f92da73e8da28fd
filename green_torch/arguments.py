"""What the arguments of ``track()`` come to: each is checked, and turned into what the stages take. Raises before training begins."""

from __future__ import annotations

import math
import os
import uuid
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

from green_torch.baseline import Baseline
from green_torch.embodied import embodied_for
from green_torch.errors import ArgumentError
from green_torch.meters import NODE_UNKNOWN, ONCE_PER_NODE
from green_torch.records import Embodied, Manifest, Phase, RunTotals, TrainSums
from green_torch.totals import of_all_ranks, of_all_segments, of_node, train_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from green_torch.protocols import Clock, IntensityProvider, Meter
    from green_torch.records import Domain
    from green_torch.sinks.jsonl import RunFile
    from green_torch.surroundings import Place


def positive(name: str, value: float | None) -> float | None:
    """The argument, if it is a positive number or ``None``."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ArgumentError(f"{name}={value!r}: a positive number is needed")
    return value


def not_negative(name: str, value: float | None) -> float | None:
    """The argument, if it is a number of at least 0 or ``None``."""
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise ArgumentError(f"{name}={value!r}: a number that is not negative is needed")
    return value


def whole(name: str, value: int) -> int:
    """The argument, if it is a whole number of at least 1."""
    if isinstance(value, bool | str) or int(value) != value or value < 1:
        raise ArgumentError(f"{name}={value!r}: a whole number of at least 1 is needed")
    return int(value)


def attention(value: Literal["full", "causal"]) -> Literal["full", "causal"]:
    """The argument, if it is a way to count attention."""
    if value not in ("full", "causal"):
        raise ArgumentError(f"attention_flops={value!r}: use 'full' or 'causal'")
    return value


def cadence(value: int | str) -> int | str:
    """Steps per record, or "auto"."""
    return value if value == "auto" else whole("log_every_n_steps", value)  # type: ignore[arg-type]  # checked inside


def embodied_of(value: Embodied | float | Literal["device"] | None) -> Embodied | None:
    """The manufacturing footprint, of a number of kgCO2e too; ``None`` for "device": see :func:`embodied_of_cards`."""
    if value is None or isinstance(value, Embodied):
        return value
    if isinstance(value, str):
        if value == "device":
            return None
        raise ArgumentError(f"embodied={value!r}: use 'device' to look up the GPUs, a number of kgCO2e, or an Embodied")
    return Embodied(manufacturing_kg=not_negative("embodied", value) or 0.0, source="given by the user")


def embodied_of_cards(domains: Sequence[Domain]) -> tuple[Embodied | None, str]:
    """The manufacturing footprint of the GPUs that are metered, from the table; where one is unknown ``None``, and what to type."""
    cards = Counter(domain.device for domain in domains if domain.name.startswith("gpu"))
    found = {device: embodied_for(device, count) for device, count in cards.items()}
    unknown = [device for device, made in found.items() if made is None]
    parts = [made for made in found.values() if made is not None]
    if unknown or not parts:
        why = f"no published figure for {', '.join(unknown)}" if unknown else "no GPU is metered here"
        return None, f"embodied='device': {why}, so embodied emissions are not counted. Give kgCO2e yourself: embodied=150, say"
    return Embodied(
        manufacturing_kg=sum(one.manufacturing_kg for one in parts),
        source="; ".join(one.source for one in parts),
        manufacturing_lo_kg=_sum(one.manufacturing_lo_kg for one in parts),
        manufacturing_hi_kg=_sum(one.manufacturing_hi_kg for one in parts),
    ), ""


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum; ``None`` where one of them is not known."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def directory(path: str | os.PathLike[str] | None) -> Path | None:
    """The run's directory, made and tried.

    Raises:
        ArgumentError: it can't be written, or is an address such as "s3://bucket/run".
    """
    if path is None:
        return None
    if "://" in os.fspath(path):
        raise ArgumentError(
            f"log_dir={os.fspath(path)!r} is no directory of this machine. Give a local one, and writer=SummaryWriter({os.fspath(path)!r}) "
            "for TensorBoard's values there"
        )
    directory = Path(path)
    probe = directory / f".green_torch-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ArgumentError(
            f"log_dir={str(directory)!r} can't be written: {error.strerror}. Give a directory of yours"
        ) from error
    return directory


def grid_of(
    region: str | None, intensity: float | IntensityProvider | None, pue: float | None, manifest: Manifest, clock: Clock
) -> tuple[IntensityProvider, Manifest]:
    """The intensity provider, and the manifest with grid and PUE stated."""
    from green_torch.intensity import pue_for, resolve  # codecarbon's tables take a moment to load

    provider = resolve(region, intensity)
    published, source = pue_for(region)
    if pue is not None:
        if not (math.isfinite(pue) and pue >= 1):
            raise ArgumentError(f"pue={pue!r}: facility energy over IT energy is at least 1")
        published, source = float(pue), "given by the user"
    point = None
    if isinstance(intensity, int | float) or intensity is None:  # a table or a number: no network behind it
        point = provider.at(clock.epoch_unix_ns + clock.now_ns())
    return provider, replace(manifest, intensity=point, pue=published, pue_source=source)


def energy_meters(
    given: Sequence[Meter] | None,
    poll_interval_s: float,
    place: Place,
    warn: Callable[..., object] = lambda _text, **_how: None,
) -> tuple[list[Meter], tuple[str, ...]]:
    """The meters of this process, and what can't be read; on ranks but the first of a node without CPU and memory.

    Where a process can't know whether it is the first of its node, they are left out too, and the reason says so.

    Raises:
        ArgumentError: a domain is read by more than one.
    """
    left_out = NODE_UNKNOWN if place.local_rank is None else ONCE_PER_NODE
    if given is not None:
        names = [domain.name for meter in given for domain in meter.domains]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ArgumentError(
                f"meters=: {', '.join(sorted(twice))} is read by more than one meter, and would be counted twice"
            )
        if place.first_on_node or not any(map(of_node, names)):
            return list(given), ()
        own = (meter if not any(of_node(domain.name) for domain in meter.domains) else _Accelerators(meter) for meter in given)
        return [meter for meter in own if meter.domains], (left_out,)
    from green_torch.meters import discover  # opens drivers

    found = discover(local_rank=place.gpu, node=place.first_on_node)
    missing = found.missing if place.first_on_node else (*found.missing, left_out)
    if not any(domain.name.startswith("gpu") for meter in found.meters for domain in meter.domains):
        return list(found.meters), missing
    from green_torch.sampler_child import in_child  # GPUs are read by a small process of their own

    return in_child(found.meters, poll_interval_s, warn), missing


@final
class _Accelerators:
    """A meter without those of its domains that a node has once."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.interval_s = meter.interval_s
        self.read, self.close = meter.read, meter.close

    @property
    def domains(self) -> tuple[Domain, ...]:
        return tuple(domain for domain in self._meter.domains if not of_node(domain.name))


def baseline_of(path: str | os.PathLike[str] | None, rank: int = 0) -> Baseline | None:
    """The baseline run's train energy per token, or sample, or step, of all its ranks together, with the meters' bounds on it.

    ``None`` on ranks but the first, which alone compares.

    Raises:
        ArgumentError: nothing usable is there.
    """
    if path is None or rank != 0:
        return None
    from green_torch.job import told_by_another  # what only a baseline needs
    from green_torch.sinks.jsonl import read_last, run_files

    files: dict[int, list[Path]] = {}  # of each rank, in the order of its segments
    for file, own, _ in run_files(Path(path)):
        files.setdefault(own, []).append(file)
    if 0 not in files:
        raise ArgumentError(f"baseline={str(path)!r}: no run there (looked for green/rank-00000.segment-….jsonl)")
    read = [[read_last(file) for file in files[0]]]
    newest = read[0][-1].manifest
    read += [[read_last(file) for file in files.get(own, ())] for own in range(1, newest.world_size)]
    ranks = [known for one in read if (known := [part for part in one if part.manifest.run_id == newest.run_id])]
    if len(ranks) < newest.world_size:
        raise ArgumentError(
            f"baseline={str(path)!r}: that run had {newest.world_size} ranks, and there are files of {len(ranks)} of them: what "
            "the others used is not known. Gather the files of all ranks in one directory's green/"
        )
    others = told_by_another([one[-1].manifest for one in ranks])
    train = of_all_ranks(
        [of_all_segments([_train_of(part, work_alone=part.manifest.rank in others) for part in one]) for one in ranks]
    )
    unit = next((unit for unit in ("token", "sample", "step") if train is not None and train.units(unit)), None)
    if train is None or train.energy_j is None or unit is None:
        raise ArgumentError(
            f"baseline={str(path)!r}: that run holds no train step with known energy" + " on every rank" * (len(ranks) > 1)
        )
    n = train.units(unit) or 1.0
    lo_j, hi_j = (None if bound_j is None else bound_j / n for bound_j in (train.energy_lo_j, train.energy_hi_j))
    return Baseline(newest, unit, train.energy_j / n, n / train.n_steps, lo_j, hi_j)


def _train_of(run: RunFile, *, work_alone: bool) -> TrainSums | None:
    """A rank's train steps, without those in which FLOPs were counted where it has come to its end."""
    train = train_sums(run.summary, run.summary.totals.phase(Phase.TRAIN)) if run.summary is not None else None
    if train is None:
        told = (run.records[-1].totals if run.records else RunTotals()).phase(Phase.TRAIN)
        if not told.n_steps:
            return None
        train = TrainSums(
            n_steps=told.n_steps,
            energy_j=told.energy_j,
            energy_lo_j=told.energy_lo_j,
            energy_hi_j=told.energy_hi_j,
            samples=told.samples,
            tokens=told.tokens,
        )
    return train.work_alone if work_alone else train
