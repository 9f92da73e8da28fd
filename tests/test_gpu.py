"""CUDA step boundaries on a real GPU; run by ``pytest -m gpu`` and ``benchmarks/gpu_check.py``, skipped where there is none."""

from __future__ import annotations

import time
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch

import green_torch
from green_torch.clock.cuda import CudaEvents
from green_torch.records import Domain, Flag, Method, Phase, Reading
from green_torch.testing import MemorySink

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

POWER_W = 250.0


class Steady:
    """A counter of constant power on the host's clock: what is tested here is time, and no GPU's driver."""

    domains = (Domain("gpu0", Method.COUNTER, "steady", "a test", power_limit_w=400.0),)
    interval_s = None

    def read(self) -> Reading:
        begin_ns = time.monotonic_ns()
        return Reading(begin_ns, time.monotonic_ns(), {"gpu0": POWER_W * begin_ns / 1e9})

    def close(self) -> None:
        pass


class Training:
    """A small model and its steps; ``busy`` enqueues about as many milliseconds of work."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.GELU(), torch.nn.Linear(512, 512)).cuda()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.batch = torch.randn(256, 512, device="cuda")
        self._a = torch.randn(2048, 2048, device="cuda", dtype=torch.float16)
        self._out = torch.empty_like(self._a)
        self._per_ms = self._rate()

    def step(self, model=None) -> torch.Tensor:
        loss = (self.model if model is None else model)(self.batch).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def busy(self, ms: float) -> None:
        for _ in range(max(1, round(ms * self._per_ms))):
            torch.mm(self._a, self._a, out=self._out)

    def _rate(self) -> float:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for event in (first, last):  # the first round warms up
            for _ in range(200):
                torch.mm(self._a, self._a, out=self._out)
            event.record()
        torch.cuda.synchronize()
        return 200 / first.elapsed_time(last)


@pytest.fixture(scope="module")
def training():
    return Training()


@contextmanager
def tracked(**options):
    """A tracker with a record per step, its sink, and CUDA up before the first boundary.

    Any error in our CUDA calls, a synchronisation that was made one too, leaves the device for the host's clock: none may have.
    """
    torch.cuda.synchronize()
    sink = MemorySink()
    with green_torch.track(meters=[Steady()], sinks=[sink], intensity=100, log_every_n_steps=1, **options) as tracker:
        assert tracker._boundaries.on_device
        yield tracker, sink
    assert tracker._boundaries.on_device, tracker.summary().warnings
    assert not tracker.summary().warnings


@contextmanager
def sync_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train_records(sink):
    return [record for record in sink.records if record.phase is Phase.TRAIN]


def assert_whole(sink, n_steps: int) -> None:
    """Every step has a record, one begins where the other ended, and joules follow time."""
    records = train_records(sink)
    assert [record.step for record in records] == list(range(n_steps))
    assert all(a.end_ns == b.start_ns for a, b in pairwise(records))
    assert all(record.duration_s >= 0 for record in records)
    total_s = sum(record.duration_s for record in records)
    assert sum(record.energy_j for record in records) == pytest.approx(POWER_W * total_s, rel=0.02, abs=POWER_W * 0.03)


def test_no_synchronisation_in_steady_state(training):
    """A tracked loop runs while every synchronisation of torch's is an error; one of the user's own still is."""
    with tracked() as (tracker, sink):
        for _ in range(10):
            training.step()
            tracker.step(tokens=256)
        with sync_is_an_error():
            for _ in range(300):
                loss = training.step()
                tracker.step(tokens=256)
            with tracker.phase("eval"):
                training.model(training.batch)
            with pytest.raises(RuntimeError, match="synchroniz"):
                loss.item()
    assert_whole(sink, 310)


def test_a_synchronisation_of_ours_would_be_seen(training, monkeypatch):
    """What the test above proves: were one of our calls to wait for the device, the run would end on the host's clock and fail it."""
    honest = CudaEvents.done

    def waits(self, event):
        training.batch[0, 0].item()
        return honest(self, event)

    with pytest.raises(AssertionError, match="synchroniz"), tracked() as (tracker, _):
        training.step()
        tracker.step()
        monkeypatch.setattr(CudaEvents, "done", waits)
        with sync_is_an_error():
            training.step()
            tracker.step()


def test_the_profiler_sees_an_event_for_each_step(training):
    """The boundaries that cost no synchronisation are there: CUDA records an event for each, and nothing more is waited for."""

    def calls(run):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as profiled:
            for _ in range(50):
                run()
        names = [event.name for event in profiled.events()]
        return sum(name.startswith("cudaEventRecord") for name in names), sum("Synchronize" in name for name in names)

    recorded, waited = calls(training.step)
    with tracked() as (tracker, sink):
        tracker.step()
        ours, ours_waited = calls(lambda: (training.step(), tracker.step()))
    assert ours >= recorded + 50
    assert ours_waited <= waited
    assert_whole(sink, 51)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_device_than_the_current_one(training):
    """Boundaries are of the device that the model is on: steps last as long as the work there."""
    model = torch.nn.Linear(8192, 8192, bias=False).to("cuda:1")
    batch = torch.randn(8192, 8192, device="cuda:1")
    events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
    with tracked(model=model, flops_per_step=1.0, peak_flop_per_s=1e14) as (tracker, sink), torch.no_grad():
        model(batch)
        events[0].record(torch.cuda.current_stream(1))
        tracker.step()
        for event in events[1:]:
            model(batch)
            event.record(torch.cuda.current_stream(1))
            tracker.step()
        torch.cuda.synchronize(1)
    truths_s = [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
    assert [record.duration_s for record in train_records(sink)[1:]] == pytest.approx(truths_s, abs=1e-3)


def test_with_a_model_whose_flops_are_counted(training):
    """Counting on a meta copy synchronises nothing either, once a shape is known."""
    with tracked(model=training.model, peak_flop_per_s=1e14) as (tracker, sink):
        for _ in range(3):
            training.step()
            tracker.step()
        with sync_is_an_error():
            for _ in range(50):
                training.step()
                tracker.step()
    assert_whole(sink, 53)
    assert train_records(sink)[-1].model_flops == 3 * 2 * 2 * 256 * 512 * 512 - 2 * 256 * 512 * 512  # no gradient of the batch


def test_boundaries_are_where_the_gpu_passed_them(training):
    """A host that runs ahead of the queue moves no boundary: durations are those of CUDA's own events."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(31)]
    with tracked() as (tracker, sink):
        events[0].record()
        tracker.step()
        for event in events[1:]:
            training.busy(20.0)
            event.record()
            tracker.step()
        torch.cuda.synchronize()
    truths_s = [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
    durations_s = [record.duration_s for record in train_records(sink)[1:]]
    assert sum(durations_s) == pytest.approx(sum(truths_s), rel=0.01, abs=1e-3)
    assert durations_s == pytest.approx(truths_s, abs=1e-3)


def test_a_synchronised_boundary_is_where_the_host_saw_it(training):
    """Just after a synchronisation the boundary lies at most a millisecond back, never ahead."""
    seen_ns = []
    with tracked() as (tracker, sink):
        for _ in range(50):
            training.busy(5.0)
            tracker.step()
            torch.cuda.synchronize()
            seen_ns.append(time.monotonic_ns())
    late_ns = [seen - record.end_ns for seen, record in zip(seen_ns, train_records(sink), strict=True)]
    assert min(late_ns) > -100_000
    assert sorted(late_ns)[25] < 1_000_000


def test_a_step_that_enqueues_nothing(training):
    """Steps without work on the device pass when the host marks them."""
    with tracked() as (tracker, sink):
        for k in range(40):
            if k % 3 == 0:
                training.step()
            tracker.step()
    assert_whole(sink, 40)


def test_several_streams(training):
    """Boundaries are recorded on the stream that is current, and never go back; a step that passed before the one ahead is flagged."""
    busy, idle = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)
    with tracked() as (tracker, sink):
        for _ in range(30):
            with torch.cuda.stream(busy):
                training.busy(3.0)
                tracker.step()
            with torch.cuda.stream(idle):
                tracker.step()
        torch.cuda.synchronize()
    assert_whole(sink, 60)
    timeless = [record for record in train_records(sink) if record.duration_s == 0]
    assert len(timeless) > 15
    assert all(record.flagged(Flag.UNRESOLVED) for record in timeless)


def test_steps_during_graph_capture(training):
    """Steps marked while a graph is captured neither end the capture nor enter the graph."""
    x = torch.ones(1024, device="cuda")
    torch.cuda.synchronize()
    with tracked() as (tracker, sink):
        tracker.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x * 2
            tracker.step()
            z = y + 1
            tracker.step()
        x.fill_(3.0)
        for _ in range(20):
            graph.replay()
            tracker.step()
    assert torch.equal(z, torch.full_like(z, 7.0))
    assert_whole(sink, 23)


def test_reduce_overhead(training):
    """A model compiled with CUDA graphs trains as without us, and every step has its record."""
    pytest.importorskip("triton")
    losses = []
    for measured in (False, True):
        fresh = Training()
        compiled = torch.compile(fresh.model, mode="reduce-overhead")
        if not measured:
            losses.append([fresh.step(compiled).clone() for _ in range(12)])
            continue
        with tracked() as (tracker, sink):
            own = []
            for _ in range(12):
                torch.compiler.cudagraph_mark_step_begin()
                own.append(fresh.step(compiled).clone())
                tracker.step()
        losses.append(own)
        assert_whole(sink, 12)
    torch.testing.assert_close(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-3, atol=1e-4)


def test_events_are_used_again(training):
    """Thousands of steps make no more CUDA events than the host runs ahead by."""
    with tracked() as (tracker, _):
        for _ in range(5000):
            training.step()
            tracker.step()
        tracker.flush()
        marker = tracker._boundaries._device
        assert len(marker._events._free) + len(marker._pending) < 1200  # CUDA's queue holds about 1024 launches
