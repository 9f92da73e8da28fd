"""Turns spans into records once their energy is settled, keeps the run's totals, and feeds the sinks.

Works off the training thread: ``put`` only enqueues. A span is resolved when every domain's timeline has a counter change after
its end, or, flagged, two seconds later. Records leave in order.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

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
    PerStep,
    Phase,
    RankTotals,
    RunSummary,
    RunTotals,
    StepRecord,
    TrainSums,
)
from green_torch.totals import Totals, add_domains, domain_energy, known_sum, of_node, sum_amounts, train_sums
from green_torch.units import joules_to_kwh, s_to_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from green_torch.baseline import Baseline
    from green_torch.protocols import Clock, IntensityProvider, Sink
    from green_torch.records import Item, JobTotals
    from green_torch.sampler import Sampler
    from green_torch.steps import Span
    from green_torch.timeline import Level

PATIENCE_S = 2.0  # how long a record waits for the counter's next change, and leaving the context for its records
_LEAST_WAIT_S = 0.5  # for what is last to go forward, whatever else took its time
_MOST_WAIT_S = 10.0  # for sinks that are slow but go forward
_NUDGE_S = 0.02  # between looks while records are waited for
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


class Recorder:
    """The stage between spans and sinks; owns the run's totals.

    ``job_of``, in a job of several ranks, turns this rank's totals, when it asks for them, into all ranks' (on rank zero; elsewhere
    ``None``); ``awaited`` tells whether ranks have yet to tell of their first steps, for whom train records wait as they wait for a counter.
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
        job_of: Callable[..., JobTotals | None] | None = None,
        awaited: Callable[[], bool] = lambda: False,
    ) -> None:
        self.manifest = manifest
        self._clock = clock
        self._sampler = sampler
        self._intensity = intensity
        self._peak_of = peak_of
        self._warn = warn
        self._baseline = baseline
        self._doubted = False  # whether the baseline was held against what this run is
        self._part_time_s = dict(part_time_s or {})  # update period of each counter known to see only part of the power
        self._job_of = job_of
        self._awaited = awaited
        self._per_step: PerStep | None = None  # of the last train record
        self._outlets: list[Outlet] = []
        self._queue: deque[Span] = deque()
        self._work = threading.Lock()  # one drain at a time
        self._short = threading.Lock()  # the totals; never held for long
        self._levels: dict[str, dict[Instant, Level]] = {}  # domain -> instant -> level given out
        self._totals = Totals(sampler.timelines)
        self._point: IntensityPoint | None = manifest.intensity
        self._point_unix_ns = 0
        self._resolved_through: int | None = None
        self._manifest_due = False
        self._last = threading.Lock()  # a record on its way out, or the decision that none may follow
        self._over = False  # the summary is out

    def open(self, sinks: list[Sink]) -> None:
        """Lends the sinks and gives each the manifest."""
        self._manifest_due = False
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

    def restate(self, **known: Any) -> None:
        """More is known about the run (fields of the manifest, by name); the sinks get it before the next record."""
        with self._short:
            self.manifest = replace(self.manifest, **known)
        self._manifest_due = True

    @property
    def grid(self) -> tuple[IntensityPoint | None, int]:
        """The grid's intensity as it was last known, and the Unix time (ns) that it was asked for."""
        return self._point, self._point_unix_ns

    @property
    def totals(self) -> RunTotals:
        """The run as far as it is resolved."""
        with self._short:
            return self._totals.build()

    @property
    def pending(self) -> int:
        """Spans not yet resolved."""
        return len(self._queue)

    def tick(self, unread_since_ns: float = -math.inf, *, patient: bool = True) -> None:
        """Resolves what can be resolved now, and lets old readings go: levels from ``unread_since_ns`` on may yet be asked for."""
        if not self._work.acquire(blocking=False):
            return
        try:
            self._drain(patient=patient)
            if not self._queue and unread_since_ns > -math.inf:
                self._sampler.forget(min(unread_since_ns, self._clock.now_ns() - s_to_ns(PATIENCE_S)))
        finally:
            self._work.release()

    def drain(self, deadline_ns: int) -> None:
        """Waits until everything enqueued is resolved, or the deadline has come."""
        self._await(self.tick, deadline_ns)

    def deliver(self, deadline_ns: int) -> None:
        """Waits until the sinks have taken what is resolved, or the deadline has come."""
        while not all(outlet.idle for outlet in self._outlets) and self._clock.now_ns() < deadline_ns:
            self._clock.sleep(0.005)

    def conclude(self, deadline_ns: int) -> None:
        """Resolves the rest, settled or not; waits beyond the deadline only while that goes forward."""
        self._await(
            partial(self.tick, patient=False), max(deadline_ns, self._clock.now_ns() + s_to_ns(_LEAST_WAIT_S)), more=True
        )
        self._doubt_batch()
        if self._behind:
            self._warn("the last records could not be resolved: the grid's intensity provider has not answered")

    def _await(self, tick: Callable[[], None], deadline_ns: int, *, more: bool = False) -> None:
        """Resolves on a thread of its own, since a provider may hang, and waits for that; ``more``: half a second for each advance."""
        left = len(self._queue)
        halt = self._clock.every(_NUDGE_S, tick, "records, out of turn")
        try:
            while self._behind and self._clock.now_ns() < deadline_ns:
                self._clock.sleep(_NUDGE_S / 4)
                if more and len(self._queue) < left:
                    left, deadline_ns = len(self._queue), max(deadline_ns, self._clock.now_ns() + s_to_ns(_LEAST_WAIT_S))
        finally:
            halt()

    @property
    def _behind(self) -> bool:
        """Whether a span is still to be resolved, or is just being."""
        return bool(self._queue) or self._work.locked()

    def finish(self, status: str, warnings: Callable[[], tuple[str, ...]]) -> RunSummary:
        """Closes the sinks with the summary, which is the last thing that they get, and waits for them while they go forward.

        A sink that hangs is given up when it has got nothing done for two seconds, in half a second at the earliest; a slow one after
        ten.
        """
        begun_ns = self._clock.now_ns()
        with self._last:
            self._over = True
        self._hand_out(self._summary(status, warnings()))
        for outlet in self._outlets:
            outlet.close()
        halts = [self._clock.every(_NUDGE_S, outlet.tick, f"sink {outlet.name}, at the end") for outlet in self._outlets]
        while any(self._goes_forward(outlet, begun_ns) for outlet in self._outlets):
            self._clock.sleep(_NUDGE_S / 4)
        for halt in halts:
            halt()
        for outlet in self._outlets:
            if not outlet.done:
                self._warn(f"{outlet.name} is still busy: what it has not written yet may be missing from it")
        return self._summary(status, warnings())

    def _goes_forward(self, outlet: Outlet, begun_ns: int) -> bool:
        """Whether a closing sink, not yet done, is worth waiting for."""
        given_up_ns = max(begun_ns + s_to_ns(_LEAST_WAIT_S), outlet.moved_ns + s_to_ns(PATIENCE_S))
        return not outlet.done and self._clock.now_ns() < min(given_up_ns, begun_ns + s_to_ns(_MOST_WAIT_S))

    def summary(self, warnings: tuple[str, ...]) -> RunSummary:
        """The run as far as it is resolved."""
        return self._summary("running", warnings)

    def _drain(self, *, patient: bool) -> None:
        if self._sampler.domains != self.manifest.domains:  # others have come to share one
            self.restate(domains=self._sampler.domains)
        if self._manifest_due:
            self._manifest_due = False
            self._hand_out(self.manifest)
        while self._queue:
            span = self._queue[0]
            late = not patient or self._clock.now_ns() >= span.end.hi_ns + s_to_ns(PATIENCE_S)
            if not late and (not self._settled(span.end) or (span.phase is Phase.TRAIN and self._awaited())):
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
            with self._last:
                if self._over:
                    return
                self._hand_out(record)

    def _settled(self, instant: Instant) -> bool:
        with self._sampler.lock:
            return all(timeline.settled(instant) for timeline in self._sampler.timelines.values())

    def _level(self, name: str, instant: Instant) -> Level:
        """The level at an instant: the one already given out where there is one, and never below that of an earlier one.

        Boundaries of a device that are taken to have passed at once may still be known differently well: each has its own level.
        """
        given = self._levels.setdefault(name, {})
        if instant in given:
            return given[instant]
        level = self._sampler.timelines[name].level(instant)
        if given:
            last = next(reversed(given))
            if instant.at_ns >= last.at_ns and level.energy_j < given[last].energy_j:
                level = replace(level, energy_j=given[last].energy_j, guessed=level.guessed or given[last].guessed)
        given[instant] = level
        return level

    def _forget_levels(self, span: Span) -> None:
        """Keeps the levels at the ends of what is still open, since the step that a phase was cut out of is measured after it."""
        if span.open_since_ns is None:
            return
        for given in self._levels.values():
            while len(given) > _LEVELS and (oldest := next(iter(given))).at_ns < span.open_since_ns:
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
        domains: list[DomainEnergy] = []
        flags.update(f"{Flag.COUNTER_RESET}:{name}" for name in self._sampler.resets(span.end.hi_ns))
        with self._sampler.lock:
            known = {
                name
                for name, timeline in self._sampler.timelines.items()
                if timeline.knots and (name not in failing or timeline.settled(span.end))
            }
            typical = phase is Phase.TRAIN and Flag.COUNTED not in span.flags and self._totals.whole(len(known))
            for name, timeline in self._sampler.timelines.items():
                if name not in known:
                    flags.add(f"{Flag.METER_FAILED}:{name}")
                    continue
                settled = timeline.settled(span.end)
                if not settled and timeline.stood_still(span.end.hi_ns):
                    flags.add(f"{Flag.COUNTER_STUCK}:{name}")
                levels = [(self._level(name, a), self._level(name, b)) for a, b in span.pieces]
                if any(level.guessed for ends in levels for level in ends):
                    flags.add(f"{Flag.LATE}:{name}")
                amounts = [
                    self._totals.take(name, phase, typical, (a, level_a), (b, level_b))
                    for (a, b), (level_a, level_b) in zip(span.pieces, levels, strict=True)
                ]
                # A step may end, on another stream, before the one ahead of it: it has no time of its own, and its 0 J say nothing.
                if span.duration_s <= 0 or (timeline.counted and all(amount.vacuous for amount in amounts)):
                    flags.add(f"{Flag.UNRESOLVED}:{name}")
                period_s = self._part_time_s.get(name)
                if period_s and phase is Phase.TRAIN and near_commensurate(span.duration_s / span.work.n_steps, period_s):
                    flags.add(f"{Flag.PART_TIME}:{name}")
                if timeline.domain.shared:
                    flags.add(f"{Flag.SHARED}:{name}")
                timeline.forget(span.end.lo_ns)
                domains.append(domain_energy(name, timeline.domain.method, sum_amounts(amounts)))
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
        self._doubt_baseline()
        more: dict[str, Any] = {}
        if self._job_of is not None:
            if phase is Phase.TRAIN:
                self._per_step = record.mean_step()
            more["job"] = self._job(partial(self._rank_totals, "running", totals))
        elif self._baseline is not None:
            with self._short:
                typical = self._totals.means()
            more["projected_savings_g"] = self._savings_g(train_sums(typical, totals.phase(Phase.TRAIN)))[0]
        return replace(record, totals=totals, projected_total_g=self._projected_g(), **more)

    def own_totals(self, status: str = "running") -> RankTotals:
        """What this rank tells the others of itself."""
        return self._rank_totals(status, self.totals)

    def _job(self, own: Callable[[], RankTotals], *, ended: bool = False) -> JobTotals | None:
        """All ranks' totals, with what the job saves."""
        job = self._job_of(own, ended=ended) if self._job_of is not None else None
        if job is None or self._baseline is None:
            return job
        savings_g, lo_g, hi_g = self._savings_g(job.train)
        return replace(job, projected_savings_g=savings_g, projected_savings_lo_g=lo_g, projected_savings_hi_g=hi_g)

    def _rank_totals(self, status: str, totals: RunTotals) -> RankTotals:
        with self._short:
            typical, last_step = self._totals.means(), self._totals.typical.last_step
        manifest, train = self.manifest, totals.phase(Phase.TRAIN)
        accelerator_j, _, _ = add_domains([domain for domain in totals.domains if not of_node(domain.name)])
        return RankTotals(
            rank=manifest.rank,
            devices=manifest.devices,
            node=manifest.job.get("node", ""),
            status=status,
            last_step=last_step,
            energy_j=totals.energy_j,
            energy_lo_j=totals.energy_lo_j,
            energy_hi_j=totals.energy_hi_j,
            facility_energy_j=totals.facility_energy_j,
            operational_g=totals.operational_g,
            embodied_g=totals.embodied_g,
            emissions_g=totals.emissions_g,
            samples=train.samples,
            tokens=train.tokens,
            model_flops=train.model_flops,
            hardware_flops=train.hardware_flops,
            projected_total_g=self._projected_g(),
            projected_energy_j=self._projected_j(typical),
            carried_energy_j=manifest.carried_energy_j,
            carried_emissions_g=manifest.carried_emissions_g,
            step_time_s=typical.step_time_s,
            peak_flop_per_s=typical.peak_flop_per_s,
            mfu=typical.mfu,
            hfu=typical.hfu,
            per_step=self._per_step,
            accelerator_j=accelerator_j,
            train=train_sums(typical, train),
        )

    def _grid(self, time_unix_ns: int, flags: set[str]) -> IntensityPoint | None:
        """The grid's intensity then; where the provider fails or changes its kind, the last known one, flagged.

        One kind (lifecycle or direct, average or marginal) throughout, so that the run's grams add up.
        """
        try:
            point = self._intensity.at(time_unix_ns)
            if not isinstance(point, IntensityPoint) or not 0 <= point.g_per_kwh < math.inf:
                raise ValueError(f"it answered {point!r:.200}, which is no IntensityPoint with a finite figure")  # noqa: TRY301
            if self._point is not None and point.kind != self._point.kind:
                raise ValueError(f"it went from {self._point.kind} to {point.kind}, which don't add up")  # noqa: TRY301
            self._state(point)
            self._point, self._point_unix_ns = point, time_unix_ns
        except Exception as error:  # a provider may be anybody's code, or the network: rule 9
            instead = "emissions are unknown until it answers" if self._point is None else "the last known value stands in"
            self._warn(f"grid intensity can't be had ({error}): {instead}, flagged", key=f"grid {instead}")
            if self._point is not None:
                self._point = replace(self._point, fallback=True)
        if self._point is None or self._point.fallback:
            flags.add(Flag.INTENSITY_FALLBACK)
        return self._point

    def _state(self, point: IntensityPoint) -> None:
        """Warns of a figure that stands in for another, and puts the first one of a provider into the manifest."""
        if point.fallback:
            self._warn(f"grid intensity: {point.source}. Its records are flagged {Flag.INTENSITY_FALLBACK}")
        stated = self.manifest.intensity
        if stated is None or (stated.fallback and not point.fallback):
            self.restate(intensity=point)

    def _projected_g(self) -> float | None:
        """The planned run's emissions, in grams, from what typical steps cost."""
        return self._projected("emissions_g", self._totals.typical.emissions_per_step_g, self.manifest.carried_emissions_g)

    def _doubt_baseline(self) -> None:
        """Says once, on rank zero, why there is no saving against the baseline, or none of like with like; known at the first typical step."""
        baseline, typical = self._baseline, self._totals.typical
        if baseline is None or self._doubted or typical.emissions_per_step_g is None:
            return
        self._doubted = True
        if self.manifest.rank == 0:
            for doubt in baseline.doubts(self.manifest, counts_unit=typical.per_unit(baseline.unit) is not None):
                self._warn(doubt)

    def _doubt_batch(self) -> None:
        """Says at the end, on rank zero, that steps held another amount of work than the baseline's did, by their means over the run."""
        if self._baseline is None or self.manifest.rank != 0:
            return
        known = self._totals.typical.per_unit(self._baseline.unit)
        doubt = self._baseline.doubts_batch(known[1] * self.manifest.world_size) if known else ""
        if doubt:
            self._warn(doubt)

    def _projected_j(self, typical: RunSummary) -> float | None:
        """The planned run's joules."""
        return self._projected("energy_j", typical.energy_per_step_j, self.manifest.carried_energy_j)

    def _savings_g(self, train: TrainSums | None) -> tuple[float | None, float | None, float | None]:
        """What the planned run, of which these are the steps so far, saves against the baseline, and the least and most of it, in grams.

        The bounds are by what the meters warrant of both runs' train steps; ``None`` where one has none.
        """
        baseline, planned, point = self._baseline, self.manifest.planned_steps, self._point
        units = train.units(baseline.unit) if train is not None and baseline is not None else None
        if train is None or baseline is None or planned is None or point is None or units is None:
            return None, None, None
        planned_units = units / train.n_steps * planned

        def saved_g(baseline_j: float | None, own_j: float | None) -> float | None:
            if baseline_j is None or own_j is None:
                return None
            saved_j = footprint.saving(baseline_j, own_j / units, planned_units)
            return footprint.operational_g(saved_j, self.manifest.pue, point.g_per_kwh)

        least_g = saved_g(baseline.energy_per_unit_lo_j, train.energy_hi_j)
        most_g = saved_g(baseline.energy_per_unit_hi_j, train.energy_lo_j)
        bounds_g = (None, None) if least_g is None or most_g is None else (least_g, most_g)
        return saved_g(baseline.energy_per_unit_j, train.energy_j), *bounds_g

    def _projected(self, name: str, per_step: float | None, carried: float | None = 0.0) -> float | None:
        """The planned run's total of one quantity; of a resumed run, with what its earlier segments used, where that is known."""
        manifest = self.manifest
        if manifest.planned_steps is None or (manifest.resumed_from_step is not None and carried is None):
            return None
        with self._short:
            total = self._totals.projected(name, per_step, manifest.planned_steps - manifest.steps_before)
        return None if total is None else total + (carried or 0.0)

    def _summary(self, status: str, warnings: tuple[str, ...]) -> RunSummary:
        with self._short:
            totals, typical, resolved_through = self._totals.build(), self._totals.means(), self._resolved_through
        price = self.manifest.price_per_kwh
        cost = None
        if price is not None and totals.facility_energy_j is not None:
            cost = joules_to_kwh(totals.facility_energy_j) * price
        own = (
            train_sums(typical, totals.phase(Phase.TRAIN)) if self._job_of is None else None
        )  # a job's saving is that of all ranks
        savings_g, savings_lo_g, savings_hi_g = self._savings_g(own)
        total_s = self._projected("duration_s", typical.step_time_s)
        return replace(
            typical,
            manifest=self.manifest,
            status=status,
            resolved_through=resolved_through,
            totals=totals,
            cost=cost,
            projected_total_g=self._projected_g(),
            projected_savings_g=savings_g,
            projected_savings_lo_g=savings_lo_g,
            projected_savings_hi_g=savings_hi_g,
            projected_energy_j=self._projected_j(typical),
            time_left_s=None if total_s is None else max(0.0, total_s - totals.duration_s),
            warnings=warnings,
            job=self._job(partial(self.own_totals, status), ended=True),
        )

    def _hand_out(self, item: Item) -> None:
        for outlet in self._outlets:
            outlet.put(item)
