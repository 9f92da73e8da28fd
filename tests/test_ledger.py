"""The ledger adds up what runs left on disk, tells how each ended, and finds what was wasted."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from green_torch import ledger, track
from green_torch.errors import ArgumentError
from green_torch.ledger import Status
from green_torch.ledger.sums import combined, without_phase
from green_torch.records import (
    DomainEnergy,
    Embodied,
    IntensityPoint,
    Manifest,
    Method,
    Phase,
    PhaseTotals,
    RunSummary,
    RunTotals,
    StepRecord,
)
from green_torch.sinks.codec import to_dict
from green_torch.sinks.jsonl import JsonlSink, read_at, read_jsonl, read_last, run_file
from green_torch.testing import ScriptedClock, ScriptedMeter
from green_torch.units import NS_PER_S
from tests.test_sinks_codec import MANIFEST, make_record

if TYPE_CHECKING:
    from pathlib import Path

START_NS = MANIFEST.started_unix_ns
MFU = 7e12 / 0.1 / 989e12
FRANCE = IntensityPoint(100.0, "FR", "a table", "lifecycle")


def written(
    top: Path,
    *,
    n_steps: int = 10,
    status: str | None = "completed",
    age_s: float = 1e6,
    folder: str = "project/run",
    **changes: object,
) -> Path:
    """A run's file of ``n_steps`` steps of 30 J, written ``age_s`` seconds ago; without a status it has no summary."""
    manifest = replace(MANIFEST, **({"intensity": FRANCE} | changes))
    sink = JsonlSink(run_file(top / folder, manifest.rank, manifest.segment))
    sink.write(manifest)
    first = 1 if manifest.resumed_from_step is None else manifest.resumed_from_step + 1
    totals = RunTotals()
    for step in range(first, first + n_steps):
        totals = combined([(1, totals), (1, step_totals())]) if totals.phases else step_totals()
        sink.write(
            make_record(
                step,
                rank=manifest.rank,
                segment=manifest.segment,
                totals=totals,
                time_unix_ns=manifest.started_unix_ns + (step - first + 1) * 100_000_000,
            )
        )
    if status is not None:
        sink.write(RunSummary(manifest, status, step, step, totals, n_steps=n_steps, mfu=MFU, hfu=0.5, peak_flop_per_s=989e12))
    sink.close()
    at = NOW_S - age_s
    os.utime(sink.path, (at, at))
    return sink.path


NOW_S = time.time()


def step_totals() -> RunTotals:
    """What one step used."""
    phase = PhaseTotals(Phase.TRAIN, 1, 0.1, 8, 8192, 30.0, 29.0, 31.0, 36.0, 1e-3, 2e-4, 1.2e-3, 7e12, 8e12)
    return RunTotals(
        (phase,), (DomainEnergy("gpu0", 30.0, 29.0, 31.0, Method.COUNTER),), 0.1, 30.0, 29.0, 31.0, 36.0, 1e-3, 2e-4, 1.2e-3
    )


def read(*tops: Path) -> ledger.Ledger:
    """The ledger as of ``NOW_S``."""
    return ledger.read(tops, now_unix_ns=int(NOW_S * NS_PER_S))


# ── sums ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

amounts = st.none() | st.floats(0, 1e12)


@st.composite
def totals(draw: st.DrawFn) -> RunTotals:
    """Totals with phases and domains drawn at random; bounds around the energy, where there are any."""

    def energy() -> tuple[float | None, float | None, float | None]:
        value = draw(amounts)
        slack = draw(st.none() | st.floats(0, 1e3))
        return (value, None, None) if value is None or slack is None else (value, max(0.0, value - slack), value + slack)

    phases = draw(st.lists(st.sampled_from(Phase), unique=True, max_size=3))
    names = draw(st.lists(st.sampled_from(["gpu0", "gpu1", "cpu"]), unique=True, max_size=3))
    return RunTotals(
        tuple(
            PhaseTotals(
                phase,
                draw(st.integers(0, 999)),
                draw(st.floats(0, 1e6)),
                None,
                draw(st.none() | st.integers(0, 999)),
                *energy(),
            )
            for phase in Phase
            if phase in phases
        ),
        tuple(DomainEnergy(name, draw(st.floats(0, 1e9)), None, None, Method.COUNTER) for name in names),
        draw(st.floats(0, 1e6)),
        *energy(),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(totals(), min_size=2, max_size=4))
def test_sums_are_additive(parts: list[RunTotals]) -> None:
    """However runs are put together, energy by phase and domain and its bounds come out the same; what is taken away again is gone."""
    whole = combined([(1, one) for one in parts])
    stepwise = parts[0]
    for one in parts[1:]:
        stepwise = combined([(1, stepwise), (1, one)])
    for name in ("energy_j", "energy_lo_j", "energy_hi_j", "duration_s"):
        found, expected = getattr(whole, name), getattr(stepwise, name)
        assert found is expected is None or found == pytest.approx(expected, rel=1e-9, abs=1e-3), name
    for phase in Phase:
        known = [one.phase(phase).energy_j for one in parts if one.phase(phase).energy_j is not None]
        assert whole.phase(phase).energy_j == (pytest.approx(sum(known)) if known else None)
        assert whole.phase(phase).n_steps == sum(one.phase(phase).n_steps for one in parts)
    assert sum(domain.energy_j for domain in whole.domains) == pytest.approx(
        sum(domain.energy_j for one in parts for domain in one.domains)
    )
    rest = combined([(1, whole), (-1, parts[0])])
    others = combined([(1, one) for one in parts[1:]])
    assert (rest.energy_j or 0.0) == pytest.approx(others.energy_j or 0.0, abs=1e-2)
    if whole.energy_lo_j is not None and whole.energy_hi_j is not None:
        assert whole.energy_lo_j <= whole.energy_j * (1 + 1e-9) <= whole.energy_hi_j * (1 + 1e-6) + 1e-6


def test_a_phase_can_be_left_out() -> None:
    """Without its set-up a run has the other phases' joules, and the domains sum to them."""
    setup = PhaseTotals(Phase.SETUP, 1, 1.0, None, None, 10.0, 9.0, 11.0, 12.0, 1e-4, None, 1e-4)
    both = combined(
        [(1, step_totals()), (1, RunTotals((setup,), (DomainEnergy("gpu0", 10.0, 9.0, 11.0, Method.COUNTER),), 1.0, 10.0))]
    )
    rest = without_phase(both, Phase.SETUP)
    assert rest.energy_j == pytest.approx(30.0)
    assert [phase.phase for phase in rest.phases] == [Phase.TRAIN]
    assert sum(domain.energy_j for domain in rest.domains) == pytest.approx(30.0)
    assert without_phase(rest, Phase.SETUP) is rest


# ── how a run ended ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "age_s", "expected"),
    [
        ("completed", 1.0, Status.COMPLETED),
        ("failed", 1.0, Status.FAILED),
        ("requeued", 1e5, Status.REQUEUED),
        ("interrupted", 1e5, Status.INTERRUPTED),
        (None, 60.0, Status.RUNNING),
        (None, 1e5, Status.KILLED),
        ("running", 1e5, Status.KILLED),
    ],
)
def test_the_end_of_a_file_tells_how_its_run_ended(tmp_path: Path, status: str | None, age_s: float, expected: Status) -> None:
    """The summary says so; without one, a file that was written lately is a run that goes on, an old one a killed run."""
    written(tmp_path, status=status, age_s=age_s)
    (run,) = read(tmp_path).runs
    assert run.status is expected
    assert run.totals.energy_j == pytest.approx(300.0)
    assert (run.wasted.energy_j or 0.0) == (pytest.approx(300.0) if expected in {Status.FAILED, Status.KILLED} else 0.0)


def test_a_run_with_long_phases_is_given_time(tmp_path: Path) -> None:
    """Where an evaluation takes an hour, an hour of silence is no death; ten are."""
    manifest = replace(MANIFEST, run_id="slow")
    sink = JsonlSink(run_file(tmp_path / "a", 0, 1))
    evaluation = PhaseTotals(Phase.EVAL, 2, 7200.0)
    sink.write(manifest)
    sink.write(make_record(1, totals=RunTotals((evaluation,))))
    sink.close()
    for age_s, expected in ((4000.0, Status.RUNNING), (40_000.0, Status.KILLED)):
        os.utime(sink.path, (NOW_S - age_s, NOW_S - age_s))
        assert read(tmp_path).runs[0].status is expected


def test_ranks_are_one_run(tmp_path: Path) -> None:
    """Joules, tokens and bounds sum over the ranks, steps don't; a rank that left no file is named; the worst end is the run's."""
    for rank in range(3):
        written(tmp_path, rank=rank, world_size=4, run_id="job", status="failed" if rank == 2 else "completed")
    (run,) = read(tmp_path).runs
    assert run.totals.energy_j == pytest.approx(900.0)
    assert run.totals.energy_lo_j == pytest.approx(870.0)
    assert run.totals.phase(Phase.TRAIN).tokens == 3 * 10 * 8192
    assert run.status is Status.FAILED
    assert run.n_steps == 0  # lost
    assert any("1 of 4 ranks left no file" in note for note in run.notes)
    assert run.mfu == pytest.approx(MFU)


def test_a_gpu_that_two_ranks_metered_is_counted_once(tmp_path: Path) -> None:
    """Its joules are in the run once, the work of both is there, and a note says so."""
    card = replace(MANIFEST.domains[0], uuid="GPU-a")
    for rank in range(2):
        written(tmp_path, rank=rank, world_size=2, run_id="job", domains=(card,))
    (run,) = read(tmp_path).runs
    assert run.totals.energy_j == run.useful.energy_j == pytest.approx(300.0)
    assert run.totals.phase(Phase.TRAIN).tokens == 2 * 10 * 8192
    assert any("counted once: 1" in note for note in run.notes)


def test_a_manifest_repeated_before_a_crash_counts(tmp_path: Path) -> None:
    """A manifest in the middle of a file, as of a run that learnt its model late and crashed, is found from the last record alone."""
    sink = JsonlSink(run_file(tmp_path / "a", 0, 1))
    sink.write(MANIFEST)
    for step in range(1, 100):
        if step in {3, 7}:
            sink.write(replace(MANIFEST, model="GPT" if step == 7 else "early", parameters=step))
        sink.write(make_record(step))
    sink.close()
    last = read_last(sink.path)
    assert last.manifest == read_jsonl(sink.path).manifest
    assert (last.manifest.model, last.records[0].step) == ("GPT", 99)
    assert read(tmp_path).runs[0].manifest.model == "GPT"


# ── runs that went on ──────────────────────────────────────────────────────────────────────────────────────────────────


def trained(
    path: Path,
    clock: ScriptedClock,
    *,
    first: int = 0,
    last: int,
    state: dict | None = None,
    save_at: int | None = None,
    die: bool = False,
) -> dict:
    """Trains steps of 1 s at 300 W with a real tracker into ``path``; returns the state saved after ``save_at``."""
    meter = ScriptedMeter(clock, {"gpu0": 300.0})
    tracker = track(
        clock=clock, meters=[meter], sinks=[JsonlSink(path)], intensity=100, log_every_n_steps=4, embodied=Embodied(100, "x")
    )
    saved: dict = {}
    if state:
        tracker.load_state_dict(state)
    with tracker:
        with tracker.phase("setup"):
            clock.advance(5.0)
        for step in range(first, last + 1):
            clock.advance(1.0)
            tracker.step(tokens=1000)
            if step == save_at:
                with tracker.phase("save"):
                    clock.advance(2.0)
                saved = tracker.state_dict()
        clock.advance(3.0)
    if die:  # as SIGKILL would leave it: what came after the last record is gone
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if b'"type":"summary"' not in line and b'"phase":"other"' not in line]
        path.write_bytes(b"".join(kept) + b'{"type":"rec')
    return saved


def test_useful_totals_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """After a kill and a resume, the useful part equals a run that was never interrupted: every phase, its joules, tokens and grams."""
    clock = ScriptedClock()
    trained(tmp_path / "whole" / "green" / "rank-00000.segment-0001.jsonl", clock, last=29, save_at=9)
    clock = ScriptedClock()
    folder = tmp_path / "cut" / "green"
    state = trained(folder / "rank-00000.segment-0001.jsonl", clock, last=17, save_at=9, die=True)
    clock.advance(1000.0)  # nobody's
    trained(folder / "rank-00000.segment-0002.jsonl", clock, first=10, last=29, state=state)
    (whole,), (cut,) = read(tmp_path / "whole").runs, read(tmp_path / "cut").runs
    assert cut.status is Status.COMPLETED
    assert [one.redone_after_step for one in cut.segments] == [9, None]
    assert [one.status for one in cut.segments] == [Status.KILLED, Status.COMPLETED]  # however lately the first was written
    for phase in Phase:
        for name in ("n_steps", "duration_s", "tokens", "energy_j", "operational_g", "embodied_g"):
            expected, found = (getattr(run.useful.phase(phase), name) for run in (whole, cut))
            assert found == pytest.approx(expected), (phase, name)
    assert cut.redone.energy_j == pytest.approx(8 * 300.0)
    assert cut.restart.energy_j == pytest.approx(5 * 300.0)
    assert cut.wasted.energy_j == pytest.approx(13 * 300.0)
    assert cut.totals.energy_j == pytest.approx((whole.totals.energy_j or 0.0) + 13 * 300.0)
    assert cut.n_steps == whole.n_steps == 30


def test_a_start_that_got_nowhere_is_superseded(tmp_path: Path) -> None:
    """Of three starts from one checkpoint the last one counts; the second, done again in full, is superseded."""
    written(tmp_path, run_id="r", status=None, n_steps=10)
    for segment in (2, 3):
        written(
            tmp_path,
            run_id="r",
            segment=segment,
            resumed_from_step=6,
            previous_segment=1,
            n_steps=5,
            started_unix_ns=START_NS + segment * 3600 * NS_PER_S,
            status=None if segment == 2 else "completed",
        )
    (run,) = read(tmp_path).runs
    assert [one.status for one in run.segments] == [Status.KILLED, Status.SUPERSEDED, Status.COMPLETED]
    assert run.useful.energy_j == pytest.approx((6 + 5) * 30.0)
    assert run.redone.energy_j == pytest.approx((4 + 5) * 30.0)
    assert not run.lost


def test_steps_that_no_record_has_are_named(tmp_path: Path) -> None:
    """A start that was killed after its checkpoint of step 14 with records up to step 9: five steps are missing, and said to be."""
    written(tmp_path, run_id="r", status=None, n_steps=10)
    later = {"resumed_from_step": 14, "previous_segment": 1, "started_unix_ns": START_NS + 3600 * NS_PER_S}
    written(tmp_path, run_id="r", segment=2, **later)
    (run,) = read(tmp_path).runs
    told = [note for note in run.notes if "in no record" in note]
    last = run.segments[0].last_step
    assert told == [f"steps {last + 1} to 14 are in no record (start 1 ended before they were written)"]


def test_what_two_ran_at_once_is_not_done_again(tmp_path: Path) -> None:
    """A second run from the same checkpoint, started while the first was still going, is a branch: neither replaces the other."""
    for folder, later_s in (("a", 0.0), ("b", 0.5)):
        written(
            tmp_path,
            folder=f"p/{folder}",
            run_id="r",
            segment=2,
            resumed_from_step=5,
            previous_segment=1,
            started_unix_ns=START_NS + int(later_s * NS_PER_S),
        )
    (run,) = read(tmp_path).runs
    assert run.useful.energy_j == pytest.approx(600.0)


def test_the_last_start_decides(tmp_path: Path) -> None:
    """A run whose last start was killed is killed, all of it wasted until somebody takes it up again."""
    written(tmp_path, run_id="r", status=None)
    later = {"run_id": "r", "segment": 2, "resumed_from_step": 6, "previous_segment": 1}
    written(tmp_path, **later, status=None, started_unix_ns=START_NS + 3600 * NS_PER_S)
    (run,) = read(tmp_path).runs
    assert run.status is Status.KILLED
    assert run.wasted.energy_j == pytest.approx(600.0)
    assert run.useful.energy_j is None


def test_a_run_that_is_queued_again_has_not_ended(tmp_path: Path) -> None:
    """One that left with 75 is neither lost nor of those that ended, and its work is useful; a rank of it that failed makes it a failure."""
    written(tmp_path, run_id="r", status="requeued", world_size=2)
    (run,) = read(tmp_path).runs
    assert (run.finished, run.lost) == (False, False)
    assert (run.useful.energy_j, run.wasted.energy_j, run.n_steps) == (pytest.approx(300.0), None, 10)
    assert ledger.failed_share(ledger.group("all", [run])).n_ended == 0
    written(tmp_path, run_id="r", status="failed", rank=1, world_size=2)
    assert read(tmp_path).runs[0].status is Status.FAILED


def test_a_run_that_its_user_interrupted_is_not_lost(tmp_path: Path) -> None:
    """It has ended, its work is useful and nobody calls it a failure; a rank of it that failed makes it one."""
    written(tmp_path, run_id="r", status="interrupted", world_size=2)
    (run,) = read(tmp_path).runs
    assert (run.finished, run.lost) == (True, False)
    assert (run.useful.energy_j, run.wasted.energy_j, run.n_steps) == (pytest.approx(300.0), None, 10)
    failed = ledger.failed_share(ledger.group("all", [run]))
    assert (failed.n_lost, failed.n_ended) == (0, 1)
    written(tmp_path, run_id="r", status="failed", rank=1, world_size=2)
    assert read(tmp_path).runs[0].status is Status.FAILED


def test_a_restart_that_tells_no_checkpoint_is_named(tmp_path: Path) -> None:
    """Where a later start doesn't say what it went on from, nothing is called done again, and a note says that it isn't known."""
    written(tmp_path, run_id="r", status=None)
    written(tmp_path, run_id="r", segment=2, started_unix_ns=START_NS + 3600 * NS_PER_S)
    (run,) = read(tmp_path).runs
    assert run.redone.energy_j is None
    assert any("tells no checkpoint" in note for note in run.notes)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(-2, 900), st.booleans())
def test_bisection_finds_what_reading_everything_finds(tmp_path: Path, sizes: list[int], step: int, torn: bool) -> None:
    """The records on either side of a step are those that a whole reading has there, with phases and manifests in between."""
    path = tmp_path / "x.jsonl"
    at, records = 0, []
    with path.open("wb") as file:

        def put(item: Manifest | StepRecord) -> None:
            file.write(json.dumps(to_dict(item)).encode() + b"\n")

        put(MANIFEST)
        for number, size in enumerate(sizes):
            at += size
            records.append(make_record(at, size))
            put(records[-1])
            if number % 7 == 3:
                records.append(make_record(at, 1, Phase.EVAL))
                put(records[-1])
                put(MANIFEST)
        if torn:
            file.write(b'{"type":"record","step":')
    before = [record for record in records if record.step <= step]
    after = [record for record in records if record.step > step]
    assert read_at(path, step) == (before[-1] if before else None, after[0] if after else None)


def test_a_record_across_the_checkpoint_is_shared_out(tmp_path: Path) -> None:
    """Where a record holds steps on both sides of the checkpoint's, the share of its steps counts."""
    sink = JsonlSink(run_file(tmp_path / "a", 0, 1))
    sink.write(replace(MANIFEST, run_id="r"))
    for index in (1, 2):
        sums = combined([(index * 10, step_totals())])
        sink.write(make_record(index * 10, 10, totals=sums, time_unix_ns=START_NS + index))
    sink.close()
    os.utime(sink.path, (0, 0))
    written(
        tmp_path, folder="a", run_id="r", segment=2, resumed_from_step=13, previous_segment=1, started_unix_ns=START_NS + 10**12
    )
    (run,) = read(tmp_path).runs
    assert run.segments[0].useful.energy_j == pytest.approx(13 * 30.0)
    assert run.segments[0].useful.phase(Phase.TRAIN).n_steps == 13


# ── finding runs ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_projects_are_the_first_directories(tmp_path: Path) -> None:
    """Below the given directory; a run that lies directly in it belongs to that directory itself."""
    for folder, run_id in (("llm/a", "1"), ("llm/sweep/b", "2"), ("c", "3"), (".", "4")):
        written(tmp_path / "runs", folder=folder, run_id=run_id)
    found = {run.run_id: run.project for run in read(tmp_path / "runs").runs}
    assert found == {"1": "llm", "2": "llm", "3": "runs", "4": "runs"}


def test_nothing_is_counted_twice(tmp_path: Path) -> None:
    """Directories given twice or one within the other, links, and copied directories count once; a copy is named."""
    written(tmp_path / "runs")
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    found = read(tmp_path / "runs", tmp_path / "runs" / "project", tmp_path / "link")
    assert len(found.runs) == 1
    assert found.runs[0].totals.energy_j == pytest.approx(300.0)
    assert not found.skipped
    shutil.copytree(tmp_path / "runs", tmp_path / "backup")
    found = read(tmp_path / "runs", tmp_path / "backup")
    assert len(found.runs) == 1
    assert found.runs[0].totals.energy_j == pytest.approx(300.0)
    assert [one.path.is_relative_to(tmp_path / "backup") for one in found.skipped] == [True]
    assert "a copy of" in found.skipped[0].reason


def test_what_cannot_be_read_is_named_and_left_out(tmp_path: Path) -> None:
    """Broken, foreign, empty, endless and odd files cost nothing but a line; the runs beside them are read."""
    written(tmp_path)
    green = tmp_path / "odd" / "green"
    green.mkdir(parents=True)
    names = [f"rank-{rank:05d}.segment-0001.jsonl" for rank in range(9)]
    (green / names[0]).touch()
    (green / names[1]).write_bytes(b"\x00" * 100_000)
    (green / names[2]).write_text('{"type":"banana"}\n')
    (green / names[3]).write_text('{"loss": 1.0}\n{"loss": 0.5}\n')
    (green / names[4]).write_text("[" * 100_000 + "\n")
    (green / names[5]).write_text(json.dumps(to_dict(replace(MANIFEST, schema_version=99))) + "\n")
    os.mkfifo(green / names[6])
    (green / names[7]).symlink_to(tmp_path / "nowhere")
    with (green / names[8]).open("wb") as file:
        file.truncate(2**31)
    (green / "notes.jsonl").touch()
    (green / "rank-00099.segment-0001.jsonl").mkdir()
    found = read(tmp_path)
    assert [run.run_id for run in found.runs] == [MANIFEST.run_id]
    assert {one.path.name for one in found.skipped} == {*names, "notes.jsonl"}
    assert all(one.reason for one in found.skipped)


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A wrong argument raises, with what to do."""
    with pytest.raises(ArgumentError, match="give one with runs"):
        ledger.read(tmp_path / "nowhere")
    assert ledger.read(tmp_path).runs == ()


# ── together ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_grams_of_different_bases_are_never_summed(tmp_path: Path) -> None:
    """Lifecycle, direct and marginal figures stay apart, and what rests on their sum is not known."""
    marginal = IntensityPoint(500.0, "CAISO", "WattTime", "direct", average=False)
    written(tmp_path, run_id="1")
    written(tmp_path, folder="p/2", run_id="2", intensity=marginal)
    written(tmp_path, folder="p/3", run_id="3", intensity=replace(marginal, average=True))
    found = read(tmp_path)
    whole = ledger.group("all", found.runs)
    assert whole.operational_by_basis_g == pytest.approx(
        {"direct, average": 0.01, "direct, marginal": 0.01, "lifecycle, average": 0.01}
    )
    assert not whole.one_basis
    assert (whole.operational_g, whole.emissions_g, whole.sci_g("token")) == (None, None, None)
    one = ledger.group("one", found.runs[:1])
    assert one.emissions_g == pytest.approx(0.012)


def test_sci_counts_all_emissions_over_useful_work(tmp_path: Path) -> None:
    """(E x I + M) / R, the waste in the numerator alone: a killed run beside a completed one doubles the grams per token."""
    written(tmp_path, run_id="1")
    written(tmp_path, folder="p/2", run_id="2", status=None)
    whole = ledger.group("all", read(tmp_path).runs)
    assert whole.sci_g("token") == pytest.approx(2 * 10 * 1.2e-3 / (10 * 8192))
    assert whole.sci_g("sample") == pytest.approx(2 * 10 * 1.2e-3 / 80)
    assert whole.sci_g("step") == pytest.approx(2 * 10 * 1.2e-3 / 10)
    assert whole.sci_g("run") == pytest.approx(2 * 10 * 1.2e-3)


def test_the_share_of_failed_runs_and_what_fewer_would_save(tmp_path: Path) -> None:
    """Of 12 runs that ended 3 were lost; at a share of 10 % the 9 others would come with 1: two thirds of the loss is spared."""
    for number in range(12):
        written(
            tmp_path,
            folder=f"p/{number}",
            run_id=str(number),
            status=None if number < 2 else "failed" if number == 2 else "completed",
        )
    written(tmp_path, folder="p/live", run_id="live", status=None, age_s=1.0)
    whole = ledger.group("all", read(tmp_path).runs)
    found = ledger.failed_share(whole, 0.1)
    assert (found.n_lost, found.n_ended, found.share) == (3, 12, 0.25)
    assert found.energy_share == pytest.approx(0.25)
    assert found.saved_energy_j == pytest.approx(600.0)
    assert found.saved_g == pytest.approx(20 * 1.2e-3)
    assert ledger.failed_share(whole, 0.9).saved_energy_j == 0.0
    with pytest.raises(ArgumentError, match="between 0 and 1"):
        ledger.failed_share(whole, 1.0)


def test_runs_group_by_what_they_are(tmp_path: Path) -> None:
    """By project, model, status, month and run; anything else raises."""
    written(tmp_path, folder="llm/a", run_id="1", model="GPT")
    written(tmp_path, folder="llm/b", run_id="2", status="failed", started_unix_ns=START_NS + 40 * 86_400 * NS_PER_S)
    written(tmp_path, folder="vision/c", run_id="3", model="ResNet")
    found = read(tmp_path)
    names = {by: [group.name for group in ledger.grouped(found, by)] for by in ("project", "model", "status", "month")}
    assert names == {
        "project": ["llm", "vision"],
        "model": ["(no model given)", "GPT", "ResNet"],
        "status": ["completed", "failed"],
        "month": ["2023-11", "2023-12"],
    }
    assert [len(group.runs) for group in ledger.grouped(found, "run")] == [1, 1, 1]
    with pytest.raises(ArgumentError, match="one of project"):
        ledger.grouped(found, "colour")


def test_detail_reads_every_record(tmp_path: Path) -> None:
    """The records' flags, their joules and the grid's range, over all files of a run; a torn line is counted."""
    path = written(tmp_path, status=None)
    with path.open("ab") as file:
        file.write(
            json.dumps(to_dict(make_record(11, flags=("late:gpu0",), intensity_g_per_kwh=80.0))).encode() + b'\n{"type":'
        )
    (run,) = read(tmp_path).runs
    found = ledger.detail(run)
    assert found.n_records == 11
    assert found.energy_j == pytest.approx(330.0)
    assert (found.intensity_lo_g_per_kwh, found.intensity_hi_g_per_kwh) == (56.0, 80.0)
    assert found.flags == (("late:gpu0", 1),)
    assert found.torn == 1


def test_mfus_over_different_peaks_have_no_mean(tmp_path: Path) -> None:
    """A mean over runs with the same peak; none over an H100 and an A100."""
    written(tmp_path, run_id="1")
    written(tmp_path, folder="p/2", run_id="2")
    other = (replace(MANIFEST.peaks[0], device="NVIDIA A100", flop_per_s=312e12),)
    written(tmp_path, folder="p/3", run_id="3", peaks=other)
    runs = read(tmp_path).runs
    assert ledger.group("same", runs[:2]).mfu == pytest.approx(MFU)
    assert ledger.group("mixed", runs).mfu is None


def test_a_summary_is_enough(tmp_path: Path) -> None:
    """A completed run is read from its last line alone: what stands before it does not matter, nor does it cost time."""
    path = written(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"x" * 10**6 + b"\n" + lines[-1])
    assert read(tmp_path).runs[0].totals.energy_j == pytest.approx(300.0)


def test_a_run_says_what_its_sums_lack(tmp_path):
    """No joules at all, joules without a grid figure, records that a device is missing from, and figures that stand in."""
    flags = {"meter_failed:gpu1": 3, "intensity_fallback": 7, "late:gpu0": 1}
    path = written(tmp_path, folder="a/flags", run_id="flags")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], json.dumps(json.loads(lines[-1]) | {"flags": flags})]) + "\n")
    for name, gone in (("dark", {"energy_j", "operational_g"}), ("gridless", {"operational_g"})):
        path = written(tmp_path, folder=f"a/{name}", run_id=name)
        lines = path.read_text().splitlines()
        last = json.loads(lines[-1])
        last["totals"] |= dict.fromkeys(gone)
        path.write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    notes = {run.run_id: " ".join(run.notes) for run in read(tmp_path).runs}
    assert notes["flags"] == (
        "gpu1 could not be read in 3 records: its joules are missing there "
        "in 7 records another grid figure stands in for the provider's"
    )
    assert notes["dark"] == "nothing measured its energy: no joule of it is in any sum"
    assert "the grid's intensity was not known" in notes["gridless"]


def test_a_branch_takes_nothing_back(tmp_path: Path) -> None:
    """Fine-tuning from a checkpoint of a run that had completed: the steps of both count, and its set-up is no waste."""
    clock, folder = ScriptedClock(), tmp_path / "run" / "green"
    state = trained(folder / "rank-00000.segment-0001.jsonl", clock, last=17, save_at=9, die=True)
    clock.advance(1000.0)
    trained(folder / "rank-00000.segment-0002.jsonl", clock, first=10, last=29, state=state)
    clock.advance(1000.0)
    trained(folder / "rank-00000.segment-0003.jsonl", clock, first=10, last=13, state=state, die=True)  # the branch
    clock.advance(1000.0)
    trained(folder / "rank-00000.segment-0004.jsonl", clock, first=10, last=19, state=state)  # again
    (run,) = read(tmp_path).runs
    assert [one.redone_after_step for one in run.segments] == [9, None, 9, None]
    assert [one.branch for one in run.segments] == [False, False, True, False]
    assert [one.useful.phase(Phase.TRAIN).n_steps for one in run.segments] == [10, 20, 0, 10]
    assert run.status is Status.COMPLETED
    assert run.n_steps == 40
    assert run.redone.energy_j == pytest.approx((8 + 5 + 4) * 300.0)
    assert [one.restart.energy_j or 0.0 for one in run.segments] == pytest.approx([0.0, 1500.0, 0.0, 1500.0])
    assert any("a branch" in note for note in run.notes)


def test_training_on_after_the_end_is_no_waste(tmp_path: Path) -> None:
    """A run that had completed and is trained for longer from its last step: nothing was interrupted."""
    clock, folder = ScriptedClock(), tmp_path / "run" / "green"
    state = trained(folder / "rank-00000.segment-0001.jsonl", clock, last=9, save_at=9)
    clock.advance(1000.0)
    trained(folder / "rank-00000.segment-0002.jsonl", clock, first=10, last=19, state=state)
    (run,) = read(tmp_path).runs
    assert (run.n_steps, run.wasted.energy_j, run.notes) == (20, None, ())
