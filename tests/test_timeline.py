"""The timeline against a known truth: any waveform within the power limit, any counter, any polling."""

from __future__ import annotations

import bisect
import itertools
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import green_torch
from green_torch.records import Domain, Flag, Instant, Method, Phase, Work
from green_torch.steps import Span
from green_torch.testing import MemorySink, ScriptedClock, ScriptedMeter
from green_torch.timeline import DomainTimeline, Level, Telescope

LIMIT_W = 400.0
P_MAX = 1.5 * LIMIT_W
MS = 1_000_000


class Truth:
    """A piecewise constant power; cumulative joules are exact."""

    def __init__(self, pieces: list[tuple[float, float]]) -> None:
        self.starts, self.sums, self.powers = [0.0], [0.0], []
        for width_s, power_w in pieces:
            self.powers.append(power_w)
            self.starts.append(self.starts[-1] + width_s)
            self.sums.append(self.sums[-1] + width_s * power_w)

    def joules(self, t_ns: float) -> float:
        t = min(max(t_ns / 1e9, 0.0), self.starts[-1])
        k = min(max(bisect.bisect_right(self.starts, t) - 1, 0), len(self.powers) - 1)
        return self.sums[k] + (t - self.starts[k]) * self.powers[k]

    @property
    def end_ns(self) -> int:
        return int(self.starts[-1] * 1e9)


@st.composite
def scenes(draw):
    """A waveform, a counter that updates with jitter, readings with latency, and boundaries in order."""
    pieces = draw(st.lists(st.tuples(st.floats(0.02, 0.3), st.floats(0, P_MAX)), min_size=6, max_size=25))
    truth = Truth(pieces)
    period = draw(st.integers(5, 120)) * MS
    jitter = draw(st.lists(st.integers(0, period // 3), min_size=8, max_size=8))
    updates = [k * period + jitter[k % 8] for k in range(truth.end_ns // period + 1)]
    gaps = draw(st.lists(st.integers(1, 60), min_size=5, max_size=12))
    reads, at = [], 0
    for gap in itertools.cycle(gaps):
        at += gap * MS
        if at >= truth.end_ns:
            break
        reads.append((at, at + (gap % 4) * MS // 2))
    marks = sorted(draw(st.lists(st.integers(0, truth.end_ns), min_size=2, max_size=12, unique=True)))
    return truth, updates, reads, marks


def observed(truth: Truth, updates: list[int], reads: list[tuple[int, int]], quantum_j: float = 0.0) -> DomainTimeline:
    timeline = DomainTimeline(Domain("gpu0", Method.COUNTER, "x", "y", power_limit_w=LIMIT_W, quantum_j=quantum_j))
    for begin, end in reads:
        seen = max((u for u in updates if u <= (begin + end) // 2), default=None)
        if seen is None:
            continue
        value = truth.joules(seen)
        timeline.observe(begin, end, (value // quantum_j) * quantum_j if quantum_j else value)
    return timeline


@settings(max_examples=150, deadline=None)
@given(scenes(), st.sampled_from([0.0, 0.5]))
def test_truth_lies_within_the_bounds(scene, quantum_j):
    """On any waveform within the limit and any sampling, the true joules of every interval lie within its bounds."""
    truth, updates, reads, marks = scene
    timeline = observed(truth, updates, reads, quantum_j)
    if not timeline.knots:
        return
    levels = [timeline.level(Instant.exact(mark)) for mark in marks]
    for (a, level_a), (b, level_b) in itertools.combinations(zip(marks, levels, strict=True), 2):
        amount = timeline.amount(level_a, level_b, (b - a) / 1e9)
        true_j = truth.joules(b) - truth.joules(a)
        assert amount.lo_j - 1e-6 <= true_j <= amount.hi_j + 1e-6
        assert 0 <= amount.lo_j <= amount.energy_j + 1e-9
        assert amount.energy_j <= amount.hi_j + 1e-9


@st.composite
def rough_scenes(draw):
    """A counter that was reset now and then, read with gaps, and boundaries known only to lie somewhere within an interval."""
    truth, updates, reads, marks = draw(scenes())
    resets = sorted(draw(st.lists(st.integers(0, truth.end_ns), max_size=3)))
    lost = draw(st.lists(st.booleans(), min_size=7, max_size=7))
    reads = [read for k, read in enumerate(reads) if not lost[k % 7] or k % 11 == 0]
    doubts = draw(
        st.lists(st.tuples(st.integers(0, 80 * MS), st.integers(0, 80 * MS), st.floats(0, 1)), min_size=12, max_size=12)
    )
    boundaries = []  # an instant as it is known, and where in it the truth lies
    for mark, (early, late, share) in zip(marks, doubts, strict=False):
        lo, hi = max(0, mark - early), min(truth.end_ns, mark + late)
        boundaries.append((Instant(mark, lo, hi), round(lo + share * (hi - lo))))
    return truth, updates, reads, resets, boundaries


@settings(max_examples=150, deadline=None)
@given(rough_scenes(), st.sampled_from([0.0, 0.001, 5.0]), st.booleans())
def test_truth_lies_within_the_bounds_of_what_is_uncertain(scene, quantum_j, forgetful):
    """Across resets, reading gaps and a coarse quantum, and wherever within its interval a boundary truly passed, the bounds hold."""
    truth, updates, reads, resets, boundaries = scene
    timeline = DomainTimeline(Domain("gpu0", Method.COUNTER, "x", "y", power_limit_w=LIMIT_W, quantum_j=quantum_j))
    seen_since = None
    for begin, end in reads:
        at = (begin + end) // 2
        since = max((reset for reset in resets if reset <= at), default=None)
        seen = max((u for u in updates if u <= at), default=0)
        value = truth.joules(seen) + 1234.5 if since is None else truth.joules(max(seen, since)) - truth.joules(since)
        first = not timeline.knots
        told = timeline.observe(begin, end, (value // quantum_j) * quantum_j if quantum_j else value) is Flag.COUNTER_RESET
        if since != seen_since and not (first or told):
            return  # a reset that was made up for before it was read can't be told by anyone
        seen_since = since
    if not timeline.knots:
        return
    levels = []
    for instant, _ in boundaries:
        levels.append(timeline.level(instant))
        if forgetful:
            timeline.forget(instant.lo_ns)
    total, true_sum_j = Telescope(timeline), 0.0
    for (one, a), (other, b) in itertools.combinations(zip(boundaries, levels, strict=True), 2):
        amount = timeline.amount(a, b, (other[0].at_ns - one[0].at_ns) / 1e9)
        true_j = truth.joules(other[1]) - truth.joules(one[1])
        assert amount.lo_j - 1e-6 <= max(0.0, true_j)
        assert true_j <= amount.hi_j + 1e-6
    for (one, a), (other, b) in itertools.pairwise(zip(boundaries, levels, strict=True)):
        total.add(one[0].at_ns, a, other[0].at_ns, b, timeline.amount(a, b, (other[0].at_ns - one[0].at_ns) / 1e9))
        true_sum_j += truth.joules(other[1]) - truth.joules(one[1])
    lo_j, hi_j = total.bounds_j
    assert lo_j - 1e-6 <= max(0.0, true_sum_j)
    assert true_sum_j <= hi_j + 1e-6


@settings(max_examples=100, deadline=None)
@given(scenes())
def test_intervals_telescope_and_never_fall(scene):
    """Adjacent intervals sum to the whole, and no interval is negative."""
    truth, updates, reads, marks = scene
    timeline = observed(truth, updates, reads)
    if not timeline.knots:
        return
    levels = [timeline.level(Instant.exact(mark)) for mark in marks]
    steps = [b.energy_j - a.energy_j for a, b in itertools.pairwise(levels)]
    assert min(steps) >= -1e-6
    assert sum(steps) == pytest.approx(levels[-1].energy_j - levels[0].energy_j)


@settings(max_examples=60, deadline=None)
@given(scenes())
def test_forgetting_changes_no_later_level(scene):
    """Levels asked for in order of time are the same with and without old knots dropped."""
    truth, updates, reads, marks = scene
    kept, trimmed = observed(truth, updates, reads), observed(truth, updates, reads)
    if not kept.knots:
        return
    for mark in marks:
        a, b = kept.level(Instant.exact(mark)), trimmed.level(Instant.exact(mark))
        assert b.energy_j == pytest.approx(a.energy_j)
        assert (b.lo_j, b.hi_j) == pytest.approx((a.lo_j, a.hi_j))
        trimmed.forget(mark)


@settings(max_examples=80, deadline=None)
@given(scenes(), st.randoms(use_true_random=False))
def test_a_telescope_holds_the_truth_in_any_order(scene, random):
    """The sum of intervals added in any order keeps its bounds around the truth, as tight as one interval's where they touch."""
    truth, updates, reads, marks = scene
    timeline = observed(truth, updates, reads)
    if not timeline.knots:
        return
    levels = {mark: timeline.level(Instant.exact(mark)) for mark in marks}
    pairs = list(itertools.pairwise(marks))
    random.shuffle(pairs)
    total = Telescope(timeline)
    for a, b in pairs:
        total.add(a, levels[a], b, levels[b], timeline.amount(levels[a], levels[b], (b - a) / 1e9))
    lo_j, hi_j = total.bounds_j
    true_j = truth.joules(marks[-1]) - truth.joules(marks[0])
    assert lo_j - 1e-6 <= true_j <= hi_j + 1e-6
    whole = timeline.amount(levels[marks[0]], levels[marks[-1]], (marks[-1] - marks[0]) / 1e9)
    assert (lo_j, hi_j) == pytest.approx((whole.lo_j, whole.hi_j), abs=1e-6)


def test_many_separate_stretches_are_folded_and_still_hold():
    """More stretches than are kept apart are summed for good: memory is bounded and the truth stays within."""
    truth = Truth([(0.05, 100.0 + 400.0 * (k % 2)) for k in range(400)])
    timeline = observed(truth, [k * 20 * MS for k in range(1000)], [(k * 5 * MS, k * 5 * MS) for k in range(4000)])
    total, true_j = Telescope(timeline), 0.0
    for k in range(150):
        a, b = (100 + 100 * k) * MS, (140 + 100 * k) * MS
        start, end = timeline.level(Instant.exact(a)), timeline.level(Instant.exact(b))
        total.add(a, start, b, end, timeline.amount(start, end, (b - a) / 1e9))
        true_j += truth.joules(b) - truth.joules(a)
    lo_j, hi_j = total.bounds_j
    assert lo_j <= true_j <= hi_j
    assert len(total._by_start) <= 32


def test_a_mean_of_many_is_known_better_than_one():
    """The relative width of the bounds shrinks as 1/n over n touching steps."""
    truth = Truth([(60.0, 300.0)])
    timeline = observed(truth, [k * 100 * MS for k in range(600)], [(k * 10 * MS, k * 10 * MS) for k in range(6000)])

    def width(n: int) -> float:
        a, b = 1_013 * MS, (1_013 + 53 * n) * MS
        amount = timeline.amount(timeline.level(Instant.exact(a)), timeline.level(Instant.exact(b)), (b - a) / 1e9)
        return (amount.hi_j - amount.lo_j) / amount.energy_j

    assert width(1000) < width(10) / 50
    assert width(1000) < 0.005


def test_a_counter_that_goes_back_is_an_event():
    """A reset makes no negative step: the interval across it is bounded by the limit alone, and those after it are tight again."""
    timeline = DomainTimeline(Domain("gpu0", Method.COUNTER, "x", "y", power_limit_w=LIMIT_W))
    flags = []
    for k in range(200):
        joules = 300.0 * (k // 10 * 0.1) + (5000.0 if k < 100 else -30.0 * 10)
        flags.append(timeline.observe(k * 10 * MS, k * 10 * MS, joules))
    assert flags.count(Flag.COUNTER_RESET) == 1
    levels = [timeline.level(Instant.exact(t * MS)) for t in (500, 1200, 1700)]
    across = timeline.amount(levels[0], levels[1], 0.7)
    after = timeline.amount(levels[1], levels[2], 0.5)
    assert across.vacuous
    assert across.energy_j == pytest.approx(210.0, rel=0.1)
    assert not after.vacuous
    assert after.energy_j == pytest.approx(150.0, rel=0.02)


def test_an_uncertain_instant_widens_the_bounds():
    """A boundary known only to some milliseconds is bounded by the worst of them."""
    truth = Truth([(5.0, 300.0)])
    timeline = observed(truth, [k * 20 * MS for k in range(250)], [(k * 5 * MS, k * 5 * MS) for k in range(1000)])
    sharp = timeline.level(Instant.exact(2_000 * MS))
    wide = timeline.level(Instant(2_000 * MS, 1_960 * MS, 2_040 * MS))
    assert wide.lo_j < sharp.lo_j
    assert wide.hi_j > sharp.hi_j
    assert wide.energy_j == pytest.approx(sharp.energy_j)


def test_boundaries_taken_to_pass_at_once_keep_their_own_bounds():
    """Of two boundaries of a device at one instant, the second of which may have passed later, each record has its own bounds."""
    clock, sink = ScriptedClock(), MemorySink()
    meter = ScriptedMeter(clock, {"gpu0": 300.0}, period_s=0.02, power_limit_w=LIMIT_W)
    tracker = green_torch.track(clock=clock, meters=[meter], intensity=100.0)
    recorder = tracker._recorder
    tracker._sampler.start()
    recorder.open([sink])
    begun_ns = clock.now_ns()
    clock.advance(2.0)
    passed_ns = [begun_ns + ms * MS for ms in (500, 1000, 1400, 1600)]
    first, second = (Instant(passed_ns[1], passed_ns[1], hi_ns) for hi_ns in passed_ns[1:3])
    for start, end in itertools.pairwise((Instant.exact(passed_ns[0]), first, second, Instant.exact(passed_ns[3]))):
        recorder.put(Span(Phase.TRAIN, 0, ((start, end),), Work(1)))
    recorder.tick()
    clock.advance(1.0)
    for record, (a, b) in zip(sink.records, itertools.pairwise(passed_ns), strict=True):
        assert record.energy_lo_j <= meter.truth_j("gpu0", a, b) <= record.energy_hi_j


def test_without_a_power_limit_only_the_counter_bounds():
    """Where no limit is known the neighbouring counter values bound an instant, and nothing is assumed between them."""
    timeline = DomainTimeline(Domain("cpu", Method.COUNTER, "x", "y"))
    for k in range(100):
        timeline.observe(k * 10 * MS, k * 10 * MS, float(k // 10))
    level = timeline.level(Instant.exact(455 * MS))
    assert level == Level(pytest.approx(4.55, abs=0.6), 4.0, 5.0, epoch=0)


def test_integrated_power_has_no_bounds_of_its_own():
    """An estimated domain's level is its interpolated value."""
    timeline = DomainTimeline(Domain("cpu", Method.ESTIMATED, "x", "y"))
    timeline.observe(0, 0, 0.0)
    timeline.observe(1000 * MS, 1000 * MS, 50.0)
    assert timeline.level(Instant.exact(500 * MS)).energy_j == pytest.approx(25.0)
    assert timeline.settled(Instant.exact(1000 * MS))
    assert not timeline.settled(Instant.exact(1001 * MS))


def relative_rms(truth: Truth, marks: list[int], levels: list[float]) -> float:
    """RMS error of the steps between marks, relative to the mean step."""
    true_j = [truth.joules(b) - truth.joules(a) for a, b in itertools.pairwise(marks)]
    square_j = [(b - a - own) ** 2 for (a, b), own in zip(itertools.pairwise(levels), true_j, strict=True)]
    return math.sqrt(statistics.fmean(square_j)) / statistics.fmean(true_j)


def step_errors(truth: Truth, timeline: DomainTimeline, marks: list[int]) -> float:
    """The timeline's."""
    return relative_rms(truth, marks, [timeline.level(Instant.exact(mark)).energy_j for mark in marks])


def linear_errors(truth: Truth, updates: list[int], marks: list[int]) -> float:
    """Those of straight lines between known update instants: the best that knows nothing of steps."""

    def level_j(at: int) -> float:
        k = bisect.bisect_right(updates, at)
        a, b = updates[k - 1], updates[k]
        return truth.joules(a) + (truth.joules(b) - truth.joules(a)) * (at - a) / (b - a)

    return relative_rms(truth, marks, [level_j(mark) for mark in marks])


def test_a_regular_counter_is_followed_within_its_brackets():
    """The instants of a regular counter are told far more closely than it is read."""
    truth = Truth([(20.0, 300.0)])
    updates = [3_700_000 + k * 20 * MS for k in range(990)]
    reads = [(k * 10_300_000, k * 10_300_000) for k in range(1_900)]
    marks = [2_000 * MS + k * 53 * MS for k in range(300)]
    assert step_errors(truth, observed(truth, updates, reads), marks) < 0.02


def test_the_shape_of_like_steps_is_learned():
    """Where power follows the steps, an update interval is divided at a boundary as the steps have shown, not evenly."""
    truth = Truth([(0.020, 100.0), (0.033, 400.0)] * 500)
    updates = [7 * MS + k * 20 * MS for k in range(1_300)]
    marks = [k * 53 * MS for k in range(1, 450)]
    timeline = observed(truth, updates, [(t + MS // 2, t + MS // 2) for t in range(0, truth.end_ns, MS)])
    for mark in marks[:150]:
        timeline.level(Instant.exact(mark))
    assert step_errors(truth, timeline, marks[150:]) < 0.4 * linear_errors(truth, updates, marks[150:])


def test_no_shape_is_read_into_power_that_goes_its_own_way():
    """Where power doesn't follow the steps, the estimate is no worse than straight lines."""
    truth = Truth([(0.061, 100.0), (0.076, 400.0)] * 200)
    updates = [7 * MS + k * 20 * MS for k in range(1_300)]
    marks = [k * 53 * MS for k in range(1, 450)]
    timeline = observed(truth, updates, [(t + MS // 2, t + MS // 2) for t in range(0, truth.end_ns, MS)])
    assert step_errors(truth, timeline, marks) < 1.1 * linear_errors(truth, updates, marks)
