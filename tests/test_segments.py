"""A run over several starts of its process: its id, its step axis, what its files tell, and what came before."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import green_torch
from green_torch.errors import GreenTorchWarning
from green_torch.records import Phase
from green_torch.segments import checkpoint
from green_torch.sinks.jsonl import read_jsonl, read_last, run_file, run_files
from green_torch.testing import ScriptedClock, ScriptedMeter

SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n1"}


class Segment:
    """One start of the process: 300 W, and steps whose length depends on their number alone, as does the evaluation at 5."""

    def __init__(self, log_dir, state: dict[str, Any] | None = None, *, inside: bool = False, **options) -> None:
        self.clock = ScriptedClock()
        meter = ScriptedMeter(self.clock, {"gpu0": 300.0})
        self.tracker = green_torch.track(
            clock=self.clock, meters=[meter], intensity=3.6e6, log_dir=log_dir, log_every_n_steps=1, **options
        )
        self.state = state
        self.inside = inside
        if state is not None and not inside:
            self.tracker.load_state_dict(state)

    def run(self, until: int, *, save_after: int = -1) -> dict[str, Any]:
        """Steps up to this one; returns the state of the checkpoint."""
        saved: dict[str, Any] = {}
        with self.tracker as tracker:
            if self.state is not None and self.inside:
                tracker.load_state_dict(self.state)
            for step in range(tracker.last_step + 1, until + 1):
                self.clock.advance(0.1 + 0.01 * step)
                tracker.step(tokens=step + 1)
                if step == save_after:
                    saved = json.loads(json.dumps(tracker.state_dict()))
                if step == 5:
                    with tracker.phase("eval"):
                        self.clock.advance(1.0)
        return saved


def crash(path) -> None:
    """What a file looks like whose process was killed: no summary, and half a line at its end."""
    lines = path.read_bytes().splitlines(keepends=True)
    assert b'"type":"summary"' in lines[-1]
    path.write_bytes(b"".join(lines[:-1]) + lines[-2][:50])


def useful(log_dir) -> dict[str, float]:
    """Joules and tokens by phase, without what was done again, by what the manifests say."""
    runs = [read_jsonl(path) for path, _, _ in run_files(log_dir)]
    sums: dict[str, float] = {"tokens": 0.0, Phase.TRAIN: 0.0, Phase.EVAL: 0.0}
    for place, run in enumerate(runs):
        last = min((later.manifest.resumed_from_step for later in runs[place + 1 :]), default=10**9)
        for record in run.records:
            if record.step <= last and record.phase in sums:
                sums[record.phase] += record.energy_j
                sums["tokens"] += record.tokens or 0
    return sums


@pytest.mark.parametrize("inside", [False, True])
def test_useful_totals_equal_an_uninterrupted_runs(tmp_path, inside):
    """Crashed twice, and steps done again: what counts is what one run without a crash would have used."""
    Segment(tmp_path / "whole").run(11)
    log_dir = tmp_path / "crashed"
    first = Segment(log_dir)
    state = first.run(8, save_after=3)
    crash(run_file(log_dir, 0, 1))
    Segment(log_dir, state, inside=inside).run(9)  # dies before its next checkpoint
    crash(run_file(log_dir, 0, 2))
    third = Segment(log_dir, state, inside=inside)
    third.run(11)
    assert useful(log_dir) == pytest.approx(useful(tmp_path / "whole"), rel=1e-3)

    manifests = [read_last(path).manifest for path, _, _ in run_files(log_dir)]
    assert {manifest.run_id for manifest in manifests} == {state["run_id"]}
    assert [manifest.segment for manifest in manifests] == [1, 2, 3]
    assert [manifest.resumed_from_step for manifest in manifests] == [None, 3, 3]
    assert [manifest.previous_segment for manifest in manifests] == [None, 1, 1]
    assert [record.step for record in read_jsonl(run_file(log_dir, 0, 3)).records][:2] == [4, 5]
    earlier = [sum(record.energy_j for record in read_jsonl(run_file(log_dir, 0, n)).records) for n in (1, 2)]
    assert manifests[2].carried_energy_j == pytest.approx(sum(earlier))  # all of it, wasted work too
    assert manifests[2].carried_emissions_g == pytest.approx(sum(earlier))
    assert third.tracker.summary().totals.energy_j < sum(earlier)
    assert "segment      3, goes on after step 3" in str(third.tracker.summary())


def test_live_totals_go_on(tmp_path):
    """TensorBoard's cumulative tags begin where the earlier segment's ended, and the step axis goes on."""
    state = Segment(tmp_path).run(6, save_after=6)
    before_j = read_last(run_file(tmp_path, 0, 1)).summary.totals.energy_j
    Segment(tmp_path, state).run(9)
    # this process, which wrote the first event file, still lives: the second stands in the sub-run
    values = EventAccumulator(str(tmp_path / "green"), size_guidance={"scalars": 0}).Reload()
    totals = values.Scalars("green/energy_total_kWh")
    assert [event.step for event in totals][:3] == [7, 8, 9]
    assert totals[0].value * 3.6e6 == pytest.approx(before_j + 300 * 0.17, rel=1e-5)
    assert values.Scalars("green/emissions_total_gCO2e")[0].value == pytest.approx(before_j + 300 * 0.17, rel=1e-5)


def test_a_checkpoint_ends_the_record_under_way(tmp_path):
    """With ten steps to a record, what comes after the checkpoint still stands in records of its own."""
    clock = ScriptedClock()
    meter = ScriptedMeter(clock, {"gpu0": 300.0})
    with green_torch.track(clock=clock, meters=[meter], intensity=1, log_dir=tmp_path, log_every_n_steps=10) as tracker:
        for step in range(20):
            clock.advance(0.1)
            tracker.step()
            if step == 3:
                tracker.state_dict()
    assert [record.step for record in read_jsonl(run_file(tmp_path, 0, 1)).records if record.phase is Phase.TRAIN] == [3, 9, 19]


def test_a_run_goes_on_in_another_directory(tmp_path):
    """The state tells where its segments are, so that what they used is found."""
    state = Segment(tmp_path / "version_0").run(3, save_after=3)
    manifest_of = Segment(tmp_path / "version_1", state)
    manifest_of.run(5)
    manifest = read_last(run_file(tmp_path / "version_1", 0, 2)).manifest
    assert (manifest.run_id, manifest.segment) == (state["run_id"], 2)
    assert manifest.carried_energy_j == pytest.approx(300 * (0.1 + 0.11 + 0.12 + 0.13), rel=1e-6)


def test_a_run_that_moves_twice_carries_all(tmp_path):
    """Each segment in a directory of its own, as Lightning's version_0, version_1, ...: what each used is carried, once."""
    state, used = None, []
    for version in range(4):
        log_dir = tmp_path / f"version_{version}"
        segment = Segment(log_dir, state)
        state = segment.run(3 * version + 3, save_after=3 * version + 2)
        assert segment.tracker.manifest.carried_energy_j == (pytest.approx(sum(used)) if used else None)
        used.append(segment.tracker.summary().totals.energy_j)
    Segment(log_dir, state).run(14, save_after=14)
    last = read_last(run_file(log_dir, 0, 5))
    assert last.manifest.carried_energy_j == pytest.approx(sum(used))
    assert last.manifest.carried_emissions_g == pytest.approx(sum(used))


def test_a_strangers_segments_are_not_carried(tmp_path):
    """Another run in the same directory is no part of this one."""
    Segment(tmp_path).run(3)
    state = Segment(tmp_path).run(3, save_after=3)
    Segment(tmp_path, state).run(5)
    one = read_last(run_file(tmp_path, 0, 2)).summary.totals.energy_j
    assert read_last(run_file(tmp_path, 0, 3)).manifest.carried_energy_j == pytest.approx(one)


def test_an_unreadable_segment_is_named(tmp_path):
    """A file that is not ours any more is left out of the sums, and the summary says so."""
    state = Segment(tmp_path).run(3, save_after=3)
    run_file(tmp_path, 0, 1).write_text("garbage\n" * 3)
    resumed = Segment.__new__(Segment)
    with pytest.warns(GreenTorchWarning, match="left out of the run's totals"):
        resumed.__init__(tmp_path, state)
    resumed.run(5)
    assert resumed.tracker.manifest.carried_energy_j is None


@pytest.mark.parametrize(
    "state", [{"step": 3}, {"run_id": "a", "segment": "1", "step": 2}, {"run_id": 1, "segment": 1, "step": 1}]
)
def test_what_is_no_state_is_left_out(tmp_path, state):
    """A state of something else is warned of, and the run is a new one."""
    assert checkpoint(state) is None
    segment = Segment(tmp_path)
    with pytest.warns(GreenTorchWarning, match="this counts as a new run"):
        segment.tracker.load_state_dict(state)
    segment.run(2)
    assert segment.tracker.manifest.resumed_from_step is None


def test_a_state_that_comes_too_late_is_left_out(tmp_path):
    """After the first step the axis can't change any more."""
    state = Segment(tmp_path).run(3, save_after=3)
    late = Segment(tmp_path / "late")
    with late.tracker as tracker:
        late.clock.advance(0.1)
        tracker.step()
        with pytest.warns(GreenTorchWarning, match="after the first step"):
            tracker.load_state_dict(state)
    assert tracker.manifest.run_id != state["run_id"]
    assert tracker.last_step == 0


def test_where_nothing_is_measured_there_is_no_state():
    """enabled=False: an empty state, which changes nothing when loaded."""
    off = green_torch.track(enabled=False)
    assert off.state_dict() == {}
    Segment(None).tracker.load_state_dict({})


def test_a_requeued_job_goes_on(tmp_path, monkeypatch):
    """Slurm starts the job again: same run without a checkpoint's state, what came before is carried, the job stands in the manifest."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    Segment(tmp_path).run(3)
    crash(run_file(tmp_path, 0, 1))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = Segment(tmp_path)
    again.run(3)
    first, second = (read_last(run_file(tmp_path, 0, n)) for n in (1, 2))
    assert second.manifest.run_id == first.manifest.run_id
    assert second.manifest.resumed_from_step is None
    assert second.manifest.carried_energy_j == pytest.approx(first.records[-1].totals.energy_j)
    assert second.manifest.job == {
        "scheduler": "slurm", "job_id": "4711", "node_list": "n[1-2]", "node": "n1", "restart_count": "1"
    }  # fmt: skip
    assert any("load_state_dict" in warning for warning in again.tracker.summary().warnings)


def test_a_runs_own_start_is_no_earlier_one(tmp_path, monkeypatch):
    """What this very start of the job has left undone in the same directory is another run, not an earlier part of this one."""
    for name, value in {**SLURM, "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    Segment(tmp_path).run(3)
    crash(run_file(tmp_path, 0, 1))
    again = Segment(tmp_path)
    again.run(3)
    assert again.tracker.manifest.run_id != read_last(run_file(tmp_path, 0, 1)).manifest.run_id
    assert again.tracker.summary().warnings == ()


@pytest.mark.parametrize("change", [{"SLURM_JOB_ID": "4712"}, {"SLURM_RESTART_COUNT": "0"}, {}])
def test_another_job_or_a_completed_run_does_not_go_on(tmp_path, monkeypatch, change):
    """Another job id, no requeue, or a run that was completed: a new run."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    Segment(tmp_path).run(3)
    if change:
        crash(run_file(tmp_path, 0, 1))
    for name, value in {"SLURM_RESTART_COUNT": "1", **change}.items():
        monkeypatch.setenv(name, value)
    Segment(tmp_path).run(3)
    first, second = (read_last(run_file(tmp_path, 0, n)).manifest for n in (1, 2))
    assert first.run_id != second.run_id


def test_a_requeued_task_of_an_array_goes_on(tmp_path, monkeypatch):
    """Array and task stand in the manifest; a task that is requeued goes on with its run, and another one of the array does not."""
    for name, value in {**SLURM, "SLURM_ARRAY_JOB_ID": "4710", "SLURM_ARRAY_TASK_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    Segment(tmp_path).run(3)
    crash(run_file(tmp_path, 0, 1))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    Segment(tmp_path).run(3)
    crash(run_file(tmp_path, 0, 2))
    for name, value in {"SLURM_JOB_ID": "4712", "SLURM_ARRAY_TASK_ID": "8"}.items():
        monkeypatch.setenv(name, value)
    Segment(tmp_path).run(3)
    first, second, other = (read_last(run_file(tmp_path, 0, n)).manifest for n in (1, 2, 3))
    assert [(run.job["array_job_id"], run.job["array_task_id"]) for run in (first, second, other)] == [
        ("4710", "7"), ("4710", "7"), ("4710", "8")
    ]  # fmt: skip
    assert first.run_id == second.run_id != other.run_id
    crash(run_file(tmp_path, 0, 3))
    for name, value in {"SLURM_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "7", "SLURM_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    Segment(tmp_path).run(3)  # the other task's file is the newest here
    assert read_last(run_file(tmp_path, 0, 4)).manifest.run_id == first.run_id
