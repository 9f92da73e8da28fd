"""Runs for the tests of the Green tab: real event files, written by the real sinks, on a scripted clock with a scripted meter."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import green_torch
from green_torch.records import Method
from green_torch.sinks.snapshot import MAX_BLOCKS
from green_torch.sinks.tensorboard import PLUGIN_NAME, SNAPSHOT_TAG, TensorBoardSink
from green_torch.testing import MemorySink, ScriptedClock, ScriptedMeter
from tests.test_sinks_codec import MANIFEST, make_record, make_summary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from green_torch.records import Manifest, StepRecord

TOKENS = 8192
FLOPS = 7.0e12


class _ScriptedError(Exception):
    """What ends a run that is to fail."""


def write_run(
    log_dir: Path,
    *,
    power_w: Mapping[str, float | Callable[[float], float]] | None = None,
    step_s: float = 0.5,
    n_steps: int = 60,
    seed: int = 0,
    method: Method = Method.COUNTER,
    label: str | None = None,
    loss_tag: str = "train/loss",
    loss_scale: float = 1.0,
    evaluations: int = 2,
    fail: bool = False,
    start_s: float = 0.0,
    comparison: Mapping[str, Any] | None = None,
    **track: Any,
) -> MemorySink:
    """A training of ``n_steps`` steps that each take about ``step_s``, with evaluations on the way; what the sinks were told."""
    clock = ScriptedClock(epoch_unix_ns=(1_790_000_000 + int(start_s)) * 1_000_000_000)
    meter = ScriptedMeter(clock, power_w or {"gpu0": 400.0}, method=method, period_s=0.1)
    meter.domains = tuple(replace(domain, uuid=f"one {domain.name} of all runs") for domain in meter.domains)
    sink, noise = MemorySink(), random.Random(seed)
    settings: dict[str, Any] = {"region": "FR", "pue": 1.2, "flops_per_step": FLOPS, "peak_flop_per_s": 312e12} | track
    with (
        suppress(_ScriptedError),
        green_torch.track(
            log_dir=log_dir,
            run_name=log_dir.name,
            label=label or log_dir.name,
            clock=clock,
            meters=[meter],
            sinks=[sink],
            log_every_n_steps=1,
            **settings,
        ) as tracker,
    ):
        for step in range(n_steps):
            clock.advance(step_s * math.exp(noise.gauss(0, 0.03)))
            tracker.step(tokens=TOKENS)
            loss = loss_scale * (2.0 + 5.0 * math.exp(-step / 25) + noise.gauss(0, 0.05))
            tracker.writer.add_scalar(loss_tag, loss, step)
            if evaluations and (step + 1) % max(1, n_steps // evaluations) == 0:
                with tracker.phase("eval"):
                    clock.advance(4 * step_s)
        if comparison is not None:
            TensorBoardSink(tracker.writer).write_comparison(comparison, n_steps)
        if fail:
            raise _ScriptedError
    return sink


def write_many(log_dir: Path, runs: int, points: int) -> None:
    """Runs of that many records, for scale: the early ones are shared, the last 200 (as many as a snapshot has blocks) are each run's own."""
    n_own = min(points, MAX_BLOCKS)
    early = None
    for number in range(runs):
        folder = log_dir / f"run-{number:03}"
        if points > n_own and early is None:
            write_records(folder, MANIFEST, (_like(step, 0) for step in range(1, points - n_own + 1)))
            (found,) = folder.glob("events.*")
            early = found.rename(folder / "events.out.tfevents.0000000001.early")  # in order of names: before its own
        elif early is not None:
            folder.mkdir()
            os.link(early, folder / early.name)
        own = [_like(step, number) for step in range(points - n_own + 1, points + 1)]
        write_records(folder, replace(MANIFEST, label=folder.name, run_name=folder.name), own, ended=True)


def _like(step: int, number: int) -> StepRecord:
    """A record that is no other run's, and scatters."""
    return make_record(step, energy_j=30.0 + number / 20 + (step * 7919 % 13) / 10, emissions_g=1e-3 + number * 1e-6)


def write_records(folder: Path, manifest: Manifest, records: Iterable[StepRecord], *, ended: bool = False) -> None:
    """Records through the sink, with a loss beside, and a summary where the run has ended."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), max_queue=10_000)
    sink = TensorBoardSink(writer, detail=not ended)
    sink.write(manifest)
    for record in records:
        sink.write(record)
        writer.add_scalar("loss", 2.0 + 5.0 / (1 + record.step / 100), record.step)
    if ended:
        sink.write(make_summary(record, manifest=manifest))
    writer.close()


def write_snapshot(folder: Path, content: bytes) -> None:
    """An event file whose snapshot is these bytes."""
    from tensorboard.compat.proto import summary_pb2, types_pb2
    from torch.utils.tensorboard import SummaryWriter

    event = summary_pb2.Summary()
    value = event.value.add(tag=SNAPSHOT_TAG)
    value.metadata.plugin_data.plugin_name = PLUGIN_NAME
    value.metadata.data_class = summary_pb2.DATA_CLASS_TENSOR
    value.tensor.dtype = types_pb2.DT_STRING
    value.tensor.string_val.append(content)
    writer = SummaryWriter(str(folder))
    writer.file_writer.add_summary(event, 1)
    writer.close()


def write_damage(folder: Path) -> None:
    """A file that is called like an event file and is none."""
    folder.mkdir()
    (folder / "events.out.tfevents.1.x").write_bytes(b"\x18\0\0\0no event file" * 50)


@contextmanager
def tensorboard(log_dir: Path, *flags: str, prefix: str = "") -> Iterator[str]:
    """A real TensorBoard on loopback, its address; ends with the block. ``flags`` as on its command line."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir), "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen([*command, "--reload_interval=1", *flags], stdout=told, stderr=told)
        address = f"http://127.0.0.1:{port}{prefix}"
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{address}/data/plugins_listing", timeout=10).read()
                    break
                except OSError:
                    if process.poll() is not None:
                        break
                    time.sleep(0.1)
            else:
                process.kill()
            if process.poll() is not None:
                told.seek(0)
                raise RuntimeError(told.read().decode())
            yield address
        finally:
            process.terminate()
            process.wait(20)


def ask(address: str, path: str, **parameters: str | list[str]) -> Any:
    """What the tab's server answers, as JSON without NaN."""
    query = f"?{urllib.parse.urlencode(parameters, doseq=True)}" if parameters else ""
    with urllib.request.urlopen(f"{address}/data/plugin/green/{path}{query}", timeout=60) as answer:
        return json.loads(answer.read(), parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def wait_for_runs(address: str, wanted: int, *, ended: bool = True, timeout_s: float = 60.0) -> list[dict[str, Any]]:
    """The runs, once TensorBoard has read so many of them (to their summaries, where they have ended)."""
    until = time.monotonic() + timeout_s
    while True:
        runs: list[dict[str, Any]] = ask(address, "runs").get("runs", [])
        read = [run for run in runs if not ended or "problem" in run or run["snapshot"].get("status") != "running"]
        if len(read) >= wanted:
            return runs
        assert time.monotonic() < until, f"{len(read)} of {wanted} runs after {timeout_s} s"
        time.sleep(0.2)
