"""The CUDA calls behind step boundaries, against a scripted driver under ``torch.cuda``: which device, in which order, and when not."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

import green_torch
from green_torch.clock import Boundaries
from green_torch.records import Instant
from green_torch.testing import MemorySink, ScriptedClock, ScriptedMeter

POOL_S = 0.02  # a device's first stream makes all of them


class Driver:
    """Two devices, each with a queue, in scripted time; remembers which of them were touched, since that makes a context there."""

    def __init__(self, now_ns, spend) -> None:
        self.now_ns = now_ns
        self.spend = spend
        self.current = 0
        self.initialized = True
        self.capturing = False
        self.touched: set[int] = set()
        self.free_ns = [0, 0]

    def busy(self, index: int, seconds: float) -> None:
        self.free_ns[index] = max(self.free_ns[index], self.now_ns()) + int(seconds * 1e9)

    def put_under(self, monkeypatch) -> None:
        driver = self

        class Stream:
            def __init__(self, device=None, priority=0) -> None:
                assert not driver.capturing
                self.index = driver.current if device is None else device.index
                self.aside = True
                if self.index not in driver.touched:
                    driver.spend(POOL_S)
                driver.touched.add(self.index)

        class Event:
            def __init__(self, enable_timing=False) -> None:
                assert enable_timing
                self.index = None

            def record(self, stream) -> None:
                assert not driver.capturing
                assert self.index in {None, stream.index}, "an event is of one device"
                self.index = stream.index
                driver.touched.add(stream.index)
                self.at_ns = driver.now_ns() if stream.aside else max(driver.free_ns[stream.index], driver.now_ns())
                driver.spend(5e-6)

            def query(self) -> bool:
                assert not driver.capturing
                driver.spend(1e-6)
                return driver.now_ns() >= self.at_ns

            def elapsed_time(self, end) -> float:
                assert self.index == end.index
                return (end.at_ns - self.at_ns) / 1e6

        def current_stream(device=None):
            return SimpleNamespace(index=driver.current if device is None else device.index, aside=False)

        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        for name, instead in {
            "is_initialized": lambda: driver.initialized,
            "is_current_stream_capturing": lambda: driver.capturing,
            "current_device": lambda: driver.current,
            "current_stream": current_stream,
            "Stream": Stream,
            "Event": Event,
        }.items():
            monkeypatch.setattr(torch.cuda, name, instead)


@pytest.fixture
def clock():
    return ScriptedClock()


@pytest.fixture
def driver(clock, monkeypatch):
    driver = Driver(clock.now_ns, clock.advance)
    driver.put_under(monkeypatch)
    return driver


def boundaries(clock, device=None):
    def fail(text, **_):
        raise AssertionError(text)

    return Boundaries(clock.now_ns, fail, may_use_device=True, device=lambda: device)


def passed(clock, own, driver, index: int) -> tuple[int, Instant]:
    """A boundary marked behind 0.1 s of a device's work and looked at half a second later: when it passed, and what it came to."""
    driver.busy(index, 0.1)
    mark = own.mark()
    own.advance()
    assert own.resolve(Instant.exact(mark)) is None
    clock.advance(0.5)
    own.advance()
    return driver.free_ns[index], own.resolve(Instant.exact(mark))


@pytest.mark.parametrize(
    ("device", "index"), [(torch.device("cuda", 1), 1), (None, 0), (torch.device("cuda"), 0), (torch.device("cpu"), 0)]
)
def test_boundaries_are_of_the_models_device(clock, driver, device, index):
    """A model on cuda:1 is timed there, and cuda:0, which is current, gets no context; else the current device's queue is watched."""
    own = boundaries(clock, device)
    truth_ns, instant = passed(clock, own, driver, index)
    assert own.on_device
    assert driver.touched == {index}
    assert instant.lo_ns <= truth_ns <= instant.hi_ns
    assert abs(instant.at_ns - truth_ns) < 50_000


def test_the_first_anchor_is_tight(clock, driver):
    """Making torch's streams takes milliseconds once, and lies in no anchor's bracket: already the first boundary is known closely."""
    truth_ns, instant = passed(clock, boundaries(clock), driver, 0)
    assert instant.hi_ns - instant.lo_ns < 100_000
    assert abs(instant.at_ns - truth_ns) < 50_000


def test_a_device_comes_into_use_after_a_capture(clock, driver):
    """CUDA that is first seen while a graph is captured is left alone, and boundaries are the host's until the capture is over."""
    own = boundaries(clock)
    driver.capturing = True
    mark = own.mark()
    assert not own.on_device
    assert not driver.touched
    driver.capturing = False
    clock.advance(0.01)
    truth_ns, instant = passed(clock, own, driver, 0)
    assert own.on_device
    assert own.resolve(Instant.exact(mark)) == Instant.exact(mark)
    assert instant.lo_ns <= truth_ns <= instant.hi_ns


def test_a_model_that_is_moved_after_the_run_began_is_timed_where_it_went(monkeypatch):
    """track() looks at the model's device when CUDA comes into use, not before."""
    driver = Driver(time.monotonic_ns, lambda seconds: None)
    driver.initialized = False
    driver.put_under(monkeypatch)
    model = torch.nn.Linear(2, 2)
    meter = ScriptedMeter(ScriptedClock(), {"gpu0": 300.0})
    with green_torch.track(model, meters=[meter], sinks=[MemorySink()], intensity=100) as tracker:
        tracker.step()
        assert not tracker._boundaries.on_device
        moved = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float32)
        monkeypatch.setattr(model, "parameters", lambda: iter([moved]))
        driver.initialized = True
        tracker.step()
        assert tracker._boundaries.on_device
        assert driver.touched == {1}
