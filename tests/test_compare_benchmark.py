"""The page of ``benchmarks/compare_gpt.py``: what it says of the usual claims, from comparisons of known outcome."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import compare_gpt
from compare_gpt import EMULATED_BF16, NATIVE_BF16, QUICK, page, usual

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
    assert "bf16+flash: 1.25 × (1.2" in reading
    assert "the speed of bf16, told apart" in reading
    base, *_ = three().results
    assert row(told(replace(three(), results=(base,))), "flash")[2] == "flash did not run"


@pytest.mark.parametrize(
    ("gigabytes", "times", "reading"),
    [(100.0, "2.50 ×", "holds"), (20.0, "12.5 ×", "more than claimed"), (200.0, "1.25 ×", "does not hold here")],
)
def test_memory_traffic_that_was_counted(gigabytes, times, reading):
    """Where the blocks carry it, its ratio stands with its interval and is judged; blocks move a little from one to the next."""
    base, plain, own = three().results

    def moving(one, mean):
        each = (0.99, 1.0, 1.01, 1.0)
        return replace(
            one,
            blocks=tuple(
                replace(block, memory_traffic_bytes=mean * 1e9 * part) for block, part in zip(one.blocks, each, strict=True)
            ),
        )

    found = replace(three(), results=(base, moving(plain, 250.0), moving(own, gigabytes)))
    _, measured, told_reading = row(told(found), "flash")
    assert measured.startswith(f"bf16+flash: {times} (")
    assert "25.0 GB →" in measured
    assert told_reading.startswith(f"{reading}; bf16+flash: 1.25 ×")


@pytest.mark.parametrize(
    ("mfu", "same", "reading"),
    [
        (0.9, True, "holds: from fp32's 10.0 % to 90.0 % (bf16)"),
        (0.05, True, "does not hold here: from fp32's 10.0 % to 5.00 % (bf16)"),
        (0.9, False, "nothing to rank from fp32's 10.0 %"),
    ],
)
def test_only_mfus_over_the_same_peaks_are_ranked(mfu, same, reading):
    """A high MFU of the baseline, or one over other peaks, is no rise."""
    base, plain, _ = three().results
    manifest = replace(plain.manifest, peaks=base.manifest.peaks) if same else plain.manifest
    base, plain = (
        replace(one, blocks=tuple(replace(block, model_flops=share * block.capacity_flops) for block in one.blocks))
        for one, share in ((base, 0.1), (replace(plain, manifest=manifest), mfu))
    )
    assert row(told(replace(three(), results=(base, plain))), "MFU rises")[2].startswith(reading)


def with_option(name: str, times: list[float], **fields: object) -> Comparison:
    """BF16 with flash attention, and the same with one more option."""
    return replace(three(), results=(*three().results, result(f"bf16+flash+{name}", times, method=Method.COUNTER, **fields)))


@pytest.mark.parametrize(
    ("flops", "mebibytes", "reading"), [(1.3e11, 100, "holds"), (1.3e11, 300, "does not hold in all of it")]
)
def test_checkpointing_is_judged_by_all_that_is_claimed(flops, mebibytes, reading):
    """MFU falls, HFU rises and memory falls, beside the same variant without it."""
    found = with_option("checkpoint", [0.5, 0.51, 0.49, 0.5])
    *others, plain, own = found.results
    plain, own = (
        replace(
            one, blocks=tuple(replace(block, hardware_flops=work, peak_memory_bytes=memory * 2**20) for block in one.blocks)
        )
        for one, work, memory in ((plain, 1e11, 200), (own, flops, mebibytes))
    )
    _, measured, told_reading = row(told(replace(found, results=(*others, plain, own))), "checkpointing")
    assert measured.startswith("bf16+flash+checkpoint against bf16+flash: MFU ")
    assert "200 MiB →" in measured
    assert told_reading == reading
    assert row(told(three()), "checkpointing")[1] == "not measured"


@pytest.mark.parametrize(
    ("times", "reading"),
    [([0.2, 0.21, 0.19, 0.2], "holds"), ([0.4, 0.42, 0.38, 0.4], "can't be told apart"), (BASE, "does not hold here")],
)
def test_compiling_is_judged_against_the_same_without_it(times, reading):
    """In their own pairs of blocks, not against FP32."""
    _, measured, told_reading = row(told(with_option("compile", times)), "compiling")
    assert measured.startswith("bf16+flash+compile: ")
    assert told_reading == reading


def test_a_cpu_without_bf16_says_so(monkeypatch):
    """Whether BF16 is the CPU's own or emulated stands above its figures, and decides what is measured."""
    for own, told_of in (
        ("AVX512-BF16", "BF16 matmuls of its own (AVX512-BF16)"),
        ("AVX512", "BF16 is emulated"),
        ("", "emulated"),
    ):
        monkeypatch.setattr(compare_gpt, "instructions", lambda own=own: own)
        monkeypatch.setattr(compare_gpt.torch.cuda, "is_available", lambda: False)
        assert told_of in told(three())
    assert "bf16+flash" in usual(gpu=False, native_bf16=True).variants
    assert "bf16+flash" not in usual(gpu=False, native_bf16=False).variants


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
    for design in (usual(gpu=True, native_bf16=True), usual(gpu=False, native_bf16=True), QUICK):
        assert set(design.sizes) <= SIZES.keys()
        assert parse_variant(design.variants.split(",")[0]).name == "fp32"
    for names in (EMULATED_BF16, NATIVE_BF16):
        assert len({parse_variant(name).name for name in names.split(",")}) == 6
