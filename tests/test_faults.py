"""Faults of the driver in the middle of a run, through the real ``track()``, ``NvmlMeter`` and pynvml, on the simulated NVML.

Time is scripted: the run's clock and the simulator's move together, and a slow call holds up every reading, as the driver's lock
does. What is asked of every fault and every pair: training goes on, the true joules lie within each record's bounds, what can't be
known is flagged, the other GPU's joules stay right, and the summary says what happened.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import green_torch
from green_torch.meters.nvml import open_meters
from green_torch.records import Domain, Flag, Instant, Method, Phase, Reading
from green_torch.sampler import Sampler
from green_torch.sampler_child import SWITCH, in_child
from green_torch.testing import MemorySink, ScriptedClock
from green_torch.timeline import DomainTimeline
from tests.simnvml import VIRTUAL_EPOCH_NS, Fault, Gpu, Wave, simulated, square

MS = 1_000_000
STEP_S = 0.1
STEPS = 80
BEGIN_S, END_S = 2.0, 4.6
RECOVERED_S = 1.6  # after a fault's end: a failing meter is asked once a second
FLAGS = {  # what such a fault must leave on the records of its GPU: one of these
    "not_supported": {"meter_failed"},
    "lost": {"meter_failed"},
    "stuck": {"counter_stuck"},
    "reset": {"counter_reset"},
    "backwards": {"counter_reset"},
    "slow": {"unresolved"},
}
ARGUMENTS = {"backwards": 90.0, "slow": 0.35}  # joules, seconds
WAVES = (square(80, 360, period_s=0.23), square(120, 300, period_s=0.31))


def fault(kind: str, begin_s: float = BEGIN_S, end_s: float = END_S) -> Fault:
    return Fault(kind, begin_s, end_s, ARGUMENTS.get(kind, 0.0))


def two_faults(first: str, second: str) -> tuple[Fault, Fault]:
    """Both on one GPU, half a second of them at once."""
    if (first, second) == ("backwards", "reset"):  # a counter can't go below zero: it would stand there, as an idle GPU's does
        return fault(first, 1.5, 3.0), fault(second, 3.0, 5.0)
    return fault(first, 1.5, 4.0), fault(second, 3.5, 5.5)


class Lockstep:
    """A :class:`ScriptedClock` that takes the simulated driver's time along. Readings queue up, as calls do for the driver's lock."""

    def __init__(self, sim) -> None:
        self._scripted = ScriptedClock(start_ns=VIRTUAL_EPOCH_NS)
        self._sim = sim
        self._waiting = deque()
        self._free_ns = 0
        self.epoch_unix_ns = self._scripted.epoch_unix_ns
        self.now_ns = self._scripted.now_ns
        self.sleep = self.advance = self._scripted.advance

    def every(self, interval_s, tick, name):
        def reading() -> None:
            if tick not in self._waiting:
                self._waiting.append(tick)
            now_ns = self.now_ns()
            if now_ns >= self._free_ns:
                self._sim.lib.sim_set_time_ns(now_ns)
                self._waiting.popleft()()
                self._free_ns = self._sim.now_ns()

        return self._scripted.every(interval_s, reading if name.startswith("meter") else tick, name)


@dataclass
class Outcome:
    """A finished run, beside the simulator's truth."""

    sim: object
    manifest: object  # the last one that the sinks got
    records: list
    summary: object

    def energy(self, record, gpu):
        return next((domain for domain in record.domains if domain.name == f"gpu{gpu}"), None)

    def truth_j(self, record, gpu):
        return self.sim.truth_j(gpu, record.start_ns, record.end_ns)

    def flags(self, gpu, records=None):
        told = {flag.partition(":") for record in records or self.records for flag in record.flags}
        return {kind for kind, _, name in told if name == f"gpu{gpu}"}

    def between(self, begin_s, end_s):
        return [
            record for record in self.records if self.sim.at(begin_s) <= record.start_ns and record.end_ns <= self.sim.at(end_s)
        ]


def trained(
    *faults: tuple[Fault, ...], waves=WAVES, steps_s=(STEP_S,) * STEPS, period_s=0.05, driver=None, **options
) -> Outcome:
    """A run (of 8 s) in which each GPU suffers its faults; ``driver`` are options of the driver, ``options`` those of every GPU."""
    gpus = [Gpu(wave, faults=own, period_s=period_s, **options) for wave, own in zip(waves, faults, strict=False)]
    with simulated(*gpus, **(driver or {})) as sim:
        meters, missing = open_meters(now_ns=sim.now_ns)
        assert not missing
        clock, sink = Lockstep(sim), MemorySink()
        tracker = green_torch.track(
            clock=clock, meters=meters, sinks=[sink], intensity=100, log_every_n_steps=1, poll_interval_s=0.02
        )
        with tracker:
            for step_s in steps_s:
                clock.advance(step_s)
                tracker.step(tokens=8)
        for meter in meters:
            meter.close()
        return Outcome(sim, sink.manifest, sink.records, sink.summary)


def assert_training_went_on(run: Outcome) -> None:
    """Every step is there, in order."""
    assert run.summary.status == "completed"
    assert [record.step for record in run.records if record.phase is Phase.TRAIN] == list(range(STEPS))


def assert_honest(run: Outcome, gpu: int) -> None:
    """The truth lies within the bounds wherever joules are given, and where none are the record says so."""
    for record in run.records:
        energy = run.energy(record, gpu)
        if energy is None:
            assert f"meter_failed:gpu{gpu}" in record.flags
        else:
            assert energy.energy_lo_j - 1e-3 <= run.truth_j(record, gpu) <= energy.energy_hi_j + 1e-3, record
            assert energy.energy_j >= 0


def assert_well(run: Outcome, gpu: int, records=None, allowed=frozenset()) -> None:
    """These records know their joules: nothing is missing or flagged, and the sum is the truth's."""
    records = run.records if records is None else records
    assert run.flags(gpu, records) <= allowed
    truth_j = sum(run.truth_j(record, gpu) for record in records)
    tolerance_j = 2 * 0.07 * 360  # a counter's period and a poll, at either end
    assert sum(run.energy(record, gpu).energy_j for record in records) == pytest.approx(truth_j, abs=tolerance_j)


def assert_told(run: Outcome, gpu: int, kinds) -> None:
    """The records of the fault are flagged, and the summary says what is missing."""
    told = run.flags(gpu) & set().union(*(FLAGS[kind] for kind in kinds))
    assert told
    assert all(f"{flag}:gpu{gpu}" in run.summary.flags for flag in told)
    if told != {"unresolved"}:
        assert any(f"gpu{gpu}" in text for name, text in run.summary.lines() if name in {"not metered", "warning"})


def misled_records(run: Outcome) -> list:
    """Records of the first GPU whose joules are far from the truth."""
    return [record for record in run.records if abs(run.energy(record, 0).energy_j - run.truth_j(record, 0)) > 10]


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("kind", FLAGS)
def test_one_fault(kind, others):
    """Any fault, with one GPU and with two: flagged while it lasts, right before and after it, and the other GPU none the wiser."""
    run = trained((fault(kind),), *[()] * others)
    assert_training_went_on(run)
    assert_honest(run, 0)
    assert_told(run, 0, [kind])
    assert_well(run, 0, run.between(0.0, BEGIN_S - 0.1), allowed={"unresolved"})
    assert_well(run, 0, run.between(END_S + RECOVERED_S, 9.0))
    if others:
        assert_well(run, 1, allowed={"late", "unresolved"} if kind == "slow" else set())


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("pair", list(itertools.permutations(FLAGS, 2)), ids="+".join)
def test_two_faults_on_one_gpu(pair, others):
    """Any two faults that overlap on one GPU."""
    run = trained(two_faults(*pair), *[()] * others)
    assert_training_went_on(run)
    assert_honest(run, 0)
    assert_told(run, 0, pair)
    assert_well(run, 0, run.between(5.5 + RECOVERED_S, 9.0))
    if others:
        assert_well(run, 1, allowed={"late", "unresolved"} if "slow" in pair else set())


@pytest.mark.parametrize("pair", list(itertools.combinations_with_replacement(FLAGS, 2)), ids="+".join)
def test_a_fault_on_each_gpu(pair):
    """Two GPUs with a fault each at the same time: each tells its own."""
    run = trained(*[(fault(kind),) for kind in pair])
    assert_training_went_on(run)
    for gpu, kind in enumerate(pair):
        assert_honest(run, gpu)
        assert_told(run, gpu, [kind])
        assert_well(run, gpu, run.between(END_S + RECOVERED_S, 9.0))


@pytest.mark.parametrize("others", [0, 1])
def test_no_counter_from_the_start(others):
    """A GPU whose driver has no energy counter is integrated from its power, says so, and keeps no bounds."""
    run = trained(*[()] * (1 + others), energy_supported=False)
    for gpu in range(1 + others):
        assert run.summary.manifest.domains[gpu].method is Method.SAMPLED
        truth_j = sum(run.truth_j(record, gpu) for record in run.records)
        energies = [run.energy(record, gpu) for record in run.records]
        assert sum(energy.energy_j for energy in energies) == pytest.approx(truth_j, rel=0.05)  # 50 ms samples of a 230 ms wave
        assert {energy.energy_lo_j for energy in energies} == {None}


def test_a_fault_that_lasts_to_the_end():
    """A GPU that never comes back is missing from the summary by name, with the reason and the line to type."""
    run = trained((fault("lost", BEGIN_S, 1e6),), ())
    assert_training_went_on(run)
    assert_honest(run, 0)
    assert_well(run, 1)
    text = str(run.summary)
    assert "GPU is lost" in text
    assert "sudo dmesg" in text
    assert run.energy(run.records[-1], 0) is None
    assert run.summary.totals.energy_j < sum(run.truth_j(record, gpu) for record in run.records for gpu in (0, 1))


def test_a_short_gap_costs_no_joule():
    """A fault shorter than a record's patience is bridged: the run's total is the counter's own."""
    run = trained((fault("lost", 2.0, 2.3),))
    assert "meter_failed" not in run.flags(0)
    assert_honest(run, 0)
    truth_j = sum(run.truth_j(record, 0) for record in run.records)
    assert run.summary.totals.energy_j == pytest.approx(truth_j, rel=0.01)


def test_a_gap_is_spread_evenly():
    """After a gap in the readings its joules are spread over the whole of it, not heaped up in its first half."""
    timeline = DomainTimeline(Domain("gpu0", Method.COUNTER, "x", "y", power_limit_w=400.0))
    for ms in [*range(0, 1000, 10), *range(2500, 3000, 10)]:
        timeline.observe(ms * MS, ms * MS, 300.0 * (ms // 20 * 20) / 1e3)
    levels = [timeline.level(Instant.exact(ms * MS)).energy_j for ms in (1000, 1750, 2500)]
    assert [after - before for before, after in itertools.pairwise(levels)] == pytest.approx([225.0, 225.0], rel=0.03)


def test_power_that_falls_while_the_counter_stands_still():
    """Records whose joules an extrapolation at the old power has taken before are flagged, too, and their bounds hold the truth."""
    falling = Wave(((0.0, 300.0), (2.0, 300.0), (2.0, 50.0), (8.0, 50.0)), repeat=False)
    run = trained(
        (Fault("stuck", 2.0, 4.65),), waves=[falling], steps_s=[0.1, *[0.5] * 15]
    )  # given up at 2.6 s: 180 J too many
    assert_honest(run, 0)
    misled = misled_records(run)
    assert sum(run.energy(record, 0).energy_j < 1.0 for record in misled) >= 4
    assert all("late:gpu0" in record.flags for record in misled)
    assert_well(run, 0, run.between(0.0, 2.0))
    assert_well(run, 0, run.between(6.1, 9.0))
    assert run.summary.totals.energy_j == pytest.approx(sum(run.truth_j(record, 0) for record in run.records), rel=0.02)


def test_power_that_rises_while_the_counter_stands_still():
    """The record after an extrapolation that was too low gets what that had left out, and is flagged."""
    rising = Wave(((0.0, 50.0), (2.0, 50.0), (2.0, 300.0), (8.0, 300.0)), repeat=False)
    run = trained((Fault("stuck", 2.0, 4.65),), waves=[rising], steps_s=[0.1, *[0.5] * 15])
    assert_honest(run, 0)
    misled = misled_records(run)
    assert misled
    assert all("late:gpu0" in record.flags for record in misled)
    assert_well(run, 0, run.between(3.1, 9.0), allowed={"unresolved"})


def test_a_power_cap_that_is_raised():
    """A run opened under a low power cap that somebody raises: nothing is taken for a leap, and the bounds hold."""
    rising = Wave(((0.0, 250.0), (3.0, 250.0), (3.0, 680.0), (8.0, 680.0)), repeat=False)
    run = trained((Fault("cap", 0.0, 3.0, 300.0),), waves=[rising], period_s=0.1, power_limit_w=700)
    assert_training_went_on(run)
    assert_honest(run, 0)
    assert_well(run, 0, allowed={"unresolved"})


def test_another_job_that_comes_later():
    """A process that comes to one GPU in the middle of a run: records from then on are flagged, the manifest says so, its twin's do not."""
    run = trained((Fault("joined", 20.0, arg=4_000_001.0),), (), steps_s=[1.0] * 60)
    assert run.flags(0, run.between(0.0, 20.0)) == set()
    assert all("shared:gpu0" in record.flags for record in run.between(50.0, 60.0))
    assert run.flags(1) == set()
    assert [domain.shared for domain in run.summary.manifest.domains] == [True, False]
    assert [domain.shared for domain in run.manifest.domains] == [True, False]


def test_the_driver_is_reloaded():
    """The driver goes away in the middle of a run and comes back with its counters at zero: flagged, then both GPUs are right again."""
    run = trained((), (), driver={"reloads": [(BEGIN_S, END_S)]})
    assert_training_went_on(run)
    for gpu in (0, 1):
        assert_honest(run, gpu)
        assert_told(run, gpu, ["lost"])
        assert_told(run, gpu, ["reset"])
        assert_well(run, gpu, run.between(0.0, BEGIN_S - 0.1))
        assert_well(run, gpu, run.between(END_S + RECOVERED_S, 9.0))


# ---- through the child process, in real time


def test_faults_that_the_child_meets(tmp_path, monkeypatch):
    """Any fault through the child process, one on each GPU: flagged, bounded, right before and after it, and the GPU beside them is well."""
    kinds = [kind for kind in FLAGS if kind != "slow"]  # tests/test_sampler_child.py has a driver that hangs there
    gpus = [Gpu(WAVES[0], period_s=0.05, faults=(fault(kind),)) for kind in kinds]
    monkeypatch.delenv(SWITCH, raising=False)
    with simulated(*gpus, Gpu(WAVES[1], period_s=0.05), virtual=False) as sim:
        for name, value in sim.child_env(tmp_path).items():
            monkeypatch.setenv(name, value)
        meters, missing = open_meters()
        assert not missing
        meters, sink, apart = in_child(meters, 0.01), MemorySink(), False
        with green_torch.track(meters=meters, sinks=[sink], intensity=100, log_every_n_steps=1) as tracker:
            while time.monotonic_ns() < sim.at(END_S + RECOVERED_S + 0.6):
                time.sleep(0.05)
                tracker.step()
                apart = apart or (time.monotonic_ns() < sim.at(BEGIN_S) and all(meter.apart for meter in meters))
        for meter in meters:
            meter.close()
        assert apart
        run = Outcome(sim, sink.manifest, sink.records, sink.summary)
        for gpu, kind in enumerate(kinds):
            assert_honest(run, gpu)
            assert_told(run, gpu, [kind])
            assert_well(run, gpu, run.between(0.3, BEGIN_S - 0.1), allowed={"unresolved"})
            assert_well(run, gpu, run.between(END_S + RECOVERED_S, 9.0), allowed={"unresolved"})
        assert_honest(run, len(kinds))
        assert_well(run, len(kinds), allowed={"unresolved"})


# ---- slow and hung calls


def test_a_slow_call_never_delays_a_step():
    """While a reading is stuck in the driver, steps and phases go by."""
    hold, inside, release, waited_in_vain = (threading.Event() for _ in range(4))
    training = threading.current_thread()

    def now_ns() -> int:
        if hold.is_set() and threading.current_thread() is not training:
            inside.set()
            if not release.wait(10):
                waited_in_vain.set()
        return time.monotonic_ns()

    with simulated(Gpu(period_s=0.02), Gpu(period_s=0.02), virtual=False):
        meters, _ = open_meters(now_ns=now_ns)
        with green_torch.track(meters=meters, intensity=100, log_every_n_steps=1) as tracker:
            hold.set()
            assert inside.wait(10)
            for _ in range(200):
                tracker.step()
            with tracker.phase("eval"):
                tracker.step()
            release.set()
        for meter in meters:
            meter.close()
    assert not waited_in_vain.is_set()
    assert tracker.summary().totals.phase("train").n_steps == 200


class _Hanging:
    """A meter whose second reading does not return before it is let go."""

    domains = (Domain("gpu0", Method.COUNTER, "x", "y", power_limit_w=400.0),)
    interval_s = None

    def __init__(self) -> None:
        self.inside, self.release = threading.Event(), threading.Event()
        self.readings = 0

    def read(self) -> Reading:
        self.readings += 1
        if self.readings == 2:
            self.inside.set()
            self.release.wait(10)
        return Reading(0, 0, {"gpu0": 1.0})

    def close(self) -> None:
        pass


class _Once(ScriptedClock):
    """Ticks once: here at first, later on a thread that nobody waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.ticked = threading.Event()

    def every(self, interval_s, tick, name):
        if self._made:
            threading.Thread(target=lambda: (tick(), self.ticked.set()), daemon=True).start()
        else:
            tick()
        self._made += 1
        return lambda: None


def test_a_call_that_hangs_is_a_failure_until_it_returns():
    """After two seconds without an answer the domain counts as failing, with the reason; once it answers, no longer."""
    meter, clock = _Hanging(), _Once()
    sampler = Sampler(clock, [meter], 0.01)
    sampler.start()
    sampler.read_now()
    assert meter.inside.wait(10)
    clock.advance(1.9)
    assert not sampler.failing()
    clock.advance(0.2)
    assert "not answered" in sampler.failing()["gpu0"]
    meter.release.set()
    assert clock.ticked.wait(10)
    assert not sampler.failing()


# ---- the timeline under many faults


@st.composite
def troubled(draw):
    """Power of each 10 ms, by how many joules the counter goes back at some readings, and boundaries."""
    power_w = draw(st.lists(st.floats(0, 600), min_size=60, max_size=120))
    losses_j = draw(st.dictionaries(st.integers(5, len(power_w) - 1), st.sampled_from([50.0, 1000.0]), max_size=8))
    marks = draw(st.lists(st.integers(0, len(power_w) * 10), min_size=2, max_size=12, unique=True))
    return power_w, losses_j, sorted(marks)


@settings(max_examples=60, deadline=None)
@given(troubled())
def test_bounds_hold_across_any_number_of_resets(scene):
    """However often a counter goes back, the truth of every interval lies within its bounds."""
    power_w, losses_j, marks = scene
    sums = [0.0, *itertools.accumulate(power * 0.01 for power in power_w)]
    timeline = DomainTimeline(Domain("gpu0", Method.COUNTER, "x", "y", power_limit_w=400.0))
    lost_j, resets = -10_000.0, 0
    for k, joules in enumerate(sums):
        lost_j += losses_j.get(k, 0.0)
        resets += timeline.observe(k * 10 * MS, k * 10 * MS, joules - lost_j) is Flag.COUNTER_RESET
    assert resets == len(losses_j)

    def truth_j(ms: int) -> float:
        k, rest = divmod(ms, 10)
        return sums[k] + (power_w[k] * rest / 1000 if rest else 0.0)

    levels = {mark: timeline.level(Instant.exact(mark * MS)) for mark in marks}
    for a, b in itertools.combinations(marks, 2):
        amount = timeline.amount(levels[a], levels[b], (b - a) / 1e3)
        assert amount.lo_j - 1e-6 <= truth_j(b) - truth_j(a) <= amount.hi_j + 1e-6
        assert amount.lo_j <= amount.energy_j <= amount.hi_j


def test_a_reset_does_not_keep_old_knots_forever():
    """After resets, as before, knots that no record needs are dropped."""
    timeline = DomainTimeline(Domain("gpu0", Method.COUNTER, "x", "y", power_limit_w=400.0))
    for k in range(20_000):
        timeline.observe(k * 10 * MS, k * 10 * MS, 3.0 * (k % 7_000))
        timeline.forget(k * 10 * MS)
    assert timeline.knots < 300
    assert timeline.level(Instant.exact(199_000 * MS)).epoch == 2


def test_a_leap_is_flagged_and_believed():
    """More joules at once than the power can bring are no ordinary step; the counter's total still stands."""
    timeline = DomainTimeline(Domain("gpu0", Method.COUNTER, "x", "y", power_limit_w=400.0))
    flags = [timeline.observe(k * 10 * MS, k * 10 * MS, 3.0 * k + 500.0 * (k >= 50)) for k in range(100)]
    assert flags.count(Flag.COUNTER_RESET) == 1
    levels = [timeline.level(Instant.exact(ms * MS)) for ms in (200, 800)]
    across = timeline.amount(*levels, 0.6)
    assert across.vacuous
    assert across.energy_j == pytest.approx(680.0, rel=0.01)
