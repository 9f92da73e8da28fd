"""GreenMonitor on two ranks: real processes over gloo, by Lightning's DDP, spawned and launched, and by its FSDP2 strategy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from green_torch import ledger
from green_torch.sinks.jsonl import RunFile, read_jsonl, run_files
from tests.lightning_bench import events, steps_of
from tests.lightning_ranks import BATCH, POWER_W, STEPS
from tests.processes import forked_ranks, preload
from tests.test_lightning_loggers import PER_STEP, column, csv_rows

preload("tests.lightning_ranks")

SCRIPT = Path(__file__).parent / "lightning_ranks.py"
EXAMPLE = Path(__file__).parent.parent / "examples" / "fsdp_lightning.py"


def fit(directory: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(directory), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment, cwd=directory)


def of_each_rank(directory: Path) -> list[RunFile]:
    """The two files of a fit: both in the directory that rank zero chose."""
    files = run_files(directory)
    assert [rank for _, rank, _ in files] == [0, 1]
    return [read_jsonl(path) for path, _, _ in files]


def check(ranks: list[RunFile], first_step: int = 0) -> None:
    """Each rank measured its own power on the same steps, under one run id, and rank zero has the sums."""
    assert len({run.manifest.run_id for run in ranks}) == 1
    for run, power_w in zip(ranks, POWER_W, strict=True):
        assert run.summary.status == "completed"
        assert run.manifest.world_size == 2
        train = [record for record in run.records if record.phase == "train"]
        assert [record.step for record in train] == list(range(first_step, STEPS))
        assert all(record.samples == BATCH for record in train)
        totals = run.summary.totals
        assert totals.energy_lo_j <= power_w * totals.duration_s <= totals.energy_hi_j
        assert totals.energy_j == pytest.approx(power_w * totals.duration_s, abs=power_w * 0.3)  # a loaded machine reads late
    job = ranks[0].summary.job
    assert job.reporting == 2
    assert job.energy_j == pytest.approx(sum(run.summary.totals.energy_j for run in ranks), abs=0.01)
    assert ranks[1].summary.job is None


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_each_rank_meters_its_own(tmp_path, strategy):
    """Launched or spawned: the ranks' files share rank zero's directory; values and loss are logged by rank zero alone, once a step."""
    done = fit(tmp_path, strategy)
    assert done.returncode == 0, done.stderr
    ranks = of_each_rank(tmp_path / "exp" / "version_0")
    check(ranks)
    train = [record for record in ranks[0].records if record.phase == "train"]
    known = [
        record.step for record in train if record.job.per_step is not None
    ]  # a rank that starves is waited for two seconds
    assert known == list(range(known[0], STEPS))
    found = events(tmp_path / "exp" / "version_0")
    assert steps_of(found, "train_loss") == steps_of(found, "green/step_time_s") == list(range(STEPS))
    assert steps_of(found, PER_STEP) == known == list(column(csv_rows(tmp_path / "csv" / "version_0"), PER_STEP))
    assert ("no run in this process yet" if strategy == "ddp_spawn" else "all ranks    2 of 2 report") in done.stdout


def test_a_rank_that_raises(tmp_path):
    """Rank 1 raises in step 6: the job ends as Lightning ends it, and what rank 1 measured is on disk, closed as failed."""
    done = fit(tmp_path, "ddp", "--raise", "1")
    assert done.returncode != 0
    assert "rank is broken" in done.stderr + done.stdout
    ranks = of_each_rank(tmp_path / "exp" / "version_0")
    assert ranks[1].summary.status == "failed"
    assert [record.step for record in ranks[1].records if record.phase == "train"] == list(range(6))


def test_a_monitor_on_rank_zero_alone(tmp_path):
    """It has no collective in which the other rank would be missed: the fit ends as ever, and rank zero's file is whole."""
    options = [str(tmp_path), "ddp", "--only", "0"]
    ended = forked_ranks("tests.lightning_ranks", options, tmp_path, TORCHELASTIC_RUN_ID="none")
    assert [rank[0] for rank in ended] == [0, 0], ended
    ((path, rank, _),) = run_files(tmp_path / "exp" / "version_0")
    run = read_jsonl(path)
    assert (rank, run.summary.status, run.summary.n_steps) == (0, "completed", STEPS)


def test_a_sharded_fit_goes_on_from_its_checkpoint(tmp_path):
    """FSDP2, which restores after set-up, after a rank has raised: both go on in another directory, and each step is useful once."""
    for options, code in (["--raise", "1"], 1), (["--ckpt", str(tmp_path / "ckpt" / "step=4.ckpt")], 0):
        ended = forked_ranks("tests.lightning_ranks", [str(tmp_path), "fsdp", *options], tmp_path, TORCHELASTIC_RUN_ID="none")
        assert [rank[0] for rank in ended] == [code, code], ended
    first, second = (of_each_rank(tmp_path / "exp" / f"version_{number}") for number in (0, 1))
    check(second, first_step=4)
    assert {run.manifest.run_id for run in (*first, *second)} == {first[0].manifest.run_id}
    assert {run.manifest.resumed_from_step for run in second} == {3}
    (run,) = ledger.read(tmp_path / "exp").runs
    per_rank = [
        sum(part.useful.phase("train").n_steps for part in run.segments if part.manifest.rank == rank) for rank in (0, 1)
    ]
    assert per_rank == [STEPS, STEPS]


def test_the_sharded_example(tmp_path):
    """It trains on two ranks over gloo and prints the sums; energy, MFU and the loss stand on the same steps in one event file."""
    command = [sys.executable, str(EXAMPLE), "--steps", "4", "--log-dir", str(tmp_path / "runs")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "all ranks    2 of 2 report" in done.stdout
    assert f"tensorboard --logdir {tmp_path / 'runs'}" in done.stdout
    ranks = of_each_rank(tmp_path / "runs" / "version_0")
    for run in ranks:
        train = [record for record in run.records if record.phase == "train"]
        assert [record.step for record in train] == list(range(4))
        assert all(record.tokens == 8 * 64 for record in train)
        assert train[-1].model_flops
    found = events(tmp_path / "runs" / "version_0")
    assert steps_of(found, "train_loss") == steps_of(found, "green/step_time_s") == list(range(4))
