"""The page of ``benchmarks/compare_gpt.py``: what it says of the usual claims, from comparisons of known outcome."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from compare_gpt import ON_CPU, ON_GPU, QUICK, page, usual

from green_torch.experiment import Comparison, parse_variant
from green_torch.gpt import SIZES
from green_torch.records import Method
from tests.test_cli_compare import BASE, FAST, SAME, SLOW, result, three


def told(comparison: Comparison) -> str:
    return page({"124M": comparison})


def row(text: str, begins: str) -> list[str]:
    """The cells of a table's row."""
    return [
        cell.strip() for cell in next(line for line in text.splitlines() if line.startswith(f"| {begins}")).split("|")[1:-1]
    ]


def test_a_claim_that_holds_is_said_to_hold():
    """Half the time is a speed of 2 with its interval, and holds; joules likewise."""
    text = told(three())
    _, measured, reading = row(text, "BF16 is 2 ×")
    assert measured.startswith("2.00 × (1.9")
    assert reading == "holds"
    assert row(text, "BF16 halves")[2] == "holds"


@pytest.mark.parametrize(
    ("times", "reading"),
    [(SLOW, "does not hold here"), (SAME, "can't be told apart"), ([0.3, 0.31, 0.3, 0.3], "more than claimed")],
)
def test_a_claim_that_does_not_hold_is_said_not_to(times, reading):
    """As it comes: slower, the same, or faster than claimed."""
    comparison = Comparison(
        (result("fp32", BASE, method=Method.COUNTER), result("bf16", times, method=Method.COUNTER)), 10, 0.95, 0.02
    )
    assert row(told(comparison), "BF16 is 2 ×")[2] == reading


def test_another_training_proves_no_claim():
    """A loss that departs takes the claim away."""
    comparison = Comparison((result("fp32", BASE), result("bf16", FAST, loss=4.0)), 10, 0.95, 0.02)
    assert "not the same training" in row(told(comparison), "BF16 is 2 ×")[2]


def test_modelled_power_measures_no_energy():
    """Where joules are modelled no claim about energy is judged."""
    comparison = Comparison((result("fp32", BASE), result("bf16", FAST)), 10, 0.95, 0.02)
    assert row(told(comparison), "BF16 halves")[1:] == ["not measured: power was modelled", "energy follows from time"]
    assert "itself modelled" in told(comparison)


def test_memory_traffic_is_not_measured():
    """Nothing stands in for a counter that was not read; the speed and memory of flash stand beside it, where flash ran."""
    _, measured, reading = row(told(three()), "flash")
    assert measured.startswith("not measured")
    assert "1.25 × the speed of bf16" in reading
    base, *_ = three().results
    assert row(told(replace(three(), results=(base,))), "flash")[2] == "flash did not run"


def test_energy_at_a_target_mfu_is_a_what_if():
    """Joules a token go as 1/MFU at the measured power, and the page says that this is assumed."""
    text = told(three())
    assert "No measurement" in text
    measured, target = row(text, "measured"), row(text, "what if 40")
    energy_mj, mfu, at_target_mj = (float(cell.split()[0]) for cell in (measured[2], measured[1], target[2]))
    assert at_target_mj == pytest.approx(energy_mj * mfu / 40, rel=0.01)


def test_a_variant_that_failed_stands_with_its_reason():
    """In the table, where its figures would be."""
    comparison = three()
    base, fast, _ = comparison.results
    assert row(told(replace(comparison, results=(base, replace(fast, blocks=(), error="does not fit in memory")))), "bf16")[
        1
    ] == ("does not fit in memory")


def test_the_designs_name_what_exists():
    """Sizes and variants of every design are known, on a GPU and on a CPU."""
    for design in (usual(gpu=True), usual(gpu=False), QUICK):
        assert set(design.sizes) <= SIZES.keys()
        assert parse_variant(design.variants.split(",")[0]).name == "fp32"
    for names in (ON_CPU, ON_GPU):
        assert len({parse_variant(name).name for name in names.split(",")}) == 6
