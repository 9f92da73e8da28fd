"""What the records of a run are made into: projections, above all of runs that go on from a checkpoint."""

from __future__ import annotations

import json

import pytest

import green_torch
from green_torch.testing import ScriptedClock, ScriptedMeter


@pytest.mark.parametrize("base", [0, 1])
def test_a_resumed_run_is_projected_to_its_end_on_any_step_axis(tmp_path, base):
    """Three steps of five are done: two are left, whether the axis calls the third 2 or 3 (as Hugging Face does)."""
    steps, saved = iter(range(base, base + 5)), None
    for count in (3, 1):
        clock = ScriptedClock()
        meter = ScriptedMeter(clock, {"gpu0": 100.0})
        tracker = green_torch.track(
            clock=clock, meters=[meter], intensity=3.6e6, log_dir=tmp_path, planned_steps=5, log_every_n_steps=1
        )
        if saved:
            tracker.load_state_dict(json.loads(saved))
        with tracker:
            for _ in range(count):
                clock.advance(1.0)
                tracker.step(step=next(steps))
            tracker.flush()
            saved = json.dumps(tracker.state_dict())
            summary = tracker.summary()
        assert tracker.steps_done == tracker.last_step + 1 - base
    assert summary.time_left_s == pytest.approx(1.0, rel=0.05)
    assert summary.projected_total_g == pytest.approx(5 * 100.0, rel=0.05)
    assert summary.projected_energy_j == pytest.approx(5 * 100.0, rel=0.05)


def test_a_checkpoint_of_an_earlier_version_counts_from_zero(tmp_path):
    """Where it doesn't tell how many steps were done, its step does."""
    tracker = green_torch.track(clock=ScriptedClock(), meters=[], intensity=1.0, log_dir=tmp_path)
    tracker.load_state_dict({"run_id": "a", "segment": 1, "step": 7, "log_dir": str(tmp_path)})
    assert (tracker.last_step, tracker.steps_done) == (7, 8)
