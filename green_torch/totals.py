"""The run's running sums: by phase, by domain, and over the train steps whose cost is typical. Pure."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, TypeVar

from green_torch import footprint
from green_torch.records import (
    DomainEnergy,
    Flag,
    Instant,
    Method,
    Phase,
    PhaseTotals,
    RunSummary,
    RunTotals,
    StepRecord,
    TrainSums,
    kind_of,
)
from green_torch.timeline import Amount, DomainTimeline, Level, Telescope
from green_torch.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


_PROJECTED = ("energy_j", "emissions_g", "duration_s")
_RECURRING = (Phase.EVAL, Phase.SAVE, Phase.OTHER)  # what goes on around train steps, as long as they go on


class Totals:
    """Running sums: by phase, by domain, and over the train steps whose cost is typical."""

    def __init__(self, timelines: Mapping[str, DomainTimeline]) -> None:
        self._timelines = timelines
        self._run = {name: Telescope(timeline) for name, timeline in timelines.items()}
        self._by_phase: dict[Phase, dict[str, Telescope]] = {}
        self._typical = {name: Telescope(timeline) for name, timeline in timelines.items()}
        self._phases: dict[Phase, PhaseTotals] = {}
        self._before: dict[Phase, PhaseTotals] = {}  # what the phases had come to when the first train step ended
        self._known_steps: Counter[str] = Counter()  # train steps whose quantity is known, by its name
        self.typical = Typical()

    def whole(self, n_domains: int) -> bool:
        """Whether the energy of a step of which so many domains are known is typical: not where a meter failed that was read before.

        Where one is read for the first time, the steps before are typical no more.
        """
        if n_domains > self.typical.n_domains:
            self.typical.begin_energy(n_domains)
            self._typical = {name: Telescope(timeline) for name, timeline in self._timelines.items()}
        return n_domains == self.typical.n_domains

    def take(self, name: str, phase: Phase, typical: bool, start: tuple[Instant, Level], end: tuple[Instant, Level]) -> Amount:
        """One piece of one domain, into every sum that it belongs to."""
        (a, level_a), (b, level_b) = start, end
        amount = self._timelines[name].amount(level_a, level_b, (b.at_ns - a.at_ns) / NS_PER_S)
        if phase not in self._by_phase:
            self._by_phase[phase] = {own: Telescope(timeline) for own, timeline in self._timelines.items()}
        if typical:
            self._typical[name].add(a.at_ns, level_a, b.at_ns, level_b, amount)
        self._by_phase[phase][name].add(a.at_ns, level_a, b.at_ns, level_b, amount)
        self._run[name].add(a.at_ns, level_a, b.at_ns, level_b, amount)
        return amount

    def add(self, record: StepRecord) -> None:
        """A record whose pieces have been taken."""
        if record.phase is Phase.TRAIN:
            if Phase.TRAIN not in self._phases:
                self._before = dict(self._phases)
            self._known_steps.update({name: record.n_steps for name in _PROJECTED if getattr(record, name) is not None})
        old = self._phases.get(record.phase, PhaseTotals(record.phase))
        _, lo_j, hi_j = add_domains(self._telescoped(self._by_phase.get(record.phase, {})))
        self._phases[record.phase] = PhaseTotals(
            phase=record.phase,
            n_steps=old.n_steps + record.n_steps,
            duration_s=old.duration_s + record.duration_s,
            samples=known_sum(old.samples, record.samples),
            tokens=known_sum(old.tokens, record.tokens),
            energy_j=known_sum(old.energy_j, record.energy_j),
            energy_lo_j=lo_j,
            energy_hi_j=hi_j,
            facility_energy_j=known_sum(old.facility_energy_j, record.facility_energy_j),
            operational_g=known_sum(old.operational_g, record.operational_g),
            embodied_g=known_sum(old.embodied_g, record.embodied_g),
            emissions_g=known_sum(old.emissions_g, record.emissions_g),
            model_flops=known_sum(old.model_flops, record.model_flops),
            hardware_flops=known_sum(old.hardware_flops, record.hardware_flops),
        )
        self.typical.add(record)

    def build(self) -> RunTotals:
        """The run so far."""
        phases = tuple(self._phases[phase] for phase in Phase if phase in self._phases)
        domains = tuple(self._telescoped(self._run))
        energy_j, lo_j, hi_j = add_domains(domains)
        return RunTotals(
            phases=phases,
            domains=domains,
            duration_s=math.fsum(phase.duration_s for phase in phases),
            energy_j=energy_j,
            energy_lo_j=lo_j,
            energy_hi_j=hi_j,
            facility_energy_j=sum_of_known(phase.facility_energy_j for phase in phases),
            operational_g=sum_of_known(phase.operational_g for phase in phases),
            embodied_g=sum_of_known(phase.embodied_g for phase in phases),
            emissions_g=sum_of_known(phase.emissions_g for phase in phases),
        )

    def projected(self, name: str, per_step: float | None, planned_steps: int) -> float | None:
        """What "energy_j", "emissions_g" or "duration_s" comes to in so many train steps, of which those that are done took what they took.

        Evaluation, saving and the like go on as they have since the first train step; what came before it comes once, and pauses tell
        nothing of further ones. Steps whose own is not known are taken for typical ones. ``None`` before the first that is.
        """
        done_steps = self._known_steps[name]
        if per_step is None or not done_steps:
            return None
        so_far = math.fsum(getattr(phase, name) or 0.0 for phase in self._phases.values())
        around = math.fsum(
            (getattr(self._phases[phase], name) or 0.0) - (getattr(self._before.get(phase), name, None) or 0.0)
            for phase in _RECURRING
            if phase in self._phases
        )
        return footprint.projected_total(so_far, per_step, around, done_steps, planned_steps)

    def means(self) -> RunSummary:
        """A summary with the means over typical train steps; the rest is the caller's."""
        return self.typical.build(tuple(self._telescoped(self._typical)))

    def _telescoped(self, sums: Mapping[str, Telescope]) -> list[DomainEnergy]:
        return [
            domain_energy(name, self._timelines[name].domain.method, Amount(total.energy_j, *total.bounds_j))
            for name, total in sums.items()
            if self._timelines[name].knots
        ]


class Typical:
    """Sums over train records that were not counted, kept apart by what each record knows; joules and grams where all meters were read."""

    def __init__(self) -> None:
        self.last_step: int | None = None
        self.flags: Counter[str] = Counter()
        self.peak_memory_bytes: int | None = None
        self.excluded = 0
        self.steps = 0
        self.seconds = 0.0
        self.begin_energy(0)
        self.model_flops = self.flop_seconds = self.capacity_flops = 0.0
        self.capacity_model_flops = self.capacity_hardware_flops = 0.0
        self.peaked_s = 0.0
        self.hardware_known = True

    def begin_energy(self, n_domains: int) -> None:
        """Takes the energy of steps of so many domains, from now on."""
        self.n_domains = n_domains
        self.energy_steps = self.emissions_steps = 0
        self.energy_j = self.energy_s = self.emissions_g = 0.0
        self.by_unit = {"token": (0.0, 0, 0), "sample": (0.0, 0, 0), "step": (0.0, 0, 0)}  # joules, units, steps

    def add(self, record: StepRecord) -> None:
        """Takes a record."""
        self.flags.update(record.flags)
        if record.peak_memory_bytes is not None:
            self.peak_memory_bytes = max(record.peak_memory_bytes, self.peak_memory_bytes or 0)
        if record.phase is not Phase.TRAIN:
            return
        self.last_step = record.step
        if record.flagged(Flag.COUNTED):
            self.excluded += record.n_steps
            return
        self.steps += record.n_steps
        self.seconds += record.duration_s
        if record.energy_j is not None and len(record.domains) == self.n_domains:
            self.energy_steps += record.n_steps
            self.energy_j += record.energy_j
            self.energy_s += record.duration_s
            for unit, count in (("token", record.tokens), ("sample", record.samples), ("step", record.n_steps)):
                if count:
                    energy_j, units, steps = self.by_unit[unit]
                    self.by_unit[unit] = (energy_j + record.energy_j, units + count, steps + record.n_steps)
        if record.emissions_g is not None and len(record.domains) == self.n_domains:
            self.emissions_steps += record.n_steps
            self.emissions_g += record.emissions_g
        if record.model_flops is not None:
            self._add_flops(record, record.model_flops)

    def _add_flops(self, record: StepRecord, model_flops: float) -> None:
        self.model_flops += model_flops
        self.flop_seconds += record.duration_s
        if record.peak_flop_per_s is not None:
            self.capacity_flops += record.peak_flop_per_s * record.duration_s
            self.capacity_model_flops += model_flops
            if record.hardware_flops is None:
                self.hardware_known = False
            else:
                self.capacity_hardware_flops += record.hardware_flops
            self.peaked_s += record.duration_s

    @property
    def emissions_per_step_g(self) -> float | None:
        """gCO2e of a typical train step; ``None`` before the first for which they are known."""
        return _ratio(self.emissions_g, self.emissions_steps)

    def per_unit(self, unit: str) -> tuple[float, float] | None:
        """Joules per token, sample or step, and how many of them a step has; ``None`` where that is not known."""
        energy_j, units, steps = self.by_unit[unit]
        return (energy_j / units, units / steps) if units else None

    def _unit_j(self, unit: str) -> float | None:
        known = self.per_unit(unit)
        return known[0] if known else None

    def build(self, domains: tuple[DomainEnergy, ...]) -> RunSummary:
        """A summary with the means, bounded by the energy of these domains over the same steps."""
        _, lo_j, hi_j = add_domains(domains)
        steps = self.energy_steps
        return RunSummary(
            manifest=None,  # type: ignore[arg-type]  # the recorder fills it in
            status="",
            resolved_through=None,
            totals=RunTotals(),
            last_step=self.last_step,
            n_steps=self.steps,
            n_steps_excluded=self.excluded,
            step_time_s=_ratio(self.seconds, self.steps),
            energy_per_step_j=_ratio(self.energy_j, steps),
            energy_per_step_lo_j=None if lo_j is None else _ratio(lo_j, steps),
            energy_per_step_hi_j=None if hi_j is None else _ratio(hi_j, steps),
            energy_per_token_j=self._unit_j("token"),
            energy_per_sample_j=self._unit_j("sample"),
            emissions_per_step_g=self.emissions_per_step_g,
            power_w=_ratio(self.energy_j, self.energy_s),
            model_flop_per_s=_ratio(self.model_flops, self.flop_seconds),
            mfu=_ratio(self.capacity_model_flops, self.capacity_flops),
            hfu=_ratio(self.capacity_hardware_flops, self.capacity_flops) if self.hardware_known else None,
            peak_flop_per_s=_ratio(self.capacity_flops, self.peaked_s),
            peak_memory_bytes=self.peak_memory_bytes,
            flags=dict(self.flags),
        )


def train_sums(typical: RunSummary, train: PhaseTotals) -> TrainSums | None:
    """The sums that a summary's means are of; ``None`` where it has no typical step.

    Units are those that the joules per unit were taken over; where nothing is metered, the train phase's share of them.
    """
    steps, per_step_j = typical.n_steps, typical.energy_per_step_j
    if not steps:
        return None

    def units(per_unit_j: float | None, counted: int | None) -> float | None:
        if per_step_j is not None:
            return steps * per_step_j / per_unit_j if per_unit_j else None
        return None if counted is None else counted * steps / train.n_steps

    return TrainSums(
        n_steps=steps,
        energy_j=_times(typical.energy_per_step_j, steps),
        energy_lo_j=_times(typical.energy_per_step_lo_j, steps),
        energy_hi_j=_times(typical.energy_per_step_hi_j, steps),
        samples=units(typical.energy_per_sample_j, train.samples),
        tokens=units(typical.energy_per_token_j, train.tokens),
    )


def of_all_ranks(parts: Sequence[TrainSums | None]) -> TrainSums | None:
    """A job's steps out of each rank's; ``None`` where one rank's are not known. Joules without bounds stand at face value."""
    ranks = [one for one in parts if one is not None]
    if len(ranks) < len(parts) or not ranks:
        return None
    return _added(ranks, max(one.n_steps for one in ranks))


def of_all_segments(parts: Sequence[TrainSums | None]) -> TrainSums | None:
    """A rank's steps out of its segments', one after another; ``None`` where none holds any."""
    segments = [one for one in parts if one is not None]
    return _added(segments, sum(one.n_steps for one in segments)) if segments else None


def _added(parts: Sequence[TrainSums], n_steps: int) -> TrainSums:
    lo_j = [one.energy_j if one.energy_lo_j is None else one.energy_lo_j for one in parts]
    hi_j = [one.energy_j if one.energy_hi_j is None else one.energy_hi_j for one in parts]
    bounded = any(one.energy_lo_j is not None for one in parts)
    return TrainSums(
        n_steps=n_steps,
        energy_j=whole_sum(one.energy_j for one in parts),
        energy_lo_j=whole_sum(lo_j) if bounded else None,
        energy_hi_j=whole_sum(hi_j) if bounded else None,
        samples=whole_sum(one.samples for one in parts),
        tokens=whole_sum(one.tokens for one in parts),
    )


def of_node(name: str) -> bool:
    """Whether a domain is what a node has once, CPU or memory, and no accelerator."""
    return kind_of(name) in {"cpu", "dram"}


def add_domains(domains: tuple[DomainEnergy, ...] | list[DomainEnergy]) -> tuple[float | None, float | None, float | None]:
    """Joules of several domains together, with bounds.

    Domains without bounds stand at face value; where none has any, the sum has none.
    """
    if not domains:
        return None, None, None
    energy_j = math.fsum(domain.energy_j for domain in domains)
    if all(domain.energy_lo_j is None for domain in domains):
        return energy_j, None, None
    lo_j = math.fsum(domain.energy_j if domain.energy_lo_j is None else domain.energy_lo_j for domain in domains)
    hi_j = math.fsum(domain.energy_j if domain.energy_hi_j is None else domain.energy_hi_j for domain in domains)
    return energy_j, lo_j, hi_j


def domain_energy(name: str, method: Method, amount: Amount) -> DomainEnergy:
    """An amount of a domain; only counted joules have bounds, and only where a power limit makes them finite."""
    bounded = method is Method.COUNTER and math.isfinite(amount.hi_j)
    return DomainEnergy(name, amount.energy_j, amount.lo_j if bounded else None, amount.hi_j if bounded else None, method)


def sum_amounts(amounts: list[Amount]) -> Amount:
    """Several amounts as one."""
    if len(amounts) == 1:
        return amounts[0]
    return Amount(
        math.fsum(amount.energy_j for amount in amounts),
        math.fsum(amount.lo_j for amount in amounts),
        math.fsum(amount.hi_j for amount in amounts),
    )


Number = TypeVar("Number", int, float)


def known_sum(a: Number | None, b: Number | None) -> Number | None:
    """Sum of what is known."""
    if a is None:
        return b
    return a if b is None else a + b


def _times(value: float | None, n: int) -> float | None:
    return None if value is None else n * value


def sum_of_known(values: Iterable[float | None]) -> float | None:
    """The sum of what is known; ``None`` where nothing is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None


def whole_sum(values: Iterable[float | None]) -> float | None:
    """The sum; ``None`` where one is not known, or there is none."""
    found = list(values)
    return None if not found or None in found else math.fsum(value for value in found if value is not None)


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None
