"""Traces: files with gaps, clocks that change, shifts in time, and what is refused."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from green_torch.errors import ArgumentError, IntensityError
from green_torch.footprint import operational_g
from green_torch.intensity import Trace
from green_torch.units import NS_PER_S, kwh_to_joules

HOUR_NS = 3600 * NS_PER_S
NEW_YEAR_NS = int(datetime(2022, 1, 1, tzinfo=UTC).timestamp()) * NS_PER_S
SHARED = Path(__file__).parents[2] / "shared" / "data"


def written(tmp_path, *lines: str, header: str = "time,g_per_kwh") -> Path:
    path = tmp_path / "grid.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def hourly(tmp_path, *values: object) -> Path:
    start = datetime(2022, 1, 1, tzinfo=UTC)
    return written(tmp_path, *(f"{(start + timedelta(hours=k)).isoformat()},{value}" for k, value in enumerate(values)))


def test_a_figure_holds_until_the_next_row(tmp_path):
    """From its instant on, to the nanosecond before the next; the last one for as long as a row lasts."""
    trace = Trace(hourly(tmp_path, 100, 200, 300), region="XX", basis="direct")
    for at_ns, value in ((0, 100), (HOUR_NS - 1, 100), (HOUR_NS, 200), (3 * HOUR_NS - 1, 300)):
        point = trace.at(NEW_YEAR_NS + at_ns)
        assert point.g_per_kwh == value
        assert point.time_unix_ns == NEW_YEAR_NS + at_ns // HOUR_NS * HOUR_NS
    assert (point.region, point.basis, point.average, point.estimated) == ("XX", "direct", True, False)
    assert "grid.csv" in point.source
    for at_ns in (-1, 3 * HOUR_NS):
        with pytest.raises(IntensityError, match="starts_at="):
            trace.at(NEW_YEAR_NS + at_ns)


def test_a_short_gap_is_bridged_and_marked_and_a_long_one_is_unknown(tmp_path):
    """Up to max_gap_s the figure before stands, as an estimate; longer, nothing does, in a stretch of time neither."""
    path = hourly(tmp_path, 100, "", "", 400)
    trace = Trace(path, max_gap_s=2 * 3600)
    assert [(point.g_per_kwh, point.estimated) for point in trace.history(NEW_YEAR_NS, NEW_YEAR_NS + 4 * HOUR_NS)] == [
        (100, False),
        (100, True),
        (100, True),
        (400, False),
    ]
    with pytest.raises(IntensityError, match=r"no figures for 2\.0 h"):
        Trace(path, max_gap_s=3600).forecast(NEW_YEAR_NS, NEW_YEAR_NS + 4 * HOUR_NS)
    missing = written(
        tmp_path, "2022-01-01T00:00Z,100", "2022-01-01T01:00Z,150", "2022-01-01T02:00Z,150", "2022-01-01T05:00Z,400"
    )
    assert Trace(missing).at(NEW_YEAR_NS + 4 * HOUR_NS).estimated


def test_a_forecast_is_the_trace_itself_as_an_estimate(tmp_path):
    """First point in force at the start, one an hour, up to the end."""
    trace = Trace(hourly(tmp_path, *range(100, 110)))
    points = trace.forecast(NEW_YEAR_NS + HOUR_NS // 2, NEW_YEAR_NS + 3 * HOUR_NS)
    assert [point.g_per_kwh for point in points] == [100, 101, 102]
    assert all(point.estimated for point in points)
    with pytest.raises(IntensityError, match="covers"):
        trace.forecast(NEW_YEAR_NS, NEW_YEAR_NS + 11 * HOUR_NS)


@pytest.mark.parametrize(
    "starts_at", [datetime(2026, 3, 4, 5, tzinfo=UTC), int(datetime(2026, 3, 4, 5, tzinfo=UTC).timestamp()) * NS_PER_S]
)
def test_a_trace_may_be_moved_in_time_and_says_so(tmp_path, starts_at):
    """The first row stands where asked; the source tells both ends of the move."""
    trace = Trace(hourly(tmp_path, 100, 200), starts_at=starts_at)
    at_ns = int(datetime(2026, 3, 4, 6, 30, tzinfo=UTC).timestamp()) * NS_PER_S
    assert trace.at(at_ns).g_per_kwh == 200
    assert "2022-01-01T00:00:00Z" in trace.at(at_ns).source
    assert "2026-03-04T05:00:00Z" in trace.at(at_ns).source


def test_clocks_that_change_give_every_hour_once(tmp_path):
    """Local times of Paris over both changes: 23 and 25 hours, evenly spaced in UTC."""
    autumn = ["00:00", "01:00", "02:00", "02:00", "03:00"]
    trace = Trace(written(tmp_path, *(f"2026-10-25T{at},{k}" for k, at in enumerate(autumn))), timezone="Europe/Paris")
    start_ns = int(datetime(2026, 10, 24, 22, tzinfo=UTC).timestamp()) * NS_PER_S
    assert [trace.at(start_ns + k * HOUR_NS).g_per_kwh for k in range(5)] == [0, 1, 2, 3, 4]
    spring = ["00:00", "01:00", "03:00", "04:00"]
    trace = Trace(written(tmp_path, *(f"2026-03-29T{at},{k}" for k, at in enumerate(spring))), timezone="Europe/Paris")
    start_ns = int(datetime(2026, 3, 28, 23, tzinfo=UTC).timestamp()) * NS_PER_S
    assert [trace.at(start_ns + k * HOUR_NS).g_per_kwh for k in range(4)] == [0, 1, 2, 3]
    assert not trace.at(start_ns + 2 * HOUR_NS).estimated


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        (["2022-01-01T00:00Z,nan", "2022-01-01T01:00Z,1"], {}, "line 2"),
        (["2022-01-01T00:00Z,1", "2022-01-01T01:00Z,-1"], {}, "line 3"),
        (["2022-01-01T00:00Z,inf", "2022-01-01T01:00Z,1"], {}, "line 2"),
        (["2022-01-01T00:00Z,many", "2022-01-01T01:00Z,1"], {}, "no number"),
        (["2022-01-01T00:00,1", "2022-01-01T01:00,1"], {}, "timezone="),
        (["yesterday,1", "2022-01-01T01:00Z,1"], {}, "ISO 8601"),
        ([",1", "2022-01-01T01:00Z,1"], {}, "ISO 8601"),
        (["2022-01-01T00:00Z,1"], {}, "two rows"),
        ([], {}, "two rows"),
        (["2022-01-01T00:00Z,1", "2022-01-01T01:00+01:00,1"], {}, "two rows for"),
        (["2026-03-29T01:00,1", "2026-03-29T02:30,1"], {"timezone": "Europe/Paris"}, "did not exist"),
        (["2026-03-29T01:00,1", "2026-03-29T03:30,1"], {"timezone": "Europe/Atlantis"}, "IANA"),
        (["2022-01-01T00:00Z,1", "2022-01-01T01:00Z,1"], {"value_column": "co2"}, "value_column="),
        (["2022-01-01T00:00Z,1", "2022-01-01T01:00Z,1"], {"starts_at": datetime(2026, 1, 1)}, "starts_at"),  # noqa: DTZ001
        (["2022-01-01T00:00Z,1", "2022-01-01T01:00Z,1"], {"basis": "market"}, "basis"),
    ],
)
def test_what_can_not_be_a_trace_is_refused_by_line(tmp_path, lines, options, words):
    """NaN, negative, infinite, words, times without a place, double and impossible times, unknown names."""
    with pytest.raises(ArgumentError, match=words):
        Trace(written(tmp_path, *lines), **options)


def test_a_file_that_is_not_there_or_has_other_columns_is_refused(tmp_path):
    """The message tells the columns it has, and what to type."""
    with pytest.raises(ArgumentError, match="can't be read"):
        Trace(tmp_path / "none.csv")
    path = written(tmp_path, "2022-01-01T00:00Z,1", "2022-01-01T01:00Z,2", header="when,co2")
    with pytest.raises(ArgumentError, match=r"when, co2.*time_column="):
        Trace(path)
    assert Trace(path, time_column="when", value_column="co2").at(NEW_YEAR_NS).g_per_kwh == 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared year of four grids is not beside this checkout")
@pytest.mark.parametrize("grid", ["BPAT", "CISO", "ERCO", "PJM"])
def test_the_shared_years_can_be_read(grid):
    """8,760 hours each, in order, from New Year on."""
    trace = Trace(SHARED / f"{grid}-2022-hourly.csv", basis="direct", max_gap_s=48 * 3600)
    assert (trace.start_unix_ns, trace.end_unix_ns) == (NEW_YEAR_NS, NEW_YEAR_NS + 8760 * HOUR_NS)
    points = trace.history(trace.start_unix_ns, trace.end_unix_ns)
    assert len(points) == 8760
    assert all(b.time_unix_ns - a.time_unix_ns == HOUR_NS for a, b in itertools.pairwise(points))


@given(
    values=st.lists(st.floats(0, 1000), min_size=2, max_size=12),
    powers_w=st.lists(st.floats(0, 1000), min_size=2, max_size=12),
    pue=st.floats(1, 2),
)
def test_emissions_are_the_integral_of_power_times_intensity(tmp_path_factory, values, powers_w, pue):
    """Hour by hour through ``at`` and ``operational_g``, against a fine sum over power × PUE × intensity in watts, hours and grams."""
    hours = min(len(values), len(powers_w))
    trace = Trace(hourly(tmp_path_factory.mktemp("trace"), *map(repr, values)))
    summed_g = sum(
        operational_g(kwh_to_joules(powers_w[k] / 1000), pue, trace.at(NEW_YEAR_NS + k * HOUR_NS).g_per_kwh)
        for k in range(hours)
    )
    slices = 60
    fine_g = sum(powers_w[k // slices] / 1000 * pue * values[k // slices] / slices for k in range(hours * slices))
    assert summed_g == pytest.approx(fine_g, rel=1e-9, abs=1e-9)
    halves = trace.history(NEW_YEAR_NS, NEW_YEAR_NS + hours * HOUR_NS)
    assert [point.g_per_kwh for point in halves] == values[:hours]
