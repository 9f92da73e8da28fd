"""The child process that reads counters: its readings, its pace, and its end."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import green_torch
from green_torch.clock import HostClock
from green_torch.meters.nvml import NvmlMeter
from green_torch.sampler import Sampler
from green_torch.sampler_child import SWITCH, ChildMeter, Pace, in_child
from green_torch.testing import MemorySink, ScriptedClock, ScriptedMeter
from tests.simnvml import Fault, Gpu, constant, simulated, square

MS = 1_000_000


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """Opens the first GPU of a simulated driver that this process and its children share, read by a child."""
    opened = []

    def open_first(sim, poll_interval_s=0.01) -> ChildMeter:
        for name, value in sim.child_env(tmp_path).items():
            monkeypatch.setenv(name, value)
        (meter,) = in_child([NvmlMeter(sim.gpus[0].uuid)], poll_interval_s)
        opened.append(meter)
        return meter

    monkeypatch.delenv(SWITCH, raising=False)
    yield open_first
    for meter in opened:
        meter.close()


def until(true, timeout_s: float = 10.0) -> bool:
    """Polls a condition."""
    end = time.monotonic() + timeout_s
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def settled(meter: ChildMeter) -> list:
    """Readings until the child does them."""
    readings = [meter.read()]
    assert until(lambda: readings.append(meter.read()) or meter.apart)
    return readings


def test_readings_are_the_counters(apart):
    """Each of the child's readings is what the counter showed between its two instants, in order, and closely around the changes."""
    with simulated(Gpu(square(60, 300, period_s=0.05), period_s=0.02), virtual=False) as sim:
        meter = apart(sim)
        before = settled(meter)[-1]
        readings = []
        while len(readings) < 30:
            newest = meter.read()
            readings += [*newest.earlier, newest]
        assert before.end_ns <= readings[0].end_ns
        for earlier, later in itertools.pairwise(readings):
            assert earlier.begin_ns <= earlier.end_ns
            assert earlier.end_ns <= later.begin_ns or earlier.begin_ns == later.begin_ns
        for reading in readings:
            energy_j = reading.energy_j["gpu0"]
            possible = [
                1234.567 + sim.truth_j(0, sim.epoch_ns, sim.last_update_ns(0, at_ns))
                for at_ns in (reading.begin_ns, reading.end_ns)
            ]
            assert possible[0] - 2e-3 <= energy_j <= possible[1] + 2e-3


def test_the_child_ends_with_a_killed_parent(tmp_path):
    """SIGKILL on the parent ends the child, even where a forked worker keeps the child's pipes open."""
    script = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from green_torch.meters.nvml import NvmlMeter
from green_torch.sampler_child import in_child
(meter,) = in_child([NvmlMeter(sys.argv[2])], 0.01)
while not meter.apart:
    meter.read()
worker = os.fork()
if worker == 0:
    time.sleep(60)
    os._exit(0)
print(meter.pid, worker, flush=True)
time.sleep(60)
"""
    with simulated(Gpu(constant(100)), virtual=False) as sim:
        root = str(Path(__file__).parents[1])
        env = os.environ | sim.child_env(tmp_path)
        command = [sys.executable, "-c", script, root, sim.gpus[0].uuid]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as parent:
            child, worker = map(int, parent.stdout.readline().split())
            assert not gone(child)
            parent.kill()
            try:
                assert until(lambda: gone(child), 5.0)
            finally:
                os.kill(worker, signal.SIGKILL)


def test_a_hung_driver_never_delays_a_step(apart):
    """While NVML hangs in the child, and then in this process's thread, step() returns at once and the run ends in time."""
    hang = Fault("slow", 1.2, 4.5, 3.0)  # by then the child reads, on a busy machine too
    with simulated(Gpu(constant(100), period_s=0.02, faults=(hang,)), virtual=False, cost_sleeps=True) as sim:
        sink, longest = MemorySink(), 0.0
        tracker = green_torch.track(meters=[apart(sim)], intensity=100, sinks=[sink], log_every_n_steps=1)
        with pytest.warns(green_torch.GreenTorchWarning), tracker:
            while time.monotonic_ns() < sim.at(2.3):
                begun = time.monotonic()
                tracker.step()
                longest = max(longest, time.monotonic() - begun)
                time.sleep(0.005)
            left = time.monotonic()
        assert longest < 0.5
        assert time.monotonic() - left < 6.0
        assert any(record.flags for record in sink.records)
        assert sink.records[0].energy_j is not None


def test_a_killed_child_is_replaced_by_the_thread(apart):
    """When the child is killed readings go on in this process, from where they were."""
    with simulated(Gpu(constant(200), period_s=0.02), virtual=False) as sim:
        meter = apart(sim)
        last = settled(meter)[-1]
        os.kill(meter.pid, signal.SIGKILL)
        assert until(lambda: meter.read() and not meter.apart)
        after = meter.read()
        assert after.begin_ns >= last.end_ns
        assert after.energy_j["gpu0"] > last.energy_j["gpu0"]
        assert meter.pid is None


def failing(sim, timeout_s: float = 10.0) -> list[str]:
    """What is said while a child fails, in whose place the thread reads."""
    said: list[str] = []
    (meter,) = in_child([NvmlMeter(sim.gpus[0].uuid)], 0.01, lambda text, **_: said.append(text))
    end = time.monotonic() + timeout_s
    while not said and time.monotonic() < end:
        assert sim.now_ns() - meter.read().end_ns < 50 * MS
        assert not meter.apart
        time.sleep(0.02)
    for _ in range(10):
        meter.read()
    meter.close()
    return said


def test_a_child_that_finds_no_driver_leaves_the_reading_to_the_thread(monkeypatch):
    """Where the child can't open the GPU the parent's own readings stand, and why is said once."""
    monkeypatch.delenv(SWITCH, raising=False)
    with simulated(Gpu(constant(200), period_s=0.02), virtual=False) as sim:
        (text,) = failing(sim)
    assert "(no NVIDIA driver: " in text
    assert f"export {SWITCH}=thread" in text


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (
            "#!/bin/sh\necho Traceback >&2; echo \"ImportError: no module named 'x'\" >&2; exit 1",
            "(ImportError: no module named 'x', exit status 1)",
        ),
        ("#!/bin/sh\nhead -c 200000 /dev/zero | tr '\\0' 'y' >&2; sleep 0.1; exit 3", f"({'y' * 300}, exit status 3)"),
        ("#!/bin/sh\nkill -9 $$", "(exit status -9)"),
        ("#!/no/such/interpreter", "No such file"),
    ],
    ids=["import error", "much to say", "killed", "not started"],
)
def test_a_child_that_fails_is_said_once(monkeypatch, tmp_path, script, why):
    """A child that does not come up is said once, with the reason, and the thread reads."""
    monkeypatch.delenv(SWITCH, raising=False)
    python = tmp_path / "python3"
    python.write_text(script)
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    with simulated(Gpu(constant(200), period_s=0.02), virtual=False) as sim:
        (text,) = failing(sim)
    assert why in text


def test_a_child_that_reads_rarely_is_not_taken_for_silent(apart):
    """Where readings are a second apart the thread does not make its own between the child's."""
    with simulated(Gpu(constant(200), period_s=0.02), virtual=False) as sim:
        meter = apart(sim, 1.0)
        settled(meter)
        own, end = sim.calls, time.monotonic() + 2.6
        while time.monotonic() < end:
            meter.read()
            assert meter.apart
        assert sim.calls == own


def test_closing_ends_the_child(apart):
    """The last meter's close ends the child, waits for no fetch, and may come twice."""
    with simulated(Gpu(constant(100), period_s=0.02), virtual=False) as sim:
        meter = apart(sim)
        sampler = Sampler(HostClock(), [meter], 0.01)
        sampler.start()
        assert until(lambda: meter.apart)
        pid = meter.pid
        sampler.stop(close=True)
        meter.close()
        assert gone(pid)
        assert sampler.timelines["gpu0"].knots > 1


def test_a_forked_workers_copy_ends_nothing(apart):
    """A worker forked from the training process that closes its copy leaves the parent's child alone."""
    with simulated(Gpu(constant(100), period_s=0.02), virtual=False) as sim:
        meter = apart(sim)
        settled(meter)
        worker = os.fork()
        if worker == 0:
            meter.close()
            os._exit(0)
        os.waitpid(worker, 0)
        assert not gone(meter.pid)
        begun = meter.read().end_ns
        assert meter.read().end_ns > begun
        assert meter.apart


def test_others_are_looked_for_while_the_child_reads(tmp_path, monkeypatch):
    """Where the child reads, the parent still looks for other processes on the GPU now and then."""
    later_s = [0]
    monkeypatch.delenv(SWITCH, raising=False)
    with simulated(Gpu(period_s=0.02, faults=(Fault("joined", 0.2, arg=4_000_001.0),)), virtual=False) as sim:
        for name, value in sim.child_env(tmp_path).items():
            monkeypatch.setenv(name, value)
        own = NvmlMeter(sim.gpus[0].uuid, now_ns=lambda: time.monotonic_ns() + later_s[0] * 1_000 * MS)
        (meter,) = in_child([own], 0.01)
        settled(meter)
        assert not meter.domains[0].shared
        later_s[0] = 31
        meter.read()
        assert meter.apart
        assert meter.domains[0].shared
        meter.close()


def test_it_can_be_switched_off(monkeypatch):
    """GREEN_TORCH_SAMPLER=thread leaves every meter as it is; so do meters that are no NVML counters."""
    other = ScriptedMeter(ScriptedClock(), {"cpu": 50.0})
    with simulated(Gpu(constant(100)), Gpu(constant(100), energy_supported=False)) as sim:
        meters = [other, *(NvmlMeter(gpu.uuid, now_ns=sim.now_ns) for gpu in sim.gpus)]
        monkeypatch.setenv(SWITCH, "thread")
        assert in_child(meters, 0.01) == meters
        monkeypatch.delenv(SWITCH)
        wrapped = in_child(meters, 0.01)
        assert wrapped[0] is other
        assert isinstance(wrapped[1], ChildMeter)
        assert wrapped[1].domains == meters[1].domains
        assert wrapped[2] is meters[2]
        for meter in wrapped:
            meter.close()


def paced(
    period_ms: int, phase: float, jitter: float, rng: random.Random, poll_interval_s: float = 0.01
) -> tuple[list[int], float, float]:
    """Widths of the brackets that a counter's changes are seen in once its rhythm is known, readings per change and ns per reading."""
    period, start, late = period_ms * MS, int(phase * period_ms * MS), {}

    def updates(t_ns: int) -> int:
        k = (t_ns - start) // period
        late.setdefault(k, rng.uniform(0, jitter * period))
        return k if start + k * period + late[k] <= t_ns else k - 1

    pace, now, seen, value, reads, widths = Pace(poll_interval_s), 0, 0, None, 0, []
    begun = 20 * period + 2000 * MS
    over = begun + max(100 * period, int(50e9 * poll_interval_s))
    while now < over:
        begin, end = now, now + 40_000
        fresh = updates(begin + 20_000)
        changed = value is not None and fresh != value
        if begin > begun:
            reads += 1
            if changed:
                widths.append(end - seen)
        now = end + rng.randrange(60_000, 140_000) + pace.wait_ns(begin, end, changed=changed)  # a sleep takes a little longer
        seen, value = begin, fresh
    return sorted(widths), reads / len(widths), (over - begun) / reads


@settings(max_examples=60, deadline=None)
@given(st.integers(15, 500), st.floats(0, 1), st.floats(0, 0.05), st.integers(0, 1000))
def test_the_pace_locks_onto_a_regular_counter(period_ms, phase, jitter, seed):
    """Whatever the period, phase and a little jitter, most changes are soon seen within 3 ms, at a few readings each."""
    widths, reads, _ = paced(period_ms, phase, jitter, random.Random(seed))
    assert widths[len(widths) // 2] < 3 * MS
    assert reads < 40


@settings(max_examples=40, deadline=None)
@given(st.integers(15, 30), st.floats(0, 1), st.floats(0, 0.02), st.integers(0, 1000))
def test_the_pace_stays_locked(period_ms, phase, jitter, seed):
    """A fast, regular counter does not drift out of the looks at it: nine of ten changes are seen within 2 ms, at three readings each."""
    widths, reads, _ = paced(period_ms, phase, jitter, random.Random(seed))
    assert widths[len(widths) * 9 // 10] < 2 * MS
    assert reads < 4


@pytest.mark.parametrize("poll_interval_s", [0.01, 1.0])
@pytest.mark.parametrize("period_ms", [1, 2, 5, 8])
def test_the_pace_keeps_to_the_interval_where_a_counter_is_faster(period_ms, poll_interval_s):
    """A counter that changes more often than it should be read is read at the interval once a second has passed, in brackets as wide."""
    widths, _, between_ns = paced(period_ms, 0.3, 0.02, random.Random(period_ms), poll_interval_s)
    assert 1e9 * poll_interval_s <= between_ns < 1.03e9 * poll_interval_s
    assert widths[-1] < 1.05e9 * poll_interval_s


@pytest.mark.parametrize("period_ms", [20, 100, 300, 500, 800])
def test_the_pace_keeps_to_a_long_interval(period_ms):
    """With a second between readings a usual counter's rhythm is not gone after."""
    _, _, between_ns = paced(period_ms, 0.3, 0.02, random.Random(period_ms), 1.0)
    assert between_ns >= 1e9


def test_the_pace_learns_for_a_second():
    """Readings are a tenth of the interval apart for a second, however fast the counter turns out to be."""
    pace = Pace(0.01)
    waits = [pace.wait_ns(k * MS, k * MS + 1000, changed=k > 0) for k in range(1100)]
    assert waits == [MS if k < 1000 else 10 * MS for k in range(1100)]


def test_the_pace_reads_rarely_what_stands_still():
    """A counter that never changes is read at the plain interval once a second has passed."""
    pace = Pace(0.01)
    assert pace.wait_ns(0, 1000, changed=False) == MS
    assert pace.wait_ns(2000 * MS, 2001 * MS, changed=False) == 10 * MS


def test_track_reads_gpus_through_the_child(tmp_path, monkeypatch):
    """On a machine with a GPU, track() alone measures it from the child, between bounds that hold the truth, and ends the child."""
    import green_torch
    from green_torch.testing import MemorySink

    monkeypatch.delenv(SWITCH, raising=False)
    with simulated(Gpu(square(60, 300, period_s=0.05), period_s=0.02), virtual=False) as sim:
        for name, value in sim.child_env(tmp_path).items():
            monkeypatch.setenv(name, value)
        sink = MemorySink()
        tracker = green_torch.track(intensity=100, sinks=[sink], log_every_n_steps=1)
        (meter,) = (watch._meter for watch in tracker._sampler._watches if watch.name == "gpu0")
        assert isinstance(meter, ChildMeter)
        with tracker:
            assert until(lambda: meter.apart)
            for _ in range(5):
                end = time.monotonic() + 0.1
                until(lambda end=end: time.monotonic() > end)
                tracker.step()
            pid = meter.pid
        for record in sink.records:
            (energy,) = (domain for domain in record.domains if domain.name == "gpu0")
            assert energy.energy_lo_j <= sim.truth_j(0, record.start_ns, record.end_ns) <= energy.energy_hi_j
    assert until(lambda: gone(pid))


def test_track_says_that_the_child_failed(tmp_path, monkeypatch):
    """A child that does not come up costs a run nothing but a warning, which the summary keeps."""
    monkeypatch.delenv(SWITCH, raising=False)
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\necho no memory >&2; exit 1")
    python.chmod(0o700)
    with simulated(Gpu(constant(200), period_s=0.02), virtual=False) as sim:
        sink = MemorySink()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(python))
            with green_torch.track(intensity=100, sinks=[sink], log_every_n_steps=1) as tracker:
                assert until(lambda: any("(no memory, exit status 1)" in text for text in tracker.summary().warnings))
                tracker.step()
        (energy,) = (domain for domain in sink.records[0].domains if domain.name == "gpu0")
        assert energy.energy_lo_j <= sim.truth_j(0, sink.records[0].start_ns, sink.records[0].end_ns) <= energy.energy_hi_j
