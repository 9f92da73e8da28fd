"""What measuring costs the loop: ``tracker.step()`` beside codecarbon's tasks and Lightning's ThroughputMonitor, in one run.

``python benchmarks/overhead.py`` (about sixteen minutes). Each tool in turn wraps the same loop of 5 ms steps, several rounds in
changing order; what is timed is the tool's own call on the training thread. Also: the time of ``import green_torch``, and what a
run of a million steps adds to memory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from report import table, write

import green_torch
from green_torch.statistics import paired_difference
from green_torch.testing import ScriptedClock, ScriptedMeter

STEP_S = 0.005
STEPS = 300
ROUNDS = 4
MILLION = 1_000_000
PAIRS = 12  # of fits with and without green_torch
WARM_UP = 200  # steps that don't count: a run's first records open files, and a snapshot goes with the 1st, 2nd, 4th, ... 128th
BLOCK = 400  # steps of each fit that count
# Of two ranks: pairs of blocks, and steps of each that count, after as many that don't. By default records thin out to one a second by then.
CADENCES: dict[str, tuple[int | Literal["auto"], int, int]] = {
    "a record per step": (1, 16, 200),
    "records as they come by default": ("auto", 24, 800),
}

Step = Callable[[], None]


@contextlib.contextmanager
def nothing() -> Iterator[Step]:
    """An empty call: the floor of the method."""
    yield lambda: None


@contextlib.contextmanager
def green(*, sinks: bool, model: torch.nn.Module | None = None) -> Iterator[Step]:
    """Ours: with TensorBoard and JSONL, or with no sink at all; with a model, FLOPs of every step too."""
    with (
        tempfile.TemporaryDirectory() as folder,
        green_torch.track(model, log_dir=folder if sinks else None, intensity=100.0, log_every_n_steps=1) as tracker,
    ):
        yield lambda: tracker.step(tokens=1024)


@contextlib.contextmanager
def green_auto() -> Iterator[Step]:
    """Ours as it comes: records thin out by themselves."""
    with tempfile.TemporaryDirectory() as folder, green_torch.track(log_dir=folder, intensity=100.0) as tracker:
        yield lambda: tracker.step(tokens=1024)


@contextlib.contextmanager
def codecarbon_tasks() -> Iterator[Step]:
    """Codecarbon's per-task measurement, as its documentation has it for parts of a run; offline."""
    from codecarbon import OfflineEmissionsTracker

    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        tracker = OfflineEmissionsTracker(
            country_iso_code="FRA", output_dir=folder, save_to_file=False, allow_multiple_runs=True, log_level="critical"
        )
        count = 0
        tracker.start_task("step 0")

        def step() -> None:
            nonlocal count
            tracker.stop_task(f"step {count}")
            count += 1
            tracker.start_task(f"step {count}")

        yield step
        tracker.stop_task(f"step {count}")
        tracker.stop()
    logging.disable(logging.NOTSET)


@contextlib.contextmanager
def lightning_throughput() -> Iterator[Step]:
    """Lightning Fabric's ThroughputMonitor, logging every step to TensorBoard; its FLOPs formula is given to it."""
    from lightning.fabric import Fabric
    from lightning.fabric.loggers import TensorBoardLogger
    from lightning.fabric.utilities.throughput import ThroughputMonitor

    with tempfile.TemporaryDirectory() as folder:
        fabric = Fabric(accelerator="cpu", devices=1, loggers=TensorBoardLogger(folder))
        monitor = ThroughputMonitor(fabric, window_size=10)
        started, count = time.perf_counter(), 0

        def step() -> None:
            nonlocal count
            count += 1
            monitor.update(
                time=time.perf_counter() - started, batches=count, samples=count * 8, lengths=count * 1024, flops=int(1e9)
            )
            monitor.compute_and_log(step=count)

        yield step
        fabric.logger.finalize("success")


def steady(work: Step) -> Step:
    """As much of the work as takes a step by itself. What others take from it shows, as it would not in a loop by the clock."""

    def once() -> float:
        before = time.perf_counter()
        for _ in range(50):
            work()
        return (time.perf_counter() - before) / 50

    count = round(STEP_S / min(once() for _ in range(100)))

    def step() -> None:
        for _ in range(count):
            work()

    return step


def timed(tool: Callable[[], contextlib.AbstractContextManager[Step]], work: Step) -> list[float]:
    """Seconds of the tool's call, after each of ``STEPS`` steps of 5 ms."""
    costs = []
    with tool() as step:
        for _ in range(STEPS):
            end = time.perf_counter() + STEP_S
            while time.perf_counter() < end:
                work()
            before = time.perf_counter()
            step()
            costs.append(time.perf_counter() - before)
    return costs[20:]  # the first records are one per step and open files


def lightning_fit(step: Step, *, every: int, monitored: bool) -> tuple[list[float], float]:
    """A fit of 5 ms steps with TensorBoard, logging every so many: seconds of our hooks, and of a whole step, in the mean, once it runs steadily."""
    import lightning.pytorch as pl

    from green_torch.lightning import GreenMonitor

    hooks, starts = [0.0] * (WARM_UP + BLOCK), []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(128, 128)

        def training_step(self, batch: torch.Tensor, _index: int) -> torch.Tensor:
            starts.append(time.perf_counter())
            step()
            loss = self.layer(batch).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def clocked(hook: Callable[..., None]) -> Callable[..., None]:
        def call(*args: object) -> None:
            before = time.perf_counter()
            hook(*args)
            hooks[int(str(args[-1]))] += time.perf_counter() - before  # the batch's index

        return call

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    callbacks = []
    if monitored:
        monitor = GreenMonitor(intensity=100.0)
        monitor.on_train_batch_start = clocked(monitor.on_train_batch_start)  # type: ignore[method-assign]
        monitor.on_train_batch_end = clocked(monitor.on_train_batch_end)  # type: ignore[method-assign]
        callbacks = [monitor]
    off = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with tempfile.TemporaryDirectory() as folder:
        logger = pl.loggers.TensorBoardLogger(folder)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=WARM_UP + BLOCK,
            max_epochs=1,
            log_every_n_steps=every,
            logger=logger,
            callbacks=callbacks,
            **off,
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(8 * (WARM_UP + BLOCK), 128), batch_size=8))
    return hooks[WARM_UP:], (starts[-1] - starts[WARM_UP]) / (len(starts) - 1 - WARM_UP)


def one_rank(result: Path) -> None:
    """One of two ranks: DDP over gloo, blocks of 5 ms steps with and without a tracker in changing order; rank 0 writes their means."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.set_num_threads(1)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(128, 128))
    a = torch.randn(8, 128)
    work = steady(lambda: model.module(a))

    def steps(tracker: green_torch.Tracker, n_steps: int) -> float:
        begin = 0.0
        for number in range(2 * n_steps):
            if number == n_steps:
                begin = time.perf_counter()
            work()
            model(a).square().mean().backward()  # the ranks meet here
            tracker.step(tokens=1024)
        return (time.perf_counter() - begin) / n_steps

    found: dict[str, dict[str, list[float]]] = {}
    for name, (every, pairs, n_steps) in CADENCES.items():
        means: dict[bool, list[float]] = {True: [], False: []}
        for round_ in range(pairs):
            for tracked in (True, False) if round_ % 2 else (False, True):
                with (
                    tempfile.TemporaryDirectory() as folder,
                    green_torch.track(log_dir=folder, intensity=100.0, log_every_n_steps=every, enabled=tracked) as tracker,
                ):
                    torch.distributed.barrier()
                    means[tracked].append(steps(tracker, n_steps))
        found[name] = {"with_s": means[True], "without_s": means[False]}
    if rank == 0:
        result.write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def two_processes() -> dict[str, dict[str, list[float]]]:
    """What :func:`one_rank` found, under torchrun, by cadence."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            __file__,
            str(result),
        ]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"})
        found: dict[str, dict[str, list[float]]] = json.loads(result.read_text())
        return found


def longer(without_s: list[float], with_s: list[float]) -> tuple[str, dict[str, float | None]]:
    """How much longer steps took with green_torch, of means over blocks in changing order, in words and in seconds."""
    gaps = [1.0 if round_ % 2 == 0 else -1.0 for round_ in range(len(with_s))]  # in even rounds the one without came first
    found = paired_difference(without_s, with_s, relative=False, gaps=gaps)
    lo_s, hi_s = found.lo or 0.0, found.hi or 0.0
    step_s = statistics.median(without_s)
    told = f"{found.estimate * 1e6:+.0f} µs" if found.distinguishable else "can't be told apart"
    words = (
        f"{told} (95 % interval {lo_s * 1e6:+.0f} to {hi_s * 1e6:+.0f} µs of {step_s * 1e3:.2f} ms, that is {lo_s / step_s:+.1%} to "
        f"{hi_s / step_s:+.1%}; {len(with_s)} pairs)"
    )
    return words, {"step_s": step_s, "longer_s": found.estimate, "lo_s": found.lo, "hi_s": found.hi}


def import_times(repeats: int = 7) -> dict[str, float]:
    """Median seconds of a fresh interpreter with and without ``import green_torch``."""

    def run(code: str) -> float:
        before = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - before

    bare, ours = [], []
    for _ in range(repeats):
        bare.append(run("pass"))
        ours.append(run("import green_torch"))
    return {"bare_s": statistics.median(bare), "green_torch_s": statistics.median(ours)}


def million_steps() -> dict[str, float]:
    """Growth of resident memory (bytes) over a million scripted steps of 5 ms, and their JSONL and event files."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    clock = ScriptedClock()
    meter = ScriptedMeter(clock, {"gpu0": 300.0}, period_s=0.1)
    with tempfile.TemporaryDirectory() as folder:
        tracker = green_torch.track(clock=clock, meters=[meter], intensity=100.0, log_dir=folder, poll_interval_s=0.05)
        with tracker:
            for _ in range(10_000):
                clock.advance(0.005)
                tracker.step(tokens=1024)
            before = resident()
            for _ in range(MILLION - 10_000):
                clock.advance(0.005)
                tracker.step(tokens=1024)
            grown = resident() - before
        on_disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        steps = tracker.summary().totals.phase("train").n_steps
    return {
        "steps": steps,
        "memory_growth_bytes": grown,
        "on_disk_bytes": on_disk,
        "peak_rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def main() -> None:
    """Runs everything and writes ``results/<device>/overhead.*``."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    a = torch.randn(128, 128)
    model = torch.nn.Linear(128, 128)

    def work() -> None:
        model(a)

    tools = {
        "an empty call": nothing,
        "green_torch, sinks off": lambda: green(sinks=False),
        "green_torch, TensorBoard + JSONL, a record per step": lambda: green(sinks=True),
        "green_torch, TensorBoard + JSONL, FLOPs counted": lambda: green(sinks=True, model=model),
        "green_torch, default (records thin out)": green_auto,
        "codecarbon start_task/stop_task": codecarbon_tasks,
        "Lightning ThroughputMonitor, TensorBoard": lightning_throughput,
    }
    costs: dict[str, list[float]] = {name: [] for name in tools}
    for _ in range(ROUNDS):
        for name in random.Random(0).sample(list(tools), len(tools)):
            costs[name] += timed(tools[name], work)
    fits = {}
    fixed = steady(work)
    for every in (1, 50):
        name = f"GreenMonitor in a fit, TensorBoard + JSONL, FLOPs counted, log_every_n_steps={every}"
        costs[name] = []
        means: dict[bool, list[float]] = {True: [], False: []}
        for round_ in range(PAIRS):
            for monitored in (True, False) if round_ % 2 else (False, True):
                hooks, whole_s = lightning_fit(fixed, every=every, monitored=monitored)
                costs[name] += hooks if monitored else []
                means[monitored].append(whole_s)
        fits[name] = longer(means[False], means[True])
    rows = []
    result = {}
    for name, seconds in costs.items():
        ordered = sorted(seconds)
        median, p95, mean = statistics.median(ordered), ordered[int(0.95 * len(ordered))], statistics.fmean(ordered)
        result[name] = {"median_us": median * 1e6, "p95_us": p95 * 1e6, "mean_us": mean * 1e6, "calls": len(ordered)}
        rows.append([name, f"{median * 1e6:.1f}", f"{p95 * 1e6:.1f}", f"{mean * 1e6:.1f}", f"{mean / STEP_S:.2%}"])
    ranks = {name: longer(one["without_s"], one["with_s"]) for name, one in two_processes().items()}
    imports = import_times()
    memory = million_steps()
    body = (
        table(["per step of 5 ms", "median µs", "95th µs", "mean µs", "mean, share of the step"], rows)
        + "\n\nOn the training thread; for each tool the calls of several rounds, in changing order. The hooks of GreenMonitor are timed alone; "
        + "whole steps, below, are a fixed amount of work in Python, and bear its threads as well, which share one interpreter lock with it; "
        + f"the first {WARM_UP} steps of a fit, which open files and bring eight snapshots, don't count.\n\n"
        + table(
            ["how much longer a whole step took", "means over blocks with and without, in changing order"],
            [
                *([name, words] for name, (words, _) in fits.items()),
                *([f"two ranks of DDP over gloo, a tracker on each, {name}", words] for name, (words, _) in ranks.items()),
            ],
        )
        + "\n\n"
        + f"`import green_torch`: {(imports['green_torch_s'] - imports['bare_s']) * 1e3:.0f} ms on top of an empty interpreter "
        + f"({imports['bare_s'] * 1e3:.0f} ms), medians of 7.\n\n"
        + f"A run of {memory['steps']:,} steps (scripted clock, default cadence, TensorBoard and JSONL) grew memory by "
        + f"{memory['memory_growth_bytes'] / 1e6:.1f} MB after its first 10,000 steps and wrote {memory['on_disk_bytes'] / 1e6:.1f} MB."
    )
    write(
        "overhead",
        "What measuring costs",
        body,
        {
            "step_s": STEP_S,
            "tools": result,
            "lightning_step": {name: seconds for name, (_, seconds) in fits.items()},
            "two_ranks": {name: seconds for name, (_, seconds) in ranks.items()},
            "imports": imports,
            "million_steps": memory,
        },
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one_rank(Path(sys.argv[1]))
    else:
        main()
