"""Reads every meter in the background, each at its own pace, and hands the readings on."""

from __future__ import annotations

import contextlib
import math
import threading
from typing import TYPE_CHECKING

from green_torch.errors import MeterError
from green_torch.records import Flag
from green_torch.timeline import DomainTimeline
from green_torch.units import s_to_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from green_torch.protocols import Clock, Meter
    from green_torch.records import Domain, Reading

_RETRY_S = 1.0  # a meter that fails is asked again no more often than this
_HUNG_S = 2.0  # a call that takes longer counts as failing until it returns


class Sampler:
    """Fills one timeline per domain. A meter that fails, stalls or hangs touches its own domains only.

    ``lock`` guards the timelines; it is never taken on the training thread.
    """

    def __init__(self, clock: Clock, meters: Sequence[Meter], poll_interval_s: float) -> None:
        self.lock = threading.Lock()
        self.timelines = {domain.name: DomainTimeline(domain) for meter in meters for domain in meter.domains}
        self._failing: dict[str, str] = {}  # domain -> why
        self._resets: list[tuple[int, str]] = []
        self._clock = clock
        self._watches = [_Watch(meter, poll_interval_s, clock, self._take) for meter in meters]
        self._halts: list[Callable[[], None]] = []

    def start(self) -> None:
        """Takes a first reading of each meter and goes on in the background."""
        for watch in self._watches:
            self._halts.append(self._clock.every(watch.interval_s, watch.poll, f"meter {watch.name}"))

    def read_now(self) -> None:
        """Reads every meter once out of turn; a driver that hangs is waited for no longer than the clock's ticks are."""
        halts = [self._clock.every(watch.interval_s, watch.poll, f"meter {watch.name}, out of turn") for watch in self._watches]
        for halt in halts:
            halt()

    def stop(self, *, close: bool) -> None:
        """Ends the reading and, where they are its own, lets the meters go; safe to call twice."""
        for halt in self._halts:
            halt()
        self._halts.clear()
        for watch in self._watches if close else ():
            watch.close()

    def failing(self) -> dict[str, str]:
        """Domains that can't be read now, each with the reason."""
        now_ns = self._clock.now_ns()
        hung = [name for watch in self._watches for name in watch.hung(now_ns)]
        with self.lock:
            return {**self._failing, **dict.fromkeys(hung, f"the driver has not answered for more than {_HUNG_S:g} s")}

    @property
    def domains(self) -> tuple[Domain, ...]:
        """What is read, as it was last seen: others may come to share it."""
        return tuple(timeline.domain for timeline in self.timelines.values())

    def forget(self, before_ns: float) -> None:
        """Drops readings that nothing from an instant on can need."""
        with self.lock:
            for timeline in self.timelines.values():
                timeline.forget(int(before_ns))

    def resets(self, before_ns: int) -> tuple[str, ...]:
        """Domains whose counter went back at or before an instant; each reset is told once."""
        with self.lock:
            told = tuple(name for at_ns, name in self._resets if at_ns <= before_ns)
            self._resets = [(at_ns, name) for at_ns, name in self._resets if at_ns > before_ns]
            return told

    def _take(self, meter: Meter) -> bool:
        """Readings into the timelines; False where any domain of the meter failed."""
        try:
            reading = meter.read()
            with self.lock:
                return [self._note(meter, one) for one in (*reading.earlier, reading)][-1]
        except Exception as error:  # a driver binding may raise anything: rule 9
            why = str(error) if isinstance(error, MeterError) else f"{type(error).__name__}: {error}"
            with self.lock:
                self._failing.update({domain.name: why for domain in meter.domains})
            return False

    def _note(self, meter: Meter, reading: Reading) -> bool:
        whole = True
        for domain in meter.domains:
            self.timelines[domain.name].domain = domain  # others may have come to share it
            energy_j = reading.energy_j.get(domain.name)
            if energy_j is None or not math.isfinite(energy_j):
                self._failing[domain.name] = "the meter left it out"
                whole = False
                continue
            self._failing.pop(domain.name, None)
            if self.timelines[domain.name].observe(reading.begin_ns, reading.end_ns, energy_j) is Flag.COUNTER_RESET:
                self._resets.append((reading.end_ns, domain.name))
        return whole


class _Watch:
    """One meter and its pace. ``poll`` may be called from its ticking thread and, at the end, from another."""

    def __init__(self, meter: Meter, poll_interval_s: float, clock: Clock, take: Callable[[Meter], bool]) -> None:
        self.name = "+".join(domain.name for domain in meter.domains)
        self.interval_s = poll_interval_s if meter.interval_s is None else meter.interval_s
        self._meter = meter
        self._clock = clock
        self._take = take
        self._busy = threading.Lock()
        self._retry_ns = 0
        self._asked_ns: int | None = None  # when the reading under way began
        self._closed = False

    def poll(self) -> None:
        """One reading, unless one is under way (a hung driver call) or a failed one is too recent."""
        if not self._busy.acquire(blocking=False):
            return
        try:
            now_ns = self._clock.now_ns()
            if self._closed or now_ns < self._retry_ns:
                return
            self._asked_ns = now_ns
            if not self._take(self._meter):
                self._retry_ns = now_ns + s_to_ns(_RETRY_S)
        finally:
            self._asked_ns = None
            self._busy.release()

    def hung(self, now_ns: int) -> tuple[str, ...]:
        """The domains that wait for a reading which should long have returned."""
        asked_ns = self._asked_ns
        late = asked_ns is not None and now_ns - asked_ns > s_to_ns(_HUNG_S)
        return tuple(domain.name for domain in self._meter.domains) if late else ()

    def close(self) -> None:
        """Closes the meter, unless a hung call still holds it: then it is left to the process's end."""
        if self._closed or not self._busy.acquire(timeout=0.1):
            return
        self._closed = True
        with contextlib.suppress(Exception):  # the run is over: rule 9
            self._meter.close()
        self._busy.release()
