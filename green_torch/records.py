"""The frozen, slotted dataclasses that flow between the stages; every field names its unit.

Instants ending in ``_ns`` are nanoseconds of the run's monotonic clock unless the name says ``unix``. ``None`` means
"not known", never zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypeVar, final

from green_torch.units import grams, hours, kwh, ns_to_s, share, si

SCHEMA_VERSION = 1
REQUEUE = (
    75  # exit code of a run that leaves to be queued again: "temporary failure, try again" (EX_TEMPFAIL of BSD's sysexits)
)


_LONG_S = 120.0  # from here on a clock's reading says more than seconds


class Method(StrEnum):
    """How a joule is known."""

    COUNTER = "counter"  # a hardware energy counter
    SAMPLED = "sampled"  # power readings, integrated
    ESTIMATED = "estimated"  # a model, such as TDP x load


class Phase(StrEnum):
    """Every joule of a run belongs to exactly one of these."""

    TRAIN = "train"
    EVAL = "eval"
    SAVE = "save"
    SETUP = "setup"
    PAUSED = "paused"
    OTHER = "other"


class Flag(StrEnum):
    """What a reader of a record must know about it. Some carry the domain's name after a colon: ``meter_failed:gpu0``."""

    COUNTED = "counted"  # FLOPs were counted during it: its time and energy are not typical
    SPLIT = "split"  # a phase was cut out of the middle of a step
    UNRESOLVED = "unresolved"  # the bounds are no tighter than knowing nothing
    LATE = "late"  # no counter change came within 2 s: where it ends, or began, is extrapolated, and a wrong guess is made up for here
    METER_FAILED = "meter_failed"  # a domain could not be read: its joules are missing
    COUNTER_RESET = "counter_reset"  # a counter went back, or leapt: the gap is bounded by the power limit only
    COUNTER_STUCK = "counter_stuck"  # a counter stood still while others moved
    PART_TIME = "part_time"  # a counter that sees only part of the power, and steps that recur near a small ratio of its period
    MERGED = "merged"  # the queue was full: neighbours became one record
    SHARED = "shared"  # other processes are on the metered device
    FLOPS_SCALED = "flops_scaled"  # FLOPs scaled by input size from another shape, or of sequences of other lengths
    FLOPS_UNKNOWN = "flops_unknown"  # FLOPs of some of the work could not be counted
    INTENSITY_FALLBACK = "intensity_fallback"  # the grid figure is not the one asked for
    BAD_COUNT = "bad_count"  # tokens or samples given were NaN, negative or zero, and were left out


@dataclass(frozen=True, slots=True)
class Instant:
    """When something happened: the best estimate, and the bounds of it (all equal on a host clock)."""

    at_ns: int
    lo_ns: int
    hi_ns: int

    @classmethod
    def exact(cls, at_ns: int) -> Instant:
        """An instant known to the nanosecond."""
        return cls(at_ns, at_ns, at_ns)


@dataclass(frozen=True, slots=True)
class Domain:
    """One thing whose energy a meter reads.

    ``name`` as people say it (``gpu0``, ``cpu``, ``dram``); ``device`` as the driver prints it; ``source`` where the number
    comes from. ``power_limit_w`` is the limit behind the bounds (0 <= P <= 1.5 x limit), the highest that the device can be set to;
    ``None`` where joules have no bounds.
    ``quantum_j`` is the counter's resolution; ``period_s`` its update period where known.
    """

    name: str
    method: Method
    device: str
    source: str
    power_limit_w: float | None = None
    quantum_j: float = 0.0
    period_s: float | None = None
    gain_error: float | None = None  # relative, systematic, of the sensor (0.05 = 5 %)
    shared: bool = False
    uuid: str = ""  # of a device that several processes may meter, by which its joules are counted once


@dataclass(frozen=True, slots=True)
class Reading:
    """Cumulative joules by domain name, read between two instants. A domain that could not be read is left out.

    ``earlier``: readings made before this one and not yet handed on, the oldest first, by a meter that reads ahead.
    """

    begin_ns: int
    end_ns: int
    energy_j: Mapping[str, float]
    earlier: tuple[Reading, ...] = ()


def kind_of(name: str) -> str:
    """What kind of device a domain is, by its name without the device's number: "gpu0" is a "gpu"."""
    return name.rstrip("0123456789")


@dataclass(frozen=True, slots=True)
class DomainEnergy:
    """Joules of one domain over some interval; bounds are ``None`` unless the domain is counted."""

    name: str
    energy_j: float
    energy_lo_j: float | None
    energy_hi_j: float | None
    method: Method


@dataclass(frozen=True, slots=True)
class IntensityPoint:
    """Grid carbon intensity at an instant, with where it comes from.

    ``basis`` is "lifecycle" or "direct", ``average`` tells average (True) from marginal. ``region`` is what stands in every
    output: "FR", or "world average, no region set".
    """

    g_per_kwh: float
    region: str
    source: str
    basis: str = "unknown"
    average: bool = True
    estimated: bool = True
    year: int | None = None
    time_unix_ns: int | None = None
    fallback: bool = False

    @property
    def kind(self) -> str:
        """Basis and average or marginal, in words; grams of different kinds are never summed or compared."""
        return f"{self.basis}, {'average' if self.average else 'marginal'}"


@dataclass(frozen=True, slots=True)
class FlopCount:
    """FLOPs of one piece of work (2 FLOPs a multiply-add).

    ``model_flops`` what the mathematics asks for; ``hardware_flops`` what ran, recomputation included, ``None`` where nobody counted;
    ``flops_by_dtype`` hardware FLOPs by ``"mm/bfloat16"``-like keys (``mm`` or ``conv``, dtype of the inputs);
    ``uncounted_ops`` operations that compute and have no formula; ``estimated`` where hardware FLOPs had to be inferred.
    """

    model_flops: float
    hardware_flops: float | None
    recompute_flops: float = 0.0
    flops_by_dtype: Mapping[str, float] = field(default_factory=dict)
    uncounted_ops: tuple[str, ...] = ()
    estimated: bool = False

    def __add__(self, other: FlopCount) -> FlopCount:
        by_dtype = dict(self.flops_by_dtype)
        for key, value in other.flops_by_dtype.items():
            by_dtype[key] = by_dtype.get(key, 0.0) + value
        return FlopCount(
            self.model_flops + other.model_flops,
            _sum_if_both(self.hardware_flops, other.hardware_flops),
            self.recompute_flops + other.recompute_flops,
            by_dtype,
            tuple(sorted({*self.uncounted_ops, *other.uncounted_ops})),
            self.estimated or other.estimated,
        )

    def scaled(self, factor: float) -> FlopCount:
        """The same work, ``factor`` times."""
        return FlopCount(
            self.model_flops * factor,
            None if self.hardware_flops is None else self.hardware_flops * factor,
            self.recompute_flops * factor,
            {key: value * factor for key, value in self.flops_by_dtype.items()},
            self.uncounted_ops,
            self.estimated,
        )


@dataclass(frozen=True, slots=True)
class DevicePeak:
    """Dense peak FLOP/s of a device at a dtype. ``basis``: "datasheet", "measured", "user" or "blended"."""

    flop_per_s: float
    device: str
    dtype: str
    basis: str
    source: str


@dataclass(frozen=True, slots=True)
class Work:
    """What was done: steps, units and FLOPs. Adds up; a sum with something unknown in it is unknown."""

    n_steps: int = 0
    samples: int | None = None
    tokens: int | None = None
    flops: FlopCount | None = None

    def __add__(self, other: Work) -> Work:
        if not self.n_steps:
            return other
        if not other.n_steps:
            return self
        return Work(
            self.n_steps + other.n_steps,
            _sum_if_both(self.samples, other.samples),
            _sum_if_both(self.tokens, other.tokens),
            _sum_if_both(self.flops, other.flops),
        )


Addend = TypeVar("Addend", int, float, FlopCount)


def _sum_if_both(a: Addend | None, b: Addend | None) -> Addend | None:
    return None if a is None or b is None else a + b


@dataclass(frozen=True, slots=True)
class PhaseTotals:
    """What one phase of the run has used so far; all phases together are the run.

    ``n_steps`` counts steps (train) or occurrences (other phases). ``energy_j`` and what follows from it cover the domains that
    could be read; ``None`` where none could. Bounds are ``None`` where no domain is counted.
    """

    phase: Phase
    n_steps: int = 0
    duration_s: float = 0.0
    samples: int | None = None
    tokens: int | None = None
    energy_j: float | None = None
    energy_lo_j: float | None = None
    energy_hi_j: float | None = None
    facility_energy_j: float | None = None
    operational_g: float | None = None
    embodied_g: float | None = None
    emissions_g: float | None = None
    model_flops: float | None = None
    hardware_flops: float | None = None


@dataclass(frozen=True, slots=True)
class RunTotals:
    """The run so far: the sums of its phases, bounded as one interval, and its domains."""

    phases: tuple[PhaseTotals, ...] = ()
    domains: tuple[DomainEnergy, ...] = ()
    duration_s: float = 0.0
    energy_j: float | None = None
    energy_lo_j: float | None = None
    energy_hi_j: float | None = None
    facility_energy_j: float | None = None
    operational_g: float | None = None
    embodied_g: float | None = None
    emissions_g: float | None = None

    def phase(self, phase: Phase | str) -> PhaseTotals:
        """The totals of one phase; an empty one where it never came."""
        wanted = Phase(phase)
        for totals in self.phases:
            if totals.phase is wanted:
                return totals
        return PhaseTotals(wanted)

    def share(self, method: Method) -> float | None:
        """The share of the run's joules known by this method, 0-1; ``None`` before the first joule."""
        total = sum(domain.energy_j for domain in self.domains)
        if not total:
            return None
        return sum(domain.energy_j for domain in self.domains if domain.method is method) / total


@dataclass(frozen=True, slots=True, kw_only=True)
class PerStep:
    """What a train step takes just now, by the last record: of one rank, or as sums over ranks. ``mfu`` and ``hfu`` are fractions."""

    duration_s: float | None = None  # of one rank alone
    energy_j: float | None = None
    emissions_g: float | None = None
    samples: float | None = None
    tokens: float | None = None
    power_w: float | None = None
    peak_flop_per_s: float | None = None
    mfu: float | None = None
    hfu: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSums:
    """What typical train steps (none in which FLOPs were counted) took so far: of one rank, or of all, whose steps are the same ones.

    ``energy_j`` and the units are ``None`` where some of it is not known.
    """

    n_steps: int
    energy_j: float | None = None
    energy_lo_j: float | None = None
    energy_hi_j: float | None = None
    samples: float | None = None
    tokens: float | None = None

    def units(self, unit: str) -> float | None:
        """How many tokens, samples or steps these are; ``None`` where that is not known."""
        return {"token": self.tokens, "sample": self.samples, "step": float(self.n_steps)}[unit] or None

    @property
    def work_alone(self) -> TrainSums:
        """The same steps without joules of their own, for another rank meters them."""
        return replace(self, energy_j=0.0, energy_lo_j=None, energy_hi_j=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What adds up over ranks: the segment so far, the train phase's work, and what is projected and carried."""

    energy_j: float | None = None
    energy_lo_j: float | None = None
    energy_hi_j: float | None = None
    facility_energy_j: float | None = None
    operational_g: float | None = None
    embodied_g: float | None = None
    emissions_g: float | None = None
    samples: int | None = None
    tokens: int | None = None
    model_flops: float | None = None
    hardware_flops: float | None = None
    projected_total_g: float | None = None
    projected_energy_j: float | None = None
    carried_energy_j: float | None = None
    carried_emissions_g: float | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RankTotals(Sums):
    """What one rank tells the others of itself. ``status`` is "running" until its run has ended; the means are over typical steps.

    ``devices`` are the manifest's; ``accelerator_j`` are the segment's joules without those of CPU and memory, which one rank of a node
    meters for all.
    """

    rank: int
    devices: tuple[str, ...] = ()
    node: str = ""
    status: str = "running"
    last_step: int | None = None
    step_time_s: float | None = None
    peak_flop_per_s: float | None = None
    mfu: float | None = None
    hfu: float | None = None
    per_step: PerStep | None = None
    accelerator_j: float | None = None
    train: TrainSums | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the ranks, and the ranks at both ends."""

    min: float
    median: float
    max: float
    min_rank: int
    max_rank: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class JobTotals(Sums):
    """All ranks together, as rank zero knows them: sums over those that report, each as of its last word.

    ``mfu`` and ``hfu`` are FLOPs over the sum of the peaks. ``silent`` ranks never reported, and nothing of them is in the sums;
    ``oldest_age_s`` is how long ago a rank whose run has not ended last told anything new (``oldest_rank``, the longest ago): long where
    it died, and where it hangs. ``per_step`` is ``None`` while not all ranks have been heard of, in a job's first seconds. ``sharing``
    ranks meter nothing but what another one meters as well: their joules and grams are in no sum, their work is, and their peaks stand in
    ``mfu`` as if they had devices of their own. ``unmetered`` ranks know no joules of theirs, and none are in the sums, though their work
    is. ``rank_energy_j`` is of the accelerators alone where every rank meters some
    (``accelerators_alone``). What is projected, and ``train``, is ``None`` unless all ranks know it. A job has one saving: its own joules
    per unit of work against the baseline's, both of all ranks; ``projected_savings_lo_g`` and ``..._hi_g`` are its bounds, by the meters'.
    """

    world_size: int
    reporting: int
    ended: int
    silent: tuple[int, ...] = ()
    oldest_rank: int | None = None
    oldest_age_s: float = 0.0
    peak_flop_per_s: float | None = None
    mfu: float | None = None
    hfu: float | None = None
    rank_energy_j: Spread | None = None
    rank_step_time_s: Spread | None = None
    per_step: PerStep | None = None
    sharing: tuple[int, ...] = ()
    unmetered: tuple[int, ...] = ()
    accelerators_alone: bool = False
    train: TrainSums | None = None
    projected_savings_g: float | None = None
    projected_savings_lo_g: float | None = None
    projected_savings_hi_g: float | None = None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """``n_steps`` >= 1 consecutive steps of one phase (outside train: one occurrence of the phase).

    Energy, time, work and FLOPs are sums over them; ``power_w``, ``mfu`` and ``hfu`` are means. ``step`` is the last of them, on the
    step axis of the user's own loss. ``energy_j`` is IT energy; ``facility_energy_j`` is that times PUE. ``mfu`` and ``hfu`` are
    fractions. ``totals`` is this rank's segment so far, this record included; ``job``, on rank zero of several, all ranks', and there
    alone stands a job's saving.
    """

    step: int
    n_steps: int
    phase: Phase
    rank: int
    segment: int
    start_ns: int
    end_ns: int
    time_unix_ns: int
    duration_s: float
    samples: int | None
    tokens: int | None
    energy_j: float | None
    energy_lo_j: float | None
    energy_hi_j: float | None
    facility_energy_j: float | None
    domains: tuple[DomainEnergy, ...]
    power_w: float | None
    model_flops: float | None
    hardware_flops: float | None
    peak_flop_per_s: float | None
    mfu: float | None
    hfu: float | None
    intensity_g_per_kwh: float | None
    operational_g: float | None
    embodied_g: float | None
    emissions_g: float | None
    peak_memory_bytes: int | None
    flags: tuple[str, ...]
    totals: RunTotals
    projected_total_g: float | None = None
    projected_savings_g: float | None = None
    job: JobTotals | None = None

    def per_step(self, value: float | None) -> float | None:
        """``value / n_steps``, or ``None``."""
        return None if value is None else value / self.n_steps

    def mean_step(self) -> PerStep:
        """The record divided by its steps."""
        return PerStep(
            duration_s=self.per_step(self.duration_s),
            energy_j=self.per_step(self.energy_j),
            emissions_g=self.per_step(self.emissions_g),
            samples=self.per_step(self.samples),
            tokens=self.per_step(self.tokens),
            power_w=self.power_w,
            peak_flop_per_s=self.peak_flop_per_s,
            mfu=self.mfu,
            hfu=self.hfu,
        )

    def flagged(self, flag: Flag) -> bool:
        """Whether the flag stands here, for any domain."""
        return any(own == flag or own.startswith(f"{flag}:") for own in self.flags)


@dataclass(frozen=True, slots=True)
class Embodied:
    """Manufacturing footprint of the devices in use, and how it is shared out over time.

    A run is charged ``manufacturing_kg x time / (lifetime_years x expected_utilization)`` (GSF SCI's M, with the idle share of
    the device's life spread over its use). ``manufacturing_lo_kg`` and ``manufacturing_hi_kg`` are the least and most that is
    published for it, ``None`` where no spread is known.
    """

    manufacturing_kg: float
    source: str
    lifetime_years: float = 4.0
    expected_utilization: float = 1.0
    manufacturing_lo_kg: float | None = None
    manufacturing_hi_kg: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deferral:
    """Work that was put off for a cleaner grid: what that was planned to save, and what it saved by the figures that the grid then had.

    ``planned_g_per_kwh`` and ``planned_baseline_g_per_kwh`` are grams per useful hour of a constant draw of 1 kW, from
    ``baseline_unix_ns`` on: with the wait, idling and resumes included, and for the ``baseline``, which worked from there without a wait.
    ``realised_...`` are the same by the same provider's figures after the fact, over ``realised_work_s`` of useful work done by
    ``realised_until_unix_ns``. ``None``: not known; ``unknown`` says why. ``idle_share`` is the draw while waiting over that at work,
    and ``idle_basis`` how it is known: "given", "metered" or "assumed". The work stood still from ``stop_unix_ns`` to
    ``resume_unix_ns``: as planned, until it went on.
    """

    policy: str
    baseline: str
    method: str  # what the plan took the intensity ahead from
    region: str
    source: str
    kind: str
    baseline_unix_ns: int
    deadline_unix_ns: int
    work_s: float  # useful work to be done by the deadline
    stop_unix_ns: int
    resume_unix_ns: int
    planned_g_per_kwh: float | None = None
    planned_baseline_g_per_kwh: float | None = None
    resume_s: float = 0.0  # work that the resume adds
    idle_share: float = 0.0
    idle_basis: str = ""
    realised_g_per_kwh: float | None = None
    realised_baseline_g_per_kwh: float | None = None
    realised_idle_share: float | None = None
    realised_work_s: float | None = None
    realised_until_unix_ns: int | None = None
    unknown: str = "the run has not told it"

    @property
    def waits_in_place(self) -> bool:
        """Whether what waits goes on drawing power."""
        return bool(self.idle_basis)

    @property
    def planned_saving(self) -> float | None:
        """As a fraction of the baseline; negative: it costs more."""
        return _saving(self.planned_g_per_kwh, self.planned_baseline_g_per_kwh)

    @property
    def realised_saving(self) -> float | None:
        """As a fraction of the baseline; negative: it cost more."""
        return _saving(self.realised_g_per_kwh, self.realised_baseline_g_per_kwh)


def _saving(emissions: float | None, baseline: float | None) -> float | None:
    if emissions is None or baseline is None:
        return None
    return 1 - emissions / baseline if baseline else 0.0


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the numbers of a run mean: written first, and again when more is known (the last one counts).

    A run has segments, one for each start of its process; they share ``run_id``, and ``started_unix_ns`` orders them. ``segment`` is
    one more than that of the segment which saved the checkpoint, or than the last one in the directory, whichever is later (two that
    were started in different directories from one checkpoint may bear the same number). Where a segment went on from a checkpoint,
    ``resumed_from_step`` is the checkpoint's step (-1: it was saved before the first), ``steps_before`` how many steps the run had done
    by then (on whatever step axis), and ``previous_segment`` the one that saved it:
    every record of an earlier segment of this rank with a later step was done again, unless the run had completed by then: then this
    segment is a branch of it, and takes nothing back. Both ``None`` where no checkpoint was told of, as in a new run or a requeued
    job: then nothing is known to have been done again.

    ``carried_energy_j`` and ``carried_emissions_g`` are what this rank's earlier segments used, as far as their files were found (on
    rank zero also those of ranks that are no more): all of it, wasted work included. They are no part of any record's ``totals``,
    which are the segment's own. ``job`` names the job that the run is part of and the node it is on, as its scheduler does
    (``scheduler``, ``job_id``, ``array_job_id``, ``array_task_id``, ``node_list``, ``node``, ``restart_count``, ``elastic_run_id``,
    ``elastic_restart_count``), where it tells. ``deferrals`` are waits before the run and pauses in it for a cleaner grid, those of earlier
    segments among them, on rank zero.
    """

    run_id: str
    run_name: str
    segment: int
    rank: int
    world_size: int
    started_unix_ns: int
    domains: tuple[Domain, ...]
    missing: tuple[str, ...]  # domains looked for and not readable, each with its reason
    intensity: IntensityPoint | None
    pue: float
    pue_source: str
    embodied: Embodied | None = None
    price_per_kwh: float | None = None
    planned_steps: int | None = None
    attention_flops: str = "full"
    peaks: tuple[DevicePeak, ...] = ()
    device: str = ""
    model: str = ""
    parameters: int | None = None
    label: str = ""
    baseline: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    resumed_from_step: int | None = None
    previous_segment: int | None = None
    carried_energy_j: float | None = None
    carried_emissions_g: float | None = None
    job: Mapping[str, str] = field(default_factory=dict)
    deferrals: tuple[Deferral, ...] = ()
    steps_before: int = 0
    schema_version: int = SCHEMA_VERSION

    @property
    def devices(self) -> tuple[str, ...]:
        """The UUIDs of all that is metered; ``()`` where anything has none, which no other process meters."""
        uuids = tuple(domain.uuid for domain in self.domains)
        return uuids if all(uuids) else ()


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run (or the part of it that is resolved), for people and for the last line of its file.

    ``totals`` covers everything up to ``resolved_through`` (the last step whose energy is settled). The means are over the train
    steps that were not flagged ``counted``; per-unit figures are ``None`` where no tokens or samples were given. In a job of several
    ranks all of it is this rank's own, projections included; ``job`` has those of all ranks, and alone has a saving.
    """

    manifest: Manifest
    status: str  # running | completed | requeued | interrupted | failed
    resolved_through: int | None
    last_step: int | None
    totals: RunTotals
    n_steps: int = 0
    n_steps_excluded: int = 0
    step_time_s: float | None = None
    energy_per_step_j: float | None = None
    energy_per_step_lo_j: float | None = None
    energy_per_step_hi_j: float | None = None
    energy_per_token_j: float | None = None
    energy_per_sample_j: float | None = None
    emissions_per_step_g: float | None = None
    power_w: float | None = None
    model_flop_per_s: float | None = None
    mfu: float | None = None
    hfu: float | None = None
    peak_flop_per_s: float | None = None
    peak_memory_bytes: int | None = None
    cost: float | None = None
    projected_total_g: float | None = None
    projected_savings_g: float | None = None
    projected_savings_lo_g: float | None = None  # by the meters' bounds on both runs, not by how steps scatter
    projected_savings_hi_g: float | None = None
    projected_energy_j: float | None = None
    time_left_s: float | None = (
        None  # until the planned steps are done, by what typical steps and what goes on around them take
    )
    flags: Mapping[str, int] = field(default_factory=dict)  # flag -> records that carry it
    warnings: tuple[str, ...] = ()
    job: JobTotals | None = None

    def __str__(self) -> str:
        """The summary as text: every number with its unit, how it is known, and its bounds where it has any."""
        return "\n".join(f"{name:<12} {value}" for name, value in self.lines())

    def lines(self) -> list[tuple[str, str]]:
        """Name and text of each line of the summary, for whatever prints it."""
        manifest = self.manifest
        excluded = f", {self.n_steps_excluded} excluded (FLOPs were counted in them)" if self.n_steps_excluded else ""
        return [
            ("cost", self.headline()),
            ("run", f"{manifest.label or manifest.run_name} ({self.status})"),
            *self._segment_lines(),
            ("steps", f"{self.n_steps} measured{excluded}"),
            *self._energy_lines(),
            *self._efficiency_lines(),
            *self._carbon_lines(),
            *self._deferral_lines(),
            *self._job_lines(),
            *(("not metered", reason) for reason in self.not_metered()),
            *(("warning", warning) for warning in self.warnings),
        ]

    def headline(self) -> str:
        """What it cost, in one sentence: energy, gCO2e and of what kind, the time, and how the joules are known."""
        manifest, of = self.manifest, self.totals if self.job is None else self.job
        carried = manifest if self.job is None else self.job
        embodied = "; embodied not counted" if manifest.embodied is None else ", and embodied"
        duration_s = self.totals.duration_s
        clock = si(duration_s, "s") if duration_s < _LONG_S else f"{hours(duration_s)} h"
        energy_j, emissions_g, since = of.energy_j, of.emissions_g, f" in {clock}"
        if carried.carried_energy_j is not None:
            since = f", of which {kwh(energy_j)} in {clock} since it was resumed"
            energy_j = None if energy_j is None else energy_j + carried.carried_energy_j
            both = emissions_g is not None and carried.carried_emissions_g is not None
            emissions_g = (emissions_g or 0.0) + (carried.carried_emissions_g or 0.0) if both else None
        ranks = "" if self.job is None else f" on {self.job.reporting} of {self.job.world_size} ranks"
        said = f"{kwh(energy_j)}, {grams(emissions_g)} (operational, {self.kind}{embodied}){since}{ranks}"
        return "; ".join([said, *(self.how_known() or ["nothing measures energy here"])])

    @property
    def kind(self) -> str:
        """Of what kind the operational emissions are: "location-based", by the grid's average, or "marginal"."""
        grid = self.manifest.intensity
        return "location-based" if grid is None or grid.average else "marginal"

    def how_known(self) -> list[str]:
        """How the joules are known, and of what: "counted: gpu0", "modelled, not measured: cpu, dram"."""
        names = {method: ", ".join(one.name for one in self.manifest.domains if one.method is method) for method in Method}
        return [f"{_HOW_KNOWN[method]}: {names[method]}" for method in Method if names[method]]

    def not_metered(self) -> list[str]:
        """What is missing and why, in short; ``manifest.missing`` and ``green-torch doctor`` have the errors and what mends them."""
        modelled = {kind_of(domain.name) for domain in self.manifest.domains if domain.method is Method.ESTIMATED}
        return [
            *(_in_short(reason, modelled) for reason in self.manifest.missing),
            *(
                f"{flag.partition(':')[2]} in {count} {'record' if count == 1 else 'records'}, which it could not be read for"
                for flag, count in self.flags.items()
                if flag.startswith(f"{Flag.METER_FAILED}:")
            ),
        ]

    def _segment_lines(self) -> Iterator[tuple[str, str]]:
        """Where this segment goes on from, and what is in no sum here."""
        manifest = self.manifest
        if manifest.resumed_from_step is None and manifest.carried_energy_j is None:
            return
        after = "" if manifest.resumed_from_step is None else f" after step {manifest.resumed_from_step}"
        used = f"{kwh(manifest.carried_energy_j)} and {grams(manifest.carried_emissions_g)}"
        yield (
            "segment",
            f"{manifest.segment}, goes on{after}; earlier segments used {used}, which is in the cost above and in no other figure here",
        )

    def _energy_lines(self) -> Iterator[tuple[str, str]]:
        totals = self.totals
        if self.step_time_s is not None:
            power = "" if self.power_w is None else f" at {si(self.power_w, 'W')}"
            yield "step time", f"{si(self.step_time_s, 's')}{power}"
        yield "energy", f"{kwh(totals.energy_j)}{_between(totals.energy_lo_j, totals.energy_hi_j, kwh)}"
        if self.job is None:  # a job's work is that of all ranks
            units = (("step", self.energy_per_step_j), ("token", self.energy_per_token_j), ("sample", self.energy_per_sample_j))
            yield from ((f"  per {unit}", si(value, "J")) for unit, value in units if value is not None)
        parts = [f"{phase.phase} {kwh(phase.energy_j)}" for phase in totals.phases if phase.energy_j is not None]
        if len(parts) > 1:
            yield "  phases", ", ".join(parts)

    def _efficiency_lines(self) -> Iterator[tuple[str, str]]:
        if self.mfu is not None:
            basis = ", ".join(sorted({peak.basis for peak in self.manifest.peaks}))
            hfu = "unknown" if self.hfu is None else share(self.hfu)
            yield "MFU", f"{share(self.mfu)}, HFU {hfu} of {si(self.peak_flop_per_s, 'FLOP/s')} ({basis})"
        if self.model_flop_per_s is not None:
            yield "model FLOP/s", si(self.model_flop_per_s, "FLOP/s")

    def _carbon_lines(self) -> Iterator[tuple[str, str]]:
        manifest, totals, grid = self.manifest, self.totals, self.manifest.intensity
        where = "by the intensity provider"
        if grid is not None:
            value = f"{grid.g_per_kwh:.0f} gCO2e/kWh" if grid.time_unix_ns is None else "each record at its time's figure"
            where = f"{value}, {grid.region}, {grid.kind}, {grid.source}"
        yield "emissions", f"{grams(totals.emissions_g)} ({where}; PUE {manifest.pue:g}, {manifest.pue_source})"
        if manifest.embodied is not None:
            yield "  embodied", f"{grams(totals.embodied_g)} of it ({manifest.embodied.source})"
        if self.job is None:
            yield from self._projected_lines(self)
        if self.cost is not None:
            yield "price", f"{self.cost:.4g} at {manifest.price_per_kwh:g} per kWh"

    def _projected_lines(self, of: RunSummary | JobTotals) -> Iterator[tuple[str, str]]:
        """What the planned steps will come to, and save: of a process alone, or of all ranks."""
        manifest, indent = self.manifest, "" if of is self else "  "
        if of.projected_total_g is not None and self.status == "running":
            energy = "" if of.projected_energy_j is None else f" and {kwh(of.projected_energy_j)}"
            left = "" if self.time_left_s is None else f", {hours(self.time_left_s)} left"
            yield f"{indent}projected", f"{grams(of.projected_total_g)}{energy} for {manifest.planned_steps} steps{left}"
        if of.projected_savings_g is not None:
            lo_g, hi_g = of.projected_savings_lo_g, of.projected_savings_hi_g
            known = ", bounds unknown"
            if lo_g is not None and hi_g is not None:
                none = ", so it may be none" if lo_g <= 0 <= hi_g else ""
                known = (
                    f"{_between(lo_g, hi_g, grams)} by the meters' bounds on both runs, the scatter of steps not in it{none}"
                )
            yield (
                f"{indent}saving",
                f"{grams(of.projected_savings_g)}{known}; over {manifest.planned_steps} steps, against {manifest.baseline}",
            )

    def _deferral_lines(self) -> Iterator[tuple[str, str]]:
        """What putting work off was planned to save, and did."""
        for one in self.manifest.deferrals:
            planned = "not known" if one.planned_saving is None else f"{one.planned_saving:.1%}"
            saved = f"not known ({one.unknown})" if one.realised_saving is None else f"{one.realised_saving:.1%}"
            waited = hours(ns_to_s(one.resume_unix_ns - one.stop_unix_ns))
            by = f"{one.method}, {one.region}, {one.kind}, {one.source}"
            yield "put off", f"{waited} ({one.policy}): saved {saved}, planned {planned}, against {one.baseline} ({by})"

    def _job_lines(self) -> Iterator[tuple[str, str]]:
        """All ranks together, and who lags or draws most; on rank zero of several."""
        job = self.job
        if job is None:
            return
        silent = f"; nothing was heard of {_named(job.silent)}" if job.silent else ""
        age = (
            ""
            if job.oldest_rank is None
            else f"; rank {job.oldest_rank} last told anything new {si(job.oldest_age_s, 's')} ago"
        )
        yield (
            "all ranks",
            f"{job.reporting} of {job.world_size} report{silent}{age}; from step time on, what stands above is rank 0's",
        )
        once = f"; {_named(job.sharing)} on a GPU that another rank meters, counted once" if job.sharing else ""
        without = f"; without {_named(job.unmetered)}, whose joules are not known" if job.unmetered else ""
        yield "  energy", f"{kwh(job.energy_j)}{_between(job.energy_lo_j, job.energy_hi_j, kwh)}{once}{without}"
        train = job.train
        if train is not None and train.energy_j is not None:
            for unit in ("step", "token", "sample"):
                if units := train.units(unit):
                    yield f"  per {unit}", si(train.energy_j / units, "J")
        yield "  emissions", grams(job.emissions_g)
        if job.mfu is not None:
            hfu = "unknown" if job.hfu is None else share(job.hfu)
            yield "  MFU", f"{share(job.mfu)}, HFU {hfu} of {si(job.peak_flop_per_s, 'FLOP/s')} (the peaks' sum)"
        yield from self._projected_lines(job)
        for name, spread, text, of in (
            ("  per rank", job.rank_energy_j, kwh, "; accelerators alone" if job.accelerators_alone else ""),
            ("  step time", job.rank_step_time_s, lambda value: si(value, "s"), ""),
        ):
            if spread is not None:
                low, high = f"{text(spread.min)} (rank {spread.min_rank})", f"{text(spread.max)} (rank {spread.max_rank})"
                yield name, f"{low}, median {text(spread.median)}, {high}{of}"


def _named(ranks: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{', ...' if len(ranks) > 8 else ''}"


_HOW_KNOWN = {Method.COUNTER: "counted", Method.SAMPLED: "sampled", Method.ESTIMATED: "modelled, not measured"}


def _in_short(reason: str, modelled: set[str]) -> str:
    """What is missing and the first reason for it, without an error's own words or a line to type: "cpu, dram: no RAPL counters"."""
    bare = reason
    while (shorter := re.sub(r" ?\([^()]*\)", "", bare)) != bare:
        bare = shorter
    what, _, why = bare.partition(": ")
    names = what.split(", ")
    if not why or any(" " in name for name in names):
        return what.partition("; ")[0]
    instead = ", so modelled" if modelled.issuperset(map(kind_of, names)) else ""
    return f"{what}: {re.split(': |; ', why)[0]}{instead}"


def _between(lo: float | None, hi: float | None, text: Callable[[float], str]) -> str:
    return "" if lo is None or hi is None else f", between {text(lo)} and {text(hi)}"


Item = Manifest | StepRecord | RunSummary
