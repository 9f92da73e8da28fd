"""The ledger's cost: the totals of 10,000 runs of 1,000 records, and the size of a run of a million steps at default settings.

``python benchmarks/ledger.py`` writes the runs into a temporary directory, reports them with the command line in a process of its own,
and measures that process's time and peak memory. Of the runs 5 % failed, 10 % were killed (no summary) and 2 % were killed and resumed
from a checkpoint. Records are what a GPU's run leaves: two domains, FLOPs, tokens. Totals read the ends of files alone, so between its
first and its last records a file has a hole in place of the records there, except where a resume makes the ledger search for a step:
those are whole. ``--whole`` writes every record of every file (about 18 GB).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from report import table, write

import green_torch
from green_torch.sinks.codec import to_dict
from green_torch.sinks.jsonl import JsonlSink, run_file
from green_torch.testing import MemorySink, ScriptedClock, ScriptedMeter

if TYPE_CHECKING:
    from green_torch.records import Manifest, RunSummary, StepRecord

DAY_NS = 86_400 * 10**9
TARGET_S, TARGET_MB, TARGET_RUN_MB = 10.0, 500.0, 50.0


class Script:
    """A real tracker's manifest, records and summary, to be told again as other runs'."""

    def __init__(self, n_records: int) -> None:
        clock = ScriptedClock()
        meter = ScriptedMeter(clock, {"gpu0": 600.0, "cpu": 80.0}, interval_s=1.0)
        sink = MemorySink()
        with green_torch.track(
            clock=clock,
            meters=[meter],
            sinks=[sink],
            intensity=56.0,
            region="FR",
            embodied=164.0,
            flops_per_step=4e13,
            peak_flop_per_s=989e12,
            log_every_n_steps=1,
        ) as tracker:
            for _ in range(n_records):
                clock.advance(1.0)
                tracker.step(tokens=8192, samples=8)
        assert sink.manifest is not None
        assert sink.summary is not None
        self.manifest: Manifest = sink.manifest
        self.records: list[StepRecord] = sink.records
        self.summary: RunSummary = sink.summary
        self.lines = [_line(record) for record in self.records]
        self.checkpoint = n_records * 2 // 3
        self.next_day = [  # after a resume
            _line(replace(one, segment=2, step=one.step + self.checkpoint + 1, time_unix_ns=one.time_unix_ns + DAY_NS))
            for one in self.records
        ]

    def write(self, path: Path, manifest: Manifest, lines: list[bytes], status: str | None, *, whole: bool) -> None:
        """A file with these records; with a hole between a few of them unless ``whole``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(_line(manifest))
            if whole:
                file.writelines(lines)
            else:
                file.writelines(lines[:3])
                file.seek(sum(map(len, lines[3:-20])) - 1, 1)
                file.write(b"\n")
                file.writelines(lines[-20:])
            if status:
                file.write(_line(replace(self.summary, manifest=manifest, status=status)))
        os.utime(path, (0, 0))  # long ago, so that a run without an end was killed


def _line(item: Manifest | StepRecord | RunSummary) -> bytes:
    return json.dumps(to_dict(item), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def fill(top: Path, n_runs: int, n_records: int, *, whole: bool) -> int:
    """Writes the runs; returns how many bytes their files are long."""
    script = Script(n_records)
    size = 0
    for number in range(n_runs):
        folder = top / f"project-{number % 20:02d}" / f"run-{number:05d}"
        manifest = replace(
            script.manifest,
            run_id=f"{number:012x}",
            run_name=folder.name,
            model=("GPT", "ResNet", "Whisper")[number % 3],
            started_unix_ns=script.manifest.started_unix_ns + number * DAY_NS // 30,
        )
        kind = number % 100
        status = "failed" if kind < 5 else None if kind < 17 else "completed"
        resumed = 15 <= kind < 17
        if resumed:  # the instants of the records tell which start came first
            manifest = replace(manifest, started_unix_ns=script.manifest.started_unix_ns)
        first = run_file(folder, 0, 1)
        script.write(first, manifest, script.lines, status, whole=whole or resumed)
        size += first.stat().st_size
        if resumed:
            later = replace(
                manifest,
                segment=2,
                resumed_from_step=script.checkpoint,
                previous_segment=1,
                started_unix_ns=manifest.started_unix_ns + DAY_NS,
            )
            second = run_file(folder, 0, 2)
            script.write(second, later, script.next_day, "completed", whole=True)
            size += second.stat().st_size
    return size


def report(top: Path) -> tuple[float, float, float, dict[str, object]]:
    """Seconds, seconds of processor time and peak MB (VmHWM, kB there) of ``green-torch report`` in a process of its own, and what it said."""
    command = [sys.executable, "-m", "green_torch.cli", "report", str(top)]
    started = time.perf_counter()
    subprocess.run([*command, "--format", "json", "--output", str(top / "report.json")], check=True)
    json_s = time.perf_counter() - started
    code = (
        "import re, runpy, sys\n"
        f"sys.argv = {['green-torch', 'report', str(top)]!r}\n"
        "try:\n    runpy.run_module('green_torch.cli', run_name='__main__')\n"
        "finally:\n    print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr)\n"
    )
    started, spent_s = time.perf_counter(), _children_s()
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    table_s, cpu_s = time.perf_counter() - started, _children_s() - spent_s
    found = json.loads((top / "report.json").read_text(encoding="utf-8"))
    return (
        table_s,
        cpu_s,
        float(ran.stderr.split()[-1]) * 1.024e-3,
        {"json_s": json_s, "runs": len(found["runs"]), "status": found["all"]["status"]},
    )


def _children_s() -> float:
    """Processor time, seconds, of the processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def million(n_steps: int, step_s: float) -> tuple[float, int]:
    """MB and records of a run of so many steps at the default cadence."""
    folder = Path(tempfile.mkdtemp())
    try:
        clock = ScriptedClock()
        meter = ScriptedMeter(clock, {"gpu0": 600.0, "cpu": 80.0}, interval_s=10.0)
        sink = JsonlSink(run_file(folder, 0, 1))
        with green_torch.track(
            clock=clock,
            meters=[meter],
            sinks=[sink],
            intensity=56.0,
            embodied=164.0,
            flops_per_step=4e13,
            peak_flop_per_s=989e12,
        ) as tracker:
            for _ in range(n_steps):
                clock.advance(step_s)
                tracker.step(tokens=8192, samples=8)
        with sink.path.open("rb") as file:
            n_lines = sum(1 for _ in file)
        return sink.path.stat().st_size / 1e6, n_lines
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Measures and writes the result."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=10_000)
    arguments.add_argument("--records", type=int, default=1_000)
    arguments.add_argument("--steps", type=int, default=1_000_000)
    arguments.add_argument("--whole", action="store_true", help="write every record of every file")
    arguments.add_argument("--dry", action="store_true", help="print, and write no result")
    given = arguments.parse_args()
    top = Path(tempfile.mkdtemp(prefix="green-ledger-"))
    try:
        size = fill(top, given.runs, given.records, whole=given.whole)
        seconds, cpu_s, megabytes, said = report(top)
    finally:
        shutil.rmtree(top)
    run_mb, n_lines = million(given.steps, 0.1)
    rows = [
        [
            f"totals of {given.runs:,} runs × {given.records:,} records ({size / 1e9:.1f} GB{'' if given.whole else ', mostly holes'})",
            f"{seconds:.1f} s ({cpu_s:.1f} s of processor time)",
            f"< {TARGET_S:g} s",
        ],
        ["the same, peak memory", f"{megabytes:.0f} MB", f"< {TARGET_MB:g} MB"],
        [f"a run of {given.steps:,} steps of 0.1 s ({n_lines:,} lines)", f"{run_mb:.1f} MB on disk", f"< {TARGET_RUN_MB:g} MB"],
    ]
    body = table(["what", "measured", "target"], rows) + (
        "\n\n`green-torch report DIR` in a process of its own, its start and the table included; files in the page cache. "
        f"With `--format json`: {said['json_s']:.1f} s."
    )
    if given.dry:
        print(body, said)
        return
    write(
        "ledger",
        "The ledger's cost",
        body,
        {
            "bytes": size,
            "table_s": seconds,
            "table_cpu_s": cpu_s,
            "peak_mb": megabytes,
            "run_mb": run_mb,
            "run_lines": n_lines,
            **said,
        },
    )


if __name__ == "__main__":
    main()
