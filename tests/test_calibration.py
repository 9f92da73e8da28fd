"""The calibration of an energy counter, on a simulated driver in virtual time; and what is kept of it."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import green_torch
from green_torch import calibration
from green_torch.calibration import (
    TOLERANCE,
    calibrate,
    calibrate_gpus,
    cuda_burst,
    load,
    near_commensurate,
    part_time_periods,
    save,
)
from green_torch.errors import MeterError
from green_torch.meters.nvml import NvmlMeter
from green_torch.records import Flag, Method
from green_torch.testing import MemorySink, ScriptedClock, ScriptedMeter
from green_torch.units import NS_PER_S
from tests.simnvml import Fault, Gpu, Wave, constant, simulated, square

IDLE_W, BUSY_W = 70.0, 350.0
RATIOS = sorted({p / q for p in (1, 2, 3) for q in (1, 2, 3)})


class Bench:
    """A GPU whose power is high while it is kept busy: the waveform is known in advance, since a first pass says when that will be."""

    def __init__(self, **options) -> None:
        self.options = options
        self.sim = None
        self.busy: list[tuple[int, int]] = []

    def sleep(self, duration_s: float) -> None:
        self.sim.lib.sim_set_time_ns(self.sim.now_ns() + round(duration_s * NS_PER_S))

    def burst(self, duration_s: float) -> None:
        begin_ns = self.sim.now_ns()
        self.sleep(duration_s)
        self.busy.append((begin_ns, self.sim.now_ns()))

    def run(self, wave: Wave, *, bursts: bool, duration_s: float) -> calibration.Calibration:
        self.busy = []
        with simulated(Gpu(wave, **self.options)) as sim:
            self.sim = sim
            sim.go_to(0.5)
            burst = self.burst if bursts else None
            with closing(NvmlMeter(sim.gpus[0].uuid, now_ns=sim.now_ns)) as meter:
                return calibrate(meter, now_ns=sim.now_ns, sleep=self.sleep, burst=burst, duration_s=duration_s)

    def calibrated(self, *, bursts: bool = True, duration_s: float = 5.0) -> calibration.Calibration:
        if not bursts:
            return self.run(constant(IDLE_W), bursts=False, duration_s=duration_s)
        self.run(constant(IDLE_W), bursts=True, duration_s=duration_s)
        planned = self.busy
        points = [(0.0, IDLE_W)]
        for begin_s, end_s in (((ns - self.sim.epoch_ns) / NS_PER_S for ns in interval) for interval in planned):
            points += [(begin_s, points[-1][1]), (begin_s, BUSY_W), (end_s, BUSY_W), (end_s, IDLE_W)]
        found = self.run(Wave(tuple(points), repeat=False), bursts=True, duration_s=duration_s)
        assert self.busy == planned  # the counter's values don't change what is done when
        return found


@pytest.mark.parametrize("period_s", [0.02, 0.1])
@pytest.mark.parametrize("jitter", [0.0, 0.1])
def test_a_full_time_counter(period_s, jitter):
    """The update period is found with its spread, the counter agrees with integrated power, and it does not beat."""
    found = Bench(period_s=period_s, jitter_s=jitter * period_s, phase_s=0.003).calibrated()
    assert found.period_median_s == pytest.approx(period_s, rel=0.06)
    assert found.period_p5_s <= found.period_median_s <= found.period_p95_s
    assert (found.period_p95_s - found.period_p5_s) / period_s == pytest.approx(1.4 * jitter, abs=0.11)
    assert found.agreement == pytest.approx(1.0, abs=max(0.01, 4 * found.agreement_error))
    assert found.agreement_error < 0.02
    assert found.part_time is False
    assert found.beat < 0.2
    assert found.reasons == ()


@pytest.mark.parametrize("period_s", [0.02, 0.1])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_part_time_counter_beats(period_s, share):
    """A counter that looks a tenth, a quarter or half of the time is found out, and its beat is that of its window."""
    found = Bench(period_s=period_s, window_s=share * period_s, phase_s=0.004).calibrated()
    assert found.part_time is True
    assert found.beat == pytest.approx({0.1: 0.98, 0.25: 0.90, 0.5: 0.64}[share], abs=0.12)  # sin(pi w) / (pi w)


def test_a_counter_that_loses_joules_disagrees():
    """10 of 210 J missing from a counter show as a ratio of 0.952."""
    found = Bench(period_s=0.1, faults=(Fault("backwards", 4.0, arg=10.0),)).calibrated(bursts=False)
    assert found.agreement == pytest.approx(1 - 10 / 210, abs=0.005)


def test_the_cost_of_a_reading_is_measured():
    """A reading's cost is told, and its power agrees with the counter."""
    found = Bench(period_s=0.1, cost_s=20e-6).calibrated(bursts=False)
    assert found.read_median_us == pytest.approx(20.0)
    assert found.read_p99_us == pytest.approx(20.0)
    assert found.agreement == pytest.approx(1.0, abs=0.01)
    assert dict(found.lines())["a reading takes"] == "20.0 µs (99 % within 20.0 µs)"


def test_without_bursts_part_time_is_unknown():
    """Where nothing can keep the device busy the rest is measured, and the reason is given."""
    found = Bench(period_s=0.1).calibrated(bursts=False)
    assert found.period_median_s == pytest.approx(0.1, rel=0.02)
    assert found.part_time is None
    assert found.beat is None
    assert "torch with CUDA" in found.reasons[0]


def test_a_burst_that_does_nothing_is_found_out():
    """Where the bursts don't raise the power (other work runs there) nothing is concluded."""
    bench = Bench(period_s=0.1)
    found = bench.run(constant(IDLE_W), bursts=True, duration_s=5.0)
    assert found.part_time is None
    assert "did not raise" in found.reasons[0]


def test_a_short_calibration_concludes_nothing():
    """Too few updates give no verdict, and say so."""
    found = Bench(period_s=0.1).calibrated(duration_s=1.0)
    assert found.part_time is None
    assert found.reasons


def test_a_counter_that_changes_with_every_reading_has_no_period():
    """A counter that is always current has an update period below what can be seen."""
    found = Bench(period_s=0.0).calibrated(bursts=False, duration_s=1.0)
    assert found.period_median_s is None
    assert "changed" in found.reasons[0]


def test_no_counter():
    """Where power is integrated there is no counter to calibrate; the cost of a reading is still known."""
    found = Bench(energy_supported=False, cost_s=10e-6).calibrated(bursts=False, duration_s=0.5)
    assert found.period_median_s is None
    assert found.part_time is None
    assert found.read_median_us == pytest.approx(10.0)
    assert "no energy counter" in found.reasons[0]


def test_no_power_to_compare_with():
    """A GPU that tells its energy and not its power has no agreement, and the reason is the driver's."""
    found = Bench(instant_supported=False, power_supported=False).calibrated(bursts=False, duration_s=2.0)
    assert found.period_median_s == pytest.approx(0.1, rel=0.02)
    assert found.agreement is None
    assert "Not Supported" in found.reasons[-1]


def test_power_is_instant_where_the_gpu_tells_it():
    """``power_w`` is the instant sensor's, else the averaged one's."""
    for options, expected_w in (({}, 300.0), ({"instant_supported": False}, 200.0)):
        with simulated(Gpu(square(100, 300, period_s=1.0), **options)) as sim:
            sim.go_to(2.25)
            with closing(NvmlMeter(sim.gpus[0].uuid, now_ns=sim.now_ns)) as meter:
                assert meter.power_w() == pytest.approx(expected_w)


def test_a_gpu_that_is_lost_raises():
    """A device that can't be read at all is an error of the meter."""
    with pytest.raises(MeterError, match="GPU is lost"):
        Bench(faults=(Fault("lost", 1.0),)).calibrated(bursts=False)


def test_other_processes_are_told():
    """Work of others on the device stands in the result."""
    assert Bench(pids=(4_000_001, 4_000_002)).calibrated(bursts=False, duration_s=0.5).shared
    assert "shared" in dict(Bench(pids=(4_000_001, 4_000_002)).calibrated(bursts=False, duration_s=0.5).lines())["device"]


def test_no_gpu_is_a_reason_and_no_error():
    """On a machine whose driver shows no GPU nothing is calibrated, and no burst can be had for an unknown one."""
    with simulated():
        found, missing = calibrate_gpus(0.1)
    assert not found
    assert "no GPU" in missing[0]
    assert cuda_burst("GPU-0") is None


# ---- near-commensurate steps


@given(st.sampled_from(RATIOS), st.floats(1e-3, 10.0), st.floats(-0.95 * TOLERANCE, 0.95 * TOLERANCE))
def test_small_ratios_are_flagged(ratio, step_s, off):
    """Within 3 % of p/q with p, q up to 3, whatever the scale."""
    assert near_commensurate(step_s, step_s * ratio * (1 + off))


@given(st.floats(0.02, 20.0), st.floats(1e-3, 10.0))
def test_other_ratios_are_not(ratio, step_s):
    """Farther from all of them, and only the ratio counts."""
    near = any(abs(ratio / own - 1) <= TOLERANCE for own in RATIOS)
    edge = any(abs(abs(ratio / own - 1) - TOLERANCE) < 1e-6 for own in RATIOS)
    assert edge or near_commensurate(step_s, step_s * ratio) == near


@pytest.mark.parametrize(("step_s", "period_s"), [(0.0, 0.1), (0.1, 0.0), (float("nan"), 0.1), (-0.1, 0.1)])
def test_nonsense_is_not_commensurate(step_s, period_s):
    """Steps that take no time are near nothing."""
    assert not near_commensurate(step_s, period_s)


@pytest.mark.parametrize(("step_s", "flagged"), [(0.1, True), (0.0502, True), (0.0618, False), (0.161, False)])
def test_what_is_flagged_is_wrong_and_the_rest_is_not(step_s, flagged):
    """On a counter that looks at 25 of 100 ms the mean over 3 s is off where it is flagged, for some phase, and right elsewhere."""
    errors = []
    for phase in range(5):
        gpu = Gpu(square(70, 350, period_s=step_s), period_s=0.1, window_s=0.025, phase_s=0.1 + phase * step_s / 5)
        with simulated(gpu) as sim:
            counted = []
            with closing(NvmlMeter(sim.gpus[0].uuid, now_ns=sim.now_ns)) as meter:
                for at_s in (1.0, 4.0):
                    sim.go_to(at_s)
                    counted.append((sim.last_update_ns(0, sim.now_ns()), meter.read().energy_j["gpu0"]))
            (a_ns, a_j), (b_ns, b_j) = counted
            errors.append(abs((b_j - a_j) / sim.truth_j(0, a_ns, b_ns) - 1))
    assert near_commensurate(step_s, 0.1) is flagged
    assert (max(errors) > 0.15) is flagged
    assert flagged or max(errors) < 0.04


# ---- what is kept


@pytest.mark.parametrize(("step_s", "flagged"), [(0.1, True), (0.17, False)])
def test_records_near_a_part_time_counters_period_are_flagged(step_s, flagged):
    """Where a GPU's counter is known to be part-time, train records of near-commensurate steps say so, and the summary once."""
    clock, sink = ScriptedClock(), MemorySink()
    meter = ScriptedMeter(clock, {"gpu0": 300.0, "gpu1": 300.0}, period_s=0.1)
    tracker = green_torch.track(clock=clock, meters=[meter], sinks=[sink], intensity=100, log_every_n_steps=2)
    tracker._recorder._part_time_s["gpu0"] = 0.1
    with tracker:
        for _ in range(20):
            clock.advance(step_s)
            tracker.step()
    names = {flag for record in sink.records if record.flagged(Flag.PART_TIME) for flag in record.flags}
    assert ("part_time:gpu0" in names) is flagged
    assert "part_time:gpu1" not in names
    assert any("sees only part" in warning for warning in sink.summary.warnings) is flagged


@pytest.fixture(scope="module")
def found():
    return Bench(period_s=0.1, window_s=0.025).calibrated()


def test_a_calibration_is_kept_by_device_and_driver(found, tmp_path):
    """What was saved is loaded, equal, for its own device model and driver, and beside others."""
    other = replace(found, driver="1.2.3", part_time=False)
    save(found, cache_dir=tmp_path)
    save(other, cache_dir=tmp_path)
    assert load(found.device, found.driver, cache_dir=tmp_path) == found
    assert load(found.device, "1.2.3", cache_dir=tmp_path) == other
    assert load(found.device, "9.9", cache_dir=tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", '{"NVIDIA X | 1": 3}', '{"NVIDIA X | 1": {"device": 1}}', '{"NVIDIA X | 1": {"part_time": "yes"}}'],
)
def test_a_corrupt_cache_is_done_without(content, tmp_path, found):
    """Whatever stands in the file, loading finds nothing, and saving mends it."""
    (tmp_path / "calibration.json").write_text(content, encoding="utf-8")
    assert load("NVIDIA X", "1", cache_dir=tmp_path) is None
    save(found, cache_dir=tmp_path)
    assert load(found.device, found.driver, cache_dir=tmp_path) == found


def test_a_damaged_entry_is_not_loaded(tmp_path, found):
    """A period that is no positive number makes an entry worthless."""
    save(found, cache_dir=tmp_path)
    path = tmp_path / "calibration.json"
    content = json.loads(path.read_text())
    for entry in content.values():
        entry["period_median_s"] = -1.0
    path.write_text(json.dumps(content))
    assert load(found.device, found.driver, cache_dir=tmp_path) is None


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, found):
    """A file where the directory should be does no harm."""
    (tmp_path / "file").touch()
    save(found, cache_dir=tmp_path / "file")
    assert load(found.device, found.driver, cache_dir=tmp_path / "file") is None


def test_the_cache_is_the_users(tmp_path, monkeypatch, found):
    """Without a directory of one's own it is $XDG_CACHE_HOME/green_torch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save(found)
    assert (tmp_path / "green_torch" / "calibration.json").exists()
    assert load(found.device, found.driver) == found


def test_part_time_periods_are_those_of_the_domains_at_hand(tmp_path, found):
    """Only counters that a calibration of this model and driver found to be part-time have one."""
    with simulated(Gpu(), Gpu(name="NVIDIA L4"), Gpu(energy_supported=False)) as sim:
        meters = [NvmlMeter(gpu.uuid, name=f"gpu{i}", now_ns=sim.now_ns) for i, gpu in enumerate(sim.gpus)]
        domains = [meter.domains[0] for meter in meters]
        for meter in meters:
            meter.close()
    assert domains[2].method is Method.SAMPLED
    assert part_time_periods(domains, cache_dir=tmp_path) == {}
    save(found, cache_dir=tmp_path)
    assert part_time_periods(domains, cache_dir=tmp_path) == {"gpu0": found.period_median_s}
