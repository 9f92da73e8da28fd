"""A run on a device that works through a queue: the tracker with the device's clock, against a scripted device."""

from __future__ import annotations

import itertools
from contextlib import nullcontext, suppress

import pytest

import green_torch
from green_torch.clock import Boundaries
from green_torch.errors import GreenTorchWarning
from green_torch.records import Flag, Instant, Phase
from green_torch.testing import MemorySink, ScriptedClock, ScriptedMeter
from tests.processes import CtrlC


class Queue:
    """A device in the time of a scripted clock; ``busy`` enqueues work. Fulfils ``DeviceEvents``."""

    def __init__(self, clock: ScriptedClock) -> None:
        self.clock = clock
        self.free_ns = 0
        self.live = 0
        self.broken = False
        self.mute = False
        self.elsewhere = False  # boundaries are marked on another stream, which is idle

    def busy(self, seconds: float) -> None:
        self.free_ns = max(self.free_ns, self.clock.now_ns()) + int(seconds * 1e9)

    def record(self, *, aside: bool) -> object | None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.live += 1
        return [self.clock.now_ns() if aside or self.elsewhere else max(self.free_ns, self.clock.now_ns())]

    def done(self, event) -> bool:
        return self.clock.now_ns() >= event[0]

    def elapsed_ms(self, first, second) -> float:
        if self.mute:
            raise RuntimeError("CUDA error: device not ready")
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


def test_a_step_that_ends_before_the_one_ahead_of_it_reads_no_unflagged_zero(scene):
    """Steps that pass on an idle stream while the step ahead is still under way on a busy one are flagged unresolved: their 0 J say nothing."""
    clock, meter, sink, tracker, queue = scene
    with tracker:
        start_ns = clock.now_ns()
        for k in range(10):
            queue.elsewhere = k % 2 == 1
            if not queue.elsewhere:
                queue.busy(0.1)
            clock.advance(0.001)
            tracker.step()
        clock.advance(1.2)
        end_ns = clock.now_ns()
    train = [record for record in sink.records if record.phase is Phase.TRAIN]
    assert [record.duration_s for record in train[1::2]] == [0.0] * 5
    assert all(record.flagged(Flag.UNRESOLVED) for record in train[1::2])
    assert not any(record.flagged(Flag.UNRESOLVED) for record in train[::2])
    assert [record.energy_j for record in train[::2]] == pytest.approx([30.0] * 5, rel=0.05)
    assert tiles(sink.records)
    assert sink.summary.totals.energy_j == pytest.approx(meter.truth_j("gpu0", start_ns, end_ns), rel=0.02)


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
            assert tracker._boundaries.on_device is (not queue.broken)
    assert not tracker._boundaries.on_device
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


def test_a_boundary_that_can_not_be_timed_is_in_order_all_the_same(scene):
    """An event that is done but can't be timed, while the host is far ahead: no record goes back in time, and no joule counts twice."""
    clock, meter, sink, tracker, queue = scene
    with pytest.warns(GreenTorchWarning, match="taken on the host from now on"), tracker:
        start_ns = clock.now_ns()
        for _ in range(10):
            queue.busy(0.1)
            clock.advance(0.001)
            tracker.step()
        clock.advance(0.55)
        tracker._boundaries.advance()
        queue.mute = True
        clock.advance(0.1)
        for _ in range(3):
            tracker.step()
            clock.advance(0.1)
    assert tiles(sink.records)
    assert all(record.end_ns >= record.start_ns for record in sink.records)
    assert sink.summary.totals.energy_j <= meter.truth_j("gpu0", start_ns, clock.now_ns()) + 1
    assert sink.summary.totals.phase("train").n_steps == 13


def test_a_clock_that_stands_still_tells_boundaries_apart():
    """A coarse host clock (15 ms on some machines): marks within one tick of it, the first device mark too, keep their own instants."""
    clock = ScriptedClock()
    boundaries = Boundaries(clock.now_ns, lambda *_args, **_named: None, may_use_device=False)
    on_host = boundaries.mark()
    queue = Queue(clock)
    boundaries.use(queue)
    queue.busy(0.01)
    marks = [on_host, boundaries.mark()]
    assert boundaries.resolve(Instant.exact(on_host)) == Instant.exact(on_host)
    clock.advance(0.02)
    boundaries.advance()
    for _ in range(2):
        marks.append(boundaries.mark())
        boundaries.advance()
    assert len(set(marks)) == 4
    instants = [boundaries.resolve(Instant.exact(mark)) for mark in marks]
    assert [instant.at_ns for instant in instants] == sorted(instant.at_ns for instant in instants)
    assert instants[1].hi_ns >= on_host + 10_000_000


def test_an_interruption_at_the_device_loses_no_boundary():
    """Ctrl-C at each line of the device's clock, and the loop goes on: every later record is delivered, in order, none twice."""
    position, interrupted = 0, True
    while interrupted:
        position += 1
        clock = ScriptedClock()
        meter = ScriptedMeter(clock, {"gpu0": 300.0})
        sink = MemorySink()
        tracker = green_torch.track(
            clock=clock, meters=[meter], sinks=[sink], intensity=1.0, log_every_n_steps=1, poll_interval_s=0.1
        )
        queue = Queue(clock)
        tracker._boundaries.use(queue)
        ctrl_c = CtrlC(position, lambda frame: frame.f_code.co_filename.endswith("green_torch/clock/device.py"))
        with tracker:
            start_ns = clock.now_ns()
            for k in range(8):
                queue.busy(0.1)
                clock.advance(0.07 if k < 5 else 0.3)
                with suppress(KeyboardInterrupt), ctrl_c if k == 5 else nullcontext():
                    tracker.step()
            clock.advance(1.0)
            tracker._boundaries.advance()
            clock.advance(0.2)
            assert not tracker._journal.behind, ctrl_c.where
            end_ns = clock.now_ns()
        interrupted = bool(ctrl_c.where)
        assert tiles(sink.records), ctrl_c.where
        assert sink.summary.totals.energy_j == pytest.approx(meter.truth_j("gpu0", start_ns, end_ns), rel=0.02), ctrl_c.where
        assert 7 <= sink.summary.totals.phase("train").n_steps <= 8, ctrl_c.where
    assert position > 20
