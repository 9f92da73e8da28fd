"""Joules of single steps against a known truth: green_torch beside zeus and codecarbon's tasks, on a simulated NVML.

``python benchmarks/accuracy.py`` (13 minutes; ``--quick``: one). Needs the ``bench`` extra and a C compiler. Simulated GPUs follow a
known power; green_torch and zeus (with and without ``approx_instant_energy``, not synchronising) mark the same steps of one loop,
codecarbon's tasks those of another loop on the same waves and phases, since a task costs a millisecond. Everything runs in real time.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy_worker import CALL_S, SQUARE_S, Job, Source, prepare, run
from report import table, write

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

WAVES, PERIODS_S = ("training", "square"), (0.02, 0.1)
IDLE_S = {0.005: 1.5, 0.023: 2.5, 0.053: 4.5, 0.110: 5.0, 0.190: 6.5}  # seconds of a run, by step
BUSY_S = {0.005: 1.2, 0.023: 2.0, 0.053: 3.0, 0.110: 3.3, 0.190: 4.5}
PHASES = 20
OURS, ZEUS, APPROX, CARBON = TOOLS = ("green_torch", "zeus", "zeus, approx_instant_energy", "codecarbon tasks")
COSTS = ("green", "green auto", "green thread", "zeus", "zeus approx", "codecarbon")
ROUNDS = 5  # of the cost of each tool, in turn: other guests of the machine make one round dearer than the next
JOB_LIMIT_S = 60.0

Cell = tuple[bool, str, float, float]  # busy, wave, period, step
Phase = dict[str, float]
Value = tuple[float, float]  # mean over phases and its standard error


def _job(job: Job, send: Connection) -> None:
    send.send(run(job))


def run_all(jobs: Sequence[Job], slots: int) -> list[tuple[Job, dict[str, Any]]]:
    """Each job in a process of its own, so many at a time.

    Raises:
        RuntimeError: a job failed, or took too long.
    """
    fork = multiprocessing.get_context("fork")
    waiting, running, done = list(jobs), [], []
    while waiting or running:
        while waiting and len(running) < slots:
            job = waiting.pop(0)
            receive, send = fork.Pipe(duplex=False)
            process = fork.Process(target=_job, args=(job, send))
            process.start()
            send.close()
            running.append((job, process, receive, time.monotonic() + JOB_LIMIT_S))
        for entry in list(running):
            job, process, receive, limit = entry
            if receive.poll(0.05):
                try:
                    done.append((job, receive.recv()))
                except EOFError:
                    raise RuntimeError(f"{job} failed; what it said stands above") from None
                process.join()
                running.remove(entry)
            elif time.monotonic() > limit:
                process.terminate()
                raise RuntimeError(f"{job} took more than {JOB_LIMIT_S:.0f} s")
    return done


def plan(tools: str, seconds: dict[float, float], phases: int, phases_per_job: int, *, busy: bool) -> list[Job]:
    """Jobs for every cell: the waves and periods of a step, and some phases of each, are GPUs of one job."""
    jobs = []
    for step_s, run_s in seconds.items():
        for first in range(0, phases, phases_per_job):
            some = range(first, min(first + phases_per_job, phases))
            sources = tuple(Source(*source) for source in itertools.product(WAVES, PERIODS_S, some))
            jobs.append(Job(tools, step_s, run_s, busy, sources))
    return random.Random(1).sample(jobs, len(jobs))


def collect(results: Sequence[tuple[Job, dict[str, Any]]]) -> dict[Cell, dict[str, list[Phase]]]:
    """Every phase's errors, by cell and tool."""
    cells: dict[Cell, dict[str, list[Phase]]] = defaultdict(lambda: defaultdict(list))
    for job, result in results:
        for tool, outcome in result["tools"].items():
            for source, errors in zip(job.sources, outcome["gpus"], strict=True):
                cells[job.busy, source.wave, source.period_s, job.step_s][tool].append(errors)
    return cells


def over(phases: Sequence[Phase], value: Callable[[Phase], float]) -> Value:
    """Mean over phases, and its standard error."""
    values = [value(phase) for phase in phases if not math.isnan(value(phase))]
    if not values:
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


MEASURES: dict[str, Callable[[Phase], float]] = {
    "rms": lambda p: p["rms"],
    "zeros": lambda p: p["zeros"],
    "ten_rms": lambda p: p["ten_rms"],
    "ten_within": lambda p: p["ten_within"],
    "total": lambda p: abs(p["total"]),
    "sum": lambda p: abs(p["sum"]),
}


ONLY_OURS = ("coverage", "half_width", "unresolved", "lines_rms", "lines_ten_rms")


def percent(value: Value) -> str:
    """A mean with its standard error, in per cent, to the error's digits."""
    mean, error = 100 * value[0], 100 * value[1]
    if math.isnan(mean):
        return "–"
    digits = 2 if mean < 10 else 1
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f"±{error:.{digits}f}")


def worse(ours: Value, theirs: Value) -> bool:
    """Beyond two standard errors of the difference."""
    return ours[0] - theirs[0] > 2 * math.hypot(*(0.0 if math.isnan(value[1]) else value[1] for value in (ours, theirs)))


def whole_periods(cell: Cell, phase: Phase) -> bool:
    """Whether the cell's steps together take whole periods of the counter, within the few per cent that these jitter."""
    _, _, period_s, step_s = cell
    periods = round(phase["steps"] * phase["step_s"] / step_s) * step_s / period_s
    return abs(periods - round(periods)) < 0.1


def tables(means: dict[Cell, dict[str, dict[str, Value]]], *, busy: bool) -> str:
    """The rows of one kind of main thread."""
    rows = []
    for wave, period_s, step_s in itertools.product(WAVES, PERIODS_S, IDLE_S):
        cell = means.get((busy, wave, period_s, step_s))
        if not cell:
            continue
        ours = cell[OURS]

        def four(name: str, cell: dict[str, dict[str, Value]] = cell) -> str:
            return " / ".join(percent(cell[tool][name]) if tool in cell else "–" for tool in TOOLS)

        rows.append(
            [
                wave,
                f"{1e3 * period_s:.0f}",
                f"{1e3 * step_s:.0f}",
                four("rms"),
                " / ".join(f"{100 * cell[tool]['zeros'][0]:.0f}" if tool in cell else "–" for tool in TOOLS),
                four("ten_rms"),
                f"{percent(ours['lines_rms'])}, {percent(ours['lines_ten_rms'])}",
                four("total"),
                f"{100 * ours['coverage'][0]:.1f}",
                f"±{100 * ours['half_width'][0]:.0f}",
                f"{100 * ours['unresolved'][0]:.0f}",
            ]
        )
    head = [
        "wave",
        "counter ms",
        "step ms",
        "step RMS error %",
        "zero readings %",
        "10-step mean, RMS error %",
        "straight lines: step, 10-step mean, RMS error %",
        "run total, |error| %",
    ]
    return table([*head, "coverage %", "half width %", "unresolved %"], rows)


def verdicts(
    means: dict[Cell, dict[str, dict[str, Value]]], phases: dict[Cell, dict[str, list[Phase]]], costs: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The issue's targets, each with whether it is met and what was measured."""
    ours = {cell: tools[OURS] for cell, tools in means.items() if OURS in tools}
    idle = {cell: values for cell, values in ours.items() if not cell[0]}
    everywhere = [phase for cell in ours for phase in phases[cell][OURS]]
    coverage = statistics.fmean(phase["coverage"] for phase in everywhere)
    totals = statistics.fmean(phase["total_covered"] for phase in everywhere)
    out = [
        {"target": "bounds hold the true joules of every step", "met": coverage == 1.0, "measured": f"{coverage:.3%}"},
        {
            "target": "run total within one counter quantum plus both edges (its bounds)",
            "met": totals == 1.0,
            "measured": f"{totals:.1%} of {len(everywhere)} runs; error at most {max(abs(p['run']) for p in everywhere):.2%}",
        },
    ]
    for step_s, limit in ((0.053, 0.03), (0.19, 0.015)):
        found = {cell[2]: values["rms"] for cell, values in idle.items() if cell[1] == "training" and cell[3] == step_s}
        text = ", ".join(f"{percent(value)} % ({1e3 * period_s:.0f} ms counter)" for period_s, value in found.items())
        met = bool(found) and all(value[0] <= limit for value in found.values())
        out.append(
            {
                "target": f"training-like, {1e3 * step_s:.0f} ms steps, idle: RMS at most {limit:.1%}",
                "met": met,
                "measured": text,
            }
        )
    out += [*_ten_steps(idle), *_beside_zeus(means, phases)]
    for cost in costs:
        if cost["tools"] == "green auto" and not cost["busy"]:
            median_us = cost["cost_us"]["median"]
            out.append(
                {
                    "target": "step() at most 20 µs, median",
                    "met": median_us <= 20,
                    "measured": f"{median_us:.0f} µs ({cost['counter_ms']:.0f} ms counter, idle)",
                }
            )
            child, threads, rounds = cost["child_core_share"], cost["threads_core_share"], cost["sampler_rounds"]
            out.append(
                {
                    "target": "sampler at most 1 % of a core",
                    "met": child + threads <= 0.01,
                    "measured": f"{child + threads:.2%} ({cost['counter_ms']:.0f} ms counter; {min(rounds):.2%} to {max(rounds):.2%} in "
                    f"{len(rounds)} rounds): the child {child:.2%}, the thread that takes its readings {threads:.2%}",
                }
            )
    return out


def _ten_steps(idle: dict[Cell, dict[str, Value]]) -> list[dict[str, Any]]:
    """How well means of ten steps are known, by wave; the target is the training-like one's."""
    out = []
    for wave in WAVES:
        long = {cell: values for cell, values in idle.items() if cell[3] >= 0.053 and cell[1] == wave}
        if long:
            worst = max(long, key=lambda cell: long[cell]["ten_rms"][0])
            value, lines = long[worst]["ten_rms"], long[worst]["lines_ten_rms"]
            within = statistics.fmean(values["ten_within"][0] for values in long.values())
            text = f"worst cell {percent(value)} % RMS ({1e3 * worst[2]:.0f} ms counter, {1e3 * worst[3]:.0f} ms steps); {within:.1%} of the means are"
            if wave == "training":
                target, met = "training-like: 10-step means within 1 %, steps of 53 ms and more, idle", value[0] <= 0.01
            else:
                target, met = f"for information: 10-step means of the {wave} wave, steps of 53 ms and more, idle", None
                text += (
                    f" within 1 %. Straight lines between exactly known updates: {percent(lines)} %. This wave is not in step with the "
                    "loop, and a counter's interval does not tell when within it power jumped"
                )
            out.append({"target": target, "met": met, "measured": text})
    return out


def _beside_zeus(
    means: dict[Cell, dict[str, dict[str, Value]]], phases: dict[Cell, dict[str, list[Phase]]]
) -> list[dict[str, Any]]:
    """The cells that are worse than zeus's, and why."""
    out = []
    for name, what in (("rms", "RMS"), ("total", "run total")):
        behind, cancelled = [], []
        for cell, tools in means.items():
            modes = [tools[tool][name] for tool in (ZEUS, APPROX) if tool in tools]
            if OURS in tools and modes and worse(tools[OURS][name], min(modes)):
                load = "busy" if cell[0] else "idle"
                (cancelled if name == "total" and whole_periods(cell, phases[cell][ZEUS][0]) else behind).append(
                    f"{load}, {cell[1]}, {1e3 * cell[2]:.0f} ms counter, {1e3 * cell[3]:.0f} ms steps: "
                    f"{percent(tools[OURS][name])} % against {percent(min(modes))} %"
                )
        text = "; ".join(behind) or "none is"
        if cancelled:
            text += (
                ". Not counted, as the steps take whole counter periods there and what zeus has too much at the beginning it misses at the "
                f"end, however much that is: {'; '.join(cancelled)}"
            )
        out.append({"target": f"no cell's {what} worse than zeus's better mode", "met": not behind, "measured": text})
    return out


def _cost(job: Job, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """What a tool costs: medians over its rounds."""
    calls = [next(iter(one["tools"].values()))["cost_us"] for one in rounds]
    return {
        "tools": job.tools,
        "busy": job.busy,
        "counter_ms": 1e3 * job.sources[0].period_s,
        "cost_us": {name: statistics.median(call[name] for call in calls) for name in ("median", "p95")},
        **{name: statistics.median(one[name] for one in rounds) for name in ("child_core_share", "threads_core_share")},
        "sampler_rounds": [one["child_core_share"] + one["threads_core_share"] for one in rounds],
    }


def main() -> None:
    """Runs everything and writes ``results/<device>/accuracy.*``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one minute: fewer phases and steps")
    quick = parser.parse_args().quick
    begun = time.monotonic()
    prepare()
    phases = 3 if quick else PHASES
    idle_s = {0.053: 4.0, 0.19: 6.0} if quick else IDLE_S
    busy_s = {0.053: 4.0} if quick else BUSY_S
    # Few at a time, so that no process waits for a core; a busy main thread leaves one core of two to its sampler.
    results = run_all(plan("windows", idle_s, phases, 1, busy=False), slots=5)
    results += run_all(plan("codecarbon", idle_s, phases, 2, busy=False), slots=4)
    results += run_all(plan("windows", busy_s, phases, 2, busy=True), slots=1)
    results += run_all(plan("codecarbon", busy_s, phases, 2, busy=True), slots=2)
    cost_jobs = [
        Job(tools, 0.053, 4.0 if tools == "green auto" and not busy else 2.0, busy, (Source("training", period_s, 0),))
        for tools in COSTS
        for busy in (False, True)
        for period_s in PERIODS_S
        if period_s == PERIODS_S[1] or (tools == "green auto" and not busy)
        if not (quick and busy)
    ]
    rounds: dict[Job, list[dict[str, Any]]] = defaultdict(list)
    for job, result in run_all(cost_jobs * (1 if quick else ROUNDS), slots=1):
        rounds[job].append(result)
    costs = [_cost(job, found) for job, found in rounds.items()]
    cells = collect(results)
    means = {
        cell: {
            tool: {
                name: over(found, value)
                for name, value in (MEASURES | {k: (lambda p, k=k: p[k]) for k in ONLY_OURS if k in found[0]}).items()
            }
            for tool, found in tools.items()
        }
        for cell, tools in cells.items()
    }
    targets = verdicts(means, cells, costs)
    write(
        "accuracy" + ("-quick" if quick else ""),
        "Joules of single steps against a known truth",
        _body(means, targets, costs, phases, time.monotonic() - begun),
        {
            "phases": phases,
            "targets": targets,
            "costs": costs,
            "cells": [
                {"busy": cell[0], "wave": cell[1], "counter_ms": 1e3 * cell[2], "step_ms": 1e3 * cell[3], "tools": tools}
                for cell, tools in means.items()
            ],
        },
    )


def _body(
    means: dict[Cell, dict[str, dict[str, Value]]],
    targets: list[dict[str, Any]],
    costs: list[dict[str, Any]],
    phases: int,
    took_s: float,
) -> str:
    targets_table = table(
        ["target", "met", "measured"],
        [[t["target"], {True: "yes", False: "**no**", None: "–"}[t["met"]], t["measured"]] for t in targets],
    )
    costs_table = table(
        [
            "tool alone, 1 GPU, 53 ms steps",
            "main thread",
            "counter ms",
            "median µs",
            "95th µs",
            "sampler's child, of a core",
            "its threads",
        ],
        [
            [
                c["tools"],
                "busy" if c["busy"] else "idle",
                f"{c['counter_ms']:.0f}",
                f"{c['cost_us']['median']:.0f}",
                f"{c['cost_us']['p95']:.0f}",
                "–" if math.isnan(c["child_core_share"]) else f"{c['child_core_share']:.2%}",
                f"{c['threads_core_share']:.2%}" if c["tools"].startswith("green") else "–",
            ]
            for c in sorted(costs, key=lambda c: (c["busy"], COSTS.index(c["tools"]), c["counter_ms"]))
        ],
    )
    return f"""## Targets

{targets_table}

## Idle main thread

Each column reads: {" / ".join(TOOLS)}. Mean over {phases} random counter phases ± standard error.

{tables(means, busy=False)}

## Busy main thread (plain Python that holds the interpreter lock)

{tables(means, busy=True)}

## Cost on the main thread

{costs_table}

Medians of {len(costs[0]["sampler_rounds"])} rounds in turn. "green": a record per step; "green auto": records thin out, as by default; "green thread": without the child process.

## How

The training-like wave (90 to 380 W) is in step with the loop: a wait, forward, backward, optimizer, with 4 % noise on each and a slow
drift. The square wave (60 and 300 W, {1e3 * SQUARE_S:.0f} ms) is not: no tool can know within a counter period when it jumped. The
counter updates up to 2 % of its period late; a reading costs {1e6 * CALL_S:.0f} µs; the instant power (zeus's approximation) is a mean over
10 ms (20 ms counter) or 25 ms (100 ms) and is renewed with the counter. Steps are true joules between the tool's own marks: zeus's and
codecarbon's windows leave the time of their calls out, and are not charged for it. Total: zeus by one window over the steps,
ours and codecarbon's the sum of the steps; where the steps take whole counter periods zeus's errors at both ends are equal and cancel. Errors are relative to the mean step, the 10 steps, the total; the bounds' half width to the step. Tools run 1.5 s (codecarbon 0.2 s)
before the first step that counts. Half width: of the bounds, mean. Straight lines: between the counter's updates, each known exactly,
with no reading and no learning: what the counter tells to whoever knows nothing of the wave. It took {took_s / 60:.1f} minutes."""


if __name__ == "__main__":
    main()
