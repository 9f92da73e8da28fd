"""The Green tab in a real TensorBoard and a real Chromium: each view shows the run's own numbers, whatever the run is called."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from torch.utils.tensorboard import SummaryWriter

from green_torch import units
from green_torch.experiment.recorded import compare_runs
from green_torch.experiment.results import Block, Comparison, VariantResult
from green_torch.experiment.variants import parse_variant
from green_torch.intensity import resolve
from green_torch.records import Deferral, JobTotals, Method, Phase
from green_torch.schedule.accounting import handed
from green_torch.sinks.codec import plain
from green_torch.sinks.tensorboard import TensorBoardSink
from green_torch.statistics import gain_range, mean_interval, t_quantile, unpaired_difference
from green_torch.surroundings import DEFERRAL
from tests.green_page import CHROMIUM, DRAWN, NAMES, Tab, chromium
from tests.green_runs import (
    TOKENS,
    ask,
    tensorboard,
    wait_for_runs,
    write_damage,
    write_many,
    write_records,
    write_run,
    write_snapshot,
)
from tests.test_sinks_codec import MANIFEST, make_record, make_summary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Browser

    from green_torch.records import StepRecord
    from green_torch.testing import MemorySink

if CHROMIUM is None and not os.environ.get("CI"):
    pytest.skip("there is no Chromium here: apt-get install chromium", allow_module_level=True)

HOSTILE = {
    "markup": '<img src=x onerror="document.title=\'owned\'"><script>document.title="owned"</script>',
    "quotes": "\"'`${1}\\ | * _ =cmd()",
    "long": "x" * 10_000,
    "right to left": "\u202eמודל עברית\u202c",
}
# Layout and behaviour of the page do not depend on the loader.
FAST_ALONE = pytest.mark.parametrize("address", ["true"], ids=["fast"], indirect=True)


# What the runs of this module waited for: half the grid's carbon by the forecast of a provider that they don't use themselves.
PUT_OFF = Deferral(
    policy="green-torch wait",
    baseline="starting now",
    method="forecast",
    region="GB",
    source="UK NESO",
    kind="direct, average",
    baseline_unix_ns=1_789_990_000 * 10**9,
    deadline_unix_ns=1_790_026_000 * 10**9,
    work_s=3600.0,
    stop_unix_ns=1_789_990_000 * 10**9,
    resume_unix_ns=1_789_997_200 * 10**9,
    planned_g_per_kwh=101.0,
    planned_baseline_g_per_kwh=202.0,
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def window(browser: Browser, address: str) -> Iterator[Tab]:
    """A page over the runs of this module."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    yield Tab(context.new_page(), address)
    context.close()


@pytest.fixture
def tab(window: Tab) -> Iterator[Tab]:
    """The same, to be opened; after each test it must have asked nobody else, and complained of nothing."""
    yield window
    host = window.address.split("/")[2]
    assert {url.split("/")[2] for url in window.asked if url.startswith(("http", "ws"))} <= {host}
    assert [text for text in window.complaints if "Three.js" not in text] == []
    window.complaints.clear()


@pytest.fixture(scope="module")
def waited() -> Iterator[None]:
    """These runs were started by ``green-torch wait``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DEFERRAL, handed(PUT_OFF))
        yield


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module are."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def sinks(log_dir: Path, waited: None) -> dict[str, MemorySink]:
    """Five runs, and what each was told at its end: two that differ, one that hardly does, one on another meter, one that failed."""
    gpu = {"gpu0": 403.7}
    return {
        "fp32": write_run(log_dir / "fp32", power_w=gpu, step_s=0.6, seed=1),
        "bf16": write_run(log_dir / "bf16", power_w=gpu, step_s=0.3, seed=2, start_s=100, price=0.25),
        "fp32 again": write_run(log_dir / "fp32 again", power_w=gpu, step_s=0.601, seed=3, start_s=200),
        "cpu": write_run(
            log_dir / "cpu", power_w={"cpu": 90.7}, method=Method.ESTIMATED, step_s=1.0, n_steps=20, seed=4, start_s=300
        ),
        "crashed": write_run(log_dir / "crashed", power_w=gpu, step_s=0.3, n_steps=20, seed=5, fail=True, start_s=400),
    }


@pytest.fixture(scope="module", params=["true", "false"], ids=["fast", "slow"])
def address(request: pytest.FixtureRequest, log_dir: Path, sinks: dict[str, MemorySink]) -> Iterator[str]:
    """TensorBoard over them, with either loader."""
    with tensorboard(log_dir, f"--load_fast={request.param}") as address:
        wait_for_runs(address, len(sinks))
        yield address


def summary_of(sink: MemorySink) -> Any:
    assert sink.summary is not None
    return sink.summary


# ── the views ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_table_shows_each_runs_own_summary(tab: Tab, sinks: dict[str, MemorySink]) -> None:
    """Every figure of the table is the run's summary, in the words of green_torch.units."""
    tab.open().wait(".comparison .col-loss:not(:empty)")
    tab.wait_until("!document.querySelector('.comparison').innerText.includes('…')")
    for name, sink in sinks.items():
        summary, row = summary_of(sink), tab.row(name)
        assert row["run"].split("\n")[0] == name
        assert row["energy"].split("\n")[0] == units.si(summary.energy_per_token_j, "J")
        assert row["speed"] == units.si(TOKENS / summary.step_time_s, "").strip()
        assert row["power"] == units.si(summary.power_w, "W")
        assert row["mfu"].split("\n")[0] == f"{units._digits(100 * summary.mfu, 3)} %"
        assert row["kwh"] == units.kwh(summary.totals.energy_j)
        assert row["grams"] == units.grams(summary.totals.emissions_g)
        assert row["memory"].endswith("iB")
    assert tab.row("fp32")["mfu"].split("\n")[1].endswith("of 312 TFLOP/s")
    assert "baseline" in tab.row("fp32")["run"]
    assert "counted" in tab.row("fp32")["run"]
    assert "estimated" in tab.row("cpu")["run"]
    assert "failed" in tab.row("crashed")["run"]


def losses_of(sink: MemorySink, seed: int) -> list[float]:
    """The losses that ``write_run`` logged."""
    noise, found = random.Random(seed), []
    for step in range(sum(record.phase is Phase.TRAIN for record in sink.records)):
        noise.gauss(0, 0.03)
        found.append(2.0 + 5.0 * math.exp(-step / 25) + noise.gauss(0, 0.05))
    return found


def test_the_final_loss_is_a_mean_of_the_last_points(tab: Tab, sinks: dict[str, MemorySink]) -> None:
    """Over the last twentieth of the points, at least one, with the interval of their scatter; the column's head says so."""
    tab.open().wait(".comparison .col-loss:not(:empty)")
    tab.wait_until("!document.querySelector('.comparison').innerText.includes('…')")
    for (name, sink), seed in zip(sinks.items(), (1, 2, 3, 4, 5), strict=True):
        losses = losses_of(sink, seed)
        last = losses[-math.ceil(0.05 * len(losses)) :]
        wanted = mean_interval(last)
        mean, *interval = tab.row(name)["loss"].split("\n")
        assert mean == f"{wanted.mean:.3f}"
        assert interval == ([] if len(last) < 3 else [f"{wanted.lo:.2f} – {wanted.hi:.2f}"])
    assert [len(losses_of(sinks[name], 1)) for name in ("fp32", "cpu")] == [60, 20]  # windows of 3 points and of 1
    values = [3.0, 2.9, 3.1, 2.95, 3.02, 3.0, 2.97, 3.04, 2.96, 3.01]
    found = tab.run_js("return data.finalLoss(x);", {"step": list(range(90, 100)), "value": [None, *values]})
    wanted = mean_interval(values)
    assert [found[key] for key in ("mean", "lo", "hi", "from")] == pytest.approx([wanted.mean, wanted.lo, wanted.hi, 90])
    assert tab.run_js("return data.finalLoss(x);", {"step": [1, 2], "value": [3.0, 4.0]})["lo"] is None
    assert tab.run_js("return [data.finalLoss(undefined), data.finalLoss(x)];", {"step": [1], "value": [None]}) == [None, None]
    hint = tab.frame.evaluate("document.querySelector('th.col-loss button').title")
    assert hint.startswith("train/loss: the mean over the last 5 % of the points that TensorBoard keeps (at least one)")


@FAST_ALONE
def test_losses_that_differ_by_chance_are_the_same_training(tab: Tab) -> None:
    """Of runs measured apart, the final losses must be further apart than 2 %, and than their scatter."""
    tab.open()
    make = """
        const [a] = (await data.askRuns([])).runs;
        const [base, run] = ["base", "run"].map(id => ({ ...a, id, comparison: null }));
        return data.departureOf({ base, losses: new Map(Object.entries(x)) }, run);"""
    told = [
        tab.run_js(make, {"base": base, "run": other})
        for base, other in (
            ({"mean": 3.0, "lo": 2.9, "hi": 3.1}, {"mean": 3.2, "lo": 3.0, "hi": 3.4}),
            ({"mean": 3.0, "lo": 2.99, "hi": 3.01}, {"mean": 3.2, "lo": 3.19, "hi": 3.21}),
            ({"mean": 3.0, "lo": 2.99, "hi": 3.01}, {"mean": 3.04, "lo": 3.03, "hi": 3.05}),
            ({"mean": 3.0, "lo": None, "hi": None}, {"mean": 3.2, "lo": 3.19, "hi": 3.21}),
            (None, {"mean": 3.2, "lo": 3.19, "hi": 3.21}),
        )
    ]
    departed = "not the same training: loss 3.200 against 3.000, more than 2 % apart"
    assert told == ["", departed, "", departed, ""]


def test_the_differences_are_those_of_green_torch_compare(tab: Tab, log_dir: Path) -> None:
    """Energy and time against the baseline, with their intervals, as ``green-torch compare runs/fp32 runs/bf16`` has them."""
    tab.open()
    wanted = compare_runs([log_dir / "fp32", log_dir / "bf16"])
    found = tab.run_js("""
        const { runs } = await data.askRuns([]);
        const [base, run] = ["fp32", "bf16"].map(id => runs.find(one => one.id === id));
        return Object.fromEntries(["energy", "time"].map(what => [what, data.against(base, run, what)]));""")
    for quantity in ("energy", "time"):
        difference = getattr(wanted, quantity)("bf16")
        assert difference is not None
        for key in ("estimate", "lo", "hi"):
            assert found[quantity][key] == pytest.approx(getattr(difference, key), rel=1e-7, abs=1e-9)
        assert found[quantity]["distinguishable"] is difference.distinguishable is True
    assert found["energy"]["gained"] == [
        pytest.approx(wanted.energy("bf16").gain_lo),
        pytest.approx(wanted.energy("bf16").gain_hi),
    ]


def test_the_formulas_are_those_of_statistics(tab: Tab) -> None:
    """Intervals, t quantiles and gain ranges of the page and of green_torch.statistics agree to 1e-9."""
    tab.open()
    noise = random.Random(1)
    series = []
    for n in (2, 3, 7, 8, 20, 200):
        values = [noise.gauss(0, 1)]
        while len(values) < n:
            values.append(0.7 * values[-1] * (n > 7) + noise.gauss(3, 1))
        series.append(values)
    found = tab.run_js("return x.map(values => stats.meanInterval(values));", series)
    for values, own in zip(series, found, strict=True):
        wanted = mean_interval(values)
        assert [own[key] for key in ("mean", "lo", "hi", "nEffective")] == pytest.approx(
            [wanted.mean, wanted.lo, wanted.hi, wanted.n_effective], rel=1e-9, abs=1e-9
        )
    apart = [[math.exp(0.01 * value) for value in values] for values in series]
    for a, b in itertools.pairwise(apart):
        other, own = unpaired_difference(a, b), tab.run_js("return stats.difference(x[0], x[1]);", [a, b])
        assert [own[key] for key in ("estimate", "lo", "hi")] == pytest.approx([other.estimate, other.lo, other.hi], rel=1e-9)
    asked = [(p, dof) for p in (0.6, 0.95, 0.975, 0.9975) for dof in (1, 1.5, 3, 17.3, 120, 5000)]
    assert tab.run_js("return x.map(([p, dof]) => stats.tQuantile(p, dof));", asked) == pytest.approx(
        [t_quantile(*one) for one in asked], rel=1e-9
    )
    a, b = {"gpu0": 300.0, "cpu": 90.0, "dram": 20.0}, {"gpu0": 200.0, "cpu": 95.0, "dram": 20.0}
    for stated in ((0.05, 0.1, 0.2), (0.05, None, None), (None, None, None)):
        errors = dict(zip(a, stated, strict=True))
        wanted = gain_range(a, b, errors)
        own = tab.run_js("return stats.gainRange(x);", [[a[k], b[k], errors[k]] for k in a])
        assert own == (None if wanted is None else pytest.approx(wanted))
        assert (wanted is None) == (not any(stated))


def compared(n_pairs: int, **more: Any) -> tuple[Comparison, dict[str, dict[str, Any]]]:
    """A comparison of two variants, bounds and two sensors included, and what its workers tell the dashboard of each."""
    noise = random.Random(n_pairs)
    told, results = {}, []
    for place, (name, time_s, power_w) in enumerate((("fp32", 0.4, 300.0), ("bf16", 0.38, 297.0))):
        blocks = []
        for number in range(n_pairs):
            duration_s = 4 * time_s * math.exp(noise.gauss(0, 0.01)) * (1 + 0.002 * number)
            energy_j = duration_s * power_w
            blocks.append(
                Block(
                    round=number,
                    position=(number + place) % 2,
                    n_steps=4,
                    duration_s=duration_s,
                    energy_j=energy_j,
                    energy_lo_j=energy_j * 0.999,
                    energy_hi_j=energy_j * 1.001,
                    emissions_g=energy_j * 1e-5,
                    model_flops=None,
                    hardware_flops=None,
                    capacity_flops=None,
                    tokens=4 * TOKENS,
                    samples=None,
                    loss=more.get("loss", {}).get(name, 3.0),
                    domains_j={"gpu0": energy_j * 0.8, "cpu": energy_j * (0.15 + 0.01 * place), "dram": energy_j * 0.05},
                )
            )
            if (name, number) == ("bf16", more.get("failed")):  # as a worker tells of a block in which a meter failed
                blocks[-1] = replace(
                    blocks[-1],
                    energy_j=None,
                    energy_lo_j=None,
                    energy_hi_j=None,
                    emissions_g=None,
                    domains_j={},
                    flags=("meter_failed:gpu0",),
                )
        results.append(VariantResult(parse_variant(name), tuple(blocks), manifest=replace(MANIFEST, domains=SENSORS), ran=name))
        told[name] = {
            "id": f"comparison-{n_pairs}",
            "confidence": 0.95,
            "looking": bool(more.get("until")),
            "loss_tolerance": 0.02,
            "ran": name,
            "settings": name,
            "built_in": True,
            "blocks": [plain(block) for block in blocks],
        }
    return Comparison(tuple(results), 4, 0.95, 0.02, until=more.get("until")), told


SENSORS = tuple(
    replace(MANIFEST.domains[0], name=name, device=name, gain_error=error)
    for name, error in (("gpu0", 0.05), ("cpu", 0.02), ("dram", None))
)


@pytest.mark.parametrize(
    ("n_pairs", "until", "failed"), [(1, None, None), (5, None, None), (8, None, 3), (12, 0.01, None), (40, None, None)]
)
def test_blocks_of_one_comparison_are_paired_as_the_command_pairs_them(
    tab: Tab, n_pairs: int, until: float | None, failed: int | None
) -> None:
    """Estimate, interval, the meter's and the sensors' part, and the verdict are Comparison.time's and .energy's, to 1e-9."""
    comparison, told = compared(n_pairs, until=until, failed=failed)
    found = tab.open().run_js(
        """
        const { runs } = await data.askRuns([]);
        const one = runs.find(run => run.id === "fp32");
        const [base, run] = ["fp32", "bf16"].map(id => ({ ...one, id, comparison: data.readComparison(x.told[id]), domains: x.domains }));
        return Object.fromEntries(["energy", "time"].map(what => [what, data.against(base, run, what)]));""",
        {"told": told, "domains": [{"name": one.name, "gainError": one.gain_error} for one in SENSORS]},
    )
    for quantity in ("energy", "time"):
        wanted, own = getattr(comparison, quantity)("bf16"), found[quantity]
        assert own["nPairs"] == wanted.n_blocks == n_pairs - (quantity == "energy" and failed is not None)
        ends = [wanted.estimate, wanted.lo, wanted.hi]
        got = [own["estimate"], own["lo"], own["hi"]]
        if quantity == "energy":
            ends += [wanted.instrument_lo, wanted.instrument_hi, wanted.gain_lo, wanted.gain_hi]
            got += [*own["instrument"], *own["gained"]]
        assert [one for one in got if one is not None] == pytest.approx([one for one in ends if one is not None], rel=1e-9)
        assert len([one for one in got if one is not None]) == len([one for one in ends if one is not None])
        assert (own["distinguishable"], own["note"]) == (wanted.distinguishable, wanted.note)


def test_a_departing_loss_is_told_as_the_command_tells_it(tab: Tab) -> None:
    """Of one comparison by its blocks, in the command's words; equal losses are the same training."""
    tab.open()
    for losses in ({}, {"bf16": 3.05}, {"bf16": 3.071}, {"bf16": 2.5}):
        comparison, told = compared(8, loss=losses)
        found = tab.run_js(
            "const [a, b] = x.map(one => ({ comparison: data.readComparison(one) })); return data.departure(a, b);",
            list(told.values()),
        )
        assert re.sub(r"(\.\d*?)0+(?= |,)", r"\1", found).replace(". ", " ").replace(".,", ",") == comparison.departure("bf16")


def test_what_was_found_is_said_in_words(tab: Tab) -> None:
    """A card a run: less energy, can't be told apart, can't be compared and why."""
    cards = tab.open(runs="fp32,bf16,fp32%20again,cpu", base="fp32").texts(".findings .card")
    assert re.match(r"bf16 uses 5\d\.\d % less energy per token than fp32\n+95 % interval −5\d\.\d to −[45]\d\.\d %", cards[0])
    assert cards[2].startswith("cpu can't be compared with fp32") or cards[1].startswith("cpu can't be compared with fp32")
    assert any(card.startswith("fp32 again and fp32 can't be told apart in energy per token") for card in cards)
    row = tab.row("fp32 again")
    assert row["dEnergy"].startswith("can't be told apart")
    assert tab.row("bf16")["dEnergy"].startswith("▾ −5")


def test_what_is_not_comparable_is_refused_until_asked_for(tab: Tab) -> None:
    """Another kind of meter is no comparison; the reason stands below, and a box compares all the same and says so."""
    tab.open()
    assert tab.row("cpu")["dEnergy"] == "not comparable"
    (why,) = tab.texts(".why li")
    assert (
        "cpu: metered are scripted cpu against scripted gpu0; joules are known of cpu by estimated against gpu by counter"
        in why
    )
    tab.frame.get_by_label("Compare all the same").check()
    assert "%" in tab.row("cpu")["dEnergy"] or "×" in tab.row("cpu")["dEnergy"]
    assert any("compared all the same" in text for text in tab.texts(".caution"))
    assert "green.force=1" in tab.page.url


def test_the_table_sorts_by_click_and_key(tab: Tab, sinks: dict[str, MemorySink]) -> None:
    """A column's button sorts up, then down; unknown values stay last; the choice is in the address."""
    tab.open()
    by_energy = sorted(sinks, key=lambda name: summary_of(sinks[name]).energy_per_token_j)
    order = "[...document.querySelectorAll('.comparison tbody tr')].map(e => e.dataset.run)"
    button = tab.frame.get_by_role("button", name="J/token")
    button.focus()
    tab.page.keyboard.press("Enter")
    assert tab.frame.evaluate(order) == by_energy
    assert tab.frame.evaluate("document.querySelector('th.col-energy').getAttribute('aria-sort')") == "ascending"
    assert tab.frame.evaluate("document.activeElement.dataset.key") == "sort energy"
    tab.page.keyboard.press("Enter")
    assert tab.frame.evaluate(order) == by_energy[::-1]
    assert "green.sort=-energy" in tab.page.url


def test_the_table_is_copied_as_csv_and_as_markdown(tab: Tab, sinks: dict[str, MemorySink]) -> None:
    """CSV has the numbers in full with units in the head; Markdown what the table shows."""
    import csv

    tab.open()
    tab.frame.get_by_role("button", name="Copy CSV").click()
    tab.wait("#toast.shown")
    rows = list(csv.DictReader(tab.page.evaluate("navigator.clipboard.readText()").splitlines()))
    assert {row["run"] for row in rows} == set(sinks)
    for row in rows:
        summary = summary_of(sinks[row["run"]])
        assert float(row["energy_per_token_j"]) == pytest.approx(summary.energy_per_token_j)
        assert float(row["energy_kwh"]) == pytest.approx(summary.totals.energy_j / units.J_PER_KWH)
        assert float(row["mfu"]) == pytest.approx(summary.mfu)
    assert {row["energy_difference_note"] == "" for row in rows if row["run"] in {"bf16", "crashed"}} == {True}
    tab.frame.get_by_role("button", name="Copy Markdown").click()
    tab.wait_until("document.getElementById('toast').textContent.includes('Markdown')")
    lines = tab.page.evaluate("navigator.clipboard.readText()").splitlines()
    assert lines[0].startswith("| Run | J/token |")
    assert len(lines) == 2 + len(sinks)


def test_bars_have_whiskers(tab: Tab, sinks: dict[str, MemorySink]) -> None:
    """Energy and emissions per token with a whisker a run, MFU beside; lengths are in proportion, and a reader hears the numbers."""
    tab.open().wait(".charts svg .whisker")
    assert tab.texts(".charts h2") == ["Energy per token", "Emissions per token", "MFU"]
    widths = tab.frame.evaluate(
        "[...document.querySelector('.charts svg').querySelectorAll('rect.bar')].map(e => e.width.baseVal.value)"
    )
    names = tab.frame.evaluate(
        "[...document.querySelector('.charts svg').querySelectorAll('.bar-name title')].map(e => e.textContent)"
    )
    energies = [summary_of(sinks[name]).energy_per_token_j for name in names]
    assert [width / max(widths) for width in widths] == pytest.approx([energy / max(energies) for energy in energies], rel=0.02)
    spoken = tab.frame.evaluate("document.querySelector('.charts svg').getAttribute('aria-label')")
    assert f"fp32 {units.si(summary_of(sinks['fp32']).energy_per_token_j, 'J')}" in spoken


def test_the_numbers_origin_is_told(tab: Tab) -> None:
    """Device, how joules are known, grid with source and basis, PUE with its source, and steps, of each run."""
    told = {text.split("\n")[0]: text for text in tab.open().texts(".sources > li")}
    grid = resolve("FR").at(0)
    assert "scripted gpu0" in told["fp32"]
    assert "counted gpu0" in told["fp32"]
    assert "estimated cpu" in told["cpu"]
    assert f"{grid.g_per_kwh:.1f} gCO2e/kWh, FR · lifecycle, average, {grid.year}" in told["fp32"]
    assert grid.source[:60] in told["fp32"]
    assert "1.2\ngiven by the user" in told["fp32"]
    assert "60 typical; no step excluded" in told["fp32"]


def test_a_plan_is_projected(tab: Tab, sinks: dict[str, MemorySink], log_dir: Path) -> None:
    """kWh, gCO2e, hours and money of a planned run are the run's rates times the plan, on the grid, PUE and price that were set."""
    tab.open(".projection tbody tr", view="savings", plan="1e12", region="US-CA", pue="1.5", price="0.2", runs="fp32,bf16")
    grid = resolve("US-CA").at(0).g_per_kwh
    tab.wait_until("document.querySelector('.controls').innerText.includes('California')")
    rows = tab.table("table.projection:not(.elsewhere)")
    for name in ("fp32", "bf16"):
        summary = summary_of(sinks[name])
        kwh = summary.energy_per_token_j * 1e12 * 1.5 / units.J_PER_KWH
        texts = [cell.split("\n")[0] for cell in rows[name]]
        assert texts[1] == units.si(kwh / 1.5 * 1000, "Wh")
        assert texts[2] == units.si(kwh * 1000, "Wh")
        assert texts[3] == units.grams(kwh * grid)
        assert float(texts[4].replace(",", "")) == pytest.approx(kwh * 0.2, rel=1e-3)
        hours = summary.step_time_s / TOKENS * 1e12 / 3600
        assert float(texts[0].split()[0].replace(",", "")) == pytest.approx(hours, rel=6e-3)
    (card,) = tab.texts(".findings .card")
    assert re.match(r"bf16\n+Would save, against fp32", card)
    assert "money" in card
    saved = compare_runs([log_dir / "fp32", log_dir / "bf16"]).saving("bf16", planned_tokens=1e12)
    assert saved is not None
    ends = [float(end.replace(",", "")) for end in re.findall(r"[\d,]+", card.partition("time")[2])[1:]]
    assert ends == pytest.approx([saved.duration_h.lo, saved.duration_h.hi], rel=6e-3)  # the baseline's interval is in them


def test_sliders_move_the_projection_and_the_address(tab: Tab) -> None:
    """A slider moved by key changes the table and the link; the link brings it back; the region is chosen by its code."""
    tab.open(".projection tbody tr", view="savings", runs="fp32,bf16")
    before = tab.texts("table.projection:not(.elsewhere) tbody tr")
    tab.frame.get_by_label("Planned amount of work, logarithmic").press("ArrowRight")
    after = tab.texts("table.projection:not(.elsewhere) tbody tr")
    assert before != after
    assert "green.plan=" in tab.page.url
    tab.frame.get_by_label("Region", exact=True).fill("aws:us-west-2")
    tab.frame.get_by_label("Region", exact=True).press("Enter")
    tab.wait_until("document.querySelector('.controls').innerText.includes('Oregon')")
    assert "Amazon Web Services" in tab.texts(".controls")[0]
    link = tab.page.url
    shown = tab.texts("table.projection:not(.elsewhere) tbody tr")
    tab.follow(link).wait(".projection tbody tr")
    tab.wait_until("document.querySelector('.controls').innerText.includes('Oregon')")
    assert tab.texts("table.projection:not(.elsewhere) tbody tr") == shown


def test_an_unknown_region_is_told(tab: Tab) -> None:
    """A region that no table has says what to type, and the run's own grid goes on counting."""
    tab.open(".projection tbody tr", view="savings", region="Atlantis")
    tab.wait_until("document.querySelector('.controls').innerText.includes('is in no table: type a country')")
    assert tab.frame.evaluate("document.getElementById('region').getAttribute('aria-invalid')") == "true"
    assert tab.texts("table.projection:not(.elsewhere) tbody tr")


def test_the_timeline_draws_power_bounds_phases_and_grid(tab: Tab, sinks: dict[str, MemorySink]) -> None:
    """A line at 400 W with its band, both evaluations shaded, the grid's 56 g below; by step too."""
    tab.open(".lines svg .line", view="timeline", focus="fp32")
    for selector, count in (
        (".lines svg .band", 1),
        ("[data-key='chart Power'] svg .shade.eval", 2),
    ):  # what comes later is drawn later
        tab.wait_until(f'document.querySelectorAll("{selector}").length === {count}')
    first = next(record for record in sinks["fp32"].records if record.phase is Phase.EVAL)
    title = tab.frame.evaluate("document.querySelector('.shade.eval title').textContent")
    assert title == f"evaluation: {units.si(first.duration_s, 's')}, {units.kwh(first.energy_j)}"
    spoken = tab.frame.evaluate("document.querySelector(\"[data-key='chart Power'] svg\").getAttribute('aria-label')")
    assert re.match(r"Power: gpu0 \(counter\) from \d{3} W to \d{3} W", spoken)
    assert "56.0" in tab.frame.evaluate(
        "document.querySelector(\"[data-key='chart Grid intensity'] svg\").getAttribute('aria-label')"
    ) or "56.04" in tab.frame.evaluate(
        "document.querySelector(\"[data-key='chart Grid intensity'] svg\").getAttribute('aria-label')"
    )
    tab.frame.get_by_role("button", name="by step").click()
    tab.wait_until("[...document.querySelectorAll('.axis-label')].some(e => e.textContent === 'step')")
    assert "green.x=step" in tab.page.url


def test_the_timeline_zooms_by_drag_and_key(tab: Tab) -> None:
    """A drag shows what it spans, arrows move it, 0 shows all again; both charts go together."""
    tab.open(".lines svg .line", view="timeline", focus="fp32", x="step")
    tab.wait_until("[...document.querySelectorAll('.axis-label')].some(e => e.textContent === 'step')")
    tab.page.wait_for_load_state("networkidle")  # a chart that is drawn anew drops the drag
    box = tab.frame.locator("[data-key='chart Power'] .canvas").bounding_box()
    assert box is not None
    tab.page.mouse.move(box["x"] + 300, box["y"] + 100)
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + 500, box["y"] + 100, steps=4)
    tab.page.mouse.up()
    tab.page.wait_for_url(re.compile("green.zoom="), wait_until="commit", timeout=5000)
    zoom = re.search(r"green\.zoom=([\d.]+)%3A([\d.]+)", tab.page.url)
    assert zoom
    left, right = map(float, zoom.groups())
    assert 5 < right - left < 20
    tab.frame.locator("[data-key='chart Power']").focus()
    tab.page.keyboard.press("ArrowRight")
    moved = re.search(r"green\.zoom=([\d.]+)%3A", tab.page.url)
    assert moved
    assert float(moved[1]) > left
    assert tab.frame.evaluate("document.activeElement.dataset.key") == "chart Power"
    tab.page.keyboard.press("0")
    assert "zoom" not in tab.page.url


def test_loss_against_energy(tab: Tab, sinks: dict[str, MemorySink]) -> None:
    """The energy at which each run first reaches a loss is that of the run's own records; by emissions too."""
    tab.open("#target", view="frontier", smooth="0", runs="fp32,bf16", target="3", loss="train/loss")
    rows = {name: cells[0] for name, cells in tab.table("[aria-label='Cost of a loss'] table").items()}
    for name, seed in (("fp32", 1), ("bf16", 2)):
        step = next(step for step, loss in enumerate(losses_of(sinks[name], seed)) if loss <= 3)
        records = [record for record in sinks[name].records if record.step == step]
        totals = [record.totals.energy_j for record in records]
        assert rows[name] in {units.kwh(total) for total in totals}
    assert tab.texts("[aria-label='Cost of a loss'] tbody tr")[0].startswith("bf16")
    tab.frame.get_by_role("button", name="emissions").click()
    tab.wait_until("document.querySelector(\"[aria-label='Cost of a loss']\").innerText.includes('gCO2e')")


def test_the_loss_tag_is_the_users_choice(tab: Tab, log_dir: Path) -> None:
    """Every scalar that is not ours can be picked, and the choice is in the address and in the table."""
    tab.open("#loss option[value='train/loss']", view="frontier")
    assert tab.frame.evaluate("[...document.querySelectorAll('#loss option')].map(e => e.value)") == ["", "train/loss"]
    assert tab.texts("#loss option")[0] == "each run's own"
    assert tab.frame.evaluate("document.getElementById('loss').value") == ""
    tab.frame.get_by_label("Loss", exact=True).select_option("train/loss")
    assert "loss=train%2Floss" in tab.page.url


def test_phases_and_waste(tab: Tab, sinks: dict[str, MemorySink]) -> None:
    """Each phase's joules with their bounds, the run's sum, and the failed run as waste."""
    tab.open(".phases tbody tr", view="phases")
    text = tab.texts(".phases")[0]
    for name in ("fp32", "crashed"):
        totals = summary_of(sinks[name]).totals
        for phase in totals.phases:
            if phase.energy_j:
                assert units.kwh(phase.energy_j) in text
        assert units.kwh(totals.energy_j) in text
    train = summary_of(sinks["fp32"]).totals.phase("train")
    assert units.kwh(train.energy_hi_j) in text
    waste = tab.texts(".panel")[1]
    assert re.search(
        rf"crashed\s+failed: all that the run used\s+{re.escape(units.kwh(summary_of(sinks['crashed']).totals.energy_j))}",
        waste,
    )


def test_what_was_put_off_tells_planned_and_realised_saving(tab: Tab) -> None:
    """With baseline, slack, method, zone and source; figures of another grid don't tell what was saved, and the page says so."""
    tab.open(".put-off tbody tr", view="phases")
    policy, waited, planned, realised, against, grid = tab.table(".put-off")["fp32"]
    assert (policy, waited) == ("green-torch wait", "2 h")
    assert planned.split("\n") == ["50.0 %", "101 against 202 gCO2e/kWh"]
    assert realised.startswith("not known\nthe figures since then are of")
    assert against.startswith("starting now\nslack 9 h")
    assert grid.split("\n") == ["GB", "forecast, direct, average, UK NESO"]
    read = """return data.readDeferral({planned_g_per_kwh: 1, planned_baseline_g_per_kwh: 4, realised_g_per_kwh: 3,
        realised_baseline_g_per_kwh: 2, idle_basis: "metered", idle_share: 0.4})"""
    told = tab.run_js(read)
    assert (told["planned"]["saving"], told["realised"]["saving"], told["idle"]) == (
        0.75,
        -0.5,
        {"share": 0.4, "basis": "metered"},
    )


# ── the page ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_runs_and_baseline_are_chosen_and_linked(tab: Tab) -> None:
    """Boxes choose runs, a button the baseline; a link with both shows the same again, also through TensorBoard's other tabs."""
    tab.open()
    tab.frame.get_by_role("checkbox", name="cpu").uncheck()
    tab.frame.get_by_role("button", name="Use bf16 as the baseline").focus()
    tab.page.keyboard.press("Enter")
    assert set(tab.frame.evaluate("[...document.querySelectorAll('.comparison tbody tr')].map(e => e.dataset.run)")) == {
        "fp32",
        "bf16",
        "fp32 again",
        "crashed",
    }
    assert "baseline" in tab.row("bf16")["run"]
    assert "▴" in tab.row("fp32")["dEnergy"]
    link = tab.page.url
    assert "green.base=bf16" in link
    tab.follow(link).wait(".comparison tbody tr")
    assert "baseline" in tab.row("bf16")["run"]
    assert tab.row("cpu") == {}
    tab.page.evaluate("location.hash = location.hash.replace('#green', '#green&green.view=phases')")
    tab.wait(".phases tbody tr")


def test_no_run_ticked_says_so(tab: Tab) -> None:
    """Unticking all leaves a word on what to do."""
    tab.open()
    tab.frame.get_by_role("button", name="None").click()
    assert "Tick one or more" in tab.texts(".empty")[0]


def test_views_are_tabs_for_the_keyboard(tab: Tab) -> None:
    """Arrows go from view to view, and each is announced as a tab."""
    tab.open()
    tab.frame.get_by_role("tab", name="Compare").focus()
    for name, selector in (
        ("Savings", ".controls"),
        ("Timeline", ".lines"),
        ("Loss vs energy", "#smooth"),
        ("Phases", ".phases"),
        ("Compare", ".comparison"),
    ):
        tab.page.keyboard.press("ArrowRight")
        tab.wait(selector)
        assert tab.frame.evaluate("document.activeElement.textContent") == name
        assert tab.frame.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"


@FAST_ALONE
def test_the_time_axis_has_round_times(tab: Tab) -> None:
    """Ticks are whole seconds, minutes, hours or days, a handful of them, within the range."""
    tab.open()
    for span_s in (0.4, 3, 40, 77, 300, 4_000, 30_000, 200_000, 3e6):
        found = tab.run_js("return charts.timeTicks(0.1 * x, x, 5);", span_s)
        assert 3 <= len(found) <= 8
        assert min(found) >= 0.1 * span_s - 1e-9
        assert max(found) <= span_s + 1e-9
        words = tab.run_js("return x.map(format.clock);", found)
        assert all(len(word.split()) <= 4 and "." not in word for word in words if span_s > 20), words


@FAST_ALONE
def test_everything_to_press_has_a_name(tab: Tab) -> None:
    """In every view each control and each picture has a name for a screen reader."""
    for view, drawn in DRAWN.items():
        tab.open(drawn, view=view)
        unnamed = tab.frame.evaluate(
            """[...document.querySelectorAll("button, input, select, svg[role=img], [role=group], [role=region]")]
                .filter(e => e.checkVisibility())
                .filter(e => !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length && [...e.labels].some(l => l.textContent.trim())))
                .map(e => e.outerHTML.slice(0, 120))"""
        )
        assert unnamed == []


@FAST_ALONE
@pytest.mark.parametrize("dark", [False, True])
def test_dark_mode_is_followed(tab: Tab, dark: bool) -> None:
    """The page is light or dark as TensorBoard is, with text that can be read on it, and turns with it."""
    tab.open()
    tab.page.evaluate(
        "theme => localStorage.setItem('_tb_global_settings', JSON.stringify({ theme }))", "dark" if dark else "light"
    )
    tab.follow(tab.page.url).wait(".comparison")

    def contrast() -> tuple[float, float]:
        colours = tab.frame.evaluate("['color', 'backgroundColor'].map(key => getComputedStyle(document.body)[key])")

        def luminance(colour: str) -> float:
            red, green, blue = (
                (c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4)
                for c in map(float, re.findall(r"[\d.]+", colour)[:3])
            )
            return 0.2126 * red + 0.7152 * green + 0.0722 * blue

        text, ground = map(luminance, colours)
        return (max(text, ground) + 0.05) / (min(text, ground) + 0.05), ground

    ratio, ground = contrast()
    assert ratio > 7
    assert (ground < 0.2) is dark
    tab.page.evaluate("localStorage.clear()")
    tab.page.evaluate("document.body.classList.toggle('dark-mode')")
    tab.wait_until(f"document.documentElement.classList.contains('dark') === {str(not dark).lower()}")


@FAST_ALONE
@pytest.mark.parametrize("width", [360, 500, 1000, 1280, 1440])
def test_a_narrow_window_needs_no_sideways_scrolling(tab: Tab, width: int) -> None:
    """In every view the page fits its window, and so does every table: columns fold, and no figure of the comparison is lost."""
    tab.page.set_viewport_size({"width": width, "height": 800})
    for view, drawn in DRAWN.items():
        tab.open(drawn, view=view, runs="fp32,bf16,fp32%20again")
        tab.wait_until("!document.querySelector('#view').innerText.includes('…')")
        assert tab.frame.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), view
        hidden = (
            "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.className)"
        )
        assert tab.frame.evaluate(hidden) == [], view
    tab.open()
    (whole,) = tab.texts(".comparison")
    figures = (cell.split("\n")[0] for cell in tab.row("bf16").values())
    assert [figure for figure in figures if figure not in whole] == []
    tab.page.set_viewport_size({"width": 1600, "height": 1000})


# ── other directories ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[Callable[..., Tab]]:
    """Opens the tab over another TensorBoard."""
    pages = []

    def open_page(address: str, wanted: str = "", **settings: str) -> Tab:
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        pages.append(page)
        return Tab(page, address).open(wanted, **settings)

    yield open_page
    for page in pages:
        page.close()


def test_without_a_run_it_says_what_to_do(tmp_path: Path, open_tab: Callable[..., Tab]) -> None:
    """An empty directory shows the lines to type; a run that appears later is shown without touching the page."""
    with tensorboard(tmp_path) as address:
        tab = open_tab(address, ".empty")
        tab.wait_until("document.querySelector('.empty h2').textContent === 'No runs yet'")
        assert "green_torch.track(model" in tab.texts(".snippets")[0]
        write_run(tmp_path / "first", n_steps=10)
        tab.wait(".comparison tbody tr")
        assert "Log a second run beside it" in tab.texts(".findings")[0]
        assert tab.row("first")["dEnergy"] == "baseline"


def test_a_run_that_goes_on_is_updated_in_place(tmp_path: Path, open_tab: Callable[..., Tab]) -> None:
    """While a run writes, the table follows it, by TensorBoard's reload button and by itself; the page is not loaded again."""
    writer = SummaryWriter(str(tmp_path / "live"))
    sink = TensorBoardSink(writer)
    sink.write(MANIFEST)
    now_ns = time.time_ns()

    def record(step: int) -> None:
        sink.write(make_record(step, time_unix_ns=now_ns + step))
        writer.flush()

    for step in (1, 2):
        record(step)
    with tensorboard(tmp_path) as address:
        wait_for_runs(address, 1, ended=False)
        tab = open_tab(address)
        assert "running" in tab.row("live")["run"]
        assert tab.row("live")["kwh"] == units.kwh(60.0)
        tab.frame.evaluate("window.mark = 1")
        for step in (3, 4):
            record(step)
        until = time.monotonic() + 20
        while ask(address, "runs")["runs"][0]["snapshot"]["last_step"] != 4:  # TensorBoard's own reading
            assert time.monotonic() < until
            time.sleep(0.1)
        tab.page.locator("button.reload-button").click()
        tab.wait_until(
            f"document.querySelector('.col-kwh ~ *, .comparison').innerText && document.querySelector('td.col-kwh').innerText === {units.kwh(120.0)!r}",
            timeout_s=5,
        )
        for step in range(5, 9):
            record(step)
        sink.write(make_summary(make_record(8)))
        sink.close()
        tab.wait_until(f"document.querySelector('td.col-kwh').innerText === {units.kwh(240.0)!r}", timeout_s=20)
        assert "running" not in tab.row("live")["run"]
        assert tab.frame.evaluate("window.mark") == 1
    writer.close()


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Tab]:
    """A page over odd runs: hostile names, one that went on from a checkpoint, a job, a sub-run, two of one comparison; behind a path."""
    folder = tmp_path_factory.mktemp("odd")
    second = replace(
        MANIFEST,
        segment=2,
        previous_segment=1,
        resumed_from_step=6,
        carried_energy_j=300.0,
        started_unix_ns=MANIFEST.started_unix_ns + 10**12,
    )
    write_records(folder / "resumed", MANIFEST, records_of(range(1, 11)))
    began = time.monotonic()
    for name, label in HOSTILE.items():
        write_run(folder / name, n_steps=10, label=label, evaluations=1)
    write_run(folder / NAMED, n_steps=10)
    job = replace(MANIFEST, world_size=4)
    ranks = JobTotals(world_size=4, reporting=3, ended=0, mfu=0.3, hfu=0.35)
    write_records(folder / "job", job, records_of(range(1, 9), job=ranks))
    theirs = SummaryWriter(str(folder / "mine"))
    write_run(folder / "mine" / "green", n_steps=10)
    for step in range(10):
        theirs.add_scalar("my/objective_loss", 3.0 - step / 10, step)
    theirs.close()
    write_damage(folder / "broken")
    for name, content in DAMAGED.items():
        write_snapshot(folder / name, content)
    for number, tag in enumerate(LOSS_TAGS):
        write_run(folder / f"by {tag.replace('/', ' ')}", loss_tag=tag, loss_scale=1 + number / 5, seed=number, n_steps=10)
    _, told = compared(10, loss={"bf16": 3.1})
    for name in ("fp32", "bf16"):
        write_run(folder / name, n_steps=40, comparison=told[name])
    time.sleep(max(0.0, began + 1.1 - time.monotonic()))  # an event file is named by its second
    write_records(folder / "resumed", second, records_of(range(7, 11), later_ns=2 * 10**12))
    with tensorboard(folder, "--reload_multifile=true", "--path_prefix=/deep/board", prefix="/deep/board") as address:
        wait_for_runs(address, len(HOSTILE) + len(DAMAGED) + len(LOSS_TAGS) + 6, ended=False)
        context = browser.new_context(viewport={"width": 1600, "height": 1000})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        yield Tab(context.new_page(), address)
        context.close()


LOSS_TAGS = ("loss", "train_loss", "my/objective_loss", "train/loss")
NAMED = "<img src=x onerror=alert(1)>&\"'"


DAMAGED = {
    "half": b'{"schema": 1, "manif',
    "a list": b"[1, 2]",
    "later": b'{"schema": 99, "manifest": {}}',
    "odd shapes": b'{"schema": 1, "manifest": 3, "blocks": {"a": 1}, "phases": [[1], null], "totals": "x", "summary": []}',
}


def records_of(steps: range, *, later_ns: int = 0, job: JobTotals | None = None) -> Iterator[StepRecord]:
    """Records of one segment; ``job``'s ranks each use and do what this one does."""
    for step in steps:
        record = make_record(step)
        whole = job and replace(job, energy_j=90.0 * step, emissions_g=0.003 * step, tokens=3 * 8192 * step)
        yield replace(record, time_unix_ns=record.time_unix_ns + later_ns, job=whole)


def test_behind_a_path_prefix(odd: Tab) -> None:
    """Under ``--path_prefix`` every request goes below it."""
    odd.open(runs="job")
    assert "job" in odd.row("job")["run"]
    ours = [url for url in odd.asked if "/plugin/green/" in url]
    assert ours
    assert all(url.startswith(f"{odd.address}/data/plugin/green/") for url in ours)


def test_a_run_may_be_called_anything(odd: Tab) -> None:
    """Markup, quotes, 10,000 characters and right-to-left text stay text in every view, and in what is copied."""
    runs = ",".join(quote(name, safe="") for name in (*HOSTILE, NAMED))
    for view in ("savings", "timeline", "frontier", "phases", "compare"):
        odd.open(DRAWN[view], view=view, runs=runs)
        assert odd.frame.evaluate("document.querySelectorAll('img, script:not([type=module])').length") == 0
        assert odd.frame.evaluate("document.title") == "Green"
        assert odd.frame.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), view
        assert [text for text in odd.complaints if "Three.js" not in text and "/font-roboto/" not in text] == []
    names = odd.texts(".comparison tbody .name")
    assert HOSTILE["markup"] in names
    assert HOSTILE["quotes"] in names
    assert any(name.startswith("x" * 100) for name in names)
    odd.frame.get_by_role("button", name="Copy CSV").click()
    odd.wait("#toast.shown")
    copied = odd.page.evaluate("navigator.clipboard.readText()")
    assert '"""\'`${1}\\ | * _ =cmd()"' in copied
    odd.open(runs=quote(NAMED, safe=""))
    assert odd.texts(".comparison tbody .name") == [NAMED]


def test_runs_of_one_comparison_are_shown_as_the_command_shows_them(odd: Tab) -> None:
    """The card, the table and the savings go by pairs of blocks; a loss that departs takes the saving away, and its colour."""
    comparison, _ = compared(10, loss={"bf16": 3.1})
    energy, base = comparison.energy("bf16"), comparison.baseline
    assert energy is not None
    assert energy.lo is not None
    (card,) = odd.open(runs="fp32,bf16", base="fp32").texts(".findings .card")
    assert "10 pairs of blocks" in card
    assert f"bf16 took {-100 * energy.estimate:.1f} % less energy per token than fp32, in another training: no saving" in card
    assert "not the same training: loss 3.100 against 3.000, more than 2 % apart" in card
    row = odd.row("bf16")
    assert row["dEnergy"].split("\n")[0] == f"−{-100 * energy.estimate:.1f} %"
    assert odd.texts(".findings .card.even") == [card]
    assert odd.texts(".card .caution") == ["not the same training: loss 3.100 against 3.000, more than 2 % apart"]
    assert odd.texts(".good, .bad, .card strong") == []
    assert odd.row("fp32")["energy"].split("\n")[0] == units.si(base.energy_per_token_j, "J")
    assert "Measured in turn by one comparison" in odd.texts(".comparison ~ .note, .holds-table .note")[0]
    assert "40 in 10 blocks of one comparison" in odd.texts(".sources > li")[0]
    (card,) = odd.open(".findings .card", view="savings", runs="fp32,bf16", base="fp32").texts(".findings .card")
    assert "no saving is told" in card
    assert "not the same training" in card


def test_runs_measured_apart_whose_losses_depart_save_nothing(odd: Tab) -> None:
    """Of runs that no comparison made, too: their own final losses tell that they are not the same training."""
    odd.open(".findings .card.refused", view="savings", runs="by loss,by train loss", base="by loss")
    (card,) = odd.texts(".findings .card")
    assert re.match(r"by train loss: no saving is told\n+not the same training: loss .* by train/loss and loss$", card)


def test_work_done_again_is_waste(odd: Tab) -> None:
    """Of a run that went on from a checkpoint, the energy of the steps after it stands as waste, and earlier segments in its total."""
    odd.open(".phases tbody tr", view="phases", runs="resumed")
    odd.wait_until(f"document.body.innerText.includes({units.kwh(120.0)!r})")
    assert "done again: steps after 6" in odd.texts(".panel")[1]
    odd.open(runs="resumed")
    assert odd.row("resumed")["kwh"] == units.kwh(30.0 * 10 + 300.0)


def test_a_job_of_several_ranks_is_shown_whole(odd: Tab) -> None:
    """Rank zero's run shows the job: its energy, its tokens a second, its MFU, how many ranks report, and what is rank zero's alone."""
    odd.open(runs="job")
    row = odd.row("job")
    assert row["kwh"] == units.kwh(720.0)
    assert row["grams"] == units.grams(0.024)
    assert row["speed"] == units.si(3 * 8192 / 0.1, "")
    assert row["energy"].split("\n")[0] == units.si(30.0 / 8192, "J")
    assert row["mfu"].split("\n")[0] == "30.0 %"
    assert "3 of 4 ranks report" in odd.texts(".sources")[0]
    assert "intervals, memory and the joules by device are rank zero's" in odd.texts(".sources")[0]
    assert "MFU and HFU" in odd.texts(".charts h2")
    odd.wait(".charts svg .bar.faint")
    spoken = odd.frame.evaluate("[...document.querySelectorAll('.charts svg')].at(-1).getAttribute('aria-label')")
    assert spoken == "MFU and HFU: bf16 · job 30.0 % and 35.0 %"
    widths = odd.frame.evaluate(
        "[...document.querySelectorAll('.charts .panel:last-child rect.bar')].map(e => e.width.baseVal.value)"
    )
    assert widths[0] / widths[1] == pytest.approx(30 / 35, rel=0.02)
    (text,) = odd.open(DRAWN["phases"], view="phases", runs="job").texts(".phases")
    assert re.search(rf"rank 0\s+\S+ \w?s\s+{units.kwh(240.0)}", text)
    assert re.search(rf"job, 3 ranks\s+{units.kwh(720.0)}", text)
    odd.open(DRAWN["timeline"], view="timeline", runs="job")
    assert "all ranks together" in odd.texts(".legend")[0]
    assert "Lines by device and phases are rank zero's" in odd.texts(".panel .note")[0]


def test_what_cannot_be_read_is_told_and_breaks_nothing(odd: Tab) -> None:
    """Damaged snapshots are named with what is wrong, runs of others are counted, and every view shows the rest; odd shapes read unknown."""
    odd.open(runs="job,odd%20shapes")
    assert set(odd.texts(".comparison tbody .name")) == {"bf16 · job", "odd shapes"}
    assert odd.row("odd shapes")["energy"].startswith("–")
    (problems,) = odd.frame.evaluate("[...document.querySelectorAll('.broken')].map(e => e.textContent)")
    assert problems.startswith("3 can't be read")
    assert "half" in problems
    assert "no JSON" in problems
    assert "its snapshot is of version 99, newer than this page" in problems
    assert re.match(r"15 runs of (19|2[0-3]) in TensorBoard", odd.texts(".status")[0])
    for view in ("savings", "phases", "compare"):
        odd.open(".view > *", view=view, runs="job,odd%20shapes")
    odd.open(".lines svg .line", view="timeline", focus="job", runs="job,odd%20shapes")
    assert [text for text in odd.complaints if "Three.js" not in text and "/font-roboto/" not in text] == []


def test_each_run_has_its_own_loss_tag(odd: Tab) -> None:
    """Runs that name their loss differently each show it, named; tags that are no loss come last in the menu."""
    names = {f"by {tag.replace('/', ' ')}": tag for tag in LOSS_TAGS}
    odd.open(runs=",".join(map(quote, names)))
    shown = "[...document.querySelectorAll('.comparison tbody tr')].map(e => [e.dataset.run, e.querySelector('.col-loss').innerText])"
    is_told = "([run, told]) => /^\\d\\.\\d+\\s/.test(told) && told.endsWith(tags[run])"
    odd.wait_until(f"(tags => {shown}.length === 4 && {shown}.every({is_told}))({json.dumps(names)})")
    odd.open("[aria-label='Cost of a loss'] tbody tr:nth-child(4)", view="frontier", runs=",".join(map(quote, names)))
    assert odd.texts("#loss option") == ["each run's own", *sorted(LOSS_TAGS)]
    assert "Each run by its own of loss, " in odd.texts("[aria-label='Views'] ~ *, main")[-1]
    lines = [["val/loss", "loss", "accuracy", "train/loss"], ["lr", "my/loss_b"], ["lr"]]
    assert odd.run_js("return x.map(data.likelyLoss);", lines) == ["train/loss", "my/loss_b", ""]
    assert odd.run_js("return data.lossesFirst(x);", ["a", "loss", "val/Loss", "b"]) == ["loss", "val/Loss", "a", "b"]


def test_many_that_cannot_be_compared_are_one_line(odd: Tab) -> None:
    """Two have a card each; three are a line that unfolds to their cards, and the others' cards stand before it."""
    odd.open(".findings > .card.refused", runs=",".join(map(quote, ("by loss", "by train_loss", "job"))), base="job")
    assert len(odd.texts(".findings > .card.refused")) == 2
    odd.open(".refusals", runs=",".join(map(quote, ("by loss", "by train_loss", "fp32", "job"))), base="job")
    assert re.match(r"3 runs can't be compared with bf16", odd.texts(".refusals summary")[0])
    assert odd.frame.get_by_text("can't be compared with").locator("visible=true").count() == 1
    odd.frame.locator(".refusals summary").click()
    assert len([text for text in odd.texts(".refusals .card") if "can't be compared with" in text]) == 3


def test_loss_of_the_run_above_is_found(odd: Tab) -> None:
    """Where ours had to be the sub-run ``green``, the loss in the run above is offered and drawn."""
    odd.open("#target", view="frontier", loss="my/objective_loss", smooth="0", target="2.5", runs="mine%2Fgreen")
    odd.wait("[aria-label='Cost of a loss'] tbody tr")
    assert re.search(r"green\s+\S+ m?Wh", odd.texts("[aria-label='Cost of a loss'] tbody tr")[0])


def test_every_view_draws_a_hundred_runs(tmp_path: Path, open_tab: Callable[..., Tab]) -> None:
    """The latest eight are ticked at first; all hundred fit into a link, and into every view. benchmarks/green_tab.py times longer ones."""
    write_many(tmp_path, runs=100, points=12)
    with tensorboard(tmp_path, "--load_fast=true") as address:
        wait_for_runs(address, 100)
        tab = open_tab(address)
        assert len(tab.texts(".comparison tbody tr")) == 8
        assert tab.texts(".runs .count") == ["8 of 100"]
        tab.frame.get_by_role("button", name="All", exact=True).click()
        tab.wait(".comparison tbody tr:nth-child(100)").wait(".charts svg rect:nth-of-type(100)")
        for view, name in NAMES.items():
            tab.frame.get_by_role("tab", name=name).click()
            tab.wait(DRAWN[view])
        assert len(tab.frame.query_selector_all(".phases tbody")) == 60  # the rest is told below
        tab.frame.get_by_role("tab", name=NAMES["frontier"]).click()
        tab.wait("[aria-label='Cost of a loss'] tbody tr:nth-child(100)")
        assert len(tab.frame.query_selector_all(".lines svg .line")) == 100
        assert "each curve is drawn by 250 of its points" in tab.texts(".panel .note")[0]
        asked = [url for url in tab.asked if "/scalars?" in url]
        assert len(asked) < 20  # many runs at a time
        assert tab.complaints == []


def test_the_slow_loader_shows_progress(tmp_path: Path, open_tab: Callable[..., Tab]) -> None:
    """While the slow loader reads, the page already shows the runs that it has, how many there are, and that more may come."""
    write_many(tmp_path, runs=8, points=3_000)
    with tensorboard(tmp_path, "--load_fast=false") as address:
        tab = open_tab(address)
        (status,) = tab.texts(".status")
        before = int(status.split()[0])
        assert before < 8
        tab.wait_until(f"parseInt(document.querySelector('.status').textContent) > {before}", timeout_s=60)
