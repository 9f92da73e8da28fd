"""At which host instant a step boundary passed on a device that works through a queue, without waiting for it.

``mark`` records an event on the current stream and returns at once; ``resolve`` tells later when it happened. Device time is the
chain of differences between neighbouring events (each a small float32 of milliseconds, added in double). *Anchors* tie it to the
host: an event on an otherwise idle side stream, bracketed by host times. Between anchors the two clocks drift by no more than
``_DRIFT``; where no anchor is to be had, a boundary lies between its record and the first time it was seen complete.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from green_torch.records import Instant
from green_torch.units import s_to_ns

if TYPE_CHECKING:
    from collections.abc import Callable

_NS_PER_MS = 1e6
_ANCHOR_EVERY_NS = s_to_ns(5.0)
_ANCHOR_RETRY_NS = s_to_ns(0.25)
_ANCHOR_WIDEST_NS = 300_000  # a wider bracket tells too little and is thrown away
_RESOLUTION_NS = 500  # of an event's time, by CUDA's documentation
_DRIFT = 100e-6  # GPU against host clock, at most (10-100 ppm were seen)
_KEPT = 4096  # resolved boundaries remembered, at least; which older ones are needed still, the journal knows


class DeviceEvents(Protocol):
    """What a device's driver offers; :class:`green_torch.clock.cuda.CudaEvents` is the real one."""

    def record(self, *, aside: bool) -> object | None:
        """Records an event on the current stream, or on an idle side stream; ``None`` while that is not allowed."""
        ...

    def done(self, event: object) -> bool:
        """Whether the device has passed it; never waits."""
        ...

    def elapsed_ms(self, first: object, second: object) -> float:
        """Milliseconds of device time between two events that are done."""
        ...

    def release(self, event: object) -> None:
        """The event is no longer needed."""
        ...


@dataclass(slots=True)
class _Pending:
    host_ns: int
    event: object | None
    bracket: tuple[int, int] | None = None  # of an anchor


class DeviceMarker:
    """Boundaries pass when the device reaches them. No method waits; ``resolve`` and ``prune`` may be called from another thread."""

    def __init__(self, events: DeviceEvents, now_ns: Callable[[], int]) -> None:
        self._events = events
        self._keep_at_most = _KEPT
        self._now_ns = now_ns
        self._pending: deque[_Pending] = deque()
        self._unseen: list[_Pending] = []  # marked while no event could be recorded: they wait for the next one
        self._first_ns = self._last_key = now_ns()
        self._last_at_ns = 0
        self._over = False  # the device is not asked any more
        self._resolved: dict[int, Instant] = {}
        self._last_event: object | None = None
        self._device_ns = 0.0
        self._anchor: tuple[float, int, int] | None = None  # device ns, and the host bracket of the same instant
        self._rate = 0.0  # host ns gained per device ns, from the last two anchors
        self._next_anchor_ns = 0

    @property
    def abandoned(self) -> bool:
        """Whether the device was given up, so that boundaries are the host's."""
        return self._over

    def mark(self) -> int:
        """Marks a boundary; the host's nanoseconds returned are provisional, and the key to :meth:`resolve`."""
        if self._over:
            return max(self._now_ns(), self._last_at_ns)
        self.advance()
        self._take_anchor()
        host_ns = self._last_key = max(self._now_ns(), self._last_key + 1)  # a coarse clock may stand still
        self._pending.append(_Pending(host_ns, self._events.record(aside=False)))
        return host_ns

    def resolve(self, key: int) -> Instant | None:
        """When the boundary passed, or ``None`` while the device was not seen to reach it."""
        over = self._over  # before the look-up: giving up enters what is left first
        known = self._resolved.get(key)
        if known is None and (over or key <= self._first_ns):  # marked on the host, after the device was in use or before
            return Instant.exact(key)
        return known

    def prune(self, before_ns: int, needed: Callable[[], set[int]]) -> None:
        """Forgets boundaries marked earlier that are not needed, when many are remembered."""
        if len(self._resolved) > self._keep_at_most:
            kept = needed()
            for key in tuple(self._resolved):
                if key < before_ns and key not in kept:
                    del self._resolved[key]
            self._keep_at_most = _KEPT + len(self._resolved)

    def _take_anchor(self) -> None:
        """Ties device time to host time, every few seconds. Looks at most 0.3 ms for an event that an idle stream passes at once."""
        before_ns = self._now_ns()
        if before_ns < self._next_anchor_ns:
            return
        event = self._events.record(aside=True)
        if event is None:
            return
        done, after_ns = False, before_ns
        while not done and after_ns - before_ns < _ANCHOR_WIDEST_NS:
            done = self._events.done(event)
            after_ns = (
                self._now_ns()
            )  # after the answer: the event may pass while it is asked for, or this thread wait for its turn
        if after_ns - before_ns >= _ANCHOR_WIDEST_NS:
            self._events.release(event)
            self._next_anchor_ns = before_ns + _ANCHOR_RETRY_NS
            return
        self._next_anchor_ns = before_ns + _ANCHOR_EVERY_NS
        self._pending.append(_Pending(before_ns, event, (before_ns, after_ns)))

    def advance(self) -> None:
        """Resolves, in order, what the device has passed. A boundary is let go last: an error or Ctrl-C on the way loses none."""
        while self._pending:
            head = next((pending for pending in self._pending if pending.event is not None), None)
            if head is None or not self._events.done(head.event):
                return
            seen_ns = self._now_ns()
            while self._pending[0] is not head:
                self._unseen.append(self._pending[0])
                self._pending.popleft()
            self._chain(head.event)
            if head.bracket is not None:
                self._tie(head.bracket)
            else:
                instant = self._located(head.host_ns, seen_ns)
                for pending in self._unseen:
                    self._keep(pending.host_ns, Instant(pending.host_ns, pending.host_ns, max(pending.host_ns, instant.hi_ns)))
                self._unseen.clear()
                self._keep(head.host_ns, instant)
            self._pending.popleft()

    def _chain(self, event: object) -> None:
        last = self._last_event
        if last is None or last is event:
            self._last_event = event
            return
        device_ns = self._device_ns + self._events.elapsed_ms(last, event) * _NS_PER_MS
        self._device_ns, self._last_event = device_ns, event
        self._events.release(last)

    def _tie(self, bracket: tuple[int, int]) -> None:
        if self._anchor is not None:
            device_ns, lo_ns, hi_ns = self._anchor
            passed_ns = self._device_ns - device_ns
            if passed_ns > _ANCHOR_EVERY_NS / 2:
                rate = ((bracket[0] + bracket[1]) / 2 - (lo_ns + hi_ns) / 2) / passed_ns - 1.0
                self._rate = min(max(rate, -_DRIFT), _DRIFT)
        self._anchor = (self._device_ns, *bracket)

    def _located(self, host_ns: int, seen_ns: int) -> Instant:
        """The instant of the event just chained: between its record and now, and where the anchor says."""
        if self._anchor is None:
            return Instant((host_ns + seen_ns) // 2, host_ns, seen_ns)
        device_ns, lo_ns, hi_ns = self._anchor
        since_ns = self._device_ns - device_ns
        slack_ns = abs(since_ns) * _DRIFT + _RESOLUTION_NS
        lo = max(host_ns, round(lo_ns + since_ns - slack_ns))
        hi = min(seen_ns, round(hi_ns + since_ns + slack_ns))
        if lo > hi:  # the clocks contradict each other: what the host saw is certain
            lo, hi = host_ns, seen_ns
        at = round((lo_ns + hi_ns) / 2 + since_ns * (1.0 + self._rate))
        return Instant(min(max(at, lo), hi), lo, hi)

    def _keep(self, key: int, instant: Instant) -> None:
        if key in self._resolved:
            return
        if instant.at_ns < self._last_at_ns:  # boundaries pass in the order in which they were marked
            instant = Instant(self._last_at_ns, instant.lo_ns, max(instant.hi_ns, self._last_at_ns))
        self._last_at_ns = instant.at_ns
        self._resolved[key] = instant

    def abandon(self) -> None:
        """Gives up on the device: boundaries that it has not passed lie between their record and now, and later ones are the host's."""
        now_ns = self._now_ns()
        for pending in (*self._unseen, *self._pending):
            if pending.bracket is not None:
                continue
            at_ns = max(pending.host_ns, self._last_at_ns)
            self._keep(pending.host_ns, Instant(at_ns, pending.host_ns, max(now_ns, at_ns)))
        self._over = True
        self._unseen.clear()
        self._pending.clear()
