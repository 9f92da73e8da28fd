"""GreenMonitor: real trainers of both packages on a scripted clock, so that every joule is known."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import green_torch
from green_torch.errors import ArgumentError, UnknownRegionError, UsageError
from green_torch.lightning import GreenMonitor
from green_torch.records import Flag, Phase
from green_torch.sinks.jsonl import read_jsonl
from green_torch.testing import ScriptedClock, ScriptedMeter
from tests.lightning_bench import BATCH, CLOSE, PACKAGES, POWER_W, WIDTH, Bench, data, events, steps_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning:lightning.*"),  # what Lightning thinks of so small a training
    pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning.*"),
]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_fit_is_measured_step_by_step(tmp_path, package):
    """In either package: 300 W for 0.2 s a step is 60 J, on the loss's steps, with samples, and the phases make up the run."""
    bench = Bench(tmp_path, package)
    monitor = bench.monitor()
    assert isinstance(monitor, bench.pl.Callback)
    bench.trainer(monitor).fit(bench.module(), data())
    train = bench.of("train")
    assert [record.step for record in train] == [0, 1, 2, 3, 4]
    assert [record.energy_j for record in train] == pytest.approx([60.0] * 5, rel=1e-6)
    assert all(record.samples == BATCH and record.tokens is None for record in train)
    assert monitor.summary().status == "completed"
    assert monitor.summary().totals.energy_j == pytest.approx(300.0)
    assert monitor.summary().manifest.planned_steps == 5
    assert monitor.summary().manifest.model == "Module"
    assert monitor.summary().manifest.parameters == WIDTH
    assert monitor.summary().warnings == ()
    assert monitor.tracker.summary() == monitor.summary()


@pytest.mark.parametrize("missing", PACKAGES)
def test_one_lightning_package_is_enough(monkeypatch, missing):
    """The callbacks' base is made of what is installed; with neither package, the error says what to install."""
    monkeypatch.setitem(sys.modules, missing, None)
    other = next(package for package in PACKAGES if package != missing)
    spec = importlib.util.find_spec("green_torch.lightning.packages")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    there = importlib.import_module(other)
    assert module.Callback.__bases__ == (there.Callback,)
    assert module.loggers("CSVLogger") == (there.loggers.CSVLogger,)
    monkeypatch.setitem(sys.modules, other, None)
    with pytest.raises(ImportError, match="pip install lightning"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_setup_lasts_until_the_first_batch(bench):
    """What passes before the first train batch is setup, sanity check cut out; what passes after the last step is other."""

    class Waits(bench.pl.Callback):
        def on_train_start(self, *_):
            bench.clock.advance(1.0)

        def on_train_end(self, *_):
            bench.clock.advance(0.5)

    module = bench.module(act=lambda name: bench.clock.advance(2.0) if name == "setup" else None)
    bench.trainer(bench.monitor(), Waits(), num_sanity_val_steps=3, limit_val_batches=3, max_steps=4, val_check_interval=2).fit(
        module, data(), data()
    )
    totals = bench.green.summary().totals
    expected_s = {"setup": 3.0, "eval": 0.9, "train": 0.8, "other": 0.5}
    assert {t.phase: t.energy_j for t in totals.phases} == pytest.approx(
        {p: s * POWER_W for p, s in expected_s.items()}, rel=CLOSE
    )
    assert totals.phase("eval").n_steps == 3
    assert totals.phase("eval").samples == 9 * BATCH
    assert [record.samples for record in bench.of("eval")] == [3 * BATCH] * 3
    assert totals.phase("train").model_flops == 4e6
    assert not totals.phase("eval").model_flops
    assert not any(record.flagged(Flag.SPLIT) for record in bench.of("train"))


def test_a_wait_for_data_belongs_to_the_step(bench):
    """The second batch comes half a second late: its step takes 0.7 s; the first one's wait is setup."""

    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 3 * BATCH

        def __getitem__(self, index):
            if index % BATCH == 0:
                bench.clock.advance(0.5)
            return torch.ones(WIDTH)

    bench.trainer(bench.monitor(), max_steps=2).fit(bench.module(), torch.utils.data.DataLoader(Slow(), batch_size=BATCH))
    assert [record.duration_s for record in bench.of("train")] == pytest.approx([0.2, 0.7])
    assert [record.duration_s for record in bench.of("setup")] == pytest.approx([0.5])


@pytest.mark.parametrize("package", PACKAGES)
def test_checkpoints_are_phase_save(tmp_path, package):
    """All of save_checkpoint, writing included, is phase save; the steps around it keep their 60 J; the trainer is left as it was."""
    bench = Bench(tmp_path, package)
    base = bench.pl.plugins.io.TorchCheckpointIO

    class SlowDisk(base):
        def save_checkpoint(self, *args, **kwargs):
            bench.clock.advance(0.3)
            super().save_checkpoint(*args, **kwargs)

    checkpoint = bench.pl.callbacks.ModelCheckpoint(
        tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1, save_weights_only=True
    )
    trainer = bench.trainer(bench.monitor(), checkpoint, plugins=[SlowDisk()], enable_checkpointing=True)
    trainer.fit(bench.module(), data())
    assert len(list((tmp_path / "ckpt").iterdir())) == 2
    assert [record.energy_j for record in bench.of("save")] == pytest.approx([90.0, 90.0], rel=CLOSE)
    assert [record.step for record in bench.of("save")] == [1, 3]
    assert [record.energy_j for record in bench.of("train")] == pytest.approx([60.0] * 5, rel=CLOSE)
    assert "save_checkpoint" not in vars(trainer)


def test_an_outer_wrapper_of_save_checkpoint_survives(bench):
    """Where somebody wraps trainer.save_checkpoint during the fit, theirs stays afterwards and still saves."""
    calls = []

    class Wraps(bench.pl.Callback):
        def on_train_start(self, trainer, *_):
            inner = trainer.save_checkpoint
            trainer.save_checkpoint = lambda path: (calls.append(path), inner(path))

    trainer = bench.trainer(bench.monitor(), Wraps())
    trainer.fit(bench.module(), data())
    trainer.save_checkpoint(bench.path / "late.ckpt")
    assert calls
    assert (bench.path / "late.ckpt").exists()
    assert bench.green.summary().warnings == ()


def test_accumulated_batches_are_one_step(bench):
    """Three batches to an optimizer step: 0.6 s, 180 J and 24 samples a record; the epoch's rest steps too."""
    bench.trainer(bench.monitor(), accumulate_grad_batches=3, max_steps=-1, max_epochs=2).fit(bench.module(), data(8))
    train = bench.of("train")
    assert [record.step for record in train] == [0, 1, 2, 3, 4, 5]
    assert [record.samples for record in train] == [24, 24, 16, 24, 24, 16]
    assert [record.energy_j for record in train] == pytest.approx([180, 180, 120] * 2, rel=CLOSE)
    assert bench.green.summary().manifest.planned_steps == 6


@pytest.mark.parametrize("n_optimizers", [1, 2])
def test_manual_optimization(bench, n_optimizers):
    """A batch is one step however many optimizers it steps, at the place where Lightning logs its loss."""
    logger = bench.pl.loggers.TensorBoardLogger(bench.path, name="", version="run")
    trainer = bench.trainer(bench.monitor(), logger=logger, max_steps=-1, max_epochs=1, limit_train_batches=4)
    trainer.fit(bench.module(manual=n_optimizers), data())
    assert trainer.global_step == 4 * n_optimizers
    assert bench.green.summary().manifest.planned_steps == 4
    assert [record.step for record in bench.of("train")] == [0, 1, 2, 3]
    found = events(bench.path / "run")
    assert steps_of(found, "train_loss") == steps_of(found, "green/energy_per_step_J") == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "planned"), [({"max_epochs": 2}, 8), ({"max_epochs": 2, "max_steps": 3}, 3), ({"max_steps": 3}, 3)]
)
def test_accumulation_by_hand_is_planned_by_steps(bench, options, planned):
    """In manual optimization Lightning counts batches; the run is planned by as many of them as its first step took."""
    bench.trainer(bench.monitor(), **{"max_steps": -1, **options}).fit(bench.module(manual=1, every=3), data(12))
    summary = bench.green.summary()
    assert (summary.manifest.planned_steps, summary.n_steps) == (planned, planned)
    assert summary.projected_total_g == pytest.approx(summary.totals.emissions_g, rel=0.01)


def test_optimizers_that_lightning_does_not_see(bench):
    """Raw optimizers stepped by hand leave no step to measure, which is said; the joules are not lost."""
    bench.trainer(bench.monitor(), max_steps=-1, max_epochs=1, limit_train_batches=4).fit(
        bench.module(manual=1, wrapped=False), data()
    )
    summary = bench.green.summary()
    assert summary.n_steps == 0
    assert summary.totals.energy_j == pytest.approx(240.0)
    assert any("self.optimizers()" in warning for warning in summary.warnings)


@pytest.mark.parametrize("package", PACKAGES)
def test_values_share_the_loss_axis_and_event_file(tmp_path, package):
    """One event file; every value of ours stands on a step of the loss, with accumulation and validation in between."""
    bench = Bench(tmp_path, package)
    logger = bench.pl.loggers.TensorBoardLogger(tmp_path, name="exp")
    trainer = bench.trainer(
        bench.monitor(), logger=logger, accumulate_grad_batches=2, max_steps=7, val_check_interval=6, limit_val_batches=1
    )
    trainer.fit(bench.module(), data(), data(2))
    found = events(tmp_path / "exp" / "version_0")
    assert steps_of(found, "train_loss") == list(range(7))
    for tag in ("energy_per_step_J", "step_time_s", "power_W", "energy_per_sample_J"):
        assert steps_of(found, f"green/{tag}") == steps_of(found, "train_loss")
    assert [e.value for e in found.Scalars("green/energy_per_step_J")] == pytest.approx([120.0] * 7, rel=CLOSE)
    assert found.Scalars("green/energy_total_kWh")[-1].value == pytest.approx(bench.green.summary().totals.energy_j / 3.6e6)
    snapshot = json.loads(found.Tensors("green/snapshot")[-1].tensor_proto.string_val[0])
    assert snapshot
    (jsonl,) = (tmp_path / "exp" / "version_0" / "green").glob("*.jsonl")
    run = read_jsonl(jsonl)
    assert [record.step for record in run.records if record.phase is Phase.TRAIN] == list(range(7))
    assert run.summary == bench.green.summary()


def test_the_trainers_logging_interval(bench):
    """With log_every_n_steps=5 there is a record at every step at which the loss is logged, though validation cuts in between."""
    logger = bench.pl.loggers.TensorBoardLogger(bench.path, name="", version="run")
    trainer = bench.trainer(
        bench.monitor(), logger=logger, log_every_n_steps=5, max_steps=20, val_check_interval=7, limit_val_batches=1
    )
    trainer.fit(bench.module(), data(), data(2))
    found = events(bench.path / "run")
    assert steps_of(found, "train_loss") == [4, 9, 14, 19]
    assert steps_of(found, "green/energy_per_step_J") == [4, 6, 9, 13, 14, 19]
    assert sum(record.n_steps for record in bench.of("train")) == 20


@pytest.mark.parametrize(("theirs", "ours", "n_records"), [(0, None, 6), (50, 2, 3), (2, 1, 6)])
def test_our_own_logging_interval(bench, theirs, ours, n_records):
    """log_every_n_steps of the monitor wins over the trainer's; the trainer's 0 (never) means "auto"."""
    bench.trainer(bench.monitor(log_every_n_steps=ours), log_every_n_steps=theirs, max_steps=6).fit(bench.module(), data())
    assert len(bench.of("train")) == n_records


def test_other_loggers_and_none(bench):
    """Files go to a CSVLogger's directory, or to default_root_dir; a fast_dev_run leaves none."""
    csv = bench.pl.loggers.CSVLogger(bench.path / "csv")
    bench.trainer(bench.monitor(), logger=csv).fit(bench.module(), data())
    assert (Path(csv.log_dir) / "green" / "rank-00000.segment-0001.jsonl").exists()
    bench.trainer(bench.monitor(), default_root_dir=bench.path / "plain").fit(bench.module(), data())
    assert (bench.path / "plain" / "green" / "rank-00000.segment-0001.jsonl").exists()
    bench.trainer(bench.monitor(), default_root_dir=bench.path / "dev", fast_dev_run=True).fit(bench.module(), data())
    assert not (bench.path / "dev").exists()
    assert bench.green.summary().n_steps == 1


def test_a_directory_that_cannot_be_written(bench):
    """The run goes on without files, and says so: the directory was Lightning's choice."""
    (bench.path / "file").touch()
    bench.trainer(bench.monitor(), default_root_dir=bench.path / "file" / "x").fit(bench.module(), data())
    assert len(bench.of("train")) == 5
    assert any("no files from GreenMonitor" in warning for warning in bench.green.summary().warnings)


@pytest.mark.parametrize("kind", ["validate", "test", "predict"])
def test_evaluation_alone(bench, kind):
    """validate, test and predict are runs of their own: phase eval, with samples, in a directory of their own."""
    logger = bench.pl.loggers.TensorBoardLogger(bench.path, name="", version="run")
    trainer = bench.trainer(bench.monitor(), logger=logger)
    trainer.fit(bench.module(), data())
    fitted = bench.green.tracker
    getattr(trainer, kind)(bench.module(), data(3), **({} if kind == "predict" else {"verbose": False}))
    summary = bench.green.summary()
    assert summary.totals.phase("eval").energy_j == pytest.approx(90.0)
    assert summary.totals.phase("eval").samples == 3 * BATCH
    assert summary.totals.energy_j == pytest.approx(90.0)
    assert summary.status == "completed"
    assert fitted.summary().totals.energy_j == pytest.approx(300.0)
    assert (bench.path / "run" / kind / "green" / "rank-00000.segment-0001.jsonl").exists()
    events(bench.path / "run")


def test_a_second_fit_and_a_resumed_one_continue_the_axis(bench):
    """Steps of a fit that resumes from a checkpoint go on where the loss goes on."""
    trainer = bench.trainer(bench.monitor(), max_steps=3)
    trainer.fit(bench.module(), data())
    trainer.save_checkpoint(bench.path / "three.ckpt")
    bench.trainer(bench.monitor(), max_steps=6).fit(bench.module(), data(), ckpt_path=bench.path / "three.ckpt")
    assert [record.step for record in bench.of("train")] == [0, 1, 2, 3, 4, 5]
    assert bench.green.summary().manifest.planned_steps == 6


@pytest.mark.parametrize(
    ("error", "seen", "status"),
    [(ValueError("mine"), ValueError, "failed"), (KeyboardInterrupt(), SystemExit, "interrupted")],
)
@pytest.mark.parametrize("where", ["training_step", "validation_step"])
def test_an_exception_ends_the_run_as_what_it_is(bench, error, seen, status, where):
    """The user's error comes through as Lightning passes it on; the run is closed as failed or interrupted, with what was measured."""
    calls = []

    def act(name):
        calls.append(name)
        if calls.count(where) == 3 and name == where:
            raise error

    monitor = bench.monitor(flops_per_step=None, peak_flop_per_s=1e9)
    trainer = bench.trainer(monitor, max_steps=9, num_sanity_val_steps=0, val_check_interval=2, limit_val_batches=1)
    with pytest.raises(seen):
        trainer.fit(bench.module(act=act), data(), data(2))
    assert bench.green.summary().status == status
    assert [record.step for record in bench.of("train")] == list(range(2 if where == "training_step" else 6))
    assert bench.green.summary().totals.energy_j == pytest.approx(POWER_W * bench.green.summary().totals.duration_s, rel=CLOSE)
    assert bench.green.summary().totals.duration_s == pytest.approx(
        0.2 * calls.count("training_step") + 0.1 * calls.count("validation_step")
    )
    assert _get_current_dispatch_mode_stack() == []
    assert "save_checkpoint" not in vars(trainer)
    with green_torch.track(meters=[bench.meter], clock=bench.clock):  # no tracker was left open
        pass


def test_an_error_of_ours_does_not_end_training(bench):
    """A monitor that breaks midway switches itself off, says so, and training reaches its end."""

    class Broken(ScriptedClock):
        broken = False

        def now_ns(self):
            if self.broken:
                raise RuntimeError("no time")
            return super().now_ns()

    bench.clock = Broken()
    bench.meter = ScriptedMeter(bench.clock, {"gpu0": POWER_W})
    calls = []

    def act(name):
        calls.append(name)
        bench.clock.broken = calls.count("training_step") >= 3

    trainer = bench.trainer(bench.monitor())
    trainer.fit(bench.module(act=act), data())
    assert trainer.global_step == 5
    assert any(
        "GreenMonitor is switched off: RuntimeError: no time" in warning for warning in bench.green.tracker._warnings.said
    )


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"region": "Atlantis"}, UnknownRegionError),
        ({"pue": 0.5}, ArgumentError),
        ({"log_every_n_steps": 0}, ArgumentError),
        ({"planned_steps": -3}, ArgumentError),
        ({"flops_per_step": -1.0}, ArgumentError),
        ({"units": 3}, ArgumentError),
        ({"baseline": "/nowhere"}, ArgumentError),
        ({"attention_flops": "half"}, ArgumentError),
    ],
)
def test_wrong_arguments_raise_at_once(options, error):
    """A wrong argument is told when the monitor is made, not when training has begun."""
    with pytest.raises(error):
        GreenMonitor(**options)


def test_making_a_monitor_says_and_opens_nothing():
    """No driver is opened and no warning given before there is a run; asking for its summary tells what is missing."""
    monitor = GreenMonitor()
    assert monitor.tracker is None
    with pytest.raises(UsageError, match="call trainer"):
        monitor.summary()


def test_a_tracker_around_the_fit_is_told(bench):
    """Both would count the same joules: an error before training begins, and the outer run is left intact."""
    with green_torch.track(clock=bench.clock, meters=[bench.meter]) as tracker:
        with pytest.raises(UsageError, match="another tracker is open"):
            bench.trainer(bench.monitor()).fit(bench.module(), data())
        bench.clock.advance(1.0)
        tracker.step()
    assert tracker.summary().totals.energy_j == pytest.approx(300.0)


def test_disabled(bench):
    """enabled=False measures nothing and writes nothing."""
    trainer = bench.trainer(bench.monitor(enabled=False))
    trainer.fit(bench.module(), data())
    assert trainer.global_step == 5
    assert bench.green.summary().status == "disabled"
    assert bench.sink.records == []
    assert list(bench.path.iterdir()) == []


class Rows(torch.utils.data.Dataset):
    """Rows of ids beside the input, as Hugging Face's collators make them."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"note": 0, "x": torch.ones(WIDTH), "input_ids": torch.zeros(16, dtype=torch.long)}


def test_tokens_from_input_ids(bench):
    """A batch with input_ids tells its tokens."""
    bench.trainer(bench.monitor()).fit(bench.module(), torch.utils.data.DataLoader(Rows(), batch_size=BATCH))
    assert all(record.tokens == BATCH * 16 and record.samples == BATCH for record in bench.of("train"))
    assert bench.green.summary().energy_per_token_j == pytest.approx(60.0 / (BATCH * 16))


def test_units_from_a_function(bench):
    """units= gives the work of a micro-batch; a step sums them, evaluation uses it too."""
    monitor = bench.monitor(units=lambda batch: {"tokens": batch.numel()})
    bench.trainer(monitor, accumulate_grad_batches=2, max_steps=3, num_sanity_val_steps=2).fit(bench.module(), data(), data(2))
    assert all(record.tokens == 2 * BATCH * WIDTH and record.samples is None for record in bench.of("train"))
    assert bench.of("eval")[0].tokens == 2 * BATCH * WIDTH


@pytest.mark.parametrize("units", [lambda _: 1 / 0, lambda _: 7, lambda _: {"tokens": float("nan")}])
def test_units_that_fail(bench, units):
    """A function that raises or gives nonsense costs the units, with a warning, and nothing else."""
    bench.trainer(bench.monitor(units=units)).fit(bench.module(), data())
    assert [record.tokens for record in bench.of("train")] == [None] * 5
    assert len(bench.green.summary().warnings) == 1


def test_flops_from_a_function(bench):
    """flops_per_step= may be a function of the batch; the micro-batches of a step are summed."""
    monitor = bench.monitor(flops_per_step=lambda batch: 1000.0 * len(batch), peak_flop_per_s=1e6)
    bench.trainer(monitor, accumulate_grad_batches=2, max_steps=3).fit(bench.module(), data())
    assert [record.model_flops for record in bench.of("train")] == [16_000.0] * 3
    assert bench.of("train")[0].mfu == pytest.approx(16_000.0 / 0.4 / 1e6)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", "float32"), ("bf16-mixed", "bfloat16"), ("bf16-true", "bfloat16"), ("16-mixed", None)]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_flops_are_counted_live(bench, precision, dtype, accumulate):
    """The first step of each shape is counted, backward included, and flagged; the others repeat it, whatever the precision."""
    monitor = bench.monitor(flops_per_step=None, peak_flop_per_s=1e6)
    bench.trainer(monitor, precision=precision, accumulate_grad_batches=accumulate).fit(bench.module(), data())
    train = bench.of("train")
    flops = accumulate * 2 * 2 * BATCH * WIDTH  # forward and weight gradient; nobody asks for the input's
    assert [record.model_flops for record in train] == [flops] * 5
    assert [record.flagged(Flag.COUNTED) for record in train] == [True, False, False, False, False]
    assert train[1].mfu == pytest.approx(flops / (accumulate * 0.2) / 1e6)
    peaks = {peak.dtype for peak in monitor.summary().manifest.peaks}
    assert len(peaks) == 1
    assert dtype is None or peaks == {f"mm/{dtype}"}
    assert _get_current_dispatch_mode_stack() == []


def test_given_flops_are_held_against_the_precision_that_runs(bench):
    """flops_per_step under bf16-mixed is compared with the BF16 peak, though the parameters are FP32."""
    bench.trainer(bench.monitor(peak_flop_per_s=1e9), precision="bf16-mixed").fit(bench.module(), data())
    assert {peak.dtype for peak in bench.green.summary().manifest.peaks} <= {"mm/bfloat16"}
    assert bench.of("train")[0].mfu == pytest.approx(1e6 / 0.2 / 1e9)


def test_a_skipped_epoch_leaves_no_counting_behind(bench):
    """on_train_batch_start may return -1, and then Lightning calls no on_train_batch_end: the counting mode goes all the same."""
    skipping = bench.module(act=lambda name: -1 if name == "on_train_batch_start" else None)
    bench.trainer(bench.monitor(flops_per_step=None, peak_flop_per_s=1e6), max_epochs=1).fit(skipping, data())
    assert _get_current_dispatch_mode_stack() == []
    assert bench.of("train") == []


def test_should_stop(bench):
    """A run that stops early is complete."""

    class Stops(bench.pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 3

    bench.trainer(bench.monitor(), Stops(), max_steps=10).fit(bench.module(), data())
    assert [record.step for record in bench.of("train")] == [0, 1, 2]
    assert bench.green.summary().status == "completed"
