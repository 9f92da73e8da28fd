"""One rank of a job, for the tests of several processes: a meter of known joules, a few steps, and what is then found on rank zero.

Run by torchrun, or by hand with ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``. Prints one line of JSON when it is done.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

import green_torch
from green_torch.intensity import Live, Online
from green_torch.intensity.online import Signal
from green_torch.records import Domain, IntensityPoint, Method, Reading
from green_torch.sinks.codec import plain

if TYPE_CHECKING:
    from collections.abc import Sequence


class CountedMeter:
    """Joules that the script hands out: known to the test. The counter also moves a microjoule with each reading, so as not to stand."""

    interval_s = None

    def __init__(self, *names: str, share: float = 1.0) -> None:
        self.share = share
        self.domains = tuple(Domain(name, Method.COUNTER, name, "the script") for name in names)
        self.energy_j = 0.0
        self.seen = False  # what was handed out before the first reading is in no run

    def read(self) -> Reading:
        """The joules so far, the same for each domain."""
        now_ns = time.monotonic_ns()
        self.energy_j += 1e-6
        self.seen = True
        return Reading(now_ns, time.monotonic_ns(), {domain.name: self.share * self.energy_j for domain in self.domains})

    def close(self) -> None:
        """Nothing to let go of."""


class Grid(Online):
    """A grid on the "network": each request leaves a line in a file."""

    signal = Signal("the script", "FR", "lifecycle", average=True, interval_s=300.0, key="rank_worker", tables=("FR",))

    def __init__(self, asked: Path) -> None:
        self.asked = asked

    def latest(self) -> IntensityPoint:
        """Always 42 g/kWh."""
        with self.asked.open("a") as file:
            file.write("asked\n")
        return self.signal.point(42.0, time.time_ns(), estimated=False)

    def history(self, start_unix_ns: int, end_unix_ns: int) -> tuple[IntensityPoint, ...]:
        """Not asked for."""
        raise NotImplementedError

    forecast = history


def train(tracker: green_torch.Tracker, steps: int, gpu: CountedMeter, node: CountedMeter) -> float:
    """Hands out 10 J a step on rank 0's GPU, 20 J on rank 1's, and so on, and 1 J for CPU and memory each; the slowest step() in s."""
    rank = int(os.environ["RANK"])
    slowest_s = 0.0
    while tracker.enabled and not all(
        meter.seen for meter in (gpu, node) if rank == 0 or meter is gpu
    ):  # a busy machine is late
        time.sleep(0.001)
    for _ in range(steps):
        time.sleep(0.03)
        gpu.energy_j += 10.0 * (rank + 1)
        node.energy_j += 1.0
        before = time.monotonic()
        tracker.step(tokens=100 + rank)
        slowest_s = max(slowest_s, time.monotonic() - before)
    return slowest_s


def end(args: argparse.Namespace, rank: int) -> None:
    """How this rank's loop ends."""
    time.sleep(0.3)  # the last joules are read before the run ends
    if args.fail == rank:
        raise RuntimeError("this rank fails")
    if args.kill == rank:
        time.sleep(1.0)  # its totals are told meanwhile
        os.kill(os.getpid(), signal.SIGKILL)
    if args.linger == rank:
        time.sleep(2.0)
    if args.early_end:
        dist.destroy_process_group()


def main(options: Sequence[str] | None = None) -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--log-dir", required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[5])  # by rank; the last stands for those that follow
    parser.add_argument("--kill", type=int)  # this rank kills itself after its steps
    parser.add_argument("--fail", type=int)  # this one raises
    parser.add_argument("--late-group", action="store_true")  # the group begins after the tracker
    parser.add_argument("--early-end", action="store_true")  # and ends before it
    parser.add_argument("--no-group", action="store_true")
    parser.add_argument("--grid", type=Path)  # a provider on the network, and where each rank's requests are noted
    parser.add_argument("--linger", type=int)  # this rank takes two seconds more
    parser.add_argument("--baseline")
    parser.add_argument("--planned", type=int)  # steps
    parser.add_argument("--share", type=float, default=1.0)  # of the joules that are handed out, what the meters show
    parser.add_argument("--checkpoint", type=Path)  # rank 0's state, which it writes at the end
    parser.add_argument("--loads", type=int, nargs="+", default=[0, 1])  # ranks that load it at first, where it is there
    parser.add_argument("--again", action="store_true")  # a short run before, which rank 1 leaves long after rank 0
    args = parser.parse_args(options)
    rank = int(os.environ["RANK"])
    steps = args.steps[min(rank, len(args.steps) - 1)]

    def group() -> None:
        if not args.no_group:
            dist.init_process_group("gloo", timeout=timedelta(seconds=60))

    if not args.late_group:
        group()
    earlier = green_torch.track(meters=[CountedMeter("gpu0")], intensity=1.0, enabled=args.again)
    with earlier:
        time.sleep(0.3 + 3.5 * rank if args.again else 0)
    gpu, node = CountedMeter(f"gpu{rank}", share=args.share), CountedMeter("cpu", "dram", share=args.share)
    began = time.monotonic()
    tracker = green_torch.track(
        log_dir=args.log_dir,
        meters=[gpu, node],
        intensity=3_600_000.0 if args.grid is None else Live(Grid(args.grid / str(rank)), cache_dir=args.grid / f"cache{rank}"),
        log_every_n_steps=1,
        flops_per_step=1e6,
        peak_flop_per_s=1e9,
        baseline=args.baseline,
        planned_steps=args.planned,
    )
    with tracker:
        if args.late_group:
            group()
        if args.checkpoint and args.checkpoint.exists() and rank in args.loads:
            tracker.load_state_dict(json.loads(args.checkpoint.read_text()))
        slowest_s = train(tracker, steps, gpu, node)
        end(args, rank)
        if args.checkpoint and rank == 0:
            args.checkpoint.write_text(json.dumps(tracker.state_dict()))
        closing = time.monotonic()
    summary = tracker.summary()
    line = {
        "rank": rank,
        "run_id": summary.manifest.run_id,
        "earlier_run_id": earlier.manifest.run_id,
        "missing": summary.manifest.missing,
        "warnings": summary.warnings,
        "own_j": summary.totals.energy_j,
        "job": plain(summary.job) if summary.job else None,
        "text": str(summary),
        "close_s": time.monotonic() - closing,
        "run_s": time.monotonic() - began,
        "slowest_step_s": slowest_s,
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    if dist.is_initialized() and args.kill is None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
