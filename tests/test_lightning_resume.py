"""Fits that go on from a checkpoint: one run over several segments, whose useful totals are those of a run that never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
import torch

from green_torch import ledger
from green_torch.sinks.jsonl import read_jsonl, run_files
from tests.lightning_bench import CLOSE, PACKAGES, POWER_W, Bench, data, events, steps_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning:lightning.*"),
    pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning.*"),
]
STEPS = 14


class PowerCutError(Exception):
    """The machine is gone."""


def fit(
    path: Path, package: str, *, until: int | None = None, ckpt_path: Path | None = None, monitor=None, bench=None, **options
) -> Bench:
    """A fit as in a process of its own: set-up takes 2 s, a checkpoint (every 4 steps) 0.3 s, validation (every 6) 0.1 s a batch."""
    bench = bench or Bench(path, package)

    class SlowDisk(bench.pl.plugins.io.TorchCheckpointIO):
        def save_checkpoint(self, *args, **kwargs):
            bench.clock.advance(0.3)
            super().save_checkpoint(*args, **kwargs)

    calls = []

    def act(name):
        calls.append(name)
        if name == "setup":
            bench.clock.advance(2.0)
        if name == "training_step" and until is not None and calls.count(name) > until:
            raise PowerCutError

    saves = bench.pl.callbacks.ModelCheckpoint(path / "ckpt", filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = bench.trainer(
        monitor or bench.monitor(),
        saves,
        plugins=[SlowDisk()],
        enable_checkpointing=True,
        max_steps=STEPS,
        val_check_interval=6,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        logger=bench.pl.loggers.TensorBoardLogger(path, name="", version="run"),
        **options,
    )
    bench.run_dir = path / "run"
    bench.last_trainer = trainer
    if until is None:
        trainer.fit(bench.module(act=act), data(STEPS), data(2), ckpt_path=ckpt_path)
    else:
        with pytest.raises(PowerCutError):
            trainer.fit(bench.module(act=act), data(STEPS), data(2), ckpt_path=ckpt_path)
    return bench


def runs(path: Path):
    return ledger.read(path / "run").runs


@pytest.mark.parametrize("package", PACKAGES)
def test_crash_and_resume_equal_a_run_that_never_stopped(tmp_path, package):
    """One run id, segments 1 and 2, a continuous axis; steps 8 and 9, done again, are not useful, and the rest equals the other run phase by phase."""
    whole = fit(tmp_path / "whole", package)
    first = fit(tmp_path / "cut", package, until=10)
    second = fit(tmp_path / "cut", package, ckpt_path=tmp_path / "cut" / "ckpt" / "step=8.ckpt")
    ours, theirs = second.green.summary().manifest, first.green.summary().manifest
    assert ours.run_id == theirs.run_id
    assert (theirs.segment, ours.segment) == (1, 2)
    assert (ours.resumed_from_step, ours.previous_segment) == (7, 1)
    assert [record.step for record in first.of("train")] == list(range(10))
    assert [record.step for record in second.of("train")] == list(range(8, STEPS))
    (run,), (never_stopped,) = runs(tmp_path / "cut"), runs(tmp_path / "whole")
    expected = {phase.phase: phase for phase in whole.green.summary().totals.phases}
    assert {phase.phase: phase.energy_j for phase in run.useful.phases} == pytest.approx(
        {phase.phase: phase.energy_j for phase in never_stopped.useful.phases}, rel=CLOSE
    )
    for phase in run.useful.phases:
        assert (phase.n_steps, phase.samples) == (expected[phase.phase].n_steps, expected[phase.phase].samples)
        assert phase.energy_j == pytest.approx(expected[phase.phase].energy_j, rel=CLOSE)
    assert run.useful.phase("train").n_steps == STEPS
    assert run.totals.energy_j == pytest.approx(
        first.green.summary().totals.energy_j + second.green.summary().totals.energy_j, rel=CLOSE
    )
    assert second.green.summary().warnings == ()


def test_values_stay_on_the_axis_of_the_loss(tmp_path):
    """In TensorBoard, a resumed fit in the same directory goes on where the loss goes on."""
    fit(tmp_path, "lightning.pytorch", until=10)
    (first,) = (tmp_path / "run").glob("events.*")
    first.rename(tmp_path / "run" / "first")
    fit(tmp_path, "lightning.pytorch", ckpt_path=tmp_path / "ckpt" / "step=8.ckpt")
    found = events(tmp_path / "run")
    assert steps_of(found, "train_loss") == steps_of(found, "green/energy_per_step_J") == list(range(8, STEPS))


def test_the_same_monitor_fits_again(tmp_path):
    """One process, one monitor: a fit from a checkpoint is the next segment of the run."""
    bench = fit(tmp_path, "lightning.pytorch", until=10)
    first = bench.green.summary().manifest
    bench.sink.records.clear()
    fit(tmp_path, "lightning.pytorch", ckpt_path=tmp_path / "ckpt" / "step=8.ckpt", monitor=bench.green, bench=bench)
    second = bench.green.summary().manifest
    assert (second.run_id, second.segment, second.resumed_from_step) == (first.run_id, 2, 7)
    assert [record.step for record in bench.of("train")] == list(range(8, STEPS))
    assert runs(tmp_path)[0].useful.phase("train").n_steps == STEPS


def test_a_fit_without_a_checkpoint_is_a_new_run(tmp_path):
    """In the same directory, by the same monitor or another: another run id, and nothing is superseded."""
    bench = fit(tmp_path, "lightning.pytorch")
    ids = [bench.green.summary().manifest.run_id]
    fit(tmp_path, "lightning.pytorch", monitor=bench.green, bench=bench)
    ids.append(bench.green.summary().manifest.run_id)
    ids.append(fit(tmp_path, "lightning.pytorch").green.summary().manifest.run_id)
    assert len(set(ids)) == 3
    assert [run.useful.phase("train").n_steps for run in runs(tmp_path)] == [STEPS] * 3


def test_a_checkpoint_saved_after_the_fit(tmp_path):
    """trainer.save_checkpoint(...) once the fit has returned holds the run too."""
    bench = fit(tmp_path, "lightning.pytorch", until=10)
    bench.last_trainer.save_checkpoint(tmp_path / "late.ckpt")
    resumed = fit(tmp_path, "lightning.pytorch", ckpt_path=tmp_path / "late.ckpt")
    manifest = resumed.green.summary().manifest
    assert (manifest.run_id, manifest.resumed_from_step) == (bench.green.summary().manifest.run_id, 9)
    assert runs(tmp_path)[0].useful.phase("train").n_steps == STEPS


def test_a_callback_that_saves_before_ours(tmp_path):
    """A callback further up the list that saves when the optimizer has stepped: the checkpoint's step counts as done."""
    bench = Bench(tmp_path)

    class Saves(bench.pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "three.ckpt")

    def trainer(monitor, **options):
        made = bench.trainer(monitor, max_steps=5, **options)
        made.callbacks.insert(0, Saves())
        return made

    trainer(bench.monitor()).fit(bench.module(), data())
    bench.trainer(bench.monitor(), max_steps=5).fit(bench.module(), data(), ckpt_path=tmp_path / "three.ckpt")
    manifest = bench.green.summary().manifest
    assert (manifest.resumed_from_step, manifest.steps_before) == (2, 3)
    assert [record.step for record in bench.of("train")] == [0, 1, 2, 3, 4, 3, 4]


def test_a_checkpoint_saved_before_the_first_step(tmp_path):
    """Saved as a resumed fit begins: the steps done so far are those of the checkpoint that it went on from."""
    bench = fit(tmp_path, "lightning.pytorch", until=10)

    class Saves(bench.pl.Callback):
        def on_train_start(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "again.ckpt")

    trainer = bench.trainer(bench.monitor(), max_steps=9)
    trainer.callbacks.insert(0, Saves())
    trainer.fit(bench.module(), data(STEPS), ckpt_path=tmp_path / "ckpt" / "step=8.ckpt")
    state = torch.load(tmp_path / "again.ckpt", weights_only=True)["callbacks"]["GreenMonitor"]
    assert state["step"] == 7


def test_accumulation_and_optimizers_keep_the_axis(tmp_path):
    """Steps are counted as Lightning counts them for the loss, after a checkpoint too: accumulation, two optimizers by hand."""
    for options, module, ckpt_step in (({"accumulate_grad_batches": 2}, {}, 4), ({}, {"manual": 2}, 8)):
        bench = Bench(tmp_path / str(ckpt_step))
        saves = bench.pl.callbacks.ModelCheckpoint(bench.path / "ckpt", filename="{step}", every_n_train_steps=4, save_top_k=-1)
        common = {"enable_checkpointing": True, "max_epochs": 1, "max_steps": -1, **options}
        bench.trainer(bench.monitor(), saves, **common).fit(bench.module(**module), data(12))
        n_steps = len(bench.of("train"))
        bench.sink.records.clear()
        bench.trainer(bench.monitor(), **common).fit(
            bench.module(**module), data(12), ckpt_path=bench.path / "ckpt" / f"step={ckpt_step}.ckpt"
        )
        assert [record.step for record in bench.of("train")] == list(range(4, n_steps))
        assert bench.green.summary().manifest.resumed_from_step == 3


@pytest.mark.parametrize("kind", ["validate", "test"])
def test_evaluating_a_checkpoint_is_a_run_of_its_own(tmp_path, kind):
    """Both load the callbacks' state from a checkpoint, and take nothing over from the fit."""
    bench = fit(tmp_path, "lightning.pytorch")
    fitted = bench.green.summary().manifest.run_id
    trainer = bench.trainer(bench.monitor())
    getattr(trainer, kind)(bench.module(), data(2), ckpt_path=tmp_path / "ckpt" / "step=8.ckpt", verbose=False)
    manifest = bench.green.summary().manifest
    assert manifest.run_id != fitted
    assert manifest.resumed_from_step is None


def test_projections_are_of_the_whole_run(tmp_path):
    """A resumed run is projected with what its earlier segment used, waste included, and with the steps that are left."""
    fit(tmp_path, "lightning.pytorch", until=10)
    bench = fit(tmp_path, "lightning.pytorch", ckpt_path=tmp_path / "ckpt" / "step=8.ckpt")
    summary = bench.green.summary()
    assert summary.manifest.planned_steps == STEPS
    both_j = summary.totals.energy_j + summary.manifest.carried_energy_j
    assert summary.projected_energy_j == pytest.approx(both_j)
    assert summary.projected_total_g == pytest.approx(both_j / 3.6e6 * 100)
    assert summary.time_left_s == 0
    third = next(record for record in bench.of("train") if record.step == 10)  # 3 steps done here, 3 to go
    left_j = 3 * (POWER_W * 0.2 + (third.totals.energy_j - third.totals.phase("train").energy_j - 600.0) / 3)
    assert third.projected_total_g == pytest.approx(
        (third.totals.energy_j + summary.manifest.carried_energy_j + left_j) / 3.6e6 * 100, rel=CLOSE
    )


def test_trying_learning_rates_is_no_start(tmp_path):
    """LearningRateFinder goes back to a checkpoint of the same fit: that is its first start still, with its projections; its trials are set-up."""
    bench = Bench(tmp_path)
    module = bench.module()
    module.lr = 0.1
    bench.trainer(bench.monitor(), bench.pl.callbacks.LearningRateFinder(num_training_steps=5, early_stop_threshold=None)).fit(
        module, data()
    )
    summary = bench.green.summary()
    assert (summary.manifest.segment, summary.manifest.resumed_from_step) == (1, None)
    assert [record.step for record in bench.of("train")] == list(range(5))
    assert summary.projected_energy_j == pytest.approx(summary.totals.energy_j)
    assert summary.totals.phase("setup").energy_j == pytest.approx(5 * 60.0, rel=CLOSE)
    assert summary.warnings == ()


@pytest.mark.parametrize("saves_in", ["a hook", "no hook"])
def test_projections_of_a_run_that_began_from_a_checkpoint(tmp_path, saves_in):
    """From a checkpoint of an unmeasured fit, and resumed once more: what is projected is what its steps come to, none of them twice."""
    bench = Bench(tmp_path)

    class Saves(bench.pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step in {2, 4} and saves_in == "a hook":
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    def fit_to(step: int, *monitors, since: int | None = None):
        trainer = bench.trainer(*monitors, Saves(), max_steps=step)
        trainer.fit(bench.module(), data(), ckpt_path=None if since is None else tmp_path / f"{since}.ckpt")
        if saves_in == "no hook":
            trainer.save_checkpoint(tmp_path / f"{step}.ckpt")
        return bench.green.summary() if monitors else None

    fit_to(2)
    at_once = fit_to(8, bench.monitor(), since=2)
    first = fit_to(4, bench.monitor(), since=2)
    summary = fit_to(8, bench.monitor(), since=4)
    assert (summary.manifest.resumed_from_step, summary.manifest.steps_before) == (3, 2)
    assert summary.manifest.planned_steps == at_once.manifest.planned_steps == 6
    assert summary.time_left_s == 0
    runs = [one.totals for one in (at_once, first, summary)]
    assert [totals.phase("train").energy_j for totals in runs] == pytest.approx([360.0, 120.0, 240.0], rel=CLOSE)
    assert summary.projected_energy_j == pytest.approx(runs[1].energy_j + runs[2].energy_j)


SCRIPT = """
import os, sys, time, pathlib
import torch
import lightning.pytorch as pl
from green_torch.lightning import GreenMonitor
from green_torch.testing import ScriptedMeter
from green_torch.clock import HostClock

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch, index):
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        time.sleep(1.2 if step == 5 and len(sys.argv) == 3 else 0.02)  # so long that the last reading's lag is below 1 % of it
        if step == int(sys.argv[2]):
            print("there", flush=True)
            for _ in range(600):
                if self.trainer.received_sigterm:
                    break
                time.sleep(0.1)
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

path = pathlib.Path(sys.argv[1])
clock = HostClock()
green = GreenMonitor(clock=clock, meters=[ScriptedMeter(clock, {"gpu0": 300.0})], intensity=100.0, flops_per_step=1e6)
saves = pl.callbacks.ModelCheckpoint(path / "ckpt", filename="{step}", every_n_train_steps=3, save_top_k=-1)
logger = pl.loggers.TensorBoardLogger(path, name="exp") if "SLURM_JOB_ID" in os.environ else False
trainer = pl.Trainer(accelerator="cpu", max_steps=12, log_every_n_steps=1, logger=logger, default_root_dir=path,
    callbacks=[green, saves], enable_progress_bar=False, enable_model_summary=False)
loader = torch.utils.data.DataLoader(torch.randn(96, 4), batch_size=8)
trainer.fit(Module(), loader, ckpt_path=sys.argv[3] if len(sys.argv) > 3 else None)
print(green.summary())
"""


def process(path: Path, *args: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(path), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def wait_for(found):
    """What ``found`` gives, once it gives something."""
    deadline = time.monotonic() + 10
    while not (something := found()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return something


def test_a_process_that_is_killed_and_taken_up_by_another(tmp_path):
    """Killed in step 7; a new process goes on from the checkpoint at 3. What was written stays, and each step is useful once."""
    first = process(tmp_path, "7")
    assert first.stdout.readline() == "there\n"
    (file,) = (path for path, _, _ in run_files(tmp_path))

    def written():
        steps = [record.step for record in read_jsonl(file).records if record.phase == "train"]
        return steps if len(steps) >= 6 else []

    assert wait_for(written)[:6] == list(range(6))
    first.kill()
    first.communicate(timeout=60)
    second = process(tmp_path, "-1", str(tmp_path / "ckpt" / "step=3.ckpt"))
    printed, said = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert "(completed)" in printed
    (run,) = ledger.read(tmp_path).runs
    resumed = read_jsonl(run_files(tmp_path)[1][0])
    assert [record.step for record in resumed.records if record.phase == "train"] == list(range(3, 12))
    assert run.useful.phase("train").n_steps == 12


def test_a_preempted_slurm_job_goes_on(tmp_path):
    """SIGTERM in step 7 is no completion: started again by Slurm, the same run goes on from the checkpoint at 6, and steps 6 and 7 count once."""
    tasks = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "train"}
    job = {"SLURM_JOB_ID": "4711", **tasks}
    first = process(tmp_path, "7", **job)
    assert first.stdout.readline() == "there\n"
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 0, said  # what Lightning's exit looks like from outside
    (preempted,) = (read_jsonl(path) for path, _, _ in run_files(tmp_path / "exp" / "version_0"))
    assert preempted.summary.status == "interrupted"
    assert [record.step for record in preempted.records if record.phase == "train"] == list(range(8))

    second = process(tmp_path, "-1", str(tmp_path / "ckpt" / "step=6.ckpt"), **job, SLURM_RESTART_COUNT="1")
    _, said = second.communicate(timeout=60)
    assert second.returncode == 0, said
    (resumed,) = (read_jsonl(path) for path, _, _ in run_files(tmp_path / "exp" / "version_1"))
    manifest = resumed.summary.manifest
    assert (manifest.run_id, manifest.segment) == (preempted.manifest.run_id, 2)
    assert (manifest.previous_segment, manifest.resumed_from_step) == (1, 5)
    assert manifest.carried_energy_j == pytest.approx(preempted.summary.totals.energy_j)
    assert resumed.summary.warnings == ()
    (run,) = ledger.read(tmp_path).runs
    assert run.status == "completed"
    assert run.useful.phase("train").n_steps == 12
    redone_j = sum(record.energy_j for record in preempted.records if record.step > 5)
    assert run.redone.energy_j == pytest.approx(redone_j, rel=0.05)
    assert run.redone.phase("train").n_steps == 2
    assert run.restart.energy_j == pytest.approx(resumed.summary.totals.phase("setup").energy_j)
    assert run.useful.energy_j == pytest.approx(run.totals.energy_j - run.redone.energy_j - run.restart.energy_j)


class Job:
    """A Slurm job whose fits are numbered by Lightning's logger (version_0, version_1, ...) where they have no ``version``."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None = None) -> None:
        self.path = path
        self.version = version
        self._set = monkeypatch.setenv
        self.start("4711", 0)

    def start(self, job_id: str, restarts: int) -> None:
        self._set("SLURM_JOB_ID", job_id)
        self._set("SLURM_RESTART_COUNT", str(restarts))

    def fit(self, *, ends: bool, **options):
        """The summary of a fit, of which a preemption is the end where it does not end by itself."""
        bench = Bench(self.path)

        def act(name):
            if name == "training_step" and not ends:
                raise SystemExit(143)

        logger = bench.pl.loggers.TensorBoardLogger(self.path, name="exp", version=self.version)
        trainer = bench.trainer(bench.monitor(), logger=logger)
        with nullcontext() if ends else pytest.raises(SystemExit):
            trainer.fit(bench.module(act=act), data(), **options)
        if ends:
            trainer.save_checkpoint(self.path / "end.ckpt")
        return bench.green.summary()


def test_a_requeued_job_goes_on_in_another_directory(tmp_path, monkeypatch):
    """Without a checkpoint, though the logger makes version_1: same run, next segment, and that nobody knows what was done again is said."""
    job = Job(tmp_path, monkeypatch)
    first = job.fit(ends=False)
    job.start("4711", 1)
    second = job.fit(ends=True)
    assert (second.manifest.run_id, second.manifest.segment) == (first.manifest.run_id, 2)
    assert second.manifest.carried_energy_j == pytest.approx(first.totals.energy_j)
    assert any("steps that were done again can't be told" in warning for warning in second.warnings)
    (run,) = ledger.read(tmp_path).runs
    assert run.status == "completed"
    assert run.totals.energy_j == pytest.approx(first.totals.energy_j + second.totals.energy_j)
    third = job.fit(ends=True)  # the script's next fit
    assert third.manifest.run_id != first.manifest.run_id


@pytest.mark.parametrize("version", [None, "run"])
def test_a_requeued_job_with_a_checkpoint_says_nothing_false(tmp_path, monkeypatch, version):
    """The state comes after the run was opened: then steps that were done again can be told, and nothing says they can't."""
    job = Job(tmp_path, monkeypatch, version)
    bench = Bench(tmp_path)
    saves = bench.trainer(bench.monitor(), max_steps=3)
    saves.fit(bench.module(), data())
    saves.save_checkpoint(tmp_path / "three.ckpt")
    cut = job.fit(ends=False, ckpt_path=tmp_path / "three.ckpt")
    job.start("4711", 1)
    resumed = job.fit(ends=True, ckpt_path=tmp_path / "three.ckpt")
    assert resumed.manifest.run_id == cut.manifest.run_id
    assert resumed.manifest.resumed_from_step == 2
    assert resumed.warnings == ()


@pytest.mark.parametrize("before", ["two runs", "another job", "completed", "this start"])
def test_a_requeued_job_takes_up_no_run_by_guess(tmp_path, monkeypatch, before):
    """Of several runs in numbered directories nobody tells which it was; another job's, a completed one or this start's own is none."""
    job = Job(tmp_path, monkeypatch)
    if before == "this start":
        job.start("4711", 1)
    earlier = [job.fit(ends=before == "completed")]
    if before == "two runs":
        earlier.append(job.fit(ends=False))
    job.start("4712" if before == "another job" else "4711", 1)
    summary = job.fit(ends=True)
    assert summary.manifest.run_id not in {one.manifest.run_id for one in earlier}
    assert summary.warnings == ()


def test_a_requeued_job_beside_others(tmp_path, monkeypatch):
    """Fits of other jobs in the numbers between are passed over."""
    job = Job(tmp_path, monkeypatch)
    first = job.fit(ends=False)
    job.start("4712", 0)
    job.fit(ends=False)
    job.start("4711", 1)
    assert job.fit(ends=True).manifest.run_id == first.manifest.run_id


def test_ctrl_c(tmp_path):
    """SIGINT in step 7: Lightning's own exit, and a run closed as interrupted with every joule up to then."""
    first = process(tmp_path, "7")
    assert first.stdout.readline() == "there\n"
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 1, said
    assert "Traceback" not in said
    (file,) = (path for path, _, _ in run_files(tmp_path))
    cut = read_jsonl(file)
    assert [record.step for record in cut.records if record.phase == "train"] == list(range(7))
    assert cut.summary.status == "interrupted"
    assert cut.summary.warnings == ()
    totals = cut.summary.totals
    assert totals.energy_lo_j <= POWER_W * totals.duration_s <= totals.energy_hi_j
    assert totals.energy_j == pytest.approx(POWER_W * totals.duration_s, abs=POWER_W * 0.3)  # a loaded machine reads late
