"""GreenCallback: real Trainers on a scripted clock, so that every joule is known; tiny models, and data made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import green_torch
from green_torch import ledger
from green_torch.errors import ArgumentError, GreenTorchWarning, UnknownRegionError, UsageError
from green_torch.records import Flag, Phase
from green_torch.sinks.jsonl import RunFile, read_jsonl
from green_torch.testing import MemorySink, ScriptedClock, ScriptedMeter

pytest.importorskip("transformers")
from huggingface_hub import ModelCard, ModelCardData, metadata_load, metadata_save
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from green_torch.transformers import GreenCallback
from tests.processes import TWO_RANKS, forked, forked_ranks, preload
from tests.test_lightning_loggers import wandb_rows

preload("tests.transformers_ranks")

EXAMPLES = Path(__file__).parent.parent / "examples"
CLOSE = 5e-4  # the counter is read every 10 ms: what a boundary's own interval holds is an estimate
POWER_W = 300.0
BATCH, LENGTH = 4, 8
STEPS = 5


class Model(torch.nn.Module):
    """Takes 0.2 s of the scripted clock for a forward in training and 0.1 s in evaluation; ``act`` is called in each."""

    def __init__(self, clock: ScriptedClock, act=lambda _model: None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)
        self.clock, self.act = clock, act

    def forward(self, input_ids, attention_mask=None, labels=None):
        self.clock.advance(0.2 if self.training else 0.1)
        self.act(self)
        return {"loss": self.layer(input_ids.float().unsqueeze(-1)).square().mean()}

    def state_dict(self, *args, **kwargs):
        self.clock.advance(0.0)
        return super().state_dict(*args, **kwargs)


def data(n_batches: int = 20, padded: int = 0) -> list[dict[str, torch.Tensor]]:
    ids = torch.ones(LENGTH, dtype=torch.long)
    mask = (torch.arange(LENGTH) < LENGTH - padded).long()
    return [{"input_ids": ids, "attention_mask": mask, "labels": ids} for _ in range(n_batches * BATCH)]


class Bench:
    """A trainer and a callback on one scripted clock, and what they leave in ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = ScriptedClock()
        self.meter = ScriptedMeter(self.clock, {"gpu0": POWER_W}, period_s=0.02)
        self.sink = MemorySink()

    def callback(self, **options) -> GreenCallback:
        options = {
            "clock": self.clock,
            "meters": [self.meter],
            "sinks": [self.sink],
            "intensity": 100.0,
            "flops_per_step": 1e6,
            "log_every_n_steps": 1,
            **options,
        }
        return GreenCallback(**options)

    def arguments(self, **options) -> TrainingArguments:
        common = {
            "output_dir": str(self.path),
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": BATCH,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "report_to": "none",
        }
        return TrainingArguments(**{**common, **options})

    def trainer(self, *callbacks: TrainerCallback, model=None, kind=Trainer, train=None, evaluate=None, **options) -> Trainer:
        return kind(
            model or Model(self.clock),
            self.arguments(**options),
            train_dataset=data() if train is None else train,
            eval_dataset=data(3) if evaluate is None else evaluate,
            callbacks=list(callbacks),
        )

    def of(self, phase: str) -> list:
        return [record for record in self.sink.records if record.phase == phase]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def events(directory: Path) -> EventAccumulator:
    (file,) = directory.glob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(file), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def steps_of(accumulator: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in accumulator.Scalars(tag)]


def segments(directory: Path) -> list[RunFile]:
    return [read_jsonl(path) for path in sorted((directory / "green").glob("rank-00000.segment-*.jsonl"))]


def test_a_training_is_measured_step_by_step(bench):
    """300 W for 0.2 s a step is 60 J, on the Trainer's steps, with samples and tokens, and the phases make up the run."""
    green = bench.callback()
    bench.trainer(green).train()
    train = bench.of("train")
    assert [record.step for record in train] == [1, 2, 3, 4, 5]
    assert [record.energy_j for record in train] == pytest.approx([60.0] * STEPS, rel=CLOSE)
    assert {(record.samples, record.tokens) for record in train} == {(BATCH, BATCH * LENGTH)}
    assert {record.model_flops for record in train} == {1e6}
    summary = green.summary()
    assert summary.status == "completed"
    assert summary.manifest.planned_steps == STEPS
    assert summary.manifest.model == "Model"
    assert sum(phase.energy_j for phase in summary.totals.phases) == pytest.approx(summary.totals.energy_j)
    assert summary.totals.phase("train").energy_j == pytest.approx(300.0, rel=CLOSE)
    (file,) = segments(bench.path)
    assert file.summary is not None
    assert file.summary.status == "completed"


def test_micro_batches_are_one_step(bench):
    """With gradient accumulation the micro-batches' time, units and FLOPs are summed into the step they make."""
    green = bench.callback(flops_per_step=lambda inputs: float(inputs["input_ids"].numel()))
    bench.trainer(green, gradient_accumulation_steps=3, max_steps=2).train()
    train = bench.of("train")
    assert [record.energy_j for record in train] == pytest.approx([180.0] * 2, rel=CLOSE)
    assert [(record.samples, record.tokens, record.model_flops) for record in train] == [(12, 96, 96.0)] * 2


@pytest.mark.parametrize(
    ("switch", "tokens"), [("all", BATCH * LENGTH), ("non_padding", BATCH * (LENGTH - 3)), ("no", BATCH * LENGTH)]
)
def test_tokens_are_those_the_trainer_counts(bench, switch, tokens):
    """Where the Trainer counts tokens its own count is taken, padding left out if it does so."""
    if bench.arguments().include_num_input_tokens_seen is False:
        pytest.skip("this Trainer counts all tokens or none")
    bench.trainer(bench.callback(), train=data(padded=3), include_num_input_tokens_seen=switch, max_steps=2).train()
    assert [record.tokens for record in bench.of("train")] == [tokens] * 2


def test_units_may_be_given(bench):
    """units= is told the inputs of each micro-batch, and wins."""
    green = bench.callback(units=lambda inputs: {"tokens": 7, "samples": len(inputs["labels"])})
    bench.trainer(green, include_num_input_tokens_seen="all", max_steps=1).train()
    assert [(record.samples, record.tokens) for record in bench.of("train")] == [(BATCH, 7)]


def test_evaluation_is_a_phase_from_its_beginning(bench):
    """Evaluation is cut out of the steps with its samples, the first batch included; several data sets are one evaluation."""
    sets = {"a": data(2), "b": data(1)}
    bench.trainer(bench.callback(), evaluate=sets, eval_strategy="steps", eval_steps=2, max_steps=4).train()
    evaluations = bench.of("eval")
    assert [record.energy_j for record in evaluations] == pytest.approx([90.0] * 2, rel=CLOSE)
    assert [(record.samples, record.n_steps) for record in evaluations] == [(3 * BATCH, 1)] * 2
    assert [record.energy_j for record in bench.of("train")] == pytest.approx([60.0] * 4, rel=CLOSE)


def test_evaluation_before_training_is_a_phase(bench):
    """eval_on_start is evaluation, too, and not the first step."""
    bench.trainer(bench.callback(), eval_strategy="steps", eval_steps=100, eval_on_start=True, max_steps=1).train()
    assert bench.of("eval")[0].energy_j == pytest.approx(90.0, rel=CLOSE)
    assert [record.energy_j for record in bench.of("train")] == pytest.approx([60.0], rel=CLOSE)


class Slow(Trainer):
    """Takes half a second of the model's clock to write a checkpoint."""

    def save_model(self, *args, **kwargs):
        self.model.clock.advance(0.5)
        super().save_model(*args, **kwargs)


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_saving_is_a_phase(bench, strategy):
    """A checkpoint is phase "save" from its beginning, also where an evaluation decides that it is made."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"} if strategy == "best" else {}
    trainer = bench.trainer(bench.callback(), kind=Slow, save_strategy=strategy, save_steps=2, max_steps=2, **options)
    trainer.train()
    assert [record.energy_j for record in bench.of("save")] == pytest.approx([150.0], rel=CLOSE)
    assert [record.energy_j for record in bench.of("train")] == pytest.approx([60.0] * 2, rel=CLOSE)


@pytest.mark.parametrize("name", ["evaluate", "predict"])
def test_an_evaluation_on_its_own_is_a_run(bench, name):
    """evaluate() and predict() alone are runs in a sub-directory, from the first batch on, and leave the training's summary alone."""
    green = bench.callback()
    trainer = bench.trainer(green, max_steps=1)
    if name == "evaluate":
        trainer.evaluate()
        assert green.summary().totals.phase("eval").samples == 3 * BATCH
    else:
        trainer.train()
        trainer.predict(data(3))
        assert green.summary().totals.phase("train").energy_j == pytest.approx(60.0, rel=CLOSE)
    (run,) = segments(bench.path / name)
    assert run.summary is not None
    assert run.summary.status == "completed"
    assert run.summary.totals.phase("eval").energy_j == pytest.approx(90.0, rel=CLOSE)
    assert run.summary.totals.phase("eval").samples == 3 * BATCH


@pytest.mark.parametrize("name", ["evaluate", "predict"])
def test_an_evaluation_without_a_name(bench, name):
    """A method that the user has replaced by a functools.partial, which has no __name__, is measured like any other."""
    trainer = bench.trainer()
    setattr(trainer, name, partial(getattr(trainer, name), data(2)))
    trainer.add_callback(bench.callback())
    trainer.train()
    assert getattr(trainer, name)()
    (run,) = segments(bench.path / name)
    assert run.summary is not None
    assert run.summary.totals.phase("eval").samples == 2 * BATCH


def test_an_evaluation_that_is_measured_already_is_left_alone(bench):
    """Inside the user's own track() evaluate() runs as always, without a warning, and no second run is opened."""
    trainer = bench.trainer(bench.callback())
    with green_torch.track(clock=bench.clock, meters=[bench.meter], intensity=1.0) as tracker, tracker.phase("eval"):
        assert "eval_loss" in trainer.evaluate()
    assert tracker.summary().totals.phase("eval").energy_j == pytest.approx(90.0, rel=CLOSE)
    assert not list(bench.path.rglob("*.jsonl"))


def test_a_callback_that_was_taken_away_does_nothing(bench):
    """After remove_callback the trainer trains and evaluates unmeasured."""
    green = bench.callback()
    trainer = bench.trainer(green)
    trainer.remove_callback(green)
    trainer.train()
    trainer.evaluate()
    assert not bench.sink.records
    assert not (bench.path / "evaluate").exists()


def test_a_callback_may_be_added_late(bench):
    """add_callback after the Trainer was made works as well."""
    trainer = bench.trainer(eval_strategy="steps", eval_steps=5)
    trainer.add_callback(bench.callback())
    trainer.train()
    assert [record.energy_j for record in bench.of("train")] == pytest.approx([60.0] * STEPS, rel=CLOSE)
    assert [record.energy_j for record in bench.of("eval")] == pytest.approx([90.0], rel=CLOSE)


@pytest.mark.parametrize(("error", "status"), [(ValueError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_a_training_that_raises_is_closed(bench, error, status):
    """The exception comes through, the run is closed at once as what it is, no counting mode stays, and the next training is measured."""

    def act(model):
        if model.training and len(bench.of("train")) == 2:
            raise error("the user's")

    green = bench.callback(flops_per_step=None)
    trainer = bench.trainer(green, model=Model(bench.clock, act))
    with pytest.raises(error, match="the user's"):
        trainer.train()
    summary = green.summary()
    assert (summary.status, summary.last_step) == (status, 2)
    assert any(error.__name__ in warning for warning in summary.warnings) == (status == "failed")
    assert not _get_current_dispatch_mode_stack()
    trainer.model.act = lambda _model: None
    trainer.train()
    assert green.summary().status == "completed"
    assert [run.summary.status for run in segments(bench.path) if run.summary] == [status, "completed"]


def test_a_batch_size_that_is_too_large_begins_anew(bench):
    """auto_find_batch_size starts training again after an out-of-memory error: the first attempt is a failed run of its own."""

    def act(model):
        if model.batch > 3:
            raise RuntimeError("CUDA out of memory.")

    class Sized(Model):
        def forward(self, input_ids, attention_mask=None, labels=None):
            self.batch = len(input_ids)
            return super().forward(input_ids, attention_mask, labels)

    green = bench.callback()
    bench.trainer(green, model=Sized(bench.clock, act), auto_find_batch_size=True, max_steps=2).train()
    assert green.summary().status == "completed"
    first, second = segments(bench.path)
    assert first.summary is not None
    assert first.summary.status == "failed"
    assert all(record.samples < BATCH for record in second.records if record.phase is Phase.TRAIN)
    assert second.manifest.run_id != first.manifest.run_id


def test_nothing_of_ours_ends_training(bench):
    """A unit function that raises, one that returns nonsense and a sink that breaks cost a warning each; training goes on."""

    class Broken:
        def write(self, item):
            raise OSError("disk full")

        def close(self):
            pass

    def units(inputs):
        raise KeyError("x")

    green = bench.callback(units=units, flops_per_step=lambda _inputs: "many", sinks=[Broken(), bench.sink])
    with pytest.warns(GreenTorchWarning):
        trainer = bench.trainer(green)
        trainer.train()
    assert trainer.state.global_step == STEPS
    said = "\n".join(green.summary().warnings)
    assert "units= gives nothing for a batch: KeyError: 'x'" in said
    assert "flops_per_step= gives nothing for a batch: it returned 'many'" in said
    assert "Broken is switched off: OSError: disk full" in said
    assert [record.energy_j for record in bench.of("train")] == pytest.approx([60.0] * STEPS, rel=CLOSE)


def test_a_clock_that_breaks_switches_the_callback_off(bench):
    """An error inside our own hooks ends the measuring with a warning, and not the training."""

    class Breaking(ScriptedClock):
        broken = False

        def now_ns(self):
            if self.broken:
                raise RuntimeError("no time")
            return super().now_ns()

    bench = Bench(bench.path)
    clock = Breaking()
    green = bench.callback(clock=clock, meters=[ScriptedMeter(clock, {"gpu0": POWER_W})])

    def act(_model):
        clock.broken = True

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GreenTorchWarning)
        trainer = bench.trainer(green, model=Model(bench.clock, act))
        trainer.train()
    assert trainer.state.global_step == STEPS
    assert green.summary().status == "failed"
    assert "GreenCallback is switched off: RuntimeError: no time" in green.summary().warnings


def test_a_directory_that_cannot_be_written_costs_the_files_only(bench):
    """Where there is no place for our files in the output directory, steps are measured all the same, with a warning."""
    (bench.path / "green").touch()
    with pytest.warns(GreenTorchWarning, match="no files from GreenCallback"):
        bench.trainer(bench.callback()).train()
    assert [record.energy_j for record in bench.of("train")] == pytest.approx([60.0] * STEPS, rel=CLOSE)


def test_wrong_arguments_raise_before_training(bench):
    """At construction; and a second tracker at the start of training."""
    with pytest.raises(UnknownRegionError):
        GreenCallback(region="Atlantis")
    with pytest.raises(ArgumentError, match="units"):
        GreenCallback(units=3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no run yet"):
        bench.callback().summary()
    trainer = bench.trainer(bench.callback())
    with (
        green_torch.track(clock=bench.clock, meters=[bench.meter], intensity=1.0),
        pytest.raises(UsageError, match="another tracker is open"),
    ):
        trainer.train()


def test_disabled_does_nothing(bench):
    """enabled=False: no file, no record, no value in the logs."""
    green = bench.callback(enabled=False)
    trainer = bench.trainer(green)
    trainer.train()
    trainer.evaluate()
    assert green.summary().status == "disabled"
    assert green.co2_eq_emissions() is None
    assert not list(bench.path.rglob("*.jsonl"))
    assert not any("green" in key for entry in trainer.state.log_history for key in entry)


def test_values_go_through_the_trainers_own_tensorboard_writer(bench):
    """Loss and energy stand in one event file, on the same steps, the run's end included; the writer is closed by its owner."""
    trainer = bench.trainer(bench.callback(), report_to="tensorboard")
    trainer.train()
    (directory,) = (bench.path / "runs").iterdir()
    board = events(directory)
    assert steps_of(board, "train/loss") == [1, 2, 3, 4, 5]
    assert steps_of(board, "green/energy_per_step_J") == [1, 2, 3, 4, 5]
    assert not [
        tag for tag in board.Tags()["scalars"] if tag.startswith("train/green")
    ]  # what the Trainer logs is there already
    assert "green/snapshot" in board.Tags()["tensors"]
    snapshot = json.loads(board.Tensors("green/snapshot")[-1].tensor_proto.string_val[0])
    assert snapshot["status"] == "completed"
    assert not list(bench.path.glob("events.*"))
    assert (bench.path / "green" / "rank-00000.segment-0001.jsonl").exists()
    (callback,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, TensorBoardCallback)]
    assert callback.tb_writer is None
    assert "on_train_end" not in vars(callback)


def test_without_tensorboard_callback_there_is_an_event_file_of_ours(bench):
    """report_to="none": the values are in the output directory."""
    bench.trainer(bench.callback()).train()
    assert steps_of(events(bench.path), "green/energy_per_step_J") == [1, 2, 3, 4, 5]


class Reporter(TrainerCallback):
    """Keeps the logs it is shown, as W&B's and MLflow's callbacks send them off."""

    def __init__(self) -> None:
        self.seen: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def ours(names) -> set[str]:
    return {name for name in names if "green/" in name}


def test_the_trainers_logs_tell_the_energy(bench):
    """Log history and train()'s metrics get what TensorBoard gets; evaluation's logs stay as they are."""
    trainer = bench.trainer(bench.callback(), eval_strategy="steps", eval_steps=5)
    metrics = trainer.train().metrics
    assert metrics["green/energy_total_kWh"] == pytest.approx((5 * 60 + 90) / 3.6e6, rel=CLOSE)
    assert metrics["green/emissions_total_gCO2e"] == pytest.approx((5 * 60 + 90) / 3.6e6 * 100, rel=CLOSE)
    assert trainer.state.log_history[-1]["green/power_W"] == pytest.approx(POWER_W, rel=CLOSE)
    assert ours(metrics) == ours(trainer.state.log_history[-1]) == ours(events(bench.path).Tags()["scalars"])
    assert "green/energy_per_token_J" in metrics
    (evaluation,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert not ours(evaluation)


def test_a_value_is_told_once(bench):
    """Where records lag behind the Trainer's logs, a line has none of the last one's values again: they are of no later step."""
    reporter = Reporter()
    bench.trainer(bench.callback(log_every_n_steps=2), reporter).train()
    told = [seen["green/energy_total_kWh"] for seen in reporter.seen[:-1] if ours(seen)]
    assert 0 < len(told) < STEPS
    assert len(set(told)) == len(told)
    assert ours(reporter.seen[-1])


def test_reporters_get_every_value_wherever_they_stand(bench, capsys):
    """One that stands before this callback, as report_to's do, sees the same as one after it; printed lines have four of the values."""
    before, after = Reporter(), Reporter()
    trainer = bench.trainer(before, bench.callback(peak_flop_per_s=1e9), after)
    metrics = trainer.train().metrics
    assert before.seen == after.seen
    assert len(before.seen) == STEPS + 1
    assert ours(before.seen[-1]) == ours(metrics)
    assert before.seen[-1]["green/energy_per_step_J"] == pytest.approx(60.0, rel=CLOSE)
    lines = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line]
    assert len(lines) == STEPS
    printed = {word.strip("{' ") for word in lines[-1].replace(":", ",").split(",")}
    assert ours(printed) == {
        "green/energy_total_kWh", "green/emissions_total_gCO2e", "green/power_W", "green/mfu"
    }  # fmt: skip
    assert not any("on_log" in vars(callback) for callback in trainer.callback_handler.callbacks)


def test_weights_and_biases(bench, monkeypatch):
    """report_to="wandb", offline: its own file has our values beside the loss, named as the loss is."""
    import wandb

    wandb.teardown()  # it reads its variables once a process, and another test may have been first
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(bench.path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    trainer = bench.trainer(bench.callback(), report_to="wandb")
    trainer.train()
    wandb.finish()
    (path,) = bench.path.glob("wandb/offline-run-*/*.wandb")
    rows = [row for row in wandb_rows(path) if "train/loss" in row]
    assert [row["train/global_step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["train/green/energy_per_step_J"] == pytest.approx(60.0, rel=CLOSE)
    assert rows[-1]["train/green/energy_total_kWh"] > 0


def test_mlflow(bench, monkeypatch):
    """report_to="mlflow", with a store of files: our values stand under their own names."""
    import mlflow

    store = f"file:{bench.path}/mlruns"
    for name, value in {"TRACKING_URI": store, "ALLOW_FILE_STORE": "true"}.items():
        monkeypatch.setenv(f"MLFLOW_{name}", value)
    mlflow.set_tracking_uri(
        store
    )  # Lightning's logger, in another test, sets one for the process, which goes before the variable
    bench.trainer(bench.callback(), report_to="mlflow").train()
    (run,) = mlflow.MlflowClient(store).search_runs(["0"])
    assert run.data.metrics["green/energy_per_step_J"] == pytest.approx(60.0, rel=CLOSE)
    assert run.data.metrics["green/energy_total_kWh"] == pytest.approx(300 / 3.6e6, rel=CLOSE)
    steps = mlflow.MlflowClient(store).get_metric_history(run.info.run_id, "green/energy_total_kWh")
    assert {metric.step for metric in steps} <= {1, 2, 3, 4, 5}


def test_the_logs_may_be_left_alone(bench):
    """logs=False."""
    assert not any("green" in key for key in bench.trainer(bench.callback(logs=False)).train().metrics)


def test_a_model_card_takes_the_emissions(bench):
    """co2_eq_emissions() is what huggingface_hub writes and reads back: grams, source, location, hardware."""
    green = bench.callback(intensity=None, region="FR")
    bench.trainer(green).train()
    co2 = green.co2_eq_emissions("fine-tuning")
    assert co2 is not None
    assert co2["emissions"] == pytest.approx(green.summary().totals.emissions_g, rel=1e-3)
    assert co2["emissions"] >= 300 / 3.6e6 * green.summary().manifest.intensity.g_per_kwh
    assert co2["training_type"] == "fine-tuning"
    assert co2["geographical_location"] == "FR"
    assert co2["hardware_used"] == "scripted gpu0"
    assert co2["source"].startswith(
        f"green_torch {green_torch.__version__}: counted: gpu0; operational, location-based; embodied not counted; PUE 1"
    )
    card = bench.path / "README.md"
    ModelCard.from_template(ModelCardData(license="mit", model_name="m")).save(card)
    metadata_save(card, {**metadata_load(card), "co2_eq_emissions": co2})
    read = ModelCard.load(card)
    assert read.data.to_dict()["co2_eq_emissions"] == co2
    assert read.data.license == "mit"
    assert "geographical_location" not in bench_without_region(bench)


def bench_without_region(bench: Bench) -> dict:
    """The emissions of a training whose region nobody named."""
    green = bench.callback(sinks=[])
    bench.trainer(green, max_steps=1).train()
    co2 = green.co2_eq_emissions()
    assert co2 is not None
    return co2


def test_a_resumed_training_goes_on_with_its_run(bench):
    """resume_from_checkpoint: same run, next segment, steps go on, and the card's grams are of both segments."""
    first = bench.callback()
    bench.trainer(first, save_strategy="steps", save_steps=3, max_steps=3).train()
    spent_g = first.summary().totals.emissions_g
    again = Bench(bench.path)
    second = again.callback()
    resumed = again.trainer(second, save_strategy="steps", save_steps=3, max_steps=5)
    metrics = resumed.train(resume_from_checkpoint=True).metrics
    one, two = (run.manifest for run in segments(bench.path))
    assert two.run_id == one.run_id
    assert (one.segment, two.segment, two.resumed_from_step) == (1, 2, 3)
    assert [record.step for record in again.of("train")] == [4, 5]
    co2 = second.co2_eq_emissions()
    assert co2 is not None
    assert co2["emissions"] == pytest.approx(spent_g + second.summary().totals.emissions_g, rel=1e-3)
    logged_g = metrics["green/emissions_total_gCO2e"]  # of both segments too
    assert any(logged_g == pytest.approx(spent_g + record.totals.emissions_g) for record in again.sink.records)


def test_a_run_that_began_from_a_checkpoint_is_projected_from_there(bench):
    """From a checkpoint of an unmeasured training, and resumed once more: what is projected is what its steps come to, none of them twice."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    bench.trainer(max_steps=2, **saving).train()
    at_once, first, second = (bench.callback(run_name=name) for name in ("at once", "first", "second"))
    bench.trainer(at_once, max_steps=8).train(resume_from_checkpoint=str(bench.path / "checkpoint-2"))
    bench.trainer(first, max_steps=4, **saving).train(resume_from_checkpoint=str(bench.path / "checkpoint-2"))
    bench.trainer(second, max_steps=8).train(resume_from_checkpoint=str(bench.path / "checkpoint-4"))
    summary = second.summary()
    assert (summary.manifest.resumed_from_step, summary.manifest.steps_before) == (4, 2)
    assert summary.manifest.planned_steps == at_once.summary().manifest.planned_steps == 6
    assert summary.time_left_s == 0
    runs = [green.summary().totals for green in (at_once, first, second)]
    assert [totals.phase("train").energy_j for totals in runs] == pytest.approx([360.0, 120.0, 240.0], rel=CLOSE)
    assert summary.projected_energy_j == pytest.approx(runs[1].energy_j + runs[2].energy_j)


@pytest.mark.parametrize(("hook", "saved"), [("on_step_begin", 2), ("on_optimizer_step", 3)])
def test_a_preempted_training_goes_on_with_its_run(tmp_path, hook, saved):
    """SIGTERM in step 3, upon which the Trainer saves and stops: interrupted; started again it is the same run, each step useful once."""
    if not hasattr(TrainingArguments, "enable_jit_checkpoint"):
        pytest.skip("this Trainer leaves SIGTERM alone")
    for number, what in enumerate((hook, "resume")):
        code, _, said = forked("tests.transformers_ranks", [str(tmp_path), what], tmp_path / str(number))()
        assert code == 0, said
    first, second = segments(tmp_path)
    assert [run.summary.status for run in (first, second) if run.summary] == ["interrupted", "completed"]
    steps = [[record.step for record in run.records if record.phase is Phase.TRAIN] for run in (first, second)]
    assert steps == [[1, 2, 3], list(range(saved + 1, 6))]
    assert second.manifest.run_id == first.manifest.run_id
    assert second.manifest.resumed_from_step == second.manifest.steps_before == saved
    (run,) = ledger.read(tmp_path).runs
    assert run.useful.phase("train").n_steps == 5


def test_callback_states_may_be_restored(bench):
    """restore_callback_states_from_checkpoint leaves this callback, with its options, in place."""
    bench.trainer(bench.callback(), save_strategy="steps", save_steps=3, max_steps=3).train()
    again = Bench(bench.path)
    green = again.callback()
    trainer = again.trainer(green, max_steps=4, restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=True)
    assert green in trainer.callback_handler.callbacks
    assert [record.step for record in again.of("train")] == [4]


GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": LENGTH, "bos_token_id": 0, "eos_token_id": 0}


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"gradient_checkpointing": True}, {"torch_empty_cache_steps": 1, "gradient_accumulation_steps": 2}],
)
def test_flops_of_a_transformer_are_counted(bench, options):
    """GPT-2's FLOPs as by hand, under autocast and gradient checkpointing too; recomputation raises hardware FLOPs alone."""
    model = GPT2LMHeadModel(GPT2Config(**GPT2))
    model.register_forward_pre_hook(lambda *_: bench.clock.advance(0.1))
    green = bench.callback(flops_per_step=None)
    bench.trainer(green, model=model, max_steps=3, **options).train()
    micro_batches = options.get("gradient_accumulation_steps", 1)
    tokens, width = BATCH * LENGTH, GPT2["n_embd"]
    weights = GPT2["n_layer"] * 12 * width * width + GPT2["vocab_size"] * width
    by_hand = 6 * tokens * weights + GPT2["n_layer"] * 12 * tokens * LENGTH * width  # attention in full: QK and AV, three times
    train = bench.of("train")
    assert [record.model_flops for record in train] == [micro_batches * by_hand] * 3
    recomputes = bool(options.get("gradient_checkpointing"))
    assert all((record.hardware_flops > record.model_flops) is recomputes for record in train)
    dtypes = {peak.dtype for peak in green.summary().manifest.peaks}
    assert dtypes >= ({"mm/bfloat16"} if options.get("bf16") else {"mm/float32"})
    assert train[0].flagged(Flag.COUNTED)
    assert not train[-1].flagged(Flag.COUNTED)
    assert not _get_current_dispatch_mode_stack()


def test_the_optimizers_see_what_they_always_saw(bench):
    """Loss and weights are those of a training without this callback."""

    def trained(*callbacks):
        torch.manual_seed(0)
        trainer = bench.trainer(*callbacks, model=GPT2LMHeadModel(GPT2Config(**GPT2)), seed=1)
        trainer.train()
        return trainer.model.state_dict(), [entry.get("loss") for entry in trainer.state.log_history]

    weights, losses = trained()
    own_weights, own_losses = trained(bench.callback(flops_per_step=None))
    assert own_losses == losses
    assert all(torch.equal(own_weights[name], weights[name]) for name in weights)


def run(*command: str, cwd: Path) -> str:
    """What a process prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_the_example_writes_its_model_card(tmp_path):
    """examples/hf_trainer.py trains, prints its summary, and leaves loss and energy in one event file and a card with emissions."""
    log_dir = tmp_path / "runs"
    printed = run(sys.executable, str(EXAMPLES / "hf_trainer.py"), "--steps", "4", "--log-dir", str(log_dir), cwd=tmp_path)
    assert f"tensorboard --logdir {log_dir}" in printed
    (directory,) = (log_dir / "runs").iterdir()
    board = events(directory)
    assert steps_of(board, "train/loss") == steps_of(board, "green/step_time_s") == [1, 2, 3, 4]
    (file,) = segments(log_dir)
    assert file.summary is not None
    assert file.summary.status == "completed"
    assert {record.phase for record in file.records} >= {Phase.SETUP, Phase.TRAIN, Phase.EVAL, Phase.SAVE}
    assert {(record.samples, record.tokens) for record in file.records if record.phase is Phase.TRAIN} == {(16, 16 * 64)}
    assert "gCO2e" in printed
    co2 = ModelCard.load(log_dir / "README.md").data.to_dict().get("co2_eq_emissions")
    if file.summary.totals.emissions_g is not None:  # a machine without any meter has none
        assert co2["emissions"] == pytest.approx(file.summary.totals.emissions_g, rel=1e-3)


def test_every_process_of_a_distributed_training_measures(tmp_path):
    """Under torchrun each rank keeps its file, the first alone writes events and the card, which is of all ranks."""
    log_dir = tmp_path / "runs"
    run(*TWO_RANKS, str(EXAMPLES / "hf_trainer.py"), "--steps", "2", "--log-dir", str(log_dir), cwd=tmp_path)
    files = [read_jsonl(path) for path in sorted((log_dir / "green").iterdir())]
    assert [(file.manifest.rank, file.manifest.world_size) for file in files] == [(0, 2), (1, 2)]
    assert all(file.summary is not None and file.summary.status == "completed" for file in files)
    assert [file.summary.totals.phase("train").n_steps for file in files if file.summary] == [2, 2]
    (directory,) = (log_dir / "runs").iterdir()
    assert steps_of(events(directory), "green/step_time_s") == [1, 2]
    co2 = ModelCard.load(log_dir / "README.md").data.to_dict().get("co2_eq_emissions")
    assert co2 is None or "2 of 2 processes" in co2["source"]


def test_the_tokens_of_all_ranks_are_shared_out(tmp_path):
    """The Trainer counts those of all ranks together: each rank takes its share of a step's, and the shares make up the count."""
    if TrainingArguments(str(tmp_path)).include_num_input_tokens_seen is False:
        pytest.skip("this Trainer counts all tokens or none")
    from tests.transformers_ranks import BATCH, N_SEQUENCES, masks

    ended = forked_ranks("tests.transformers_ranks", [str(tmp_path)], tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended
    zero, one = (read_jsonl(path) for path in sorted((tmp_path / "green").iterdir()))
    steps = [[record.tokens for record in file.records if record.phase is Phase.TRAIN] for file in (zero, one)]
    assert len(steps[0]) == len(steps[1]) == N_SEQUENCES // (2 * BATCH)
    assert {own - others for own, others in zip(*reversed(steps), strict=True)} == {0, 1}  # odd counts, too
    whole = sum(int(mask.sum()) for mask in masks())
    assert sum(steps[0]) + sum(steps[1]) == zero.summary.job.tokens == whole
