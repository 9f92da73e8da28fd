"""A run's summary as tables for a terminal, and the words for a figure: its unit, its bounds, how it is known."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from green_torch.records import Method, RunSummary
from green_torch.units import grams, kwh, kwh_to_joules, si

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from rich.console import RenderableType

    from green_torch.records import DevicePeak, Domain, IntensityPoint, Item

HOW_KNOWN = {
    Method.COUNTER: "counted by the hardware",
    Method.SAMPLED: "power readings, integrated",
    Method.ESTIMATED: "a model: not measured",
}
UNKNOWN = "not known"


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
    """What a run cost, its means per step, its phases, and what its numbers rest on."""
    manifest = summary.manifest
    methods = {domain.name: domain.method for domain in manifest.domains}
    energy_known = how_known(methods)
    resolved = (
        "nothing resolved yet" if summary.resolved_through is None else f"resolved through step {summary.resolved_through}"
    )
    yield Text(f"cost {summary.headline()}", style="bold green")
    yield Text(f"{manifest.run_name}: {summary.status}, {summary.n_steps} typical steps, {resolved}", style="bold")
    per_step = table("", "per step", "known from")
    for name, value, known in (
        ("Time", si(summary.step_time_s, "s"), "the clock"),
        (
            "Energy (IT)",
            bounded(summary.energy_per_step_j, summary.energy_per_step_lo_j, summary.energy_per_step_hi_j, joules),
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
        if value not in {"unknown", UNKNOWN}:
            per_step.add_row(name, value, escape(known))
    yield per_step
    phases = table("phase", "time", "energy (IT)", "bounds", "emissions")
    for phase in summary.totals.phases:
        bounds = "none" if phase.energy_lo_j is None else f"{kwh(phase.energy_lo_j)} to {kwh(phase.energy_hi_j)}"
        phases.add_row(phase.phase.value, si(phase.duration_s, "s"), kwh(phase.energy_j), bounds, grams(phase.emissions_g))
    total = summary.totals
    bounds = "none" if total.energy_lo_j is None else f"{kwh(total.energy_lo_j)} to {kwh(total.energy_hi_j)}"
    phases.add_section()
    phases.add_row("run", si(total.duration_s, "s"), kwh(total.energy_j), bounds, grams(total.emissions_g))
    yield phases
    yield from (Text(f"not metered: {text}", style="dim") for text in summary.not_metered())
    yield from (Text(f"warning: {text}", style="yellow") for text in summary.warnings)


# ── words ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def bounded(
    value: float | None, lo: float | None, hi: float | None, show: Callable[[float], str], *, between: str = " "
) -> str:
    """A value, with its bounds where it has any, all in the value's unit: "33.5 kWh (30.1 to 36.9)"."""
    if value is None:
        return UNKNOWN
    if lo is None or hi is None:
        return show(value)
    power = 1000.0 ** math.floor(math.log10(abs(value or hi or 1.0)) / 3 + 1e-9)
    unit = show(power).partition(" ")[2]
    scale = 1.0 if show(1.0).partition(" ")[2] == unit else power
    return f"{f'{rounded(value / scale)} {unit}'.rstrip()}{between}({rounded(lo / scale)} to {rounded(hi / scale)})"


def percent(fraction: float | None) -> str:
    """0.123 -> "12.3 %"."""
    return UNKNOWN if fraction is None else f"{rounded(100 * fraction)} %"


def count(value: float | None) -> str:
    """1e10 -> "10 billion", 1234.5 -> "1,230": three digits."""
    if value is None:
        return UNKNOWN
    for scale, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {word}"
    return rounded(value)


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
    return f"{rounded(point.g_per_kwh)} gCO2e/kWh: {point.region} ({kind}{year}; {point.source})"


def peak_line(peaks: Iterable[DevicePeak]) -> str:
    """The peaks behind an MFU, each with where it is from."""
    return "; ".join(f"{peak.dtype} {si(peak.flop_per_s, 'FLOP/s')}, {peak.basis}" for peak in peaks) or "no peak known"


def sensor_note(domains: Iterable[Domain]) -> str:
    """The systematic error of the sensors, which no bounds hold; empty where none is stated."""
    stated = [f"{domain.name} ±{100 * domain.gain_error:g} %" for domain in domains if domain.gain_error]
    return f"Sensor gain error, systematic, not in the bounds: {', '.join(stated)}." if stated else ""


def rounded(value: float) -> str:
    """Three digits, thousands apart."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    value = float(f"{value:.3g}")
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def joules(value: float) -> str:
    """1234.0 -> "1.23 kJ"."""
    return si(value, "J")


def hours(value: float) -> str:
    """1234.0 -> "1,230 h"."""
    return f"{rounded(value)} h"


def kilowatt_hours(value: float) -> str:
    """0.5 -> "500 Wh"."""
    return kwh(kwh_to_joules(value))


def mebibytes(value: int | None) -> str:
    """Bytes: 2**20 -> "1.00 MiB"."""
    return UNKNOWN if value is None else f"{rounded(value / 2**20)} MiB"


def table(*headings: str) -> Table:
    """A table whose first column names its rows."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, heading in enumerate(headings):
        made.add_column(heading, style="bold" if index == 0 else "", overflow="fold")
    return made
