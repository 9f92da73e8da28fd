"""The examples: run as a user runs them, and what they leave behind read back."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import green_torch
from green_torch.records import Flag, Phase
from green_torch.sinks.jsonl import RunFile, read_jsonl, run_file
from tests.processes import ENVIRONMENT, GREEN_TORCH, TWO_RANKS

EXAMPLES = Path(__file__).parent.parent / "examples"
README = EXAMPLES.parent / "README.md"
STEPS = 4


def run(name: str, log_dir: Path) -> str:
    """What the example prints."""
    command = [sys.executable, str(EXAMPLES / name), "--steps", str(STEPS), "--log-dir", str(log_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=log_dir.parent
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"tensorboard --logdir {log_dir}" in done.stdout
    return done.stdout


def written(directory: Path) -> tuple[EventAccumulator, RunFile]:
    """The one event file and the one run file of a directory."""
    (event_file,) = directory.glob("events.out.tfevents.*")
    (jsonl,) = (directory / "green").iterdir()
    accumulator = EventAccumulator(str(event_file), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator, read_jsonl(jsonl)


def steps_of(accumulator: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in accumulator.Scalars(tag)]


def test_names_in_the_readme_are_there():
    """Each dotted name of ours resolves; one that is called needs no import but ``import green_torch`` or the one beside it."""
    text = README.read_text(encoding="utf-8")
    for module, names in re.findall(r"from (green_torch[\w.]*) import ([\w, ]+)", text):
        assert all(getattr(importlib.import_module(module), name) for name in names.split(", "))
    for name in re.findall(r"\bgreen_torch(?:\.[a-z_]\w*)+", text, re.IGNORECASE):
        pkgutil.resolve_name(name)
    called = re.findall(r"\bgreen_torch\.([\w.]+)\(", text)
    assert "track" in called
    assert set(called) <= set(green_torch.__all__)


def test_loop_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """The loop as it stands there trains, and prints what it cost first."""
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    model = torch.nn.Linear(4, 1)

    def train_step(batch):
        loss = model(batch).mean()
        loss.backward()
        return loss

    exec(snippet, {"model": model, "loader": [torch.ones(2, 4)] * 3, "train_step": train_step, "evaluate": lambda: None})
    assert re.match(r"cost +\S+ \S*Wh, \S+ \S*gCO2e \(operational, location-based; ", capsys.readouterr().out)
    _, found = written(tmp_path / "runs" / "bf16")
    assert found.summary.status == "completed"


@pytest.mark.parametrize(
    ("example", "run_dir", "loss", "work"),
    [
        ("lightning_gpt.py", "version_0", "train_loss", {"samples": 8, "tokens": 8 * 64}),
        ("custom_loop.py", ".", "loss", {"samples": 128, "tokens": None}),
    ],
)
def test_example(tmp_path, example, run_dir, loss, work):
    """It trains, prints its summary, and leaves energy beside the loss, on the same steps, in one event file and one JSONL."""
    log_dir = tmp_path / "runs"
    printed = run(example, log_dir)
    assert "gCO2e" in printed
    events, file = written(log_dir / run_dir)
    assert steps_of(events, loss) == list(range(STEPS))
    train = [record for record in file.records if record.phase is Phase.TRAIN]
    assert [record.step for record in train] == list(range(STEPS))
    assert all(record.samples == work["samples"] and record.tokens == work["tokens"] for record in train)
    assert all(record.model_flops and record.model_flops == train[0].model_flops for record in train)
    assert [record.flagged(Flag.COUNTED) for record in train] == [True] + [False] * (STEPS - 1)
    assert steps_of(events, "green/step_time_s") == list(range(STEPS))
    assert file.summary is not None
    assert file.summary.status == "completed"
    assert not file.torn
    if file.summary.totals.energy_j is not None:  # a machine without any meter has none
        assert steps_of(events, "green/energy_per_step_J") == list(range(STEPS))
        total = sum(phase.energy_j for phase in file.summary.totals.phases)
        assert total == pytest.approx(file.summary.totals.energy_j)
    phases = {record.phase for record in file.records}
    assert phases >= {Phase.TRAIN, Phase.EVAL}
    assert example == "custom_loop.py" or phases >= {Phase.SETUP, Phase.SAVE}


def torchrun(name: str, log_dir: Path) -> str:
    """What the example prints, in two processes."""
    command = [*TWO_RANKS, str(EXAMPLES / name), "--steps", str(STEPS), "--log-dir", str(log_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ddp_torchrun(tmp_path):
    """Two ranks: rank zero prints the job's sums, TensorBoard shows them; started again, it goes on from its checkpoint."""
    printed = torchrun("ddp_torchrun.py", tmp_path)
    assert "all ranks    2 of 2 report" in printed
    files = [read_jsonl(run_file(tmp_path, rank, 1)) for rank in (0, 1)]
    job = files[0].summary.job
    assert (job.reporting, job.ended, job.samples) == (2, 2, 2 * STEPS * 128)
    assert job.model_flops == pytest.approx(sum(file.summary.totals.phase("train").model_flops for file in files))
    known = [file.summary.totals.energy_j for file in files if file.summary.totals.energy_j is not None]
    assert job.energy_j == (pytest.approx(sum(known)) if known else None)
    assert not any(domain.name in {"cpu", "dram"} for domain in files[1].manifest.domains)
    (event_file,) = tmp_path.glob("events.out.tfevents.*")
    assert steps_of(EventAccumulator(str(event_file)).Reload(), "loss") == list(range(STEPS))

    assert f"goes on after step {STEPS - 1}" in torchrun("ddp_torchrun.py", tmp_path)
    again = read_jsonl(run_file(tmp_path, 1, 2))
    assert again.manifest.run_id == files[0].manifest.run_id
    assert [record.step for record in again.records if record.phase is Phase.TRAIN] == list(range(STEPS, 2 * STEPS))


# ── engines ──


def test_a_suspended_job_is_released_in_its_window(tmp_path):
    """The Job begins suspended, and the line above it waits for the window and then tells kubectl to release that Job."""
    text = (EXAMPLES / "kubernetes" / "job.yaml").read_text()
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"], job["spec"]["suspend"]) == ("batch/v1", "Job", True)
    assert job["spec"]["template"]["spec"]["containers"][0]["command"] == ["python", "train.py"]
    (line,) = re.findall(r"^#   (green-torch wait .*)$", text, re.MULTILINE)
    trace = tmp_path / "grid.csv"
    trace.write_text("time,g_per_kwh\n2022-06-01T00:00:00Z,300\n2022-06-01T00:00:01Z,100\n2022-06-01T00:00:02Z,100\n")
    here = f"--trace {trace} --start 2022-06-01T00:00Z --hours 0.0002 --within 3s"
    for name, does in (
        ("kubectl", f'printf "%s\\n" "$@" > {tmp_path}/asked'),
        ("green-torch", f'exec {shlex.join(GREEN_TORCH)} "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**ENVIRONMENT, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert "--region DE --hours 8 --within 24h" in line
    ran = subprocess.run(
        ["bash", "-c", line.replace("--region DE --hours 8 --within 24h", here)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr
    assert "saved against starting now" in ran.stderr
    *words, patch = (tmp_path / "asked").read_text().splitlines()
    assert words == ["patch", f"job/{job['metadata']['name']}", "--patch"]
    assert json.loads(patch) == {"spec": {"suspend": False}}
