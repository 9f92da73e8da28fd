"""SIGKILL at any instant, a full disk, rivals in one directory and many ranks: no earlier record is ever lost."""

from __future__ import annotations

import subprocess
import sys
import zlib
from typing import TYPE_CHECKING

import pytest

from green_torch import ledger
from green_torch.ledger import Status
from green_torch.sinks.jsonl import read_jsonl, read_last

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RUNS, RANKS, RIVALS = 5, 5, 2  # 50 processes

TRAIN = """
import os, random, signal, sys, time, warnings, zlib
from pathlib import Path
import green_torch
from green_torch.clock import HostClock
from green_torch.sinks.jsonl import JsonlSink, run_file
from green_torch.testing import ScriptedMeter
import green_torch.intensity, green_torch.tracker  # before anybody forks

class Telling:
    '''Passes everything on, and tells into a pipe how much has reached the file.'''
    def __init__(self, sink, pipe):
        self.sink, self.pipe = sink, pipe
    def write(self, item):
        self.sink.write(item)
        content = self.sink.path.read_bytes()
        os.write(self.pipe, f"{os.getpid()}\\t{self.sink.path}\\t{len(content)}\\t{zlib.crc32(content)}\\n".encode())
    def close(self):
        self.sink.close()

def train(sink, steps):
    clock = HostClock()
    meter = ScriptedMeter(clock, {"gpu0": 300.0})
    tracker = green_torch.track(clock=clock, meters=[meter], sinks=[sink], intensity=100, log_every_n_steps=1)
    with tracker:
        for step in range(steps):
            time.sleep(0.002)
            tracker.step(tokens=10)
    return tracker.summary()
"""

KILLED = (
    TRAIN
    + """
top, runs, ranks, rivals = Path(sys.argv[1]), *map(int, sys.argv[2:])
random.seed(7)
for run in range(runs):
    reader, writer = os.pipe()
    left = {}  # process -> how many lines it may still write
    for rank in range(ranks):
        for _ in range(rivals):
            pid = os.fork()
            if not pid:
                train(Telling(JsonlSink(run_file(top / f"run-{run}", rank, 1)), writer), 1_000_000)
                os._exit(1)
            left[pid] = random.randrange(1, 80)
    os.close(writer)
    with os.fdopen(reader) as lines:
        for line in lines:  # until the last child is dead
            sys.stdout.write(line)
            pid = int(line.split("\\t")[0])
            left[pid] -= 1
            if not left[pid]:
                time.sleep(random.uniform(0, 0.02))
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
"""
)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, int]]]:
    """Fifty processes, two of every rank in each directory, killed at random; and what each file held when it was last told."""
    top = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILLED, str(top), str(RUNS), str(RANKS), str(RIVALS)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr
    told = {}
    for line in ran.stdout.splitlines():
        _, path, size, checksum = line.split("\t")
        told[path] = int(size), int(checksum)
    return top, told


def test_fifty_kills_cost_no_record_that_had_reached_the_disk(killed: tuple[Path, dict[str, tuple[int, int]]]) -> None:
    """Every file begins with the very bytes that had been flushed; its records follow one another, and their joules sum to the totals."""
    top, told = killed
    paths = sorted(top.glob("*/green/*.jsonl"))
    assert len(paths) == RUNS * RANKS * RIVALS
    assert {path.name.split(".")[1] for path in paths} == {"segment-0001", "segment-0002"}
    n_records = 0
    for path in paths:
        content = path.read_bytes()
        size, checksum = told.get(str(path), (0, 0))
        assert zlib.crc32(content[:size]) == checksum
        if not content.partition(b"\n")[1]:
            continue  # killed before its first line
        run = read_jsonl(path)
        assert [record.step for record in run.records] == list(range(len(run.records)))
        assert run.summary is None
        assert not content[:size] or content[:size].endswith(b"\n")
        if run.records:
            n_records += len(run.records)
            last = read_last(path)
            assert last.records[0] == run.records[-1]
            assert last.manifest == run.manifest
            assert sum(record.energy_j or 0.0 for record in run.records) == pytest.approx(run.records[-1].totals.energy_j)
    assert n_records > 20 * RUNS * RANKS * RIVALS  # the instants were worth their name


def test_the_ledger_counts_what_the_killed_runs_used(killed: tuple[Path, dict[str, tuple[int, int]]]) -> None:
    """Once they have been silent for long enough they are killed, and their joules are those of their last whole lines."""
    top, _ = killed
    now_unix_ns = max(path.stat().st_mtime_ns for path in top.glob("*/green/*.jsonl"))
    found = ledger.read(top, now_unix_ns=now_unix_ns + 3600 * 10**9)
    assert {run.status for run in found.runs} == {Status.KILLED}
    assert len({segment.path for run in found.runs for segment in run.segments}) + len(found.skipped) == RUNS * RANKS * RIVALS
    expected = 0.0
    for segment in (one for run in found.runs for one in run.segments):
        records = read_jsonl(segment.path).records
        expected += (records[-1].totals.energy_j or 0.0) if records else 0.0
    assert sum(run.wasted.energy_j or 0.0 for run in found.runs) == pytest.approx(expected)
    assert expected > 0
    assert {run.status for run in ledger.read(top, now_unix_ns=now_unix_ns).runs} == {Status.RUNNING}


FULL = (
    TRAIN
    + """
path = Path(sys.argv[1])
if sys.argv[2] == "limit":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    summary = train(JsonlSink(path), 100)
print(summary.status, summary.n_steps, summary.totals.energy_j > 0)
print([str(one.message) for one in said])
"""
)


@pytest.fixture(params=["tmpfs", "limit"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory that holds no more than 20 kB: a tmpfs where we may mount one, or a limit on the size of a file."""
    if request.param == "limit":
        yield tmp_path, "limit"
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", tmp_path], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield tmp_path, "tmpfs"
    subprocess.run(["umount", tmp_path], check=True)


def test_training_goes_on_when_the_disk_is_full(small_disk: tuple[Path, str]) -> None:
    """All steps are taken and summed up, one warning says that the file is no longer written, and its earlier records are whole."""
    folder, kind = small_disk
    path = folder / "green" / "rank-00000.segment-0001.jsonl"
    ran = subprocess.run([sys.executable, "-c", FULL, path, kind], capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr
    ended, said = ran.stdout.splitlines()
    assert ended == "completed 100 True"
    assert said.count("JsonlSink is switched off: OSError") == 1
    run = read_jsonl(path)
    assert len(run.records) >= 5
    assert [record.step for record in run.records] == list(range(len(run.records)))
    assert run.summary is None
    assert path.stat().st_size <= 20_480
    (found,) = ledger.read(folder, now_unix_ns=path.stat().st_mtime_ns + 3600 * 10**9).runs
    assert found.totals == run.records[-1].totals
