"""Plans: optimal against brute force, never past the deadline, and what bad forecasts and arguments come to."""

from __future__ import annotations

import itertools
import math
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from green_torch.errors import ArgumentError, IntensityError
from green_torch.intensity import ConstantIntensity, Trace
from green_torch.records import IntensityPoint
from green_torch.schedule import (
    FORECAST,
    LAST_WEEK,
    YESTERDAY,
    outlook,
    plan,
    plan_regions,
    repeated,
    threshold,
)
from green_torch.schedule.optimum import pieces
from green_torch.schedule.series import series
from green_torch.units import NS_PER_S

NOW_NS = 1_700_006_400 * NS_PER_S  # 2023-11-15 00:00 UTC
HOUR_S = 3600.0
HOUR_NS = 3600 * NS_PER_S
SHARED = Path(__file__).parents[2] / "shared" / "data"
values = st.integers(0, 50).map(float)


def grid(*g_per_kwh: float, step_s: float = HOUR_S, start_ns: int = NOW_NS, **fields) -> tuple[IntensityPoint, ...]:
    return tuple(
        IntensityPoint(
            value, "XX", "a script", fields.get("basis", "direct"), time_unix_ns=start_ns + round(k * step_s * NS_PER_S)
        )
        for k, value in enumerate(g_per_kwh)
    )


def integral(g_per_kwh, start_s: float, end_s: float, step_s: float = HOUR_S) -> float:
    """g/kWh × h, by hand."""
    return sum(
        value * max(0.0, min(end_s, (k + 1) * step_s) - max(start_s, k * step_s)) / HOUR_S for k, value in enumerate(g_per_kwh)
    )


def hours(found) -> list[tuple[float, float]]:
    """A plan's intervals, in hours from now."""
    return [((one.start_unix_ns - NOW_NS) / HOUR_NS, (one.end_unix_ns - NOW_NS) / HOUR_NS) for one in found.intervals]


# ── the optimum ────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=60)
@given(st.lists(values, min_size=3, max_size=9), st.integers(1, 60), st.integers(0, 30))
def test_a_window_is_as_good_as_the_best_of_all_starts(g_per_kwh, tenths, queue_tenths):
    """Against every start on a tenth of an hour, where the optimum must lie for such durations; with the queue's delay."""
    duration_s, queue_s = tenths * 360.0, queue_tenths * 360.0
    end_s = len(g_per_kwh) * HOUR_S
    if duration_s + queue_s > end_s:
        return
    found = plan(grid(*g_per_kwh), duration_s, end_s, queue_delay=queue_s, now=NOW_NS)
    starts = [queue_s + 360.0 * k for k in range(round((end_s - duration_s - queue_s) / 360) + 1)]
    best = min(integral(g_per_kwh, s, s + duration_s) for s in starts)
    assert found.emissions_g_per_kw == pytest.approx(best, abs=1e-6)
    assert found.baseline_g_per_kw == pytest.approx(integral(g_per_kwh, queue_s, queue_s + duration_s), abs=1e-6)
    ((start_h, end_h),) = hours(found)
    assert found.emissions_g_per_kw == pytest.approx(integral(g_per_kwh, start_h * HOUR_S, end_h * HOUR_S), abs=1e-5)
    assert end_h * HOUR_S <= end_s + 1e-6
    assert start_h * HOUR_S >= queue_s - 1e-6
    assert found.release_unix_ns == pytest.approx(NOW_NS + start_h * HOUR_NS - queue_s * NS_PER_S, abs=10)


def brute(g, n_work: int, *, overhead: float, apart: float, idle: float, running: bool) -> float:
    """The least cost over every choice of whole slots, the overhead before each resume; slots are hours."""
    best = math.inf
    for chosen in itertools.combinations(range(len(g)), n_work):
        runs = [list(group) for _, group in itertools.groupby(enumerate(chosen), lambda pair: pair[1] - pair[0])]
        parts = [(run[0][1], run[-1][1] + 1) for run in runs]
        cost, up_to, ok = 0.0, 0.0, True
        for number, (first, last) in enumerate(parts):
            resumes = number > 0 or (running and first > 0)
            begin = first - overhead if resumes else float(first)
            if resumes:
                ok &= first - up_to >= overhead + apart - 1e-9
                cost += idle * integral(g, up_to * HOUR_S, begin * HOUR_S)
            cost += integral(g, begin * HOUR_S, last * HOUR_S)
            up_to = last
        if ok:
            best = min(best, cost)
    return best


@settings(deadline=None, max_examples=80)
@given(
    st.lists(values, min_size=2, max_size=9),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.25, 1.0, 1.5]),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from([0.0, 0.1, 0.9]),
    st.booleans(),
)
@example([9.0, 1.0, 9.0, 1.0, 9.0], 2, 0.25, 0.0, 0.0, True)
def test_pieces_are_as_good_as_the_best_choice_of_slots(g, n_work, overhead, apart, idle, running):  # noqa: PLR0917
    """Against every choice of whole slots: overhead before each resume, time in the queue between, idle draw in the gaps."""
    if n_work > len(g):
        return
    known = series(grid(*g), NOW_NS)
    options = {"overhead_s": overhead * HOUR_S, "apart_s": apart * HOUR_S, "idle": idle, "running": running}
    (slots,) = pieces([known], n_work * HOUR_S, [len(g) * HOUR_S], slot_s=HOUR_S, **options)
    assert sum(last - first for first, last in slots) == n_work
    cost, up_to = 0.0, 0.0
    for number, (first, last) in enumerate(slots):
        resumes = number > 0 or (running and first > 0)
        begin = first - overhead if resumes else first
        cost += known.between(begin * HOUR_S, last * HOUR_S)
        cost += idle * known.between(up_to * HOUR_S, begin * HOUR_S) if resumes else 0.0
        up_to = last
    expected = brute(g, n_work, overhead=overhead, apart=apart, idle=idle, running=running)
    assert cost == pytest.approx(expected, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(values, min_size=3, max_size=12),
    st.floats(600, 5 * HOUR_S),
    st.floats(0, 3000),
    st.floats(0, 3000),
    st.floats(0, 1),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3000),
)
def test_a_plan_keeps_its_promises(g, duration_s, overhead_s, queue_s, idle_w, running, interruptible, late_s):  # noqa: PLR0917
    """Never past the deadline, all the work in the intervals, apart by the queue's delay, costs as told, never worse than starting now."""
    deadline_s = len(g) * HOUR_S - late_s
    asked = {"resume_overhead": overhead_s, "queue_delay": queue_s, "power": 1.0, "idle_power": idle_w, "running": running}
    asked |= {"now": NOW_NS + late_s * NS_PER_S}
    if duration_s + (0 if running else queue_s) > deadline_s:
        with pytest.raises(ArgumentError, match="can't be done within"):
            plan(grid(*g), duration_s, deadline_s, interruptible, **asked)
        return
    found = plan(grid(*g), duration_s, deadline_s, interruptible, **asked)
    assert found.end_unix_ns <= found.deadline_unix_ns + 1000
    assert sum(one.duration_s - one.overhead_s for one in found.intervals) == pytest.approx(duration_s, abs=1e-3)
    assert found.emissions_g_per_kw <= found.baseline_g_per_kw + 1e-9
    for before, after in itertools.pairwise(found.intervals):
        assert after.start_unix_ns - before.end_unix_ns >= queue_s * NS_PER_S - 1000
    cost, up_to = 0.0, NOW_NS + late_s * NS_PER_S if running else found.start_unix_ns
    for one in found.intervals:
        start_s, end_s, idle_s = ((at - NOW_NS) / NS_PER_S for at in (one.start_unix_ns, one.end_unix_ns, up_to))
        cost += integral(g, start_s, end_s) + idle_w * integral(g, idle_s, start_s)
        up_to = one.end_unix_ns
    assert found.emissions_g_per_kw == pytest.approx(cost, abs=1e-3)
    if interruptible:
        assert found.emissions_g_per_kw <= plan(grid(*g), duration_s, deadline_s, **asked).emissions_g_per_kw + 1e-9


def test_a_week_at_five_minutes_in_twenty_regions():
    """Each is planned, the best first, in one piece and in several; what that takes is measured by benchmarks/schedule.py."""
    forecasts = {
        f"R{k}": grid(*(200 + 100 * math.sin(0.0218 * at + k) + at * k % 17 for at in range(2016)), step_s=300)
        for k in range(20)
    }
    plan_regions(forecasts, 600, 3600, True, now=NOW_NS)
    for interruptible in (False, True):
        plans = plan_regions(forecasts, 24 * HOUR_S, 7 * 24 * HOUR_S, interruptible, now=NOW_NS)
        assert len(plans) == 20
        assert plans[0].emissions_g_per_kw == min(found.emissions_g_per_kw for found in plans) < plans[-1].emissions_g_per_kw


# ── what a plan says ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_savings_are_against_starting_now():
    """Two hours at 100 rather than at 300: 200 g/kW of 600, two thirds; at 500 W, 200 g of 300 g; horizon and age are told."""
    found = plan(
        grid(300, 300, 100, 100, 200),
        2 * HOUR_S,
        timedelta(hours=5),
        power=500.0,
        now=NOW_NS,
        asked=NOW_NS - 60 * NS_PER_S,
    )
    assert hours(found) == [(2, 4)]
    assert (found.emissions_g_per_kw, found.baseline_g_per_kw) == (pytest.approx(200), pytest.approx(600))
    assert found.saving == pytest.approx(2 / 3)
    assert (found.emissions_g, found.baseline_g, found.saving_g) == (pytest.approx(100), pytest.approx(300), pytest.approx(200))
    assert found.wait_s == 2 * HOUR_S
    assert (found.method, found.baseline, found.horizon_s, found.age_s) == (FORECAST, "starting now", 5 * HOUR_S, 60)
    assert (found.region, found.source, found.kind) == ("XX", "a script", "direct, average")
    assert found.intervals[0].g_per_kwh == pytest.approx(100)


def test_a_flat_grid_is_not_waited_for():
    """Where nothing is gained, the job starts now and in one piece, even where a resume costs nothing."""
    found = plan(grid(*[137.0] * 24), 5 * HOUR_S, 24 * HOUR_S, True, resume_overhead=0, now=NOW_NS)
    assert found.at_once
    assert found.saving == 0
    assert hours(found) == [(0, 5)]
    zero = plan(grid(*[0.0] * 24), HOUR_S, 24 * HOUR_S, True, now=NOW_NS)
    assert zero.at_once
    assert zero.saving == 0


def test_a_resume_that_costs_more_than_it_saves_is_not_made():
    """A notch of an hour at 110 between hours at 100: it is run through with an overhead of 30 minutes, left out with one of 3."""
    g = [100, 110, 100, 100, 100]
    assert hours(plan(grid(*g), 3 * HOUR_S, 4 * HOUR_S, True, resume_overhead=1800, now=NOW_NS, running=True)) == [(0, 3)]
    found = plan(grid(*g), 3 * HOUR_S, 4 * HOUR_S, True, resume_overhead=180, now=NOW_NS, running=True)
    assert found.n_resumes == 1
    assert found.emissions_g_per_kw == pytest.approx(305.5)  # three hours at 100 and the three minutes at 110 before the hour


def test_idling_counts_against_waiting_in_place():
    """Waiting an hour at 100 W in place saves a third of 1 kW; at 900 W it costs more than it saves."""
    cheap, dear = (
        plan(grid(300, 200), HOUR_S, 2 * HOUR_S, power=1000, idle_power=idle, running=True, resume_overhead=0, now=NOW_NS)
        for idle in (100, 900)
    )
    assert cheap.emissions_g_per_kw == pytest.approx(230)
    assert dear.at_once


def test_a_job_that_runs_stops_no_sooner_than_it_must():
    """Two clean hours, then four dirty ones: it runs on through the clean ones, though stopping at once would cost no more."""
    found = plan(
        grid(100, 100, 300, 300, 300, 300, 100, 100, 100, 100), 4 * HOUR_S, 10 * HOUR_S, True, running=True, now=NOW_NS
    )
    assert hours(found)[0] == (0, 2)
    assert found.n_resumes == 1


def test_regions_are_held_against_the_first():
    """Best first; every baseline is starting now at home; figures of different kinds are not compared."""
    plans = plan_regions({"DE": grid(400, 300), "FR": grid(60, 50)}, HOUR_S, 2 * HOUR_S, now=NOW_NS)
    assert [one.region for one in plans] == ["FR", "DE"]
    assert [one.saving for one in plans] == [pytest.approx(350 / 400), pytest.approx(0.25)]
    assert {one.baseline for one in plans} == {"starting now in DE"}
    with pytest.raises(IntensityError, match="different kinds"):
        plan_regions({"DE": grid(4, 3), "FR": grid(6, 5, basis="lifecycle")}, HOUR_S, 2 * HOUR_S, now=NOW_NS)
    with pytest.raises(ArgumentError, match="no region"):
        plan_regions({}, HOUR_S, 2 * HOUR_S, now=NOW_NS)


def test_moments_may_be_in_any_time_zone():
    """A deadline at 05:00 in Tokyo is one at 20:00 UTC the day before."""
    deadline = datetime(2023, 11, 15, 5, tzinfo=timezone(timedelta(hours=9)))
    now = datetime(2023, 11, 14, 18, tzinfo=UTC)
    found = plan(grid(3, 2, 1, 0, start_ns=NOW_NS - 6 * HOUR_NS), HOUR_S, deadline, now=now)
    assert found.end_unix_ns == found.deadline_unix_ns == NOW_NS - 4 * HOUR_NS


# ── bad input ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"duration": 0}, "duration=0"),
        ({"duration": math.nan}, "duration=nan"),
        ({"duration": -1}, "duration=-1"),
        ({"duration": "8h"}, "duration='8h'"),
        ({"duration": True}, "duration=True"),
        ({"deadline": 3599}, "can't be done within"),
        ({"deadline": math.inf}, "deadline=inf"),
        ({"deadline": datetime(2030, 1, 1)}, "with its offset"),  # noqa: DTZ001
        ({"deadline": datetime(2023, 1, 1, tzinfo=UTC)}, "has passed"),
        ({"resume_overhead": -1}, "resume_overhead=-1"),
        ({"queue_delay": math.nan}, "queue_delay=nan"),
        ({"queue_delay": 2 * HOUR_S}, "in the queue"),
        ({"power": -1.0}, "power=-1.0"),
        ({"idle_power": 5.0}, "needs power="),
        ({"power": 4.0, "idle_power": 5.0}, "needs power="),
        ({"now": 1.5}, "now=1.5"),
    ],
)
def test_wrong_arguments_are_named(change, says):
    """Each raises an ArgumentError that says what it got; a deadline shorter than the job is one of them."""
    asked = {"duration": HOUR_S, "deadline": 2 * HOUR_S, "now": NOW_NS, **change}
    with pytest.raises(ArgumentError, match=says):
        plan(grid(1, 2, 3), **asked)


@pytest.mark.parametrize(
    ("points", "says"),
    [
        ((), "empty"),
        (grid(1, math.nan, 3), "nan"),
        (grid(1, -2, 3), "-2"),
        (grid(1, math.inf, 3), "inf"),
        (grid(1, 2, start_ns=NOW_NS - 3 * HOUR_NS), "in the past"),
        (grid(1, 2, 3, start_ns=NOW_NS + 4 * HOUR_NS), "begins only"),
        (grid(1, 2) + grid(3, 4, start_ns=NOW_NS + 8 * HOUR_NS), "gap after 2023-11-15T01:00:00Z"),
        (grid(1, 2) + grid(3), "two figures for"),
        (grid(1) + grid(2, start_ns=NOW_NS + HOUR_NS, basis="lifecycle"), "mixes"),
        ((IntensityPoint(1.0, "XX", "a script"),), "without a time"),
        (grid(1), "ends at 2023-11-15T01:00:00Z"),
    ],
)
def test_a_forecast_that_can_not_be_used_is_refused(points, says):
    """Gaps, the past, NaN, negative and contradictory figures, and one that ends before the job: an IntensityError says what is wrong."""
    with pytest.raises(IntensityError, match=says):
        plan(points, 2 * HOUR_S, 12 * HOUR_S, now=NOW_NS)


def test_short_gaps_and_a_late_beginning_are_bridged():
    """By the figure before a missing hour, and by the first one where it begins an hour late; points may come in any order."""
    points = (*grid(9), *grid(1, 5, start_ns=NOW_NS + 3 * HOUR_NS), *grid(9, start_ns=NOW_NS + HOUR_NS))
    assert hours(plan(points, HOUR_S, 5 * HOUR_S, now=NOW_NS)) == [(3, 4)]
    found = plan(grid(7, 3, start_ns=NOW_NS + HOUR_NS), HOUR_S, 3 * HOUR_S, now=NOW_NS)
    assert found.baseline_g_per_kw == pytest.approx(7)


def test_what_is_beyond_the_horizon_is_not_planned_for():
    """A deadline of a week with a forecast of 4 hours: the window lies within the 4, and the plan tells its horizon."""
    found = plan(grid(5, 4, 3, 4), HOUR_S, 7 * 24 * HOUR_S, True, now=NOW_NS)
    assert hours(found) == [(2, 3)]
    assert found.horizon_s == 4 * HOUR_S


# ── where nothing is forecast ──────────────────────────────────────────────────────────────────────────────────────────


class Past:
    """A provider with a past of so many hours, and no forecast."""

    def __init__(self, n_hours: int) -> None:
        self.points = grid(*(100.0 + at % 24 for at in range(-n_hours, 0)), start_ns=NOW_NS - n_hours * HOUR_NS)

    def history(self, start_ns: int, end_ns: int) -> tuple[IntensityPoint, ...]:
        return tuple(point for point in self.points if start_ns <= point.time_unix_ns < end_ns)


def test_the_past_stands_in_for_a_forecast_and_the_method_is_named():
    """A week of history is repeated, else a day; with less there is nothing; a forecast wins."""
    until_ns = NOW_NS + 9 * 24 * HOUR_NS
    week = outlook(Past(7 * 24), NOW_NS, until_ns)
    assert (week.method, len(week.points)) == (LAST_WEEK, 9 * 24)
    assert [point.g_per_kwh for point in week.points[:25]] == [100.0 + at % 24 for at in range(25)]
    assert all(point.estimated for point in week.points)
    assert outlook(Past(24), NOW_NS, until_ns).method == YESTERDAY
    with pytest.raises(IntensityError, match=r"the history for XX .* begins only at"):
        outlook(Past(12), NOW_NS, until_ns)
    with pytest.raises(IntensityError, match="neither"):
        outlook(ConstantIntensity(grid(1)[0]), NOW_NS, until_ns)


def test_a_trace_is_a_forecast(tmp_path):
    """A file of hours: its own figures ahead; where it ends, its past."""
    path = tmp_path / "grid.csv"
    start = datetime(2023, 11, 8, tzinfo=UTC)
    rows = (f"{(start + timedelta(hours=k)).isoformat()},{k % 24 + k // 168}" for k in range(8 * 24))
    path.write_text("\n".join(["time,g_per_kwh", *rows]) + "\n")
    ahead = outlook(Trace(path), NOW_NS, NOW_NS + 24 * HOUR_NS)
    assert (ahead.method, ahead.points[0].g_per_kwh) == (FORECAST, 1)
    assert len(outlook(Trace(path), NOW_NS, NOW_NS + 26 * HOUR_NS).points) == 24  # all that there is
    behind = outlook(Trace(path), NOW_NS + 24 * HOUR_NS, NOW_NS + 26 * HOUR_NS)
    assert (behind.method, behind.points[0].g_per_kwh) == (LAST_WEEK, 0)
    assert "covers" in behind.why
    assert outlook(Trace(path), NOW_NS, NOW_NS + HOUR_NS, forecast=False).method == LAST_WEEK


def test_repeating_keeps_the_rhythm_across_missing_hours():
    """Hours that are missing are bridged; a past with a long gap is refused."""
    past = [point for point in Past(7 * 24).points if point.time_unix_ns != NOW_NS - 20 * HOUR_NS]
    again = repeated(past, NOW_NS, NOW_NS + 7 * 24 * HOUR_NS)
    assert [point.g_per_kwh for point in again if point.time_unix_ns == NOW_NS + 149 * HOUR_NS] == [105.0]
    with pytest.raises(IntensityError, match="gap"):
        repeated([*past[:50], *past[60:]], NOW_NS, NOW_NS + HOUR_NS)


def test_the_threshold_runs_in_the_cleanest_share_and_by_the_deadline():
    """Six hours' work in a day: the cleanest quarter of the past counts as clean; when the time is up, everything does."""
    past = grid(*range(1, 25), start_ns=NOW_NS - 24 * HOUR_NS)
    found = threshold(past, NOW_NS, 6 * HOUR_S, 24 * HOUR_S)
    assert (found.level_g_per_kwh, found.runs) == (6, False)
    clean = threshold(past[::-1] and grid(*range(24, 0, -1), start_ns=NOW_NS - 24 * HOUR_NS), NOW_NS, 6 * HOUR_S, 24 * HOUR_S)
    assert (clean.runs, clean.by_deadline) == (True, False)
    late = threshold(past, NOW_NS, 6 * HOUR_S, 6 * HOUR_S + 50, resume_s=60)
    assert (late.runs, late.by_deadline) == (True, False)  # all of the past counts as clean by then
    tight = threshold(past, NOW_NS, 20 * HOUR_S, 20.4 * HOUR_S, resume_s=HOUR_S)
    assert tight.runs


@pytest.mark.skipif(not SHARED.is_dir(), reason="the traces are not part of the repository")
def test_a_real_year_can_be_planned(tmp_path):
    """California in 2022: an eight-hour job with a day of slack saves something on the way, and pieces save more."""
    trace = Trace(SHARED / "CISO-2022-hourly.csv", basis="direct")
    now = datetime(2022, 6, 1, tzinfo=UTC)
    begin_ns = int(now.timestamp()) * NS_PER_S
    points = trace.forecast(begin_ns, begin_ns + 32 * HOUR_NS)
    window = plan(points, 8 * HOUR_S, 32 * HOUR_S, now=now)
    several = plan(points, 8 * HOUR_S, 32 * HOUR_S, True, now=now)
    assert 0 <= window.saving <= several.saving < 1
