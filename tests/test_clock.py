"""Step boundaries on a device with a queue, against a scripted device whose truth is known; and the host clock's threads."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from green_torch.clock import DeviceMarker, HostClock
from green_torch.records import Instant

MS = 1_000_000


class Device:
    """A device that works through a queue, with a clock of its own that drifts against the host's.

    Fulfils ``DeviceEvents``. ``busy`` enqueues work; events pass when the queue gets to them, side-stream events after ``latency_ns``.
    """

    def __init__(self, drift: float = 0.0, latency_ns: int = 15_000) -> None:
        self.host_ns = 1_000 * MS
        self.queue_free_ns = 0
        self.drift = drift
        self.latency_ns = latency_ns
        self.capturing = False
        self.aside_behind_queue = False
        self.live = 0

    def now_ns(self) -> int:
        self.host_ns += 1_000  # a call takes a microsecond
        return self.host_ns

    def busy(self, device_ms: float) -> None:
        self.queue_free_ns = max(self.queue_free_ns, self.host_ns) + int(device_ms * MS)

    def record(self, *, aside: bool) -> object | None:
        if self.capturing:
            return None
        self.live += 1
        if aside and not self.aside_behind_queue:
            return {"host_ns": self.host_ns + self.latency_ns}
        return {"host_ns": max(self.queue_free_ns, self.host_ns)}

    def done(self, event) -> bool:
        return not self.capturing and self.host_ns >= event["host_ns"]

    def elapsed_ms(self, first, second) -> float:
        import struct

        exact = (second["host_ns"] - first["host_ns"]) * (1 + self.drift) / MS
        return struct.unpack("f", struct.pack("f", exact))[0]

    def release(self, event) -> None:
        self.live -= 1


def drive(device: Device, steps: list[tuple[float, float]], settle_ms: float = 50.0):
    """Each step enqueues device work and spends host time; returns (truth, resolved) per boundary."""
    marker = DeviceMarker(device, device.now_ns)
    marks, truths = [], []
    for device_ms, host_ms in steps:
        device.busy(device_ms)
        marks.append(marker.mark())
        truths.append(max(device.queue_free_ns, device.host_ns))
        device.host_ns += int(host_ms * MS)
        marker.advance()
    device.host_ns = max(device.host_ns, device.queue_free_ns) + int(settle_ms * MS)
    marker.advance()
    return truths, [marker.resolve(mark) for mark in marks]


def test_boundaries_are_where_the_device_passed_them():
    """A host that runs ahead of the queue does not move the boundaries: they are right to tens of microseconds over minutes."""
    truths, instants = drive(Device(drift=40e-6), [(53.0, 53.0)] * 20 + [(53.0, 40.0)] * 3 + [(53.0, 53.0)] * 3000)
    errors = [abs(instant.at_ns - truth) for truth, instant in zip(truths, instants, strict=True)]
    assert max(errors[200:]) < 60_000
    assert all(instant.lo_ns <= truth <= instant.hi_ns for truth, instant in zip(truths, instants, strict=True))
    assert all(instant.hi_ns - instant.lo_ns < 1.3 * MS for instant in instants)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.0, 120.0), st.floats(0.01, 120.0)), min_size=1, max_size=80),
    st.floats(-100e-6, 100e-6),
    st.booleans(),
)
def test_the_truth_lies_within_the_bounds(steps, drift, aside_behind_queue):
    """Whatever the queue, the drift and the anchors, the true instant is bounded, and boundaries never go back."""
    device = Device(drift)
    device.aside_behind_queue = aside_behind_queue
    truths, instants = drive(device, steps)
    for truth, instant in zip(truths, instants, strict=True):
        assert instant.lo_ns <= truth <= instant.hi_ns
        assert instant.lo_ns <= instant.at_ns <= instant.hi_ns
    ats = [instant.at_ns for instant in instants]
    assert ats == sorted(ats)


def test_without_anchors_the_host_bounds_stand():
    """A side stream that queues behind compute gives no anchor: record and first sight bound the boundary."""
    device = Device()
    device.aside_behind_queue = True
    truths, instants = drive(device, [(30.0, 30.0)] * 50)
    assert all(instant.lo_ns <= truth <= instant.hi_ns for truth, instant in zip(truths, instants, strict=True))


def test_an_anchor_that_passes_while_it_is_asked_for_is_bracketed():
    """A query that takes long, as where another thread has its turn: the event passes within it, and the bounds hold all the same."""

    class Slow(Device):
        def done(self, event) -> bool:
            self.host_ns += 100_000
            return super().done(event)

    truths, instants = drive(Slow(latency_ns=90_000), [(30.0, 1.0)] * 20)
    assert all(instant.lo_ns <= truth <= instant.hi_ns for truth, instant in zip(truths, instants, strict=True))


def test_nothing_is_asked_during_graph_capture():
    """While a graph is captured nothing is recorded or queried; the boundary is bounded by its neighbours."""
    device = Device()
    marker = DeviceMarker(device, device.now_ns)
    first = marker.mark()
    device.capturing = True
    device.host_ns += 5 * MS
    during = marker.mark()
    marker.advance()
    assert marker.resolve(during) is None
    device.capturing = False
    device.host_ns += 5 * MS
    last = marker.mark()
    device.host_ns += MS
    marker.advance()
    instants = [marker.resolve(mark) for mark in (first, during, last)]
    assert instants[1].lo_ns == during
    assert instants[1].hi_ns >= instants[2].at_ns


def test_a_step_that_enqueues_nothing_resolves():
    """An empty step passes when the host marks it."""
    _, instants = drive(Device(), [(0.0, 10.0)] * 5)
    assert all(instant is not None for instant in instants)


def test_events_are_given_back():
    """The number of events alive does not grow with the run."""
    device = Device()
    drive(device, [(10.0, 10.0)] * 2000)
    assert device.live < 10


def test_a_mark_from_before_the_device_was_used_stands():
    """Boundaries taken on the host before CUDA began keep their instants."""
    device = Device()
    before_ns = device.now_ns()
    device.host_ns += MS
    assert DeviceMarker(device, device.now_ns).resolve(before_ns) == Instant.exact(before_ns)


def test_the_host_clock_ticks_and_stops():
    """A tick comes at once and again, on another thread, and none after the stop."""
    clock, ticked, threads = HostClock(), threading.Semaphore(0), set()

    def tick() -> None:
        threads.add(threading.current_thread())
        ticked.release()

    halt = clock.every(0.001, tick, "test")
    assert all(ticked.acquire(timeout=5) for _ in range(3))
    halt()
    (thread,) = threads
    assert thread is not threading.current_thread()
    assert not thread.is_alive()
    halt()


def test_a_tick_may_stop_its_own_clock():
    """Stopping from within a tick does not wait for itself."""
    clock, done, halts = HostClock(), threading.Event(), []

    def tick() -> None:
        if halts:
            halts[0]()
            done.set()

    halts.append(clock.every(0.001, tick, "test"))
    assert done.wait(5)


def test_epoch_is_unix_time():
    """Monotonic instants plus the epoch are Unix time."""
    import time

    clock = HostClock()
    assert clock.epoch_unix_ns + clock.now_ns() == pytest.approx(time.time_ns(), abs=1e9)
