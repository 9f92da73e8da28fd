"""codecarbon's power models, integrated: scripted watts on a scripted clock, and the real models of this machine."""

from __future__ import annotations

import logging
import math
import re
import socket
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from green_torch.errors import MeterError
from green_torch.meters import discover
from green_torch.meters.codecarbon import EstimatedMeter, open_meters
from green_torch.records import Domain, Method

SECOND_NS = 1_000_000_000
CPU = Domain("cpu", Method.ESTIMATED, "a CPU", "a model")
DRAM = Domain("dram", Method.ESTIMATED, "memory", "a model")


class Ticks:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.ns = 7 * SECOND_NS

    def __call__(self) -> int:
        return self.ns

    def move(self, seconds: float) -> None:
        self.ns += round(seconds * SECOND_NS)


class Model:
    """Watts that are set by hand; counts how often it is asked, and fails where they are an exception."""

    def __init__(self, watts: float | Exception) -> None:
        self.watts = watts
        self.asked = 0

    def __call__(self) -> float:
        self.asked += 1
        if isinstance(self.watts, Exception):
            raise self.watts
        return self.watts


@pytest.fixture
def clock() -> Ticks:
    return Ticks()


def test_watts_cover_the_time_just_passed(clock):
    """Each sample's watts count from the last reading on; the first reading is the zero."""
    model = Model(99.0)
    meter = EstimatedMeter([(CPU, model)], 1.0, clock)
    assert meter.read().energy_j == {"cpu": 0.0}
    clock.move(1.0)
    model.watts = 10.0
    assert meter.read().energy_j["cpu"] == pytest.approx(10.0)
    clock.move(2.0)
    model.watts = 30.0
    assert meter.read().energy_j["cpu"] == pytest.approx(70.0)


def test_a_reading_out_of_turn_carries_the_last_watts_on(clock):
    """A load over less than 0.2 s is noise: the model isn't asked, and nothing is counted twice."""
    model = Model(10.0)
    meter = EstimatedMeter([(CPU, model)], 1.0, clock)
    meter.read()
    clock.move(1.0)
    meter.read()
    asked = model.asked
    model.watts = 1000.0
    clock.move(0.1)
    assert meter.read().energy_j["cpu"] == pytest.approx(11.0)
    assert model.asked == asked
    clock.move(0.1)
    assert meter.read().energy_j["cpu"] == pytest.approx(111.0)  # 0.2 s since the last sample: asked again


def test_a_run_shorter_than_a_sample_still_has_watts(clock):
    """Where nothing better is known the short load is taken, rather than zero joules."""
    meter = EstimatedMeter([(CPU, Model(10.0))], 1.0, clock)
    meter.read()
    clock.move(0.05)
    assert meter.read().energy_j["cpu"] == pytest.approx(0.5)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 1000)), max_size=20))
def test_joules_never_fall(steps):
    """Whatever the watts and the times between readings."""
    clock, model = Ticks(), Model(0.0)
    meter = EstimatedMeter([(CPU, model)], 1.0, clock)
    joules = [meter.read().energy_j["cpu"]]
    for seconds, watts in steps:
        clock.move(seconds)
        model.watts = watts
        joules.append(meter.read().energy_j["cpu"])
    assert joules == sorted(joules)


@pytest.mark.parametrize("broken", [OSError("no /proc"), math.nan, -1.0, math.inf])
def test_a_model_that_fails_is_left_out_and_its_time_is_made_up_for(clock, broken):
    """The other domain goes on; the next good watts cover the gap."""
    cpu, dram = Model(10.0), Model(5.0)
    meter = EstimatedMeter([(CPU, cpu), (DRAM, dram)], 1.0, clock)
    meter.read()
    clock.move(1.0)
    cpu.watts = broken
    assert meter.read().energy_j == pytest.approx({"dram": 5.0})
    clock.move(1.0)
    cpu.watts = 20.0
    assert meter.read().energy_j == pytest.approx({"cpu": 40.0, "dram": 10.0})


def test_a_meter_none_of_whose_models_answers_raises(clock):
    """As the protocol has it, with the reason."""
    meter = EstimatedMeter([(CPU, Model(OSError("no /proc")))], 1.0, clock)
    with pytest.raises(MeterError, match="no /proc"):
        meter.read()


@pytest.fixture(scope="module")
def machine():
    """The real models of this machine on a scripted clock (codecarbon's search takes a second or two), offline."""
    clock = Ticks()
    tried, slept = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *arguments: tried.append(arguments))
        meters, missing = open_meters(interval_s=2.5, now_ns=clock)
        (meter,) = meters
        patch.setattr(time, "sleep", slept.append)
        meter.read()
    assert missing == []
    assert tried == []
    assert slept == []  # the load counts from the opening on: no reading waits for a first interval
    return meter, clock


def test_this_machine_has_estimates_that_say_so(machine):
    """CPU and memory, estimated, without bounds, naming codecarbon, the model and the scope."""
    meter, _ = machine
    cpu, dram = meter.domains
    assert (cpu.name, dram.name) == ("cpu", "dram")
    assert meter.interval_s == 2.5
    for domain in (cpu, dram):
        assert domain.method is Method.ESTIMATED
        assert domain.power_limit_w is None
        assert f"codecarbon {version('codecarbon')}" in domain.source
        assert "whole machine" in domain.source
    assert cpu.device in cpu.source
    assert "TDP" in cpu.source or "guess" in cpu.source


def test_the_cpu_draws_between_a_tenth_and_all_of_its_tdp(machine):
    """The floor and the ceiling of codecarbon's model, over a second of scripted time; the memory draws its constant."""
    meter, clock = machine
    first = meter.read().energy_j
    clock.move(1.0)
    second = meter.read().energy_j
    source = meter.domains[0].source
    per_socket = re.search(r"TDP of (\d+) x ([\d.]+) W", source)
    tdp_w = int(per_socket[1]) * float(per_socket[2]) if per_socket else float(re.search(r", ([\d.]+) W", source)[1])
    assert 0.0999 * tdp_w <= second["cpu"] - first["cpu"] <= 1.0001 * tdp_w
    dram_w = float(re.search(r": ([\d.]+) W constant", meter.domains[1].source)[1])
    assert second["dram"] - first["dram"] == pytest.approx(dram_w)


def test_codecarbons_logger_is_left_as_it_was(machine):
    """The user's own codecarbon goes on talking."""
    assert logging.getLogger("codecarbon").disabled is False


def test_only_what_is_asked_for_is_modelled():
    """Where RAPL covers the CPU the memory alone is estimated, and nothing at all where both are."""
    (meter,) = open_meters(cpu=False)[0]
    assert [domain.name for domain in meter.domains] == ["dram"]
    assert open_meters(cpu=False, ram=False) == ([], [])


def test_this_machine_is_metered_out_of_the_box():
    """discover() never raises and finds a way to know the CPU and the memory, once each."""
    found = discover()
    names = [domain.name for meter in found.meters for domain in meter.domains]
    assert sorted(set(names)) == sorted(names)
    assert any(name.startswith("cpu") for name in names)
    assert any(name.startswith("dram") for name in names)
    assert all(isinstance(reason, str) and reason for reason in found.missing)


def test_without_codecarbon_and_its_peers_there_are_reasons_and_no_exception():
    """A broken installation leaves a run without meters, not without training."""
    code = (
        "import sys\nsys.modules['codecarbon'] = sys.modules['pynvml'] = None\n"
        "from green_torch.meters import discover\nfound = discover(rapl_root='/nowhere')\n"
        "print(len(found.meters))\nprint('\\n'.join(found.missing))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    count, *reasons = done.stdout.splitlines()
    assert count == "0"
    assert any(reason.startswith("cpu: codecarbon can't be imported") and "pip install" in reason for reason in reasons)
    assert any(reason.startswith("dram: codecarbon can't be imported") for reason in reasons)
