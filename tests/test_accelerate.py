"""Accelerate: its loop under ``track()``, alone, and as the example in two processes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import green_torch
from green_torch.records import Flag, Phase
from green_torch.sinks.jsonl import read_jsonl
from green_torch.testing import MemorySink, ScriptedClock, ScriptedMeter
from tests.processes import TWO_RANKS

accelerate = pytest.importorskip("accelerate")

EXAMPLE = Path(__file__).parent.parent / "examples" / "accelerate_loop.py"
STEPS = 3


@pytest.fixture
def anew():
    """Accelerate keeps one state a process; the next test may want another precision."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accumulated_micro_batches_are_one_step(precision):
    """300 W for four micro-batches of 0.1 s are a step of 120 J, and FLOPs are counted through Accelerate's autocast, in its dtype."""
    clock, sink = ScriptedClock(), MemorySink()
    meter = ScriptedMeter(clock, {"gpu0": 300.0}, period_s=0.02)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4, mixed_precision=precision)
    model = torch.nn.Linear(16, 8, bias=False)
    batches = [torch.randn(2, 16) for _ in range(4 * STEPS)]
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with green_torch.track(model, clock=clock, meters=[meter], sinks=[sink], intensity=1.0, log_every_n_steps=1) as tracker:
        for number, batch in enumerate(batches):
            accelerator.gradient_state._set_sync_gradients((number + 1) % 4 == 0)
            clock.advance(0.1)
            accelerator.backward(model(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                tracker.step(samples=8)
    train = [record for record in sink.records if record.phase is Phase.TRAIN]
    assert [record.energy_j for record in train] == pytest.approx([120.0] * STEPS, rel=1e-3)
    forward = 2 * 2 * 16 * 8
    assert [record.model_flops for record in train] == [4 * 2 * forward] * STEPS  # the input has no gradient
    assert {peak.dtype for peak in sink.manifest.peaks} == {"mm/bfloat16" if precision == "bf16" else "mm/float32"}
    assert [record.flagged(Flag.COUNTED) for record in train] == [True, False, False]


def test_the_example_runs_in_two_processes(tmp_path):
    """Each process keeps a file of its own steps; the first alone writes events, with the loss on the same steps."""
    log_dir = tmp_path / "runs"
    done = subprocess.run(
        [*TWO_RANKS, str(EXAMPLE), "--steps", str(STEPS), "--log-dir", str(log_dir)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"tensorboard --logdir {log_dir}" in done.stdout
    files = [read_jsonl(path) for path in sorted((log_dir / "green").iterdir())]
    assert [(file.manifest.rank, file.manifest.world_size) for file in files] == [(0, 2), (1, 2)]
    for file in files:
        train = [record for record in file.records if record.phase is Phase.TRAIN]
        assert [(record.step, record.samples) for record in train] == [(step, 4 * 32) for step in range(STEPS)]
        assert len({record.model_flops for record in train}) == 1
        assert train[0].model_flops
        assert file.summary is not None
        assert file.summary.status == "completed"
    (event_file,) = log_dir.glob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(event_file), size_guidance={"scalars": 0})
    accumulator.Reload()
    for tag in ("loss", "green/step_time_s"):
        assert [event.step for event in accumulator.Scalars(tag)] == list(range(STEPS))
