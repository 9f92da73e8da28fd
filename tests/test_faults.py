"""Faults of the driver in the middle of a run, through the real ``track()``, ``NvmlMeter`` and pynvml, on the simulated NVML.

Time is scripted: the run's clock and the simulator's move together, and a slow call holds up every reading, as the driver's lock
does. What is asked of every fault and every pair: training goes on, no record of the faulty GPU lies outside its bounds unflagged,
the other GPU's joules stay right, and the summary says what happened.
"""

from __future__ import annotations

import itertools
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

import green_torch
from green_torch.meters.nvml import open_meters
from green_torch.records import Flag, Method, Phase
from green_torch.testing import MemorySink, ScriptedClock
from tests.simnvml import VIRTUAL_EPOCH_NS, Fault, Gpu, simulated, square

STEP_S = 0.1
STEPS = 110
BEGIN_S, END_S = 3.0, 6.0  # of a fault
FLAGS = {  # what a fault of three seconds must leave on the records of its GPU, one of these
    "not_supported": {Flag.METER_FAILED},
    "lost": {Flag.METER_FAILED},
    "stuck": {Flag.COUNTER_STUCK},
    "reset": {Flag.COUNTER_RESET},
    "backwards": {Flag.COUNTER_RESET},
    "slow": {Flag.UNRESOLVED},
}
ARGUMENTS = {"backwards": 90.0, "slow": 0.35}  # joules, seconds
KINDS = tuple(FLAGS)


def fault(kind: str, begin_s: float = BEGIN_S, end_s: float = END_S) -> Fault:
    return Fault(kind, begin_s, end_s, ARGUMENTS.get(kind, 0.0))


class Lockstep:
    """A :class:`ScriptedClock` that takes the simulated driver's time along. Readings wait for each other, as calls of a driver do."""

    def __init__(self, sim) -> None:
        self._inner = ScriptedClock(start_ns=VIRTUAL_EPOCH_NS)
        self._sim = sim
        self._free_ns = 0
        self.epoch_unix_ns = self._inner.epoch_unix_ns
        self.now_ns = self._inner.now_ns
        self.sleep = self.advance = self._inner.advance

    def every(self, interval_s, tick, name):
        def reading() -> None:
            now_ns = self.now_ns()
            if now_ns >= self._free_ns:
                self._sim.lib.sim_set_time_ns(now_ns)
                tick()
                self._free_ns = self._sim.now_ns()

        return self._inner.every(interval_s, reading if name.startswith("meter") else tick, name)


@dataclass
class Outcome:
    sim: object
    records: list
    summary: object

    def train(self):
        return [record for record in self.records if record.phase is Phase.TRAIN]

    def joules(self, record, name):
        return next((domain for domain in record.domains if domain.name == name), None)

    def truth_j(self, record, gpu):
        return self.sim.truth_j(gpu, record.start_ns, record.end_ns)

    def flags(self, name):
        return {flag.partition(":")[0] for flag in self.summary.flags if flag.endswith(f":{name}")}


def trained(*faults: tuple[Fault, ...]) -> Outcome:
    """A run of 11 s in which each GPU suffers its faults."""
    waves = (square(80, 360, period_s=0.23), square(120, 300, period_s=0.31))
    gpus = [Gpu(wave, faults=own, period_s=0.02) for wave, own in zip(waves, faults, strict=False)]
    with simulated(*gpus) as sim:
        meters, missing = open_meters(now_ns=sim.now_ns)
        assert not missing
        clock, sink = Lockstep(sim), MemorySink()
        with green_torch.track(clock=clock, meters=meters, sinks=[sink], intensity=100, log_every_n_steps=1) as tracker:
            for _ in range(STEPS):
                clock.advance(STEP_S)
                tracker.step(tokens=8)
        return Outcome(sim, sink.records, sink.summary)


def check(run: Outcome, gpu: int) -> None:
    """What holds of a GPU whatever befell it."""
    name = f"gpu{gpu}"
    for record in run.records:
        own = run.joules(record, name)
        if own is None:
            assert f"meter_failed:{name}" in record.flags
        else:
            assert own.energy_lo_j - 1e-3 <= run.truth_j(record, gpu) <= own.energy_hi_j + 1e-3, record
            assert own.energy_j >= 0
if __name__ == "__main__":
    import time, sys
    for k in KINDS:
        t=time.time(); run = trained((fault(k),), ()); 
        print(k, time.time()-t, run.summary.flags, run.summary.warnings)
        bad=0
        for gpu in (0,1):
            for r in run.records:
                own=run.joules(r, f"gpu{gpu}")
                tr=run.truth_j(r,gpu)
                if own and not own.energy_lo_j-1e-3<=tr<=own.energy_hi_j+1e-3:
                    print("  OUT", gpu, r.step, round(tr,2), own, r.flags)
            print("  total", gpu, sum(run.joules(r,f"gpu{gpu}").energy_j for r in run.records if run.joules(r,f"gpu{gpu}")), sum(run.truth_j(r,gpu) for r in run.records if run.joules(r,f"gpu{gpu}")), sum(run.truth_j(r,gpu) for r in run.records))
