"""The command line: what doctor finds, what the demo shows, and how either says that something is wrong."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console

from green_torch import testing, track
from green_torch.cli import console, doctor, main
from green_torch.experiment import Block, Comparison, VariantResult, parse_variant
from green_torch.records import DevicePeak, Domain, IntensityPoint, Manifest, Method
from tests.simnvml import Gpu, constant, simulated

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
GREEN_TORCH = [sys.executable, "-m", "green_torch.cli"]


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
    assert all(one.ok or one.mend for one in report.integrations)


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
    assert "475" not in text
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


# ── what a comparison reads like ───────────────────────────────────────────────────────────────────────────────────────


def result(
    name: str,
    times_s: Sequence[float],
    *,
    method: Method = Method.ESTIMATED,
    watts: float = 100.0,
    loss: float = 2.5,
    **fields: object,
) -> VariantResult:
    """A variant with a block a time, at a constant power; counted joules are bounded to ±1 %."""
    domain = Domain(
        "gpu0" if method is Method.COUNTER else "cpu", method, "a device", "a source", power_limit_w=350.0, gain_error=0.05
    )
    manifest = Manifest(
        "id", name, 1, 0, 1, 0, (domain,), (), IntensityPoint(475.0, "world average, no region set", "a table"), 1.0, "none",
        peaks=(DevicePeak(1e12, "a device", f"mm/{name}", "datasheet", "a sheet"),), model="GPT", parameters=838_000,
    )  # fmt: skip
    blocks = tuple(
        Block(
            round=number, position=0, n_steps=10, duration_s=time_s, energy_j=(energy_j := watts * time_s),
            energy_lo_j=0.99 * energy_j if method is Method.COUNTER else None,
            energy_hi_j=1.01 * energy_j if method is Method.COUNTER else None,
            emissions_g=energy_j / 3.6e6 * 475, model_flops=1e11, hardware_flops=1e11, capacity_flops=1e12 * time_s,
            tokens=5120, samples=40, loss=loss,
        )
        for number, time_s in enumerate(times_s)
    )  # fmt: skip
    made = VariantResult(parse_variant(name), blocks, manifest=manifest)
    return replace(made, **fields)


SLOW, SAME, FAST = [1.4, 1.38, 1.41, 1.4], [0.99, 1.02, 1.0, 0.98], [0.5, 0.51, 0.49, 0.5]
BASE = [1.0, 1.01, 0.99, 1.0]


def compared(times_s: Sequence[float], **fields: object) -> Comparison:
    """BF16 with these block times against FP32."""
    method = fields.pop("method", Method.ESTIMATED)
    return Comparison((result("fp32", BASE, method=method), result("bf16", times_s, method=method, **fields)), 10, 0.95, 0.02)


def printed(width: int, show: object) -> str:
    """What ``show(console)`` prints on a terminal of this width."""
    out = Console(file=io.StringIO(), width=width, highlight=False)
    show(out)
    return out.file.getvalue()


def page(comparison: Comparison, width: int = 100) -> str:
    """The whole page of a comparison."""
    return printed(width, lambda out: [out.print(part) for part in console.comparison_parts(comparison, 10e9)])


def test_slower_reads_as_slower() -> None:
    """The headline is time where power was modelled, and the planned run costs more."""
    first, second, *_ = console.findings(compared(SLOW))
    assert first.startswith("bf16 is slower here: 39.7 % more time per token than fp32 (95 % interval +")
    assert "4 pairs of blocks" in first
    assert second == "Energy follows from time: power was modelled."
    text = page(compared(SLOW))
    assert "costs 216 h" in text
    assert "saves" not in text
    assert "world average, no region set" in text


def test_faster_reads_as_faster() -> None:
    """The same the other way round."""
    assert console.findings(compared(FAST))[0].startswith("bf16 is faster here: 50.0 % less time per token than fp32")
    text = page(compared(FAST))
    assert "saves 271 h" in text
    assert "costs" not in text


def test_much_slower_reads_as_a_ratio() -> None:
    """Beyond twice the time, a ratio with a ratio's interval."""
    first = console.findings(compared([6.9, 7.0, 6.8, 6.95]))[0]
    assert "6.91 × the time per token of fp32" in first
    assert " ×" in page(compared([6.9, 7.0, 6.8, 6.95]))
    assert "interval 6" in first


def test_an_interval_over_zero_cant_be_told_apart() -> None:
    """Significance comes before the difference: no percentage is claimed, and no saving."""
    first = console.findings(compared(SAME))[0]
    assert first.startswith(
        "bf16 and fp32 can't be told apart here in time per token: the interval spans zero (95 % interval −"
    )
    text = page(compared(SAME))
    assert text.count("can't be told apart") == 5  # headline, step time, and the three columns of the planned run
    assert "saves" not in text
    assert "costs" not in text


def test_one_block_gives_no_finding() -> None:
    """A single pair has no interval."""
    comparison = Comparison((result("fp32", [1.0]), result("bf16", [0.5])), 10, 0.95, 0.02)
    assert console.findings(comparison)[0].endswith("no interval, so no finding.")
    assert "no interval" in page(comparison)


def test_counted_energy_is_the_headline_with_its_bounds() -> None:
    """Where joules are counted, energy leads, bounds stand beside it, and the sensor's own error is told apart."""
    comparison = compared(FAST, method=Method.COUNTER, watts=120.0)
    first, second, *_ = console.findings(comparison)
    assert first.startswith("bf16 saves energy here: 40.0 % less energy per token than fp32")
    assert "the meter's bounds −41" in first
    assert second.startswith("bf16 is faster here")
    text = page(comparison)
    assert "(19.3 to 19.7)" in text  # mJ a token, from the bounds of the blocks
    assert "counter (gpu0)" in text
    assert "Sensor gain error, systematic, not in the bounds: gpu0 ±5 %." in text
    assert "follows from time" not in text


def test_counted_energy_without_a_difference_is_told_first() -> None:
    """Energy that can't be told apart is not covered up by a time that can."""
    comparison = compared(FAST, method=Method.COUNTER, watts=200.0)
    assert console.findings(comparison)[0].startswith("bf16 and fp32 can't be told apart here in energy per token")
    assert "saves" in page(comparison)  # hours


def test_peaks_that_differ_are_not_ranked() -> None:
    """MFUs over different peaks stand side by side without a difference, model FLOP/s beside them."""
    text = page(compared(FAST))
    assert "not ranked" in text
    assert "Model FLOP/s" in text
    assert "datasheet: a sheet" in text


def test_a_slower_type_is_explained_by_its_peak() -> None:
    """Where the peak of the variant's own type is below the baseline's, the page says so."""
    slower = compared(SLOW)
    base, other = slower.results
    other = replace(
        other, manifest=replace(other.manifest, peaks=(DevicePeak(6e9, "a device", "mm/bfloat16", "measured", "GEMMs"),))
    )
    lines = console.findings(replace(slower, results=(base, other)))
    assert any("6.00 GFLOP/s for bfloat16" in line for line in lines)
    assert not any("peaks of this device" in line for line in console.findings(slower))


def test_another_training_claims_no_saving() -> None:
    """A loss that departs beyond the tolerance takes the saving away."""
    comparison = compared(FAST, loss=3.0)
    assert any("not the same training" in line and "no saving" in line for line in console.findings(comparison))
    assert "saves" not in page(comparison)
    assert "not comparable" in page(comparison)


def test_a_failed_variant_leaves_the_others_results() -> None:
    """Its error is told, and the baseline's figures stand."""
    comparison = Comparison(
        (result("fp32", BASE), VariantResult(parse_variant("bf16"), error="does not fit in memory")), 10, 0.95, 0.02
    )
    text = page(comparison)
    assert "bf16 ended early: does not fit in memory" in text
    assert "100 ms" in text


def test_nothing_measured_is_said() -> None:
    """Both failing leaves a page that says so and no table."""
    comparison = Comparison(
        tuple(VariantResult(parse_variant(name), error="broken") for name in ("fp32", "bf16")), 0, 0.95, 0.02
    )
    assert "nothing to compare" in page(comparison)


def test_an_interrupted_comparison_shows_its_blocks() -> None:
    """What was measured until Ctrl-C is shown, and that it was interrupted."""
    text = page(replace(compared(FAST), interrupted=True))
    assert "Interrupted" in text
    assert "bf16 is faster here" in text


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
    assert console.bounded(value, lo, hi, console._kilowatt_hours) == text


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
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
        start_new_session=True,
    ) as process:
        try:
            deadline_s = time.monotonic() + 60
            while (
                not any(file.stat().st_size for file in tmp_path.glob("demo/bf16/green/*.jsonl"))
                and time.monotonic() < deadline_s
            ):
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert json.loads(out)["comparison"]["interrupted"] is True
    for variant in ("fp32", "bf16"):
        (file,) = (tmp_path / "demo" / variant / "green").glob("*.jsonl")
        assert json.loads(file.read_text(encoding="utf-8").splitlines()[-1])["type"] == "summary"
