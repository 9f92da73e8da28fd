"""One measured loop of ``accuracy.py``: simulated GPUs with known power, several tools marking the same steps, errors by tool and GPU."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import green_torch
from green_torch.meters.nvml import open_meters
from green_torch.sampler_child import ChildMeter, in_child
from green_torch.testing import MemorySink
from tests.simnvml import Gpu, Sim, simulated, square, training

LEAD_S = {"codecarbon": 0.2}  # how long a tool is up before the first step that counts, where it is not the next
LONG_LEAD_S = 1.5
SQUARE_S = 0.137  # the square wave's period: unrelated to the steps'
CALL_S = 20e-6  # what a reading costs
SENSOR_S = {0.02: 0.010, 0.1: 0.025}  # the instant power's window, by counter period (V100, A100: arXiv 2312.02741)
POLL_S = 0.01

Step = tuple[int, int, float]  # begin and end in ns, joules
Window = Callable[[], list[Step]]


@dataclass(frozen=True, slots=True)
class Source:
    """One simulated GPU of a job: ``wave`` is "training" or "square"; ``phase`` its place among the cell's random phases."""

    wave: str
    period_s: float
    phase: int


@dataclass(frozen=True, slots=True)
class Job:
    """One loop. ``tools`` is "windows" (green_torch and zeus in both modes, side by side) or one tool alone.

    Alone: "green", "green auto", "green thread", "zeus", "zeus approx", "codecarbon".
    """

    tools: str
    step_s: float
    seconds: float
    busy: bool
    sources: tuple[Source, ...]


def gpu(source: Source, step_s: float) -> Gpu:
    """The simulated GPU: the phase decides when its counter updates, and the noise on its training wave."""
    rng = np.random.default_rng([source.phase, round(1e3 * source.period_s), round(1e3 * step_s)])
    wave = square(60.0, 300.0, period_s=SQUARE_S) if source.wave == "square" else training(step_s, seed=source.phase)
    return Gpu(
        wave,
        period_s=source.period_s,
        phase_s=float(rng.uniform(0, source.period_s)),
        jitter_s=0.02 * source.period_s,
        power_period_s=source.period_s,
        instant_window_s=SENSOR_S[source.period_s],
        cost_s=CALL_S,
    )


class Tool:
    """A tool at its steps: ``mark`` ends one and begins the next; ``result`` gives each GPU's steps, bounds and total."""

    name: str

    def __init__(self) -> None:
        self.costs_s: list[float] = []

    def mark(self) -> None:
        """Ends a step and begins the next."""
        raise NotImplementedError

    def timed(self) -> None:
        """``mark``, timed: what the tool costs the training thread."""
        before = time.perf_counter()
        self.mark()
        self.costs_s.append(time.perf_counter() - before)


class Green(Tool):
    """Ours, a record per step, nothing written."""

    name = "green_torch"

    def __init__(self, stack: contextlib.ExitStack, how: str) -> None:
        super().__init__()
        meters, _ = open_meters()
        self.meters = meters if "thread" in how else in_child(meters, POLL_S)
        self.sink = MemorySink()
        every = "auto" if "auto" in how else 1
        self.tracker = stack.enter_context(
            green_torch.track(
                meters=self.meters, intensity=100.0, log_every_n_steps=every, sinks=[self.sink], poll_interval_s=POLL_S
            )
        )

    def mark(self) -> None:
        """A step."""
        self.tracker.step()

    def steps(self, place: int) -> list[tuple[int, int, float, float, float, bool]]:
        """Begin, end, joules, bounds and whether they are vacuous, of each step but the first."""
        rows = []
        for record in self.sink.records[1:]:
            for domain in record.domains:
                if domain.name == f"gpu{place}" and record.phase == "train":
                    lo_j, hi_j = domain.energy_lo_j or 0.0, math.inf if domain.energy_hi_j is None else domain.energy_hi_j
                    unresolved = f"unresolved:gpu{place}" in record.flags
                    rows.append((record.start_ns, record.end_ns, domain.energy_j, lo_j, hi_j, unresolved))
        return rows


class Zeus(Tool):
    """Zeus's windows, one per step, not synchronised; and one window over all of them."""

    def __init__(self, *, approximate: bool, gpus: int) -> None:
        super().__init__()
        from zeus.monitor import ZeusMonitor

        self.name = "zeus, approx_instant_energy" if approximate else "zeus"
        self.monitor = ZeusMonitor(list(range(gpus)), cpu_indices=[], approx_instant_energy=approximate)
        self.rows: list[tuple[int, int, dict[int, float]]] = []
        self.whole: tuple[int, int, dict[int, float]] | None = None
        self.begin_ns = 0
        self.begun = False

    def mark(self) -> None:
        """A window's end and the next one's begin."""
        end_ns = time.monotonic_ns()
        if self.begun:
            self.rows.append((self.begin_ns, end_ns, self.monitor.end_window("step", sync_execution=False).gpu_energy))
        else:
            self.run_ns = end_ns
            self.monitor.begin_window("run", sync_execution=False)
            self.begun = True
        self.begin_ns = time.monotonic_ns()
        self.monitor.begin_window("step", sync_execution=False)

    def close(self) -> None:
        """Ends the window over the run."""
        end_ns = time.monotonic_ns()
        self.whole = (self.run_ns, end_ns, self.monitor.end_window("run", sync_execution=False).gpu_energy)


class Codecarbon(Tool):
    """Codecarbon's tasks, one per step, offline. Each GPU's joules come from the objects whose sum is its ``gpu_energy``."""

    name = "codecarbon tasks"

    def __init__(self) -> None:
        super().__init__()
        from codecarbon import OfflineEmissionsTracker

        self.tracker = OfflineEmissionsTracker(
            country_iso_code="FRA", save_to_file=False, allow_multiple_runs=True, log_level="critical", tracking_mode="machine"
        )
        self.rows: list[tuple[int, int, dict[int, float]]] = []
        self.begin_ns = 0
        self.begun = False
        self.tracker.start_task("set up")
        self.tracker.stop_task("set up")

    def mark(self) -> None:
        """A task's end and the next one's begin."""
        end_ns = time.monotonic_ns()
        if self.begun:
            self.tracker.stop_task("step")
            hardware = self.tracker._hardware  # noqa: SLF001  (joules by GPU are nowhere else)
            devices = [device for one in hardware if hasattr(one, "devices") for device in one.devices.devices]
            self.rows.append((self.begin_ns, end_ns, {k: d.energy_delta.kWh * 3.6e6 for k, d in enumerate(devices)}))
            self.tracker._tasks.clear()  # noqa: SLF001  (it never forgets a task)
        self.tracker.start_task("step")
        self.begin_ns = time.monotonic_ns()
        self.begun = True


def errors(sim: Sim, place: int, steps: list[Step], whole: Step | None = None) -> dict[str, float]:
    """What a tool made of one GPU's steps, against the truth. Relative to the mean step, the 10-step mean, or the total."""
    joules = np.array([step[2] for step in steps])
    truth = np.array([sim.truth_j(place, begin_ns, end_ns) for begin_ns, end_ns, _ in steps])
    tens = len(joules) // 10
    means = (
        joules[: 10 * tens].reshape(tens, 10).sum(1) / truth[: 10 * tens].reshape(tens, 10).sum(1) - 1 if tens else np.array([])
    )
    out = {
        "steps": len(steps),
        "rms": float(np.sqrt(np.mean((joules - truth) ** 2)) / truth.mean()),
        "zeros": float(np.mean(joules == 0)),
        "sum": float(joules.sum() / truth.sum() - 1),
        "ten_rms": float(np.sqrt(np.mean(means**2))) if tens else math.nan,
        "ten_max": float(np.abs(means).max()) if tens else math.nan,
        "ten_within": float(np.mean(np.abs(means) <= 0.01)) if tens else math.nan,
        "step_s": float(np.mean([end_ns - begin_ns for begin_ns, end_ns, _ in steps])) / 1e9,
    }
    begin_ns, end_ns, energy_j = whole or (steps[0][0], steps[-1][1], float(joules.sum()))
    out["total"] = energy_j / sim.truth_j(place, begin_ns, end_ns) - 1 if whole else out["sum"]
    return out


def straight_lines(sim: Sim, place: int, steps: list[tuple[int, int]]) -> dict[str, float]:
    """Errors of straight lines between the counter's updates, each known exactly: what it tells to who knows nothing of the wave."""
    period_ns = round(1e9 * sim.gpus[place].period_s)

    def level_j(at_ns: int) -> float:
        before_ns = sim.last_update_ns(place, at_ns)
        after_ns = sim.last_update_ns(place, before_ns + round(1.5 * period_ns))  # jitter is far below half a period
        before_j, between_j = sim.truth_j(place, sim.epoch_ns, before_ns), sim.truth_j(place, before_ns, after_ns)
        return before_j + between_j * (at_ns - before_ns) / (after_ns - before_ns)

    return errors(sim, place, [(begin_ns, end_ns, level_j(end_ns) - level_j(begin_ns)) for begin_ns, end_ns in steps])


def busy_until(deadline_ns: int) -> None:
    """Holds the interpreter lock in plain Python."""
    n = 0
    while time.monotonic_ns() < deadline_ns:
        for i in range(200):
            n += i * i


def idle_until(deadline_ns: int) -> None:
    """Sleeps, as a training thread does that waits for its GPU."""
    time.sleep(max(0, deadline_ns - time.monotonic_ns()) / 1e9)


def cpu_s(pid: int | str, only: str = "") -> float:
    """Seconds of processor time that a process's threads have used, or those whose name begins so."""
    own = {f"{thread.native_id}" for thread in threading.enumerate() if thread.name.startswith(only)}
    tasks = [task for task in Path(f"/proc/{pid}/task").iterdir() if not only or task.name in own]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def sampler_cpu_s(pid: int | None) -> tuple[float, float]:
    """What reading the counters has cost so far: the child's seconds, and those of this process's threads that take its readings."""
    return cpu_s(pid) if pid else math.nan, cpu_s("self", "green_torch meter")


def prepare() -> None:
    """Imports the other tools under a simulated driver, so that forked jobs find them ready; codecarbon asks for ``nvidia-smi``."""
    folder = Path(tempfile.mkdtemp())
    script = folder / "nvidia-smi"
    script.write_text("#!/bin/sh\n", encoding="utf-8")
    script.chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    logging.disable(logging.CRITICAL)
    with simulated(Gpu()), contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        for name in ("torch", "codecarbon", "zeus.monitor", "green_torch.tracker"):  # torch: as in every training
            importlib.import_module(name)


@contextlib.contextmanager
def driver(job: Job) -> Iterator[Sim]:
    """The simulated driver for this process, its children, and tools that were imported before it."""
    import pynvml

    gpus = [gpu(source, job.step_s) for source in job.sources]
    with tempfile.TemporaryDirectory() as folder, simulated(*gpus, virtual=False) as sim:
        os.environ.update(sim.child_env(Path(folder)))
        pynvml.nvmlInit()
        yield sim


def run(job: Job) -> dict[str, Any]:
    """The job: by tool, a list of each GPU's errors, and costs."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    wait = busy_until if job.busy else idle_until
    with driver(job) as sim, contextlib.ExitStack() as stack:
        count = len(job.sources)
        green = Green(stack, job.tools) if job.tools.startswith(("windows", "green")) else None
        modes = {"windows": (False, True), "zeus": (False,), "zeus approx": (True,)}.get(job.tools, ())
        zeus = [Zeus(approximate=mode, gpus=count) for mode in modes]
        carbon = Codecarbon() if job.tools == "codecarbon" else None
        tools: list[Tool] = [tool for tool in (green, *zeus, carbon) if tool is not None]
        step_ns = round(job.step_s * 1e9)
        first = math.ceil((time.monotonic_ns() + LEAD_S.get(job.tools, LONG_LEAD_S) * 1e9 - sim.epoch_ns) / step_ns)
        wait(sim.epoch_ns + first * step_ns)
        pid = child_pid(green)
        used, begun = sampler_cpu_s(pid), time.monotonic()
        next_step = first
        last = first + round(job.seconds / job.step_s)
        while next_step <= last:
            wait(sim.epoch_ns + next_step * step_ns)
            for tool in tools:
                tool.timed()
            next_step = max(next_step + 1, (time.monotonic_ns() - sim.epoch_ns) // step_ns + 1)
        child, threads = (
            (now - before) / (time.monotonic() - begun) for now, before in zip(sampler_cpu_s(pid), used, strict=True)
        )
        for one in zeus:
            one.close()
        if green:
            green.tracker.__exit__(None, None, None)
            for meter in green.meters:
                meter.close()
        out: dict[str, Any] = {
            "busy": job.busy,
            "step_s": job.step_s,
            "child_core_share": child,
            "threads_core_share": threads,
            "tools": {},
        }
        for tool in tools:
            costs = sorted(tool.costs_s[2:])
            out["tools"][tool.name] = {
                "cost_us": {"median": statistics.median(costs) * 1e6, "p95": costs[int(0.95 * len(costs))] * 1e6},
                "gpus": [_errors_of(tool, sim, place) for place in range(count)],
            }
    return out


def child_pid(green: Green | None) -> int | None:
    """The sampler's process id, where there is one."""
    meters = [meter for meter in green.meters if isinstance(meter, ChildMeter)] if green else []
    return meters[0].pid if meters else None


def _errors_of(tool: Tool, sim: Sim, place: int) -> dict[str, float]:
    if isinstance(tool, Green):
        rows = tool.steps(place)
        out = errors(sim, place, [(row[0], row[1], row[2]) for row in rows])
        truths = [sim.truth_j(place, row[0], row[1]) for row in rows]
        inside = [row[3] - 1e-6 <= truth <= row[4] + 1e-6 for row, truth in zip(rows, truths, strict=True)]
        out["coverage"] = float(np.mean(inside))
        out["unresolved"] = float(np.mean([row[5] for row in rows]))
        between = straight_lines(sim, place, [(row[0], row[1]) for row in rows])
        out["lines_rms"], out["lines_ten_rms"] = between["rms"], between["ten_rms"]
        out["half_width"] = float(np.mean([(row[4] - row[3]) / 2 / truth for row, truth in zip(rows, truths, strict=True)]))
        summary = tool.tracker.summary()
        whole = next(domain for domain in summary.totals.domains if domain.name == f"gpu{place}")
        records = tool.sink.records
        truth = sim.truth_j(place, records[0].start_ns, records[-1].end_ns)
        out["run"] = whole.energy_j / truth - 1
        out["total_covered"] = float((whole.energy_lo_j or 0) <= truth <= (whole.energy_hi_j or math.inf))
        out["total_half_width"] = ((whole.energy_hi_j or math.inf) - (whole.energy_lo_j or 0)) / 2 / truth
        return out
    assert isinstance(tool, Zeus | Codecarbon)
    steps = [(begin_ns, end_ns, energy_j[place]) for begin_ns, end_ns, energy_j in tool.rows]
    whole_window = getattr(tool, "whole", None)
    return errors(sim, place, steps, (whole_window[0], whole_window[1], whole_window[2][place]) if whole_window else None)
