"""``green-torch when`` and ``wait``: what is printed for people and scripts, and the answer where a grid can't be asked."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from green_torch import track
from green_torch.cli import main, when
from green_torch.errors import ArgumentError, IntensityError
from green_torch.intensity import ElectricityMaps, Trace
from green_torch.records import IntensityPoint
from green_torch.testing import ScriptedClock
from green_torch.units import NS_PER_S
from tests import processes
from tests.processes import GREEN_TORCH

if TYPE_CHECKING:
    from pathlib import Path

ENVIRONMENT = {**processes.ENVIRONMENT, "TZ": "Europe/Berlin"}
START = datetime(2022, 6, 1, tzinfo=UTC)
START_NS = int(START.timestamp()) * NS_PER_S
DAY = (*(300,) * 6, *(100,) * 4, *(200,) * 14)  # cleanest from 06 to 10 UTC
HOURS = ("--hours", "4", "--within", "24h", "--start", START.isoformat())


def written(path: Path, figures, start: datetime = START) -> Path:
    rows = (f"{(start + timedelta(hours=k)).isoformat()},{value}" for k, value in enumerate(figures))
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["datetime,carbon_intensity_gco2_per_kwh", *rows]) + "\n")
    return path


@pytest.fixture
def trace(tmp_path) -> Path:
    return written(tmp_path / "XX-2022.csv", DAY)


@pytest.fixture
def berlin(monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def run(capsys, *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``green-torch ...`` in this process."""
    try:
        main(list(args))
    except SystemExit as left:
        code = left.code or 0
    said = capsys.readouterr()
    return code, said.out, said.err


def test_json_says_when_and_what_it_saves(capsys, trace):
    """Four hours at 100 in place of 300: start, end, intervals, grams per kW, and the saving as a fraction."""
    code, out, _ = run(capsys, "when", "--trace", str(trace), *HOURS, "--format", "json", "--power", "500")
    told = json.loads(out)
    assert code == 0
    assert told["start"] == told["release"] == "2022-06-01T06:00:00+00:00"
    assert told["end"] == "2022-06-01T10:00:00+00:00"
    assert [(one["start"], one["end"], one["g_per_kwh"]) for one in told["intervals"]] == [
        ("2022-06-01T06:00:00+00:00", "2022-06-01T10:00:00+00:00", pytest.approx(100))
    ]
    assert (told["emissions_g_per_kw"], told["baseline_g_per_kw"]) == (pytest.approx(400), pytest.approx(1200))
    assert told["saving"] == pytest.approx(2 / 3)
    assert (told["baseline"], told["method"], told["worth_it"]) == ("starting now", "forecast", True)
    assert told["saving_g"] == pytest.approx(400)
    assert told["region"] == "XX-2022"
    assert told["horizon_h"] == 24


def test_pieces_are_listed(capsys, tmp_path):
    """With --interruptible the two clean hours are taken, and the resume's overhead is in the second."""
    path = written(tmp_path / "grid.csv", [100, 300, 300, 300, 100, 300])
    args = ("--hours", "2", "--within", "6h", "--start", START.isoformat(), "--interruptible", "--resume-overhead", "6m")
    told = json.loads(run(capsys, "when", "--trace", str(path), *args, "--format", "json")[1])
    assert [one["resume_s"] for one in told["intervals"]] == [0, 360]
    assert told["intervals"][0]["start"] == "2022-06-01T00:00:00+00:00"
    assert told["emissions_g_per_kw"] == pytest.approx(100 + 30 + 100)  # the overhead's six minutes at 300


@pytest.mark.parametrize(("form", "expected"), [("slurm", "2022-06-01T07:30\n"), ("iso", "2022-06-01T05:30:00+00:00\n")])
def test_a_time_for_scripts(capsys, trace, berlin, form, expected):
    """Slurm's in the cluster's local time and without an offset; both are when to hand the job to the queue, before its start."""
    code, out, err = run(capsys, "when", "--trace", str(trace), *HOURS, "--queue-delay", "30m", "--format", form)
    assert (code, out, err) == (0, expected, "")


def test_people_get_the_saving_and_a_plot(trace):
    """The start, both figures with unit and baseline, the source; columns with the window marked."""
    console = Console(file=io.StringIO(), width=100, highlight=False)
    job = when.Job(4 * 3600, 24 * 3600)
    when.write(when.ask({"XX": Trace(trace)}, job, START_NS), "human", console)
    text = console.file.getvalue()
    assert "06:00 UTC" in text or "Start at" in text
    figures = "400 gCO2e in place of 1.20 kgCO2e per kW drawn for the 4 h, for starting now: 66.7 % saved, by forecast"
    assert figures in " ".join(text.split())
    assert "gCO2e/kWh" in text
    assert "█" in text
    assert text.count("━") == 10  # 4 of 24 hours of 60 columns


def test_a_saving_that_is_too_small_is_not_waited_for(capsys, trace):
    """With --min-saving 70% the advice is now, in every form, and says what waiting would save, and that the marked window isn't taken."""
    args = ("when", "--trace", str(trace), *HOURS, "--min-saving", "70%")
    told = json.loads(run(capsys, *args, "--format", "json")[1])
    assert (told["start"], told["saving"], told["worth_it"]) == ("2022-06-01T00:00:00+00:00", 0, False)
    assert told["emissions_g_per_kw"] == told["baseline_g_per_kw"]
    assert told["regions"][0]["saving"] == pytest.approx(2 / 3)
    told = " ".join(run(capsys, *args)[1].split())
    assert "Start now: waiting saves 66.7 % at best, less than the 70.0 % of --min-saving." in told
    assert "The best window, marked below, is from Wed 2022-06-01 " in told
    assert "it saves too little to wait for." in told
    assert run(capsys, *args, "--format", "iso")[1] == "2022-06-01T00:00:00+00:00\n"


def test_regions_are_compared_with_the_first(capsys, trace, tmp_path):
    """One trace for each region, in order: the best first, and the baseline at home."""
    other = written(tmp_path / "YY.csv", [50] * 24)
    args = ("--trace", str(trace), "--trace", str(other), "--region", "XX", "--regions", "YY")
    told = json.loads(run(capsys, "when", *args, *HOURS, "--format", "json")[1])
    assert [one["region"] for one in told["regions"]] == ["YY", "XX"]
    assert (told["region"], told["start"]) == ("YY", "2022-06-01T00:00:00+00:00")
    assert (told["baseline"], told["saving"]) == ("starting now in XX", pytest.approx(1 - 200 / 1200))
    assert "YY" in run(capsys, "when", *args, *HOURS)[1]
    written(tmp_path / "YY.csv", [390] * 24)
    assert "1.56 kgCO2e  30.0 % more" in run(capsys, "when", *args, *HOURS)[1]


def down(region: str = "DE") -> dict:
    return {region: ElectricityMaps(region, token="k", base_url="http://127.0.0.1:9")}


def test_a_provider_that_is_down_means_now(capsys):
    """Now in each form, with exit code 0, and the reason on stderr alone."""
    answer = when.ask(down(), when.Job(3600, 7200), START_NS)
    assert answer.best is None
    when.complain(answer)
    said = capsys.readouterr()
    assert said.out == ""
    assert "could not be reached" in said.err
    assert "the answer is: now" in said.err
    for form, expected in (("slurm", "now\n"), ("iso", "2022-06-01T00:00:00+00:00\n")):
        when.write(answer, form, Console())
        assert capsys.readouterr().out == expected
    told = when.as_json(answer)
    assert (told["start"], told["saving"], told["worth_it"]) == ("2022-06-01T00:00:00+00:00", None, False)


def test_other_regions_that_are_down_are_left_out(trace):
    """The first region's plan stands, and the problem is told."""
    answer = when.ask({"XX": Trace(trace), **down()}, when.Job(3600, 7200), START_NS)
    assert [one.region for one in answer.plans] == ["XX"]
    assert answer.problems[0].startswith("DE: ")
    assert when.ask({**down(), "XX": Trace(trace)}, when.Job(3600, 7200), START_NS).best is None


def test_strict_tells_by_its_exit_code(capsys, tmp_path):
    """A trace that ends before the job would tells nothing: 0 and "now", with the reason once; with --strict, 3."""
    path = written(tmp_path / "short.csv", DAY)
    args = ("when", "--trace", str(path), "--hours", "4", "--within", "6h", "--start", "2022-06-01T22:00Z", "--format", "slurm")
    code, out, err = run(capsys, *args)
    assert (code, out) == (0, "now\n")
    assert "before a job of 4 h that starts now would" in err
    assert run(capsys, *args, "--strict")[:2] == (3, "now\n")


def test_a_trace_with_a_gap_names_no_argument_of_python(capsys, tmp_path):
    """The answer is now, and the reason says nothing that this command lacks."""
    path = written(tmp_path / "gap.csv", [300, *[""] * 8, *(100,) * 15])
    code, out, err = run(capsys, "when", "--trace", str(path), *HOURS, "--format", "slurm")
    assert (code, out) == (0, "now\n")
    assert "has no figures for 8.0 h" in err
    assert not re.search(r"\w=", err)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--hours": "25"}, "can't be done within 24 h"),
        ({"--hours": "nan"}, "--hours nan"),
        ({"--hours": "0"}, "--hours 0"),
        ({"--within": "0h"}, "--within 0"),
        ({"--power": "-1"}, "--power -1"),
        ({"--start": None}, "Z: give --start 2022-06-01, say"),
        ({"--trace": "pyproject.toml"}, "a trace has a column time"),
        ({"--timezone": "Mars"}, "--timezone 'Mars'"),
        ({"--trace": None, "--start": None, "--region": "XX", "--provider": "neso"}, "--region 'XX': a number"),
        ({"--within": "24"}, "with its unit"),
        ({"--within": "-1h"}, "with its unit"),
        ({"--start": "yesterday"}, "ISO 8601"),
        ({"--min-saving": "200%"}, "--min-saving"),
        ({"--format": "xml"}, "--format"),
        ({"--regions": "XX,YY"}, "once for each region"),
        ({"--trace": "/nowhere.csv"}, "can't be read"),
        ({"--trace": None}, "give --trace"),
        ({"--trace": None, "--start": None}, "where?"),
        ({"--trace": None, "--start": None, "--region": "aws:"}, "--region 'aws:'"),
        ({"--trace": None, "--start": None, "--region": "DE", "--provider": "tea"}, "--provider 'tea'"),
    ],
)
def test_wrong_options_exit_with_2(capsys, monkeypatch, trace, change, says):
    """Nothing on stdout, and a line on stderr that says what is wrong."""
    for name in ("ELECTRICITYMAPS_API_KEY", "ELECTRICITY_MAPS_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    options = {"--trace": str(trace), "--hours": "4", "--within": "24h", "--start": START.isoformat(), **change}
    code, out, err = run(capsys, "when", *(word for name, value in options.items() if value for word in (name, value)))
    assert (code, out) == (2, "")
    assert says in err
    assert not re.search(r"\b[a-z_]+=", err)  # an argument of Python's


@pytest.mark.parametrize(
    ("text", "seconds"), [("90m", 5400), ("24h", 86400), ("1d12h", 129600), ("0.5h", 1800), ("7d", 604800)]
)
def test_durations_carry_their_unit(text, seconds):
    """As people write them."""
    assert when.parse_duration(text, "--within") == seconds


# ── wait ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def waiting(tmp_path: Path, *command: str) -> subprocess.Popen[str]:
    """``green-torch wait`` on a grid that is clean from about two seconds after the present."""
    path = tmp_path / "now.csv"
    path.write_text("time,g_per_kwh\n2022-06-01T00:00:00Z,300\n2022-06-01T00:00:02Z,100\n2022-06-01T00:00:04Z,100\n")
    args = ["wait", "--trace", str(path), "--start", "2022-06-01T00:00Z", "--hours", "0.0005", "--within", "4s", "--", *command]
    return subprocess.Popen([*GREEN_TORCH, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def test_wait_becomes_the_command(tmp_path):
    """Two seconds on, the command runs in the same process, with its own arguments, output and exit code."""
    begin_s = time.monotonic()
    script = "import os, sys; print(os.getpid(), sys.argv[1:]); sys.exit(7)"
    ran = waiting(tmp_path, sys.executable, "-c", script, "--hours", "x y")
    out, err = ran.communicate(timeout=60)
    assert (ran.returncode, out) == (7, f"{ran.pid} ['--hours', 'x y']\n")
    assert time.monotonic() - begin_s > 2.0
    assert "saved against starting now" in err
    assert re.search(r"green-torch: waiting [12](\.\d+)? s, until .*; Ctrl-C stops\n", err)


def test_signals_reach_the_command(tmp_path):
    """SIGTERM to the process that waited is the command's."""
    script = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(9)); print('there', flush=True); time.sleep(60)"
    ran = waiting(tmp_path, sys.executable, "-c", script)
    assert ran.stdout.readline() == "there\n"
    ran.send_signal(signal.SIGTERM)
    ran.communicate(timeout=60)
    assert ran.returncode == 9


def test_ctrl_c_ends_the_wait(tmp_path):
    """And the command is not run."""
    path = written(tmp_path / "long.csv", DAY)
    args = ["wait", "--trace", str(path), *HOURS, "--", sys.executable, "-c", "print('ran')"]
    ran = subprocess.Popen([*GREEN_TORCH, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert "starting at" in ran.stderr.readline()
    ran.send_signal(signal.SIGINT)
    out, _ = ran.communicate(timeout=60)
    assert ran.returncode in {1, 130, -signal.SIGINT}
    assert out == ""


def test_wait_knows_its_command_before_it_waits(tmp_path, trace):
    """A command that does not exist, or none, is refused at once."""
    with pytest.raises(ArgumentError, match="no such command: 'traim'"):
        when.wait({"XX": Trace(trace)}, when.Job(4 * 3600, 24 * 3600), ["traim"], START_NS)
    with pytest.raises(ArgumentError, match="wait for what"):
        when.wait({"XX": Trace(trace)}, when.Job(4 * 3600, 24 * 3600), [], START_NS)


def ran_with(environment: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    """``green-torch ...`` as a process."""
    return subprocess.run([*GREEN_TORCH, *args], capture_output=True, text=True, env=environment, timeout=60, check=False)


@pytest.mark.parametrize(("hours", "within"), [("1", "1h"), ("2", "90m")])
def test_no_time_left_to_wait_starts_the_command(trace, hours, within):
    """A job as long as its deadline, or longer, is run now, with one line that says why: never refused for the moments that passed."""
    args = ["wait", "--trace", str(trace), "--hours", hours, "--within", within, "--start", START.isoformat()]
    ran = ran_with(ENVIRONMENT, *args, "--", sys.executable, "-c", "print('ran')")
    assert (ran.returncode, ran.stdout) == (0, "ran\n")
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"green-torch: starting now: {hours} h of work within ")


@pytest.mark.parametrize(("provider", "mends"), [("auto", "ELECTRICITYMAPS_API_KEY"), ("watttime", "WATTTIME_USER")])
@pytest.mark.parametrize("key", [None, " "])
def test_without_a_key_the_command_is_run(tmp_path, provider, mends, key):
    """As where the grid can't be reached: the line that mends it on stderr, and the command starts; ``when`` says "now" to sbatch."""
    names = ("ELECTRICITYMAPS_API_KEY", "ELECTRICITY_MAPS_API_KEY", "WATTTIME_USER", "WATTTIME_USERNAME", "WATTTIME_PASSWORD")
    bare = {name: value for name, value in ENVIRONMENT.items() if name not in names}
    environment = bare if key is None else bare | dict.fromkeys(names, key)
    options = ["--region", "DE", "--provider", provider, "--hours", "1", "--within", "9h"]
    for args, out in (
        (["wait", *options, "--", sys.executable, "-c", "print('ran')"], "ran\n"),
        (["when", *options, "--format", "slurm"], "now\n"),
    ):
        ran = ran_with(environment, *args)
        assert (ran.returncode, ran.stdout) == (0, out)
        assert mends in ran.stderr or "is empty" in ran.stderr
        assert "nothing is known ahead, so the answer is: now" in ran.stderr
        assert "token=" not in ran.stderr


class Waited(Exception):  # noqa: N818  (what stands for the command)
    """The command would run now, so long after the start."""


def waited_h(monkeypatch, provider, job: when.Job) -> float:
    """After how many hours ``wait`` becomes its command, on clocks that only its own sleep moves on."""
    passed = [0.0]
    monkeypatch.setattr(time, "time_ns", lambda: START_NS + int(passed[0] * NS_PER_S))
    monkeypatch.setattr(time, "monotonic_ns", lambda: int(passed[0] * NS_PER_S))
    monkeypatch.setenv("GREEN_TORCH_DEFERRAL", "")

    def become(program, command, environment):
        monkeypatch.setenv("GREEN_TORCH_DEFERRAL", environment["GREEN_TORCH_DEFERRAL"])
        raise Waited

    def sleep(duration_s):
        passed[0] += duration_s

    monkeypatch.setattr(os, "execve", become)
    with pytest.raises(Waited):
        when.wait({"XX": provider}, job, [sys.executable], START_NS, sleep=sleep)
    return passed[0] / 3600


def test_the_run_knows_what_it_waited_for(monkeypatch, capsys, tmp_path, trace):
    """The plan of wait reaches the manifest of the run that it starts, and is held against what the grid then did."""
    figures = [*(300,) * 6, 150, 150, *(100,) * 16]  # but the forecast says 100 from 6 h on
    real = Trace(written(tmp_path / "real" / "XX-2022.csv", figures))
    assert waited_h(monkeypatch, Trace(trace), when.Job(4 * 3600, 24 * 3600)) == pytest.approx(6, abs=0.01)
    assert re.search(r"waiting 6 h, until .*; Ctrl-C stops\n", capsys.readouterr().err)
    clock = ScriptedClock(epoch_unix_ns=START_NS + 6 * 3600 * NS_PER_S)
    with track(clock=clock, meters=[], intensity=real) as tracker:
        for _ in range(4):
            clock.advance(3600)
            tracker.step()
    (told,) = tracker.summary().manifest.deferrals
    assert (told.policy, told.baseline, told.method) == ("green-torch wait", "starting now", "forecast")
    assert (told.deadline_unix_ns - told.baseline_unix_ns) / NS_PER_S / 3600 == pytest.approx(24, abs=0.01)
    assert told.planned_saving == pytest.approx(2 / 3)
    assert told.unknown == ""
    assert (told.realised_g_per_kwh, told.realised_baseline_g_per_kwh) == (pytest.approx(125, rel=0.01), pytest.approx(300))
    monkeypatch.setenv("GREEN_TORCH_DEFERRAL", "{nonsense")
    with track(clock=ScriptedClock(), meters=[], intensity=100) as other:
        pass
    assert other.manifest.deferrals == ()


class Present:
    """A provider that tells the present alone: so many g/kWh at each hour from the start on."""

    def __init__(self, figures) -> None:
        self.figures = figures

    def at(self, time_unix_ns: int) -> IntensityPoint:
        at = (time_unix_ns - START_NS) // (3600 * NS_PER_S)
        if self.figures[at] is None:
            raise IntensityError("nobody answers")
        return IntensityPoint(self.figures[at], "XX", "a script", time_unix_ns=time_unix_ns)


@pytest.mark.parametrize(
    ("figures", "min_saving", "hours"),
    [
        ([200] * 2 + [300] * 5 + [100] * 17, 0.0, 7),  # watched for five hours, then the first that is cleaner
        (
            [300] * 10 + [301] * 14,
            0.0,
            4,
        ),  # never cleaner: what is as clean as ever will do, once that was watched for long enough
        (list(range(300, 324)), 0.0, 20),  # dirtier each hour: the deadline wins
        ([300] * 7 + [100] * 17, 0.05, 0),  # nobody knows whether that will be saved
        ([300] * 2 + [None] * 22, 0.0, 2),  # a grid that can't be asked holds nobody up
    ],
)
def test_where_the_present_alone_is_known_a_threshold_decides(monkeypatch, capsys, figures, min_saving, hours):
    """An online threshold with the deadline's guard, named as such."""
    waited = waited_h(monkeypatch, Present(figures), when.Job(4 * 3600, 24 * 3600, min_saving=min_saving))
    assert waited == pytest.approx(hours, abs=0.26)
    assert ("(online threshold)" in capsys.readouterr().err) == bool(hours)
    told = os.environ["GREEN_TORCH_DEFERRAL"]
    assert bool(told) == bool(hours)
    if told:
        assert json.loads(told) | {"method": "online threshold", "planned_g_per_kwh": None, "source": "a script"} == json.loads(
            told
        )


def test_a_clock_that_is_set_forward_ends_the_wait(monkeypatch, trace):
    """The window's time has come by the system's clock, though little has passed by the other one; a clock set back changes nothing."""
    ran: list[object] = []
    slept: list[float] = []
    wall, steady = [1000.0], [50.0]
    monkeypatch.setattr(time, "time_ns", lambda: int(wall[0] * NS_PER_S))
    monkeypatch.setattr(time, "monotonic_ns", lambda: int(steady[0] * NS_PER_S))

    def become(program, command, _environment):
        ran.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", become)

    def sleep(duration_s):
        slept.append(duration_s)
        steady[0] += duration_s
        wall[0] += 7 * 3600 if len(slept) == 3 else -100.0

    with pytest.raises(SystemExit):
        when.wait({"XX": Trace(trace)}, when.Job(4 * 3600, 24 * 3600), [sys.executable], START_NS, sleep=sleep)
    assert ran == [[sys.executable]]
    assert len(slept) < 10
