"""A run on a device that works through a queue: the tracker with the device's clock, against a scripted device."""

from __future__ import annotations

import itertools

import pytest

import green_torch
from green_torch.errors import GreenTorchWarning
from green_torch.records import Flag, Phase
from green_torch.testing import MemorySink, ScriptedClock, ScriptedMeter


class Queue:
    """A device in the time of a scripted clock; ``busy`` enqueues work. Fulfils ``DeviceEvents``."""

    def __init__(self, clock: ScriptedClock) -> None:
        self.clock = clock
        self.free_ns = 0
        self.live = 0
        self.broken = False

    def busy(self, seconds: float) -> None:
        self.free_ns = max(self.free_ns, self.clock.now_ns()) + int(seconds * 1e9)

    def record(self, *, aside: bool) -> object | None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.live += 1
        return [self.clock.now_ns() if aside else max(self.free_ns, self.clock.now_ns())]

    def done(self, event) -> bool:
        return self.clock.now_ns() >= event[0]

    def elapsed_ms(self, first, second) -> float:
        return (second[0] - first[0]) / 1e6

    def release(self, event) -> None:
        self.live -= 1


@pytest.fixture
def scene():
    clock = ScriptedClock()
    meter = ScriptedMeter(clock, {"gpu0": 300.0}, period_s=0.02)
    sink = MemorySink()
    tracker = green_torch.track(clock=clock, meters=[meter], sinks=[sink], intensity=100.0, log_every_n_steps=1)
    queue = Queue(clock)
    tracker._boundaries.use(queue)
    return clock, meter, sink, tracker, queue


def tiles(records) -> bool:
    """Whether the records follow one another without gap or overlap."""
    return all(a.end_ns == b.start_ns for a, b in itertools.pairwise(records))


def test_steps_are_measured_where_the_device_did_them(scene):
    """A host that enqueues ten steps at once gets ten steps of equal energy, not nine of nothing."""
    clock, _, sink, tracker, queue = scene
    with tracker:
        for _ in range(10):
            queue.busy(0.1)
            clock.advance(0.001)
            tracker.step()
        clock.advance(1.2)
    train = [record for record in sink.records if record.phase is Phase.TRAIN]
    assert [record.energy_j for record in train] == pytest.approx([30.0] * 10, rel=0.05)
    assert tiles(sink.records)


def test_a_device_that_is_behind_at_the_end_is_not_counted_twice(scene):
    """After two seconds of patience the rest is taken between record and now, in order, flagged and said."""
    clock, meter, sink, tracker, queue = scene
    with pytest.warns(GreenTorchWarning, match="behind when the run ended"), tracker:
        start_ns = clock.now_ns()
        for _ in range(10):
            queue.busy(1.0)
            clock.advance(0.5)
            tracker.step()
        left_ns = clock.now_ns()
    assert clock.now_ns() - left_ns < 3e9
    assert tiles(sink.records)
    assert sink.summary.totals.energy_j <= meter.truth_j("gpu0", start_ns, clock.now_ns()) + 1
    assert any(record.flagged(Flag.LATE) for record in sink.records)
    assert sink.summary.totals.phase("train").n_steps == 10


def test_a_device_that_fails_ends_nothing(scene):
    """When events can't be recorded any more, boundaries are the host's from then on, and every step is kept."""
    clock, _, sink, tracker, queue = scene
    with pytest.warns(GreenTorchWarning, match="taken on the host from now on"), tracker:
        for k in range(15):
            queue.broken = k > 8
            queue.busy(0.05)
            clock.advance(0.1)
            tracker.step()
    assert sink.summary.totals.phase("train").n_steps == 15
    assert tiles(sink.records)


def test_a_record_of_very_many_steps_is_delivered():
    """Boundaries within a long record are not needed; its own are kept however many steps lie between."""
    clock = ScriptedClock()
    meter = ScriptedMeter(clock, {"gpu0": 300.0}, period_s=0.02)
    sink = MemorySink()
    tracker = green_torch.track(
        clock=clock, meters=[meter], sinks=[sink], intensity=1.0, log_every_n_steps=6000, poll_interval_s=0.02
    )
    queue = Queue(clock)
    tracker._boundaries.use(queue)
    with tracker:
        queue.busy(0.003)
        for _ in range(20_000):
            queue.busy(0.0002)
            clock.advance(0.0002)
            tracker.step()
        clock.advance(0.5)
        assert len(sink.records) == 3
        assert queue.live < 50
    assert tiles(sink.records)
