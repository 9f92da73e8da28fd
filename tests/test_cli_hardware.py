"""``green-torch hardware``: TFLOP/s a watt of every card, and when moving a measured run to a new card repays making it."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

import green_torch
from green_torch.cli import hardware, main
from green_torch.cli.assumptions import card
from green_torch.errors import ArgumentError
from green_torch.peaks import known_devices
from green_torch.records import Method
from green_torch.testing import ScriptedClock, ScriptedMeter
from tests.test_embodied import A100, CardMeter

if TYPE_CHECKING:
    from pathlib import Path

PEAK = 312e12
REFRESH = {"mfu_to": 0.4, "in_use": 0.6, "lifetime": 4.0, "intensity": 50.0, "pue": 1.2}


def write(path: Path, *, flops=0.4 * 0.5 * PEAK, meters=None, **track) -> Path:
    """A run of a hundred steps of half a second, on an A100 of 320 W beside a host of 60 W, at 40 % MFU."""
    clock = ScriptedClock()
    meters = [CardMeter(clock, {"gpu0": A100}, {"cpu": 60.0})] if meters is None else meters(clock)
    settings = {"region": "FR", "flops_per_step": flops, "peak_flop_per_s": PEAK} | track
    with green_torch.track(log_dir=path, clock=clock, meters=meters, **settings) as tracker:
        for _ in range(100):
            clock.advance(0.5)
            tracker.step(tokens=1000)
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """That run's directory."""
    return write(tmp_path_factory.mktemp("runs") / "a100")


def cli(capsys, *arguments):
    """Exit code, stdout and stderr of the command."""
    with pytest.raises(SystemExit) as ended:
        main(["hardware", *map(str, arguments)])
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err


def printed(show, what, width=80):
    """What people see."""
    out = io.StringIO()
    show(what, Console(file=out, width=width, color_system=None))
    return out.getvalue()


def test_the_articles_generations():
    """V100 0.42, A100 0.78, H100 1.41 dense TFLOP/s a watt at half precision."""
    found = {one.name: one.tflop_per_s_per_w["half"] for one in hardware.examine(["V100", "A100", "H100"]).cards}
    assert found["NVIDIA V100 SXM2"] == pytest.approx(0.42, abs=0.005)
    assert found["NVIDIA A100 SXM4 80GB"] == pytest.approx(0.78, abs=0.005)
    assert found["NVIDIA H100 SXM5 80GB"] == pytest.approx(1.41, abs=0.005)


@pytest.mark.parametrize("dtype", [None, "fp64", "fp32", "tf32", "bf16", "fp16", "fp8"])
def test_every_card_is_there_the_best_first(dtype):
    """Sorted at the dtype that was asked for; what has no figure comes last; each has its source."""
    report = hardware.examine(dtype=dtype)
    assert {one.name for one in report.cards} == {known.name for known in known_devices()}
    rates = [one.tflop_per_s_per_w.get(report.dtype, -1.0) for one in report.cards]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0
    assert all(len(one.source) > 20 for one in report.cards)


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits_the_terminal(width):
    """All cards, no line wider than it, no figure cut."""
    told = printed(hardware.show, hardware.examine(), width)
    assert max(map(len, told.splitlines())) <= width
    assert "…" not in told.replace("NAME…", "")
    assert "1.41" in told


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("A100", "NVIDIA A100 SXM4 40GB"),
        ("a100-sxm4-80gb", "NVIDIA A100 SXM4 80GB"),
        ("A100 80GB PCIe", "NVIDIA A100 PCIe 80GB"),
        ("H100", "NVIDIA H100 SXM5 80GB"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        ("L4", "NVIDIA L4"),
        ("L40", "NVIDIA L40"),
        ("3090", "NVIDIA GeForce RTX 3090"),
        ("RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("A6000", "NVIDIA RTX A6000"),
        ("mi300x", "AMD Instinct MI300X"),
        ("Tesla V100-SXM2-32GB", "NVIDIA V100 SXM2"),
    ],
)
def test_cards_are_found_as_people_type_them(typed, meant):
    """By the driver's name or by words; a name that may mean several says so."""
    known, note = card(typed)
    assert known.name == meant
    assert bool(note) == (typed in {"A100", "H100"})


def test_a_refresh_by_hand(measured):
    """380 W at 124.8 TFLOP/s against 0.8 × 700 + 60 W at 0.4 × 989.4: joules a FLOP, months, and the spread of the making."""
    found = hardware.refresh(measured, "H100", **REFRESH)
    old, new = 380 / (0.4 * PEAK), 620 / (0.4 * 989.4e12)
    result = found.payback
    assert result.energy_old_j_per_flop == pytest.approx(old, rel=1e-3)
    assert result.energy_new_j_per_flop == pytest.approx(new, rel=1e-3)
    monthly_g = (old - new) * 0.4 * 989.4e12 * 0.6 * 730.5 * 3600 / 3.6e6 * 50 * 1.2
    assert result.saving_g_per_month == pytest.approx(monthly_g, rel=1e-3)
    assert result.months == pytest.approx(164_000 / monthly_g, rel=1e-3)
    assert result.months_hi == pytest.approx(575_100 / monthly_g, rel=1e-3)
    assert found.energy_measured


def test_what_is_assumed_is_said(measured):
    """MFU, power share, dtype, grid, use, lifetime and work enough to fill it: each with the option that says otherwise."""
    told = " ".join(hardware.refresh(measured, "H100").assumed)
    for assumed in (
        "the run's own MFU, 40.0 %",
        "80.0 % of its TDP",
        "--dtype",
        "own grid, FR",
        "--in-use",
        "4 years",
        "work enough",
    ):
        assert assumed in told
    typed = " ".join(hardware.refresh(measured, "H100", **REFRESH).assumed)
    assert "MFU of 40.0 %: what you typed, not measured" in typed
    assert "--in-use" not in typed


def test_a_worse_card_never_pays_back(measured):
    """An A100's work costs more on a V100; and on a grid counted at zero nothing is saved."""
    assert "Never pays back" in hardware.verdict(hardware.refresh(measured, "V100"))
    assert "0 gCO2e/kWh" in hardware.verdict(hardware.refresh(measured, "H100", intensity=0.0))


def test_the_spread_may_leave_it_open(measured):
    """Where the making's ends lie on both sides of the card's life, no answer is given."""
    found = hardware.refresh(measured, "H100", **REFRESH | {"intensity": 20.0})
    assert found.within_lifetime is None
    assert "can't be told" in hardware.verdict(found)


def test_a_modelled_run_says_so(tmp_path):
    """A CPU run whose power is a model: no host is counted twice, and the verdict warns."""
    meters = lambda clock: [ScriptedMeter(clock, {"cpu": 60.0}, method=Method.ESTIMATED)]  # noqa: E731
    found = hardware.refresh(write(tmp_path / "cpu", meters=meters), "H100", region="FR")
    assert found.host_power_w == 0
    assert "a model, not measured" in hardware.verdict(found)


def test_a_move_from_a_cpu_says_that_its_mfu_is_a_guess(tmp_path):
    """The CPU has its name, the answer is in days where months are few, and what a GPU would reach is called a guess until it is typed."""
    meters = lambda clock: [CardMeter(clock, {"cpu": "AMD EPYC 7763"})]  # noqa: E731
    run = write(tmp_path / "cpu", meters=meters, flops=1e11, peak_flop_per_s=5e11)
    found = hardware.refresh(run, "H100", region="FR")
    text = " ".join(printed(hardware.show_refresh, found).split())
    assert "from AMD EPYC 7763 to NVIDIA H100" in text
    assert found.payback.months < 2
    assert f"Pays back in {found.payback.months * 30.4375:.3g} days" in text
    assert "is a guess: give one with --mfu-to" in text
    assert "the run's MFU on a CPU (no GPU was metered in it)" in text
    assert "is a guess" not in hardware.verdict(hardware.refresh(run, "H100", region="FR", mfu_to=0.3))


def test_several_gpus_are_counted(tmp_path):
    """Two cards doing the work of two need the same joules a FLOP, and each does half the FLOP/s."""
    meters = lambda clock: [CardMeter(clock, {"gpu0": A100, "gpu1": A100})]  # noqa: E731
    found = hardware.refresh(write(tmp_path / "two", meters=meters), "H100", mfu_to=0.4, region="FR")
    assert found.count_old == 2
    assert found.power_old_w == pytest.approx(320, rel=1e-3)
    assert found.power_share_new == pytest.approx(0.8, rel=1e-3)
    assert found.payback.work_ratio == pytest.approx(2 * 989.4 / 312, rel=1e-3)


@pytest.mark.parametrize("width", [80, 200])
def test_the_answer_fits_the_terminal(measured, width):
    """No line wider than it."""
    told = printed(hardware.show_refresh, hardware.refresh(measured, "H100", **REFRESH), width)
    assert max(map(len, told.splitlines())) <= width
    assert "Pays back in" in told


def test_json_is_one_object(capsys, measured):
    """Both answers, machine-readable."""
    code, out, _ = cli(capsys, "H100", "--json")
    assert code == 0
    assert json.loads(out)["cards"][0]["tdp_w"] == 350
    code, out, _ = cli(
        capsys, "--from", measured, "--to", "H100", "--mfu-to", "0.4", "--region", "FR", "--utilization", "0.6", "--json"
    )
    found = json.loads(out)
    assert code == 0
    assert found["in_use"] == 0.6
    assert found["payback"]["months_lo"] <= found["payback"]["months"] <= found["payback"]["months_hi"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["A10O"], "NVIDIA A100"),
        (["--dtype", "fp3"], "use one of"),
        (["--to", "H100"], "go together"),
        (["--from", "{run}", "--to", "H1000"], "Nearest"),
        (["--from", "{run}", "--to", "L40"], "--embodied-kg"),
        (["--from", "{run}", "--to", "GH200", "--embodied-kg", "200"], "no TDP"),
        (["--from", "{run}", "--to", "H100", "--mfu-to", "40"], "--mfu-to 40"),
        (["--from", "{run}", "--to", "H100", "--in-use", "0"], "--in-use 0"),
        (["--from", "{run}", "--to", "H100", "--lifetime", "nan"], "--lifetime nan"),
        (["--from", "{run}", "--to", "H100", "--pue", "0.5"], "--pue 0.5"),
        (["--from", "{run}", "--to", "H100", "--region", "Frnace"], '"FR" (France)'),
        (["--from", "{run}/nothing", "--to", "H100"], "no directory"),
    ],
)
def test_nonsense_ends_with_2_and_says_what_to_type(capsys, measured, arguments, told):
    """A wrong argument is the user's to mend: one line on stderr, nothing on stdout."""
    code, out, err = cli(capsys, *(one.format(run=measured) for one in arguments))
    assert (code, out) == (2, "")
    assert told in err


def test_runs_that_lack_what_is_needed(tmp_path, measured):
    """No FLOPs, several runs, none: each says what mends it."""
    with pytest.raises(ArgumentError, match="flops_per_step="):
        hardware.refresh(write(tmp_path / "x" / "flopless", flops_per_step=None), "H100")
    write(tmp_path / "x" / "other")
    with pytest.raises(ArgumentError, match="2 runs below it; give one"):
        hardware.refresh(tmp_path / "x", "H100")
    (tmp_path / "none").mkdir()
    with pytest.raises(ArgumentError, match="no run of green_torch"):
        hardware.refresh(tmp_path / "none", "H100")
    assert measured.exists()
