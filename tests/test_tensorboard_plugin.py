"""The Green tab's server side answers from what TensorBoard has read, with either loader, and never stands in TensorBoard's way."""

from __future__ import annotations

import gzip
import http.client
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from importlib import metadata
from typing import TYPE_CHECKING

import pytest

from green_torch.records import Phase
from green_torch.tensorboard_plugin.plugin import STATIC
from tests import make_regions
from tests.green_runs import ask, tensorboard, wait_for_runs, write_damage, write_run, write_snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours, one of somebody else's with a NaN in it, a damaged event file, and snapshots that are none."""
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "bf16", n_steps=20)
    foreign = SummaryWriter(str(folder / "foreign"))
    for step, value in enumerate([1.0, math.nan, math.inf, 0.5]):
        foreign.add_scalar("loss", value, step)
    foreign.close()
    for name, content in (
        ("damaged", b'{"schema": 1, "manif'),
        ("a list", b"[1, 2]"),
        ("latin", b'{"a": "\xff"}'),
        ("nan", b'{"schema": 1, "x": NaN}'),
    ):
        write_snapshot(folder / name, content)
    write_damage(folder / "broken")
    return folder


@pytest.fixture(scope="module", params=["true", "false"])
def address(request: pytest.FixtureRequest, log_dir: Path) -> Iterator[str]:
    """TensorBoard over these, with either loader."""
    with tensorboard(log_dir, f"--load_fast={request.param}") as address:
        wait_for_runs(address, 5)
        yield address


def test_a_run_comes_with_its_last_snapshot(address: str) -> None:
    """The newest snapshot as the sink wrote it, with its digest; runs of others are counted and not listed."""
    found = ask(address, "runs")
    (run,) = (run for run in found["runs"] if run["run"] == "bf16")
    assert run["snapshot"]["status"] == "completed"
    assert run["snapshot"]["manifest"]["run_name"] == "bf16"
    assert len(run["snapshot"]["blocks"]) == 20
    assert {run["run"] for run in found["runs"]} == {"bf16", "damaged", "a list", "latin", "nan"}
    assert found["n_runs"] in (6, 7)  # the slow loader counts the broken file as a run


def test_what_the_page_has_is_not_sent_again(address: str) -> None:
    """A run whose digest the page names comes as the digest alone."""
    (run,) = (run for run in ask(address, "runs")["runs"] if run["run"] == "bf16")
    (again,) = (one for one in ask(address, "runs", have=f"x,{run['digest']}")["runs"] if one["run"] == "bf16")
    assert again == {key: run[key] for key in ("run", "digest", "wall_s")}


def test_a_snapshot_that_is_none_is_told(address: str) -> None:
    """Half a JSON, a list and text in another encoding are named as problems; NaN inside a good one reads null."""
    runs = {run["run"]: run for run in ask(address, "runs")["runs"]}
    assert "no JSON" in runs["damaged"]["problem"]
    assert "no JSON" in runs["latin"]["problem"]
    assert "not one of green_torch" in runs["a list"]["problem"]
    assert runs["nan"]["snapshot"] == {"schema": 1, "x": None}


def test_curves_come_by_run_and_tag(address: str) -> None:
    """Steps, seconds and values of the runs and tags asked for; those that are not there are left out; NaN reads null."""
    both = ask(address, "scalars", run=["bf16", "foreign", "nobody"], tag=["green/power_W", "train/loss", "loss", "nothing"])
    assert set(both) == {"bf16", "foreign"}
    found = both["bf16"]
    assert set(found) == {"green/power_W", "train/loss"}
    assert found["green/power_W"]["step"] == list(range(20))
    assert all(value == pytest.approx(400, rel=0.3) for value in found["green/power_W"]["value"])
    assert found["green/power_W"]["wall_s"] == sorted(found["green/power_W"]["wall_s"])
    assert both["foreign"]["loss"]["value"] == [1.0, None, None, 0.5]
    assert ask(address, "scalars", run="nobody", tag="loss") == {}


def test_no_more_points_come_than_were_asked_for(address: str) -> None:
    """``points`` thins a series and keeps its last one; ``last`` leaves its last share, at least one point."""
    (whole,) = ask(address, "scalars", run="bf16", tag="train/loss")["bf16"].values()

    def end(**more: str) -> dict[str, list[float]]:
        (series,) = ask(address, "scalars", run="bf16", tag="train/loss", **more)["bf16"].values()
        assert series["step"][-1] == 19
        assert series["value"] == [whole["value"][step] for step in series["step"]]
        return dict(series)

    assert len(end(points="7")["step"]) == 7
    assert end(last="0.25")["step"] == [15, 16, 17, 18, 19]
    assert end(last="0.01")["step"] == [19]
    assert len(end(points="10", last="0.21")["step"]) == 3


def test_the_tags_of_each_run(address: str) -> None:
    """Each run's tags; of all runs where none is named."""
    tags = ask(address, "tags", run="bf16")
    assert list(tags) == ["bf16"]
    assert {"train/loss", "green/mfu"} <= set(tags["bf16"])
    assert {"bf16", "foreign"} <= set(ask(address, "tags"))


@pytest.mark.parametrize(
    "asked",
    [
        {"run": ["bf16"]},
        {"run": ["bf16"], "tag": ["x"] * 65},
        {"tag": ["loss"]},
        {"run": ["x"] * 257, "tag": ["loss"]},
        {"run": ["bf16"], "tag": ["loss"], "points": "0"},
        {"run": ["bf16"], "tag": ["loss"], "points": "1e9"},
        {"run": ["bf16"], "tag": ["loss"], "last": "nan"},
        {"run": ["bf16"], "tag": ["loss"], "last": "half"},
    ],
    ids=lambda asked: " ".join(f"{key}:{value if isinstance(value, str) else len(value)}" for key, value in asked.items()),
)
def test_a_request_for_nothing_or_for_too_much_is_refused(address: str, asked: dict[str, str | list[str]]) -> None:
    """It answers 400, and TensorBoard goes on."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(address, "scalars", **asked)
    assert caught.value.code == 400
    assert ask(address, "runs")["runs"]


def test_the_files_of_the_page_are_served_and_no_others(address: str) -> None:
    """Each static file with its type; whatever leads out of the folder, however it is spelt, answers 404."""
    where = urllib.parse.urlsplit(address)
    connection = http.client.HTTPConnection(where.hostname or "", where.port)

    def get(path: str, **headers: str) -> tuple[int, str, bytes]:
        connection.request("GET", f"/data/plugin/green/{path}", headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers.get("Content-Type", ""), answer.read()

    types = {".js": "application/javascript", ".css": "text/css", ".json": "application/json"}
    for path in STATIC.iterdir():
        status, kind, content = get(path.name)
        assert (status, kind.partition(";")[0], content) == (200, types[path.suffix], path.read_bytes())
    for path in (
        "../plugin.py",
        "..%2fplugin.py",
        "%2e%2e/plugin.py",
        "static/../../plugin.py",
        "plugin.py",
        "/etc/passwd",
        "....//plugin.py",
        "index.js/../../plugin.py",
    ):
        status, _, content = get(path)
        assert status == 404, path
        assert b"import" not in content
    status, _, content = get("runs", **{"Accept-Encoding": "gzip"})
    assert json.loads(gzip.decompress(content))["runs"]


def test_an_empty_directory_is_no_error(tmp_path: Path) -> None:
    """Without a run there are none, and TensorBoard doesn't offer the tab by itself."""
    with tensorboard(tmp_path) as address:
        assert ask(address, "runs") == {"n_runs": 0, "runs": []}
        assert ask(address, "tags", run="x") == {}
        listing = json.loads(urllib.request.urlopen(f"{address}/data/plugins_listing").read())
        assert listing["green"]["enabled"] is False


def test_the_phases_sum_up_in_the_snapshot(address: str) -> None:
    """What the tab's table of phases shows is the run's total."""
    (run,) = (run for run in ask(address, "runs")["runs"] if run["run"] == "bf16")
    phases = {phase["phase"]: phase["energy_j"] for phase in run["snapshot"]["phases"]}
    assert {Phase.TRAIN, Phase.EVAL} <= set(phases)
    assert math.fsum(phases.values()) == pytest.approx(run["snapshot"]["totals"]["energy_j"])


# ── TensorBoard comes first ────────────────────────────────────────────────────────────────────────────────────────────


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_entry_point_is_installed() -> None:
    """TensorBoard finds one plugin of the name green."""
    (found,) = (one for one in metadata.entry_points(group="tensorboard_plugins") if one.name == "green")
    assert found.value == "green_torch.tensorboard_plugin:GreenLoader"


def test_starting_costs_tensorboard_little() -> None:
    """Loading the tab takes under 50 ms of TensorBoard's start (the best of three), and brings in neither torch nor our own modules."""
    code = """
import sys, time
import tensorboard.main, tensorboard.plugins.base_plugin, tensorboard.data.provider
import tensorboard.plugins.scalar.scalars_plugin
before = set(sys.modules)
began = time.perf_counter()
from green_torch.tensorboard_plugin import GreenLoader
class Context: data_provider = None
plugin = GreenLoader().load(Context())
apps = plugin.get_plugin_apps()
print(time.perf_counter() - began, len(apps), *sorted(name for name in set(sys.modules) - before if not name.startswith("tensorboard")))
"""
    seconds = []
    for _ in range(3):
        took, apps, *modules = run_python(code).split()
        seconds.append(float(took))
        assert int(apps) > 10
        assert {name.partition(".")[0] for name in modules} & {"torch", "codecarbon", "numpy", "lightning", "pandas"} == set()
        assert [name for name in modules if name.startswith("green_torch.")] == [
            "green_torch.tensorboard_plugin",
            "green_torch.tensorboard_plugin.plugin",
        ]
    assert min(seconds) < 0.05


@pytest.mark.parametrize("missing", ["werkzeug", "tensorboard.data", "tensorboard.backend.http_util"])
def test_a_tab_that_cannot_be_made_is_left_out(missing: str) -> None:
    """Where something it needs can't be imported there is no tab, one line in the log, and no exception."""
    code = f"""
import sys, logging
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from green_torch.tensorboard_plugin import GreenLoader
for name in [name for name in sys.modules if name.startswith({missing!r})]: del sys.modules[name]
sys.modules[{missing!r}] = None
print(GreenLoader().load(object()))
"""
    told, plugin = run_python(code).strip().splitlines()
    assert "the Green tab is left out: " in told
    assert plugin == "None"


def test_importing_it_without_tensorboard_raises_nothing() -> None:
    """The entry point's module can be imported where TensorBoard can't."""
    assert (
        run_python("import sys; sys.modules['tensorboard'] = None; import green_torch.tensorboard_plugin; print('fine')")
        == "fine\n"
    )


def test_the_command_starts_it_and_opens_the_tab(log_dir: Path, tmp_path: Path) -> None:
    """``green-torch tensorboard DIR`` serves the runs, hands the tab's address to the browser, and ends with Ctrl-C."""
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}.part && mv {opened}.part {opened}\n')
    browser.chmod(0o755)
    command = [sys.executable, "-m", "green_torch.cli", "tensorboard", str(log_dir), "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(
        command, env={**os.environ, "BROWSER": str(browser)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        until = time.monotonic() + 60
        while not opened.exists():
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.1)
        address, _, fragment = opened.read_text().strip().partition("/#")
        assert fragment == "green"
        assert wait_for_runs(address, 5)
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert f"The Green tab: {address}/#green" in told


def test_the_command_refuses_a_file(tmp_path: Path) -> None:
    """A file is no directory of runs; the message says what to give."""
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "green_torch.cli", "tensorboard", str(tmp_path / "file"), "--no-open"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "give the directory that holds the runs" in ran.stderr


def test_the_regions_are_those_of_green_torch() -> None:
    """The table that travels with the page is what green_torch.intensity says; ``python -m tests.make_regions`` writes it anew."""
    assert make_regions.PATH.read_text(encoding="utf-8") == make_regions.text()


# ── the page's files ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_module_is_asked_for_at_once() -> None:
    """index.js names all other modules, so that none waits for another to ask for it."""
    (named,) = re.findall(r"const PARTS = (\[.*?\]);", (STATIC / "index.js").read_text())
    assert json.loads(named) == sorted(path.stem for path in STATIC.glob("*.js") if path.stem != "index")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_runs_colours_are_told_apart_by_everybody(theme: str) -> None:
    """Any two of the eight differ by 35 in CIE Lab, by 20 without red or green cones, and each from the ground by 3 : 1.

    Colour blindness as in Machado, Oliveira and Fernandes 2009 (IEEE TVCG 15:1291), severity 1.0.
    """
    rule = re.findall(r"^:root(?:\.dark)? \{(.*?)^\}", (STATIC / "green.css").read_text(), re.DOTALL | re.MULTILINE)[
        theme == "dark"
    ]
    colours = {name: _linear(code) for name, code in re.findall(r"--(run-\d|panel): (#[0-9a-f]{6})", rule)}
    ground = colours.pop("panel")
    assert len(colours) == 8
    for name, colour in colours.items():
        lighter, darker = sorted((_luminance(colour), _luminance(ground)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 3, name
    for (one, a), (other, b) in itertools.combinations(colours.items(), 2):
        for vision, matrix in _VISIONS.items():
            assert math.dist(_lab(_times(matrix, a)), _lab(_times(matrix, b))) >= (35 if vision == "all cones" else 20), (
                one,
                other,
                vision,
            )


_VISIONS = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
}
_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))


def _linear(code: str) -> tuple[float, ...]:
    parts = (int(code[k : k + 2], 16) / 255 for k in (1, 3, 5))
    return tuple(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)


def _times(matrix: Iterable[Iterable[float]], colour: Iterable[float]) -> tuple[float, ...]:
    return tuple(min(1.0, max(0.0, sum(a * b for a, b in zip(row, colour, strict=True)))) for row in matrix)


def _luminance(colour: tuple[float, ...]) -> float:
    return _times(_XYZ, colour)[1]


def _lab(colour: tuple[float, ...]) -> tuple[float, ...]:
    white = (0.9505, 1.0, 1.089)
    x, y, z = (
        value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116
        for value in (
            part / top
            for part, top in zip((sum(a * b for a, b in zip(row, colour, strict=True)) for row in _XYZ), white, strict=True)
        )
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)
