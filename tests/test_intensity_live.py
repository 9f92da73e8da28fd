"""A live provider in a run: one request an interval however many ask, every fault survived, and no basis mixed with another."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

import green_torch
from green_torch.errors import ArgumentError, GreenTorchWarning, IntensityError
from green_torch.intensity import ConstantIntensity, ElectricityMaps, Live, UKNeso, WattTime, http, resolve
from green_torch.records import Flag, IntensityPoint
from green_torch.testing import MemorySink, ScriptedClock, ScriptedMeter
from green_torch.units import NS_PER_S
from tests.grid_server import BY_HAND, FAULTS, HOUR_S, PASSWORD, TOKEN, USER, figure, grid_server

HOUR_NS = HOUR_S * NS_PER_S
NOON_NS = 1_790_000_000 // HOUR_S * HOUR_NS  # an hour's beginning; the time of a run is what it is told
ALL_FAULTS = [*FAULTS, *BY_HAND]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of each test's own, short waits, and no proxies."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(http, "READ_TIMEOUT_S", 0.5)
    monkeypatch.setattr(http, "_BACKOFF_S", 0.01)
    return tmp_path / "cache" / "green_torch"


@pytest.fixture
def grid():
    with grid_server() as grid:
        yield grid


def source(grid, **options) -> ElectricityMaps:
    return ElectricityMaps("FR", token=TOKEN, base_url=grid.url, **options)


def live(grid, **options) -> Live:
    return Live(source(grid), **{"wait_s": 5.0, **options})


def table() -> IntensityPoint:
    return resolve("FR").at(0)


def test_a_network_provider_is_made_live_and_a_constant_is_not(grid):
    """resolve() wraps what asks the network, and makes no request; the region given is the table to fall back on."""
    assert isinstance(resolve(None, source(grid)), Live)
    assert isinstance(resolve("FR", 56.0), ConstantIntensity)
    own = live(grid)
    assert resolve(None, own) is own
    assert grid.asked == []


def test_one_request_serves_an_interval_and_each_hour_has_its_own(grid):
    """A hundred records within the hour cost one request; the next hour another; both hours' figures stay known."""
    own = live(grid)
    points = [own.at(NOON_NS + k * HOUR_NS // 100) for k in range(100)]
    assert len(grid.asked) == 1
    assert len(set(points)) == 1
    assert (points[0].g_per_kwh, points[0].fallback) == (figure(time.time()), False)
    grid.change = {"carbonIntensity": 77}
    assert own.at(NOON_NS + HOUR_NS).g_per_kwh == 77
    assert own.at(NOON_NS + HOUR_NS - 1) == points[0]
    assert len(grid.asked) == 2


def test_later_runs_on_the_machine_read_the_cache(grid, cache):
    """A second provider of the same zone and basis asks nothing within the hour; another basis has its own entry."""
    first = live(grid).at(NOON_NS)
    assert live(grid).at(NOON_NS + HOUR_NS // 2) == first
    assert len(grid.asked) == 1
    Live(source(grid, emission_factor_type="direct"), wait_s=5.0).at(NOON_NS)
    assert len(grid.asked) == 2
    assert len(list(cache.glob("intensity-*.json"))) == 2


def test_processes_that_start_together_ask_once(grid):
    """Four real processes, three records each in two hours: two requests, and each has the provider's figure."""
    code = (
        "import sys\nfrom green_torch.intensity import ElectricityMaps, Live\n"
        f"own = Live(ElectricityMaps(lat=48.85, lon=2.35, base_url={grid.url!r}), wait_s=8.0)\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        f"print([(p.g_per_kwh, p.fallback) for p in (own.at({NOON_NS} + k * {HOUR_NS} // 2) for k in range(3))])"
    )
    environment = {**os.environ, "ELECTRICITYMAPS_API_KEY": TOKEN, "PYTHONPATH": str(Path(__file__).parents[1])}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(4)
    ]
    for one in started:
        assert one.stdout.readline() == "ready\n"
    value = float(figure(time.time()))
    for one in started:
        one.stdin.write("\n")
        one.stdin.flush()
    for one in started:
        assert one.communicate(timeout=30)[0] == f"{[(value, False)] * 3}\n"
    assert len(grid.asked) == 2


def test_threads_of_one_process_ask_once(grid):
    """Eight at the same instant: one request, and all get the answer."""
    own, found = live(grid), []
    threads = [threading.Thread(target=lambda: found.append(Live(source(grid), wait_s=5.0).at(NOON_NS))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [point.fallback for point in found] == [False] * 8
    assert own.at(NOON_NS) == found[0]
    assert len(grid.asked) == 1


def test_a_claim_whose_owner_died_holds_nobody_up_for_long(grid, cache):
    """A claim without an answer: others fall back at once, and ask a minute and a half later."""
    own = live(grid, wait_s=0.1)
    cache.mkdir(parents=True)
    (cache / f"{own._file.stem}.{NOON_NS // NS_PER_S}.asked").touch()
    assert own.at(NOON_NS).fallback
    assert grid.asked == []
    assert not live(grid).at(NOON_NS + 91 * NS_PER_S).fallback
    assert len(grid.asked) == 1
    assert len(list(cache.glob("*.asked"))) == 1


def test_without_a_cache_that_can_be_written_it_still_answers(grid, tmp_path):
    """A file stands where the directory should be."""
    (tmp_path / "file").touch()
    assert not live(grid, cache_dir=tmp_path / "file").at(NOON_NS).fallback


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"latest": {"asked_unix_ns": "x"}}', '{"latest": 5, "failure": {"asked_unix_ns": 0}}']
)
def test_a_damaged_cache_is_asked_anew(grid, cache, content):
    """Nothing unreadable, and no figure that is none, is taken from the file."""
    own = live(grid)
    cache.mkdir(parents=True)
    own._file.write_text(content)
    assert not own.at(NOON_NS).fallback
    good = json.loads(own._file.read_text())
    for bad in ({"g_per_kwh": -1.0}, {"g_per_kwh": None}, {"basis": "direct"}, {"average": False}, {"colour": "green"}):
        damaged = {
            "latest": {**good["latest"], "asked_unix_ns": NOON_NS + HOUR_NS, "point": {**good["latest"]["point"], **bad}}
        }
        own._file.write_text(json.dumps(damaged))
        before = len(grid.asked)
        assert live(grid).at(NOON_NS + HOUR_NS).g_per_kwh == figure(time.time())
        assert len(grid.asked) == before + 1
        for claim in cache.glob("*.asked"):
            claim.unlink()


def test_a_hung_server_costs_one_short_wait(grid):
    """The first record waits for wait_s, the others not at all, and each gets the table, marked; later the answer is taken up."""
    grid.fault = "hang"
    own = live(grid, wait_s=0.2)
    began = time.monotonic()
    points = [own.at(NOON_NS + k) for k in range(50)]
    assert time.monotonic() - began < 0.45
    assert all(point.fallback and point.g_per_kwh == table().g_per_kwh for point in points)
    assert "has not answered yet" in points[0].source


def test_a_failure_is_left_alone_for_longer_and_longer(grid):
    """Asked again after 1, 2 and 4 minutes, not in between; by other processes neither; at the first answer all is well."""
    grid.fault = "429"
    own = live(grid)
    for at_s, requests in ((0, 1), (59, 1), (60, 2), (179, 2), (180, 3), (419, 3), (420, 4)):
        assert own.at(NOON_NS + at_s * NS_PER_S).fallback
        assert len(grid.asked) == requests, at_s
    assert "asked too often" in live(grid).at(NOON_NS + 430 * NS_PER_S).source
    assert len(grid.asked) == 4
    grid.fault = ""
    assert not own.at(NOON_NS + 900 * NS_PER_S).fallback


def test_a_servers_own_wait_is_honoured(grid):
    """Retry-After: 1800 is half an hour without a request."""
    grid.fault, grid.headers = "429", {"Retry-After": "1800"}
    own = live(grid)
    for at_s, requests in ((0, 1), (1799, 1), (1800, 2)):
        own.at(NOON_NS + at_s * NS_PER_S)
        assert len(grid.asked) == requests


def test_a_refusal_is_not_repeated(grid):
    """A wrong key is sent once in six hours; another process with another key still asks."""
    grid.fault = "401"
    own = live(grid)
    for hour in range(6):
        assert own.at(NOON_NS + hour * HOUR_NS).fallback
    assert len(grid.asked) == 1
    grid.fault = ""
    assert not live(grid).at(NOON_NS + HOUR_NS).fallback
    assert not own.at(NOON_NS + 6 * HOUR_NS).fallback


def test_the_last_known_figure_stands_in_for_three_hours_and_then_the_table(grid):
    """Both marked, with the cause; after a restart too, from the cache."""
    own = live(grid)
    known = own.at(NOON_NS)
    grid.fault = "500"
    both = (own, live(grid))
    for last in [one.at(NOON_NS + 2 * HOUR_NS) for one in both]:
        assert (last.g_per_kwh, last.fallback, last.time_unix_ns) == (known.g_per_kwh, True, known.time_unix_ns)
        assert "last known figure" in last.source
        assert "500" in last.source
    for late in [one.at(NOON_NS + 3 * HOUR_NS + 1) for one in both]:
        assert (late.g_per_kwh, late.fallback) == (table().g_per_kwh, True)
        assert "in place of Electricity Maps" in late.source


def test_no_table_of_another_basis_stands_in(grid):
    """France's table is lifecycle: for direct figures the last known one goes on, and before the first nothing is known."""
    own = Live(source(grid, emission_factor_type="direct"), wait_s=5.0)
    grid.fault = "500"
    with pytest.raises(IntensityError, match="500"):
        own.at(NOON_NS)
    grid.fault = ""
    known = own.at(NOON_NS + HOUR_NS)
    grid.fault = "500"
    assert own.at(NOON_NS + 30 * HOUR_NS).g_per_kwh == known.g_per_kwh
    assert own.at(NOON_NS + 30 * HOUR_NS).kind == known.kind == "direct, average"


def test_a_table_of_another_basis_serves_where_the_provider_never_will(grid):
    """Refused for good before the first answer: the table, in its own basis, for the whole run."""
    grid.fault = "401 plan"
    own = Live(source(grid, emission_factor_type="direct"), wait_s=5.0)
    points = {own.at(NOON_NS)}
    grid.fault = ""
    points |= {own.at(NOON_NS + hour * HOUR_NS) for hour in (1, 2, 30)}
    assert {point.kind for point in points} == {"lifecycle, average"}
    assert all(point.fallback and "Your plan has no access" in point.source for point in points)


def test_the_fallback_is_the_region_given_then_the_zones_country(grid):
    """US-CAL-CISO falls back on the USA; marginal figures on nothing; Great Britain's direct ones on nothing of another basis."""
    grid.fault = "500"
    for own, wanted in (
        (ElectricityMaps("US-CAL-CISO", token=TOKEN, base_url=grid.url), "US"),
        (ElectricityMaps("AUS-NSW", token=TOKEN, base_url=grid.url), "AU"),
    ):
        assert Live(own, wait_s=5.0).at(NOON_NS).region == wanted
    assert Live(source(grid, version="v3"), region="DE", wait_s=5.0).at(NOON_NS).region == "DE"
    for own in (WattTime("PJM", username=USER, password=PASSWORD, base_url=grid.url), UKNeso(base_url=grid.url)):
        with pytest.raises(IntensityError):
            Live(own, wait_s=5.0).at(NOON_NS)


def test_ranks_that_follow_never_ask(grid):
    """They take what they are told and what the machine's cache holds, and no stand-in of another rank's."""
    follower = live(grid, wait_s=0.3)
    follower.follow()
    assert follower.at(NOON_NS).fallback
    assert grid.asked == []
    told = live(grid).at(NOON_NS)
    follower.tell(replace(told, g_per_kwh=1.0, fallback=True), NOON_NS)
    until_s = time.monotonic() + 5
    while follower.at(NOON_NS + 2 * NS_PER_S) != told:
        assert time.monotonic() < until_s
        time.sleep(0.02)
    follower.tell(replace(told, g_per_kwh=88.0), NOON_NS + HOUR_NS)
    assert follower.at(NOON_NS + HOUR_NS).g_per_kwh == 88.0
    assert len(grid.asked) == 1


def test_history_and_forecast_go_through(grid):
    """A live provider forecasts as its source does."""
    now_ns = time.time_ns()
    own = live(grid)
    assert own.forecast(now_ns, now_ns + 5 * HOUR_NS) == source(grid).forecast(now_ns, now_ns + 5 * HOUR_NS)
    assert own.history(now_ns - 5 * HOUR_NS, now_ns) == source(grid).history(now_ns - 5 * HOUR_NS, now_ns)


def test_negative_times_are_refused(grid):
    """At construction."""
    with pytest.raises(ArgumentError):
        live(grid, wait_s=-1)
    with pytest.raises(ArgumentError):
        live(grid, max_age_s=float("nan"))


def run(provider, *, steps=3, step_s=2.0, log_dir=None, meanwhile=lambda step: None):
    """A scripted run of 300 W; ``meanwhile`` is called before each step."""
    clock, sink = ScriptedClock(), MemorySink()
    meter = ScriptedMeter(clock, {"gpu0": 300.0})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with green_torch.track(
            clock=clock, meters=[meter], sinks=[sink], intensity=provider, log_dir=log_dir,
            log_every_n_steps=1, poll_interval_s=0.5,
        ) as tracker:  # fmt: skip
            for step in range(steps):
                meanwhile(step)
                clock.advance(step_s)
                tracker.step()
    ours = [str(one.message) for one in said if issubclass(one.category, GreenTorchWarning)]
    return sink, ours


def train(sink):
    return [record for record in sink.records if record.phase == "train"]


def test_a_run_takes_each_hours_figure_and_states_its_source(grid, tmp_path):
    """Each record has the hour's figure, the manifest the provider's point, and the grams are energy x intensity."""
    sink, said = run(
        source(grid, temporal_granularity="5_minutes"),
        step_s=100.0,
        steps=6,
        meanwhile=lambda step: grid.change.update({"carbonIntensity": 100 + 50 * (step // 3)}),
    )
    assert said == []
    assert {record.intensity_g_per_kwh for record in train(sink)} == {100.0, 150.0}
    for record in train(sink):
        assert record.operational_g == pytest.approx(record.energy_j / 3.6e6 * record.intensity_g_per_kwh)
        assert not record.flagged(Flag.INTENSITY_FALLBACK)
    point = sink.summary.manifest.intensity
    assert (point.region, point.kind, point.fallback) == ("FR", "lifecycle, average", False)
    assert "Electricity Maps v4" in str(sink.summary)


@pytest.mark.parametrize("fault", ALL_FAULTS)
def test_training_goes_on_whatever_the_grid_server_does(grid, tmp_path, fault, caplog, capfd):
    """Every step is recorded, flagged, with the table's figure; one warning; and no file, log or output holds the key."""
    grid.fault = fault
    with grid_server() as other, caplog.at_level(logging.DEBUG):
        grid.other = other
        sink, said = run(Live(source(grid), wait_s=0.3), log_dir=tmp_path / "run")
    assert [record.step for record in train(sink)] == [0, 1, 2]
    assert sink.summary.status == "completed"
    for record in train(sink):
        assert record.flagged(Flag.INTENSITY_FALLBACK)
        assert record.intensity_g_per_kwh == table().g_per_kwh
        assert record.operational_g > 0
    assert 1 <= len(said) <= 3, said  # before its first answer a slow server is named apart
    assert all("in place of Electricity Maps" in one for one in said)
    assert "in place of" in sink.summary.manifest.intensity.source
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".jsonl" for path in files)
    assert any(path.name.startswith("events.") for path in files)
    told = caplog.text + "".join(capfd.readouterr()) + str(sink.summary) + str(said)
    assert TOKEN not in told
    assert all(TOKEN.encode() not in path.read_bytes() for path in files)


def test_a_run_whose_grid_fails_half_way_keeps_one_basis(grid, tmp_path):
    """The last known figure, flagged, for the hours without an answer; the sum is of one kind."""

    def meanwhile(step):
        grid.fault = "500" if step >= 3 else ""

    sink, said = run(source(grid, temporal_granularity="5_minutes"), steps=9, step_s=100.0, meanwhile=meanwhile)
    flagged = [record.flagged(Flag.INTENSITY_FALLBACK) for record in train(sink)]
    assert flagged[:2] == [False] * 2
    assert all(flagged[4:])
    assert len({record.intensity_g_per_kwh for record in train(sink)}) == 1
    assert len(said) == 1
    assert sink.summary.manifest.intensity.fallback is False


def test_grams_stay_unknown_where_only_another_basis_is_known(grid, tmp_path):
    """Marginal figures that never come: energy is measured, grams are None, flagged, and one warning says why."""
    grid.fault = "500"
    sink, said = run(WattTime("PJM", username=USER, password=PASSWORD, base_url=grid.url))
    assert all(record.energy_j > 0 and record.operational_g is None for record in train(sink))
    assert all(record.flagged(Flag.INTENSITY_FALLBACK) for record in train(sink))
    assert len(said) == 1
    assert "unknown until it answers" in said[0]


def test_a_users_provider_that_changes_its_basis_is_not_summed(tmp_path):
    """From lifecycle to marginal in mid-run: the last lifecycle figure stands in, flagged."""
    first = IntensityPoint(100.0, "XX", "mine", basis="lifecycle")

    class Fickle:
        def at(self, time_unix_ns):
            begun_ns = ScriptedClock().epoch_unix_ns
            return first if time_unix_ns < begun_ns + 4 * NS_PER_S else replace(first, g_per_kwh=900.0, average=False)

    sink, said = run(Fickle())
    assert {record.intensity_g_per_kwh for record in train(sink)} == {100.0}
    assert [record.flagged(Flag.INTENSITY_FALLBACK) for record in train(sink)] == [False, True, True]
    assert len(said) == 1
    assert "don't add up" in said[0]


def test_constructing_a_tracker_asks_nothing(grid):
    """No request before the context is entered, nor when it never is."""
    green_torch.track(intensity=source(grid), meters=[], enabled=True, clock=ScriptedClock())
    time.sleep(0.05)
    assert grid.asked == []
