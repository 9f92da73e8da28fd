"""``green-torch compare``: what is typed, what a comparison reads like, the command on its own and on runs that are over."""

from __future__ import annotations

import io
import json
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from green_torch.cli import comparison as page_of
from green_torch.cli import main
from green_torch.cli.compare import BuiltIn, Found, as_json, parse_budget, parse_memory, parse_plan, parse_share, show
from green_torch.cli.comparison import Plan
from green_torch.errors import ArgumentError, UnknownRegionError
from green_torch.experiment import Block, Comparison, LargestBatch, Trial, VariantResult, parse_variant
from green_torch.experiment.elsewhere import grids
from green_torch.records import DevicePeak, Domain, IntensityPoint, Manifest, Method
from tests.processes import ENVIRONMENT, GREEN_TORCH, interrupted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


OWN = """
import os
from functools import partial
import torch
from torch import nn
from green_torch.experiment import Workload

def build(variant):
    if variant.name in os.environ.get("BROKEN", "").split(","):
        raise RuntimeError(f"{variant.name} can't be built")
    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(64, 32, generator=generator)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    loss = lambda model, batch: (model(batch) - batch).square().mean()
    units = lambda batch: {} if "UNCOUNTED" in os.environ else {"samples": len(batch)}
    return Workload(model, partial(torch.optim.SGD, lr=0.1), loss, batches, units)
"""


# ── what is typed ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.5 %", 0.005), ("0.02", 0.02)])
def test_until_is_a_share(text: str, value: float) -> None:
    """In percent, or as a fraction."""
    assert parse_share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "%", "1", "0%", "-1%", "200%", "narrow"])
def test_until_must_be_a_share(text: str) -> None:
    """Anything else is told what to give."""
    with pytest.raises(ArgumentError, match="1% or"):
        parse_share(text)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("90s", {"budget_s": 90}), ("5m", {"budget_s": 300}), ("1.5 h", {"budget_s": 5400}),
        ("20kJ", {"budget_j": 20_000}), ("0.05kWh", {"budget_j": 180_000}), ("100Wh", {"budget_j": 360_000}),
    ],
)  # fmt: skip
def test_a_budget_is_of_time_or_energy(text: str, budget: dict[str, float]) -> None:
    """By its unit."""
    assert parse_budget(text) == pytest.approx(budget)


@pytest.mark.parametrize("text", ["", "5", "90", "0s", "-5s", "5 parsecs", "kWh", "1e3s", "5mJ"])
def test_a_budget_must_be_one(text: str) -> None:
    """Anything else is told what to give."""
    with pytest.raises(ArgumentError, match="90s"):
        parse_budget(text)


@pytest.mark.parametrize(("text", "limit"), [("device", True), ("8GiB", 2**33), ("500 MB", 500_000_000)])
def test_the_largest_batch_is_sought_in_some_memory(text: str, limit: bool | int) -> None:
    """The device's own, or so much."""
    assert parse_memory(text) == limit


@pytest.mark.parametrize("text", ["", "8", "0GiB", "much"])
def test_memory_must_be_some(text: str) -> None:
    """Anything else is told what to give."""
    with pytest.raises(ArgumentError, match="8GiB"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"tokens": 1.0, "samples": 1.0}, "one amount"),
        ({"tokens": 0.0}, "positive"),
        ({"steps": float("nan")}, "positive"),
        ({"steps": 1e307}, r"up to 1e\+30"),
        ({"tokens": 1.0, "price": -0.1}, "per kWh"),
        ({"price": 0.2}, "how long"),
        ({"regions": "FR"}, "how long"),
    ],
)
def test_a_plan_needs_one_amount(given: dict[str, float], match: str) -> None:
    """Wrong plans are told apart."""
    with pytest.raises(ArgumentError, match=match):
        parse_plan(**given)


def test_no_plan_is_none() -> None:
    """Without an amount nothing is projected."""
    assert parse_plan() is None


def test_regions_of_a_plan_are_known_ones() -> None:
    """An unknown region names the nearest before anything is trained."""
    with pytest.raises(UnknownRegionError, match="France"):
        parse_plan(tokens=1.0, regions="DE,Frnace")


def test_other_grids_stand_by_basis() -> None:
    """Figures of one basis stand together, the cleanest per IT joule first, and carry PUE with its source."""
    found = grids(["DE", "US-CA", "FR", "aws:us-west-2", "DE"])
    assert [grid.region for grid in found] == ["US-CA", "aws:us-west-2", "FR", "DE"]
    assert [grid.basis for grid in found] == ["direct average"] * 2 + ["lifecycle average"] * 2
    amazon = found[1]
    assert amazon.pue > 1
    assert "Amazon" in amazon.pue_source
    assert amazon.point.year
    emitted = amazon.emissions_g(page_of.Range(100.0, 90.0, 110.0))
    assert emitted.value == pytest.approx(100 * amazon.pue * amazon.point.g_per_kwh)
    assert emitted.lo == pytest.approx(0.9 * emitted.value)


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
            tokens=5120, samples=40, loss=loss, domains_j={domain.name: energy_j},
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
    return printed(width, lambda out: [out.print(part) for part in page_of.comparison_parts(comparison, Plan(tokens=10e9))])


def test_slower_reads_as_slower() -> None:
    """The headline is time where power was modelled, and the planned run costs more."""
    first, second, *_ = page_of.findings(compared(SLOW))
    assert first.startswith("bf16 is slower here: 39.7 % more time per token than fp32 (95 % interval +")
    assert "4 pairs of blocks" in first
    assert second == "Energy follows from time: power was modelled."
    text = page(compared(SLOW))
    assert "costs 216 h" in text
    assert "saves" not in text
    assert "world average, no region set" in text


def test_faster_reads_as_faster() -> None:
    """The same the other way round."""
    assert page_of.findings(compared(FAST))[0].startswith("bf16 is faster here: 50.0 % less time per token than fp32")
    text = page(compared(FAST))
    assert "saves 271 h" in text
    assert "costs" not in text


def test_much_slower_reads_as_a_ratio() -> None:
    """Beyond twice the time, a ratio with a ratio's interval."""
    first = page_of.findings(compared([6.9, 7.0, 6.8, 6.95]))[0]
    assert "6.91 × the time per token of fp32" in first
    assert " ×" in page(compared([6.9, 7.0, 6.8, 6.95]))
    assert "interval 6" in first


def test_an_interval_over_zero_cant_be_told_apart() -> None:
    """Significance comes before the difference: no percentage is claimed, and no saving."""
    first = page_of.findings(compared(SAME))[0]
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
    assert page_of.findings(comparison)[0].endswith("no interval, so no finding.")
    text = page(comparison)
    assert "no interval" in text
    assert "saves" not in text


def test_counted_energy_is_the_headline_with_its_bounds() -> None:
    """Where joules are counted, energy leads, bounds stand beside it, and the sensor's own error is told apart."""
    comparison = compared(FAST, method=Method.COUNTER, watts=120.0)
    first, second, *_ = page_of.findings(comparison)
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
    assert page_of.findings(comparison)[0].startswith("bf16 and fp32 can't be told apart here in energy per token")
    assert "saves" in page(comparison)  # hours


def test_peaks_that_differ_are_not_ranked() -> None:
    """MFUs over different peaks stand side by side without a difference, model FLOP/s beside them."""
    text = page(compared(FAST))
    assert "not ranked" in text
    assert "Model FLOP/s" in text
    assert "datasheet: a sheet" in text


@pytest.mark.parametrize(("off", "ranked"), [(1.003, True), (1.1, False)])
def test_a_peak_measured_twice_is_one_peak(off: float, ranked: bool) -> None:
    """Two processes measure the same peak a little differently."""
    found = three()
    base, other, _ = found.results
    assert base.manifest is not None
    peaks = tuple(replace(peak, flop_per_s=off * peak.flop_per_s) for peak in base.manifest.peaks)
    pair = replace(found, results=(base, replace(other, manifest=replace(base.manifest, peaks=peaks))))
    assert ("not ranked" not in page(pair)) is ranked


def test_a_long_name_has_a_line_for_each_option() -> None:
    """In a column of 12 letters it would be cut within a word."""
    assert page_of.broken("bf16+flash") == "bf16+flash"
    assert page_of.broken("bf16+checkpoint") == "bf16\n+checkpoint"


def test_a_slower_type_is_explained_by_its_peak() -> None:
    """Where the peak of the variant's own type is below the baseline's, the page says so."""
    slower = compared(SLOW)
    base, other = slower.results
    other = replace(
        other, manifest=replace(other.manifest, peaks=(DevicePeak(6e9, "a device", "mm/bfloat16", "measured", "GEMMs"),))
    )
    lines = page_of.findings(replace(slower, results=(base, other)))
    assert any("6.00 GFLOP/s for bfloat16" in line for line in lines)
    assert not any("peaks of this device" in line for line in page_of.findings(slower))


@pytest.mark.parametrize("method", [Method.ESTIMATED, Method.COUNTER])
def test_another_training_claims_no_saving(method: Method) -> None:
    """A loss that departs beyond the tolerance is the headline, whatever the joules say; no sentence, table or JSON tells a saving."""
    comparison = compared(FAST, loss=3.0, method=method, watts=120.0)
    first, second, *_ = page_of.findings(comparison)
    assert first.startswith("bf16 is not the same training: loss 3 against 2.5, more than 2 % apart: no saving is claimed.")
    assert second.startswith("bf16 took ")
    plan = Plan(tokens=10e9, elsewhere=grids(["FR"]))
    text = printed(160, lambda out: [out.print(part) for part in page_of.comparison_parts(comparison, plan)])
    assert text.count("not the same training") == 1 + 3 + 1  # the headline, the planned run's columns, the grid elsewhere
    for claim in ("saves", "saving is told", "is faster"):
        assert claim not in text
    told = as_json(Found(comparison, plan, None, 0))
    assert told["savings"] == told["elsewhere"][0]["emissions_saved_g"] == {}
    assert told["no_saving"]["bf16"].startswith("not the same training")
    for found in ("time", "energy"):
        assert told["comparison"]["differences"]["bf16"][found]["departure"].startswith("not the same training")


@pytest.mark.parametrize(
    ("silent", "told"), [((), "loss within 2 %"), ((0,), "losses not compared"), ((1,), "losses not compared")]
)
def test_losses_are_compared_where_both_sides_give_one(silent: tuple[int, ...], told: str) -> None:
    """Where the baseline's step gives no loss, or the variant's, nothing is said to agree, and a note says whose gives none."""
    found = compared(FAST)
    found = replace(
        found,
        results=tuple(
            replace(one, blocks=tuple(replace(block, loss=None) for block in one.blocks)) if place in silent else one
            for place, one in enumerate(found.results)
        ),
    )
    text = page(found, width=160)
    assert told in text
    assert ("loss within" in text) == (not silent)
    whose = {(): None, (0,): "fp32's", (1,): "its"}[silent]
    notes = [f"whether it is the same training was not checked: {whose} step gives no loss"] if whose else []
    assert list(found.notes("bf16")) == notes


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


def test_interrupted_before_the_first_block_is_one_line(tmp_path: Path) -> None:
    """Ctrl-C before anything was measured says just that, and names no directory."""
    nothing = Comparison(tuple(VariantResult(parse_variant(name), error="ended") for name in ("fp32", "bf16")), 0, 0.95, 0.02)
    text = printed(100, lambda out: show(Found(replace(nothing, interrupted=True), None, tmp_path, 0), out))
    assert text.strip() == "Interrupted before anything was measured."


def test_what_is_too_noisy_is_not_projected() -> None:
    """Blocks that differ by factors give no projection, but the words and what to do."""
    noisy = [1.0, 20.0, 0.5, 9.0]
    text = page(replace(compared(FAST), results=(result("fp32", noisy), result("bf16", noisy[::-1]))))
    assert text.count("too noisy to project") >= 3
    assert "a machine that does nothing else" in " ".join(text.split())
    assert "too noisy" not in page(compared(FAST))


def test_a_saving_of_what_is_too_noisy_is_not_told() -> None:
    """Pairs can be told apart where both sides are disturbed alike; hours saved of a run that nobody can project are none. JSON keeps them."""
    noisy = [1.0, 20.0, 0.5, 9.0]
    found = replace(compared(FAST), results=(result("fp32", noisy), result("bf16", [0.5 * one for one in noisy])))
    text = page(found)
    assert "bf16 is faster here" in text
    assert "saves" not in text
    assert "18,200,000" not in text
    told = as_json(Found(found, Plan(tokens=10e9), None, 0))
    assert told["savings"]["bf16"]["duration_h"]["value"] > 0
    assert told["projections"]["fp32"]["duration_h"]["hi"] > 0


def test_wide_bounds_of_the_meter_are_told_apart_from_noise() -> None:
    """Where time is steady and the meter's bounds are wide, the words are about the meter."""
    base, other = compared(FAST, method=Method.COUNTER).results
    wide = tuple(replace(block, energy_lo_j=0.0, energy_hi_j=5 * block.energy_j) for block in base.blocks)
    text = " ".join(page(Comparison((replace(base, blocks=wide), other), 10, 0.95, 0.02)).split())
    assert "the meter's bounds included" in text
    assert "does nothing else" not in text


def test_a_meter_that_failed_is_told() -> None:
    """Where no block has all its joules, no energy is told, and the page says why; the bounds are of the blocks that have."""
    base, fast = compared(FAST, method=Method.COUNTER).results
    failed = [replace(block, flags=("meter_failed:gpu0",)) for block in fast.blocks]
    text = " ".join(page(Comparison((base, replace(fast, blocks=tuple(failed))), 10, 0.95, 0.02), width=160).split())
    assert "bf16 and fp32: no energy to compare." in text
    assert f"bf16: a meter failed (gpu0) in {len(failed)} of {len(failed)} blocks: their energy is left out" in text
    assert "saves energy" not in text
    whole = (base, replace(fast, blocks=fast.blocks[1:]))
    some = (base, replace(fast, blocks=(failed[0], *fast.blocks[1:])))
    rows = [
        [line for line in page(Comparison(of, 10, 0.95, 0.02)).splitlines() if "Energy per" in line] for of in (whole, some)
    ]
    assert rows[0] == rows[1] != []


# ── several variants ───────────────────────────────────────────────────────────────────────────────────────────────────


def three(**fields: object) -> Comparison:
    """Two variants against FP32, energy counted."""
    base = result("fp32", BASE, method=Method.COUNTER, kernels=("math",), ran="math in fp32")
    fast = result("bf16", FAST, method=Method.COUNTER, kernels=("math",), ran="math in bf16")
    flash = result("bf16+flash", [0.4, 0.41, 0.39, 0.4], method=Method.COUNTER, kernels=("flash",), ran="flash in bf16")
    return replace(Comparison((base, fast, flash), 10, 0.95, 0.02), **fields)


def test_kernels_that_ran_are_named() -> None:
    """The table has the kernel of each variant, in words that no other row repeats."""
    text = page(three(), width=120)
    assert "Attention kernel" in text
    assert "flash " in text
    assert "attention kernel that ran" not in text


def test_intervals_of_several_variants_hold_together() -> None:
    """Each sentence says for how many the interval was widened."""
    assert all("for all 2 together" in line for line in page_of.findings(three()))


def test_the_same_kernels_are_not_presented_as_different() -> None:
    """A variant that ran what the baseline ran is not called faster, whatever its blocks say."""
    comparison = three()
    base, fast, flash = comparison.results
    comparison = replace(comparison, results=(base, replace(fast, ran=base.ran), flash))
    first = page_of.findings(comparison)[0]
    assert "can't be told apart" in first
    assert "same kernels as fp32" in first
    assert "bf16: same kernels as fp32" in page(comparison, width=160)


def test_the_meters_bounds_have_a_column_of_their_own() -> None:
    """Bounds of the difference and the gain error stand beside the interval; of one sensor the latter cancels."""
    text = page(three(), width=160)
    assert "the meter's bounds" in text
    assert "its gain error" in text
    assert text.count("cancels") == 2
    assert "face value" not in text


def with_host(comparison: Comparison, shares: Sequence[float]) -> Comparison:
    """The GPU beside CPU and memory, as the default meters have them: these state no gain error. ``shares``: of the joules, the GPU's."""
    results = []
    for one, share in zip(comparison.results, shares, strict=True):
        assert one.manifest is not None
        gpu = one.manifest.domains[0]
        domains = (gpu, *(replace(gpu, name=name, gain_error=None) for name in ("cpu", "dram")))
        split = {"gpu0": share, "cpu": 0.8 * (1 - share), "dram": 0.2 * (1 - share)}
        blocks = tuple(
            replace(block, domains_j={name: part * (block.energy_j or 0.0) for name, part in split.items()})
            for block in one.blocks
        )
        results.append(replace(one, blocks=blocks, manifest=replace(one.manifest, domains=domains)))
    return replace(comparison, results=tuple(results))


def test_a_gain_error_counts_beside_sensors_that_state_none() -> None:
    """On a GPU with its host the range is what the GPU's error allows, the host being taken as it is; a difference within it is none."""
    apart = with_host(compared(FAST, method=Method.COUNTER), (0.9, 0.5))
    found = apart.energy("bf16")
    assert found is not None
    shifted = [(0.5 * gain + 0.5) / (0.9 * gain + 0.1) for gain in (1.05, 0.95)]
    assert (found.gain_lo, found.gain_hi) == pytest.approx([(1 + found.estimate) * shift - 1 for shift in shifted])
    text = page(apart, width=160)
    assert "its gain error" in text
    assert "not stated" not in text
    assert "No gain error is stated for cpu, dram: taken at face value." in text
    small = with_host(compared([0.97 * one for one in BASE], method=Method.COUNTER), (0.9, 0.2)).energy("bf16")
    assert small is not None
    assert "gain errors" in small.note


def test_many_variants_leave_out_how_each_figure_is_known() -> None:
    """With four variants the column gives way; the grounds below still say it."""
    comparison = three()
    more = replace(comparison, results=(*comparison.results, result("tf32", FAST, method=Method.COUNTER)))
    assert "known from" in page(comparison)
    text = page(more)
    assert "known from" not in text
    assert "energy, gpu0 counter: a source" in " ".join(text.split())


def test_a_plan_with_a_price_and_other_grids() -> None:
    """Money by facility energy; grams elsewhere by each grid's own basis, with its PUE."""
    plan = Plan(tokens=10e9, price_per_kwh=0.25, elsewhere=grids(["FR", "aws:us-west-2"]))
    text = printed(160, lambda out: [out.print(part) for part in page_of.comparison_parts(three(), plan)])
    assert "Cost at 0.25/kWh" in text
    energy_kwh = 10e9 * 100 / 5120 / 3.6e6
    assert f"{0.25 * energy_kwh:.1f}" in text
    assert "gCO2e/kWh, 2023" in text
    assert "direct average" in text
    assert "lifecycle average, no PUE" in text
    assert "can't be ranked with each other" in text


def test_a_variant_saves_elsewhere_too() -> None:
    """On each grid the grams saved follow from the kWh saved, low and high too, in the table and in JSON."""
    plan = Plan(tokens=10e9, elsewhere=grids(["FR", "US-CA"]))
    text = printed(200, lambda out: [out.print(part) for part in page_of.comparison_parts(three(), plan)])
    _, _, table = text.partition("The same joules on other grids")
    assert table.count("saves") == 2 * 2
    told = as_json(Found(three(), plan, None, 0))
    for grid, row in zip(plan.elsewhere, told["elsewhere"], strict=True):
        assert row["emissions_saved_g"].keys() == {"bf16", "bf16+flash"}
        for name, grams_saved in row["emissions_saved_g"].items():
            kwh = told["savings"][name]["energy_kwh"]
            assert grams_saved == pytest.approx({end: kwh[end] * grid.pue * grid.point.g_per_kwh for end in kwh})
            assert 0 < grams_saved["lo"] < grams_saved["value"] < grams_saved["hi"]


def counting(comparison: Comparison, **units: None) -> Comparison:
    """The comparison of steps that don't count these units."""
    results = (replace(one, blocks=tuple(replace(block, **units) for block in one.blocks)) for one in comparison.results)
    return replace(comparison, results=tuple(results))


def test_steps_are_planned_by_the_baselines() -> None:
    """A plan of steps becomes one of the tokens that the baseline's steps hold, or the samples; where neither is counted, it stays."""
    plan = Plan(steps=1000, price_per_kwh=0.5)
    assert page_of.in_counted_work(three(), plan) == Plan(tokens=512_000, price_per_kwh=0.5)
    assert page_of.in_counted_work(counting(three(), tokens=None), plan) == Plan(samples=4000, price_per_kwh=0.5)
    bare = counting(three(), tokens=None, samples=None)
    assert page_of.in_counted_work(bare, plan) == plan
    text = printed(120, lambda out: [out.print(part) for part in page_of.comparison_parts(bare, plan)])
    assert "A planned run of 1,000 steps" in text
    assert "less energy per step than fp32" in text
    assert "saves" in text.partition("A planned run")[2]
    failed = replace(bare, results=(VariantResult(parse_variant("fp32"), error="broken"), *bare.results[1:]))
    assert page_of.in_counted_work(failed, plan) == plan


def test_a_plan_in_another_unit_says_so() -> None:
    """Tokens are planned, samples were counted: the page names the unit and what to type, and shows no table of unknowns."""
    by_sample = counting(compared(FAST), tokens=None)
    text = " ".join(page(by_sample, width=160).split())
    assert "Not projected: fp32, bf16: samples were counted, not tokens: plan by --samples or --planned-steps." in text
    assert "in place of" not in text
    assert "not comparable" not in text
    assert "Samples per second" in text
    told = as_json(Found(by_sample, Plan(tokens=1e9), None, 0))
    assert told["no_saving"] == {"bf16": "no tokens counted"}
    _, other = compared(FAST).results
    text = " ".join(page(replace(by_sample, results=(by_sample.baseline, other)), width=160).split())
    assert "Not projected: fp32: samples were counted" in text


def test_how_many_blocks_would_find_a_difference() -> None:
    """Where noise hides it, the sentence and JSON say how many blocks 2 % and 1 % take; where there is a finding, nothing."""
    hidden = compared(SAME)
    found = hidden.time("bf16")
    assert found is not None
    two, one = found.blocks_needed(0.02), found.blocks_needed(0.01)
    assert two is not None
    assert one is not None
    assert 6 <= two < one
    clause = f"; blocks of each to find a difference at this noise: about {two} for 2 %, about {one} for 1 %."
    assert page_of.findings(hidden)[0].endswith(clause)
    told = hidden.to_dict()["differences"]["bf16"]["time"]
    assert told["blocks_needed"] == [{"difference": 0.02, "n_blocks": two}, {"difference": 0.01, "n_blocks": one}]
    assert "at this noise" not in page_of.findings(compared(FAST))[0]
    assert compared(FAST).to_dict()["differences"]["bf16"]["time"]["blocks_needed"] == []


@pytest.mark.parametrize(("stopped", "told"), [("until", "narrow enough"), ("budget_j", "energy was spent")])
def test_what_ended_it_is_told(stopped: str, told: str) -> None:
    """Where it was not the number of blocks."""
    assert f"{told} after 4 blocks" in page(three(stopped=stopped))
    assert told not in page(three())


def test_the_largest_batch_is_shown() -> None:
    """With its memory and joules per token, with and without."""
    base = three().baseline
    found = LargestBatch(
        base.variant, 64, 2**30, "torch", (Trial(64, fits=True, peak_memory_bytes=2**29),), complete=True, result=base
    )
    text = page(three(largest=(found,)), width=160)
    assert "largest batch" in text
    assert "512 MiB" in text
    assert "energy per token" in text.partition("largest batch")[2]
    by_sample = counting(three(), tokens=None).baseline
    (row,) = [
        line for line in page(three(largest=(replace(found, result=by_sample),)), width=200).splitlines() if "512 MiB" in line
    ]
    assert "2.50 J" in row
    assert "40" in row
    assert "not known" not in row


def test_a_largest_batch_that_was_not_found_is_unknown() -> None:
    """Where the search could not be made, its reason is shown, and not that none fits."""
    found = LargestBatch(three().baseline.variant, None, 2**30, "", error="let it heed variant.batch_size")
    text = page(three(largest=(found,)), width=200)
    assert "none fits" not in text
    assert "not known (let it heed" in text
    assert "none fits" in page(three(largest=(replace(found, error=None),)), width=200)


# ── the command ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--variants", "fp32,fp33"], "fp32, tf32, bf16"),
        (["--blocks", "0"], "--blocks 0"),
        (["--steps", "0"], "--steps 0"),
        (["--until", "1%", "--blocks", "3"], "--until 0.01 looks after"),
        (["--until", "wide"], "1% or 0.01"),
        (["--budget", "5 parsecs"], "90s"),
        (["--budget", "5"], "5s, 5m or 5kJ"),
        (["--region", "Frnace"], '"FR" (France)'),
        (["--region", "Frnace"], 'a subdivision ("US-CA") or a cloud region ("gcp:europe-west1").'),
        (["--tokens", "-1"], "positive"),
        (["--force"], "runs/a runs/b"),
        (["--size", "7B"], "10M, 124M"),
        (["nowhere.to.be:found"], "no module"),
        (["json"], "module:function"),
        (["src/mine.py:build"], "say its module: src.mine:build"),
        (["json:loads", "--size", "10M"], "built-in"),
        (["json:loads", "pickle:loads"], "one module:build"),
        (["runs/a"], "two directories"),
        (["runs/a", "runs/b"], "holds no run"),
        (["runs/a", "runs/b", "./runs/../runs/a/"], "is named twice"),
        (["--tokens", "1e9", "--regions", "FR,XX"], "--regions 'XX' is in none"),
        (
            ["runs/a", "runs/b", "--variants", "fp32"],
            "--variants: of a training that is measured now; runs/a runs/b are runs that are over",
        ),
        (["runs/a", "runs/b", "--blocks", "3", "--until", "1%"], "--blocks, --until: of a training"),
        (["runs/a", "runs/b", "--budget", "20kJ"], "--budget: of a training"),
        (["runs/a", "runs/b", "--size", "1M"], "--size: of a training"),
        (["runs/a", "runs/b", "--largest-batch", "8GiB"], "--largest-batch: of a training"),
        (["runs/a", "runs/b", "--steps", "3"], "--steps: of a training"),
    ],
)
def test_wrong_arguments_end_with_2(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one line on stderr that says what to type, before a worker has loaded torch."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["compare", *arguments])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert told in err
    assert "Traceback" not in err
    assert out == ""


def test_a_refused_argument_is_all_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where earlier runs are in the way, too: nothing goes elsewhere then."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/compare/fp32").mkdir(parents=True)
    with pytest.raises(SystemExit):
        main(["compare", "--blocks", "0"])
    assert capsys.readouterr().err == "green-torch: --blocks 0 must be 1 or more.\n"


def ran(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command on the user's own module in the current directory."""
    (folder / "mine.py").write_text(OWN, encoding="utf-8")
    command = [*GREEN_TORCH, "compare", "mine:build", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=ENVIRONMENT | environment, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A comparison of three variants of the user's own code, one of which fails: its directory and its JSON."""
    folder = tmp_path_factory.mktemp("own")
    found = ran(
        folder, "--variants", "fp32,bf16,bf16-true", "--blocks", "2", "--steps", "2", "--samples", "1e6", "--price", "0.25",
        "--regions", "FR,US-CA", "--region", "DE", "--seed", "3", "--json", BROKEN="bf16",
    )  # fmt: skip
    assert found.returncode == 1, found.stderr
    (folder / "stderr.txt").write_text(found.stderr, encoding="utf-8")
    return folder, json.loads(found.stdout)


def test_own_code_is_found_in_the_current_directory(own: tuple[Path, dict]) -> None:
    """One JSON object on stdout; a variant that fails leaves its reason, and the others' results."""
    _, found = own
    assert found["schema"] == "green_torch.compare/1"
    first, second, third = found["comparison"]["results"]
    assert first["error"] is None
    assert "bf16 can't be built" in second["error"]
    assert [len(one["blocks"]) for one in (first, second, third)] == [2, 0, 2]
    assert first["blocks"][0]["samples"] == third["blocks"][0]["samples"] == 128
    assert any("bf16 ended early" in line for line in found["findings"])


def test_a_pipe_is_told_how_far_it_is(own: tuple[Path, dict]) -> None:
    """Without a terminal each stage and block is one line on stderr, none twice."""
    folder, _ = own
    lines = (folder / "stderr.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "loading torch, 0 of 6 blocks done"
    assert "warming up fp32, 0 of 6 blocks done" in lines
    assert sum(line.startswith("measuring ") for line in lines) == 4
    assert lines[-1] == "closing, 6 of 6 blocks done"
    assert len(set(lines)) == len(lines)


def test_the_planned_run_is_in_the_json(own: tuple[Path, dict]) -> None:
    """Hours, joules, grams and money for each variant that ran, and grams on other grids with basis, year and PUE."""
    _, found = own
    assert found["planned_samples"] == 1e6
    assert found["projections"].keys() == {"fp32", "bf16-true"}
    energy_kwh = found["projections"]["fp32"]["facility_energy_kwh"]["value"]
    assert found["costs"]["fp32"]["value"] == pytest.approx(0.25 * energy_kwh)
    assert [grid["region"] for grid in found["elsewhere"]] == ["US-CA", "FR"]
    france = found["elsewhere"][1]
    assert (france["basis"], france["pue"]) == ("lifecycle average", 1.0)
    assert france["emissions_g"]["fp32"]["value"] == pytest.approx(energy_kwh * france["point"]["g_per_kwh"])


def test_planned_steps_of_uncounted_work_are_projected(tmp_path: Path) -> None:
    """A step that counts neither tokens nor samples is the unit itself: nothing measured is lost to the plan."""
    found = ran(
        tmp_path,
        "--variants",
        "fp32,bf16-true",
        "--blocks",
        "2",
        "--steps",
        "2",
        "--planned-steps",
        "1e5",
        "--json",
        UNCOUNTED="1",
    )
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["planned_steps"] == 1e5
    first, second = told["comparison"]["results"]
    assert told["projections"]["fp32"]["unit"] == "steps"
    assert told["projections"]["fp32"]["duration_h"]["value"] == pytest.approx(1e5 * first["step_time_s"] / 3600)
    assert told["projections"]["bf16-true"]["duration_h"]["value"] == pytest.approx(1e5 * second["step_time_s"] / 3600)


def test_one_labelled_run_a_variant(own: tuple[Path, dict]) -> None:
    """Each variant is a run that TensorBoard shows, with its label in the manifest."""
    folder, found = own
    assert found["tensorboard"] == "green-torch tensorboard runs/compare"
    for name in ("fp32", "bf16-true"):
        (file,) = (folder / "runs" / "compare" / name / "green").glob("*.jsonl")
        assert json.loads(file.read_text(encoding="utf-8").splitlines()[0])["label"] == name
        assert list((folder / "runs" / "compare" / name).glob("events.out.tfevents.*"))


def test_the_runs_of_a_comparison_can_be_compared_again(own: tuple[Path, dict], capsys: pytest.CaptureFixture[str]) -> None:
    """Two directories are compared from their records, which the output says makes no pairs."""
    folder, _ = own
    runs = [str(folder / "runs" / "compare" / name) for name in ("fp32", "bf16-true")]
    with pytest.raises(SystemExit) as ended:
        main(["compare", *runs, "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["comparison"]["paired"] is False
    assert found["comparison"]["results"][1]["path"] == runs[1]
    with pytest.raises(SystemExit):
        main(["compare", *runs])
    assert "not paired" in " ".join(capsys.readouterr().out.split())


def test_nothing_left_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where every variant fails the reasons are told."""
    (tmp_path / "broken.py").write_text('def build(variant):\n    raise RuntimeError(f"{variant.name} is broken")\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["compare", "broken:build", "--variants", "fp32", "--blocks", "1", "--steps", "1"])
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert "fp32 is broken" in out
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("errors", "code"),
    [
        ((None, "ValueError: broken"), 1),
        (("does not fit in memory: 9 GB", None), 1),
        ((None, "does not fit in memory: 9 GB"), 0),
        ((None, "can't run here: no FP8"), 0),
        ((None, None), 0),
    ],
)
def test_a_failure_ends_with_1(errors: tuple[str | None, ...], code: int) -> None:
    """A baseline that was not measured, or a variant that broke; one that doesn't fit or can't run here is a finding."""
    results = tuple(
        result(name, BASE) if error is None else VariantResult(parse_variant(name), error=error)
        for name, error in zip(("fp32", "bf16"), errors, strict=True)
    )
    found = Found(Comparison(results, 10, 0.95, 0.02), None, None, 0)
    assert found.failed == bool(code)


def test_ctrl_c_keeps_the_blocks_so_far(tmp_path: Path) -> None:
    """Interrupted while measuring: exit code 130, and the blocks measured until then are in the output."""
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    command = [*GREEN_TORCH, "compare", "mine:build", "--variants", "fp32", "--blocks", "100000", "--steps", "1", "--json"]
    records = tmp_path / "runs" / "compare" / "fp32" / "green"
    code, out, err = interrupted(
        command, tmp_path, lambda: sum(file.stat().st_size for file in records.glob("*.jsonl")) >= 50_000, timeout_s=120
    )
    assert code == 130, err
    found = json.loads(out)["comparison"]
    assert found["interrupted"] is True
    assert found["results"][0]["blocks"]
    (file,) = records.glob("*.jsonl")
    assert json.loads(file.read_text(encoding="utf-8").splitlines()[-1])["status"] == "interrupted"


def test_a_largest_batch_on_a_cpu_is_refused_before_a_block(tmp_path: Path) -> None:
    """The device's memory is no limit on a CPU: exit code 2 and what to type, with nothing measured that would be lost."""
    found = ran(tmp_path, "--variants", "fp32", "--largest-batch", "device")
    assert (found.returncode, found.stdout) == (2, "")
    assert "say what must hold it, such as --largest-batch 4GiB." in found.stderr
    assert "measuring" not in found.stderr


def test_the_built_in_workload_goes_by_the_device() -> None:
    """On a CPU about 10M parameters, unless a size is asked for."""
    import torch

    sizes = [sum(p.numel() for p in BuiltIn(size)(parse_variant("fp32")).model.parameters()) for size in ("auto", "1M")]
    if not torch.cuda.is_available():
        assert 9e6 < sizes[0] < 12e6
    assert sizes[1] < 1e6
