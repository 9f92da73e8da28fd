"""Turns spans into records once their energy is settled, keeps the run's totals, and feeds the sinks.

Works off the training thread: ``put`` only enqueues. A span is resolved when every domain's timeline has a counter change after
its end, or, flagged, two seconds later. Records leave in order.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from green_torch import footprint
from green_torch.calibration import near_commensurate
from green_torch.outlet import Outlet
from green_torch.records import (
    DevicePeak,
    DomainEnergy,
    Flag,
    Instant,
    IntensityPoint,
    Manifest,
    Phase,
    RunSummary,
    RunTotals,
    StepRecord,
)
from green_torch.totals import Totals, add_domains, domain_energy, known_sum, sum_amounts
from green_torch.units import joules_to_kwh, ns_to_s, s_to_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from green_torch.protocols import Clock, IntensityProvider, Sink
    from green_torch.records import Item
    from green_torch.sampler import Sampler
    from green_torch.steps import Span
    from green_torch.timeline import Level

PATIENCE_S = 2.0  # how long a record waits for the counter's next change, and leaving the context for its records
_LEAST_WAIT_S = 0.5  # for sinks to take the summary, whatever else took its time
_LEVELS = 256  # levels remembered per domain, at least
_PHASES_APART = len(Phase) + 1  # so far back the last span of the same phase is looked for
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
    """The stage between spans and sinks; owns the run's totals.

    ``unread_since_ns`` tells from when on levels may still be asked for that were not yet: older readings can be forgotten.
    """

    def __init__(
        self,
        clock: Clock,
        sampler: Sampler,
        manifest: Manifest,
        *,
        intensity: IntensityProvider,
        peak_of: Callable[[Mapping[str, float]], DevicePeak | None],
        warn: Callable[..., None],
        baseline: Baseline | None = None,
        part_time_s: Mapping[str, float] | None = None,
        unread_since_ns: Callable[[], float] | None = None,
    ) -> None:
        self.manifest = manifest
        self._clock = clock
        self._sampler = sampler
        self._intensity = intensity
        self._peak_of = peak_of
        self._warn = warn
        self._baseline = baseline
        self._part_time_s = dict(part_time_s or {})  # update period of each counter known to see only part of the power
        self._unread_since_ns = unread_since_ns
        self._outlets: list[Outlet] = []
        self._queue: deque[Span] = deque()
        self._work = threading.Lock()  # one drain at a time
        self._short = threading.Lock()  # the totals; never held for long
        self._levels: dict[str, dict[int, Level]] = {}  # domain -> instant -> level given out
        self._totals = Totals(sampler.timelines)
        self._point: IntensityPoint | None = manifest.intensity
        self._resolved_through: int | None = None
        self._manifest_due = False

    def open(self, sinks: list[Sink]) -> None:
        """Lends the sinks and gives each the manifest."""
        self._outlets = [Outlet(sink, self._clock, self._warn) for sink in sinks]
        self._hand_out(self.manifest)

    def put(self, span: Span) -> None:
        """Enqueues a span (training thread). When the queue is full it is merged with the last one of its phase."""
        queue = self._queue
        if len(queue) >= _QUEUE:
            for back in range(-1, -_PHASES_APART - 1, -1):
                if queue[back].phase is span.phase:
                    queue[back] = queue[back].merged(span)
                    return
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
        """Resolves what can be resolved now, and lets old readings go."""
        if not self._work.acquire(blocking=False):
            return
        try:
            self._drain()
            if not self._queue and self._unread_since_ns is not None:
                unread_ns = min(self._unread_since_ns(), self._clock.now_ns() - s_to_ns(PATIENCE_S))
                if not self._queue:  # nothing came in meanwhile
                    self._sampler.forget(unread_ns)
        finally:
            self._work.release()

    def drain(self, deadline_ns: int) -> None:
        """Waits until everything enqueued is resolved, or the deadline has come."""
        while True:
            left_s = max(0.0, ns_to_s(deadline_ns - self._clock.now_ns()))
            if self._work.acquire(timeout=left_s):
                try:
                    self._drain(deadline_ns=deadline_ns)
                finally:
                    self._work.release()
            if not self._queue or not left_s:
                return
            self._clock.sleep(0.02)

    def deliver(self, deadline_ns: int) -> None:
        """Waits until the sinks have taken what is resolved, or the deadline has come."""
        while not all(outlet.idle for outlet in self._outlets) and self._clock.now_ns() < deadline_ns:
            self._clock.sleep(0.005)

    def finish(self, status: str, warnings: Callable[[], tuple[str, ...]], deadline_ns: int) -> RunSummary:
        """Resolves the rest, settled or not, and closes the sinks with the summary; waits for them no longer than to the deadline."""
        if self._work.acquire(timeout=max(0.1, ns_to_s(deadline_ns - self._clock.now_ns()))):
            try:
                self._drain(patient=False)
            finally:
                self._work.release()
        else:
            self._warn("the last records could not be resolved: the grid's intensity provider has not answered")
        self._hand_out(self._summary(status, warnings()))
        for outlet in self._outlets:
            outlet.close()
        deadline_ns = max(deadline_ns, self._clock.now_ns() + s_to_ns(_LEAST_WAIT_S))
        while not all(outlet.done for outlet in self._outlets) and self._clock.now_ns() < deadline_ns:
            self._clock.sleep(0.01)
        for outlet in self._outlets:
            if not outlet.done:
                self._warn(f"{outlet.name} is still busy: what it has not written yet may be missing from it")
        return self._summary(status, warnings())

    def summary(self, warnings: tuple[str, ...]) -> RunSummary:
        """The run as far as it is resolved."""
        return self._summary("running", warnings)

    def _drain(self, *, patient: bool = True, deadline_ns: int | None = None) -> None:
        if self._manifest_due:
            self._manifest_due = False
            self._hand_out(self.manifest)
        while self._queue and (deadline_ns is None or self._clock.now_ns() <= deadline_ns):
            span = self._queue[0]
            late = not patient or self._clock.now_ns() >= span.end.hi_ns + s_to_ns(PATIENCE_S)
            if not late and not self._settled(span.end):
                return
            self._queue.popleft()
            try:
                if span.phase is None:
                    self._skip(span)
                    continue
                record = self._resolve(span, span.phase)
            except Exception as error:  # rule 9: one bad span must not cost the run
                self._warn(f"a record could not be made and is missing: {type(error).__name__}: {error}", key="resolve")
                continue
            self._hand_out(record)

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
        return level

    def _forget_levels(self, span: Span) -> None:
        """Keeps the levels at the ends of what is still open, since the step that a phase was cut out of is measured after it."""
        if span.open_since_ns is None:
            return
        for given in self._levels.values():
            while len(given) > _LEVELS and (oldest := next(iter(given))) < span.open_since_ns:
                del given[oldest]

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
                domains.append(domain_energy(timeline.domain.name, timeline.domain.method, sum_amounts(amounts)))
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
        peak = self._peak_of(flops.flops_by_dtype) if flops is not None and flops.flops_by_dtype else None
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
            emissions_g=known_sum(operational, embodied),
            peak_memory_bytes=span.peak_memory_bytes,
            flags=tuple(sorted(flags)),
            totals=RunTotals(),
        )
        used = max(record.mfu or 0.0, record.hfu or 0.0)
        if used > 1 and not record.flagged(Flag.COUNTED):
            self._warn(
                f"FLOPs ran at {used:.2f} of the peak of {peak_flop_per_s:.3g} FLOP/s ({peak.source if peak else ''}), "
                "and MFU is not clamped: the peak is too low, or work was booked to the wrong step. Give peak_flop_per_s=",
                key="peak",
            )
        with self._short:
            self._totals.add(record)
            self._resolved_through = record.step
            totals = self._totals.build()
        self._forget_levels(span)
        total_g, savings_g = self._projections(totals)
        return replace(record, totals=totals, projected_total_g=total_g, projected_savings_g=savings_g)

    def _grid(self, time_unix_ns: int, flags: set[str]) -> IntensityPoint | None:
        """The grid's intensity then; where the provider fails, the last known one, flagged."""
        try:
            point = self._intensity.at(time_unix_ns)
            if not isinstance(point, IntensityPoint) or not 0 <= point.g_per_kwh < math.inf:
                raise ValueError(f"it answered {point!r:.200}, which is no IntensityPoint with a finite figure")  # noqa: TRY301
            self._point = point
        except Exception as error:  # a provider may be anybody's code, or the network: rule 9
            self._warn(f"grid intensity can't be had ({error}): the last known value stands in, flagged", key="grid")
            if self._point is not None:
                self._point = replace(self._point, fallback=True)
        if self._point is not None and self._point.fallback:
            flags.add(Flag.INTENSITY_FALLBACK)
        return self._point

    def _projections(self, totals: RunTotals) -> tuple[float | None, float | None]:
        """The planned run's emissions and what it saves against the baseline, in grams; from what typical steps cost."""
        planned, typical = self.manifest.planned_steps, self._totals.typical
        per_step_g = typical.emissions_per_step_g
        if planned is None or totals.emissions_g is None or per_step_g is None:
            return None, None
        train, setup = totals.phase(Phase.TRAIN), totals.phase(Phase.SETUP)
        around_g = totals.emissions_g - (train.emissions_g or 0.0) - (setup.emissions_g or 0.0)
        total_g = footprint.projected_total(totals.emissions_g, per_step_g, around_g, train.n_steps, planned)
        own = typical.per_unit(self._baseline.unit) if self._baseline else None
        if self._baseline is None or self._point is None or own is None:
            return total_g, None
        energy_per_unit_j, units_per_step = own
        saved_j = footprint.saving(self._baseline.energy_per_unit_j, energy_per_unit_j, units_per_step * planned)
        return total_g, footprint.operational_g(saved_j, self.manifest.pue, self._point.g_per_kwh)

    def _summary(self, status: str, warnings: tuple[str, ...]) -> RunSummary:
        with self._short:
            totals, typical, resolved_through = self._totals.build(), self._totals.means(), self._resolved_through
        price = self.manifest.price_per_kwh
        cost = None
        if price is not None and totals.facility_energy_j is not None:
            cost = joules_to_kwh(totals.facility_energy_j) * price
        total_g, savings_g = self._projections(totals)
        return replace(
            typical,
            manifest=self.manifest,
            status=status,
            resolved_through=resolved_through,
            totals=totals,
            cost=cost,
            projected_total_g=total_g,
            projected_savings_g=savings_g,
            warnings=warnings,
        )

    def _hand_out(self, item: Item) -> None:
        for outlet in self._outlets:
            outlet.put(item)
