"""The journal: notes become spans in their order, off the thread that made them, and nothing is lost or counted twice."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from green_torch.clock import Boundaries
from green_torch.journal import NOTHING_RAN, Journal
from green_torch.records import Flag, FlopCount, Phase
from green_torch.steps import Cadence

if TYPE_CHECKING:
    from types import FrameType


class Desk:
    """A journal on a host clock that the test moves, or a real one; what it puts, and what it says."""

    def __init__(self, every: int = 1, now_ns=None) -> None:
        self.at_ns = 1000
        self.spans = []
        self.said = {}
        self.asked = 0
        self.failing = False
        boundaries = Boundaries(now_ns or (lambda: self.at_ns), self.warn, may_use_device=False)
        self.journal = Journal(boundaries, Cadence(every), put=self.spans.append, warn=self.warn, peak_memory=self.peak)

    def warn(self, text: str, *, key: str = "") -> None:
        self.said.setdefault(key, text)

    def peak(self) -> int:
        self.asked += 1
        if self.failing:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return 7

    def step(self, tokens=None, samples=None, step=None, ran=NOTHING_RAN, *, takes_ns: int = 1_000_000) -> None:
        self.at_ns += takes_ns
        self.journal.step(tokens, samples, step, ran)

    @property
    def real(self):
        """The spans of a phase, in order; those of nobody's only have levels taken."""
        return [span for span in self.spans if span.phase is not None]


def test_a_step_only_notes():
    """Nothing is made of a step until it is read; then all is, in order, each span beginning where the last one ended."""
    desk = Desk()
    for k in range(5):
        desk.step(tokens=k + 1)
    assert desk.real == []
    desk.journal.read()
    assert [(span.step, span.work.tokens) for span in desk.real] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert all(a.end == b.start for a, b in itertools.pairwise(desk.real))
    assert {span.peak_memory_bytes for span in desk.real} == {7}


def test_steps_and_phases_keep_their_order():
    """What is noted before anything is read comes to the same spans as what is read note by note."""

    def run(read) -> list:
        desk = Desk(every=2)
        for k in range(4):
            desk.step(tokens=1, ran=(FlopCount(1.0, None), ()))
            read(desk)
            desk.at_ns += 2_000_000
            desk.journal.open_phase(Phase.EVAL if k % 2 else None, NOTHING_RAN)
            read(desk)
            desk.at_ns += 3_000_000
            desk.journal.close_phase((FlopCount(5.0, None), ()))
            read(desk)
        desk.at_ns += 1_000_000
        desk.journal.finish()
        return desk.spans

    together, one_by_one = run(lambda _: None), run(lambda desk: desk.journal.read())
    assert together == one_by_one
    assert sum(span.duration_s for span in together if span.phase) == pytest.approx(0.025 - 0.006)
    assert [span.phase for span in together if span.phase][-1] is Phase.OTHER


def test_in_phase_is_known_at_once():
    """A step within a phase adds its work to the phase, and makes no train record."""
    desk = Desk()
    desk.journal.open_phase(Phase.EVAL, NOTHING_RAN)
    assert desk.journal.in_phase
    desk.step(tokens=3)
    desk.journal.close_phase(NOTHING_RAN)
    assert not desk.journal.in_phase
    desk.journal.read()
    assert [(span.phase, span.work.tokens) for span in desk.real] == [(Phase.EVAL, 3)]
    assert desk.journal.last_step == -1


def test_last_step_counts_what_is_not_yet_read():
    """It needs no tick; a step's own number moves the axis, and a resumed run goes on after the checkpoint's."""
    desk = Desk()
    desk.journal.resume(41, 42)
    assert desk.journal.last_step == 41
    desk.step()
    assert desk.journal.last_step == 42
    desk.step(step=100)
    desk.step()
    assert desk.journal.last_step == 101
    assert [span.step for span in desk.real] == [42, 100, 101]


def test_flush_ends_the_record_under_way():
    """Also in the middle of a step, which then goes on; and within a phase it ends nothing."""
    desk = Desk(every=100)
    desk.step()
    desk.step()
    desk.at_ns += 5
    desk.journal.flush()
    assert [(span.step, span.work.n_steps) for span in desk.real] == [(1, 2)]
    desk.journal.open_phase(Phase.SAVE, NOTHING_RAN)
    desk.at_ns += 7
    desk.journal.flush()
    assert len(desk.real) == 1
    desk.journal.close_phase(NOTHING_RAN)
    desk.step()
    desk.journal.flush()
    assert [span.phase for span in desk.real] == [Phase.TRAIN, Phase.SAVE, Phase.TRAIN]
    assert desk.real[-1].duration_s == pytest.approx(1e-3 + 5e-9)


def test_without_a_reader_notes_are_bounded():
    """Steps or phases by the ten thousand while the recorder's thread is stuck: the training thread reads, and none is lost."""
    desk = Desk()
    for _ in range(5000):
        desk.step(tokens=1)
        assert len(desk.journal._notes) <= 1024
    for _ in range(5000):
        desk.at_ns += 1000
        desk.journal.open_phase(Phase.EVAL, NOTHING_RAN)
        desk.at_ns += 1000
        desk.journal.close_phase(NOTHING_RAN)
        assert len(desk.journal._notes) <= 1025
    desk.journal.finish()
    assert sum(span.work.tokens or 0 for span in desk.real if span.phase is Phase.TRAIN) == 5000
    assert sum(span.duration_s for span in desk.real) == pytest.approx((desk.at_ns - 1000) / 1e9)


def test_a_tensor_is_read_when_the_step_ends():
    """A counter that the loop sets back in place right after step() has told what it held at the step."""
    import torch

    desk = Desk()
    counter = torch.zeros((), dtype=torch.int64)
    for k in range(3):
        counter += k + 1
        desk.step(tokens=counter, samples=counter, step=counter)
        counter.zero_()
    desk.journal.read()
    assert [(span.step, span.work.tokens, span.work.samples) for span in desk.real] == [(1, 1, 1), (2, 2, 2), (3, 3, 3)]
    assert not desk.said


def test_what_is_no_number_is_said_and_left_out():
    """Each kind once; the step itself stands, flagged."""
    desk = Desk()
    for wrong in ("x", float("nan"), -1, object()):
        desk.step(tokens=wrong, samples=wrong, step="x")
    desk.journal.read()
    assert [span.step for span in desk.real] == [0, 1, 2, 3]
    assert all(Flag.BAD_COUNT in span.flags for span in desk.real)
    assert set(desk.said) == {"bad tokens", "bad samples", "bad step"}


def test_one_bad_note_costs_itself_alone():
    """An error while a note is read is said, and what follows is read."""
    desk = Desk()
    desk.journal.close_phase(NOTHING_RAN)  # of a phase that never opened
    desk.step()
    desk.journal.read()
    assert len(desk.real) == 1
    assert "journal" in desk.said


def test_two_threads_read_what_a_third_notes():
    """Every step and token comes out once, in order, while the training thread now and then reads too."""
    desk = Desk(every=3, now_ns=time.monotonic_ns)
    stop = threading.Event()

    def reader() -> None:
        while not stop.is_set():
            desk.journal.read(wait=False)
            assert desk.journal.unread_since_ns > 0

    readers = [threading.Thread(target=reader) for _ in range(2)]
    for thread in readers:
        thread.start()
    try:
        for k in range(6000):
            desk.journal.step(1, None, None, NOTHING_RAN)
            if k % 50 == 0:
                assert desk.journal.last_step == k
            if k % 100 == 7:
                desk.journal.open_phase(Phase.EVAL, NOTHING_RAN)
                desk.journal.close_phase(NOTHING_RAN)
    finally:
        stop.set()
        for thread in readers:
            thread.join()
    desk.journal.finish()
    train = [span for span in desk.real if span.phase is Phase.TRAIN]
    assert sum(span.work.tokens for span in train) == sum(span.work.n_steps for span in train) == 6000
    assert [span.step for span in train] == sorted({span.step for span in train})
    covered = sum(span.duration_s for span in desk.real)
    assert covered == pytest.approx((desk.real[-1].end.at_ns - desk.real[0].start.at_ns) / 1e9, rel=1e-9)


def test_a_reader_that_may_not_wait_does_not():
    """While another thread reads, a tick goes on at once."""
    desk = Desk()
    desk.step()
    with desk.journal._reading:
        tick = threading.Thread(target=lambda: desk.journal.read(wait=False))
        tick.start()
        tick.join(timeout=5)
        assert not tick.is_alive()
    assert desk.real == []


def test_readings_are_needed_from_the_oldest_unread_instant_on():
    """An unread note, and the step under way, hold old readings; a phase that is open does not, its start having been seen."""
    desk = Desk(every=10)
    began_ns = desk.at_ns
    assert desk.journal.unread_since_ns == began_ns
    desk.step()
    desk.journal.read()
    assert desk.journal.unread_since_ns == desk.at_ns
    desk.at_ns += 50
    desk.journal.open_phase(Phase.EVAL, NOTHING_RAN)
    desk.journal.read()
    assert desk.journal.unread_since_ns == float("inf")
    desk.at_ns += 50
    desk.journal.close_phase(NOTHING_RAN)
    assert desk.journal.unread_since_ns == desk.at_ns


def test_ctrl_c_leaves_the_journal_open():
    """Interrupted again and again while the training thread reads, the journal can still be read from the recorder's thread."""
    desk = Desk(now_ns=time.monotonic_ns)

    def interrupt(_number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_filename.endswith("journal.py") and "tests" not in frame.f_code.co_filename:
            raise KeyboardInterrupt

    old, interruptions = signal.signal(signal.SIGALRM, interrupt), 0
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        while interruptions < 300:
            try:
                while True:
                    desk.journal.step(1, None, None, NOTHING_RAN)
                    desk.journal.read()
            except KeyboardInterrupt:
                interruptions += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, old)
    desk.journal.step(1, None, None, NOTHING_RAN)
    other = threading.Thread(target=lambda: desk.journal.read(wait=False))
    other.start()
    other.join(timeout=5)
    assert not desk.journal._notes
    assert not desk.journal.behind


def test_peak_memory_is_asked_once_a_reading():
    """However many spans are read together; and where the driver fails it is unknown, and the steps are there."""
    desk = Desk()
    for desk.failing in (False, True):
        for _ in range(100):
            desk.step()
        desk.journal.read()
    assert desk.asked <= 3
    assert [span.peak_memory_bytes for span in desk.real] == [7] * 100 + [None] * 100
