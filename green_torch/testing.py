"""Public fakes for users' own tests: a clock that moves when told, a meter of known joules, a sink that remembers.

With a :class:`ScriptedClock` nothing happens by itself: ``advance`` moves the time and runs, in order and on the calling thread,
every meter reading and every record that falls due on the way. A test written with them is exact and takes no time::

    clock = ScriptedClock()
    meter = ScriptedMeter(clock, {"gpu0": 300.0})
    sink = MemorySink()
    with green_torch.track(clock=clock, meters=[meter], sinks=[sink], intensity=100) as tracker:
        clock.advance(2.0)
        tracker.step()
    assert sink.records[0].energy_j == pytest.approx(600.0, rel=0.1)
"""

from __future__ import annotations

import heapq
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from green_torch.errors import MeterError
from green_torch.records import Domain, Item, Manifest, Method, Reading, RunSummary, StepRecord
from green_torch.units import NS_PER_S, s_to_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["MemorySink", "ScriptedClock", "ScriptedMeter"]


class ScriptedClock:
    """A clock that stands still until ``advance`` (or something that sleeps) moves it. Starts at ``start_ns``."""

    def __init__(self, start_ns: int = NS_PER_S, epoch_unix_ns: int = 1_700_000_000 * NS_PER_S) -> None:
        self.epoch_unix_ns = epoch_unix_ns
        self._now_ns = start_ns
        self._due: list[tuple[int, int, int, Callable[[], None]]] = []
        self._made = 0

    def now_ns(self) -> int:
        """Where the clock stands."""
        return self._now_ns

    def sleep(self, duration_s: float) -> None:
        """Advances."""
        self.advance(duration_s)

    def advance(self, duration_s: float) -> None:
        """Moves the time on, running what falls due at its own instant."""
        end_ns = self._now_ns + s_to_ns(duration_s)
        while self._due and self._due[0][0] <= end_ns:
            due_ns, key, interval_ns, tick = heapq.heappop(self._due)
            self._now_ns = max(self._now_ns, due_ns)
            heapq.heappush(self._due, (due_ns + interval_ns, key, interval_ns, tick))
            tick()
        self._now_ns = max(self._now_ns, end_ns)

    def every(self, interval_s: float, tick: Callable[[], None], name: str) -> Callable[[], None]:  # noqa: ARG002  (the protocol's)
        """Runs ``tick`` now and at every interval that ``advance`` passes."""
        self._made += 1
        key, interval_ns = self._made, s_to_ns(interval_s)
        heapq.heappush(self._due, (self._now_ns + interval_ns, key, interval_ns, tick))
        tick()

        def halt() -> None:
            self._due = [due for due in self._due if due[1] != key]
            heapq.heapify(self._due)

        return halt


class ScriptedMeter:
    """A cumulative counter fed by a known power, in watts, per domain: a number, or a function of seconds since the start.

    ``period_s`` is the counter's update period (0: always current). ``truth_j`` is exact for constant power and a fine midpoint
    sum otherwise. Faults: ``fail``, ``recover``, ``reset``, ``stick``.
    """

    def __init__(
        self,
        clock: ScriptedClock,
        power_w: Mapping[str, float | Callable[[float], float]],
        *,
        method: Method = Method.COUNTER,
        period_s: float = 0.0,
        power_limit_w: float | None = 700.0,
        interval_s: float | None = None,
        start_j: float = 1000.0,
    ) -> None:
        self._clock = clock
        self._power = dict(power_w)
        self._period_ns = s_to_ns(period_s)
        self._start_ns = clock.now_ns()
        self._start_j = start_j
        self._sum = dict.fromkeys(power_w, (0, 0.0))  # domain -> (instant, joules since the start)
        self._lost = dict.fromkeys(power_w, 0.0)
        self._failed: set[str] = set()
        self._stuck: dict[str, float] = {}
        self.interval_s = interval_s
        self.closed = False
        limit = power_limit_w if method is Method.COUNTER else None
        self.domains = tuple(
            Domain(name, method, f"scripted {name}", "a script", power_limit_w=limit, period_s=period_s or None)
            for name in power_w
        )

    def truth_j(self, name: str, start_ns: int, end_ns: int) -> float:
        """Joules between two instants of the clock."""
        return self._integral(name, end_ns - self._start_ns) - self._integral(name, start_ns - self._start_ns)

    def share(self, name: str) -> None:
        """Marks a domain as shared with other processes."""
        self.domains = tuple(replace(domain, shared=domain.shared or domain.name == name) for domain in self.domains)

    def fail(self, name: str | None = None) -> None:
        """From now on the domain (or the whole meter) can't be read."""
        self._failed |= set(self._power) if name is None else {name}

    def recover(self) -> None:
        """Everything can be read again, and the counter goes on from where it truly stands."""
        self._failed.clear()
        self._stuck.clear()

    def reset(self, name: str) -> None:
        """The counter goes back to zero, as on a driver reload."""
        self._lost[name] = self._start_j + self._integral(name, self._clock.now_ns() - self._start_ns)

    def stick(self, name: str) -> None:
        """The counter stands still from now on."""
        self._stuck[name] = self._counter(name)

    def read(self) -> Reading:
        """Cumulative joules as of the counter's last update."""
        if len(self._failed) == len(self._power):
            raise MeterError("the script says that this meter fails now")
        now_ns = self._clock.now_ns()
        energy_j = {name: self._stuck.get(name, self._counter(name)) for name in self._power if name not in self._failed}
        return Reading(now_ns, now_ns, energy_j)

    def close(self) -> None:
        """Remembers that it was closed."""
        self.closed = True

    def _counter(self, name: str) -> float:
        since_ns = self._clock.now_ns() - self._start_ns
        if self._period_ns:
            since_ns -= since_ns % self._period_ns
        return self._start_j + self._integral(name, since_ns) - self._lost[name]

    def _integral(self, name: str, until_ns: int) -> float:
        power = self._power[name]
        if not callable(power):
            return power * until_ns / NS_PER_S
        at_ns, energy_j = self._sum[name]
        if until_ns < at_ns:
            at_ns, energy_j = 0, 0.0
        slices = max(1, math.ceil((until_ns - at_ns) / 1e5))  # 0.1 ms
        width_s = (until_ns - at_ns) / NS_PER_S / slices
        energy_j += math.fsum(power(at_ns / NS_PER_S + (k + 0.5) * width_s) for k in range(slices)) * width_s
        self._sum[name] = (until_ns, energy_j)
        return energy_j


class MemorySink:
    """Keeps what it is given: ``manifest``, ``records``, ``summary``."""

    def __init__(self) -> None:
        self.manifest: Manifest | None = None
        self.records: list[StepRecord] = []
        self.summary: RunSummary | None = None
        self.closed = False

    def write(self, item: Item) -> None:
        """Files the item by its kind."""
        if isinstance(item, Manifest):
            self.manifest = item
        elif isinstance(item, StepRecord):
            self.records.append(item)
        else:
            self.summary = item

    def close(self) -> None:
        """Remembers that it was closed."""
        self.closed = True
