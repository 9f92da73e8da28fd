"""Spans: every instant of the run in exactly one of them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from green_torch.records import Flag, FlopCount, Instant, Phase, Work
from green_torch.steps import Cadence, StepBuilder

MS = 1_000_000


def at(ms: float) -> Instant:
    return Instant.exact(int(ms * MS))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["step", "open", "close", "stop"]), st.integers(0, 50)),
        max_size=60,
    ),
    st.sampled_from([1, 3, "auto"]),
)
def test_the_pieces_tile_the_run(events, every):
    """Whatever is marked, the pieces of all spans tile the run without gap or overlap, and no step is lost."""
    builder = StepBuilder(at(0), Cadence(every))
    now, steps, in_phase, depth, spans = 0, 0, 0, 0, []
    for kind, gap in events:
        now += gap
        if kind == "step":
            spans += builder.step(at(now), tokens=7)
            steps += depth == 0
            in_phase += depth > 0
        elif kind == "close" and depth:
            depth -= 1
            spans += builder.close_phase(at(now))
        elif kind in ("open", "stop"):
            depth += 1
            spans += builder.open_phase(at(now), Phase.EVAL if kind == "open" else None)
    now += 5
    spans += builder.finish(at(now))
    pieces = sorted((a.at_ns, b.at_ns) for span in spans for a, b in span.pieces if a != b)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == now * MS
    assert all(left[1] == right[0] for left, right in itertools.pairwise(pieces))
    train = [span for span in spans if span.phase is Phase.TRAIN]
    lost = builder._record.tally.n_steps  # steps that took no time at all, with nothing after them
    assert sum(span.work.n_steps for span in train) + lost == steps
    assert sum(span.work.tokens for span in train) + 7 * lost == 7 * steps


def test_a_phase_in_the_middle_of_a_step_is_cut_out():
    """The step's time is what is left, and it says so."""
    builder = StepBuilder(at(0), Cadence(1))
    builder.open_phase(at(40), Phase.EVAL)
    (evaluation,) = builder.close_phase(at(70))
    (step,) = builder.step(at(100))
    assert evaluation.duration_s == pytest.approx(0.03)
    assert step.duration_s == pytest.approx(0.07)
    assert Flag.SPLIT in step.flags


def test_a_phase_between_steps_splits_nothing():
    """A phase opened right after a step's end leaves the next step whole."""
    builder = StepBuilder(at(0), Cadence(1))
    builder.step(at(10))
    builder.open_phase(at(10.2), Phase.SAVE)
    builder.close_phase(at(30))
    (step,) = builder.step(at(40))
    assert Flag.SPLIT not in step.flags


def test_nested_phases_are_cut_out_of_each_other():
    """Saving within evaluation counts as saving."""
    builder = StepBuilder(at(0), Cadence(1))
    builder.open_phase(at(0), Phase.EVAL)
    builder.open_phase(at(10), Phase.SAVE)
    (save,) = builder.close_phase(at(30))
    (evaluation,) = builder.close_phase(at(100))
    assert (save.phase, save.duration_s) == (Phase.SAVE, pytest.approx(0.02))
    assert evaluation.duration_s == pytest.approx(0.08)


def test_what_follows_the_last_step_is_other():
    """An unfinished step becomes no step."""
    builder = StepBuilder(at(0), Cadence(1))
    builder.step(at(10))
    (rest,) = builder.finish(at(25))
    assert rest.phase is Phase.OTHER
    assert rest.duration_s == pytest.approx(0.015)


def test_a_counted_step_stands_alone():
    """The step during which FLOPs were counted shares its record with no other."""
    builder = StepBuilder(at(0), Cadence(10))
    builder.step(at(1))
    builder.step(at(2))
    builder.add_flops(FlopCount(6.0, 6.0), (Flag.COUNTED,))
    before, counted = builder.step(at(9))
    assert (before.work.n_steps, counted.work.n_steps) == (2, 1)
    assert Flag.COUNTED in counted.flags
    assert counted.work.flops == FlopCount(6.0, 6.0)


def test_flops_of_a_phase_stay_in_it():
    """What ran in evaluation raises no training MFU."""
    builder = StepBuilder(at(0), Cadence(1))
    builder.add_flops(FlopCount(1.0, 1.0))
    builder.open_phase(at(5), Phase.EVAL)
    builder.add_flops(FlopCount(100.0, 100.0))
    (evaluation,) = builder.close_phase(at(8))
    builder.add_flops(FlopCount(2.0, 2.0))
    (step,) = builder.step(at(10))
    assert evaluation.work.flops == FlopCount(100.0, 100.0)
    assert step.work.flops == FlopCount(3.0, 3.0)


def test_unknown_work_makes_the_sum_unknown():
    """One step without a token count leaves its record without one, rather than with too few."""
    assert (Work(1, tokens=5) + Work(1)).tokens is None
    assert (Work() + Work(1, tokens=5)).tokens == 5


@given(st.floats(1e-4, 30.0))
@settings(max_examples=30, deadline=None)
def test_auto_leaves_a_few_thousand_records(step_s):
    """Every step at first, then no closer than a second; a million steps leave some thousand records."""
    cadence = Cadence("auto")
    records = done = 0
    while done < 1_000_000:
        n = cadence.n_steps
        cadence.made(n, n * step_s)
        done += n
        records += 1
        if records <= 9:
            assert n == 1
        elif records < 900:
            assert n == 1 or n * step_s >= 1.0
    assert records < 20_000


def test_merged_spans_keep_every_joule_and_step():
    """Two neighbours merged cover the same time and work."""
    builder = StepBuilder(at(0), Cadence(1))
    (a,) = builder.step(at(10), tokens=3)
    (b,) = builder.step(at(25), tokens=4)
    both = a.merged(b)
    assert both.duration_s == pytest.approx(0.025)
    assert (both.work.n_steps, both.work.tokens, both.step) == (2, 7, 1)
    assert len(both.pieces) == 1
    assert Flag.MERGED in both.flags
