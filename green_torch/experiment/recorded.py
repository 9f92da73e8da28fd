"""Compares runs that are on disk already, from their manifests and records, and refuses what is not comparable.

Such runs were not measured side by side: their blocks are stretches of records and make no pairs, so that whatever changed on the
machine between the runs is part of the difference. Energy is what is compared; grams follow from it by one intensity for all runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    doubts,
    for_json,
    project,
    saving_of,
)
from green_torch.experiment.variants import Variant
from green_torch.footprint import operational_g
from green_torch.intensity import pue_for, resolve
from green_torch.job import told_by_another
from green_torch.records import Domain, Flag, IntensityPoint, Manifest, Phase, StepRecord, kind_of
from green_torch.sinks.codec import plain
from green_torch.sinks.jsonl import RunFile, read_jsonl, run_files
from green_torch.statistics import Bounds, Difference, gain_range, unpaired_difference
from green_torch.totals import whole_sum
from green_torch.units import ns_to_s

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
class _Rank:
    """One rank of one start of a run: its records that count. ``metered``: its joules count, for no other rank tells them as well."""

    manifest: Manifest
    kept: tuple[_Kept, ...]
    metered: bool


_Start = tuple[_Rank, ...]  # the ranks of one start, which take the same steps side by side
_Stretch = tuple[_Start, ...]  # of every start of a run some records, or none


@dataclass(frozen=True, slots=True)
class _Run:
    """One run in a directory, by its starts. ``since_unix_s``: events before then are another run's."""

    path: str
    manifest: Manifest
    starts: _Stretch
    notes: tuple[str, ...]
    since_unix_s: float = 0.0

    @property
    def name(self) -> str:
        """As people call it."""
        return self.manifest.label or self.manifest.run_name

    def per_step(self, unit: str) -> float | None:
        """Tokens or samples of all ranks together a step; ``None`` where they were not counted."""
        amount = whole_sum(getattr(record, unit) for record in _records(self.starts))
        return None if amount is None else amount / _n_steps(self.starts)


@dataclass(frozen=True, slots=True)
class _Cut:
    """A run in stretches, and each as a block of its result."""

    run: _Run
    stretches: tuple[_Stretch, ...]
    result: VariantResult

    def metered(self) -> tuple[_Stretch, list[Block]]:
        """The stretches in which no meter failed, as one, and their blocks."""
        pairs = [(stretch, block) for stretch, block in zip(self.stretches, self.result.blocks, strict=True) if block.metered]
        return _joined([stretch for stretch, _ in pairs]), [block for _, block in pairs]


def compare_runs(
    paths: Sequence[str | os.PathLike[str]],
    *,
    force: bool = False,
    confidence: float = 0.95,
    region: str | None = None,
) -> RecordedComparison:
    """Compares runs on disk with the first of them, per token (else per sample, else per step).

    Where a directory holds several runs, the newest of them is compared, and a warning names the others. Where a meter failed, time and
    work count, and energy is compared over the rest.

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
    cuts = []
    for name, run in zip(names, runs, strict=True):
        stretches = _stretches(run.starts)
        blocks = tuple(_block(number, stretch, pue, point) for number, stretch in enumerate(stretches))
        manifest = replace(run.manifest, intensity=point, pue=pue, pue_source=pue_source)
        cuts.append(_Cut(run, stretches, VariantResult(Variant(name), blocks, manifest=manifest, log_dir=run.path)))
    base, *others = cuts
    times: dict[str, Difference] = {}
    energies: dict[str, Difference] = {}
    for other in others:
        blocks = (*base.result.blocks, *other.result.blocks)
        unit = next(unit for unit in ("tokens", "samples", "n_steps") if all(getattr(block, unit) for block in blocks))
        for found, compare_in in ((times, _in_time), (energies, _in_energy)):
            if (difference := compare_in(base, other, unit, confidence, len(others))) is not None:
                found[other.result.name] = difference
    losses, unknown = _losses(runs, names)
    notes = (note for cut in cuts for note in (*cut.run.notes, *_doubted(cut), *_unchecked(runs[0], cut.run)))
    return RecordedComparison(
        results=tuple(cut.result for cut in cuts),
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
    """All ranks and segments of one directory's newest run that holds train steps.

    Raises:
        ArgumentError: there is no run, or no train step to go by.
    """
    files = run_files(path)
    if not files:
        inside = sorted(str(child) for child in path.iterdir() if is_run(child)) if path.is_dir() else []
        hint = f"; there are runs within: {' '.join(inside)}" if inside else ""
        raise ArgumentError(f"{path} holds no run (looked for green/rank-00000.segment-….jsonl){hint}")
    by_run: dict[str, list[RunFile]] = {}
    for file, _, _ in files:
        content = read_jsonl(file)
        by_run.setdefault(content.manifest.run_id, []).append(content)
    trained = {run_id: starts for run_id, own in by_run.items() if (starts := _starts(own))}  # an evaluation is a run, too
    if not trained:
        raise ArgumentError(
            f"{path} holds no train step beyond its first {_WARM_UP_STEPS} and those in which FLOPs were counted"
        )
    newest = max(trained, key=lambda run_id: max(map(_order, by_run[run_id])))
    others = [run_id for run_id in trained if run_id != newest]
    own = by_run[newest]
    last = max(own, key=lambda one: (-one.manifest.rank, *_order(one))).manifest
    domains = {domain.name: domain for one in own for domain in one.manifest.domains}
    return _Run(
        str(path),
        replace(last, domains=tuple(domains.values())),
        trained[newest],
        tuple(_found(path, newest, others, trained[newest])),
        ns_to_s(min(one.manifest.started_unix_ns for one in own)) if others else 0.0,
    )


def _order(file: RunFile) -> tuple[int, int]:
    return file.manifest.started_unix_ns, file.manifest.segment


def _found(path: Path, newest: str, others: Sequence[str], starts: _Stretch) -> Iterator[str]:
    """What must be said of a directory: that it holds other runs, and of which ranks nothing counts."""
    if others:
        yield (
            f"{path} holds {len(others) + 1} runs: the newest, {newest}, is compared, and not {', '.join(others)}. Give each run a "
            "log_dir of its own"
        )
    for start in starts:
        absent = start[0].manifest.world_size - len(start)
        if absent > 0:
            yield (
                f"{path}: {absent} of {start[0].manifest.world_size} ranks left no train step that counts: what they did and used is "
                "in no figure"
            )


def _starts(files: Sequence[RunFile]) -> _Stretch:
    """The starts of a run in order, each with the ranks that were at work together, as far as they hold records that count."""
    starts: list[list[tuple[RunFile, tuple[_Kept, ...]]]] = []
    for file in sorted(files, key=lambda one: (*_order(one), one.manifest.rank)):
        kept = _typical([one for one in file.records if one.phase is Phase.TRAIN])
        if not kept:
            continue
        rank, begun_unix_ns = file.manifest.rank, file.manifest.started_unix_ns
        if not starts or any(
            one.manifest.rank == rank or one.records[-1].time_unix_ns <= begun_unix_ns for one, _ in starts[-1]
        ):
            starts.append([])
        starts[-1].append((file, tuple(kept)))
    return tuple(_start([(file.manifest, kept) for file, kept in start]) for start in starts)


def _start(ranks: Sequence[tuple[Manifest, tuple[_Kept, ...]]]) -> _Start:
    """The ranks of one start; a device that several meter, or a node's that one meters for all, counts once."""
    others = told_by_another([manifest for manifest, _ in ranks])
    return tuple(_Rank(manifest, kept, manifest.rank not in others) for manifest, kept in ranks)


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


def _doubted(cut: _Cut) -> list[str]:
    """What befell the meters."""
    return [f"{cut.run.path}: {text}" for text in doubts(cut.result.blocks, "stretches of its records")]


def _losses(runs: Sequence[_Run], names: Sequence[str]) -> tuple[dict[str, Losses], list[str]]:
    """The losses of the runs beside the first run's, by name, and of which runs they could not be compared."""
    base, *others = (read_curves(Path(run.path), since_unix_s=run.since_unix_s) for run in runs)
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


def _records(starts: _Stretch, *, metered: bool = False) -> Iterator[StepRecord]:
    """Those of all ranks; ``metered``: of those ranks alone whose joules count."""
    return (one.record for start in starts for rank in start if rank.metered or not metered for one in rank.kept)


def _shared(starts: _Stretch, value: Callable[[StepRecord], float]) -> float:
    """The sum of what the ranks of each start share: their mean."""
    return math.fsum(
        math.fsum(value(one.record) for rank in start for one in rank.kept) / len(start) for start in starts if start
    )


def _n_steps(starts: _Stretch) -> float:
    return _shared(starts, lambda record: record.n_steps)


def _stretches(starts: _Stretch) -> tuple[_Stretch, ...]:
    """Stretches of about as many steps each; in each every rank of a start has records, or none of them."""
    most = sum(min(len(rank.kept) for rank in start) for start in starts)
    for n in range(min(_BLOCKS, most), 1, -1):
        cut = _cut(starts, n)
        if all(
            _n_steps(stretch) and all(len({bool(rank.kept) for rank in start}) == 1 for start in stretch) for stretch in cut
        ):
            return cut
    return (starts,)


def _cut(starts: _Stretch, n: int) -> tuple[_Stretch, ...]:
    """``n`` stretches of about as many steps each, in order; some may be empty."""
    total, done = _n_steps(starts), 0.0
    cut: list[list[_Start]] = [[] for _ in range(n)]
    for start in starts:
        parts = [_parted(rank, done, total, n) for rank in start]
        for stretch, ranks in zip(cut, zip(*parts, strict=True), strict=True):
            stretch.append(ranks)
        done += _n_steps((start,))
    return tuple(map(tuple, cut))


def _parted(rank: _Rank, done: float, total: float, n: int) -> list[_Rank]:
    """A rank's records by the ``n``-th of the run's steps that each falls in; its start begins after so many that are ``done``."""
    groups: list[list[_Kept]] = [[] for _ in range(n)]
    for one in rank.kept:
        middle = done + one.record.n_steps / 2
        groups[min(n - 1, int(middle / total * n))].append(one)
        done += one.record.n_steps
    return [replace(rank, kept=tuple(group)) for group in groups]


def _joined(stretches: Sequence[_Stretch]) -> _Stretch:
    """Stretches of one run as one."""
    return tuple(
        tuple(replace(parts[0], kept=tuple(one for part in parts for one in part.kept)) for parts in zip(*starts, strict=True))
        for starts in zip(*stretches, strict=True)
    )


def _block(number: int, stretch: _Stretch, pue: float, point: IntensityPoint | None) -> Block:
    """Sums over the records of all ranks; steps and seconds, which the ranks of a start share, are their mean."""
    records = list(_records(stretch))

    def total(value: Callable[[StepRecord], float | None]) -> float | None:
        return whole_sum(value(record) for record in records)

    flags = _flags(stretch)
    metered = not any(flag.startswith(Flag.METER_FAILED) for flag in flags)
    energy_j = whole_sum(record.energy_j for record in _records(stretch, metered=True)) if metered else None
    bounds = _bounds(stretch) if metered else None
    tokens, samples = total(lambda record: record.tokens), total(lambda record: record.samples)
    return Block(
        round=number,
        position=0,
        n_steps=round(_n_steps(stretch)),
        duration_s=_shared(stretch, lambda record: record.duration_s),
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
        flags=flags,
        domains_j=_by_domain(stretch) if metered else {},
    )


def _flags(stretch: _Stretch) -> tuple[str, ...]:
    """Those of the records; a meter's of the ranks whose joules count, where one that is silent has failed."""
    found: set[str] = set()
    for rank in (rank for start in stretch for rank in start):
        own = {flag for one in rank.kept for flag in one.record.flags if rank.metered or ":" not in flag}
        if rank.metered and rank.manifest.domains and any(one.record.energy_j is None for one in rank.kept):
            own |= set() if any(flag.startswith(Flag.METER_FAILED) for flag in own) else {str(Flag.METER_FAILED)}
        found |= own
    return tuple(sorted(found))


def _by_domain(starts: _Stretch) -> dict[str, float]:
    """Joules by the kind of device."""
    sums: dict[str, float] = {}
    for domain in (domain for record in _records(starts, metered=True) for domain in record.domains):
        sums[kind_of(domain.name)] = sums.get(kind_of(domain.name), 0.0) + domain.energy_j
    return sums


def _bounds(starts: _Stretch) -> Bounds | None:
    """What the meters warrant of all ranks' joules together; ``None`` where one has no bounds."""
    found = [_bounds_of(rank.kept) for start in starts for rank in start if rank.metered and rank.kept]
    known = [bounds for bounds in found if bounds is not None]
    if not known or len(known) < len(found):
        return None
    return math.fsum(lo for lo, _ in known), math.fsum(hi for _, hi in known)


def _bounds_of(kept: Sequence[_Kept]) -> Bounds | None:
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


def _in_time(base: _Cut, other: _Cut, unit: str, confidence: float, n_compared: int) -> Difference | None:
    """How two runs differ in time per unit of work."""
    rates = [_rates(cut.result.blocks, "duration_s", unit) for cut in (base, other)]
    if rates[0] is None or rates[1] is None:
        return None
    return unpaired_difference(rates[0], rates[1], confidence=confidence, n_compared=n_compared)


def _in_energy(base: _Cut, other: _Cut, unit: str, confidence: float, n_compared: int) -> Difference | None:
    """How two runs differ in energy per unit of work, where no meter failed; ``None`` where it is not known."""
    (base_stretch, base_blocks), (stretch, blocks) = base.metered(), other.metered()
    rates = [_rates(side, "energy_j", unit) for side in (base_blocks, blocks)]
    if rates[0] is None or rates[1] is None:
        return None
    bounds = (_whole(base_stretch, base_blocks, unit), _whole(stretch, blocks, unit))
    whole = None not in bounds
    return unpaired_difference(
        rates[0],
        rates[1],
        confidence=confidence,
        a_bounds=bounds[0] if whole else None,
        b_bounds=bounds[1] if whole else None,
        gain=_gain((base.run.path, base_stretch), (other.run.path, stretch)),
        n_compared=n_compared,
    )


def _whole(starts: _Stretch, blocks: Sequence[Block], unit: str) -> Bounds | None:
    """What the meters warrant of these joules together per unit of work, which is the blocks'."""
    bounds, work = _bounds(starts), whole_sum(getattr(block, unit) for block in blocks)
    return None if bounds is None or not work else (bounds[0] / work, bounds[1] / work)


def _gain(*sides: tuple[str, _Stretch]) -> Bounds | None:
    """The factors that the sensors' gain errors may have put on the ratio of two runs' joules; ``None`` where none is stated.

    Of one and the same sensor the error cancels; of two, each may be off by its own.
    """
    sums: list[dict[str, float]] = []
    errors: dict[str, float] = {}
    for path, starts in sides:
        joules: dict[str, float] = {}
        for rank in (rank for start in starts for rank in start if rank.metered):
            sensors = {domain.name: _sensor(path, rank.manifest, domain) for domain in rank.manifest.domains}
            for domain in rank.manifest.domains:
                if domain.gain_error is not None:
                    sensor = sensors[domain.name]
                    errors[sensor] = max(domain.gain_error, errors.get(sensor, 0.0))
            for part in (part for one in rank.kept for part in one.record.domains):
                sensor = sensors.get(part.name, part.name)
                joules[sensor] = joules.get(sensor, 0.0) + part.energy_j
        sums.append(joules)
    a, b = ({name: joules.get(name, 0.0) for name in {**sums[0], **sums[1]}} for joules in sums)
    return gain_range(a, b, errors)


def _sensor(path: str, manifest: Manifest, domain: Domain) -> str:
    """What two runs know a sensor by: its device's UUID, else its name on a node; where neither is told, no other run knows it."""
    return domain.uuid or f"{domain.name} of {manifest.job.get('node') or path}"


def _rates(blocks: Sequence[Block], quantity: str, unit: str) -> list[float] | None:
    """Per unit of work, block by block; ``None`` where one is not known, or none."""
    found = [(getattr(block, quantity), getattr(block, unit)) for block in blocks]
    rates = [amount / work for amount, work in found if amount and work and amount > 0]
    return rates if rates and len(rates) == len(found) else None
