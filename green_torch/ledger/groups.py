"""Runs together: by project, model, status or month, what they used, what was wasted, and what fewer failures would save. Pure.

Operational emissions are kept by the basis of their grid intensity: figures of different bases are never summed silently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from green_torch.errors import ArgumentError
from green_torch.ledger.runs import Run, Status, total, utilization
from green_torch.records import Method, Phase, RunTotals, kind_of
from green_torch.totals import sum_of_known
from green_torch.units import ns_to_s

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from green_torch.ledger.runs import Ledger
    from green_torch.records import IntensityPoint

UNKNOWN_BASIS = "basis not stated"
_UNITS = ("token", "sample", "step")


def period(run: Run) -> str:
    """The month, in UTC, that the run began in: "2026-01"."""
    return datetime.fromtimestamp(ns_to_s(run.started_unix_ns), UTC).strftime("%Y-%m")


KEYS: Mapping[str, Callable[[Run], str]] = {
    "project": lambda run: run.project,
    "model": lambda run: run.manifest.model or "(no model given)",
    "status": lambda run: str(run.status),
    "month": period,
    "run": lambda run: f"{run.project}/{run.name} ({run.run_id})",
}


def basis(point: IntensityPoint | None) -> str:
    """What kind of grid figure it is: "lifecycle, average", "direct, marginal"."""
    if point is None or point.basis in {"", "unknown"}:
        return UNKNOWN_BASIS
    return point.kind


@dataclass(frozen=True, slots=True)
class FailedShare:
    """Runs that failed or were killed, of those that ended; and what a smaller share of them would save.

    ``saved_energy_j`` (and the like) assume that the runs that completed stay as they are, and that a run that fails costs the mean
    of those that did. ``None`` where no target was given or too little is known.
    """

    n_lost: int
    n_ended: int
    energy_share: float | None
    target: float | None = None
    saved_energy_j: float | None = None
    saved_g: float | None = None

    @property
    def share(self) -> float | None:
        """Of the runs that ended; ``None`` before the first."""
        return self.n_lost / self.n_ended if self.n_ended else None


@dataclass(frozen=True, slots=True)
class Group:
    """Several runs as one.

    ``operational_g`` is by basis of the grid intensity. ``energy_j`` by kind of device and method. ``mfu`` is the mean by what the
    devices could have done; ``None`` where the runs' peaks differ, since MFUs over different peaks don't compare.
    """

    name: str
    runs: tuple[Run, ...]
    totals: RunTotals
    useful: RunTotals
    wasted: RunTotals
    lost: RunTotals  # runs that failed or were killed, as a whole
    redone: RunTotals  # in the others: steps that were done again
    restart: RunTotals  # in the others: set-up after an interruption
    energy_by_kind_j: Mapping[tuple[str, Method], float]
    operational_by_basis_g: Mapping[str, float]
    units: Mapping[str, int]  # useful tokens, samples and steps of training, where every run tells them
    mfu: float | None
    peaks: tuple[str, ...]

    @property
    def counts(self) -> Counter[Status]:
        """How many runs ended how."""
        return Counter(run.status for run in self.runs)

    @property
    def share_estimated(self) -> float | None:
        """The share of the joules that a model gave, 0-1."""
        total = sum(self.energy_by_kind_j.values())
        if not total:
            return None
        return sum(joules for (_, method), joules in self.energy_by_kind_j.items() if method is Method.ESTIMATED) / total

    @property
    def one_basis(self) -> bool:
        """Whether all operational emissions rest on the same kind of grid figure, so that they may be summed."""
        return len(self.operational_by_basis_g) <= 1

    @property
    def operational_g(self) -> float | None:
        """Operational gCO2e; ``None`` where their bases differ."""
        return self.totals.operational_g if self.one_basis else None

    @property
    def emissions_g(self) -> float | None:
        """Operational and embodied gCO2e; ``None`` where the operational ones' bases differ."""
        return sum_of_known((self.operational_g, self.totals.embodied_g)) if self.one_basis else None

    @property
    def embodied_span_g(self) -> tuple[float | None, float | None]:
        """The least and the most that the embodied gCO2e may be; ``None`` where the spread of a device's making is not known."""
        ends = [0.0, 0.0]
        for run in self.runs:
            for segment in run.segments:
                made, share_g = segment.manifest.embodied, segment.totals.embodied_g
                if made is None or not share_g:
                    continue
                if made.manufacturing_lo_kg is None or made.manufacturing_hi_kg is None:
                    return None, None
                ends[0] += share_g * made.manufacturing_lo_kg / made.manufacturing_kg
                ends[1] += share_g * made.manufacturing_hi_kg / made.manufacturing_kg
        return ends[0], ends[1]

    @property
    def wasted_share(self) -> float | None:
        """Wasted joules of all, 0-1."""
        if not self.totals.energy_j:
            return None
        return (self.wasted.energy_j or 0.0) / self.totals.energy_j

    def sci_g(self, unit: str) -> float | None:
        """Software Carbon Intensity (GSF, ISO/IEC 21031), gCO2e per useful token, sample or step, or per run that completed.

        (E × I + M) / R: all that was emitted, wasted work included, over the work that counts. ``None`` where R is not known, or the
        operational figures' bases differ.
        """
        done = self.counts[Status.COMPLETED] if unit == "run" else self.units.get(unit)
        return self.emissions_g / done if self.emissions_g is not None and self.operational_g is not None and done else None

    @property
    def functional_units(self) -> tuple[str, ...]:
        """The units of work that are known."""
        return tuple(unit for unit in (*_UNITS, "run") if self.sci_g(unit) is not None)


def _counts(run: Run) -> tuple[int | None, ...]:
    """Useful tokens, samples and steps of training."""
    train = run.useful.phase(Phase.TRAIN)
    return train.tokens, train.samples, run.n_steps


def grouped(ledger: Ledger, by: str) -> tuple[Group, ...]:
    """The runs by "project", "model", "status", "month" or "run", in the order of the names.

    Raises:
        ArgumentError: none of these.
    """
    if by not in KEYS:
        raise ArgumentError(f"runs can't be put together by {by!r}: use one of {', '.join(KEYS)}")
    found: dict[str, list[Run]] = {}
    for run in ledger.runs:
        found.setdefault(KEYS[by](run), []).append(run)
    return tuple(group(name, found[name]) for name in sorted(found))


def group(name: str, runs: Sequence[Run]) -> Group:
    """These runs as one."""
    lost = [run for run in runs if run.lost]
    others = [run for run in runs if not run.lost]
    by_kind: dict[tuple[str, Method], float] = {}
    by_basis: dict[str, float] = {}
    for run in runs:
        for domain in run.totals.domains:
            kind = kind_of(domain.name), domain.method
            by_kind[kind] = by_kind.get(kind, 0.0) + domain.energy_j
        for segment in run.segments:
            if segment.totals.operational_g is not None:
                known = basis(segment.manifest.intensity)
                by_basis[known] = by_basis.get(known, 0.0) + segment.totals.operational_g
    units: dict[str, int] = {}
    for unit, counts in zip(_UNITS, zip(*map(_counts, others), strict=True), strict=False):
        told = [one for one in counts if one is not None]
        if len(told) == len(counts):
            units[unit] = sum(told)
    causes = (
        total(run.totals for run in lost),
        total(run.redone for run in others),
        total(run.restart for run in others),
    )
    peaks = sorted({f"{peak.device}, {peak.dtype}" for run in runs for peak in run.manifest.peaks})
    return Group(
        name,
        tuple(runs),
        total(run.totals for run in runs),
        total(run.useful for run in runs),
        total(causes),
        *causes,
        dict(sorted(by_kind.items())),
        dict(sorted(by_basis.items())),
        units,
        _mfu(runs),
        tuple(peaks),
    )


def failed_share(whole: Group, target: float | None = None) -> FailedShare:
    """The share of runs that failed or were killed, and what bringing it down to ``target`` (0-1) would save.

    Raises:
        ArgumentError: a target that is no share below 1.
    """
    if target is not None and not 0 <= target < 1:
        raise ArgumentError(f"a target share of {target!r} is not between 0 and 1: give 5%, say")
    n_lost = sum(run.lost for run in whole.runs)
    n_ended = sum(run.finished for run in whole.runs)
    ended_j = sum_of_known(run.totals.energy_j for run in whole.runs if run.finished)
    lost_j = whole.lost.energy_j
    energy_share = (lost_j or 0.0) / ended_j if ended_j else None
    if target is None or not n_lost:
        return FailedShare(n_lost, n_ended, energy_share, target)
    allowed = (n_ended - n_lost) * target / (1 - target)  # failures beside the runs that completed
    spared = max(0.0, 1 - allowed / n_lost)
    lost_g = whole.lost.emissions_g if whole.one_basis else None
    return FailedShare(
        n_lost,
        n_ended,
        energy_share,
        target,
        None if lost_j is None else spared * lost_j,
        None if lost_g is None else spared * lost_g,
    )


def _mfu(runs: Sequence[Run]) -> float | None:
    segments = [one for run in runs for one in run.segments if one.capacity_flops and one.mfu is not None]
    one_peak = len({_peak(one.manifest.peaks) for one in segments}) == 1
    return utilization(segments, "mfu") if one_peak else None


def _peak(peaks: Sequence[object]) -> tuple[str, ...]:
    return tuple(sorted(map(repr, peaks)))
