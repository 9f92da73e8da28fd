"""What FP32, TF32, BF16, flash attention, checkpointing and compile cost on a GPT, and what of the usual claims holds here.

``python benchmarks/compare_gpt.py`` (about ten minutes on two CPU cores: 10M parameters; on a GPU 124M and 350M). One process a
variant, blocks in turn in random order, paired differences with intervals; then the largest batch that fits, with and without
checkpointing. Writes ``results/<device>/compare_gpt.*`` after each of these, so that nothing measured is lost; ``--quick`` runs a tiny
one and writes nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
import traceback
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from report import table, write

from green_torch.cli.compare import BuiltIn, parse_memory
from green_torch.cli.comparison import difference
from green_torch.cli.console import bounded, count, joules, mebibytes, percent, rounded
from green_torch.experiment import Comparison, Progress, VariantResult, compare, largest_batch, parse_variant
from green_torch.processor import instructions
from green_torch.units import kwh, si

if TYPE_CHECKING:
    from green_torch.statistics import Difference

# The baseline first. Where BF16 is emulated the options stand on FP32, or every one of them would take minutes a block.
NATIVE_BF16 = "fp32,tf32,bf16,bf16+flash,bf16+flash+checkpoint,bf16+flash+compile"
EMULATED_BF16 = "fp32,tf32,fp32+flash,fp32+flash+checkpoint,fp32+flash+compile,bf16"
PLANNED_TOKENS = 10e9
CLAIMED_MFU = (0.40, 0.70)


@dataclass(frozen=True, slots=True)
class Design:
    """How much is measured: blocks of each variant, steps a block (``None``: what fits the seconds), seconds for all blocks.

    ``memory_bytes`` is what the largest batch is sought in (``None``: the device's own memory), with and without checkpointing.
    """

    sizes: tuple[str, ...]
    variants: str
    blocks: int
    steps: int | None
    budget_s: float | None
    memory_bytes: int | None
    batch_size: int | None = None  # the workload's own where none is given
    seek_largest: bool = True


def usual(*, gpu: bool, native_bf16: bool) -> Design:
    """What a device can do in about ten minutes."""
    if gpu:
        return Design(("124M", "350M"), NATIVE_BF16, 12, None, 180.0, None)
    if native_bf16:  # 1,024 tokens a step: of the usual 256, casting the weights would take a large share
        return Design(("10M",), NATIVE_BF16, 16, None, 300.0, 2**30, batch_size=4)
    return Design(("10M",), EMULATED_BF16, 16, None, 300.0, 2**30)


QUICK = Design(("1M",), "fp32,fp32+flash", 2, 1, None, None, seek_largest=False)


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
        *bf16_here(comparison),
        (f"Energy: {methods}. Intervals: {comparison.confidence:.0%}, for all {comparison.n_compared} together; "
        f"{len(base.blocks)} rounds of blocks of {comparison.steps_per_block} steps of {count(tokens_a_step(base))} tokens, "
        f"{base.threads} CPU threads a worker."),
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


def tokens_a_step(result: VariantResult) -> float | None:
    """Of the first block; None where nothing was measured."""
    first = next(iter(result.blocks), None)
    return None if first is None or first.tokens is None else first.tokens / first.n_steps


def bf16_here(comparison: Comparison) -> list[str]:
    """Whether this device computes in BF16 or converts to FP32 and back, where any variant asks for it."""
    base = comparison.baseline.manifest
    if base is None or not any("bf16" in result.name for result in comparison.results):
        return []
    if base.device and torch.cuda.is_available():
        return [
            f"{base.device}: BF16 runs on its tensor cores."
            if torch.cuda.get_device_capability() >= (8, 0)
            else "BF16 is emulated."
        ]
    own = instructions()
    return [
        f"The CPU has BF16 matmuls of its own ({own})." if "BF16" in own else "The CPU has no BF16 matmuls: BF16 is emulated."
    ]


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
        ["flash attention moves 2–4 × less memory", *flash(comparison)],
        ["checkpointing lowers MFU, raises HFU, saves memory", *checkpointing(comparison)],
        ["compiling (operator fusion) is faster", *compiling(comparison)],
        ["MFU rises from 40 % to 70 %", *utilization(comparison)],
    ]
    return [
        "What is claimed, and what was measured here (an option against the same without it: 95 % intervals, each for itself):",
        table(["claim", "measured", "reading"], rows),
        *what_if(comparison),
    ]


NO_TRAFFIC = "not measured: it takes a GPU whose NVML has GPM's memory counters (Hopper or later)"


def against(comparison: Comparison, base: str, other: str) -> Difference | None:
    """The time of one variant against another that need not be the baseline, in their own pairs of blocks; an interval of its own."""
    own = {result.name: result for result in comparison.results if result.blocks}
    if base not in own or other not in own:
        return None
    return replace(comparison, results=(own[base], own[other])).time(other)


def traffic(comparison: Comparison, plain: VariantResult, own: VariantResult) -> tuple[str, str]:
    """How many times less goes between the GPU and its memory with an option than without, and whether that is 2 to 4 times."""
    found = replace(comparison, results=(plain, own)).memory_traffic(own.name)
    if found is None:
        return NO_TRAFFIC, ""
    each = [si(one.memory_traffic_per_step_bytes, "B") for one in (plain, own)]
    measured = f"{own.name}: {speed(found)} less than {plain.name}, {each[0]} → {each[1]} a step, by NVML's GPM counters"
    if found.lo is None or found.hi is None:
        return measured, "no interval"
    least, most = 1 / (1 + found.hi), 1 / (1 + found.lo)
    reading = "holds" if most >= 2 and least <= 4 else "more than claimed" if least > 4 else "does not hold here"
    return measured, reading if found.distinguishable else "can't be told apart"


def option(comparison: Comparison, added: str) -> tuple[VariantResult, VariantResult] | None:
    """A variant that ran with an option, such as "+flash" at its end, and the same without it; the first such pair."""
    own = {result.name: result for result in comparison.results if result.blocks}
    name = next((name for name in own if name.endswith(added) and name.removesuffix(added) in own), None)
    return (own[name.removesuffix(added)], own[name]) if name else None


def speed(found: Difference | None) -> str:
    """How many times as fast, with the interval."""
    if found is None:
        return "not measured"
    told = f"{rounded(1 / (1 + found.estimate))} ×"
    if found.lo is None or found.hi is None:
        return told
    return f"{told} ({rounded(1 / (1 + found.hi))} to {rounded(1 / (1 + found.lo))})"


def faster(comparison: Comparison, base: str, other: str) -> tuple[str, str]:
    """The speed of one variant over the baseline's, with its interval."""
    found = comparison.time(other) if ran(comparison, base, other) else None
    if found is None or found.lo is None or found.hi is None:
        return "not measured", "no interval"
    return speed(found), judged(
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


def flash(comparison: Comparison) -> tuple[str, str]:
    """Memory traffic of flash attention, its time and its peak memory, beside the same precision with math attention."""
    found = option(comparison, "+flash")
    if found is None:
        return NO_TRAFFIC, "flash did not run"
    plain, own = found
    if own.kernels != ("flash",):
        return NO_TRAFFIC, f"the kernel that ran: {', '.join(own.kernels) or 'not seen'}"
    measured, reading = traffic(comparison, plain, own)
    apart = against(comparison, plain.name, own.name)
    certain = "told apart" if apart and apart.distinguishable else "not told apart"
    memory = f"peak memory {mebibytes(plain.peak_memory_bytes)} → {mebibytes(own.peak_memory_bytes)}"
    beside = f"{own.name}: {speed(apart)} the speed of {plain.name}, {certain}; {memory}"
    return measured, "; ".join(filter(None, (reading, beside)))


def checkpointing(comparison: Comparison) -> tuple[str, str]:
    """MFU, HFU and memory with and without it at the same batch, which is not what it is for: that is the largest batch."""
    found = option(comparison, "+checkpoint")
    if found is None:
        return "not measured", "checkpointing did not run"
    plain, own = found
    pairs = [(plain.mfu, own.mfu), (own.hfu, plain.hfu), (plain.peak_memory_bytes, own.peak_memory_bytes)]
    known = [more > less for more, less in pairs if more is not None and less is not None]
    measured = (
        f"{own.name} against {plain.name}: MFU {percent(plain.mfu)} → {percent(own.mfu)}, HFU {percent(plain.hfu)} → {percent(own.hfu)}, "
        f"peak memory {mebibytes(plain.peak_memory_bytes)} → {mebibytes(own.peak_memory_bytes)}; "
        f"{speed(against(comparison, plain.name, own.name))} the speed"
    )
    reading = "not all of it is known" if len(known) < len(pairs) else "holds" if all(known) else "does not hold in all of it"
    return measured, reading


def compiling(comparison: Comparison) -> tuple[str, str]:
    """Its speed over the same variant without it, once it is compiled."""
    found = option(comparison, "+compile")
    if found is None:
        return "not measured", "nothing compiled ran"
    plain, own = found
    apart = against(comparison, plain.name, own.name)
    if apart is None or not apart.distinguishable:
        return f"{own.name}: {speed(apart)} the speed of {plain.name}", "can't be told apart"
    return f"{own.name}: {speed(apart)} the speed of {plain.name}", "holds" if apart.estimate < 0 else "does not hold here"


def utilization(comparison: Comparison) -> tuple[str, str]:
    """The MFUs seen: those over the baseline's own peaks can rise above its; over other peaks they are shares of something else."""
    known = {result.name: result.mfu for result in comparison.results if result.mfu is not None}
    if not known:
        return "not known: no peak for this device", ""
    shown = ", ".join(f"{name} {percent(mfu)}" for name, mfu in known.items())
    if (most := max(known.values())) > 1:
        return shown, f"{percent(most)} says that its peak was measured too low: nothing to rank"
    first, *others = (result for result in comparison.results if result.name in known)

    def peaks(result: VariantResult) -> set[tuple[str, float]]:
        return {(peak.dtype, peak.flop_per_s) for peak in result.peaks}

    alike = {result.name: known[result.name] for result in others if peaks(result) == peaks(first)}
    told = f"from {first.name}'s {percent(known[first.name])}"
    if not alike:
        return shown, f"nothing to rank {told}: every other is over other peaks"
    name, best = max(alike.items(), key=lambda item: item[1])
    reading = "holds" if known[first.name] < best and best >= CLAIMED_MFU[1] else "does not hold here"
    return shown, f"{reading}: {told} to {percent(best)} ({name}), of those over the same peaks"


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

    variants = [replace(parse_variant(name), batch_size=design.batch_size) for name in design.variants.split(",")]
    found = compare(
        BuiltIn(size), variants, blocks=design.blocks, steps_per_block=design.steps, budget_s=design.budget_s, seed=seed,
        progress=tell,
    )  # fmt: skip
    print(file=sys.stderr)
    return found


def main() -> None:
    """Runs all sizes and writes the page."""
    gpu = torch.cuda.is_available()
    plan = usual(gpu=gpu, native_bf16="BF16" in instructions())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size", default="auto", help=f"1M, 10M, 124M, 350M, several with commas; auto is here {','.join(plan.sizes)}"
    )
    parser.add_argument("--variants", help=f"here {plan.variants}")
    parser.add_argument("--batch", type=int, help=f"sequences a step; here {plan.batch_size or 'as the size has it'}")
    parser.add_argument("--blocks", type=int, help=f"of each variant; here {plan.blocks}")
    parser.add_argument("--steps", type=int, help="a block; without, what fits the seconds")
    parser.add_argument("--budget-s", type=float, help=f"seconds for all blocks of a size; here {plan.budget_s:g}")
    parser.add_argument("--largest-batch", help='the memory that the largest batch is sought in: "device", "4GiB" or "no"')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny one, which writes nothing")
    args = parser.parse_args()
    plan = QUICK if args.quick else plan
    memory = plan.memory_bytes
    if args.largest_batch not in {None, "no"}:
        given = parse_memory(args.largest_batch)
        memory = None if given is True else int(given)
    design = Design(
        plan.sizes if args.size == "auto" else tuple(args.size.split(",")),
        args.variants or plan.variants,
        args.blocks or plan.blocks,
        args.steps or plan.steps,
        args.budget_s or plan.budget_s,
        memory,
        args.batch or plan.batch_size,
        seek_largest=plan.seek_largest if args.largest_batch is None else args.largest_batch != "no",
    )

    found: dict[str, Comparison] = {}

    def keep(*, last: bool = False) -> None:
        """Writes what there is so far; a page that can't be made must not cost the figures."""
        result: dict[str, Any] = {
            "sizes": {size: comparison.to_dict() for size, comparison in found.items()},
            "what_if": {"assumption": "the power stays as measured", "planned_tokens": PLANNED_TOKENS, "mfu": CLAIMED_MFU},
        }
        try:
            body = page(found)
        except Exception:  # whatever a page trips over, hours of measuring are worth more than it
            body = f"The page could not be made; the figures are in the JSON.\n\n```\n{traceback.format_exc()}```"
        if args.quick:
            print(body)
        else:
            write("compare_gpt", "What each way to train a GPT costs", body, result, quiet=not last)

    for size in design.sizes:
        found[size] = measure(size, design, args.seed)
        if not any(result.blocks for result in found[size].results):
            raise SystemExit("; ".join(f"{result.name}: {result.error}" for result in found[size].results))
        if not args.quick:
            keep()
        pair = option(found[size], "+checkpoint")
        for result in pair if pair and design.seek_largest and not found[size].interrupted else ():
            print(f"{size}: the largest batch of {result.name}", file=sys.stderr)
            one = largest_batch(
                BuiltIn(size), result.variant, design.memory_bytes, measure=True, seed=args.seed, steps_per_block=1
            )
            found[size] = replace(found[size], largest=(*found[size].largest, one))
            keep()
        if found[size].interrupted:
            break
    keep(last=True)


if __name__ == "__main__":
    main()
