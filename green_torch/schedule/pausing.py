"""When a run that is under way had best stop for a while: looked for off the training thread, acted on between two steps.

Every quarter of an hour a thread looks ahead and plans what is left of the run in pieces. Between two steps only times are compared. A
grid that can't be asked, or a run whose length nobody knows, is not paused; nor is one whose deadline would suffer.

Where a provider knows the present alone, nothing can be planned: the run then stops where the grid is dirtier than it was wont to be while
it ran, and goes on when it is cleaner again, or when the deadline asks for it (an online threshold). What that saves is known afterwards.

Of several ranks the first one looks ahead. All meet at steps that they agree on beforehand, about once a quarter of an hour, where the
first one tells whether to pause: one broadcast of a few hundred bytes, and none between.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, final

from green_torch.clock import HostClock
from green_torch.errors import ArgumentError, GreenTorchError, IntensityError
from green_torch.intensity.constant import ConstantIntensity
from green_torch.intensity.online import iso
from green_torch.records import REQUEUE, Deferral
from green_torch.schedule.accounting import Account, planned, present, unplanned
from green_torch.schedule.observed import Observed
from green_torch.schedule.outlook import DAY_S, Outlook, outlook, repeated
from green_torch.schedule.planning import RESUME_OVERHEAD_S, plan, seconds, unix_ns
from green_torch.schedule.series import series
from green_torch.units import ns_to_s, s_to_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from green_torch.protocols import Clock
    from green_torch.schedule.planning import Duration

RESUME_FILE = "green_resume_at"
IN_PLACE, LEAVING = "a pause, waiting in place", "a pause, having left"
_RUNNING_ON = "running on without a pause"
CHECK_EVERY_S = 900.0
IDLE_SHARE = 0.2  # a guess, until the run has metered its own
MIN_SAVING = 0.05  # a guess at what forecasts get wrong
GIVEN, METERED, ASSUMED = "given", "metered", "assumed"
_MARGIN = 1.05  # what is left takes at most so much longer than it looks
_NAP_S = 1.0
_MEET_S = 30.0  # how often ranks meet while they wait
_SHORTER = 0.9  # a pause that the deadline would cut by more is planned anew
_FIRST_MEETING = 8  # steps, by when all know how long one takes

_waiting = False  # this process, in a pause

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause that is worth its cost, as far as is known. ``release_unix_ns``: when to hand the job back to a queue, for one that leaves.

    ``until_clean``: nothing is known ahead, so it ends when the grid is clean again, and at ``resume_unix_ns`` at the latest. ``deferral``
    is what it was planned to save, and by what.
    """

    stop_unix_ns: int
    resume_unix_ns: int
    release_unix_ns: int
    deferral: Deferral
    until_clean: bool = False


class Company(Protocol):
    """The ranks of a job, as far as a pause needs them. ``leads``: the first; ``several``: whether there are others."""

    leads: bool
    several: bool

    def told(self, value: T) -> T:
        """The first rank's value, on every rank; each must call."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank; each must call."""
        ...


@final
class Alone:
    """The only rank."""

    leads, several = True, False

    def told(self, value: T) -> T:
        """Its own."""
        return value

    def any(self, flag: bool) -> bool:
        """Its own."""
        return flag


@final
class Group:
    """The ranks of torch's default process group, for a plain loop."""

    def __init__(self) -> None:
        import torch.distributed

        self._group = torch.distributed
        self.leads = self._group.get_rank() == 0
        self.several = self._group.get_world_size() > 1

    def told(self, value: T) -> T:
        """Broadcasts."""
        box = [value]
        self._group.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Gathers."""
        flags: list[bool] = [flag] * self._group.get_world_size()
        self._group.all_gather_object(flags, flag)
        return any(flags)


@final
class Pauses:
    """Decides between two steps whether a run pauses, and waits.

    Args:
        provider: with a forecast or a history; with ``at`` alone for an online threshold, which waits in place only.
        deadline: when the run must be done: a ``datetime`` with its offset, or seconds (a ``timedelta``) from its start.
        max_wait: how long it may pause altogether. One of the two at least.
        on_pause: "wait" in place, or "exit".
        min_saving: less than this fraction of what is left isn't worth a pause.
        resume_overhead: what a pause adds to the work: saving, loading, warming up.
        idle_share: draw while waiting in place, over that at work; ``None``: what the run has metered in an earlier pause, and 0.2 (an
            assumption) before the first.
        queue_delay: time in the queue before a job that left goes on.
        check_every: how often to look ahead.
        clock: the run's.
        company: the other ranks.
        warn: says once what is missing.

    Raises:
        ArgumentError: an argument is wrong.
    """

    def __init__(
        self,
        provider: object,
        *,
        deadline: datetime | Duration | None = None,
        max_wait: Duration | None = None,
        on_pause: Literal["wait", "exit"] = "wait",
        min_saving: float = MIN_SAVING,
        resume_overhead: Duration = RESUME_OVERHEAD_S,
        idle_share: float | None = None,
        queue_delay: Duration = 0.0,
        check_every: Duration = CHECK_EVERY_S,
        clock: Clock | None = None,
        company: Company | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        asked = ("forecast", "history") if on_pause == "exit" else ("forecast", "history", "at")
        if isinstance(provider, ConstantIntensity) or not any(callable(getattr(provider, name, None)) for name in asked):
            why = "nobody looks at the grid while a run is away" if callable(getattr(provider, "at", None)) else "nothing tells"
            raise ArgumentError(
                f"{type(provider).__name__} has neither a forecast nor a history, and {why} when to go on: give "
                "provider=ElectricityMaps(...), UKNeso(), WattTime(...) or Trace(...)"
            )
        if deadline is None and max_wait is None:
            raise ArgumentError("how long may it take? Give deadline= or max_wait=")
        if on_pause not in ("wait", "exit"):
            raise ArgumentError(f'on_pause={on_pause!r}: use "wait" or "exit"')
        for name, share in (("min_saving", min_saving), ("idle_share", 0.0 if idle_share is None else idle_share)):
            if not (isinstance(share, int | float) and 0 <= share <= 1):
                raise ArgumentError(f"{name}={share!r}: a fraction from 0 to 1 is needed")
        if isinstance(deadline, datetime):
            unix_ns(deadline, "deadline")
        elif deadline is not None:
            seconds(deadline, "deadline")
        self._provider = provider
        self._deadline = deadline
        self._max_wait_s = None if max_wait is None else seconds(max_wait, "max_wait")
        self._leaves = on_pause == "exit"
        self._min_saving = min_saving
        self._overhead_s = seconds(resume_overhead, "resume_overhead", least=0.0)
        self._idle_share = idle_share
        self._queue_s = seconds(queue_delay, "queue_delay", least=0.0) if self._leaves else 0.0
        self._check_s = seconds(check_every, "check_every")
        self._clock: Clock = clock or HostClock()
        self._company: Company = company or Alone()
        self._warn = warn or (lambda _text: None)
        self._halt: Callable[[], None] | None = None
        self._deadline_ns: int | None = None
        self._observed = Observed(provider)
        self._account: Account | None = None
        self._under_way: tuple[Pause, float] | None = None  # a pause, and the seconds of work that are left after it
        self._clean = False
        self._next: Pause | None = None
        self._left: float | None = None  # steps
        self._n_steps = 0
        self._first_ns = 0
        self._waited_ns = 0
        self._meeting = _FIRST_MEETING
        self.made: list[Pause] = []

    @property
    def leads(self) -> bool:
        """Whether this is the first rank."""
        return self._company.leads

    @property
    def several(self) -> bool:
        """Whether there are other ranks."""
        return self._company.several

    def open(self, company: Company | None = None, account: Account | None = None) -> None:
        """Begins to look ahead, where this rank is the one to do it; a deadline in seconds counts from here.

        ``account``: the run's, if it is metered.
        """
        self._company = company or self._company
        self._account = account if self._company.leads else None
        if self._account is not None:
            self._observed = self._account.watch(self._provider)
        self._n_steps, self._waited_ns, self._meeting, self._next, self._left = 0, 0, _FIRST_MEETING, None, None
        deadline = self._deadline
        if isinstance(deadline, datetime):
            self._deadline_ns = unix_ns(deadline, "deadline")
        elif deadline is not None:
            self._deadline_ns = self.now_unix_ns() + s_to_ns(seconds(deadline, "deadline"))
        if self._company.leads:
            self._halt = self._clock.every(self._check_s, self.look, "pause")

    def close(self) -> None:
        """Looks no more."""
        halt, self._halt = self._halt, None
        if halt is not None:
            halt()

    def now_unix_ns(self) -> int:
        """The present."""
        return present(self._clock)

    def look(self) -> None:
        """Plans what is left of the run (off the training thread)."""
        try:
            if self._account is not None:
                self._account.look()
            else:
                self._observed.look(self.now_unix_ns())
            if self._under_way is not None:
                self._clean = self._is_clean(*self._under_way)
                return
            self._next = self._planned()
        except GreenTorchError as error:
            self._next = None
            self._warn(f"no pauses for now: {error}")
        except Exception as error:  # rule 9; a provider may be anybody's
            self._next = None
            self._warn(f"no pauses for now: {type(error).__name__}: {error}")

    def boundary(self, left: float | None) -> Pause | None:
        """Between two steps: whether to pause now. ``left``: the steps to come, ``None`` where nobody knows. Each rank calls it after each step."""
        now_ns = self._clock.now_ns()
        if self._n_steps == 0:
            self._first_ns = now_ns
        self._n_steps += 1
        self._left = left
        if not self._company.several:
            return self._due()
        if self._n_steps < self._meeting:
            return None
        pause, steps = self._company.told((self._due(), self._steps_to_meeting()))
        self._meeting = self._n_steps + steps
        return pause

    def wait(self, pause: Pause, stopped: Callable[[], bool]) -> float:
        """Waits until the pause is over, or ``stopped`` on any rank; returns how many seconds it took.

        Raises:
            ArgumentError: this process is waiting already.
        """
        begin_ns = self._clock.now_ns()
        with _one_at_a_time():
            self._clean, self._under_way = False, (pause, self._left_s() or 0.0)
            self._tell(pause)
            try:
                over = False
                while not over:
                    over = self._company.any(self._nap(pause, stopped))
            finally:
                self._under_way = None
        took_ns = self._clock.now_ns() - begin_ns
        self._waited_ns += took_ns
        self._next = None
        self._keep(replace(pause, resume_unix_ns=self.now_unix_ns()))
        return ns_to_s(took_ns)

    def leave(self, pause: Pause) -> None:
        """Keeps account of a pause for which the run leaves."""
        self._keep(pause)

    def _keep(self, pause: Pause) -> None:
        self.made.append(pause)
        self._tell(pause)

    def _tell(self, pause: Pause) -> None:
        if self._account is None:
            return
        try:
            self._account.take(replace(pause.deferral, stop_unix_ns=pause.stop_unix_ns, resume_unix_ns=pause.resume_unix_ns))
        except Exception as error:  # rule 9
            self._warn(f"no account of a pause: {type(error).__name__}: {error}")

    def _nap(self, pause: Pause, stopped: Callable[[], bool]) -> bool:
        """Lets time pass: alone to the end, in company to the next meeting. Whether it is over on this rank."""
        begin_ns = self._clock.now_ns()
        while True:
            left_s = ns_to_s(pause.resume_unix_ns - self.now_unix_ns())
            if left_s <= 0 or (pause.until_clean and self._clean) or stopped():
                return True
            if self._company.several and ns_to_s(self._clock.now_ns() - begin_ns) >= _MEET_S:
                return False
            self._clock.sleep(min(_NAP_S, left_s))

    def _left_s(self) -> float | None:
        """How long what is left will take at the pace so far, with a margin."""
        if self._left is None or self._n_steps < 2:
            return None
        taken_ns = self._clock.now_ns() - self._first_ns - self._waited_ns
        return self._left * ns_to_s(taken_ns) / (self._n_steps - 1) * _MARGIN

    def _limit_s(self, left_s: float, now_ns: int) -> float:
        """By when all must be done, in seconds from now."""
        limits = []
        if self._deadline_ns is not None:
            limits.append(ns_to_s(self._deadline_ns - now_ns))
        if self._max_wait_s is not None:
            limits.append(left_s + self._max_wait_s - ns_to_s(self._waited_ns))
        return min(limits)

    def _planned(self) -> Pause | None:
        left_s, now_ns = self._left_s(), self.now_unix_ns()
        if not left_s:
            return None
        limit_s = self._limit_s(left_s, now_ns)
        if limit_s <= left_s + self._overhead_s + self._queue_s:
            return None  # no time to lose
        idle, basis = self._idle()
        try:
            ahead = self._ahead(now_ns, now_ns + s_to_ns(limit_s))
        except IntensityError as error:
            if not error.final or not self._observed.answers or self._leaves:
                raise
            return self._by_threshold(left_s, limit_s, now_ns, idle, basis)
        found = plan(
            ahead.points,
            left_s,
            limit_s,
            interruptible=True,
            resume_overhead=self._overhead_s,
            power=1.0,
            idle_power=idle,
            queue_delay=self._queue_s,
            running=True,
            now=now_ns,
            method=ahead.method,
            asked=ahead.asked_unix_ns,
        )
        if found.at_once or found.saving < self._min_saving:
            return None
        first, *later = found.intervals
        stop_ns, resume = (now_ns, first) if first.start_unix_ns > now_ns else (first.end_unix_ns, later[0])
        deferral = planned(
            replace(found, baseline=_RUNNING_ON),
            LEAVING if self._leaves else IN_PLACE,
            stop_unix_ns=stop_ns,
            resume_unix_ns=resume.start_unix_ns,
            baseline_unix_ns=now_ns,
            resume_s=self._overhead_s,
            idle_share=idle,
            idle_basis=basis,
        )
        return Pause(stop_ns, resume.start_unix_ns, resume.start_unix_ns - s_to_ns(self._queue_s), deferral)

    def _idle(self) -> tuple[float, str]:
        """Draw while waiting over that at work, and how it is known; whoever leaves draws nothing."""
        if self._leaves:
            return 0.0, ""
        if self._idle_share is not None:
            return self._idle_share, GIVEN
        metered = self._account.idle() if self._account is not None else None
        return (IDLE_SHARE, ASSUMED) if metered is None else (metered, METERED)

    def _by_threshold(self, left_s: float, limit_s: float, now_ns: int, idle: float, basis: str) -> Pause | None:
        """A pause until the grid is clean, by its past alone; ``None`` while it is, or where the past does not tell.

        The past's clean hours must be so much cleaner than now that a pause which ends at the next look saves its resume's cost.
        """
        found = self._observed.threshold(now_ns, left_s, limit_s, resume_s=self._overhead_s)
        if found is None or found.runs:
            return None
        gain = found.now_g_per_kwh * (1 - idle) - found.clean_g_per_kwh
        cost = found.clean_g_per_kwh * self._overhead_s / self._check_s
        if gain - cost <= 0 or gain - cost < self._min_saving * found.now_g_per_kwh:
            return None
        latest_ns = now_ns + s_to_ns(limit_s - left_s - self._overhead_s)
        deferral = unplanned(
            self._observed.since(now_ns)[-1],
            IN_PLACE,
            begin_unix_ns=now_ns,
            baseline=_RUNNING_ON,
            work_s=left_s,
            resume_unix_ns=latest_ns,
            deadline_unix_ns=now_ns + s_to_ns(limit_s),
            resume_s=self._overhead_s,
            idle_share=idle,
            idle_basis=basis,
        )
        return Pause(now_ns, latest_ns, latest_ns, deferral, until_clean=True)

    def _is_clean(self, pause: Pause, left_s: float) -> bool:
        """While waiting: whether the past says that it is time to go on; where the grid can't be asked it is."""
        now_ns = self.now_unix_ns()
        limit_s = ns_to_s(pause.deferral.deadline_unix_ns - now_ns)
        found = self._observed.threshold(now_ns, left_s, limit_s, resume_s=self._overhead_s)
        return found is None or found.runs

    def _ahead(self, now_ns: int, until_ns: int) -> Outlook:
        """What is known ahead; beyond a forecast's horizon its last day is repeated."""
        ahead = outlook(self._provider, now_ns, until_ns)
        end_ns = now_ns + s_to_ns(series(ahead.points, now_ns).end_s)
        if end_ns >= until_ns:
            return ahead
        last = [point for point in ahead.points if (point.time_unix_ns or 0) >= end_ns - s_to_ns(DAY_S)]
        more = repeated(last, end_ns, until_ns, DAY_S)
        return replace(ahead, points=(*ahead.points, *more), method=f"{ahead.method}, then its last day repeated")

    def _due(self) -> Pause | None:
        """The next pause, once its time has come and the deadline allows it."""
        pause, now_ns = self._next, self.now_unix_ns()
        if pause is None or now_ns < pause.stop_unix_ns:
            return None
        left_s = self._left_s() or 0.0
        slack_s = self._limit_s(left_s, now_ns) - left_s - self._overhead_s
        wanted_ns = pause.resume_unix_ns - pause.stop_unix_ns
        given_ns = min(pause.resume_unix_ns - now_ns, s_to_ns(slack_s))
        if given_ns < _SHORTER * wanted_ns:
            self._next = None  # too late for it: the next look will tell
            return None
        return replace(pause, stop_unix_ns=now_ns, resume_unix_ns=now_ns + given_ns)

    def _steps_to_meeting(self) -> int:
        taken_s = ns_to_s(self._clock.now_ns() - self._first_ns - self._waited_ns) / max(1, self._n_steps - 1)
        return max(1, round(self._check_s / taken_s)) if taken_s > 0 else _FIRST_MEETING


@final
class LoopPauses:
    """Pauses of a plain loop: saves, then waits in place or leaves.

    Args:
        provider: as for :class:`Pauses`.
        directory: where a run that leaves says when it wants to go on.
        save: the loop's own checkpoint; needed to leave. Each rank calls it.
        warn: says once what is missing.
        account: the run's.
        on_pause: "wait" or "exit".
        how: as for :class:`Pauses`.

    Raises:
        ArgumentError: an argument is wrong.
    """

    def __init__(
        self,
        provider: object,
        directory: Path,
        save: Callable[[], object] | None,
        warn: Callable[[str], None],
        account: Account | None = None,
        *,
        on_pause: Literal["wait", "exit"] = "wait",
        **how: Any,
    ) -> None:
        if on_pause == "exit" and save is None:
            raise ArgumentError('on_pause="exit" needs save=, a function that saves a checkpoint to go on from')
        try:
            self._pauses = Pauses(provider, on_pause=on_pause, warn=warn, **how)
        except TypeError as error:
            raise ArgumentError(f"pause_if_dirty(): {error}") from None
        self._warn = warn
        self._directory, self._save, self._leaves = directory, save, on_pause == "exit"
        self._pauses.open(ranks(), account)
        self.close = self._pauses.close

    @property
    def made(self) -> tuple[Pause, ...]:
        """The pauses so far."""
        return tuple(self._pauses.made)

    def after_step(self, left: float | None, phase: Callable[[str], AbstractContextManager[None]]) -> float:
        """Between two steps: how many seconds were waited. ``left``: steps to come; ``phase`` books what passes.

        Raises:
            SystemExit: 75, where it leaves.
        """
        pause = self._pauses.boundary(left)
        if pause is None:
            return 0.0
        if self._save is not None:
            try:
                with phase("save"):
                    self._save()
            except Exception as error:  # rule 9: a full disk; without a checkpoint there is no pause
                if self._pauses.several:
                    raise  # the other ranks may have saved theirs
                self._warn(f"no pause, since no checkpoint could be saved: {type(error).__name__}: {error}")
                return 0.0
        if not self._leaves:
            with phase("paused"):
                return self._pauses.wait(pause, lambda: False)
        self._pauses.leave(pause)
        if self._pauses.leads:
            leave_word(pause, self._directory)
        raise SystemExit(REQUEUE)


def described(pause: Pause) -> str:
    """A pause in words, with what it is worth and by what."""
    found = pause.deferral
    idle = f"; idle draw {found.idle_share:.0%} of that at work, {found.idle_basis}" if found.idle_basis else ""
    by = f"({found.method}, {found.source}, {found.region}, {found.kind}{idle})"
    if found.planned_saving is None:
        return f"pausing until the grid is cleaner, {iso(pause.resume_unix_ns)} at the latest: what that saves is known afterwards {by}"
    return (
        f"pausing until {iso(pause.resume_unix_ns)}: what is left is planned to cause {found.planned_saving:.1%} less than "
        f"{found.baseline} {by}"
    )


def leave_word(pause: Pause, directory: Path) -> Path:
    """Writes when the job is to be queued again, in the cluster's local time, as ``sbatch --begin=`` takes it; returns the file."""
    moment = datetime.fromtimestamp(ns_to_s(pause.release_unix_ns), UTC).astimezone()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / RESUME_FILE
    path.write_text(moment.strftime("%Y-%m-%dT%H:%M") + "\n", encoding="utf-8")
    return path


def ranks() -> Company:
    """The ranks of this process's job, by torch's process group."""
    import sys

    distributed: Any = sys.modules.get("torch.distributed")
    there = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return Group() if there else Alone()


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    global _waiting  # noqa: PLW0603  (a process waits once)
    if _waiting:
        raise ArgumentError("this process is in a pause already: use one CarbonAwarePause, or pause_if_dirty(), and not two")
    _waiting = True
    try:
        yield
    finally:
        _waiting = False
