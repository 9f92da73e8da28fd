"""What FP32, TF32, BF16, flash attention, checkpointing and compile cost on a GPT, and what of the usual claims holds here.

``python benchmarks/compare_gpt.py`` (about five minutes on two CPU cores: 10M parameters; on a GPU 124M and 350M). One process a
variant, blocks in turn in random order, paired differences with intervals. Writes ``results/<device>/compare_gpt.*``; ``--quick`` runs a
tiny one and writes nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from report import instructions, table, write

from green_torch.cli.compare import BuiltIn, parse_memory
from green_torch.cli.comparison import difference
from green_torch.cli.console import bounded, count, joules, mebibytes, percent, rounded
from green_torch.experiment import Comparison, Progress, VariantResult, compare
from green_torch.units import kwh, si

# The baseline first. Where BF16 is emulated the options stand on FP32, or every one of them would take minutes a block.
ON_CPU_WITHOUT_BF16 = "fp32,tf32,fp32+flash,fp32+flash+checkpoint,fp32+flash+compile,bf16"
ON_CPU = "fp32,tf32,fp32+flash,bf16,bf16+flash,bf16+flash+checkpoint,bf16+flash+compile"
ON_GPU = "fp32,tf32,bf16,bf16+flash,bf16+flash+checkpoint,bf16+flash+compile"
PLANNED_TOKENS = 10e9
CLAIMED_MFU = (0.40, 0.70)


@dataclass(frozen=True, slots=True)
class Design:
    """How much is measured: blocks of each variant, steps a block (``None``: what fits the seconds), seconds for all blocks."""

    sizes: tuple[str, ...]
    variants: str
    blocks: int
    steps: int | None
    budget_s: float | None
    largest_batch: bool | int


def usual(*, gpu: bool) -> Design:
    """What a device can do in a few minutes."""
    if gpu:
        return Design(("124M", "350M"), ON_GPU, 12, None, 240.0, largest_batch=True)
    variants = ON_CPU if "BF16" in instructions() else ON_CPU_WITHOUT_BF16
    return Design(("10M",), variants, 12, 3, None, largest_batch=False)


QUICK = Design(("1M",), "fp32,fp32+flash", 2, 1, None, largest_batch=False)


# ── the page ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def page(found: dict[str, Comparison]) -> str:
    """The Markdown of all sizes."""
    parts = []
    for size, comparison in found.items():
        parts += [f"## {size} parameters", figures(comparison), notes(comparison), largest(comparison), *claims(comparison)]
    return "\n\n".join(part for part in parts if part)


def figures(comparison: Comparison) -> str:
    """A row a variant."""
    head = [
        "variant", "step", "tokens/s", "energy/token", "power", "MFU", "HFU", "peak memory", "attention kernel", "loss",
        "time against " + comparison.baseline.name, "energy", "the meter's bounds",
    ]  # fmt: skip
    rows = []
    for result in comparison.results:
        if not result.blocks:
            rows.append([result.name, result.error or "nothing measured", *[""] * (len(head) - 2)])
            continue
        other = result is not comparison.baseline
        time, energy = comparison.time(result.name), comparison.energy(result.name)
        modelled = comparison.headline == "time"
        meter = "none"
        if energy and energy.instrument_lo is not None and energy.instrument_hi is not None:
            meter = f"{energy.instrument_lo:+.2%} to {energy.instrument_hi:+.2%}"
        rows.append(
            [
                result.name,
                si(result.step_time_s, "s"),
                count(result.tokens_per_s),
                energy_per_token(result),
                si(result.power_w, "W"),
                percent(result.mfu),
                percent(result.hfu),
                mebibytes(result.peak_memory_bytes),
                ", ".join(result.kernels) or "not seen",
                "none" if result.final_loss is None else f"{result.final_loss:.3f}",
                in_line(difference(time)) if other else "",
                ("follows from time" if modelled else in_line(difference(energy))) if other else "",
                meter if other else "",
            ]
        )
    return table(head, rows)


def notes(comparison: Comparison) -> str:
    """What the figures rest on, and what each variant's reader must know."""
    base = comparison.baseline
    methods = ", ".join(f"{name} {method}" for name, method in base.methods.items()) or "no meter"
    peaks = {(peak.dtype, peak.flop_per_s, peak.basis) for result in comparison.results for peak in result.peaks}
    lines = [
        (f"Energy: {methods}. Intervals: {comparison.confidence:.0%}, for all {comparison.n_compared} together; "
        f"{len(base.blocks)} rounds of blocks of {comparison.steps_per_block} steps, {base.threads} CPU threads a worker."),
        *([] if comparison.headline == "energy" else ["Every joule is modelled here, so energy follows from time, and time is compared."]),
        "Peaks: " + ("; ".join(f"{dtype} {si(rate, 'FLOP/s')}, {basis}" for dtype, rate, basis in sorted(peaks)) or "not known")
        + ". MFUs over different peaks are not ranked.",
    ]  # fmt: skip
    lines += [f"{result.name}: {note}." for result in comparison.results for note in comparison.notes(result.name)]
    lines += [
        f"{one.name} is {why}." for one in comparison.results[1:] if one.blocks and (why := comparison.departure(one.name))
    ]
    lines += [f"Warning: {text}" for text in comparison.warnings]
    return "\n".join(f"- {line}" for line in dict.fromkeys(lines))


def largest(comparison: Comparison) -> str:
    """The largest batch that fits, and what a token costs there."""
    if not comparison.largest:
        return ""
    rows = [
        [
            one.variant.name,
            "none" if one.batch_size is None else f"{'' if one.complete else 'at least '}{one.batch_size}",
            mebibytes(one.peak_memory_bytes),
            f"{mebibytes(one.memory_bytes)} ({one.memory_source})",
            "not measured" if one.result is None else energy_per_token(one.result),
            "not measured" if one.result is None else count(one.result.tokens_per_s),
            one.error or "",
        ]
        for one in comparison.largest
    ]
    return table(["largest batch", "samples", "peak memory", "of", "energy/token", "tokens/s", ""], rows)


def claims(comparison: Comparison) -> list[str]:
    """What is usually claimed, against what was measured; and energy at a target MFU, which is no measurement."""
    rows = [
        ["BF16 is 2 × as fast as FP32", *faster(comparison, "fp32", "bf16")],
        ["BF16 halves the energy of FP32", *cheaper(comparison, "fp32", "bf16")],
        [
            "flash attention moves 2–4 × less memory",
            "not measured: needs the memory counters of NVML's GPM",
            *flash(comparison),
        ],
        ["MFU rises from 40 % to 70 %", *utilization(comparison)],
    ]
    return [
        "What is claimed, and what was measured here:",
        table(["claim", "measured", "reading"], [row for row in rows if len(row) == 3]),
        *what_if(comparison),
    ]


def faster(comparison: Comparison, base: str, other: str) -> tuple[str, str]:
    """The speed of one variant over the baseline's, with its interval."""
    found = comparison.time(other) if ran(comparison, base, other) else None
    if found is None or found.lo is None or found.hi is None:
        return "not measured", "no interval"
    speed = f"{rounded(1 / (1 + found.estimate))} × ({rounded(1 / (1 + found.hi))} to {rounded(1 / (1 + found.lo))})"
    return speed, judged(
        comparison, other, found.distinguishable, holds=1 / (1 + found.hi) <= 2 <= 1 / (1 + found.lo), more=found.hi < -0.5
    )


def cheaper(comparison: Comparison, base: str, other: str) -> tuple[str, str]:
    """The energy of one variant over the baseline's, with its interval."""
    found = comparison.energy(other) if ran(comparison, base, other) else None
    if found is None or found.lo is None or found.hi is None:
        return "not measured", "no interval"
    if comparison.headline == "time":
        return "not measured: power was modelled", "energy follows from time"
    energy = f"{rounded(1 + found.estimate)} × ({rounded(1 + found.lo)} to {rounded(1 + found.hi)})"
    return energy, judged(comparison, other, found.distinguishable, holds=found.lo <= -0.5 <= found.hi, more=found.hi < -0.5)


def judged(comparison: Comparison, other: str, distinguishable: bool, *, holds: bool, more: bool) -> str:
    """A claim's reading: significance first."""
    if comparison.departure(other):
        return comparison.departure(other)
    if not distinguishable:
        return "can't be told apart"
    return "holds" if holds else "more than claimed" if more else "does not hold here"


def flash(comparison: Comparison) -> tuple[str]:
    """What was measured of flash attention: time and peak memory beside the same precision with math attention."""
    base = comparison.baseline
    by_name = {result.name: result for result in comparison.results if result.blocks}
    name = next((name for name in ("fp32+flash", "bf16+flash") if name in by_name), None)
    plain = by_name.get(name.removesuffix("+flash")) if name else None
    if name is None or plain is None or plain.step_time_s is None:
        return ("flash did not run",)
    own = by_name[name]
    if own.kernels != ("flash",):
        return (f"the kernel that ran: {', '.join(own.kernels) or 'not seen'}",)
    told = f"{name}: {rounded(plain.step_time_s / (own.step_time_s or math.nan))} × the speed of {plain.name}"
    memory = f"peak memory {mebibytes(plain.peak_memory_bytes)} → {mebibytes(own.peak_memory_bytes)}"
    apart = comparison.time(name) if plain is base else None
    certain = "" if apart is None else ", told apart" if apart.distinguishable else ", not told apart"
    return (f"{told}{certain}; {memory}",)


def utilization(comparison: Comparison) -> tuple[str, str]:
    """The MFUs seen."""
    known = {result.name: result.mfu for result in comparison.results if result.mfu is not None}
    if not known:
        return "not known: no peak for this device", ""
    shown = ", ".join(f"{name} {percent(mfu)}" for name, mfu in known.items())
    over = {(peak.dtype, peak.flop_per_s) for result in comparison.results for peak in result.peaks}
    best = max(known.values())
    reading = "70 % was reached" if best >= CLAIMED_MFU[1] else f"the highest is {percent(best)}"
    return shown, reading + (", over different peaks" if len(over) > 1 else "")


def what_if(comparison: Comparison) -> list[str]:
    """Energy at a target MFU, the power held at what was measured."""
    known = [
        result
        for result in comparison.results
        if result.mfu and result.energy_per_token_j and result.power_w and not comparison.departure(result.name)
    ]
    if not known:
        return []
    best = min(known, key=lambda result: result.energy_per_token_j or math.inf)
    energy_j, mfu = best.energy_per_token_j or 0.0, best.mfu or 1.0
    rows = [["measured", percent(mfu), joules(energy_j), kwh(energy_j * PLANNED_TOKENS)]]
    for target in CLAIMED_MFU:
        at_target_j = energy_j * mfu / target
        rows.append([f"what if {target:.0%}", percent(target), joules(at_target_j), kwh(at_target_j * PLANNED_TOKENS)])
    return [
        (
            f"What if {best.name}, the cheapest here, ran at another MFU? No measurement: the power is taken to stay at {si(best.power_w, 'W')}"
            f"{' (itself modelled)' if comparison.headline == 'time' else ''}, so "
            f"joules a token go as 1/MFU. Power rises with utilisation, so the true saving would be smaller; from {CLAIMED_MFU[0]:.0%} to "
            f"{CLAIMED_MFU[1]:.0%} it would be at most {1 - CLAIMED_MFU[0] / CLAIMED_MFU[1]:.0%}. IT energy, {count(PLANNED_TOKENS)} tokens, "
            "this device, this model."
        ),
        table([best.name, "MFU", "energy/token", f"{count(PLANNED_TOKENS)} tokens"], rows),
    ]


def ran(comparison: Comparison, *names: str) -> bool:
    """Whether these variants were measured, the first being the baseline."""
    measured = [result.name for result in comparison.results if result.blocks]
    return all(name in measured for name in names) and comparison.baseline.name == names[0]


def energy_per_token(result: VariantResult) -> str:
    """With the bounds of the blocks together, where joules were counted."""
    tokens = sum(block.tokens or 0 for block in result.blocks)
    los = [block.energy_lo_j for block in result.blocks if block.energy_lo_j is not None]
    his = [block.energy_hi_j for block in result.blocks if block.energy_hi_j is not None]
    if not tokens or len(los) < len(result.blocks):
        return si(result.energy_per_token_j, "J")
    return bounded(result.energy_per_token_j, math.fsum(los) / tokens, math.fsum(his) / tokens, joules)


def in_line(text: str) -> str:
    """A cell of several lines in one."""
    return text.replace("\n", " ")


# ── running ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(size: str, design: Design, seed: int) -> Comparison:
    """One size, its progress on stderr."""

    def tell(at: Progress) -> None:
        print(f"\r{size}: {at.stage} {at.variant} {at.done}/{at.total}".ljust(78), end="", file=sys.stderr, flush=True)

    found = compare(
        BuiltIn(size), design.variants.split(","), blocks=design.blocks, steps_per_block=design.steps, budget_s=design.budget_s,
        largest_batch=design.largest_batch, seed=seed, progress=tell,
    )  # fmt: skip
    print(file=sys.stderr)
    return found


def main() -> None:
    """Runs all sizes and writes the page."""
    gpu = torch.cuda.is_available()
    plan = usual(gpu=gpu)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size", default="auto", help=f"1M, 10M, 124M, 350M, several with commas; auto is here {','.join(plan.sizes)}"
    )
    parser.add_argument("--variants", help=f"here {plan.variants}")
    parser.add_argument("--blocks", type=int, help=f"of each variant; here {plan.blocks}")
    parser.add_argument("--steps", type=int, help="a block")
    parser.add_argument("--budget-s", type=float, help="seconds for all blocks of a size, where --steps is not given")
    parser.add_argument("--largest-batch", help='also the largest batch that fits: "device", "4GiB" or "no"')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny one, which writes nothing")
    args = parser.parse_args()
    plan = QUICK if args.quick else plan
    sizes = plan.sizes if args.size == "auto" else tuple(args.size.split(","))
    memory = (
        plan.largest_batch if args.largest_batch is None else args.largest_batch != "no" and parse_memory(args.largest_batch)
    )
    steps = args.steps or (None if args.budget_s else plan.steps)
    design = Design(
        sizes, args.variants or plan.variants, args.blocks or plan.blocks, steps, args.budget_s or plan.budget_s, memory
    )

    found: dict[str, Comparison] = {}
    for size in sizes:
        found[size] = measure(size, design, args.seed)
        if found[size].interrupted:
            break
    body = page(found)
    result: dict[str, Any] = {
        "sizes": {size: comparison.to_dict() for size, comparison in found.items()},
        "what_if": {"assumption": "the power stays as measured", "planned_tokens": PLANNED_TOKENS, "mfu": CLAIMED_MFU},
        "gpm_memory_traffic": None,
    }
    if args.quick or any(comparison.interrupted for comparison in found.values()):
        print(body)
    else:
        write("compare_gpt", "What each way to train a GPT costs", body, result)


if __name__ == "__main__":
    main()
