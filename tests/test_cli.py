"""The command line: what doctor finds, what the demo shows, and how either says that something is wrong."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console

from green_torch import testing, track
from green_torch.cli import console, doctor, main
from green_torch.records import Method
from tests.processes import ENVIRONMENT, GREEN_TORCH, interrupted
from tests.simnvml import Gpu, constant, simulated

if TYPE_CHECKING:
    from pathlib import Path


# ── doctor ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    """This machine, examined once."""
    return doctor.examine("FR")


def test_doctor_says_how_each_joule_is_known(report: doctor.Report) -> None:
    """Every domain that ``track()`` would meter is there, with its method and a power that it really gave."""
    assert report.meters, report.missing
    assert {one.domain.method for one in report.meters} <= set(Method)
    assert all(one.power_w is not None and one.power_w >= 0 for one in report.meters)


def test_doctor_names_the_grid_and_its_source(report: doctor.Report) -> None:
    """The region's figure comes with its basis and with codecarbon's version."""
    assert report.grid.region == "FR"
    assert 0 < report.grid.g_per_kwh < 200
    assert "codecarbon 3." in report.grid.source


def test_doctor_gives_the_peaks_of_this_cpu(report: doctor.Report) -> None:
    """Each peak carries its basis and its source."""
    peaks = {peak.dtype: peak for peak in report.peaks if peak.basis == "measured"}
    assert peaks["float32"].flop_per_s > 1e8
    assert "GEMM" in peaks["float32"].source
    assert report.devices[0].name == peaks["float32"].device


def test_doctor_tells_which_integrations_are_new_enough(report: doctor.Report) -> None:
    """Versions are held against what our own metadata asks for; what is absent comes with the line to type."""
    found = {one.name: one for one in report.integrations}
    assert found["tensorboard"].ok
    assert found["tensorboard"].needed == "2.21"
    assert {name: found[name].version for name in ("transformers", "accelerate")} == {
        name: doctor._version(name) for name in ("transformers", "accelerate")
    }
    assert all(one.ok or one.mend for one in report.integrations)


def test_doctor_says_that_there_was_no_gpu_to_calibrate() -> None:
    """--calibrate on a machine without a GPU is answered, not passed over."""
    with simulated():
        found = doctor.examine("FR", calibrate=True)
    assert found.calibrations == ()
    assert any(text.startswith("calibration: no GPU was calibrated") for text in found.missing)


@pytest.mark.parametrize(
    ("version", "needed", "enough"), [("2.21.0", "2.21", True), ("2.9.1+cpu", "2.21", False), ("13.615.71", "12.560", True)]
)
def test_versions_compare_as_numbers(version: str, needed: str, enough: bool) -> None:
    """2.9 is older than 2.21."""
    assert (doctor._numbers(version) >= doctor._numbers(needed)) is enough


@pytest.mark.parametrize("width", [60, 100])
def test_doctor_prints_all_that_it_found(report: doctor.Report, width: int) -> None:
    """Every domain, peak and missing thing is on the page, at any width."""
    missing = ("cpu, dram: only root may read RAPL: type sudo chmod a+r [a-z]",)
    text = printed(width, lambda out: doctor.show(replace(report, missing=missing), out))
    assert missing[0] in text
    for one in report.meters:
        assert one.domain.name in text
        assert one.domain.method in text
    assert "475 gCO2e" not in text  # the world's
    assert "FR" in text


def test_doctor_prints_that_nothing_is_there(report: doctor.Report) -> None:
    """Without meters and peaks the page says what that means."""
    text = printed(100, lambda out: doctor.show(replace(report, meters=(), peaks=(), missing=()), out))
    assert "no joule known" in text
    assert "peak_flop_per_s=" in text
    assert "Nothing is missing" in text


def test_doctor_sees_a_gpu_that_torch_cannot_use() -> None:
    """A counter is found with its limit, its power and its peaks, and where torch is not built for it that is told."""
    with simulated(Gpu(constant(300.0)), virtual=False):
        found = doctor.examine()
    (gpu,) = (one for one in found.meters if one.domain.name == "gpu0")
    assert (gpu.domain.method, gpu.domain.power_limit_w) == (Method.COUNTER, 400.0)
    assert gpu.power_w == pytest.approx(300.0, rel=0.4)  # at least 0.3 s on a counter of 0.1 s
    assert {peak.dtype for peak in found.peaks if "A100" in peak.device} == {"float32", "tf32", "bfloat16", "float16"}
    if not torch.cuda.is_available():
        assert any("can't use NVIDIA A100-SXM4-80GB" in text for text in found.missing)


def test_doctor_tells_of_a_counter_that_stands_still() -> None:
    """A counter that doesn't rise while the doctor looks is not to be trusted."""
    with simulated(Gpu(constant(300.0)), virtual=True):
        found = doctor.examine()
    assert any("gpu0: its counter did not rise" in text for text in found.missing)


def test_doctor_works_without_torch(tmp_path: Path) -> None:
    """Where torch can't be imported the report says so, and the rest of it stands."""
    script = "import sys; sys.modules['torch'] = None; from green_torch.cli import main; main(['doctor', '--json'])"
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, check=True
    )
    found = json.loads(ran.stdout)
    assert found["torch"] is None
    assert any("pip install torch" in text for text in found["missing"])
    assert found["meters"]
    assert found["devices"][0]["torch_name"] is None


def test_doctor_json_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    """``--json`` prints one object with the fields of the report, the world average named as such."""
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == list(doctor.Report.__dataclass_fields__)
    assert found["grid"]["region"] == "world average, no region set"


# ── wrong arguments ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_doctor_tries_a_grid_key_and_never_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a key in the environment the zone is asked for; here through a proxy that is not there, which is told."""
    monkeypatch.setenv("ELECTRICITYMAPS_API_KEY", "s3cr3t-k3y")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    missing: list[str] = []
    assert doctor._live_grid("FR", missing) is None
    assert doctor._live_grid(None, missing) is None
    assert "HTTPS_PROXY" in missing[0]
    assert "--region" in missing[1]
    assert "s3cr3t" not in "".join(missing)


@pytest.mark.parametrize("command", ["demo", "doctor"])
def test_a_wrong_region_names_the_nearest(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line on stderr, before anything is trained."""
    where = ["--log-dir", str(tmp_path / "demo")] if command == "demo" else []
    with pytest.raises(SystemExit) as ended:
        main([command, "--region", "Frnace", *where])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert '"FR" (France)' in err
    assert "Traceback" not in err
    assert out == ""


def test_an_unwritable_log_dir_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and the reason, before anything is trained."""
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--log-dir", str(tmp_path / "file" / "demo")])
    assert ended.value.code == 2
    assert "can't be written" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["demo", "--steps", "0"], ["demo", "--steps", "many"], ["demmo"]])
def test_other_wrong_arguments_end_with_2(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As is the custom."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


# ── words and tables ───────────────────────────────────────────────────────────────────────────────────────────────────


def printed(width: int, show: object) -> str:
    """What ``show(console)`` prints on a terminal of this width."""
    out = Console(file=io.StringIO(), width=width, highlight=False)
    show(out)
    return out.file.getvalue()


@pytest.mark.parametrize(
    ("value", "lo", "hi", "text"),
    [
        (33.5, 0.0, 87.1, "33.5 kWh (0 to 87.1)"),
        (0.5, 0.4, 1.2, "500 Wh (400 to 1,200)"),
        (1000.0, 990.0, 1010.0, "1.00 MWh (0.990 to 1.01)"),
        (12.0, None, None, "12.0 kWh"),
        (9.996, 9.9, 10.0, "10.0 kWh (9.90 to 10.0)"),
        (0.0, -1.0, 1.0, "0 kWh (-1.00 to 1.00)"),
        (None, None, None, "not known"),
    ],
)
def test_bounds_share_the_unit_of_the_value(value: float | None, lo: float | None, hi: float | None, text: str) -> None:
    """Low and high are in the unit that the value is printed in."""
    assert console.bounded(value, lo, hi, console.kilowatt_hours) == text


def test_a_summary_prints_its_phases_and_what_it_rests_on() -> None:
    """The page of one run: means per step with bounds, the phases, and the run's totals."""
    clock = testing.ScriptedClock()
    meters = [testing.ScriptedMeter(clock, {"gpu0": 300.0})]

    def run(out: Console) -> None:
        sinks = [console.ConsoleSink(out)]
        with track(clock=clock, meters=meters, intensity=100, run_name="a run", sinks=sinks) as tracker:
            for _ in range(4):
                clock.advance(2.0)
                tracker.step(tokens=100)
            with tracker.phase("eval"):
                clock.advance(1.0)

    text = printed(100, run)
    assert "a run: completed, 4 typical steps, resolved through step 3" in text
    assert "600 J (" in text
    assert "gpu0: counted by the hardware" in text
    assert "100 gCO2e/kWh: no region set" in text
    assert "eval" in text


# ── the demo itself ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A demo of two steps in a directory that holds an earlier one: where it went, and its JSON."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "demo" / "fp32").mkdir(parents=True)
    command = [*GREEN_TORCH, "demo", "--steps", "2", "--json", "--region", "FR", "--log-dir", str(folder / "demo")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=ENVIRONMENT, check=False)
    assert ran.returncode == 0, ran.stderr
    return folder / "demo-2", json.loads(ran.stdout)


def test_demo_json_is_alone_on_stdout(demo: tuple[Path, dict]) -> None:
    """One object with the comparison, the projections and where the runs are; a second demo has a directory of its own."""
    log_dir, found = demo
    assert found["schema"] == "green_torch.demo/1"
    assert found["log_dir"] == str(log_dir)
    assert found["tensorboard"].endswith(str(log_dir))
    assert found["projections"].keys() == {"fp32", "bf16"}
    assert found["findings"]


def test_demo_measures_every_quantity(demo: tuple[Path, dict]) -> None:
    """Energy, time, MFU, emissions and loss of each variant, same tokens in both."""
    _, found = demo
    results = found["comparison"]["results"]
    for one in results:
        assert one["error"] is None
        assert one["n_steps"] == 2
        for name in ("energy_per_token_j", "step_time_s", "power_w", "mfu", "emissions_per_step_g", "final_loss"):
            assert one[name] > 0, name
        assert one["intensity"]["region"] == "FR"
    first, second = ([block["tokens"] for block in one["blocks"]] for one in results)
    assert first == second


def test_demo_leaves_runs_that_tensorboard_shows(demo: tuple[Path, dict]) -> None:
    """The event file of each variant holds the tags, and its JSONL ends with a summary."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_dir, _ = demo
    for variant in ("fp32", "bf16"):
        events = EventAccumulator(str(log_dir / variant))
        events.Reload()
        assert {"green/energy_per_token_J", "green/mfu", "green/step_time_s"} <= set(events.Tags()["scalars"])
        (file,) = (log_dir / variant / "green").glob("*.jsonl")
        assert json.loads(file.read_text(encoding="utf-8").splitlines()[-1])["type"] == "summary"


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    """Interrupted in the middle, the demo ends with 130, prints what it has and closes its files."""
    command = [*GREEN_TORCH, "demo", "--steps", "100000", "--json", "--log-dir", str(tmp_path / "demo")]
    files = "demo/bf16/green/*.jsonl"
    code, out, err = interrupted(
        command, tmp_path, lambda: any(file.stat().st_size for file in tmp_path.glob(files)), timeout_s=60
    )
    assert code == 130, err
    assert "Traceback" not in err
    assert json.loads(out)["comparison"]["interrupted"] is True
    for variant in ("fp32", "bf16"):
        (file,) = (tmp_path / "demo" / variant / "green").glob("*.jsonl")
        assert json.loads(file.read_text(encoding="utf-8").splitlines()[-1])["type"] == "summary"
