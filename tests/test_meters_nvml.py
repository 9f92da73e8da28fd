"""green_torch.meters.nvml, driven through the real pynvml against a simulated driver in virtual time."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pynvml
import pytest
import torch

from green_torch.errors import MeterError
from green_torch.meters import nvml
from green_torch.meters.gpm import MemoryTraffic
from green_torch.meters.nvml import NvmlMeter, open_meters
from green_torch.records import Method
from green_torch.units import NS_PER_S
from tests.simnvml import Fault, Gpu, Wave, constant, from_file, simulated, square, training, uuid_of

MIG = "MIG-5ee0ab11-0000-4000-8000-000000000000"
OTHER_PID = 4_000_001


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No CUDA variable of the machine reaches a test."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)


def opened(sim, **options):
    meters, reasons = open_meters(now_ns=sim.now_ns, **options)
    return meters, reasons


def seen(sim, **options):
    """What was opened, as {name: place of the GPU in NVML's order}, and the reasons."""
    places = {gpu.uuid: index for index, gpu in enumerate(sim.gpus)}
    meters, reasons = opened(sim, **options)
    names = {meter.domains[0].name: places[meter.uuid] for meter in meters}
    for meter in meters:
        meter.close()
    return names, reasons


def joules(meter):
    return meter.read().energy_j[meter.domains[0].name]


# ---- the simulator itself ----


def test_truth_is_exact():
    """The simulator's truth is the integral of each waveform."""
    with simulated(Gpu(constant(250)), Gpu(square(100, 300, period_s=0.2, duty=0.25))) as sim:
        assert sim.truth_j(0, sim.at(1), sim.at(3.5)) == pytest.approx(625, abs=1e-9)
        assert sim.truth_j(1, sim.at(0), sim.at(10)) == pytest.approx(1500, abs=1e-6)
        assert sim.truth_j(1, sim.at(0.2), sim.at(0.25)) == pytest.approx(15, abs=1e-9)
        assert sim.truth_j(1, sim.at(0.25), sim.at(0.4)) == pytest.approx(15, abs=1e-9)


def test_wave_from_a_file(tmp_path):
    """A recorded waveform is integrated by straight lines and holds its last value."""
    (tmp_path / "wave.csv").write_text("# s, W\n0,100\n2,300\n", encoding="utf-8")
    with simulated(Gpu(from_file(tmp_path / "wave.csv"))) as sim:
        assert sim.truth_j(0, sim.at(0), sim.at(2)) == pytest.approx(400)
        assert sim.truth_j(0, sim.at(2), sim.at(4)) == pytest.approx(600)


def test_training_wave_repeats_whole_steps():
    """The training-like wave lasts a whole number of steps, stays positive and repeats."""
    wave = training(0.053, length_s=5)
    assert wave.points[-1][0] / 0.053 == pytest.approx(round(5 / 0.053))
    assert min(power_w for _, power_w in wave.points) > 0
    with simulated(Gpu(wave)) as sim:
        length_s = wave.points[-1][0]
        once = sim.truth_j(0, sim.at(0), sim.at(length_s))
        assert sim.truth_j(0, sim.at(length_s), sim.at(2 * length_s)) == pytest.approx(once, rel=1e-6)


def test_updates_follow_period_phase_and_jitter():
    """The counter changes once a period, never before its instant and at most the jitter late."""
    with simulated(Gpu(period_s=0.02, phase_s=0.007, jitter_s=0.004)) as sim, _meter(sim) as meter:
        changes, before = [], None
        for at_ms in range(1, 2000):
            sim.go_to(at_ms / 1000)
            now_j = joules(meter)
            if before is not None and now_j != before:
                changes.append(at_ms / 1000)
            before = now_j
        late = [(at_s - 0.007) % 0.02 for at_s in changes]
        assert len(changes) == pytest.approx(2 / 0.02, abs=1)
        assert all(own_s <= 0.005 + 1e-9 or own_s > 0.02 - 1e-9 for own_s in late)
        assert max(late) - min(late) > 0.002


def test_part_time_counter_errs_where_steps_are_commensurate():
    """A counter that looks for 25 of 100 ms mistakes a square wave of its own period, and gets one of another period right."""
    blind = {"window_s": 0.025, "period_s": 0.1}
    with simulated(Gpu(square(100, 300, period_s=0.1), **blind), Gpu(square(100, 300, period_s=0.0731), **blind)) as sim:
        meters, _ = opened(sim)
        start = [joules(meter) for meter in meters]
        sim.go_to(60)
        ratios = [(joules(meter) - start[i]) / sim.truth_j(i, sim.at(0), sim.at(60)) for i, meter in enumerate(meters)]
        for meter in meters:
            meter.close()
    assert ratios[0] == pytest.approx(0.5, abs=0.02)
    assert ratios[1] == pytest.approx(1.0, abs=0.02)


def test_child_process_reads_the_same_driver(tmp_path):
    """A child that loads the driver by itself sees the same counter as its parent."""
    with simulated(Gpu(constant(1000), period_s=0.02), virtual=False) as sim, _meter(sim) as meter:
        script = (
            "import pynvml as p; p.nvmlInit(); print(p.nvmlDeviceGetTotalEnergyConsumption(p.nvmlDeviceGetHandleByIndex(0)))"
        )
        before = joules(meter)
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, **sim.child_env(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert before <= int(done.stdout) / 1000 <= joules(meter)


# ---- reading the counter ----


def _meter(sim, gpu=0, **options):
    return closing(NvmlMeter(sim.gpus[gpu].uuid, name=f"gpu{gpu}", now_ns=sim.now_ns, **options))


def test_domain_says_what_it_is():
    """The domain carries name, device, method, limit, quantum, gain error and source."""
    with simulated(Gpu(power_limit_w=350)) as sim, _meter(sim) as meter:
        (domain,) = meter.domains
        assert (domain.name, domain.device, domain.method) == ("gpu0", "NVIDIA A100-SXM4-80GB", Method.COUNTER)
        assert (domain.power_limit_w, domain.quantum_j, domain.gain_error) == (350, 0.001, 0.05)
        assert domain.source == "NVML energy counter, driver 555.00.sim"
        assert not domain.shared
        assert meter.interval_s is None


def test_unknown_power_limit_is_none():
    """A GPU that does not tell its limit has none, not a guess."""
    with simulated(Gpu(power_limit_w=0)) as sim, _meter(sim) as meter:
        assert meter.domains[0].power_limit_w is None


@pytest.mark.parametrize(("told", "expected_w"), [(True, 700), (False, 300)])
def test_the_limit_is_the_boards_highest(told, expected_w):
    """The limit behind the bounds is the highest that the board allows, not a cap in force now; that one where no other is told."""
    cap = Fault("cap", 0.0, arg=300.0)
    with simulated(Gpu(power_limit_w=700, limits_told=told, faults=(cap,))) as sim, _meter(sim) as meter:
        assert meter.domains[0].power_limit_w == expected_w


@pytest.mark.parametrize("period_s", [0.02, 0.1])
def test_counter_equals_truth_up_to_its_last_update(period_s):
    """Joules between readings are the truth between the counter's updates, within one quantum at either end."""
    gpu = Gpu(training(0.053), period_s=period_s, phase_s=0.003, jitter_s=0.002)
    with simulated(gpu) as sim, _meter(sim) as meter:
        first = meter.read()
        rng = random.Random(0)
        for at_s in sorted(rng.uniform(0.2, 30) for _ in range(300)):
            sim.go_to(at_s)
            reading = meter.read()
            assert reading.begin_ns == reading.end_ns == sim.at(at_s)
            told = reading.energy_j["gpu0"] - first.energy_j["gpu0"]
            truth = sim.truth_j(0, sim.at(0), sim.last_update_ns(0, sim.at(at_s)))
            assert told == pytest.approx(truth, abs=0.0021)
            assert 0 <= sim.truth_j(0, sim.at(0), sim.at(at_s)) - told <= 400 * (period_s + 0.002)


def test_bracket_holds_the_instant_of_the_reading():
    """A call that costs 2 ms is bracketed by 2 ms, and the joules belong to an instant between."""
    with simulated(Gpu(constant(100), period_s=0, cost_s=0.002)) as sim, _meter(sim) as meter:
        sim.go_to(5)
        reading = meter.read()
        assert reading.end_ns - reading.begin_ns == 2_000_000
        told = reading.energy_j["gpu0"] - sim.gpus[0].base_j
        assert sim.truth_j(0, sim.at(0), reading.begin_ns) - 0.001 <= told <= sim.truth_j(0, sim.at(0), reading.end_ns)


def test_the_same_seconds_in_real_time():
    """Without virtual time the counter runs on CLOCK_MONOTONIC, so readings and truth share a clock."""
    with simulated(Gpu(constant(500), period_s=0), virtual=False) as sim:
        (meter,), _ = open_meters()
        first, last = meter.read(), meter.read()
        told = last.energy_j["gpu0"] - first.energy_j["gpu0"]
        least, most = sim.truth_j(0, first.end_ns, last.begin_ns), sim.truth_j(0, first.begin_ns, last.end_ns)
        meter.close()
    assert least - 0.002 <= told <= most + 0.002


# ---- power integrated ----


@pytest.mark.parametrize("instant", [True, False])
def test_constant_power_integrates_exactly(instant):
    """Where the counter is not supported, constant power is integrated to the joule, by the instant field or the usual one."""
    gpu = Gpu(constant(123.456), energy_supported=False, instant_supported=instant)
    with simulated(gpu) as sim, _meter(sim) as meter:
        (domain,) = meter.domains
        assert domain.method is Method.SAMPLED
        assert domain.source.startswith("NVML instant power" if instant else "NVML power")
        assert domain.power_limit_w is None
        assert meter.interval_s == pytest.approx(0.05)
        assert joules(meter) == 0
        for n in range(1, 401):
            sim.go_to(n * 0.05)
            last_j = joules(meter)
        assert last_j == pytest.approx(123.456 * 20, abs=0.02)


def test_square_wave_integrates_within_the_sampling_error():
    """A square wave of 1.37 s, sampled every 50 ms, is integrated to within half a sample at each edge, and to 1 % over a minute."""
    gpu = Gpu(square(60, 300, period_s=1.37), energy_supported=False, cost_s=0.0002)
    with simulated(gpu) as sim, _meter(sim) as meter:
        start = meter.read()
        for n in range(1, 1201):
            sim.go_to(n * 0.05)
            last = meter.read()
        edges = 2 * 60 / 1.37
        error_j = last.energy_j["gpu0"] - sim.truth_j(0, start.end_ns, last.begin_ns)
        assert abs(error_j) <= edges * 240 * 0.025
        assert abs(error_j) <= 0.01 * sim.truth_j(0, start.end_ns, last.begin_ns)


def test_a_ramp_integrates_by_trapezoids():
    """Power that rises on a straight line is integrated without a bias, and a slow reading counts for the middle of its call."""
    ramp = Wave(((0.0, 0.0), (10.0, 1000.0)), repeat=False)
    with simulated(Gpu(ramp, energy_supported=False, faults=(Fault("slow", 7.9, arg=1.0),))) as sim, _meter(sim) as meter:
        joules(meter)
        for n in range(1, 9):
            sim.go_to(n)
            last = meter.read()
        middle_ns = (last.begin_ns + last.end_ns) // 2
        assert middle_ns == sim.at(8.5)
        assert last.energy_j["gpu0"] == pytest.approx(sim.truth_j(0, sim.at(0), middle_ns), abs=0.01)


def test_a_failed_reading_is_bridged_when_power_is_integrated():
    """Power readings that fail for a while leave the integral going on a straight line."""
    gpu = Gpu(constant(100), energy_supported=False, faults=(Fault("error", 1.0, 2.0, pynvml.NVML_ERROR_TIMEOUT),))
    with simulated(gpu) as sim, _meter(sim) as meter:
        joules(meter)
        sim.go_to(1.5)
        with pytest.raises(MeterError, match="Timeout"):
            meter.read()
        sim.go_to(3)
        assert joules(meter) == pytest.approx(300, abs=0.01)


def test_neither_energy_nor_power():
    """A GPU that tells nothing gets no meter, and a reason."""
    with simulated(Gpu(energy_supported=False, instant_supported=False, power_supported=False)) as sim:
        meters, reasons = opened(sim)
        assert meters == []
        assert len(reasons) == 1
        assert "Not Supported" in reasons[0]
        assert sim.references == 0


# ---- faults ----


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault("lost", 1, 2), "GPU is lost"),
        (Fault("not_supported", 1, 2), "Not Supported"),
        (Fault("error", 1, 2, pynvml.NVML_ERROR_UNKNOWN), "Unknown Error"),
        (Fault("error", 1, 2, pynvml.NVML_ERROR_NO_PERMISSION), "Insufficient Permissions"),
        (Fault("error", 1, 2, pynvml.NVML_ERROR_UNINITIALIZED), "Uninitialized"),
        (Fault("error", 1, 2, pynvml.NVML_ERROR_INVALID_ARGUMENT), "Invalid Argument"),
    ],
)
def test_a_passing_fault_raises_and_recovers(fault, text):
    """While a fault lasts a reading raises MeterError with the driver's words; the next one after it is right again."""
    with simulated(Gpu(constant(100), period_s=0, faults=(fault,))) as sim, _meter(sim) as meter:
        start_j = joules(meter)
        for at_s in (1.0, 1.01, 1.99):
            sim.go_to(at_s)
            with pytest.raises(MeterError, match=text) as caught:
                meter.read()
            assert "gpu0 (NVIDIA A100-SXM4-80GB)" in str(caught.value)
        sim.go_to(2.0)
        assert joules(meter) - start_j == pytest.approx(200, abs=0.002)


def test_two_gpus_one_lost():
    """A lost GPU does not touch the other's readings."""
    with simulated(Gpu(constant(100), period_s=0, faults=(Fault("lost", 1),)), Gpu(constant(200), period_s=0)) as sim:
        (lost, well), reasons = opened(sim)
        assert reasons == []
        start_j = joules(well)
        for at_s in (1.0, 2.0, 3.0):
            sim.go_to(at_s)
            with pytest.raises(MeterError, match="lost"):
                lost.read()
            assert joules(well) - start_j == pytest.approx(200 * at_s, abs=0.002)
        assert sim.inits == 1
        lost.close()
        well.close()


def test_a_lost_gpu_at_opening_leaves_the_other():
    """A GPU lost before the start is no longer CUDA's; the one that is left is metered."""
    with simulated(Gpu(faults=(Fault("lost", 0),)), Gpu()) as sim:
        assert seen(sim) == ({"gpu0": 1}, [])


def test_stuck_reset_and_backwards_are_passed_on():
    """What the counter says is handed on: standing still, starting again at zero, going back."""
    faults = (Fault("stuck", 1, 2), Fault("reset", 3), Fault("backwards", 4, 5, 50.0))
    with simulated(Gpu(constant(100), period_s=0, faults=faults)) as sim, _meter(sim) as meter:
        told = {}
        for at_s in (0.0, 1.0, 1.9, 2.0, 2.9, 3.5, 3.9, 4.0, 5.0):
            sim.go_to(at_s)
            told[at_s] = joules(meter)
    start_j = told[0.0]
    assert told[1.9] == told[1.0] == pytest.approx(start_j + 100, abs=0.002)
    assert told[2.0] == pytest.approx(start_j + 200, abs=0.002)
    assert told[3.5] == pytest.approx(50, abs=0.002)
    assert told[4.0] == pytest.approx(told[3.9] + 10 - 50, abs=0.002)
    assert told[5.0] == pytest.approx(200, abs=0.002)


def test_slow_calls_widen_the_bracket():
    """A driver call of 0.7 s shows as a bracket of 0.7 s, and ends with it."""
    with simulated(Gpu(faults=(Fault("slow", 1, 2, 0.7),))) as sim, _meter(sim) as meter:
        sim.go_to(1.0)
        slow = meter.read()
        sim.go_to(2.0)
        quick = meter.read()
    assert slow.end_ns - slow.begin_ns == round(0.7 * NS_PER_S)
    assert quick.end_ns == quick.begin_ns


def test_a_slow_call_lets_other_threads_run():
    """A driver call that hangs for a while holds neither the GIL nor another GPU's meter."""
    with simulated(Gpu(faults=(Fault("slow", 0.0, arg=0.2),)), Gpu(period_s=0), virtual=False, cost_sleeps=True) as sim:
        well = NvmlMeter(sim.gpus[1].uuid)
        slow = []
        thread = threading.Thread(target=lambda: slow.append(NvmlMeter(sim.gpus[0].uuid)))
        begin_ns = time.monotonic_ns()
        thread.start()
        for _ in range(50):
            well.read()
        took_ns = time.monotonic_ns() - begin_ns
        thread.join()
        slow[0].close()
        well.close()
    assert took_ns < 0.19 * NS_PER_S


def test_driver_reload_reopens_the_library():
    """When the driver goes and comes back, both GPUs' meters read again, NVML having been opened once more, and closed at the end."""
    with simulated(Gpu(constant(100), period_s=0), Gpu(constant(200), period_s=0), reloads=[(1.0, 2.5)]) as sim:
        meters, _ = opened(sim)
        for at_s in (1.0, 1.1, 2.0):
            sim.go_to(at_s)
            for meter in meters:
                with pytest.raises(MeterError, match=r"Driver Not Loaded|Uninitialized"):
                    meter.read()
        sim.go_to(3.5)
        assert [joules(meter) for meter in meters] == pytest.approx([250, 500], abs=0.002)
        assert (sim.inits, sim.references) == (2, 1)
        for meter in meters:
            meter.close()
        assert sim.references == 0


def test_a_missing_driver_is_asked_for_once_a_second():
    """While the driver is away, a reading fails fast instead of opening NVML each time."""
    with simulated(Gpu(), reloads=[(1.0, 9.0)]) as sim, _meter(sim) as meter:
        asked = []
        original = sim.lib.nvmlInitWithFlags
        pynvml._nvmlGetFunctionPointer_cache["nvmlInitWithFlags"] = lambda flags: asked.append(sim.now_ns()) or original(flags)
        for n in range(300):
            sim.go_to(1 + n / 100)
            with pytest.raises(MeterError):
                meter.read()
    assert len(asked) == 3


def test_somebody_else_shuts_nvml_down():
    """A library that closes NVML once too often costs no reading."""
    with simulated(Gpu()) as sim, _meter(sim) as meter:
        pynvml.nvmlShutdown()
        assert sim.references == 0
        assert joules(meter) > 0


# ---- opening and closing ----


def test_library_is_opened_once_and_closed_with_the_last():
    """Several meters share one reference to NVML; closing twice is safe; a closed meter says so."""
    with simulated(Gpu(), Gpu()) as sim:
        (one, two), _ = opened(sim)
        assert sim.references == 1
        one.close()
        one.close()
        assert sim.references == 1
        with pytest.raises(MeterError, match="closed"):
            one.read()
        two.read()
        two.close()
        assert sim.references == 0


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA driver")
def test_no_driver_is_one_reason_and_fast():
    """Without a driver there is no meter and one reason with what mends it, within 50 ms."""
    begin_s = time.perf_counter()
    meters, reasons = open_meters()
    assert time.perf_counter() - begin_s < 0.05
    assert meters == []
    assert len(reasons) == 1
    assert reasons[0].startswith("no NVIDIA driver: ")
    assert "install the NVIDIA driver" in reasons[0]
    with pytest.raises(MeterError, match="no NVIDIA driver"):
        NvmlMeter(uuid_of(0))


def test_driver_without_a_gpu():
    """A driver that shows no GPU is a reason, too."""
    with simulated() as sim:
        assert opened(sim) == ([], ["the NVIDIA driver shows no GPU: nvidia-smi -L"])


# ---- which GPUs ----

THREE = (Gpu(bus=0x30), Gpu(bus=0x10), Gpu(bus=0x20))  # in NVML's order; on the bus: 1, 2, 0


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, {"gpu0": 1, "gpu1": 2, "gpu2": 0}),
        ("0,1,2", {"gpu0": 1, "gpu1": 2, "gpu2": 0}),
        ("2", {"gpu0": 0}),
        (" 2 , 0", {"gpu0": 0, "gpu1": 1}),
        ("1,", {"gpu0": 2}),
        ("1,-1,0", {"gpu0": 2}),
        ("1gpu,0", {"gpu0": 2, "gpu1": 1}),
        (uuid_of(0), {"gpu0": 0}),
        (uuid_of(2) + "," + uuid_of(0), {"gpu0": 2, "gpu1": 0}),
        ("GPU-11aa", {"gpu0": 1}),
        ("GPU-22AA0000,GPU-00aa", {"gpu0": 2, "gpu1": 0}),
    ],
)
def test_visible_devices(monkeypatch, visible, expected):
    """CUDA_VISIBLE_DEVICES picks and orders by bus index, UUID or its prefix; names count as CUDA counts."""
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with simulated(*THREE) as sim:
        assert seen(sim) == (expected, [])


@pytest.mark.parametrize(
    ("visible", "expected", "reason"),
    [
        ("", {}, "hides every GPU"),
        ("-1", {}, "hides every GPU"),
        ("NoDevFiles", {}, "hides every GPU"),
        ("0,7,1", {"gpu0": 1}, "ends the list at '7'"),
        ("GPU-ffff", {}, "ends the list at 'GPU-ffff'"),
        ("GPU-", {}, "ends the list at 'GPU-'"),
        ("0,0", {}, "twice"),
    ],
)
def test_hidden_or_unknown_devices_have_a_reason(monkeypatch, visible, expected, reason):
    """What CUDA would not show is not metered, and the reason says so."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with simulated(*THREE) as sim:
        names, reasons = seen(sim)
    assert names == expected
    assert len(reasons) == 1
    assert reason in reasons[0]


@pytest.mark.parametrize(
    "visible", [MIG, MIG[:9], f"MIG-{uuid_of(1)}/1/0", f"{MIG},MIG-6ee0ab11-0000-4000-8000-000000000000", "1"]
)
def test_mig_slice_is_its_whole_gpu_shared(monkeypatch, visible):
    """A MIG slice, in the new or the old spelling, is metered once by its parent, flagged shared."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with simulated(Gpu(), Gpu(migs=(MIG, "MIG-6ee0ab11-0000-4000-8000-000000000000"))) as sim:
        (meter,), reasons = opened(sim)
        assert (meter.uuid, meter.domains[0].name, meter.domains[0].shared) == (uuid_of(1), "gpu0", True)
        assert reasons == []
        meter.close()


UNLIKE = (Gpu(bus=0x20, name="NVIDIA T400"), Gpu(bus=0x10, name="NVIDIA A100-SXM4-80GB"))


def test_unlike_gpus_in_bus_order(monkeypatch):
    """With CUDA_DEVICE_ORDER=PCI_BUS_ID an index among unlike GPUs is known."""
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with simulated(*UNLIKE) as sim:
        assert seen(sim) == ({"gpu0": 0}, [])


def test_unlike_gpus_fastest_first_are_not_guessed(monkeypatch):
    """Without it, which one an index means is not known: no meter and the line to type. All of them, or one by UUID, still can be."""
    with simulated(*UNLIKE) as sim:
        names, reasons = seen(sim)
        assert names == {"gpu0": 1, "gpu1": 0}
        assert "numbered by their PCI bus" in reasons[0]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", uuid_of(1))
        assert seen(sim) == ({"gpu0": 1}, [])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        names, reasons = seen(sim)
        assert names == {}
        assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in reasons[0]
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        assert seen(sim, local_rank=0)[0] == {}


def test_torch_knows_best(monkeypatch):
    """Where torch has CUDA up, its devices are taken by UUID, whatever the environment says now."""

    class Properties:
        def __init__(self, uuid):
            self.uuid = uuid.removeprefix("GPU-").removeprefix("MIG-")

    devices = [uuid_of(2), MIG, "GPU-99999999-0000-4000-8000-000000000009"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties(devices[index]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with simulated(Gpu(migs=(MIG,)), *UNLIKE) as sim:
        names, reasons = seen(sim)
        assert names == {"gpu0": 2, "gpu1": 0}
        assert len(reasons) == 1
        assert "cuda:2 is not known to NVML" in reasons[0]


def test_cuda_is_not_initialised():
    """Opening meters leaves torch's CUDA alone."""
    with simulated(*THREE) as sim:
        seen(sim)
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize(
    ("visible", "options", "expected"),
    [
        (None, {"local_rank": 1}, {"gpu1": 2}),
        ("2,0", {"local_rank": 0}, {"gpu0": 0}),
        ("2", {"local_rank": 3}, {"gpu0": 0}),
        (None, {"devices": uuid_of(0)}, {"gpu2": 0}),
        ("2,0", {"devices": ["GPU-00", "GPU-11"]}, {"gpu0": 0, "gpu1": 1}),
    ],
)
def test_a_rank_meters_its_own_gpu(monkeypatch, visible, options, expected):
    """A local rank takes the GPU of its index, or the only one it sees; UUIDs pick among the visible."""
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with simulated(*THREE) as sim:
        assert seen(sim, **options) == (expected, [])


@pytest.mark.parametrize(
    ("options", "reason"), [({"local_rank": 5}, "local rank 5"), ({"devices": [uuid_of(7)]}, "no visible GPU")]
)
def test_a_rank_without_a_gpu_has_a_reason(options, reason):
    """An own GPU that is not there is a reason, not another GPU."""
    with simulated(*THREE) as sim:
        names, reasons = seen(sim, **options)
    assert names == {}
    assert reason in reasons[0]


# ---- who else is there, and how it is ----


@pytest.mark.parametrize(
    ("pids", "denied", "shared"),
    [
        ((), False, False),
        ((0,), False, False),
        ((0, OTHER_PID), False, True),
        ((OTHER_PID,), False, True),
        ((OTHER_PID,), True, False),
    ],
)
def test_shared_where_other_processes_are_seen(pids, denied, shared):
    """Another process on the GPU sets the flag; our own, none, or no permission to look does not."""
    with simulated(Gpu(pids=pids, pids_denied=denied)) as sim, _meter(sim) as meter:
        assert meter.domains[0].shared is shared
        assert meter.shared_now() is shared


def test_others_that_come_later_are_seen():
    """Readings look for other processes every half minute, across a driver reload too; once seen, they are not forgotten."""
    with simulated(Gpu(faults=(Fault("joined", 40.0, 70.0, OTHER_PID),)), reloads=[(10.0, 20.0)]) as sim, _meter(sim) as meter:
        seen_at = {}
        for at_s in (1, 21, 39, 59, 69, 90):
            sim.go_to(at_s)
            meter.read()
            seen_at[at_s] = meter.domains[0].shared
    assert seen_at == {1: False, 21: False, 39: False, 59: False, 69: True, 90: True}


@pytest.mark.parametrize(("pids", "shared"), [((), False), ((OTHER_PID,), False), ((OTHER_PID, OTHER_PID + 1), True)])
def test_shared_inside_a_container(monkeypatch, pids, shared):
    """Where the driver's pids are not ours, one process counts as our own once CUDA is up."""
    monkeypatch.setattr(nvml, "FIRST_PID_NAMESPACE", "pid:[the machine's]")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with simulated(Gpu(pids=pids)) as sim, _meter(sim) as meter:
        assert meter.domains[0].shared is shared


def test_shared_outside_a_container(monkeypatch):
    """Where the driver's pids are ours, a lone foreign process is another's, CUDA up or not."""
    monkeypatch.setattr(nvml, "FIRST_PID_NAMESPACE", str(Path("/proc/self/ns/pid").readlink()))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with simulated(Gpu(pids=(OTHER_PID,))) as sim, _meter(sim) as meter:
        assert meter.domains[0].shared


def test_conditions():
    """Temperature, SM clock and the reasons that hold it back; what is not told is None."""
    throttle = pynvml.nvmlClocksThrottleReasonSwPowerCap | pynvml.nvmlClocksThrottleReasonGpuIdle
    with simulated(
        Gpu(temperature_c=71, sm_clock_mhz=1200, throttle=throttle), Gpu(sm_clock_mhz=0, faults=(Fault("lost", 1),))
    ) as sim:
        (one, two), _ = opened(sim)
        told = one.conditions()
        assert (told.temperature_c, told.sm_clock_mhz, told.throttle_reasons) == (71, 1200, ("power cap",))
        assert two.conditions().sm_clock_mhz is None
        assert two.conditions().throttle_reasons == ()
        sim.go_to(1)
        assert two.conditions().throttle_reasons is None
        one.close()
        two.close()


def test_reading_is_cheap():
    """A reading costs well under a millisecond of Python."""
    with simulated(Gpu()) as sim, _meter(sim) as meter:
        best_s = math.inf
        for _ in range(200):
            begin_s = time.perf_counter()
            meter.read()
            best_s = min(best_s, time.perf_counter() - begin_s)
    assert best_s < 2e-4


def test_memory_traffic():
    """The bytes of a stretch, from the share of the bandwidth that GPM tells; every sample is freed."""
    with simulated(Gpu(wave=square(60, 300, period_s=0.4), traffic_b_per_j=2e9, architecture=9)) as sim:
        (meter,), _ = opened(sim)
        traffic = meter.memory_traffic()
        assert traffic.end() is None
        for begin_s, end_s in ((1.0, 1.3), (2.05, 9.11)):
            sim.go_to(0.5)
            traffic.begin()  # forgotten
            sim.go_to(begin_s)
            traffic.begin()
            sim.go_to(end_s)
            assert traffic.end() == pytest.approx(2e9 * sim.truth_j(0, sim.at(begin_s), sim.at(end_s)), rel=1e-9)
            assert traffic.end() is None
        assert sim.samples == 0
        meter.close()


@pytest.mark.parametrize(
    ("gpu", "seconds"),
    [
        (Gpu(), 1.0),
        (Gpu(traffic_b_per_j=1e9, memory_bus_bits=0), 1.0),
        (Gpu(traffic_b_per_j=1e9), 0.09),
        (Gpu(traffic_b_per_j=1e9, faults=(Fault("lost", 0.5),)), 1.0),
        (Gpu(traffic_b_per_j=1e9, faults=(Fault("lost", 0.0, 0.5),)), 1.0),
    ],
    ids=["no counters", "bandwidth not told", "too short", "lost meanwhile", "lost at first"],
)
def test_memory_traffic_that_is_not_told(gpu, seconds):
    """What the driver does not tell is None, and nothing is left allocated."""
    with simulated(gpu) as sim:
        sim.go_to(0.0)
        traffic = MemoryTraffic(sim.gpus[0].uuid, sim.now_ns)
        pynvml.nvmlInit()
        traffic.begin()
        sim.go_to(seconds)
        assert traffic.end() is None
        pynvml.nvmlShutdown()
        assert sim.samples == 0


def test_a_sample_of_memory_traffic_that_was_not_filled_is_let_go():
    """Where the driver fills no first sample, none is kept: nothing is asked about it later, and the next beginning counts."""
    with (
        simulated(Gpu(constant(100), traffic_b_per_j=1e9, faults=(Fault("no_sample", 0.0, 0.5),))) as sim,
        _meter(sim) as meter,
    ):
        traffic = meter.memory_traffic()
        traffic.begin()
        assert sim.samples == 0
        sim.go_to(1.0)
        assert traffic.end() is None
        traffic.begin()
        sim.go_to(2.0)
        assert traffic.end() == pytest.approx(100e9)
        assert sim.samples == 0
