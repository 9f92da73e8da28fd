"""What the records of a run are made into: projections, above all of runs that go on from a checkpoint."""

from __future__ import annotations

import json
import warnings

import pytest

import green_torch
from green_torch.records import IntensityPoint
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


@pytest.fixture
def run():
    """Opens a run of 1 s steps of 100 W at 3.6e6 gCO2e/kWh (1 g a joule), of which ten are planned, unless told otherwise."""

    def opened(power_w=None, **options):
        clock = ScriptedClock()
        meter = ScriptedMeter(clock, power_w or {"gpu0": 100.0})
        given = {"meters": [meter], "intensity": 3.6e6, "planned_steps": 10, "log_every_n_steps": 1, **options}
        return clock, meter, green_torch.track(clock=clock, **given)

    return opened


def test_what_comes_before_the_first_step_is_not_projected_onwards(run):
    """An evaluation ahead of training (Lightning's sanity check) comes once; one within it goes on as it has."""
    clock, _, tracker = run()
    with tracker:
        with tracker.phase("eval"):
            clock.advance(20.0)
        for _ in range(2):
            clock.advance(1.0)
            tracker.step()
        tracker.flush()
        assert tracker.summary().projected_energy_j == pytest.approx(100 * (20 + 10), rel=0.01)
        with tracker.phase("eval"):
            clock.advance(1.0)
        tracker.flush()
        summary = tracker.summary()
    assert summary.projected_energy_j == pytest.approx(100 * (20 + 10 + 5), rel=0.01)
    assert summary.time_left_s == pytest.approx(8 + 4, rel=0.01)


def test_a_pause_tells_nothing_of_further_ones(run):
    """An hour's pause after two of ten steps leaves eight seconds to go."""
    clock, _, tracker = run()
    with tracker:
        for _ in range(2):
            clock.advance(1.0)
            tracker.step()
        with tracker.phase("paused"):
            clock.advance(3600.0)
        tracker.flush()
        summary = tracker.summary()
    assert summary.time_left_s == pytest.approx(8.0, rel=0.01)
    assert summary.projected_total_g == pytest.approx(100 * (3600 + 10), rel=0.01)


class LateGrid:
    """Answers after so many failures."""

    def __init__(self, failures):
        self.left = failures

    def at(self, time_unix_ns):
        self.left -= 1
        if self.left >= 0:
            raise OSError("no answer yet")
        return IntensityPoint(3.6e6, "here", "a script")


@pytest.mark.parametrize("failures", [3, 100])
@pytest.mark.filterwarnings("ignore:.*grid intensity can't be had")
def test_steps_of_unknown_emissions_are_taken_for_typical_ones(run, failures):
    """A grid that answers late leaves a gap in the total, none in the projection; one that never does leaves nothing to project."""
    clock, _, tracker = run(intensity=LateGrid(failures))
    with tracker:
        for _ in range(5):
            clock.advance(1.0)
            tracker.step()
        tracker.flush()
        summary = tracker.summary()
    assert summary.projected_energy_j == pytest.approx(1000.0, rel=0.01)
    if failures > 5:
        assert (summary.emissions_per_step_g, summary.projected_total_g) == (None, None)
    else:
        assert summary.totals.emissions_g == pytest.approx(200.0, rel=0.01)
        assert summary.emissions_per_step_g == pytest.approx(100.0, rel=0.01)
        assert summary.projected_total_g == pytest.approx(1000.0, rel=0.01)


@pytest.mark.filterwarnings("ignore:.*gpu0 could not be read")
def test_steps_that_lack_a_meter_are_not_typical(run):
    """Where a meter fails, the mean step is that of the steps in which it was read, with their bounds; a failure is no saving."""
    clock, meter, tracker = run({"gpu0": 300.0, "cpu": 100.0})
    with tracker:
        for number in range(8):
            clock.advance(1.0)
            tracker.step(tokens=100)
            if number == 2:
                tracker.flush()
                meter.fail("gpu0")
    summary = tracker.summary()
    assert summary.energy_per_step_j == pytest.approx(400.0, rel=0.01)
    assert summary.energy_per_token_j == pytest.approx(4.0, rel=0.01)
    assert summary.energy_per_step_lo_j <= 400.0 <= summary.energy_per_step_hi_j
    assert summary.n_steps == 8
    assert summary.flags["meter_failed:gpu0"] > 2


def trained(run, log_dir, power_w=100.0, *, tokens=100, steps=10, state=None, **options):
    """A finished run of 1 s steps in a directory, its checkpoint's state and its summary."""
    clock, _, tracker = run({"gpu0": power_w}, log_dir=log_dir, **options)
    if state is not None:
        tracker.load_state_dict(state)
    with tracker:
        for _ in range(steps):
            clock.advance(1.0)
            tracker.step(tokens=tokens)
        state = tracker.state_dict()
    return state, tracker.summary()


def test_a_baseline_is_read_over_all_its_segments(run, tmp_path):
    """A run that was resumed, at half the power and once more with nothing left to do: the joules per token of all its steps."""
    state, _ = trained(run, tmp_path / "base")
    state, _ = trained(run, tmp_path / "base", 50.0, state=state)
    trained(run, tmp_path / "base", state=state, steps=0)
    _, summary = trained(run, tmp_path / "own", 75.0, baseline=tmp_path / "base")
    assert summary.manifest.baseline == "base (0.75 J/token)"
    assert summary.projected_savings_g == pytest.approx(0.0, abs=1.0)


def test_a_saving_that_may_be_none_says_so(run, tmp_path):
    """Two equal runs whose meters can't tell them apart: the saving's line says that it may be none; a true one's doesn't."""
    trained(run, tmp_path / "base")
    equal, less = (
        dict(trained(run, tmp_path / str(watts), watts, baseline=tmp_path / "base")[1].lines())["saving"]
        for watts in (100.0, 50.0)
    )
    assert "so it may be none" in equal
    assert "so it may be none" not in less


@pytest.mark.parametrize(
    ("theirs", "own", "told"),
    [
        (100, 100, None),
        (100, 200, "another batch as well: 200 tokens a step against 100"),
        (None, None, "a step is taken for a step"),
        (None, 100, "a step is taken for a step"),
    ],
)
def test_a_baseline_of_another_batch_is_told(run, tmp_path, theirs, own, told):
    """Steps that hold another amount of work, or one that nobody counted, make no saving of like with like, and the run says so once."""
    trained(run, tmp_path / "base", tokens=theirs)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _, summary = trained(run, tmp_path / "own", tokens=own, baseline=tmp_path / "base")
    found = [str(one.message) for one in said if "against baseline" in str(one.message)]
    assert len(found) == (told is not None)
    assert all(told in one and one in summary.warnings for one in found)
