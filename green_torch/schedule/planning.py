"""``plan()``: the low-carbon window for a job, or the pieces to run it in, against starting now. Pure.

Emissions are per kW of constant draw (g/kW): the integral of the intensity over the time at work. A job's own power scales them, saving
and all, so no power needs to be known.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from green_torch.errors import ArgumentError, IntensityError
from green_torch.intensity.online import iso
from green_torch.schedule.optimum import one_piece, pieces, slot_s
from green_torch.schedule.series import MAX_GAP_S, series
from green_torch.units import NS_PER_S, S_PER_HOUR, ns_to_s, s_to_ns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from green_torch.records import IntensityPoint
    from green_torch.schedule.series import Series

RESUME_OVERHEAD_S = 120.0  # load, compile, warm up: a guess to be replaced by the job's own
FORECAST = "forecast"
_EPSILON_S = 1e-6

Duration = float | timedelta  # a number is in seconds


@dataclass(frozen=True, slots=True)
class Interval:
    """Time at work. ``g_per_kwh`` is the mean intensity over it, ``overhead_s`` the part of it that a resume takes."""

    start_unix_ns: int
    end_unix_ns: int
    g_per_kwh: float
    overhead_s: float = 0.0

    @property
    def duration_s(self) -> float:
        """From start to end."""
        return ns_to_s(self.end_unix_ns - self.start_unix_ns)


@dataclass(frozen=True, slots=True)
class Plan:
    """When to run, and what that is worth against the baseline.

    ``release_unix_ns`` is when to hand the job to the queue: ``queue_delay`` before it starts. ``emissions_g_per_kw`` and
    ``baseline_g_per_kw`` are grams per kW of constant draw, ``emissions_g`` and ``baseline_g`` those at ``power_w``, ``None`` where that
    is not known. ``method`` names what the intensity ahead was taken from, ``horizon_s`` how far it reaches, ``age_s`` how old
    it is (``None``: unknown). ``at_once``: nothing is gained by waiting.
    """

    region: str
    source: str
    kind: str
    method: str
    now_unix_ns: int
    deadline_unix_ns: int
    duration_s: float
    intervals: tuple[Interval, ...]
    release_unix_ns: int
    emissions_g_per_kw: float
    baseline_g_per_kw: float
    baseline: str
    horizon_s: float
    age_s: float | None
    power_w: float | None = None

    @property
    def start_unix_ns(self) -> int:
        """When the work begins."""
        return self.intervals[0].start_unix_ns

    @property
    def end_unix_ns(self) -> int:
        """When it is done."""
        return self.intervals[-1].end_unix_ns

    @property
    def wait_s(self) -> float:
        """From now to the release."""
        return ns_to_s(self.release_unix_ns - self.now_unix_ns)

    @property
    def at_once(self) -> bool:
        """Whether the work is to begin now and run through."""
        return len(self.intervals) == 1 and self.release_unix_ns <= self.now_unix_ns

    @property
    def n_resumes(self) -> int:
        """How often the overhead of a resume is paid."""
        return sum(1 for one in self.intervals if one.overhead_s)

    @property
    def saving_g_per_kw(self) -> float:
        """Grams less than the baseline per kW of constant draw; negative: more."""
        return self.baseline_g_per_kw - self.emissions_g_per_kw

    @property
    def saving(self) -> float:
        """The saving as a fraction of the baseline."""
        return self.saving_g_per_kw / self.baseline_g_per_kw if self.baseline_g_per_kw else 0.0

    @property
    def emissions_g(self) -> float | None:
        """Grams at ``power_w``."""
        return self._at_power(self.emissions_g_per_kw)

    @property
    def baseline_g(self) -> float | None:
        """The baseline's grams at ``power_w``."""
        return self._at_power(self.baseline_g_per_kw)

    @property
    def saving_g(self) -> float | None:
        """Grams saved at ``power_w``."""
        return self._at_power(self.saving_g_per_kw)

    def _at_power(self, g_per_kw: float) -> float | None:
        return None if self.power_w is None else g_per_kw * self.power_w / 1000.0


def plan(
    forecast: Sequence[IntensityPoint],
    duration: Duration,
    deadline: datetime | Duration,
    interruptible: bool = False,
    *,
    resume_overhead: Duration = RESUME_OVERHEAD_S,
    power: float | None = None,
    queue_delay: Duration = 0.0,
    idle_power: float | None = None,
    running: bool = False,
    now: datetime | int | None = None,
    method: str = FORECAST,
    asked: datetime | int | None = None,
    max_gap: Duration = MAX_GAP_S,
    slot: Duration | None = None,
) -> Plan:
    """The best contiguous window for a job, or with ``interruptible`` the cheapest pieces, done by the deadline.

    A contiguous window is the exact best one of all. Pieces hold useful work in whole slots (a minute where that can be afforded), and
    are the best of all such; they are never worse than the window. Of equals, the earliest.

    Args:
        forecast: points from now on, each in force until the next.
        duration: useful work: seconds, or a ``timedelta``.
        deadline: when it must be done: a ``datetime`` with its offset, or seconds (a ``timedelta``) from now.
        interruptible: whether it may run in several pieces.
        resume_overhead: extra time at work of each resume, which counts against carbon and deadline.
        power: mean draw at work in watts, to give grams.
        queue_delay: how long the job waits in the queue, at worst, before it starts and before each resume.
        idle_power: draw in the gaps between pieces, in watts (needs ``power``): for a process that waits in place.
        running: the job is under way; waiting first costs a resume, and idle power from now on.
        now: when that is: a ``datetime`` with its offset, or Unix nanoseconds; the system's clock where not given.
        method: what the series was taken from.
        asked: when it was.
        max_gap: the longest stretch of the series without a figure that is bridged by the figure before it.
        slot: length of the slots, at most; by itself a minute, or as short as can be afforded.

    Raises:
        ArgumentError: an argument is wrong, or the deadline is shorter than the job.
        IntensityError: the series can't be used, or ends before the job could.
    """
    (found,) = plan_regions(
        {"": forecast},
        duration,
        deadline,
        interruptible,
        resume_overhead=resume_overhead,
        power=power,
        queue_delay=queue_delay,
        idle_power=idle_power,
        running=running,
        now=now,
        method=method,
        asked=asked,
        max_gap=max_gap,
        slot=slot,
    )
    return found


def plan_regions(
    forecasts: Mapping[str, Sequence[IntensityPoint]],
    duration: Duration,
    deadline: datetime | Duration,
    interruptible: bool = False,
    *,
    resume_overhead: Duration = RESUME_OVERHEAD_S,
    power: float | None = None,
    queue_delay: Duration = 0.0,
    idle_power: float | None = None,
    running: bool = False,
    now: datetime | int | None = None,
    method: str = FORECAST,
    asked: datetime | int | None = None,
    max_gap: Duration = MAX_GAP_S,
    slot: Duration | None = None,
) -> tuple[Plan, ...]:
    """A plan for each region, the best first. The baseline of all is starting now in the first region of the mapping.

    Arguments and errors are those of :func:`plan`; series of different kinds (lifecycle, direct; average, marginal) are refused.
    """
    now_ns = time.time_ns() if now is None else unix_ns(now, "now")
    asks = _Asks(
        duration_s=seconds(duration, "duration"),
        deadline_s=_deadline_s(deadline, now_ns),
        overhead_s=seconds(resume_overhead, "resume_overhead", least=0.0),
        queue_s=seconds(queue_delay, "queue_delay", least=0.0),
        idle=_idle(power, idle_power),
        running=running,
        interruptible=interruptible,
    )
    if asks.duration_s + asks.first_s > asks.deadline_s + _EPSILON_S:
        queued = f" and up to {_hours(asks.queue_s)} in the queue" if asks.first_s else ""
        raise ArgumentError(
            f"a job of {_hours(asks.duration_s)}{queued} can't be done within {_hours(asks.deadline_s)}: start it now, or give it more time"
        )
    if not forecasts:
        raise ArgumentError("no region to plan for: give one at least")
    gap_s = seconds(max_gap, "max_gap", least=0.0)
    grids = {name: series(points, now_ns, max_gap_s=gap_s) for name, points in forecasts.items()}
    _check(grids, asks)
    home_name, home = next(iter(grids.items()))
    several = (
        _pieces(list(grids.values()), asks, None if slot is None else seconds(slot, "slot"))
        if interruptible
        else [None] * len(grids)
    )
    plans = []
    for (name, grid), parts in zip(grids.items(), several, strict=True):
        best = _best(grid, asks, parts)
        plans.append(
            Plan(
                region=name or grid.region,
                source=grid.source,
                kind=grid.kind,
                method=method,
                now_unix_ns=now_ns,
                deadline_unix_ns=now_ns + s_to_ns(asks.deadline_s),
                duration_s=asks.duration_s,
                intervals=tuple(_interval(grid, *one) for one in best),
                release_unix_ns=now_ns + s_to_ns(max(0.0, best[0][0] - asks.queue_s)),
                emissions_g_per_kw=_cost(grid, best, asks),
                baseline_g_per_kw=home.between(asks.first_s, asks.first_s + asks.duration_s),
                baseline="starting now" + (f" in {home_name}" if len(grids) > 1 else ""),
                horizon_s=grid.end_s,
                age_s=None if asked is None else max(0.0, ns_to_s(now_ns - unix_ns(asked, "asked"))),
                power_w=power,
            )
        )
    return tuple(sorted(plans, key=lambda one: one.emissions_g_per_kw))


@dataclass(frozen=True, slots=True)
class _Asks:
    """What is asked of a plan, in seconds from now."""

    duration_s: float
    deadline_s: float
    overhead_s: float
    queue_s: float
    idle: float
    running: bool
    interruptible: bool

    @property
    def first_s(self) -> float:
        """The earliest start: the queue's delay, for what is not running yet."""
        return 0.0 if self.running else self.queue_s


def _check(grids: Mapping[str, Series], asks: _Asks) -> None:
    kinds = {grid.kind for grid in grids.values()}
    if len(kinds) > 1:
        raise IntensityError(
            f"the regions' figures are of different kinds ({'; '.join(sorted(kinds))}), which can't be compared"
        )
    for grid in grids.values():
        if grid.end_s + _EPSILON_S < asks.first_s + asks.duration_s:
            raise IntensityError(
                f"what is known ahead of {grid.region} ({grid.source}) ends at {iso(grid.origin_unix_ns + s_to_ns(grid.end_s))}, "
                f"before a job of {_hours(asks.duration_s)} that starts now would"
            )


_Parts = list[tuple[float, float, float]]  # start, end, of it overhead: seconds from now


def _best(grid: Series, asks: _Asks, parts: _Parts | None) -> _Parts:
    """The cheapest of starting now, a window, and pieces. Of equals the simpler; for a job that runs, the one that is done first."""
    best: _Parts = [(asks.first_s, asks.first_s + asks.duration_s, 0.0)]
    least = _cost(grid, best, asks)
    for other in (_window(grid, asks), parts):
        if other is None:
            continue
        cost = _cost(grid, other, asks)
        sooner = asks.running and cost <= least + 1e-9 * least and other[-1][1] < best[-1][1] - _EPSILON_S
        if sooner or cost < least - 1e-9 * least:
            best, least = other, cost
    return best


def _window(grid: Series, asks: _Asks) -> _Parts | None:
    """The best contiguous window; for a job that runs, after one pause."""
    overhead_s = asks.overhead_s if asks.running else 0.0
    whole_s = asks.duration_s + overhead_s
    latest_s = min(asks.deadline_s, grid.end_s) - whole_s
    if latest_s < asks.queue_s:
        return None
    start_s = one_piece(grid, whole_s, asks.queue_s, latest_s, idle=asks.idle if asks.running else 0.0)
    return [(start_s, start_s + whole_s, overhead_s)]


def _pieces(grids: list[Series], asks: _Asks, slot: float | None) -> list[_Parts] | list[None]:
    """The best pieces, for each grid; none for a job of a single slot."""
    length_s = slot_s(asks.duration_s, asks.deadline_s - asks.first_s, len(grids), most_s=slot)
    if length_s >= asks.duration_s:
        return [None] * len(grids)
    found = pieces(
        [_later(grid, asks.first_s) for grid in grids],
        asks.duration_s,
        [min(asks.deadline_s, grid.end_s) - asks.first_s for grid in grids],
        slot_s=length_s,
        overhead_s=asks.overhead_s,
        apart_s=asks.queue_s,
        idle=asks.idle,
        running=asks.running,
    )
    plans = []
    for slots in found:
        parts = []
        for number, (first, last) in enumerate(slots):
            overhead_s = asks.overhead_s if number or (asks.running and first) else 0.0
            parts.append((asks.first_s + first * length_s - overhead_s, asks.first_s + last * length_s, overhead_s))
        plans.append(parts)
    return plans


def _later(grid: Series, by_s: float) -> Series:
    """The same grid with 0 s moved."""
    return grid if not by_s else replace(grid, knots_s=grid.knots_s - by_s)


def _cost(grid: Series, parts: _Parts, asks: _Asks) -> float:
    """Grams per kW at work, with what idles between the pieces."""
    total = sum(grid.between(start, end) for start, end, _ in parts)
    if asks.idle:
        begin = 0.0 if asks.running else parts[0][0]
        total += asks.idle * (grid.between(begin, parts[-1][1]) - total)
    return total


def _interval(grid: Series, start_s: float, end_s: float, overhead_s: float) -> Interval:
    origin_ns = grid.origin_unix_ns
    mean = grid.between(start_s, end_s) * S_PER_HOUR / (end_s - start_s)
    return Interval(origin_ns + s_to_ns(start_s), origin_ns + s_to_ns(end_s), mean, overhead_s)


def seconds(value: Duration, name: str, *, least: float | None = None) -> float:
    """A duration in seconds.

    Raises:
        ArgumentError: it is no finite number of seconds above 0, or of ``least`` at least.
    """
    number = value.total_seconds() if isinstance(value, timedelta) else value
    fits = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    if not fits or (number <= 0 if least is None else number < least):
        raise ArgumentError(
            f"{name}={value!r}: a timedelta, or seconds {'above 0' if least is None else 'of 0 at least'}, is needed"
        )
    return float(number)


def unix_ns(moment: datetime | int, name: str) -> int:
    """Unix nanoseconds of a moment.

    Raises:
        ArgumentError: it is neither a ``datetime`` with its offset nor Unix nanoseconds.
    """
    if isinstance(moment, datetime) and moment.tzinfo is not None:
        return round(moment.timestamp() * 1000) * (NS_PER_S // 1000)
    if isinstance(moment, int) and not isinstance(moment, bool):
        return moment
    raise ArgumentError(f"{name}={moment!r}: a datetime with its offset, datetime(..., tzinfo=...), is needed")


def _deadline_s(deadline: datetime | Duration, now_ns: int) -> float:
    if isinstance(deadline, datetime):
        ahead_s = ns_to_s(unix_ns(deadline, "deadline") - now_ns)
        if ahead_s <= 0:
            raise ArgumentError(f"deadline={deadline.isoformat()} has passed: give one in the future")
        return ahead_s
    return seconds(deadline, "deadline")


def _idle(power: float | None, idle_power: float | None) -> float:
    """Idle draw as a share of that at work."""
    for name, value in (("power", power), ("idle_power", idle_power)):
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
            raise ArgumentError(f"{name}={value!r}: watts of 0 at least are needed")
    if idle_power is None or idle_power == 0:
        return 0.0
    if not power or idle_power > power:
        raise ArgumentError(f"idle_power={idle_power!r} needs power= of at least as much")
    return idle_power / power


def _hours(duration_s: float) -> str:
    return f"{duration_s / S_PER_HOUR:.4g} h"
