"""Providers over real HTTP: each schema, each fault, and no credential anywhere."""

from __future__ import annotations

import itertools
import logging
import pickle
import re
import time
import traceback
from datetime import UTC, datetime

import pytest

from green_torch.errors import ArgumentError, IntensityError
from green_torch.intensity import ElectricityMaps, Online, UKNeso, WattTime, http
from green_torch.units import NS_PER_S
from tests.grid_server import BY_HAND, FAULTS, FIVE_S, HALF_S, HOUR_S, PASSWORD, TOKEN, USER, figure, grid_server

HOUR_NS = HOUR_S * NS_PER_S
G_PER_KWH_AT_1000_LB_PER_MWH = 453.59237
KEYS = ("ELECTRICITYMAPS_API_KEY", "ELECTRICITY_MAPS_API_KEY", "WATTTIME_USER", "WATTTIME_USERNAME", "WATTTIME_PASSWORD")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No proxies or keys of the machine's, and short waits."""
    for name in (*KEYS, "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(http, "READ_TIMEOUT_S", 0.5)
    monkeypatch.setattr(http, "_BACKOFF_S", 0.01)


@pytest.fixture
def grid():
    with grid_server() as grid:
        yield grid


def electricity_maps(grid, zone="FR", **options) -> ElectricityMaps:
    return ElectricityMaps(zone, token=TOKEN, base_url=grid.url, **options)


def watttime(grid, region="CAISO_NORTH", **options) -> WattTime:
    return WattTime(region, **{"username": USER, "password": PASSWORD, "base_url": grid.url, **options})


def provider(grid, kind: str) -> Online:
    return {"electricity maps": electricity_maps, "neso": lambda grid: UKNeso(base_url=grid.url), "watttime": watttime}[kind](
        grid
    )


def refused(call) -> IntensityError:
    with pytest.raises(IntensityError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("version", ["v4", "v3"])
@pytest.mark.parametrize("basis", ["lifecycle", "direct"])
def test_electricity_maps_latest_carries_all_that_it_means(grid, version, basis):
    """Figure, zone, basis, average, estimated and time; caller lookup is off and the key is in the header alone."""
    point = electricity_maps(grid, version=version, emission_factor_type=basis).latest()
    hour_s = time.time() // HOUR_S * HOUR_S
    assert (point.g_per_kwh, point.time_unix_ns) == (figure(hour_s), int(hour_s) * NS_PER_S)
    assert (point.region, point.basis, point.average, point.estimated, point.fallback) == ("FR", basis, True, True, False)
    assert f"Electricity Maps {version}" in point.source
    path, query, headers = grid.asked[0]
    assert path == f"/{version}/carbon-intensity/latest"
    assert query["disableCallerLookup"] == "true"
    assert (query["emissionFactorType"], query["zone"]) == (basis, "FR")
    assert headers["auth-token"] == TOKEN
    assert TOKEN not in path + str(query)


def test_electricity_maps_knows_data_centers_and_coordinates(grid):
    """``aws:eu-west-3`` and lat/lon are asked for as such, and the answer's zone is the point's."""
    assert electricity_maps(grid, "AWS:eu-west-3").latest().region == "FR"
    assert electricity_maps(grid, None, lat=48.85, lon=2.35).latest().region == "FR"
    first, second = (query for _, query, _ in grid.asked)
    assert (first["dataCenterProvider"], first["dataCenterRegion"]) == ("aws", "eu-west-3")
    assert (second["lat"], second["lon"]) == ("48.85", "2.35")
    assert "zone" not in first
    assert "zone" not in second


def test_electricity_maps_history_is_free_for_a_day_and_cut_into_ten_days_before(grid):
    """The last 24 hours from one endpoint; thirty days from the other, in three requests, each hour once."""
    now_ns = time.time_ns()
    day = electricity_maps(grid).history(now_ns - 23 * HOUR_NS, now_ns)
    assert len(day) in (23, 24)
    assert grid.paths() == ["/v4/carbon-intensity/history"]
    assert [point.estimated for point in day] == [False] * (len(day) - 1) + [True]
    month = electricity_maps(grid).history(now_ns - 720 * HOUR_NS, now_ns - HOUR_NS)
    assert grid.paths()[1:] == ["/v4/carbon-intensity/past-range"] * 3
    assert len(month) in (719, 720)
    assert all(b.time_unix_ns - a.time_unix_ns == HOUR_NS for a, b in itertools.pairwise(month))
    assert all(point.g_per_kwh == figure(point.time_unix_ns / NS_PER_S) for point in month)


def test_electricity_maps_forecast_asks_no_further_than_needed(grid):
    """The shortest horizon that covers the end; every point is estimated; the first is in force at the start."""
    now_ns = time.time_ns()
    points = electricity_maps(grid).forecast(now_ns, now_ns + 20 * HOUR_NS)
    assert grid.asked[0][1]["horizonHours"] == "24"
    assert points[0].time_unix_ns <= now_ns < points[1].time_unix_ns
    assert points[-1].time_unix_ns < now_ns + 20 * HOUR_NS <= points[-1].time_unix_ns + HOUR_NS
    assert all(point.estimated for point in points)
    electricity_maps(grid).forecast(now_ns, now_ns + 500 * HOUR_NS)
    assert grid.asked[1][1]["horizonHours"] == "72"


def test_at_takes_the_latest_now_the_history_before_and_the_forecast_after(grid):
    """One request each, and the figure of that hour."""
    own, now_ns = electricity_maps(grid), time.time_ns()
    for ahead_h, endpoint in ((0, "latest"), (-5, "history"), (-50, "past-range"), (9, "forecast")):
        at_ns = now_ns + ahead_h * HOUR_NS
        assert own.at(at_ns).g_per_kwh == figure(at_ns / NS_PER_S)
        assert grid.paths()[-1].endswith(endpoint)
    assert len(grid.asked) == 4


def test_neso_gives_the_actual_figure_or_the_forecast_marked_so(grid):
    """Running half hour: forecast, estimated. Past ones: actual. Direct, average, Great Britain."""
    own = UKNeso(base_url=grid.url)
    now = own.latest()
    half_s = time.time() // HALF_S * HALF_S
    assert (now.g_per_kwh, now.estimated) == (figure(half_s) + 1, True)
    assert (now.region, now.basis, now.average) == ("GB", "direct", True)
    past = own.history(time.time_ns() - 5 * HOUR_NS, time.time_ns() - HOUR_NS)
    assert len(past) in (8, 9)
    assert not any(point.estimated for point in past)
    assert all(point.g_per_kwh == figure(point.time_unix_ns / NS_PER_S) for point in past)


@pytest.mark.parametrize(("region", "zone"), [(13, "GB regionid 13"), ("rg10", "GB postcode RG10")])
def test_neso_regions_answer_in_a_list_or_bare(grid, region, zone):
    """Both shapes are read, and the region is checked."""
    own, now_ns = UKNeso(region, base_url=grid.url), time.time_ns()
    assert (own.latest().region, own.latest().estimated) == (zone, True)
    ahead = own.forecast(now_ns, now_ns + 30 * HOUR_NS)
    assert "fw48h" in grid.paths()[-1]
    assert len(ahead) in (60, 61)
    assert ahead[0].time_unix_ns <= now_ns
    grid.change = {"regionid": 2, "postcode": "XX1"}
    assert refused(own.latest).final


def test_neso_history_is_asked_for_in_fortnights(grid):
    """A month is three requests, each half hour once."""
    end_ns = time.time_ns()
    points = UKNeso(base_url=grid.url).history(end_ns - 720 * HOUR_NS, end_ns)
    assert len(grid.asked) == 3
    assert len(points) in (1440, 1441)
    assert len({point.time_unix_ns for point in points}) == len(points)


def test_watttime_is_marginal_and_in_grams(grid):
    """1,000 lbs/MWh are 453.6 g/kWh; one login serves many requests."""
    own, now_ns = watttime(grid), time.time_ns()
    point = own.latest()
    assert point.g_per_kwh == pytest.approx(G_PER_KWH_AT_1000_LB_PER_MWH)
    assert (point.region, point.basis, point.average, point.estimated) == ("CAISO_NORTH", "direct", False, True)
    assert now_ns - point.time_unix_ns < FIVE_S * NS_PER_S + NS_PER_S
    assert len(own.history(now_ns - 2 * HOUR_NS, now_ns)) in (24, 25)
    assert len(own.forecast(now_ns, now_ns + 3 * HOUR_NS)) in (36, 37)
    assert grid.paths() == ["/login", "/v3/forecast", "/v3/historical", "/v3/forecast"]


def test_watttime_logs_in_again_once_when_its_token_ran_out(grid):
    """A token that the server no longer takes is renewed; a second refusal is the account's."""
    own = watttime(grid)
    own.latest()
    grid.tokens.append("another")
    own.latest()
    assert grid.paths() == ["/login", "/v3/forecast", "/v3/forecast", "/login", "/v3/forecast"]
    grid.fault = "401 plan"
    assert refused(own.latest).final


def test_watttime_checks_region_and_units(grid):
    """Kilograms, or another region, are not taken for what was asked."""
    grid.change = {"units": "kg_co2_per_mwh"}
    assert "lbs_co2_per_mwh" in str(refused(watttime(grid).latest))
    grid.change = {"region": "PJM"}
    assert "PJM" in str(refused(watttime(grid).latest))


@pytest.mark.parametrize("kind", ["electricity maps", "neso", "watttime"])
@pytest.mark.parametrize("fault", [*FAULTS, *BY_HAND])
def test_every_fault_is_an_intensity_error_without_a_secret(grid, kind, fault, caplog):
    """Whatever the server does: one exception type, in bounded time, nothing behind it, no credential in text, locals or log."""
    with grid_server() as other:
        grid.other = other
        own = provider(grid, kind)
        if kind == "watttime" and fault != "redirect":
            own.latest()
        grid.fault = fault
        began = time.monotonic()
        with caplog.at_level(logging.DEBUG):
            error = refused(own.latest)
        assert time.monotonic() - began < 2.5
        assert other.asked == []
    assert error.__cause__ is None
    assert error.__context__ is None
    told = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    told += caplog.text + repr(own) + repr(vars(own)) + str(error)
    for secret in (TOKEN, PASSWORD, USER, *re.findall(r"Basic (\S+)", str(grid.asked))):
        assert secret not in told
    assert error.final is (fault.startswith("40") or fault == "redirect")


def test_errors_name_what_happened_and_what_to_type(grid):
    """The server's words, the variable to set, and the plan's lack of a zone are told."""
    own = electricity_maps(grid)
    for fault, words in {
        "401": "401: Invalid auth-token.*export ELECTRICITYMAPS_API_KEY=",
        "401 plan": "Your plan has no access to zone=FR.*export",
        "401 echo": r"Invalid auth-token: \*\*\*",
        "400": "Zone 'XX' does not exist",
        "429": "asked too often",
        "500": "500: oops",
        "not json": "not JSON",
        "nan": "not JSON",
        "half body": "broke off",
        "hang": "no answer within",
        "huge": "longer than 8 MiB",
        "bomb": "longer than 8 MiB",
        "redirect": "base_url=",
    }.items():
        with grid_server() as other:
            grid.fault, grid.other = fault, other
            assert re.search(words, str(refused(own.latest))), fault


def test_passing_failures_are_tried_again_and_refusals_are_not(grid):
    """A 500 three times in all; a 401 and a 429 once, the latter with the server's own wait, in either form."""
    own = electricity_maps(grid)
    for fault, requests in {"500": 3, "401": 1, "429": 1, "400": 1}.items():
        grid.fault, before = fault, len(grid.asked)
        refused(own.latest)
        assert len(grid.asked) - before == requests, fault
    grid.fault = "429"
    for header, wait_s in {"7": 7, "never": None, datetime.now(UTC).strftime("%a, %d %b %Y 00:00:00 GMT"): 0}.items():
        grid.headers = {"Retry-After": header}
        assert refused(own.latest).retry_after_s == wait_s


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"zone": "DE"}, "'DE' where 'FR'"),
        ({"zone": None}, "zone None"),
        ({"carbonIntensity": None}, "no figure"),
        ({"carbonIntensity": "56"}, "no figure"),
        ({"carbonIntensity": True}, "no figure"),
        ({"carbonIntensity": -3}, "can't be"),
        ({"carbonIntensity": 1e9}, "can't be"),
        ({"datetime": "yesterday"}, "for a time"),
        ({"datetime": "2026-01-01T00:00:00"}, "without its offset"),
        ({"datetime": None}, "for a time"),
        ({"datetime": "2020-01-01T00:00:00Z"}, "too old"),
        ({"emissionFactorType": "direct"}, "'direct' figures"),
        ({"_disclaimer": "randomized"}, "sandbox"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(grid, change, words):
    """Another zone, no number, an impossible one, a bad or old time, another basis, a sandbox's."""
    grid.change = change
    assert words in str(refused(electricity_maps(grid).latest))


def test_rows_without_a_figure_are_left_out_and_no_row_at_all_is_an_error(grid):
    """A null in a history is a gap, never a zero."""
    now_ns = time.time_ns()
    grid.change = {"history": [{"carbonIntensity": None, "datetime": "2026-01-01T00:00:00Z"}]}
    assert "no figure" in str(refused(lambda: electricity_maps(grid).history(now_ns - HOUR_NS, now_ns)))
    grid.change = {"history": "gone"}
    assert "list" in str(refused(lambda: electricity_maps(grid).history(now_ns - HOUR_NS, now_ns)))


def test_keys_come_from_the_environment_and_show_nowhere(grid, monkeypatch):
    """Both spellings; blanks around are dropped; repr and pickled exceptions hold none."""
    for name in KEYS[:2]:
        monkeypatch.setenv(name, f" {TOKEN}\n")
        own = ElectricityMaps("FR", base_url=grid.url)
        assert own.latest().g_per_kwh > 0
        assert TOKEN not in repr(own)
        monkeypatch.delenv(name)
    monkeypatch.setenv("WATTTIME_USER", USER)
    monkeypatch.setenv("WATTTIME_PASSWORD", PASSWORD)
    assert WattTime("CAISO_NORTH", base_url=grid.url).latest().g_per_kwh > 0
    grid.fault = "401 echo"
    error = refused(electricity_maps(grid).latest)
    assert TOKEN.encode() not in pickle.dumps(error.args)


def test_no_netrc_replaces_the_credentials(grid, monkeypatch, tmp_path):
    """A .netrc entry for the host is not sent, and does not push ours out."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login other password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    electricity_maps(grid).latest()
    assert "Authorization" not in grid.asked[0][2]
    assert watttime(grid).latest().g_per_kwh > 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: ElectricityMaps("FR"),
        lambda: ElectricityMaps("FR", token=" "),
        lambda: ElectricityMaps("FR", token="two\nlines"),
        lambda: ElectricityMaps("FR", token="naïve"),
        lambda: ElectricityMaps(token=TOKEN),
        lambda: ElectricityMaps("", token=TOKEN),
        lambda: ElectricityMaps("aws:", token=TOKEN),
        lambda: ElectricityMaps("FR", lat=1.0, lon=2.0, token=TOKEN),
        lambda: ElectricityMaps(lat=1.0, token=TOKEN),
        lambda: ElectricityMaps(lat=91.0, lon=0.0, token=TOKEN),
        lambda: ElectricityMaps("FR", token=TOKEN, version="v5"),
        lambda: ElectricityMaps("FR", token=TOKEN, emission_factor_type="marginal"),
        lambda: ElectricityMaps("FR", token=TOKEN, temporal_granularity="daily"),
        lambda: ElectricityMaps("FR", token=TOKEN, base_url="ftp://example.org"),
        lambda: ElectricityMaps("FR", token=TOKEN, base_url="https://me:word@example.org"),
        lambda: UKNeso(0),
        lambda: UKNeso(18),
        lambda: UKNeso(True),
        lambda: UKNeso("London"),
        lambda: WattTime("CAISO_NORTH"),
        lambda: WattTime("CAISO_NORTH", username=USER),
        lambda: WattTime("", username=USER, password=PASSWORD),
    ],
)
def test_wrong_arguments_raise_at_construction(call):
    """Before training, with what to type, and without the credential."""
    with pytest.raises(ArgumentError) as caught:
        call()
    assert TOKEN not in str(caught.value)
    assert "word@" not in str(caught.value)
    assert "lines" not in str(caught.value)
