"""GreenMonitor on two ranks: real processes over gloo, by Lightning's DDP, spawned and launched, and by its FSDP2 strategy.

The joules are known, so that totals are compared with the truth to the joule.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from green_torch import ledger
from green_torch.sinks.jsonl import RunFile, read_jsonl, read_last, run_file, run_files
from tests.lightning_bench import CLOSE, events, steps_of
from tests.lightning_ranks import BATCH, BROKEN, CPU_J, FEWER, GPU_J, SCRIPTED_CPU_W, SCRIPTED_W, STEPS
from tests.processes import forked_ranks, preload
from tests.test_lightning_loggers import PER_STEP, column, csv_rows

preload("tests.lightning_ranks")

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "fsdp_lightning.py"
STEP_J = (GPU_J[0] + CPU_J, GPU_J[1])  # the node's CPU is counted once, by rank 0


def joules(*steps: int) -> Any:
    """What so many steps take by rank, to half a joule."""
    return pytest.approx(sum(n * step_j for n, step_j in zip(steps, STEP_J, strict=True)), abs=0.5)


def fit(directory: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Two ranks, started by Lightning."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.lightning_ranks", str(directory), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment, cwd=directory)


def forked(directory: Path, *options: str) -> list[tuple[int, str, str]]:
    """Two ranks that nobody else ends, as torchrun's agents on two nodes start them."""
    return forked_ranks("tests.lightning_ranks", [str(directory), *options], directory, TORCHELASTIC_RUN_ID="none")


def of_each_rank(directory: Path) -> list[RunFile]:
    """The two files of a fit: both in the directory that rank zero chose."""
    files = run_files(directory)
    assert [rank for _, rank, _ in files] == [0, 1]
    return [read_jsonl(path) for path, _, _ in files]


def check(ranks: list[RunFile], first_step: int = 0) -> None:
    """Each rank measured its own joules on the same steps, under one run id, and rank zero has the sums."""
    assert len({run.manifest.run_id for run in ranks}) == 1
    n_steps = STEPS - first_step
    for rank, run in enumerate(ranks):
        assert run.summary.status == "completed"
        assert run.manifest.world_size == 2
        train = [record for record in run.records if record.phase == "train"]
        assert [record.step for record in train] == list(range(first_step, STEPS))
        assert all(record.samples == BATCH for record in train)
        totals = run.summary.totals
        assert totals.energy_j == pytest.approx(n_steps * STEP_J[rank], abs=0.5)
        assert totals.energy_lo_j <= totals.energy_j <= totals.energy_hi_j
    assert [[domain.name for domain in run.manifest.domains] for run in ranks] == [["gpu", "cpu"], ["gpu"]]
    job = ranks[0].summary.job
    assert job.reporting == 2
    assert job.energy_j == joules(n_steps, n_steps)
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
    """Rank 1 raises in step 6: the job ends as Lightning ends it, rank 1's file is closed as failed, and each joule is in the sums."""
    done = fit(tmp_path, "ddp", "--raise", "1")
    assert done.returncode != 0
    assert "rank is broken" in done.stderr + done.stdout
    ranks = of_each_rank(tmp_path / "exp" / "version_0")
    assert [run.summary.status for run in ranks] == ["failed", "failed"]
    assert [record.step for record in ranks[1].records if record.phase == "train"] == list(range(BROKEN))
    assert ranks[0].summary.job.energy_j == joules(BROKEN + 1, BROKEN)  # rank 0 was in its step when it heard
    assert ranks[0].summary.job.ended == 2


def test_a_rank_with_fewer_batches(tmp_path):
    """Rank 1, by DDP's join, ends after 5 of 12 steps: nobody hangs, and each joule is in the sums."""
    ended = forked(tmp_path, "ddp", "--fewer")
    assert [code for code, _, _ in ended] == [0, 0], ended
    ranks = of_each_rank(tmp_path / "exp" / "version_0")
    assert [run.summary.totals.phase("train").n_steps for run in ranks] == [STEPS, FEWER]
    assert ranks[0].summary.job.energy_j == joules(STEPS, FEWER)
    assert ranks[0].summary.job.ended == 2


@pytest.mark.parametrize("killed", [1, 0])
def test_a_rank_that_is_killed(tmp_path, killed):
    """SIGKILL in step 6: the other rank ends by Lightning's own error, with its joules on disk and, on rank 0, those rank 1 had told."""
    ended = forked(tmp_path, "ddp", "--kill", str(killed))
    assert [code for code, _, _ in ended] == ([1, -9] if killed else [-9, 1]), ended
    directory = tmp_path / "exp" / "version_0"
    survivor, dead = (read_last(run_file(directory, rank, 1)) for rank in (1 - killed, killed))
    assert survivor.manifest.run_id == dead.manifest.run_id
    assert survivor.summary.status == "failed"
    assert survivor.summary.totals.energy_j == pytest.approx((BROKEN + 1) * STEP_J[1 - killed], abs=0.5)
    assert dead.summary is None
    assert dead.records[-1].step == BROKEN - 1
    if killed:
        job = survivor.summary.job
        assert (job.reporting, job.ended, job.oldest_rank) == (2, 1, 1)
        told_j = job.energy_j - (BROKEN + 1) * STEP_J[0]  # by rank 1, up to a record before it was killed
        assert (BROKEN - 1) * STEP_J[1] - 0.5 <= told_j <= BROKEN * STEP_J[1] + 0.5


def test_useful_joules_after_a_resume(tmp_path):
    """Both ranks leave in step 10 and go on from the checkpoint at 8: their useful joules, phase by phase, are a run's that never stopped."""
    ended = forked(tmp_path, "resumed")
    assert [code for code, _, _ in ended] == [0, 0], ended
    (cut,), (whole,) = (ledger.read(tmp_path / name / "run").runs for name in ("cut", "whole"))
    assert [(one.manifest.rank, one.manifest.segment) for one in cut.segments] == [(0, 1), (1, 1), (0, 2), (1, 2)]
    step_j = 0.2 * (sum(SCRIPTED_W) + SCRIPTED_CPU_W)
    assert whole.useful.phase("train").energy_j == pytest.approx(14 * step_j, rel=CLOSE)
    assert {phase.phase: phase.energy_j for phase in cut.useful.phases} == pytest.approx(
        {phase.phase: phase.energy_j for phase in whole.useful.phases}, rel=CLOSE
    )
    assert cut.useful.phase("train").samples == whole.useful.phase("train").samples
    job = read_last(run_file(tmp_path / "cut" / "run", 0, 2)).summary.job
    assert cut.totals.energy_j == pytest.approx(
        job.energy_j + job.carried_energy_j
    )  # rank zero's sums hold both ranks' first starts
    assert cut.totals.energy_j - cut.useful.energy_j >= 2 * step_j  # steps 8 and 9, done again, and all that came with them


def test_a_monitor_on_rank_zero_alone(tmp_path):
    """It has no collective in which the other rank would be missed: the fit ends as ever, and rank zero's file is whole."""
    options = [str(tmp_path), "ddp", "--only", "0"]
    ended = forked_ranks("tests.lightning_ranks", options, tmp_path, TORCHELASTIC_RUN_ID="none")
    assert [rank[0] for rank in ended] == [0, 0], ended
    ((path, rank, _),) = run_files(tmp_path / "exp" / "version_0")
    run = read_jsonl(path)
    assert (rank, run.summary.status, run.summary.n_steps) == (0, "completed", STEPS)


@pytest.mark.parametrize("without", [("--only", "1"), ("--off", "0")])
def test_a_monitor_on_all_ranks_but_zero(tmp_path, without):
    """None on rank zero, or one that is not enabled: rank 1 waits no more than a second for it, measures without files, and says what to do."""
    began_s = time.monotonic()
    ended = forked(tmp_path, "ddp", *without)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert time.monotonic() - began_s < 25
    (_, printed, _) = ended[1]
    assert "(completed)" in printed
    assert f"{STEPS} measured" in printed
    assert "no files from GreenMonitor: rank zero tells no directory" in printed
    assert not run_files(tmp_path / "exp" / "version_0")


def test_a_rank_zero_that_is_slow_to_set_up(tmp_path):
    """Rank 1 waits a second for its word, and then opens its run after set-up: in the same directory, from the checkpoint all the same."""
    assert [code for code, _, _ in forked(tmp_path, "ddp", "--raise", "1")] == [1, 1]
    ended = forked(tmp_path, "ddp", "--slow", "--ckpt", str(tmp_path / "ckpt" / "step=4.ckpt"))
    assert [code for code, _, _ in ended] == [0, 0], ended
    ranks = of_each_rank(tmp_path / "exp" / "version_1")
    check(ranks, first_step=4)
    assert {run.manifest.resumed_from_step for run in ranks} == {3}


def test_a_sharded_fit_goes_on_from_its_checkpoint(tmp_path):
    """FSDP2, which restores after set-up, after a rank has raised: both go on in another directory, and each step is useful once."""
    for options, code in (["--raise", "1"], 1), (["--ckpt", str(tmp_path / "ckpt" / "step=4.ckpt")], 0):
        ended = forked(tmp_path, "fsdp", *options)
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
