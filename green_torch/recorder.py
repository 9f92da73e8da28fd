"""Turns spans into records once their energy is settled, keeps the run's totals, and feeds the sinks.

Works off the training thread: ``put`` only enqueues. A span is resolved when every domain's timeline has a counter change after
its end, or, flagged, two seconds later. Records leave in order.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from green_torch import footprint
from green_torch.calibration import near_commensurate
from green_torch.records import (
    DevicePeak,
    DomainEnergy,
    Flag,
    Instant,
    IntensityPoint,
    Manifest,
    Method,
    Phase,
    PhaseTotals,
    RunSummary,
    RunTotals,
    StepRecord,
)
from green_torch.timeline import Amount, Level, Telescope
from green_torch.units import joules_to_kwh, ns_to_s, s_to_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from green_torch.protocols import Clock, IntensityProvider, Sink
    from green_torch.records import Item
    from green_torch.sampler import Sampler
    from green_torch.steps import Span

PATIENCE_S = 2.0  # how long a record waits for the counter's next change, and leaving the context for its records
TICK_S = 0.1
_LEVELS = 256  # levels remembered per domain: a step's start, and the phases cut out of it
_QUEUE = 4096  # spans; beyond it neighbours are merged
_SAID: dict[str, str] = {  # what is said once of a flag that has befallen a domain
    Flag.METER_FAILED: "could not be read ({why}): its joules are missing from the records flagged meter_failed",
    Flag.COUNTER_RESET: "has a counter that went back or leapt: its joules across that are bounded by the power limit only, flagged counter_reset",
    Flag.COUNTER_STUCK: "has a counter that stands still: joules are taken at the last power, flagged counter_stuck",
    Flag.PART_TIME: "has a counter that sees only part of the power, and steps in time with it: records flagged part_time may be off "
    "by tens of percent; another batch size mends it",
}


@dataclass(frozen=True, slots=True)
class Baseline:
    """The run that savings are measured against: its train energy per unit of work."""

    name: str
    unit: str  # "token" | "sample" | "step"
    energy_per_unit_j: float


class Recorder:
    """The stage between spans and sinks; owns the run's totals."""

    def __init__(
        self,
        clock: Clock,
        sampler: Sampler,
        manifest: Manifest,
        *,
        intensity: IntensityProvider,
        peak_of: Callable[[Mapping[str, float]], DevicePeak | None],
        warn: Callable[[str], None],
        baseline: Baseline | None = None,
        part_time_s: Mapping[str, float] | None = None,
    ) -> None:
        self.manifest = manifest
        self._clock = clock
        self._sampler = sampler
        self._intensity = intensity
        self._peak_of = peak_of
        self._warn = warn
        self._baseline = baseline
        self._part_time_s = dict(part_time_s or {})  # update period of each counter known to see only part of the power
        self._sinks: list[Sink] = []
        self._queue: deque[Span] = deque()
        self._work = threading.Lock()  # one drain at a time
        self._levels: dict[str, dict[int, Level]] = {}  # domain -> instant -> level given out
        self._totals = _Totals(sampler)
        self._point: IntensityPoint | None = manifest.intensity
        self._resolved_through: int | None = None
        self._manifest_due = False

    def open(self, sinks: list[Sink]) -> None:
        """Lends the sinks and gives each the manifest."""
        self._sinks = list(sinks)
        self._deliver(self.manifest)

    def put(self, span: Span) -> None:
        """Enqueues a span (training thread). When the queue is full neighbours of one phase become one."""
        queue = self._queue
        if len(queue) >= _QUEUE and queue[-1].phase is span.phase:
            span = queue.pop().merged(span)
        queue.append(span)

    def restate(self, manifest: Manifest) -> None:
        """More is known about the run; the sinks get it before the next record (training thread)."""
        self.manifest = manifest
        self._manifest_due = True

    @property
    def pending(self) -> int:
        """Spans not yet resolved."""
        return len(self._queue)

    def tick(self) -> None:
        """Resolves what can be resolved now."""
        if not self._work.acquire(blocking=False):
            return
        try:
            self._drain()
        finally:
            self._work.release()

    def drain(self, timeout_s: float = PATIENCE_S) -> None:
        """Waits until everything enqueued is resolved, at most ``timeout_s`` (and a little for a slow sink)."""
        end_ns = self._clock.now_ns() + s_to_ns(timeout_s)
        while True:
            left_s = max(0.0, ns_to_s(end_ns - self._clock.now_ns()))
            if self._work.acquire(timeout=left_s):
                try:
                    self._drain()
                finally:
                    self._work.release()
            if not self._queue or not left_s:
                return
            self._clock.sleep(0.02)

    def finish(self, status: str, warnings: tuple[str, ...]) -> RunSummary:
        """Resolves the rest, whether settled or not, and closes the sinks with the summary."""
        self.drain()
        if self._work.acquire(timeout=PATIENCE_S):
            try:
                self._drain(patient=False)
                summary = self._summary(status, warnings)
                self._deliver(summary)
                for sink in self._sinks:
                    self._guard(sink, sink.close)
                self._sinks = []
            finally:
                self._work.release()
            return summary
        self._warn("a sink is still busy after 2 s: the last records and the summary were not written to it")
        return self._summary(status, warnings)

    def summary(self, warnings: tuple[str, ...]) -> RunSummary:
        """The run as far as it is resolved."""
        with self._work:
            return self._summary("running", warnings)

    def _drain(self, *, patient: bool = True) -> None:
        if self._manifest_due:
            self._manifest_due = False
            self._deliver(self.manifest)
        while self._queue:
            span = self._queue[0]
            late = not patient or self._clock.now_ns() >= span.end.hi_ns + s_to_ns(PATIENCE_S)
            if not late and not self._settled(span.end):
                return
            self._queue.popleft()
            if span.phase is None:
                self._skip(span)
                continue
            record = self._resolve(span, span.phase)
            self._resolved_through = record.step
            self._deliver(record)

    def _settled(self, instant: Instant) -> bool:
        with self._sampler.lock:
            return all(timeline.settled(instant) for timeline in self._sampler.timelines.values())

    def _level(self, name: str, instant: Instant) -> Level:
        """The level at an instant: the one already given out where there is one, and never below that of an earlier one."""
        given = self._levels.setdefault(name, {})
        if instant.at_ns in given:
            return given[instant.at_ns]
        level = self._sampler.timelines[name].level(instant)
        if given:
            last_ns = next(reversed(given))
            if instant.at_ns >= last_ns and level.energy_j < given[last_ns].energy_j:
                level = replace(level, energy_j=given[last_ns].energy_j)
        given[instant.at_ns] = level
        if len(given) > _LEVELS:
            del given[next(iter(given))]
        return level

    def _skip(self, span: Span) -> None:
        """Time that belongs to nobody: only the levels at its ends are taken, since steps on either side need them."""
        with self._sampler.lock:
            for name, timeline in self._sampler.timelines.items():
                if timeline.knots:
                    for start, end in span.pieces:
                        self._level(name, start)
                        self._level(name, end)
                    timeline.forget(span.end.lo_ns)

    def _measure(self, span: Span, phase: Phase, flags: set[str]) -> list[DomainEnergy]:
        """Joules of each readable domain over the span; what could not be read is flagged and left out."""
        failing = self._sampler.failing()
        clean = Flag.COUNTED not in span.flags
        domains: list[DomainEnergy] = []
        flags.update(f"{Flag.COUNTER_RESET}:{name}" for name in self._sampler.resets(span.end.hi_ns))
        with self._sampler.lock:
            for name, timeline in self._sampler.timelines.items():
                settled = timeline.settled(span.end)
                if not timeline.knots or (not settled and name in failing):
                    flags.add(f"{Flag.METER_FAILED}:{name}")
                    continue
                if not settled:
                    flags.add(f"{Flag.LATE}:{name}")
                    if timeline.stood_still(span.end.hi_ns):
                        flags.add(f"{Flag.COUNTER_STUCK}:{name}")
                amounts = [
                    self._totals.take(name, phase, clean, (a, self._level(name, a)), (b, self._level(name, b)))
                    for a, b in span.pieces
                ]
                if timeline.counted and all(amount.vacuous for amount in amounts):
                    flags.add(f"{Flag.UNRESOLVED}:{name}")
                period_s = self._part_time_s.get(name)
                if period_s and phase is Phase.TRAIN and near_commensurate(span.duration_s / span.work.n_steps, period_s):
                    flags.add(f"{Flag.PART_TIME}:{name}")
                if timeline.domain.shared:
                    flags.add(f"{Flag.SHARED}:{name}")
                timeline.forget(span.end.lo_ns)
                domains.append(_domain_energy(timeline.domain.name, timeline.domain.method, _sum(amounts)))
        for flag in sorted(flags):
            kind, _, name = flag.partition(":")
            if kind in _SAID:
                self._warn(f"{name} {_SAID[kind].format(why=failing.get(name, 'it has not answered yet'))}")
        return domains

    def _resolve(self, span: Span, phase: Phase) -> StepRecord:
        flags = {str(flag) for flag in span.flags}
        duration_s = span.duration_s
        domains = self._measure(span, phase, flags)
        energy_j, lo_j, hi_j = add_domains(domains)
        time_unix_ns = self._clock.epoch_unix_ns + span.end.at_ns
        point = self._grid(time_unix_ns, flags)
        manifest, work = self.manifest, span.work
        operational = None
        if energy_j is not None and point is not None:
            operational = footprint.operational_g(energy_j, manifest.pue, point.g_per_kwh)
        embodied = footprint.embodied_g(manifest.embodied, duration_s) if manifest.embodied else None
        flops = work.flops
        peak = self._peak_of(flops.flops_by_dtype) if flops is not None and flops.hardware_flops else None
        peak_flop_per_s = peak.flop_per_s if peak else None
        record = StepRecord(
            step=span.step,
            n_steps=work.n_steps,
            phase=phase,
            rank=manifest.rank,
            segment=manifest.segment,
            start_ns=span.start.at_ns,
            end_ns=span.end.at_ns,
            time_unix_ns=time_unix_ns,
            duration_s=duration_s,
            samples=work.samples,
            tokens=work.tokens,
            energy_j=energy_j,
            energy_lo_j=lo_j,
            energy_hi_j=hi_j,
            facility_energy_j=None if energy_j is None else footprint.facility_energy_j(energy_j, manifest.pue),
            domains=tuple(domains),
            power_w=energy_j / duration_s if energy_j is not None and duration_s else None,
            model_flops=flops.model_flops if flops else None,
            hardware_flops=flops.hardware_flops if flops else None,
            peak_flop_per_s=peak_flop_per_s,
            mfu=footprint.utilization(flops.model_flops if flops else None, duration_s, peak_flop_per_s),
            hfu=footprint.utilization(flops.hardware_flops if flops else None, duration_s, peak_flop_per_s),
            intensity_g_per_kwh=point.g_per_kwh if point else None,
            operational_g=operational,
            embodied_g=embodied,
            emissions_g=_known(operational, embodied),
            peak_memory_bytes=span.peak_memory_bytes,
            flags=tuple(sorted(flags)),
            totals=RunTotals(),
        )
        if record.hfu is not None and record.hfu > 1 and not record.flagged(Flag.COUNTED):
            self._warn(
                f"hardware FLOPs ran at {record.hfu:.2f} of the peak of {peak_flop_per_s:.3g} FLOP/s ({peak.source if peak else ''}), "
                "and MFU is not clamped: the peak is too low, or work was booked to the wrong step. Give peak_flop_per_s="
            )
        self._totals.add(record)
        totals = self._totals.build()
        total_g, savings_g = self._projections(totals)
        return replace(record, totals=totals, projected_total_g=total_g, projected_savings_g=savings_g)

    def _grid(self, time_unix_ns: int, flags: set[str]) -> IntensityPoint | None:
        """The grid's intensity then; where the provider fails, the last known one, flagged."""
        try:
            self._point = self._intensity.at(time_unix_ns)
        except Exception as error:  # a provider may be anybody's code, or the network: rule 9
            self._warn(f"grid intensity can't be had ({error}): the last known value stands in, flagged")
            if self._point is not None:
                self._point = replace(self._point, fallback=True)
        if self._point is not None and self._point.fallback:
            flags.add(Flag.INTENSITY_FALLBACK)
        return self._point

    def _projections(self, totals: RunTotals) -> tuple[float | None, float | None]:
        """The planned run's emissions and what it saves against the baseline, in grams."""
        planned = self.manifest.planned_steps
        train = totals.phase(Phase.TRAIN)
        if planned is None or totals.emissions_g is None:
            return None, None
        setup_g = totals.phase(Phase.SETUP).emissions_g or 0.0
        total_g = footprint.projected_total(totals.emissions_g, setup_g, train.n_steps, planned)
        savings_g = None
        if self._baseline and self._point and train.n_steps and train.energy_j:
            units = {"token": train.tokens, "sample": train.samples, "step": train.n_steps}[self._baseline.unit]
            if units:
                planned_units = units / train.n_steps * planned
                saved_j = footprint.saving(self._baseline.energy_per_unit_j, train.energy_j / units, planned_units)
                savings_g = footprint.operational_g(saved_j, self.manifest.pue, self._point.g_per_kwh)
        return total_g, savings_g

    def _summary(self, status: str, warnings: tuple[str, ...]) -> RunSummary:
        totals = self._totals.build()
        price = self.manifest.price_per_kwh
        cost = None
        if price is not None and totals.facility_energy_j is not None:
            cost = joules_to_kwh(totals.facility_energy_j) * price
        total_g, savings_g = self._projections(totals)
        return replace(
            self._totals.means(),
            manifest=self.manifest,
            status=status,
            resolved_through=self._resolved_through,
            totals=totals,
            cost=cost,
            projected_total_g=total_g,
            projected_savings_g=savings_g,
            warnings=warnings,
        )

    def _deliver(self, item: Item) -> None:
        for sink in list(self._sinks):
            self._guard(sink, lambda sink=sink: sink.write(item))  # type: ignore[misc]  # the default binds the loop variable

    def _guard(self, sink: Sink, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # a full disk must not end training: rule 9
            if sink in self._sinks:
                self._sinks.remove(sink)
            self._warn(f"{type(sink).__name__} is switched off: {type(error).__name__}: {error}")
            with contextlib.suppress(Exception):
                sink.close()


class _Totals:
    """Running sums: by phase, by domain, and over the train steps whose cost is typical."""

    def __init__(self, sampler: Sampler) -> None:
        self._timelines = sampler.timelines
        self._run = {name: Telescope(timeline) for name, timeline in sampler.timelines.items()}
        self._by_phase: dict[Phase, dict[str, Telescope]] = {}
        self._clean = {name: Telescope(timeline) for name, timeline in sampler.timelines.items()}
        self._phases: dict[Phase, PhaseTotals] = {}
        self._means = _Means()

    def take(self, name: str, phase: Phase, clean: bool, start: tuple[Instant, Level], end: tuple[Instant, Level]) -> Amount:
        """One piece of one domain, into every sum that it belongs to."""
        (a, level_a), (b, level_b) = start, end
        if phase not in self._by_phase:
            self._by_phase[phase] = {own: Telescope(timeline) for own, timeline in self._timelines.items()}
        if clean and phase is Phase.TRAIN:
            self._clean[name].add(a.at_ns, level_a, b.at_ns, level_b)
        self._by_phase[phase][name].add(a.at_ns, level_a, b.at_ns, level_b)
        return self._run[name].add(a.at_ns, level_a, b.at_ns, level_b)

    def add(self, record: StepRecord) -> None:
        """Everything but the bounds, which telescope."""
        old = self._phases.get(record.phase, PhaseTotals(record.phase))
        self._phases[record.phase] = PhaseTotals(
            phase=record.phase,
            n_steps=old.n_steps + record.n_steps,
            duration_s=old.duration_s + record.duration_s,
            samples=_known(old.samples, record.samples),
            tokens=_known(old.tokens, record.tokens),
            energy_j=_known(old.energy_j, record.energy_j),
            facility_energy_j=_known(old.facility_energy_j, record.facility_energy_j),
            operational_g=_known(old.operational_g, record.operational_g),
            embodied_g=_known(old.embodied_g, record.embodied_g),
            emissions_g=_known(old.emissions_g, record.emissions_g),
            model_flops=_known(old.model_flops, record.model_flops),
            hardware_flops=_known(old.hardware_flops, record.hardware_flops),
        )
        self._means.add(record)

    def build(self) -> RunTotals:
        """The run so far."""
        phases = tuple(self._bounded(self._phases[phase]) for phase in Phase if phase in self._phases)
        domains = tuple(self._telescoped(self._run))
        energy_j, lo_j, hi_j = add_domains(domains)
        return RunTotals(
            phases=phases,
            domains=domains,
            duration_s=math.fsum(phase.duration_s for phase in phases),
            energy_j=energy_j,
            energy_lo_j=lo_j,
            energy_hi_j=hi_j,
            facility_energy_j=_total(phase.facility_energy_j for phase in phases),
            operational_g=_total(phase.operational_g for phase in phases),
            embodied_g=_total(phase.embodied_g for phase in phases),
            emissions_g=_total(phase.emissions_g for phase in phases),
        )

    def means(self) -> RunSummary:
        """A summary with the means over typical train steps; the rest is the caller's."""
        return self._means.build(tuple(self._telescoped(self._clean)))

    def _bounded(self, totals: PhaseTotals) -> PhaseTotals:
        _, lo_j, hi_j = add_domains(self._telescoped(self._by_phase.get(totals.phase, {})))
        return replace(totals, energy_lo_j=lo_j, energy_hi_j=hi_j)

    def _telescoped(self, sums: Mapping[str, Telescope]) -> list[DomainEnergy]:
        return [
            _domain_energy(name, self._timelines[name].domain.method, Amount(total.energy_j, *total.bounds_j))
            for name, total in sums.items()
            if self._timelines[name].knots
        ]


class _Means:
    """Sums over train records that were not counted, kept apart by what each record knows."""

    def __init__(self) -> None:
        self.last_step: int | None = None
        self.flags: Counter[str] = Counter()
        self.peak_memory_bytes: int | None = None
        self.excluded = 0
        self.steps = self.energy_steps = 0
        self.seconds = self.energy_j = self.energy_s = self.emissions_g = 0.0
        self.by_unit = {"tokens": (0.0, 0), "samples": (0.0, 0)}
        self.model_flops = self.hardware_flops = self.flop_seconds = self.capacity_flops = 0.0
        self.capacity_model_flops = self.capacity_hardware_flops = 0.0
        self.peaked_s = 0.0

    def add(self, record: StepRecord) -> None:
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
        if record.energy_j is not None:
            self.energy_steps += record.n_steps
            self.energy_j += record.energy_j
            self.energy_s += record.duration_s
            self.emissions_g += record.emissions_g or 0.0
            for unit, count in (("tokens", record.tokens), ("samples", record.samples)):
                if count:
                    energy_j, units = self.by_unit[unit]
                    self.by_unit[unit] = (energy_j + record.energy_j, units + count)
        if record.model_flops is not None and record.hardware_flops is not None:
            self.model_flops += record.model_flops
            self.flop_seconds += record.duration_s
            if record.peak_flop_per_s is not None:
                self.capacity_flops += record.peak_flop_per_s * record.duration_s
                self.capacity_model_flops += record.model_flops
                self.capacity_hardware_flops += record.hardware_flops
                self.peaked_s += record.duration_s

    def build(self, domains: tuple[DomainEnergy, ...]) -> RunSummary:
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
            energy_per_token_j=_ratio(*self.by_unit["tokens"]),
            energy_per_sample_j=_ratio(*self.by_unit["samples"]),
            emissions_per_step_g=_ratio(self.emissions_g, steps),
            power_w=_ratio(self.energy_j, self.energy_s),
            model_flop_per_s=_ratio(self.model_flops, self.flop_seconds),
            mfu=_ratio(self.capacity_model_flops, self.capacity_flops),
            hfu=_ratio(self.capacity_hardware_flops, self.capacity_flops),
            peak_flop_per_s=_ratio(self.capacity_flops, self.peaked_s),
            peak_memory_bytes=self.peak_memory_bytes,
            flags=dict(self.flags),
        )


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


def _domain_energy(name: str, method: Method, amount: Amount) -> DomainEnergy:
    bounded = method is Method.COUNTER and math.isfinite(amount.hi_j)
    return DomainEnergy(name, amount.energy_j, amount.lo_j if bounded else None, amount.hi_j if bounded else None, method)


def _sum(amounts: list[Amount]) -> Amount:
    return Amount(
        math.fsum(amount.energy_j for amount in amounts),
        math.fsum(amount.lo_j for amount in amounts),
        math.fsum(amount.hi_j for amount in amounts),
    )


Number = TypeVar("Number", int, float)


def _known(a: Number | None, b: Number | None) -> Number | None:
    """Sum of what is known."""
    if a is None:
        return b
    return a if b is None else a + b


def _total(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None
