"""The run that another is held against: its joules per unit of work, whether the two are alike, and what a saving would need."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from green_torch.errors import ArgumentError
from green_torch.job import sharers, spared
from green_torch.processor import ARCHITECTURES
from green_torch.records import Manifest, Method, Phase, RunTotals, TrainSums
from green_torch.sinks.jsonl import read_last, run_files
from green_torch.totals import of_all_ranks, of_node, train_sums

if TYPE_CHECKING:
    import os

    from green_torch.sinks.jsonl import RunFile

_NO_NAME = re.compile(r"package-\d+(-die-\d+)?|unknown CPU|")  # what RAPL and codecarbon call a CPU whose name isn't told


@dataclass(frozen=True, slots=True)
class Baseline:
    """The run that savings are measured against: the train energy of all its ranks per unit of work, bounded where the meters' is."""

    manifest: Manifest
    unit: str  # "token" | "sample" | "step"
    energy_per_unit_j: float
    energy_per_unit_lo_j: float | None = None
    energy_per_unit_hi_j: float | None = None

    def __str__(self) -> str:
        """Its name and its figure: "fp32 (0.12 J/token)"."""
        return f"{self.manifest.label or self.manifest.run_name} ({self.energy_per_unit_j:.4g} J/{self.unit})"

    def doubts(self, own: Manifest, *, counts_unit: bool) -> list[str]:
        """Why a run has no saving against this one, and why it would be none of like with like; each with what mends it."""
        missing = []
        if own.planned_steps is None:
            missing.append("the length of the run is not known: give planned_steps=10_000, say")
        if not counts_unit:
            missing.append(f"its joules are per {self.unit}, and this run counts none: say tracker.step({self.unit}s=n)")
        found = [f"no saving is told against baseline {self}: {'; '.join(missing)}"] if missing else []
        others = unlike(own, self.manifest)
        if others:
            found.append(
                f"the saving against baseline {self} is none of like with like: {'; '.join(others)}. Give baseline= the directory of a "
                "run of the same model, on the same device, with the same meters"
            )
        return found


def baseline_of(path: str | os.PathLike[str] | None, rank: int = 0) -> Baseline | None:
    """The baseline run's train energy per token, or sample, or step, of all its ranks together, with the meters' bounds on it.

    ``None`` on ranks but the first, which alone compares.

    Raises:
        ArgumentError: nothing usable is there.
    """
    if path is None or rank != 0:
        return None
    last = {own: file for file, own, _ in run_files(Path(path))}  # of each rank, in the order of their starts
    if 0 not in last:
        raise ArgumentError(f"baseline={str(path)!r}: no run there (looked for green/rank-00000.segment-….jsonl)")
    first = read_last(last[0])
    ranks = [first, *(read_last(last[own]) for own in range(1, first.manifest.world_size) if own in last)]
    ranks = [one for one in ranks if one.manifest.run_id == first.manifest.run_id]
    if len(ranks) < first.manifest.world_size:
        raise ArgumentError(
            f"baseline={str(path)!r}: that run had {first.manifest.world_size} ranks, and there are files of {len(ranks)} of them: what "
            "the others used is not known. Gather the files of all ranks in one directory's green/"
        )
    manifests = [one.manifest for one in ranks]
    others = {*sharers({one.rank: one.devices for one in manifests})}
    if not any(not of_node(domain.name) for one in manifests for domain in one.domains):
        others |= spared({one.rank: (one.job.get("node", ""), bool(one.domains)) for one in manifests})
    train = of_all_ranks([_train_of(one, work_alone=one.manifest.rank in others) for one in ranks])
    unit = next((unit for unit in ("token", "sample", "step") if train is not None and train.units(unit)), None)
    if train is None or train.energy_j is None or unit is None:
        raise ArgumentError(
            f"baseline={str(path)!r}: that run holds no train step with known energy" + " on every rank" * (len(ranks) > 1)
        )
    n = train.units(unit) or 1.0
    lo_j, hi_j = (None if bound_j is None else bound_j / n for bound_j in (train.energy_lo_j, train.energy_hi_j))
    return Baseline(first.manifest, unit, train.energy_j / n, lo_j, hi_j)


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


# ── whether two runs are alike ─────────────────────────────────────────────────────────────────────────────────────────


def unlike(own: Manifest, base: Manifest) -> list[str]:
    """Why a run can't be held against another, by what both tell of themselves; what one of them doesn't tell is no reason."""
    return [
        f"{what} {_said(ours)} against {_said(theirs)}"
        for what, ours, theirs in (
            ("the model is", own.model, base.model),
            ("parameters are", own.parameters, base.parameters),
            ("the device is", _name(own.device), _name(base.device)),
            ("metered are", _metered(own, base), _metered(base, own)),
            ("joules are known by", _methods(own), _methods(base)),
            ("processes are", own.world_size, base.world_size),
        )
        if ours and theirs and ours != theirs
    ]


def untold(own: Manifest, base: Manifest) -> list[str]:
    """What of that nobody can check, since one of the two doesn't tell it."""
    facts = (("model", own.model, base.model), ("device", _name(own.device), _name(base.device)))
    return [
        *(what for what, ours, theirs in facts if not (ours and theirs)),
        *(f"{kind}'s name" for kind in sorted(_unnamed(own) | _unnamed(base))),
    ]


def _name(device: str) -> str:
    """A device's name; nothing for what many devices are called."""
    return "" if device in ARCHITECTURES or _NO_NAME.fullmatch(device) else device


def _kind(name: str) -> str:
    """A domain's name without the number of the device, which two runs may have had different ones of."""
    return name.rstrip("0123456789")


def _unnamed(manifest: Manifest) -> set[str]:
    return {_kind(domain.name) for domain in manifest.domains if not _name(domain.device)}


def _metered(own: Manifest, other: Manifest) -> tuple[str, ...]:
    """What a run metered, less the kinds of device that either leaves unnamed."""
    unnamed = _unnamed(own) | _unnamed(other)
    return tuple(sorted(domain.device for domain in own.domains if _kind(domain.name) not in unnamed))


def _methods(manifest: Manifest) -> tuple[tuple[str, Method], ...]:
    return tuple(sorted((_kind(domain.name), domain.method) for domain in manifest.domains))


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(" by ".join(part) if isinstance(part, tuple) else str(part) for part in value)
    return f"{value:,}" if isinstance(value, int) else str(value)
