"""Compares runs that are on disk already, from their manifests and records, and refuses what is not comparable.

Such runs were not measured side by side: their blocks are stretches of records and make no pairs, so that whatever changed on the
machine between the runs is part of the difference. Energy is what is compared; grams follow from it by one intensity for all runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from green_torch.baseline import unlike, untold
from green_torch.errors import ArgumentError
from green_torch.experiment.losses import Losses, compared, read_curves
from green_torch.experiment.results import (
    LOSS_TOLERANCE,
    Block,
    Comparison,
    Saving,
    VariantResult,
    for_json,
    project,
    saving_of,
    whole_sum,
)
from green_torch.experiment.variants import Variant
from green_torch.footprint import operational_g
from green_torch.intensity import pue_for, resolve
from green_torch.records import Flag, IntensityPoint, Manifest, Phase, StepRecord, kind_of
from green_torch.sinks.codec import plain
from green_torch.sinks.jsonl import read_jsonl, run_files
from green_torch.statistics import Bounds, Difference, gain_range, unpaired_difference

if TYPE_CHECKING:
    import os


_BLOCKS = 20  # a run is cut into so many at most: enough for an interval, few enough that neighbours differ
_WARM_UP_STEPS = 3  # left out of each segment: caches, clocks and allocators settle
_SAME_BATCH = 0.01  # relative: a last batch that is not full is no other batch size


@dataclass(frozen=True, slots=True)
class RecordedComparison:
    """What runs on disk used, and how the others differ from the first.

    ``forced`` says, by run, why it is not comparable with the first and was compared all the same; ``warnings`` what was left out
    or could not be checked. ``losses`` are those of the runs that logged one, beside the first run's, as TensorBoard has them. Every
    result's grams are by the one ``intensity`` and PUE in its manifest.
    """

    results: tuple[VariantResult, ...]
    paths: tuple[str, ...]
    times: Mapping[str, Difference]
    energies: Mapping[str, Difference]
    confidence: float
    forced: Mapping[str, tuple[str, ...]]
    warnings: tuple[str, ...] = ()
    losses: Mapping[str, Losses] = field(default_factory=dict)
    loss_tolerance: float = LOSS_TOLERANCE

    @property
    def baseline(self) -> VariantResult:
        """The first run."""
        return self.results[0]

    @property
    def headline(self) -> str:
        """As :attr:`Comparison.headline`."""
        return self._as_comparison().headline

    def result(self, name: str) -> VariantResult:
        """As :meth:`Comparison.result`."""
        return self._as_comparison().result(name)

    def time(self, name: str) -> Difference | None:
        """Time per unit of work against the first run."""
        return self.times.get(name)

    def energy(self, name: str) -> Difference | None:
        """Energy per unit of work against the first run; ``None`` where it is not known."""
        return self.energies.get(name)

    def departure(self, name: str) -> str:
        """Why no saving is claimed for a run; empty where it is comparable, and the same training as far as its losses tell."""
        reasons = self.forced.get(name, ())
        if reasons:
            return f"not comparable: {'; '.join(reasons)}"
        losses = self.losses.get(name)
        return losses.departure(self.loss_tolerance) if losses else ""

    def notes(self, name: str) -> tuple[str, ...]:
        """As :meth:`Comparison.notes`: records tell nothing of the kind."""
        return self.result(name).warnings

    def losses_compared(self, name: str) -> bool:
        """As :meth:`Comparison.losses_compared`."""
        return name in self.losses

    def saving(
        self,
        name: str,
        *,
        planned_tokens: float | None = None,
        planned_samples: float | None = None,
        planned_steps: float | None = None,
    ) -> Saving | None:
        """As :meth:`Comparison.saving`."""
        if self.departure(name):
            return None
        base = project(
            self.baseline,
            planned_tokens=planned_tokens,
            planned_samples=planned_samples,
            planned_steps=planned_steps,
            confidence=self.confidence,
        )
        return saving_of(name, base, self.time(name), self.energy(name))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: as :meth:`Comparison.to_dict`, with each run's directory in place of its variant's settings."""
        results = []
        for result, path in zip(self.results, self.paths, strict=True):
            figures = result.to_dict()
            del figures["variant"]
            results.append({"name": result.name, "path": path, **figures})
        return {
            "baseline": self.baseline.name,
            "headline": self.headline,
            "paired": False,
            "confidence": self.confidence,
            "results": results,
            "differences": {
                result.name: {
                    "time": for_json(self.time(result.name), self.departure(result.name)),
                    "energy": for_json(self.energy(result.name), self.departure(result.name)),
                    "departure": self.departure(result.name),
                    "losses": plain(self.losses[result.name]) if result.name in self.losses else None,
                }
                for result in self.results[1:]
            },
            "loss_tolerance": self.loss_tolerance,
            "warnings": list(self.warnings),
        }

    def _as_comparison(self) -> Comparison:
        return Comparison(self.results, 0, self.confidence, self.loss_tolerance)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A train record that counts, and the train record before it in its file."""

    record: StepRecord
    before: StepRecord | None


@dataclass(frozen=True, slots=True)
class _Run:
    """One directory: its records that count, by rank."""

    path: str
    manifest: Manifest
    ranks: tuple[tuple[_Kept, ...], ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """As people call it."""
        return self.manifest.label or self.manifest.run_name

    def records(self) -> Iterator[StepRecord]:
        """Those that count, of all ranks."""
        return (one.record for kept in self.ranks for one in kept)

    def per_step(self, unit: str) -> float | None:
        """Tokens or samples of all ranks together a step; ``None`` where they were not counted."""
        shares = []
        for kept in self.ranks:
            amount = whole_sum(getattr(one.record, unit) for one in kept)
            shares.append(None if amount is None else amount / sum(one.record.n_steps for one in kept))
        return whole_sum(shares)


def compare_runs(
    paths: Sequence[str | os.PathLike[str]],
    *,
    force: bool = False,
    confidence: float = 0.95,
    region: str | None = None,
) -> RecordedComparison:
    """Compares runs on disk with the first of them, per token (else per sample, else per step).

    Args:
        paths: the runs' directories (what ``log_dir`` was), two or more.
        force: compare what is not comparable, and say so in the result.
        confidence: of the intervals of all differences together.
        region: the grid that grams are by, for all runs. None: the first run's.

    Raises:
        ArgumentError: fewer than two directories, one of them twice, one that holds no run with enough train steps, or runs that are
            not comparable.
        LedgerError: a file can't be read.
    """
    if len(paths) < 2:
        raise ArgumentError(f"Compare two runs or more, not {len(paths)}: green-torch compare runs/a runs/b")
    places = [Path(path).resolve() for path in paths]
    if twice := [path for number, path in enumerate(paths) if places[number] in places[:number]]:
        raise ArgumentError(f"{twice[0]} is named twice: a run differs from itself in nothing. Name each run once.")
    runs = [_read(Path(path)) for path in paths]
    objections = [_objections(runs[0], run, own_grid=region is not None) for run in runs]
    told = [f"{run.path}: {reason}" for run, reasons in zip(runs, objections, strict=True) for reason in reasons]
    if told and not force:
        raise ArgumentError(
            f"Not comparable with {runs[0].path}: {'; '.join(told)}. To compare all the same, and have the output say so: --force"
        )
    names = _names(runs)
    point, pue, pue_source = _grid(runs[0].manifest, region)
    results = [
        VariantResult(
            Variant(name),
            _blocks(run, pue, point),
            manifest=replace(run.manifest, intensity=point, pue=pue, pue_source=pue_source),
            log_dir=run.path,
        )
        for name, run in zip(names, runs, strict=True)
    ]
    base, *others = results
    times: dict[str, Difference] = {}
    energies: dict[str, Difference] = {}
    for result, run in zip(others, runs[1:], strict=True):
        blocks = [*base.blocks, *result.blocks]
        unit = next(unit for unit in ("tokens", "samples", "n_steps") if all(getattr(block, unit) for block in blocks))
        for quantity, found in (("duration_s", times), ("energy_j", energies)):
            rates = [_rates(side, quantity, unit) for side in (base.blocks, result.blocks)]
            if rates[0] is None or rates[1] is None:
                continue
            bounds = (_whole(runs[0], unit), _whole(run, unit)) if quantity == "energy_j" else (None, None)
            whole = None not in bounds
            found[result.name] = unpaired_difference(
                rates[0],
                rates[1],
                confidence=confidence,
                a_bounds=bounds[0] if whole else None,
                b_bounds=bounds[1] if whole else None,
                gain=_gain(runs[0], run) if quantity == "energy_j" else None,
                n_compared=len(others),
            )
    losses, unknown = _losses(runs, names)
    notes = (note for run in runs for note in (*run.notes, *_unchecked(runs[0], run)))
    return RecordedComparison(
        results=tuple(results),
        paths=tuple(run.path for run in runs),
        times=times,
        energies=energies,
        confidence=confidence,
        forced={name: tuple(reasons) for name, reasons in zip(names, objections, strict=True) if reasons},
        warnings=tuple(dict.fromkeys((*notes, *unknown))),
        losses=losses,
    )


# ── reading ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def is_run(path: str | Path) -> bool:
    """Whether a directory holds a run."""
    return bool(run_files(path))


def _read(path: Path) -> _Run:
    """All ranks and segments of one directory.

    Raises:
        ArgumentError: there is no run, or no train step to go by.
    """
    files = run_files(path)
    if not files:
        inside = sorted(str(child) for child in path.iterdir() if is_run(child)) if path.is_dir() else []
        hint = f"; there are runs within: {' '.join(inside)}" if inside else ""
        raise ArgumentError(f"{path} holds no run (looked for green/rank-00000.segment-….jsonl){hint}")
    manifests: list[Manifest] = []
    by_rank: dict[int, list[_Kept]] = {}
    for file, rank, _ in files:
        content = read_jsonl(file)
        manifests.append(content.manifest)
        by_rank.setdefault(rank, []).extend(_typical([one for one in content.records if one.phase is Phase.TRAIN]))
    read = [kept for kept in by_rank.values() if kept]
    if not read:
        raise ArgumentError(
            f"{path} holds no train step beyond its first {_WARM_UP_STEPS} and those in which FLOPs were counted"
        )
    known = [[one for one in kept if one.record.energy_j is not None] for kept in read]
    notes = []
    if all(known):  # a record that a meter missed would leave the whole run's joules unknown
        missed = sum(map(len, read)) - sum(map(len, known))
        notes = [f"{path}: {missed} of {sum(map(len, read))} records hold no joules and are left out"] if missed else []
        read = known
    own = [manifest for manifest in manifests if manifest.rank == manifests[0].rank]
    domains = {domain.name: domain for manifest in manifests for domain in manifest.domains}
    return _Run(str(path), replace(own[-1], domains=tuple(domains.values())), tuple(map(tuple, read)), tuple(notes))


def _typical(records: Sequence[StepRecord]) -> list[_Kept]:
    """A segment's train records without its warm-up and without those in which FLOPs were counted."""
    kept, steps = [], 0
    for before, record in pairwise([None, *records]):
        assert record is not None
        if steps >= _WARM_UP_STEPS and not record.flagged(Flag.COUNTED):
            kept.append(_Kept(record, before))
        steps += record.n_steps
    return kept


def _names(runs: Sequence[_Run]) -> list[str]:
    """A name for each run: its label, with the folder above where two are called the same, with a number where that is no help."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [":".join(Path(run.path).resolve().parts[-2:]) for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name}#{number}" for number, name in enumerate(names, start=1)]
    return [name.replace("/", ":") for name in names]


def _grid(base: Manifest, region: str | None) -> tuple[IntensityPoint | None, float, str]:
    """The one intensity and PUE for all runs."""
    if region is None:
        return base.intensity, base.pue, base.pue_source
    return resolve(region).at(time.time_ns()), *pue_for(region)


# ── what is comparable ─────────────────────────────────────────────────────────────────────────────────────────────────


def _objections(base: _Run, run: _Run, *, own_grid: bool) -> list[str]:
    """Why a run can't be compared with the first one."""
    a, b = base.manifest, run.manifest
    found = unlike(b, a)
    for unit in ("tokens", "samples"):
        own, theirs = base.per_step(unit), run.per_step(unit)
        if own and theirs and abs(theirs / own - 1) > _SAME_BATCH:
            found.append(f"the batch is {theirs:,.6g} {unit} a step against {own:,.6g}")
    if not own_grid and a.intensity and b.intensity and _basis(a.intensity) != _basis(b.intensity):
        found.append(f"grid intensity is {_basis(b.intensity)} against {_basis(a.intensity)} (--region gives one for both)")
    return found


def _unchecked(base: _Run, run: _Run) -> list[str]:
    """What the manifests don't tell."""
    found = [f"not checked, since not recorded: {what} of {run.path}" for what in untold(run.manifest, base.manifest)]
    if all(base.per_step(unit) is None or run.per_step(unit) is None for unit in ("tokens", "samples")):
        found.append(f"not checked, since not recorded: batch size of {run.path}; compared per step")
    return found if run is not base else []


def _losses(runs: Sequence[_Run], names: Sequence[str]) -> tuple[dict[str, Losses], list[str]]:
    """The losses of the runs beside the first run's, by name, and of which runs they could not be compared."""
    base, *others = (read_curves(Path(run.path)) for run in runs)
    found, unknown = {}, []
    for name, run, curves in zip(names[1:], runs[1:], others, strict=True):
        losses = compared(base, curves)
        if isinstance(losses, Losses):
            found[name] = losses
        else:
            unknown.append(f"losses not compared: {run.path} with {runs[0].path}: {losses}")
    return found, unknown


def _basis(point: IntensityPoint) -> str:
    return f"{point.basis}, {'average' if point.average else 'marginal'}"


# ── blocks and their difference ────────────────────────────────────────────────────────────────────────────────────────


def _blocks(run: _Run, pue: float, point: IntensityPoint | None) -> tuple[Block, ...]:
    """Stretches of about as many steps each, all ranks together."""
    for n in range(min(_BLOCKS, *map(len, run.ranks)), 0, -1):
        cuts = [_cut(kept, n) for kept in run.ranks]
        if all(all(groups) for groups in cuts):
            break
    return tuple(_block(number, groups, pue, point) for number, groups in enumerate(zip(*cuts, strict=True)))


def _cut(kept: Sequence[_Kept], n: int) -> list[list[_Kept]]:
    """``n`` groups of about as many steps each, in order; some may be empty."""
    total, done = sum(one.record.n_steps for one in kept), 0
    groups: list[list[_Kept]] = [[] for _ in range(n)]
    for one in kept:
        middle = done + one.record.n_steps / 2
        groups[min(n - 1, int(middle / total * n))].append(one)
        done += one.record.n_steps
    return groups


def _block(number: int, ranks: Sequence[Sequence[_Kept]], pue: float, point: IntensityPoint | None) -> Block:
    """Sums over the records of all ranks; steps and seconds, which the ranks share, are their mean."""
    records = [one.record for kept in ranks for one in kept]

    def total(value: Callable[[StepRecord], float | None]) -> float | None:
        return whole_sum(value(record) for record in records)

    energy_j = total(lambda record: record.energy_j)
    bounds = _bounds([one for kept in ranks for one in kept])
    tokens, samples = total(lambda record: record.tokens), total(lambda record: record.samples)
    return Block(
        round=number,
        position=0,
        n_steps=round(sum(record.n_steps for record in records) / len(ranks)),
        duration_s=math.fsum(record.duration_s for record in records) / len(ranks),
        energy_j=energy_j,
        energy_lo_j=bounds[0] if bounds else None,
        energy_hi_j=bounds[1] if bounds else None,
        emissions_g=None if energy_j is None or point is None else operational_g(energy_j, pue, point.g_per_kwh),
        model_flops=total(lambda record: record.model_flops),
        hardware_flops=total(lambda record: record.hardware_flops),
        capacity_flops=total(
            lambda record: None if record.peak_flop_per_s is None else record.peak_flop_per_s * record.duration_s
        ),
        tokens=None if tokens is None else int(tokens),
        samples=None if samples is None else int(samples),
        loss=None,
        peak_memory_bytes=max((record.peak_memory_bytes for record in records if record.peak_memory_bytes), default=None),
        flags=tuple(sorted({flag for record in records for flag in record.flags})),
        domains_j=_by_sensor(records),
    )


def _bounds(kept: Sequence[_Kept]) -> Bounds | None:
    """What the meters warrant of these records' joules together; ``None`` where one has no bounds.

    Records that follow each other share their boundaries: between the running totals before the first and after the last there are
    two boundaries alone, where the sum of the records' own bounds has two for each.
    """
    lo = hi = 0.0
    stretch: list[_Kept] = []
    for one, following in pairwise([*kept, None]):
        assert one is not None
        stretch.append(one)
        if following is None or following.before is not one.record:
            found = _stretch_bounds(stretch)
            if found is None:
                return None
            lo, hi, stretch = lo + found[0], hi + found[1], []
    return lo, hi


def _stretch_bounds(stretch: Sequence[_Kept]) -> Bounds | None:
    lows = whole_sum(one.record.energy_lo_j for one in stretch)
    highs = whole_sum(one.record.energy_hi_j for one in stretch)
    if lows is None or highs is None:
        return None
    start = stretch[0].before.totals.phase(Phase.TRAIN) if stretch[0].before else None
    end = stretch[-1].record.totals.phase(Phase.TRAIN)
    first_lo, first_hi = (start.energy_lo_j, start.energy_hi_j) if start else (0.0, 0.0)
    if None in (first_lo, first_hi, end.energy_lo_j, end.energy_hi_j):
        return lows, highs
    assert first_lo is not None
    assert first_hi is not None
    assert end.energy_lo_j is not None
    assert end.energy_hi_j is not None
    return max(lows, end.energy_lo_j - first_hi), min(highs, end.energy_hi_j - first_lo)


def _whole(run: _Run, unit: str) -> Bounds | None:
    """What the meters warrant of the whole run's joules per unit of work."""
    bounds = [found for kept in run.ranks if (found := _bounds(kept))]
    work = whole_sum(getattr(record, unit) for record in run.records())
    if len(bounds) < len(run.ranks) or not work:
        return None
    return math.fsum(lo for lo, _ in bounds) / work, math.fsum(hi for _, hi in bounds) / work


def _gain(base: _Run, run: _Run) -> Bounds | None:
    """The factors that the sensors' gain errors may have put on the ratio of two runs' joules; ``None`` where none is stated.

    The same sensors, unless both runs tell their nodes and these differ: then no gain cancels.
    """
    errors: dict[str, float] = {}
    for domain in (*base.manifest.domains, *run.manifest.domains):
        if domain.gain_error is not None:
            errors[kind_of(domain.name)] = max(domain.gain_error, errors.get(kind_of(domain.name), 0.0))
    nodes = [own.manifest.job.get("node") for own in (base, run)]
    if all(nodes) and nodes[0] != nodes[1]:
        worst = max(errors.values(), default=1.0)
        return None if worst >= 1 else ((1 - worst) / (1 + worst), (1 + worst) / (1 - worst))
    return gain_range(_by_sensor(base.records()), _by_sensor(run.records()), errors)


def _by_sensor(records: Iterable[StepRecord]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for record in records:
        for domain in record.domains:
            kind = kind_of(domain.name)
            sums[kind] = sums.get(kind, 0.0) + domain.energy_j
    return sums


def _rates(blocks: Sequence[Block], quantity: str, unit: str) -> list[float] | None:
    """Per unit of work, block by block; ``None`` where one is not known, or none."""
    found = [(getattr(block, quantity), getattr(block, unit)) for block in blocks]
    return [amount / work for amount, work in found] if all(amount and work and amount > 0 for amount, work in found) else None
