"""A comparison as text and tables: the finding in words, the figures, the planned run here and elsewhere, and what all of it rests on.

A difference is worded only after its significance: where an interval spans zero it reads "can't be told apart". Where every joule is
modelled, energy follows from time, and time is the headline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from green_torch.cli.console import (
    UNKNOWN,
    bounded,
    count,
    grid_line,
    hours,
    how_known,
    joules,
    kilowatt_hours,
    mebibytes,
    percent,
    rounded,
    sensor_note,
    table,
)
from green_torch.experiment import Comparison, Projection, Range, Saving, VariantResult, project
from green_torch.experiment.elsewhere import Grid
from green_torch.experiment.recorded import RecordedComparison
from green_torch.experiment.results import FINDABLE
from green_torch.units import grams, si

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import RenderableType

    from green_torch.records import DevicePeak, Domain
    from green_torch.statistics import Difference

Compared = Comparison | RecordedComparison

_NEXT_LINE = "\n"
_NOISY = 3.0  # a projection that may be so many times larger or smaller is none
_TOO_NOISY = "too noisy to project"
_AS_RATIO = 1.0  # a difference beyond +100 % reads better as a ratio
_STOPPED = {
    "until": "Every interval was narrow enough",
    "budget_s": "The time was spent",
    "budget_j": "The energy was spent",
}
_SAME_PEAK = 0.02  # relative: measured twice, one peak comes out as two numbers
_COUNTED = 1000  # blocks: more are told to three digits
_WIDE = 12  # letters of a name, beyond which it takes a line for each option
_FEW = 3  # variants, so that a column more still fits a terminal


@dataclass(frozen=True, slots=True)
class Plan:
    """A planned run: how many tokens, samples or steps, the price of a kWh of facility energy, and other grids to think it on."""

    tokens: float | None = None
    samples: float | None = None
    price_per_kwh: float | None = None
    elsewhere: tuple[Grid, ...] = ()
    steps: float | None = None

    @property
    def amount(self) -> tuple[float, str]:
        """How much of what."""
        for amount, unit in ((self.tokens, "tokens"), (self.samples, "samples"), (self.steps, "steps")):
            if amount is not None:
                return amount, unit
        raise AssertionError("a plan has an amount")

    def project(self, result: VariantResult, confidence: float) -> Projection | None:
        """What the run takes under a variant."""
        amount, unit = self.amount
        return project(result, **{f"planned_{unit}": amount}, confidence=confidence)

    def saving(self, comparison: Compared, name: str) -> Saving | None:
        """What it saves with a variant in place of the baseline; ``None`` where that is not known, or not the same training."""
        amount, unit = self.amount
        return comparison.saving(name, **{f"planned_{unit}": amount})

    def unsaved(self, comparison: Compared, name: str) -> str:
        """Why :meth:`saving` gives none for a variant; empty where it gives one."""
        if self.saving(comparison, name) is not None:
            return ""
        if departure := comparison.departure(name):
            return departure
        if self.project(comparison.baseline, comparison.confidence) is None:
            return f"no {self.amount[1]} counted"
        return "time not compared"

    def cost(self, found: Projection | Saving) -> Range | None:
        """Its money, in the price's own currency."""
        energy = found.facility_energy_kwh
        if self.price_per_kwh is None or energy is None:
            return None
        price = self.price_per_kwh
        lo, hi = (None if end is None else end * price for end in (energy.lo, energy.hi))
        return Range(energy.value * price, lo, hi)


def in_counted_work(comparison: Compared, plan: Plan) -> Plan:
    """A plan of steps as the tokens or samples that so many of the baseline's steps hold; where neither is counted, steps stay steps."""
    blocks = comparison.baseline.blocks
    for unit in ("tokens", "samples"):
        if plan.steps is not None and blocks and all(getattr(block, unit) for block in blocks):
            each = sum(getattr(block, unit) for block in blocks) / sum(block.n_steps for block in blocks)
            return replace(plan, steps=None, **{unit: each * plan.steps})
    return plan


def comparison_parts(comparison: Compared, plan: Plan | None = None) -> Iterator[RenderableType]:
    """The finding in words, the figures, the planned run, and what all of it rests on."""
    headline, *more = findings(comparison)
    yield Text(headline, style="bold")
    yield from map(Text, more)
    ran = [result for result in comparison.results if result.blocks]
    if ran:
        yield Text()
        yield figures(comparison, ran)
        if len(ran) > 1 and ran[0] is comparison.baseline:
            yield Text()
            yield differences(comparison, ran[1:])
        yield from (
            Text(f"{result.name}: {note}", style="dim")
            for result in ran
            for note in comparison.notes(result.name)
            if _news(note)
        )
        if isinstance(comparison, Comparison) and (why := _STOPPED.get(comparison.stopped)):
            yield Text(f"{why} after {max(len(result.blocks) for result in ran)} blocks of each.", style="dim")
        if isinstance(comparison, Comparison) and comparison.largest:
            yield Text()
            yield largest(comparison)
        if plan is not None:
            yield from _planned_parts(comparison, ran, plan)
        yield Text()
        yield _grounds(comparison, ran)
    said = dict.fromkeys([*comparison.warnings, *(text for result in comparison.results for text in result.warnings)])
    yield from (Text(f"warning: {text}", style="yellow") for text in said)


# ── findings ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def findings(comparison: Compared) -> list[str]:
    """The result in sentences, the headline first."""
    lines = []
    base = comparison.baseline
    if isinstance(comparison, Comparison) and comparison.interrupted:
        if not any(result.blocks for result in comparison.results):
            return ["Interrupted before anything was measured."]
        lines.append("Interrupted: what follows rests on the blocks measured until then.")
    lines += [f"{result.name} ended early: {result.error}" for result in comparison.results if result.error]
    if not base.blocks:
        return [*lines, "Nothing was measured of the baseline, so there is nothing to compare."]
    others = [result for result in comparison.results[1:] if result.blocks]
    if not others:
        lines.append(f"{base.name} alone was measured: there is nothing to compare it with.")
    for result in others:
        if departure := comparison.departure(result.name):
            lines.append(f"{result.name} is {departure}: no saving is claimed.")
        lines += _told(comparison, result, few=len(others) < _FEW)
    if others and comparison.headline == "time":
        known = any(comparison.energy(result.name) is not None for result in others)
        lines.append("Energy follows from time: power was modelled." if known else "No energy is known here.")
    return list(dict.fromkeys(lines))


def _told(comparison: Compared, result: VariantResult, *, few: bool) -> list[str]:
    """The findings about one variant: energy before time where it was measured; of many variants then energy alone."""
    time, energy = comparison.time(result.name), comparison.energy(result.name)
    by_time = [_sentence(comparison, result, time, "time")]
    if comparison.headline == "time":
        return by_time + _why(comparison.baseline, result, time)
    by_energy = [_sentence(comparison, result, energy, "energy")]
    if energy is None:
        return by_time + _why(comparison.baseline, result, time) + by_energy
    return by_energy + by_time if few else by_energy


def _sentence(comparison: Compared, result: VariantResult, found: Difference | None, what: str) -> str:
    """The finding about time or energy."""
    name, base = result.name, comparison.baseline.name
    if found is None:
        return f"{name} and {base}: no {what} to compare."
    unit = _unit(comparison, result)
    if found.lo is None or found.hi is None:
        change = _change(found.estimate)
        return f"{name} against {base}: {change} {what} per {unit}, from one block each: no interval, so no finding."
    sign = _sign(found.estimate)
    together = f" (for all {found.n_compared} together)" if found.n_compared > 1 else ""
    grounds = [f"{100 * found.confidence:g} % interval {_interval(found.lo, found.hi, found.estimate)} {sign}{together}"]
    if found.instrument_lo is not None and found.instrument_hi is not None:
        grounds.append(f"the meter's bounds {_interval(found.instrument_lo, found.instrument_hi, found.estimate)} {sign}")
    stated = ", ".join([*grounds, _evidence(comparison, found)])
    if not found.distinguishable:
        return f"{name} and {base} can't be told apart here in {what} per {unit}: {found.note.partition(': ')[2]} ({stated}){_needed(found)}."
    less = found.estimate < 0
    if found.estimate > _AS_RATIO:
        amount = f"{rounded(1 + found.estimate)} × the {what} per {unit} of {base}"
    else:
        amount = f"{rounded(100 * abs(found.estimate))} % {'less' if less else 'more'} {what} per {unit} than {base}"
    if comparison.departure(name):  # the line before says that it is another training
        return f"{name} took {amount} here all the same ({stated})."
    verdict = {"time": "is faster" if less else "is slower", "energy": "saves energy" if less else "costs energy"}[what]
    return f"{name} {verdict} here: {amount} ({stated})."


def _needed(found: Difference) -> str:
    """How many blocks would find a small difference; empty where it isn't the scatter that hides it."""
    needed = [(size, n) for size in FINDABLE if (n := found.blocks_needed(size)) is not None]
    told = ", ".join(f"about {n if n < _COUNTED else rounded(n)} for {100 * size:g} %" for size, n in needed)
    return f"; blocks of each to find a difference at this noise: {told}" if told else ""


def _evidence(comparison: Compared, found: Difference) -> str:
    if isinstance(comparison, RecordedComparison):
        return f"{found.n_blocks} stretches or more of each run, not paired"
    return f"{found.n_blocks} pairs of blocks"


def _why(base: VariantResult, other: VariantResult, time: Difference | None) -> list[str]:
    """Where a slower variant computes in a type that this device is slower at, the peaks say so."""
    slower = time is not None and time.distinguishable and time.estimate > 0
    known = {peak.dtype: peak for peak in base.peaks}
    best = max(known.values(), key=lambda peak: peak.flop_per_s, default=None)
    own = [peak for peak in other.peaks if peak.dtype not in known]
    if not slower or best is None or not own or max(peak.flop_per_s for peak in own) >= best.flop_per_s:
        return []
    rates = [f"{si(peak.flop_per_s, 'FLOP/s')} for {peak.dtype.partition('/')[2]}" for peak in (*own, best)]
    return [f"The {best.basis} peaks of this device: {', '.join(rates)}."]


def _unit(comparison: Compared, result: VariantResult) -> str:
    """What the difference is per: token, else sample, else step."""
    blocks = [*comparison.baseline.blocks, *result.blocks]
    return next(
        unit for unit in ("tokens", "samples", "n_steps") if all(getattr(block, unit) for block in blocks)
    ).removeprefix("n_")[:-1]


def _news(note: str) -> bool:
    """Whether a note says what no table does."""
    return not note.startswith("attention kernel")


# ── tables ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def figures(comparison: Compared, ran: Sequence[VariantResult]) -> Table:
    """One column a variant, one row a quantity; where they are few, how each is known."""
    base = ran[0]
    explain = len(ran) <= _FEW
    made = table("", *(broken(result.name) for result in ran), *(["known from"] if explain else []))
    energy_known = how_known(base.methods, brief=True)
    rank = "" if all(_same_peaks(base, result) for result in ran) else " (other peaks: not ranked)"
    blocks = [block for result in ran for block in result.blocks]
    energy_per: tuple[str, Callable[[VariantResult], str]] = ("Energy per step", lambda r: si(r.energy_per_step_j, "J"))
    for unit in ("samples", "tokens"):
        if all(getattr(block, unit) for block in blocks):
            energy_per = (f"Energy per {unit[:-1]}", lambda r, unit=unit: _energy_per(r, unit))  # type: ignore[misc]  # a default binds
    by_token = any(result.tokens_per_s is not None for result in ran)
    per_block = f"{comparison.steps_per_block} steps a block" if isinstance(comparison, Comparison) else "after the warm-up"
    rows: list[tuple[str, Callable[[VariantResult], str], str]] = [
        ("Step time", lambda r: si(r.step_time_s, "s"), "clock"),
        ("Tokens per second", lambda r: count(r.tokens_per_s), "clock"),
        ("Samples per second", lambda r: UNKNOWN if by_token else count(r.samples_per_s), "clock"),
        (*energy_per, energy_known),
        ("Power", lambda r: si(r.power_w, "W"), energy_known),
        ("Emissions per step", lambda r: grams(r.emissions_per_step_g), "energy × grid"),
        ("Model FLOP/s", lambda r: si(r.model_flop_per_s, "FLOP/s"), "counted"),
        (f"MFU{rank}", lambda r: percent(r.mfu), "peaks below"),
        (f"HFU{rank}", lambda r: percent(r.hfu), "peaks below"),
        ("Peak memory", lambda r: mebibytes(r.peak_memory_bytes), "torch or the kernel"),
        ("Memory traffic per step", lambda r: si(r.memory_traffic_per_step_bytes, "B"), "NVML's GPM"),
        ("Attention kernel", lambda r: ", ".join(r.kernels) or UNKNOWN, "one step, watched"),
        ("Final loss", lambda r: UNKNOWN if r.final_loss is None else f"{r.final_loss:.4g}", "last block"),
        ("Temperature", lambda r: UNKNOWN if r.temperature_c is None else f"{r.temperature_c:.0f} °C", "NVML"),
        ("SM clock", lambda r: UNKNOWN if r.sm_clock_mhz is None else f"{r.sm_clock_mhz:.0f} MHz", "NVML"),
        ("Measured", lambda r: f"{r.n_steps} steps", per_block),
    ]
    for name, show, known in rows:
        shown = [show(result) for result in ran]
        if any(text not in {"unknown", UNKNOWN} for text in shown):
            made.add_row(name, *shown, *([known] if explain else []))
    return made


def _same_peaks(a: VariantResult, b: VariantResult) -> bool:
    """Whether MFU and HFU of the two are shares of the same."""
    own, theirs = ({peak.dtype: peak.flop_per_s for peak in result.peaks} for result in (a, b))
    return own.keys() == theirs.keys() and all(math.isclose(own[key], theirs[key], rel_tol=_SAME_PEAK) for key in own)


def broken(name: str) -> str:
    """A variant's name for a narrow column: "bf16+flash+checkpoint" on three lines."""
    return name.replace("+", f"{_NEXT_LINE}+") if len(name) > _WIDE else name


def differences(comparison: Compared, others: Sequence[VariantResult]) -> Table:
    """One row a variant: how far its time and energy are from the baseline's, and what the instrument leaves open."""
    found = {other.name: (comparison.time(other.name), comparison.energy(other.name)) for other in others}
    modelled = comparison.headline == "time"
    energies = [energy for _, energy in found.values() if energy is not None and not modelled]
    bounds = any(energy.instrument_lo is not None for energy in energies)
    gains = any(energy.gain_lo is not None for energy in energies)
    per = f"per {_unit(comparison, others[0])}"
    made = table(
        f"against {comparison.baseline.name}",
        f"time {per}",
        f"energy {per}",
        *(["the meter's bounds"] if bounds else []),
        *(["its gain error"] if gains else []),
        "the same training?",
        "from",
    )
    for other in others:
        time, energy = found[other.name]
        made.add_row(
            broken(other.name),
            difference(time),
            "follows from time" if modelled and energy is not None else difference(energy),
            *([_instrument(energy)] if bounds else []),
            *([_gain(energy)] if gains else []),
            _training(comparison, other),
            "" if time is None else _evidence(comparison, time),
        )
    return made


def _instrument(found: Difference | None) -> str:
    if found is None or found.instrument_lo is None or found.instrument_hi is None:
        return "none"
    return f"{_interval(found.instrument_lo, found.instrument_hi, found.estimate)} {_sign(found.estimate)}"


def _gain(found: Difference | None) -> str:
    if found is None or found.gain_lo is None or found.gain_hi is None:
        return "not stated"
    if math.isclose(found.gain_lo, found.gain_hi, abs_tol=1e-9):
        return "cancels"
    return f"{_interval(found.gain_lo, found.gain_hi, found.estimate)} {_sign(found.estimate)}"


def _training(comparison: Compared, other: VariantResult) -> str:
    if comparison.departure(other.name):
        return "no"
    if not comparison.losses_compared(other.name):
        return "losses not compared"
    return f"loss within {100 * comparison.loss_tolerance:g} %"


def largest(comparison: Comparison) -> Table:
    """The largest batch of each variant that fits, and what a token costs there, or a sample where tokens are not counted."""
    blocks = [block for one in comparison.largest if one.result is not None for block in one.result.blocks]
    unit = "tokens" if all(block.tokens for block in blocks) else "samples"
    made = table("largest batch", "samples", "peak memory", "of", f"energy per {unit[:-1]}", f"{unit} per second")
    for one in comparison.largest:
        result = one.result
        none = UNKNOWN if one.error else "none fits"
        size = none if one.batch_size is None else f"{'' if one.complete else 'at least '}{one.batch_size}"
        made.add_row(
            one.variant.name,
            f"{size} ({one.error})" if one.error else size,
            mebibytes(one.peak_memory_bytes),
            f"{mebibytes(one.memory_bytes)}: {one.memory_source}",
            UNKNOWN if result is None else _energy_per(result, unit),
            UNKNOWN if result is None else count(result.tokens_per_s if unit == "tokens" else result.samples_per_s),
        )
    return made


def _energy_per(result: VariantResult, unit: str) -> str:
    """Per token or sample, with bounds where every block has them in which no meter failed: the sums of the blocks' own."""
    value = result.energy_per_token_j if unit == "tokens" else result.energy_per_sample_j
    blocks = [block for block in result.blocks if block.metered]
    work = sum(getattr(block, unit) or 0 for block in blocks)
    los = [block.energy_lo_j for block in blocks if block.energy_lo_j is not None]
    his = [block.energy_hi_j for block in blocks if block.energy_hi_j is not None]
    if not work or len(los) < len(blocks) or len(his) < len(blocks):
        return si(value, "J")
    return bounded(value, math.fsum(los) / work, math.fsum(his) / work, joules, between=_NEXT_LINE)


# ── a planned run ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _planned_parts(comparison: Compared, ran: Sequence[VariantResult], plan: Plan) -> Iterator[RenderableType]:
    amount, unit = plan.amount
    yield Text()
    yield Text(f"A planned run of {count(amount)} {unit} on this device:", style="bold")
    projected = [found for result in ran if (found := plan.project(result, comparison.confidence)) is not None]
    uncounted: dict[str, list[str]] = {}
    for result in ran:
        if plan.project(result, comparison.confidence) is None:
            uncounted.setdefault(_uncounted(result, unit), []).append(result.name)
    yield from (Text(f"Not projected: {', '.join(names)}: {why}.", style="yellow") for why, names in uncounted.items())
    if not projected:
        return
    yield planned(comparison, ran, plan)
    beyond = f"{_TOO_NOISY}: the interval goes beyond a factor of {_NOISY:g} either way"
    if any(_noisy(found.duration_h) for found in projected):
        yield Text(
            f"{beyond}. Measure on a machine that does nothing else, or more blocks (--blocks, --until).", style="yellow"
        )
    elif any(_noisy(figure) for found in projected for figure in (found.energy_kwh, found.emissions_g)):
        yield Text(
            f"{beyond}, the meter's bounds included. Measure more blocks (--blocks, --until), or with a better meter: green-torch doctor "
            "says what is missing.",
            style="yellow",
        )
    modelled = "; energy and emissions follow from time, since power was modelled" if comparison.headline == "time" else ""
    interval = f"{100 * comparison.confidence:g} % intervals"
    yield Text(
        f"Projected from all blocks above, sums over sums, to this device, this model, this grid; a difference is the geometric mean over pairs of blocks; {interval}, a saving's of both{modelled}.",
        style="dim",
    )
    if plan.elsewhere:
        yield Text()
        yield Text("The same joules on other grids (operational emissions, yearly means):", style="bold")
        yield elsewhere(comparison, ran, plan)
        yield Text(
            "Figures of one basis can be ranked; lifecycle and direct ones can't be ranked with each other.", style="dim"
        )
        for source in dict.fromkeys(f"{grid.region}: {grid.point.source}; PUE: {grid.pue_source}" for grid in plan.elsewhere):
            yield Text(source, style="dim")


def _uncounted(result: VariantResult, unit: str) -> str:
    """Why a result has no projection in a unit, and how to get one."""
    other = next((own for own in ("tokens", "samples") if all(getattr(block, own) for block in result.blocks)), None)
    if other is None:
        return f"no {unit} were counted: plan by --planned-steps"
    return f"{other} were counted, not {unit}: plan by --{other} or --planned-steps"


def planned(comparison: Compared, ran: Sequence[VariantResult], plan: Plan) -> Table:
    """A planned run on this device under each variant, and what a variant saves or costs; each figure over its low and high."""
    base, *others = ran
    facility = base.manifest is not None and base.manifest.pue != 1.0
    shown: list[tuple[str, Callable[[Projection | Saving], Range | None], Callable[[float], str]]] = [
        ("Time", lambda found: found.duration_h, hours),
        ("Energy (IT)", lambda found: found.energy_kwh, kilowatt_hours),
        ("Energy (facility)", lambda found: found.facility_energy_kwh, kilowatt_hours),
        ("Emissions", lambda found: found.emissions_g, grams),
        (f"Cost at {plan.price_per_kwh:g}/kWh" if plan.price_per_kwh is not None else "", plan.cost, rounded),
    ]
    columns = [column for column in shown if column[0] and (facility or column[0] != "Energy (facility)")]
    made = table("", *(name for name, _, _ in columns))
    for result in ran:
        found = plan.project(result, comparison.confidence)
        made.add_row(
            broken(result.name), *(UNKNOWN if found is None else ranged(pick(found), show) for _, pick, show in columns)
        )
    for other in others if base is comparison.baseline else []:
        saving, whole = plan.saving(comparison, other.name), plan.project(base, comparison.confidence)
        cells = [_no_saving(comparison, plan, other.name)] * len(columns)
        if saving is not None and whole is not None:
            judged = [saving.time if name == "Time" else _judged(comparison, saving) for name, _, _ in columns]
            cells = [saved(pick(saving), pick(whole), why, show) for why, (_, pick, show) in zip(judged, columns, strict=True)]
        made.add_section()
        made.add_row(f"{broken(other.name)}{_NEXT_LINE}in place of {base.name}", *cells)
    return made


def _no_saving(comparison: Compared, plan: Plan, name: str) -> str:
    """Why there is no saving, in a table's cell: the findings say it in full."""
    return plan.unsaved(comparison, name).partition(":")[0]


def _judged(comparison: Compared, saving: Saving) -> Difference | None:
    """The difference that tells whether energy is saved: where power was modelled, that in time."""
    return saving.time if comparison.headline == "time" else saving.energy


def elsewhere(comparison: Compared, ran: Sequence[VariantResult], plan: Plan) -> Table:
    """The planned run's emissions on other grids, and what a variant saves there; those of one basis together."""
    energies = {
        result.name: (found.energy_kwh if (found := plan.project(result, comparison.confidence)) else None) for result in ran
    }
    base = comparison.baseline
    savings = {result.name: plan.saving(comparison, result.name) for result in ran if base.blocks and result is not base}

    def cell(name: str, energy: Range | None, grid: Grid) -> str:
        emitted = ranged(None if energy is None else grid.emissions_g(energy), grams)
        if name not in savings:
            return emitted
        saving = savings[name]
        if saving is None:
            return f"{emitted}{_NEXT_LINE}{_no_saving(comparison, plan, name)}"
        less = None if saving.energy_kwh is None else grid.emissions_g(saving.energy_kwh)
        return f"{emitted}{_NEXT_LINE}{saved(less, energies[base.name], _judged(comparison, saving), grams)}"

    made = table("region", *map(broken, energies))
    for before, grid in zip((None, *plan.elsewhere), plan.elsewhere, strict=False):
        if before is not None and before.basis != grid.basis:
            made.add_section()
        year = f", {grid.point.year}" if grid.point.year else ""
        pue = f"PUE {grid.pue:g}" if grid.pue != 1.0 else "no PUE"
        made.add_row(
            f"{grid.region}{_NEXT_LINE}{rounded(grid.point.g_per_kwh)} gCO2e/kWh{year}{_NEXT_LINE}{grid.basis}, {pue}",
            *(cell(name, energy, grid) for name, energy in energies.items()),
        )
    return made


# ── words for one figure ───────────────────────────────────────────────────────────────────────────────────────────────


def difference(found: Difference | None) -> str:
    """A difference over its interval, "+38.0 %" over "(+31.0 to +45.0)"; or that the two can't be told apart."""
    if found is None:
        return UNKNOWN
    if found.lo is None or found.hi is None:
        return f"{_change(found.estimate)}, no interval"
    interval = _interval(found.lo, found.hi, found.estimate)
    if not found.distinguishable:
        return f"can't be told apart{_NEXT_LINE}({interval} {_sign(found.estimate)})"
    return f"{_change(found.estimate)}{_NEXT_LINE}({interval})"


def saved(figure: Range | None, base: Range | None, judged: Difference | None, show: Callable[[float], str]) -> str:
    """What a planned run saves or costs: "saves 12.0 h", low and high on the next line.

    Or, in words, that there is no finding, or that the baseline's figure, which it is a share of, can't be projected.
    """
    if figure is None or judged is None:
        return UNKNOWN
    if not judged.distinguishable:
        return "no interval" if judged.lo is None else "can't be told apart"
    if base is not None and _noisy(base):
        return _TOO_NOISY
    if figure.lo is not None and figure.hi is not None and figure.lo < 0 < figure.hi:  # grams saved by energy, spent by time
        return "can't be told apart"
    if figure.value >= 0:
        return f"saves {bounded(figure.value, figure.lo, figure.hi, show, between=_NEXT_LINE)}"
    lo, hi = (None, None) if figure.lo is None or figure.hi is None else (-figure.hi, -figure.lo)
    return f"costs {bounded(-figure.value, lo, hi, show, between=_NEXT_LINE)}"


def ranged(figure: Range | None, show: Callable[[float], str]) -> str:
    """A figure, its low and high on the next line; in words where these say that nobody knows."""
    if figure is not None and _noisy(figure):
        return _TOO_NOISY
    return UNKNOWN if figure is None else bounded(figure.value, figure.lo, figure.hi, show, between=_NEXT_LINE)


def _noisy(figure: Range | None) -> bool:
    """Whether a figure is not known within a factor worth printing."""
    if figure is None or figure.lo is None or figure.hi is None or figure.value <= 0:
        return False
    return figure.hi > _NOISY * figure.value or figure.lo < figure.value / _NOISY


def _change(relative: float) -> str:
    """0.38 -> "+38.0 %"; 5.9 -> "6.90 ×"."""
    return f"{rounded(1 + relative) if relative > _AS_RATIO else _signed(relative)} {_sign(relative)}"


def _sign(relative: float) -> str:
    """How a difference is written: as a ratio beyond +100 %, else in percent."""
    return "×" if relative > _AS_RATIO else "%"


def _interval(lo: float, hi: float, estimate: float) -> str:
    """Both ends in the estimate's way: percent, or ratios where it is beyond +100 %."""
    if estimate > _AS_RATIO:
        return f"{rounded(1 + lo)} to {rounded(1 + hi)}"
    return f"{_signed(lo)} to {_signed(hi)}"


def _signed(relative: float) -> str:
    """In percent: 0.38 -> "+38.0"."""
    if not math.isfinite(relative):
        return "∞"
    return f"{'+' if relative > 0 else '−' if relative < 0 else '±'}{rounded(100 * abs(relative))}"


# ── grounds ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _face_value(domains: Sequence[Domain]) -> str:
    """Which joules a difference takes as they are where others have a gain error; empty where none does."""
    silent = [domain.name for domain in domains if domain.gain_error is None]
    if not silent or len(silent) == len(domains):
        return ""
    return f"No gain error is stated for {', '.join(silent)}: taken at face value."


def _grounds(comparison: Compared, ran: Sequence[VariantResult]) -> Table:
    """What the figures rest on: device, model, how energy is known, the peaks behind MFU, the grid."""
    made = Table.grid(padding=(0, 2))
    made.add_column(style="dim", no_wrap=True)
    made.add_column()
    result = next((one for one in ran if one.manifest), None)
    if result is None or result.manifest is None:
        return made
    manifest = result.manifest
    threads = f", {result.threads} thread{'s' if result.threads > 1 else ''}" if result.threads else ""
    peaks: dict[DevicePeak, list[str]] = {}
    for one in ran:
        for peak in one.peaks:
            peaks.setdefault(peak, []).append(one.name)
    processor = next((peak.device for peak in peaks if peak.basis == "measured"), manifest.device) or "not known"
    rows = [
        ("device", f"{processor}{threads}, torch {manifest.versions.get('torch', 'not known')}"),
        ("model", f"{manifest.model or 'not known'}, {count(manifest.parameters)} parameters"),
    ]
    for domain in manifest.domains:
        bounds = f"; bounds assume 0 to 1.5 × {si(domain.power_limit_w, 'W')}" if domain.power_limit_w else ""
        shared = "; shared with other processes" if domain.shared else ""
        rows.append((f"energy, {domain.name}", f"{domain.method}: {domain.source}{bounds}{shared}"))
    if not manifest.domains:
        rows.append(("energy", "nothing measures it: " + "; ".join(manifest.missing)))
    rows += [("", note) for note in (sensor_note(manifest.domains), _face_value(manifest.domains)) if note]
    rows += [
        (f"peak, {peak.dtype}", f"{si(peak.flop_per_s, 'FLOP/s')}, {peak.basis}: {peak.source} ({', '.join(names)})")
        for peak, names in peaks.items()
    ]
    rows += [("grid", grid_line(manifest.intensity)), ("PUE", f"{manifest.pue:g}: {manifest.pue_source}")]
    if isinstance(comparison, RecordedComparison):
        rows += [("run", f"{one.name}: {path}") for one, path in zip(comparison.results, comparison.paths, strict=True)]
        rows.append(
            (
                "",
                "Not measured side by side: what changed on the machine between the runs is in the difference. Losses are those that TensorBoard has of the runs.",
            )
        )
    for name, text in rows:
        made.add_row(name, Text(text))
    return made
