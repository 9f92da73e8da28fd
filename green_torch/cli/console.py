"""Tables for a terminal: a run's summary, and a comparison with what it means for a planned run.

Every figure stands with its unit and how it is known; bounds stand where joules were counted. A difference is worded only after
its significance: where the interval spans zero it reads "can't be told apart".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from green_torch.experiment import project
from green_torch.records import Method, RunSummary
from green_torch.units import grams, kwh, kwh_to_joules, si

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from rich.console import RenderableType

    from green_torch.experiment import Comparison, Projection, Range, Saving, VariantResult
    from green_torch.records import DevicePeak, Domain, IntensityPoint, Item
    from green_torch.statistics import Difference

HOW_KNOWN = {
    Method.COUNTER: "counted by the hardware",
    Method.SAMPLED: "power readings, integrated",
    Method.ESTIMATED: "a model: not measured",
}
_UNKNOWN = "not known"
_NEXT_LINE = "\n"
_AS_RATIO = 1.0  # a difference beyond +100 % reads better as a ratio


def print_summary(summary: RunSummary, console: Console | None = None) -> None:
    """Prints a run's summary."""
    console = console or Console()
    for part in summary_parts(summary):
        console.print(part)


class ConsoleSink:
    """Prints the summary as tables when a run ends: ``track(sinks=[ConsoleSink()])``."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console

    def write(self, item: Item) -> None:
        """Prints a summary; takes records in silence."""
        if isinstance(item, RunSummary):
            print_summary(item, self._console)

    def close(self) -> None:
        """Nothing is held open."""


def summary_parts(summary: RunSummary) -> Iterator[RenderableType]:
    """A run's means per step, its phases, and what its numbers rest on."""
    manifest = summary.manifest
    methods = {domain.name: domain.method for domain in manifest.domains}
    energy_known = how_known(methods)
    resolved = (
        "nothing resolved yet" if summary.resolved_through is None else f"resolved through step {summary.resolved_through}"
    )
    yield Text(f"{manifest.run_name}: {summary.status}, {summary.n_steps} typical steps, {resolved}", style="bold")
    table = _table("", "per step", "known from")
    for name, value, known in (
        ("Time", si(summary.step_time_s, "s"), "the clock"),
        (
            "Energy (IT)",
            bounded(summary.energy_per_step_j, summary.energy_per_step_lo_j, summary.energy_per_step_hi_j, _joules),
            energy_known,
        ),
        ("Energy per token", si(summary.energy_per_token_j, "J"), energy_known),
        ("Energy per sample", si(summary.energy_per_sample_j, "J"), energy_known),
        ("Power", si(summary.power_w, "W"), energy_known),
        ("Emissions", grams(summary.emissions_per_step_g), grid_line(manifest.intensity)),
        ("MFU", percent(summary.mfu), peak_line(manifest.peaks)),
        ("HFU", percent(summary.hfu), "the same peak"),
        ("Model FLOP/s", si(summary.model_flop_per_s, "FLOP/s"), "counted operations, the clock"),
    ):
        if value not in {"unknown", _UNKNOWN}:
            table.add_row(name, value, escape(known))
    yield table
    phases = _table("phase", "time", "energy (IT)", "bounds", "emissions")
    for phase in summary.totals.phases:
        bounds = "none" if phase.energy_lo_j is None else f"{kwh(phase.energy_lo_j)} to {kwh(phase.energy_hi_j)}"
        phases.add_row(phase.phase.value, si(phase.duration_s, "s"), kwh(phase.energy_j), bounds, grams(phase.emissions_g))
    total = summary.totals
    bounds = "none" if total.energy_lo_j is None else f"{kwh(total.energy_lo_j)} to {kwh(total.energy_hi_j)}"
    phases.add_section()
    phases.add_row("run", si(total.duration_s, "s"), kwh(total.energy_j), bounds, grams(total.emissions_g))
    yield phases
    yield from (Text(f"missing: {text}", style="dim") for text in manifest.missing)
    yield from (Text(f"warning: {text}", style="yellow") for text in summary.warnings)


# ── a comparison ───────────────────────────────────────────────────────────────────────────────────────────────────────


def comparison_parts(comparison: Comparison, planned_tokens: float | None = None) -> Iterator[RenderableType]:
    """The finding in words, the figures, the planned run, and what all of it rests on."""
    headline, *more = findings(comparison)
    yield Text(headline, style="bold")
    yield from map(Text, more)
    ran = [result for result in comparison.results if result.blocks]
    if ran:
        yield Text()
        yield figures(comparison, ran)
        if planned_tokens is not None:
            yield Text()
            yield Text(f"A planned run of {count(planned_tokens)} tokens on this device:", style="bold")
            yield planned(comparison, ran, planned_tokens)
            yield Text(_planned_note(comparison), style="dim")
        yield Text()
        yield _grounds(ran)
    said = dict.fromkeys(text for result in comparison.results for text in result.warnings)
    yield from (Text(f"warning: {text}", style="yellow") for text in said)


def findings(comparison: Comparison) -> list[str]:
    """The result in sentences, the headline first."""
    lines = []
    base = comparison.baseline
    if comparison.interrupted:
        lines.append("Interrupted: what follows rests on the blocks measured until then.")
    lines += [f"{result.name} ended early: {result.error}" for result in comparison.results if result.error]
    if not base.blocks:
        return [*lines, "Nothing was measured of the baseline, so there is nothing to compare."]
    for result in comparison.results[1:]:
        if not result.blocks:
            continue
        time, energy = comparison.time(result.name), comparison.energy(result.name)
        if comparison.headline == "time" or energy is None:
            lines.append(_sentence(result.name, base.name, time, "time"))
            lines.append("Energy follows from time: power was modelled." if energy is not None else "No energy is known here.")
        else:
            lines += [_sentence(result.name, base.name, energy, "energy"), _sentence(result.name, base.name, time, "time")]
        lines += _why(base, result, time)
        departure = comparison.departure(result.name)
        if departure:
            lines.append(f"{result.name} is {departure}: no saving is claimed.")
    return lines


def figures(comparison: Comparison, ran: list[VariantResult]) -> Table:
    """One column a variant, one row a quantity, and the differences from the baseline."""
    base, *others = ran
    compared = others if base is comparison.baseline else []
    table = _table(
        "", *(result.name for result in ran), *(f"{other.name} against {base.name}" for other in compared), "known from"
    )
    energy_known = how_known(base.methods, brief=True)
    modelled = comparison.headline == "time"

    def row(
        name: str,
        show: Callable[[VariantResult], str],
        change: Callable[[VariantResult], str],
        known: str,
        *,
        always: bool = True,
    ) -> None:
        shown = [show(result) for result in ran]
        if always or any(text not in {"unknown", _UNKNOWN} for text in shown):
            table.add_row(name, *shown, *(change(other) for other in compared), known)

    def energy_change(other: VariantResult) -> str:
        return "follows from time" if modelled else difference(comparison.energy(other.name))

    row("Step time", lambda r: si(r.step_time_s, "s"), lambda o: difference(comparison.time(o.name)), "clock")
    row("Tokens per second", lambda r: count(r.tokens_per_s), lambda _: "", "clock", always=False)
    row("Energy per token", _energy_per_token, energy_change, energy_known)
    row("Power", lambda r: si(r.power_w, "W"), lambda _: "", energy_known)
    row("Emissions per step", lambda r: grams(r.emissions_per_step_g), energy_change, "energy × grid")
    row("Model FLOP/s", lambda r: si(r.model_flop_per_s, "FLOP/s"), lambda _: "", "counted")
    row("MFU", lambda r: percent(r.mfu), lambda o: _mfu_change(base, o), "peaks below")
    row(
        "Final loss",
        lambda r: _UNKNOWN if r.final_loss is None else f"{r.final_loss:.3f} nats",
        lambda o: _loss_change(comparison, o),
        "last block",
    )
    row("Peak memory", lambda r: _bytes(r.peak_memory_bytes), lambda _: "", "torch or the kernel", always=False)
    row(
        "Measured",
        lambda r: f"{r.n_steps} steps",
        lambda o: _pairs(comparison.time(o.name)),
        f"{comparison.steps_per_block} steps a block",
    )
    return table


def planned(comparison: Comparison, ran: list[VariantResult], planned_tokens: float) -> Table:
    """A planned run on this device under each variant, and what a variant saves or costs; each figure over its low and high."""
    base, *others = ran
    facility = base.manifest is not None and base.manifest.pue != 1.0
    shown: list[tuple[str, Callable[[Projection | Saving], Range | None], Callable[[float], str]]] = [
        ("Time", lambda found: found.duration_h, _hours),
        ("Energy (IT)", lambda found: found.energy_kwh, _kilowatt_hours),
        ("Energy (facility)", lambda found: found.facility_energy_kwh, _kilowatt_hours),
        ("Emissions", lambda found: found.emissions_g, grams),
    ]
    columns = [column for column in shown if facility or column[0] != "Energy (facility)"]
    table = _table("", *(name for name, _, _ in columns))
    for result in ran:
        found = project(result, planned_tokens=planned_tokens, confidence=comparison.confidence)
        table.add_row(result.name, *(_UNKNOWN if found is None else ranged(pick(found), show) for _, pick, show in columns))
    for other in others if base is comparison.baseline else []:
        saving = comparison.saving(other.name, planned_tokens=planned_tokens)
        cells = ["not comparable"] * len(columns)
        if saving is not None and not comparison.departure(other.name):
            energy = saving.time if comparison.headline == "time" else saving.energy
            judged = [saving.time if name == "Time" else energy for name, _, _ in columns]
            cells = [saved(pick(saving), why, show) for why, (_, pick, show) in zip(judged, columns, strict=True)]
        table.add_section()
        table.add_row(f"{other.name} in place of {base.name}", *cells)
    return table


# ── words for one figure ───────────────────────────────────────────────────────────────────────────────────────────────


def difference(found: Difference | None) -> str:
    """A difference over its interval, "+38.0 %" over "(+31.0 to +45.0)"; or that the two can't be told apart."""
    if found is None:
        return _UNKNOWN
    if found.lo is None or found.hi is None:
        return f"{_change(found.estimate)}, no interval"
    interval = _interval(found.lo, found.hi, found.estimate)
    if not found.distinguishable:
        return f"can't be told apart{_NEXT_LINE}({interval} {_sign(found.estimate)})"
    return f"{_change(found.estimate)}{_NEXT_LINE}({interval})"


def saved(figure: Range | None, judged: Difference | None, show: Callable[[float], str]) -> str:
    """What a planned run saves or costs: "saves 12.0 h", low and high on the next line; or that the two can't be told apart."""
    if figure is None or judged is None:
        return _UNKNOWN
    if not judged.distinguishable and judged.lo is not None:
        return "can't be told apart"
    if figure.value >= 0:
        return f"saves {ranged(figure, show)}"
    lo, hi = (None, None) if figure.lo is None or figure.hi is None else (-figure.hi, -figure.lo)
    return f"costs {bounded(-figure.value, lo, hi, show, between=_NEXT_LINE)}"


def ranged(figure: Range | None, show: Callable[[float], str]) -> str:
    """A figure, its low and high on the next line."""
    return _UNKNOWN if figure is None else bounded(figure.value, figure.lo, figure.hi, show, between=_NEXT_LINE)


def bounded(
    value: float | None, lo: float | None, hi: float | None, show: Callable[[float], str], *, between: str = " "
) -> str:
    """A value, with its bounds where it has any, all in the value's unit: "33.5 kWh (30.1 to 36.9)"."""
    if value is None:
        return _UNKNOWN
    if lo is None or hi is None:
        return show(value)
    power = 1000.0 ** math.floor(math.log10(abs(value or hi or 1.0)) / 3 + 1e-9)
    unit = show(power).partition(" ")[2]
    scale = 1.0 if show(1.0).partition(" ")[2] == unit else power
    return f"{_rounded(value / scale)} {unit}{between}({_rounded(lo / scale)} to {_rounded(hi / scale)})"


def percent(fraction: float | None) -> str:
    """0.123 -> "12.3 %"."""
    return _UNKNOWN if fraction is None else f"{_rounded(100 * fraction)} %"


def count(value: float | None) -> str:
    """1e10 -> "10 billion", 1234.5 -> "1,230": three digits."""
    if value is None:
        return _UNKNOWN
    for scale, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {word}"
    return _rounded(value)


def how_known(methods: Mapping[str, Method], *, brief: bool = False) -> str:
    """By domain: "gpu0 counted by the hardware; cpu, dram: a model: not measured"; ``brief``: "counter (gpu0)"."""
    parts = []
    for method in Method:
        names = ", ".join(name for name, own in methods.items() if own is method)
        if names:
            parts.append(f"{method} ({names})" if brief else f"{names}: {HOW_KNOWN[method]}")
    return (" + " if brief else "; ").join(parts) or "nothing measures energy"


def grid_line(point: IntensityPoint | None) -> str:
    """The grid's figure with its region, kind and source."""
    if point is None:
        return "grid intensity not known"
    kind = f"{'' if point.basis == 'unknown' else point.basis + ', '}{'average' if point.average else 'marginal'}"
    year = f", {point.year}" if point.year else ""
    return f"{_rounded(point.g_per_kwh)} gCO2e/kWh: {point.region} ({kind}{year}; {point.source})"


def peak_line(peaks: Iterable[DevicePeak]) -> str:
    """The peaks behind an MFU, each with where it is from."""
    return "; ".join(f"{peak.dtype} {si(peak.flop_per_s, 'FLOP/s')}, {peak.basis}" for peak in peaks) or "no peak known"


def sensor_note(domains: Iterable[Domain]) -> str:
    """The systematic error of the sensors, which no bounds hold; empty where none is stated."""
    stated = [f"{domain.name} ±{100 * domain.gain_error:g} %" for domain in domains if domain.gain_error]
    return f"Sensor gain error, systematic, not in the bounds: {', '.join(stated)}." if stated else ""


# ── pieces ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _grounds(ran: list[VariantResult]) -> Table:
    """What the figures rest on: device, model, how energy is known, the peaks behind MFU, the grid."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    result = next((one for one in ran if one.manifest), None)
    if result is None or result.manifest is None:
        return table
    manifest = result.manifest
    threads = f", {result.threads} threads" if result.threads else ""
    peaks: dict[DevicePeak, list[str]] = {}
    for one in ran:
        for peak in one.peaks:
            peaks.setdefault(peak, []).append(one.name)
    processor = next((peak.device for peak in peaks if peak.basis == "measured"), manifest.device) or "not known"
    rows = [
        ("device", f"{processor}{threads}, torch {manifest.versions.get('torch', 'not known')}"),
        ("model", f"{manifest.model}, {count(manifest.parameters)} parameters"),
    ]
    for domain in manifest.domains:
        bounds = f"; bounds assume 0 to 1.5 × {si(domain.power_limit_w, 'W')}" if domain.power_limit_w else ""
        shared = "; shared with other processes" if domain.shared else ""
        rows.append((f"energy, {domain.name}", f"{domain.method}: {domain.source}{bounds}{shared}"))
    if not manifest.domains:
        rows.append(("energy", "nothing measures it: " + "; ".join(manifest.missing)))
    rows += [("", note) for note in (sensor_note(manifest.domains),) if note]
    rows += [
        (f"peak, {peak.dtype}", f"{si(peak.flop_per_s, 'FLOP/s')}, {peak.basis}: {peak.source} ({', '.join(names)})")
        for peak, names in peaks.items()
    ]
    rows += [("grid", grid_line(manifest.intensity)), ("PUE", f"{manifest.pue:g}: {manifest.pue_source}")]
    for name, text in rows:
        table.add_row(name, Text(text))
    return table


def _sentence(name: str, base: str, found: Difference | None, what: str) -> str:
    """The finding about time or energy."""
    if found is None:
        return f"{name} and {base}: no {what} to compare."
    if found.lo is None or found.hi is None:
        change = _change(found.estimate)
        return f"{name} against {base}: {change} {what} per token, from one block each: no interval, so no finding."
    sign = _sign(found.estimate)
    grounds = [f"{100 * found.confidence:g} % interval {_interval(found.lo, found.hi, found.estimate)} {sign}"]
    if found.instrument_lo is not None and found.instrument_hi is not None:
        grounds.append(f"the meter's bounds {_interval(found.instrument_lo, found.instrument_hi, found.estimate)} {sign}")
    stated = ", ".join([*grounds, f"{found.n_blocks} pairs of blocks"])
    if not found.distinguishable:
        return f"{name} and {base} can't be told apart here in {what} per token: {found.note.partition(': ')[2]} ({stated})."
    less = found.estimate < 0
    if found.estimate > _AS_RATIO:
        amount = f"{_rounded(1 + found.estimate)} × the {what} per token of {base}"
    else:
        amount = f"{_rounded(100 * abs(found.estimate))} % {'less' if less else 'more'} {what} per token than {base}"
    verdict = {"time": "is faster" if less else "is slower", "energy": "saves energy" if less else "costs energy"}[what]
    return f"{name} {verdict} here: {amount} ({stated})."


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


def _change(relative: float) -> str:
    """0.38 -> "+38.0 %"; 5.9 -> "6.90 ×"."""
    return f"{_rounded(1 + relative) if relative > _AS_RATIO else _signed(relative)} {_sign(relative)}"


def _sign(relative: float) -> str:
    """How a difference is written: as a ratio beyond +100 %, else in percent."""
    return "×" if relative > _AS_RATIO else "%"


def _interval(lo: float, hi: float, estimate: float) -> str:
    """Both ends in the estimate's way: percent, or ratios where it is beyond +100 %."""
    if estimate > _AS_RATIO:
        return f"{_rounded(1 + lo)} to {_rounded(1 + hi)}"
    return f"{_signed(lo)} to {_signed(hi)}"


def _signed(relative: float) -> str:
    """In percent: 0.38 -> "+38.0"."""
    if not math.isfinite(relative):
        return "∞"
    return f"{'+' if relative > 0 else '−' if relative < 0 else '±'}{_rounded(100 * abs(relative))}"


def _rounded(value: float) -> str:
    """Three digits, thousands apart."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    value = float(f"{value:.3g}")
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _joules(value: float) -> str:
    return si(value, "J")


def _hours(value: float) -> str:
    return f"{_rounded(value)} h"


def _kilowatt_hours(value: float) -> str:
    return kwh(kwh_to_joules(value))


def _bytes(value: int | None) -> str:
    return "unknown" if value is None else f"{_rounded(value / 2**20)} MiB"


def _energy_per_token(result: VariantResult) -> str:
    """With bounds where every block has them: the sums of the blocks' own."""
    tokens = sum(block.tokens or 0 for block in result.blocks)
    los = [block.energy_lo_j for block in result.blocks if block.energy_lo_j is not None]
    his = [block.energy_hi_j for block in result.blocks if block.energy_hi_j is not None]
    if not tokens or len(los) < len(result.blocks) or len(his) < len(result.blocks):
        return si(result.energy_per_token_j, "J")
    return bounded(result.energy_per_token_j, math.fsum(los) / tokens, math.fsum(his) / tokens, _joules, between=_NEXT_LINE)


def _mfu_change(base: VariantResult, other: VariantResult) -> str:
    """MFUs over different peaks are not ranked."""
    peaks = [{(peak.dtype, peak.flop_per_s) for peak in result.peaks} for result in (base, other)]
    return "" if peaks[0] == peaks[1] else "not ranked"


def _loss_change(comparison: Comparison, other: VariantResult) -> str:
    return "not the same" if comparison.departure(other.name) else f"within {100 * comparison.loss_tolerance:g} %"


def _pairs(found: Difference | None) -> str:
    return "" if found is None else f"{found.n_blocks} pairs of blocks"


def _planned_note(comparison: Comparison) -> str:
    modelled = "; energy and emissions follow from time, since power was modelled" if comparison.headline == "time" else ""
    return f"Projected from the steps above to this device, this model, this grid; {100 * comparison.confidence:g} % intervals{modelled}."


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, style="bold" if index == 0 else "", overflow="fold")
    return table
