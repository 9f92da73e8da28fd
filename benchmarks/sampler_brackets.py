"""How closely counter updates are seen, and what that costs the main thread: the sampler's thread against its child process.

``python benchmarks/sampler_brackets.py`` (under four minutes). A simulated GPU's counter is read while the main thread idles, trains a
small torch model, or runs plain Python. A bracket is the time between the last reading that saw a value and the first that saw the
next. The cost is what the main thread's loop gets done in a second with the sampler, against without, in slices in changing order.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from report import table, write

from green_torch.clock import HostClock
from green_torch.meters.nvml import open_meters
from green_torch.sampler import Sampler
from green_torch.sampler_child import ChildMeter, in_child
from tests.simnvml import Gpu, simulated, training

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from green_torch.protocols import Meter
    from green_torch.records import Domain, Reading

POLL_S = 0.01
LEAD_S, RUN_S = 1.5, 6.0
SLICE_S, SLICES = 0.8, 8
CALL_S = 20e-6
LOADS = ("idle", "torch", "python")
SAMPLERS = ("none", "thread", "child")


class Watched:
    """A meter that notes the brackets of the readings that pass through it."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._seen: tuple[int, float] | None = None
        self.brackets: list[tuple[int, int]] = []

    @property
    def domains(self) -> tuple[Domain, ...]:
        """The meter's."""
        return self._meter.domains

    @property
    def interval_s(self) -> float | None:
        """The meter's."""
        return self._meter.interval_s

    def read(self) -> Reading:
        """The meter's, noted."""
        reading = self._meter.read()
        for one in (*reading.earlier, reading):
            (energy_j,) = one.energy_j.values()
            if self._seen is not None and energy_j != self._seen[1]:
                self.brackets.append((self._seen[0], one.end_ns))
            self._seen = one.begin_ns, energy_j
        return reading

    def close(self) -> None:
        """The meter's."""
        self._meter.close()


def loop_of(load: str) -> Callable[[], None]:
    """One turn of the main thread's loop, well under a millisecond (idle: one)."""
    if load == "idle":
        return lambda: time.sleep(0.001)
    if load == "python":

        def count() -> None:
            n = 0
            for i in range(1000):
                n += i * i

        return count
    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = torch.randn(32, 128)

    def train() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    return train


def turns(loop: Callable[[], None], seconds: float) -> float:
    """Turns per second."""
    begun = time.perf_counter()
    count = 0
    while time.perf_counter() - begun < seconds:
        loop()
        count += 1
    return count / (time.perf_counter() - begun)


def sampling(how: str) -> tuple[Sampler, Watched | None, list[Meter]]:
    """A running sampler of the simulated GPU."""
    meters: list[Meter] = []
    if how != "none":
        found, _ = open_meters()
        meters = in_child(found, POLL_S) if how == "child" else list(found)
    watched = [Watched(meter) for meter in meters]
    sampler = Sampler(HostClock(), watched, POLL_S)
    sampler.start()
    return sampler, watched[0] if watched else None, meters


def core_s(pid: int | None) -> float:
    """Seconds of processor time of a process."""
    return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def brackets(load: str, period_s: float, how: str) -> dict[str, Any]:
    """Widths in ms, the share of updates that no reading told apart, and the child's share of a core."""
    loop = loop_of(load)
    sampler, watched, meters = sampling(how)
    turns(loop, LEAD_S)
    child = next((meter for meter in meters if isinstance(meter, ChildMeter)), None)
    used, begun_ns = core_s(child.pid) if child else math.nan, time.monotonic_ns()
    turns(loop, RUN_S)
    end_ns = time.monotonic_ns()
    share = (core_s(child.pid) - used) / ((end_ns - begun_ns) / 1e9) if child else math.nan
    time.sleep(0.3)
    sampler.stop(close=True)
    assert watched is not None
    widths = sorted((hi - lo) / 1e6 for lo, hi in watched.brackets if begun_ns < hi <= end_ns)
    expected = (end_ns - begun_ns) / 1e9 / period_s
    return {
        "load": load,
        "counter_ms": 1e3 * period_s,
        "sampler": how,
        "median_ms": statistics.median(widths),
        "p95_ms": widths[int(0.95 * len(widths))],
        "max_ms": widths[-1],
        "missed": max(0.0, 1 - len(widths) / expected),
        "core_share": share,
    }


def cost(load: str, period_s: float) -> dict[str, Any]:
    """The loop's pace under each sampler, relative to none: means of slices, with standard errors."""
    loop = loop_of(load)
    rates: dict[str, list[float]] = {how: [] for how in SAMPLERS}
    taken: dict[str, list[float]] = {how: [] for how in SAMPLERS}
    for _ in range(SLICES):
        for how in random.sample(SAMPLERS, len(SAMPLERS)):
            sampler, _, _ = sampling(how)
            turns(loop, LEAD_S)  # the child has learned the counter's rhythm by then
            used, begun = time.process_time() - time.thread_time(), time.perf_counter()
            rates[how].append(turns(loop, SLICE_S))
            taken[how].append((time.process_time() - time.thread_time() - used) / (time.perf_counter() - begun))
            sampler.stop(close=True)
    base = statistics.fmean(rates["none"])
    lost = {how: [1 - rate / base for rate in rates[how]] for how in SAMPLERS}
    return {
        "load": load,
        "counter_ms": 1e3 * period_s,
        "lost": {how: [statistics.fmean(own), statistics.stdev(own) / math.sqrt(len(own))] for how, own in lost.items()},
        "taken": {how: [statistics.fmean(own), statistics.stdev(own) / math.sqrt(len(own))] for how, own in taken.items()},
    }


def _alone(send: Connection, what: Callable[..., dict[str, Any]], load: str, period_s: float, *rest: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        gpu = Gpu(
            training(0.053), period_s=period_s, phase_s=random.uniform(0, period_s), jitter_s=0.02 * period_s, cost_s=CALL_S
        )
        with simulated(gpu, virtual=False) as sim:
            os.environ.update(sim.child_env(Path(folder)))
            send.send(what(load, period_s, *rest))


def alone(what: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Runs a measurement in a process of its own."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_alone, args=(send, what, *arguments))
    process.start()
    result = receive.recv()
    process.join()
    return result


def main() -> None:
    """Measures and writes ``results/<device>/sampler_brackets.*``."""
    seen = [alone(brackets, load, period_s, how) for load, period_s, how in itertools.product(LOADS, (0.02, 0.1), SAMPLERS[1:])]
    costs = [alone(cost, load, 0.02) for load in LOADS[1:]]
    rows = [
        [
            one["load"],
            f"{one['counter_ms']:.0f}",
            one["sampler"],
            f"{one['median_ms']:.1f}",
            f"{one['p95_ms']:.1f}",
            f"{one['max_ms']:.1f}",
            f"{one['missed']:.0%}",
            "–" if math.isnan(one["core_share"]) else f"{one['core_share']:.2%}",
        ]
        for one in seen
    ]
    lost = [
        [one["load"], how, *(f"{100 * one[kind][how][0]:.2f}±{100 * one[kind][how][1]:.2f}" for kind in ("taken", "lost"))]
        for one in costs
        for how in SAMPLERS
    ]
    head = [
        "main thread",
        "counter ms",
        "sampler",
        "median ms",
        "95th ms",
        "max ms",
        "updates missed",
        "child, share of a core",
    ]
    body = f"""## Brackets

{table(head, rows)}

## What it costs the main thread (20 ms counter)

{table(["main thread", "sampler", "processor time of this process's other threads, % of a core", "the loop's pace lost, %"], lost)}

Mean ± standard error. Plain Python runs in one thread at a time, so that the other threads' time is taken from the main one's. One GPU, a reading costs {1e6 * CALL_S:.0f} µs; the thread reads every {1e3 * POLL_S:.0f} ms; {SLICES} slices of {SLICE_S} s each."""
    write("sampler_brackets", "How closely counter updates are seen", body, {"brackets": seen, "costs": costs})


if __name__ == "__main__":
    main()
