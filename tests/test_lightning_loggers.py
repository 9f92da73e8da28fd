"""The loggers of a trainer: what each has of the run, read back from its own files or from what it was given."""

from __future__ import annotations

import csv
import gc
import json
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
from lightning.pytorch.loggers import Logger

from green_torch.errors import GreenTorchWarning
from green_torch.lightning.progress import progress
from green_torch.sinks.jsonl import read_jsonl
from green_torch.testing import ScriptedMeter
from tests.lightning_bench import CLOSE, PACKAGES, POWER_W, Bench, data, events, steps_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning:lightning.*"),
    pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning.*"),
]
PER_STEP = "green/energy_per_step_J"


class Remembers(Logger):
    """A logger of somebody's: ``rows`` are what it was given, ``act`` is done with each."""

    name, version = "remembers", "one"

    def __init__(self, act=lambda _metrics, _step: None) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.threads: set[int] = set()
        self.status = ""
        self.act = act

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        pass

    def log_metrics(self, metrics, step=None) -> None:
        assert not self.status, "logged after the end"
        self.act(metrics, step)
        self.threads.add(threading.get_ident())
        self.rows.append((step, dict(metrics)))

    def finalize(self, status) -> None:
        self.status = status

    def ours(self) -> list[tuple[int, dict[str, float]]]:
        return [(step, row) for step, row in self.rows if any(tag.startswith("green/") for tag in row)]


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


def late(bench: Bench) -> Bench:
    """Records come up to five steps late."""
    bench.meter = ScriptedMeter(bench.clock, {"gpu0": POWER_W}, period_s=1.0)
    return bench


def csv_rows(directory: str | Path) -> list[dict[str, str]]:
    with Path(directory, "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], tag: str) -> dict[int, float]:
    found = {int(row["step"]): float(row[tag]) for row in rows if row.get(tag)}
    assert len(found) == sum(1 for row in rows if row.get(tag)), "a step stands there twice"
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_csv_and_tensorboard_agree(tmp_path, package):
    """Beside TensorBoard, a CSVLogger's file has the same values under the same names, on the steps of the loss, though records come late."""
    bench = late(Bench(tmp_path, package))
    board = bench.pl.loggers.TensorBoardLogger(tmp_path, name="", version="board")
    table = bench.pl.loggers.CSVLogger(tmp_path, name="", version="table")
    bench.trainer(bench.monitor(), logger=[table, board], max_steps=12, limit_val_batches=1, val_check_interval=5).fit(
        bench.module(), data(), data(2)
    )
    found, rows = events(tmp_path / "board"), csv_rows(table.log_dir)
    tags = {tag for row in rows for tag in row if tag.startswith("green/")}
    assert tags == {tag for tag in found.Tags()["scalars"] if tag.startswith("green/")}
    assert {"green/energy_total_kWh", "green/step_time_s", "green/projected_total_gCO2e", PER_STEP} <= tags
    for tag in tags - {"green/energy_total_kWh", "green/emissions_total_gCO2e"}:
        assert column(rows, tag) == pytest.approx({e.step: e.value for e in found.Scalars(tag)}, rel=1e-6)
    assert list(column(rows, PER_STEP)) == list(column(rows, "train_loss")) == list(range(12))
    last = [float(row["green/energy_total_kWh"]) for row in rows if row["green/energy_total_kWh"]][-1]
    assert last == pytest.approx(bench.green.summary().totals.energy_j / 3.6e6)


def test_a_second_tensorboard_logger(bench):
    """The second one gets its values through log_metrics, into its own single event file."""
    first, second = (bench.pl.loggers.TensorBoardLogger(bench.path, name="", version=name) for name in ("a", "b"))
    bench.trainer(bench.monitor(), logger=[first, second]).fit(bench.module(), data())
    for name in ("a", "b"):
        assert steps_of(events(bench.path / name), PER_STEP) == list(range(5))
    assert (bench.path / "a" / "green").exists()
    assert not (bench.path / "b" / "green").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_tensorboard_logger_on_remote_storage(tmp_path, package):
    """By way of fsspec, as on s3:// or gs://: its own writer gets every value; what there is not (our files) is said, once."""
    bench = Bench(tmp_path / "local", package)
    logger = bench.pl.loggers.TensorBoardLogger(f"memory://{tmp_path.name}", name="exp")
    with pytest.warns(GreenTorchWarning, match="the values go there by the SummaryWriter, but the run leaves no files") as said:
        bench.trainer(bench.monitor(), logger=logger).fit(bench.module(), data())
    assert len([one for one in said if issubclass(one.category, GreenTorchWarning)]) == 1
    assert len(bench.green.summary().warnings) == 1
    fsspec.filesystem("memory").get(f"/{tmp_path.name}/", str(tmp_path / "copy"), recursive=True)
    found = events(tmp_path / "copy" / "exp" / "version_0")
    assert steps_of(found, PER_STEP) == steps_of(found, "train_loss") == list(range(5))
    assert "green/snapshot" in found.Tags()["tensors"]
    assert not bench.path.exists()


def test_any_other_logger_on_remote_storage(bench):
    """It gets the values by log_metrics; that there are no files is said."""

    class Elsewhere(Remembers):
        save_dir = "memory://elsewhere"

    logger = Elsewhere()
    with pytest.warns(GreenTorchWarning, match="no files from GreenMonitor: memory://elsewhere/remembers/one is not a local"):
        bench.trainer(bench.monitor(), logger=logger).fit(bench.module(), data())
    assert [row[PER_STEP] for _, row in logger.ours() if PER_STEP in row] == pytest.approx([60.0] * 5, rel=CLOSE)


def test_any_logger_gets_the_records(bench):
    """log_metrics is called on the training thread, at most once a record, before the logger is told of the end; the last totals are there."""
    logger = Remembers()
    bench.trainer(bench.monitor(), logger=logger, max_steps=6).fit(bench.module(), data())
    assert logger.threads == {threading.get_ident()}
    assert logger.status == "success"
    assert len(logger.ours()) <= len(bench.sink.records)
    assert [row[PER_STEP] for _, row in logger.ours() if PER_STEP in row] == pytest.approx([60.0] * 6, rel=CLOSE)
    assert not any(tag.startswith("green_detail/") for _, row in logger.rows for tag in row)
    assert logger.ours()[-1][1]["green/energy_total_kWh"] == pytest.approx(bench.green.summary().totals.energy_j / 3.6e6)
    assert (bench.path / "remembers" / "one" / "green" / "rank-00000.segment-0001.jsonl").exists()


def test_a_logger_whose_steps_must_not_go_back(bench):
    """As with wandb.log(step=): late records are logged on the step that the loss has reached, never on an earlier one."""
    seen = [0]

    def demand(_metrics, step):
        assert step >= seen[-1], f"step {step} after {seen[-1]}"
        seen.append(step)

    logger = Remembers(demand)
    late(bench).trainer(bench.monitor(), logger=logger, max_steps=20, limit_val_batches=1, val_check_interval=7).fit(
        bench.module(), data(), data(2)
    )
    assert len(logger.ours()) >= 4
    assert bench.green.summary().warnings == ()
    assert [step for step, row in logger.rows if "train_loss" in row] == list(range(20))


def test_a_logger_that_raises_is_left_alone(bench):
    """One warning, no more calls of ours; training, the loss and the other logger go on."""

    def refuse(metrics, _step):
        if PER_STEP in metrics:
            raise ConnectionError("no server")

    refuses, takes = Remembers(refuse), Remembers()
    with pytest.warns(GreenTorchWarning, match="Remembers takes no values of green_torch: ConnectionError: no server"):
        bench.trainer(bench.monitor(), logger=[refuses, takes]).fit(bench.module(), data())
    assert len([step for step, row in refuses.rows if "train_loss" in row]) == 5
    assert len([step for step, row in takes.ours() if PER_STEP in row]) == 5
    assert len(bench.green.summary().warnings) == 1
    assert bench.green.summary().status == "completed"


def test_a_logger_that_hangs_is_left_alone(bench):
    """A call of 6 s is the last one, with one warning."""
    logger = Remembers(lambda metrics, _step: bench.clock.advance(6.0) if PER_STEP in metrics else None)
    with pytest.warns(GreenTorchWarning, match=r"Remembers took 6\.0 s"):
        bench.trainer(bench.monitor(), logger=logger).fit(bench.module(), data())
    assert len([row for _, row in logger.ours() if PER_STEP in row]) == 1


def test_a_slow_logger_gets_fewer_records(bench):
    """With 0.5 s a call, our calls take no more than 2 % of the run beyond the first second; the last totals are logged all the same."""
    logger = Remembers(lambda metrics, _step: bench.clock.advance(0.5) if "green/energy_total_kWh" in metrics else None)
    bench.trainer(bench.monitor(), logger=logger, max_steps=500, max_epochs=-1).fit(bench.module(), data())
    spent_s = 0.5 * len(logger.ours())
    assert 2.0 <= spent_s <= 2.0 + 0.02 * bench.green.summary().totals.duration_s
    assert logger.ours()[-1][1]["green/energy_total_kWh"] == pytest.approx(
        bench.green.summary().totals.energy_j / 3.6e6, rel=0.01
    )
    assert bench.green.summary().warnings == ()


@pytest.mark.parametrize("kind", ["validate", "test", "predict"])
def test_evaluation_alone_goes_to_no_logger(bench, kind):
    """Its totals are a run of their own, and would make the fit's go back in the same charts."""
    logger = Remembers()
    getattr(bench.trainer(bench.monitor(), logger=logger), kind)(bench.module(), data(3))
    assert logger.ours() == []
    (file,) = (bench.path / "remembers" / "one" / kind / "green").iterdir()
    assert read_jsonl(file).summary == bench.green.summary()


def test_a_sink_serves_every_run(bench):
    """A sink that was given is not closed between runs; it gets each run's records and summary, and is closed with the monitor."""
    monitor = bench.monitor()
    bench.trainer(monitor).fit(bench.module(), data())
    first = bench.sink.summary
    bench.trainer(monitor).fit(bench.module(), data())
    assert first is not None
    assert first.manifest.run_id != bench.sink.summary.manifest.run_id
    assert [record.step for record in bench.of("train")] == [0, 1, 2, 3, 4] * 2
    assert not bench.sink.closed
    del monitor, bench.green

    gc.collect()
    assert bench.sink.closed


def test_a_sink_that_fails_is_named(bench):
    """A sink of the user's that raises is switched off under its own name."""

    class MySink:
        def write(self, item: Any) -> None:
            raise OSError("no space")

        def close(self) -> None:
            pass

    with pytest.warns(GreenTorchWarning, match="MySink is switched off: OSError: no space"):
        bench.trainer(bench.monitor(sinks=[MySink()])).fit(bench.module(), data())


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
def test_the_progress_bar(tmp_path, package, bar, capfd):
    """On request either bar shows power, emissions so far and at the end, and the time left: anew once a second, at five steps in one."""
    bench = Bench(tmp_path, package)
    shown = []

    class Looks(bench.pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            shown.append(trainer.progress_bar_callback.get_metrics(trainer, module).get("green"))

    own = getattr(bench.pl.callbacks, bar)(refresh_rate=1)
    trainer = bench.trainer(bench.monitor(progress_bar=True), Looks(), own, enable_progress_bar=True, max_steps=10)
    trainer.fit(bench.module(), data())
    assert shown[0] is None
    assert list(dict.fromkeys(shown[1:])) == [
        "300 W, 1.67 mgCO2e of 16.7 mgCO2e, 0:00:02 left",
        "300 W, 10.0 mgCO2e of 16.7 mgCO2e, 0:00:01 left",
    ]
    assert trainer.progress_bar_metrics["green"] == "300 W, 16.7 mgCO2e of 16.7 mgCO2e, 0:00:00 left"
    if bar == "TQDMProgressBar":
        printed = capfd.readouterr()
        assert "green=300 W" in printed.out + printed.err


def test_no_progress_bar_metric_unless_asked_for(bench):
    """By default the bar is as Lightning makes it."""
    trainer = bench.trainer(bench.monitor())
    trainer.fit(bench.module(), data())
    assert "green" not in trainer.progress_bar_metrics


def test_no_progress_bar_metric_where_no_bar_shows(bench):
    """Where the trainer has no bar, nothing is made for it."""
    trainer = bench.trainer(bench.monitor(progress_bar=True))
    trainer.fit(bench.module(), data())
    assert "green" not in trainer.progress_bar_metrics


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, as far as it is written: LevelDB's log format (blocks of 32 KiB, pieces with a header of 7 bytes)."""
    from wandb.proto import wandb_internal_pb2

    raw, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:  # no room for a header: the block's end is padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        if at + 7 + length > len(raw):
            return
        whole += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:  # a whole record, or its last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def wandb_rows(path: Path) -> list[dict[str, float]]:
    """The history rows of a .wandb file, once its run has ended there: wandb's own process may still write it."""
    deadline = time.monotonic() + 20
    records = list(wandb_records(path))
    while not any(record.HasField("exit") for record in records):
        assert time.monotonic() < deadline, "wandb does not end its file"
        time.sleep(0.05)
        records = list(wandb_records(path))
    rows = [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item} for record in records]
    return [row for row in rows if row]


@pytest.mark.parametrize("package", PACKAGES)
def test_weights_and_biases(tmp_path, package, monkeypatch):
    """The real package, offline: its own file has our values on the steps of the loss (``trainer/global_step``), late as they are."""
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    bench = late(Bench(tmp_path, package))
    logger = bench.pl.loggers.WandbLogger(save_dir=tmp_path, offline=True, project="p")
    bench.trainer(bench.monitor(), logger=logger, max_steps=12).fit(bench.module(), data())
    run = logger.version
    wandb.finish()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert bench.green.summary().warnings == ()
    rows = wandb_rows(path)
    ours = [row for row in rows if PER_STEP in row]
    assert [row["trainer/global_step"] for row in ours] == [row["trainer/global_step"] for row in rows if "train_loss" in row]
    assert [row["trainer/global_step"] for row in ours] == list(range(12))
    assert sum(row[PER_STEP] for row in ours) == pytest.approx(bench.green.summary().totals.energy_j, rel=CLOSE)
    assert (tmp_path / "p" / run / "green" / "rank-00000.segment-0001.jsonl").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_mlflow(tmp_path, package, monkeypatch):
    """The real package with a store of files: every value stands under its own name and step, and the run is finished."""
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    bench = late(Bench(tmp_path, package))
    logger = bench.pl.loggers.MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns")
    bench.trainer(bench.monitor(), logger=logger, max_steps=12).fit(bench.module(), data())
    client = mlflow.MlflowClient(f"file:{tmp_path}/mlruns")
    assert client.get_run(logger.run_id).info.status == "FINISHED"
    for tag in (PER_STEP, "green/emissions_per_step_gCO2e", "green/step_time_s"):
        history = client.get_metric_history(logger.run_id, tag)
        assert [metric.step for metric in history] == list(range(12))
    total = client.get_metric_history(logger.run_id, "green/energy_total_kWh")[-1].value
    assert total == pytest.approx(bench.green.summary().totals.energy_j / 3.6e6)


@pytest.mark.parametrize(
    ("values", "left_s", "text"),
    [
        ({}, None, "unknown, unknown"),
        ({"green/power_W": 312.4, "green/emissions_total_gCO2e": 0.5}, None, "312 W, 500 mgCO2e"),
        (
            {"green/power_W": 300.0, "green/emissions_total_gCO2e": 12.0, "green/projected_total_gCO2e": 3400.0},
            3723.4,
            "300 W, 12.0 gCO2e of 3.40 kgCO2e, 1:02:03 left",
        ),
    ],
)
def test_the_text_of_the_progress_bar(values, left_s, text):
    """What is known, with its units; what is not is said or left out."""
    assert progress(values, left_s) == text


def test_a_summary_on_the_way_tells_what_is_to_come(bench):
    """While the run goes on: joules, grams and time of the planned steps, evaluation between them included; at the end nothing is left."""
    seen = []

    class Looks(bench.pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 101:
                seen.append(bench.green.summary())

    monitor = bench.monitor()
    bench.trainer(
        monitor, Looks(), max_steps=1000, max_epochs=-1, val_check_interval=10, limit_val_batches=10, num_sanity_val_steps=0
    ).fit(bench.module(), data(), data(10))
    (summary,) = seen  # 100 steps and 10 evaluations of 1 s
    assert summary.resolved_through == 99
    assert summary.time_left_s == pytest.approx(900 * 0.2 + 90 * 1.0, rel=CLOSE)
    assert summary.projected_energy_j == pytest.approx(POWER_W * (1000 * 0.2 + 100 * 1.0), rel=CLOSE)
    (line,) = (text for name, text in summary.lines() if name == "projected")
    assert line == "2.50 gCO2e and 25.0 Wh for 1000 steps, 0:04:30 left"
    ended = bench.green.summary()
    assert ended.time_left_s == 0
    assert "projected" not in dict(ended.lines())
