"""What putting work off has really saved: the plan's own sum, made again after the fact with the figures that the grid then had.

A run keeps account of its :class:`~green_torch.records.Deferral` items: waits before it (``green-torch wait`` hands its plan to the run
that it starts, by an environment variable) and pauses in it. Each is held against its own baseline, by the same provider: the time at
work since then, with what idled and what the resumes took, against the same useful work done without a wait. Deferrals overlap, so they
are not summed: the first one's saving is that of the run.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

from green_torch.clock import HostClock
from green_torch.errors import GreenTorchError, IntensityError
from green_torch.records import Deferral
from green_torch.schedule.observed import Observed
from green_torch.schedule.outlook import THRESHOLD
from green_torch.schedule.series import series
from green_torch.sinks.codec import parsed, plain
from green_torch.units import S_PER_HOUR, ns_to_s, s_to_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from green_torch.protocols import Clock
    from green_torch.records import IntensityPoint
    from green_torch.schedule.planning import Plan

LOOK_S = 900.0
_TELL_S = S_PER_HOUR  # so often at most the figures so far are stated; at the end in any case
_LEAST_IDLE_S = 60.0  # so long a run must have waited for its idle draw to be known


def planned(
    found: Plan, policy: str, *, stop_unix_ns: int, resume_unix_ns: int, baseline_unix_ns: int, **more: Any
) -> Deferral:
    """What a plan says of putting work off."""
    hours = found.duration_s / S_PER_HOUR
    return Deferral(
        policy=policy,
        baseline=found.baseline,
        method=found.method,
        region=found.region,
        source=found.source,
        kind=found.kind,
        baseline_unix_ns=baseline_unix_ns,
        deadline_unix_ns=found.deadline_unix_ns,
        work_s=found.duration_s,
        stop_unix_ns=stop_unix_ns,
        resume_unix_ns=resume_unix_ns,
        planned_g_per_kwh=found.emissions_g_per_kw / hours,
        planned_baseline_g_per_kwh=found.baseline_g_per_kw / hours,
        **more,
    )


def unplanned(point: IntensityPoint, policy: str, *, begin_unix_ns: int, **more: Any) -> Deferral:
    """Putting work off from there on by an online threshold on the grid that ``point`` is of: what that saves nobody knows ahead."""
    return Deferral(
        policy=policy,
        method=THRESHOLD,
        region=point.region,
        source=point.source,
        kind=point.kind,
        baseline_unix_ns=begin_unix_ns,
        stop_unix_ns=begin_unix_ns,
        **more,
    )


def realised(
    own: Deferral,
    every: Iterable[Deferral],
    points: Sequence[IntensityPoint],
    until_unix_ns: int,
    *,
    idle_share: float | None = None,
) -> Deferral:
    """A deferral with what it saved by these figures: up to ``until_unix_ns``, or where they end.

    Args:
        own: the deferral.
        every: all of the run's, itself among them: what was waited after its baseline began counts too.
        points: the grid's figures from the baseline's beginning on.
        until_unix_ns: when the work was last under way.
        idle_share: the metered draw while waiting in place over that at work; each deferral's own where that is not known.
    """
    begin_ns = own.baseline_unix_ns
    try:
        grid = series(points, begin_ns, what="what is known of the grid")
    except GreenTorchError as error:
        return _unknown(own, str(error))
    end_s = min(ns_to_s(until_unix_ns - begin_ns), grid.end_s)
    emissions, work_s, at_s = 0.0, 0.0, 0.0
    for one in sorted(every, key=lambda one: one.stop_unix_ns):
        stop_s = min(max(ns_to_s(one.stop_unix_ns - begin_ns), at_s), end_s)
        resume_s = min(max(ns_to_s(one.resume_unix_ns - begin_ns), stop_s), end_s)
        if resume_s <= stop_s:
            continue
        emissions += grid.between(at_s, stop_s) + _share(one, idle_share) * grid.between(stop_s, resume_s)
        work_s += stop_s - at_s
        if resume_s < end_s:
            work_s -= one.resume_s
        at_s = resume_s
    emissions += grid.between(at_s, end_s)
    work_s += end_s - at_s
    if work_s <= 0:
        return _unknown(own, "no work has been done since then")
    return replace(
        own,
        realised_g_per_kwh=emissions * S_PER_HOUR / work_s,
        realised_baseline_g_per_kwh=grid.between(0.0, work_s) * S_PER_HOUR / work_s,
        realised_idle_share=_share(own, idle_share),
        realised_work_s=work_s,
        realised_until_unix_ns=begin_ns + s_to_ns(end_s),
        unknown="",
    )


def _share(one: Deferral, metered: float | None) -> float:
    """The idle draw that a wait really took; whoever was not there draws nothing."""
    return metered if metered is not None and one.waits_in_place else one.idle_share


def _unknown(own: Deferral, why: str) -> Deferral:
    return replace(
        own,
        realised_g_per_kwh=None,
        realised_baseline_g_per_kwh=None,
        realised_idle_share=None,
        realised_work_s=None,
        realised_until_unix_ns=None,
        unknown=why,
    )


def present(clock: Clock) -> int:
    """Unix nanoseconds: the run's clock, or the system's where that is ahead of it (it was set, or the machine slept)."""
    own_ns = clock.epoch_unix_ns + clock.now_ns()
    return max(own_ns, time.time_ns()) if isinstance(clock, HostClock) else own_ns


def idle_share(train: tuple[float | None, float], paused: tuple[float | None, float]) -> float | None:
    """The draw while paused over that at work, from joules and seconds of both; ``None`` where too little is metered."""
    (train_j, train_s), (paused_j, paused_s) = train, paused
    if not train_j or train_s <= 0 or paused_j is None or paused_s < _LEAST_IDLE_S:
        return None
    return min(1.0, (paused_j / paused_s) / (train_j / train_s))


@final
class Account:
    """The deferrals of a run: takes them as they come, holds them against the grids' figures, and states them.

    Args:
        clock: the run's.
        idle: the metered draw while waiting in place over that at work; ``None`` where that is not known.
        state: takes all deferrals, whenever more is known.
    """

    def __init__(self, clock: Clock, idle: Callable[[], float | None], state: Callable[[tuple[Deferral, ...]], None]) -> None:
        self._clock = clock
        self.idle = idle
        self._state = state
        self._lock = threading.RLock()
        self._closed: dict[int, Deferral] = {}  # by the beginning of their baselines: of them nothing more will be known
        self._open: dict[int, Deferral] = {}
        self._grids: list[tuple[object, Observed]] = []
        self._told_ns = 0

    def watch(self, provider: object) -> Observed:
        """The memory of a provider whose figures count from now on."""
        with self._lock:
            for known, grid in self._grids:
                if known is provider:
                    return grid
            grid = Observed(provider)
            self._grids.append((provider, grid))
            return grid

    def take(self, deferral: Deferral) -> None:
        """A new deferral, or one of which more is known."""
        with self._lock:
            self._open[deferral.baseline_unix_ns] = deferral
        self.reckon(tell=True)

    def add(self, deferral: Deferral) -> None:
        """One from before the run, unless an earlier segment has told of it."""
        with self._lock:
            if deferral.baseline_unix_ns not in self._closed:
                self._open.setdefault(deferral.baseline_unix_ns, deferral)
        self.reckon(tell=True)

    def carry(self, deferrals: Sequence[Deferral], left_unix_ns: int | None) -> None:
        """Those of earlier segments. ``left_unix_ns``: when the last of these left to be queued again; ``None`` where it ended otherwise.

        Where it left for a pause, that is over now, and all are still under way; else what they saved stays as it was last known.
        """
        if not deferrals:
            return
        last = deferrals[-1]
        went_on = left_unix_ns is not None and last.resume_unix_ns > left_unix_ns
        with self._lock:
            for one in deferrals:
                self._open.pop(one.baseline_unix_ns, None)
            if went_on:
                self._open |= {one.baseline_unix_ns: one for one in deferrals}
                self._open[last.baseline_unix_ns] = replace(last, resume_unix_ns=max(last.stop_unix_ns, present(self._clock)))
            else:
                self._closed |= {one.baseline_unix_ns: one for one in deferrals}
        self.reckon(tell=True)

    def look(self) -> None:
        """Asks the grids (off the training thread)."""
        with self._lock:
            begin_ns, grids = min(self._open, default=None), list(self._grids)
        for _, grid in grids:
            grid.look(present(self._clock), begin_ns)
        self.reckon()

    def reckon(self, *, tell: bool = False) -> None:
        """Holds every deferral against what is known by now, without asking anybody."""
        with self._lock:
            if not self._open and not self._closed:
                return
            now_ns, share = present(self._clock), self.idle()
            every = tuple(self._open.values())
            self._open = {one.baseline_unix_ns: self._held(one, every, now_ns, share) for one in every}
            if tell or now_ns - self._told_ns >= s_to_ns(_TELL_S):
                self._told_ns = now_ns
                known = self._closed | self._open
                self._state(tuple(known[begin_ns] for begin_ns in sorted(known)))

    def _held(self, own: Deferral, every: Sequence[Deferral], now_ns: int, share: float | None) -> Deferral:
        found = _unknown(own, "no provider of this run's tells the grid's figures since then")
        for _, grid in self._grids:
            try:
                points = grid.checked(own.baseline_unix_ns, own.region, own.source, own.kind)
            except IntensityError as error:
                found = _unknown(own, str(error))
                continue
            found = realised(own, every, points, now_ns, idle_share=share)
            if not found.unknown:
                break
        return found


def shifted(deferral: Deferral, by_ns: int) -> Deferral:
    """A deferral in a trace's time, in that of the system."""
    names = ("baseline_unix_ns", "deadline_unix_ns", "stop_unix_ns", "resume_unix_ns")
    moved: dict[str, Any] = {name: getattr(deferral, name) + by_ns for name in names}
    return replace(deferral, **moved)


def handed(deferral: Deferral) -> str:
    """A deferral as an environment variable carries it to the command that waited."""
    return json.dumps(plain(deferral))


def taken(text: str) -> Deferral | None:
    """The deferral that :func:`handed` made this of; ``None`` for anything else."""
    with suppress(ValueError, GreenTorchError, RecursionError):
        return parsed(Deferral, json.loads(text))
    return None
