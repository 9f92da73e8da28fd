"""``green-torch estimate``: energy, emissions and cost of a run that has not begun, from the cards, the hours or the work, and the grid.

:func:`examine` computes; :func:`show` prints. Whatever was not given and had to be assumed is listed with the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.text import Text

from green_torch.cli.assumptions import between, bullets, card, grid, number, peak_at, span, tdp_w
from green_torch.cli.console import grid_line, percent, rounded, table
from green_torch.embodied import embodied_for
from green_torch.errors import ArgumentError
from green_torch.estimate import Footprint, Span, duration_s, footprint, manufacturing_g, training_flops
from green_torch.records import DevicePeak, Embodied, IntensityPoint
from green_torch.units import G_PER_KG, S_PER_HOUR, grams, joules_to_kwh, kwh, si

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from green_torch.peaks import KnownDevice

SCHEMA = "green_torch.estimate/1"


@dataclass(frozen=True, slots=True)
class OtherMfu:
    """The same work at another MFU and the same power. ``saved`` is the share of time, energy and emissions that it saves."""

    mfu: Span
    footprint: Footprint
    saved: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will take, from what it was computed, and what had to be assumed. ``power_w`` is that of one accelerator.

    ``sci_g`` is (E × I + M) / R by functional unit (GSF SCI). ``missing`` says what is not in the figures.
    """

    schema: str
    device: str
    count: int
    tdp_w: float | None
    utilization: Span | None
    power_w: Span
    flops: float | None
    tokens: float | None
    mfu: Span | None
    peak: DevicePeak | None
    intensity: IntensityPoint
    intensity_g_per_kwh: Span
    pue: Span
    pue_source: str
    embodied: Embodied | None
    footprint: Footprint
    price_per_kwh: float | None
    cost: Span | None
    sci_g: dict[str, Span]
    other_mfu: OtherMfu | None
    assumed: tuple[str, ...]
    missing: tuple[str, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was typed; ranges as text, "0.5-0.7"."""

    gpu: str
    count: int | None = None
    hours: str | None = None
    flops: float | None = None
    parameters: float | None = None
    tokens: float | None = None
    mfu: str | None = None
    other_mfu: str | None = None
    dtype: str | None = None
    utilization: str | None = None
    power: str | None = None
    region: str | None = None
    intensity: str | None = None
    pue: str | None = None
    price: float | None = None
    embodied_kg: str | None = None
    server: bool = False
    lifetime: float | None = None
    in_use: float | None = None


def examine(asked: Asked) -> Estimate:
    """Computes what a run will take.

    Raises:
        ArgumentError: an unknown card, numbers that can't be, or too few or too many of them (:class:`UnknownRegionError` for a region).
    """
    known, note = card(asked.gpu)
    assumed = [note] if note else []
    missing: list[str] = []
    sources = [f"card: {known.cited}"]
    count = _count(asked, assumed)
    power_w, utilization = _power(asked, None if asked.power else tdp_w(known, ": give its watts, --power 700"), assumed)
    work = _work(asked, known, count, assumed, sources)
    duration = work.duration
    point, intensity, pue, pue_source = grid(asked.region, asked.intensity, asked.pue)
    if asked.region is None and asked.intensity is None:
        assumed.append(f"{point.region}: {rounded(point.g_per_kwh)} gCO2e/kWh. --region FR, say")
    if asked.pue is None:
        assumed.append(f"PUE {pue.value:g}: {pue_source}")
    sources.append(f"grid: {grid_line(point)}")
    embodied = _embodied(asked, known.examples[0], count, assumed, missing)
    if embodied is not None:
        sources.append(f"making the cards: {embodied.source}")
    found = footprint(power_w * count, duration, pue, intensity, embodied)
    years = duration.value / (365.25 * 24 * S_PER_HOUR)
    if years > (kept := 4.0 if asked.lifetime is None else asked.lifetime):
        cards = "one card" if count == 1 else f"{count:,} cards"
        missing.append(
            f"cards to replace these: the run takes {rounded(years)} years on {cards}, {rounded(years / kept)} times the {kept:g} years that "
            f"one is kept. More of them share the work: --count {math.ceil(count * years * 4)} would take three months"
        )
    if not asked.power:
        missing.append(
            "processors, memory, storage and network beside the accelerators; add them with --power W, for one accelerator and its "
            "share of the rest"
        )
    if asked.price is not None:
        number("--price", asked.price, least=0.0)
    other = None
    if asked.other_mfu is not None:
        other = _other_mfu(asked.other_mfu, work, lambda time: footprint(power_w * count, time, pue, intensity, embodied))
        assumed.append(
            "the other MFU draws the same power: it would rise as a rule, so the energy saved is the most that it can be"
        )
    made = [("making the cards", manufacturing_g(embodied))] if embodied else []
    single = [name for name, one in (("power", power_w), ("grid", intensity), ("PUE", pue), *made) if one.is_exact]
    if single:
        missing.append(
            f"how far {', '.join(single)} may be off: single figures; ranges may be typed, as in --utilization 0.5-0.7"
        )
    hourly = footprint(power_w, Span.exact(S_PER_HOUR), pue, intensity, _share(embodied, count))
    sci_g = {"run": found.emissions_g, "accelerator hour": hourly.emissions_g}
    if asked.tokens:
        sci_g["token"] = found.emissions_g / asked.tokens
    return Estimate(
        schema=SCHEMA,
        device=known.name,
        count=count,
        tdp_w=known.tdp_w,
        utilization=utilization,
        power_w=power_w,
        flops=work.flops,
        tokens=asked.tokens,
        mfu=work.mfu,
        peak=work.peak,
        intensity=point,
        intensity_g_per_kwh=intensity,
        pue=pue,
        pue_source=pue_source,
        embodied=embodied,
        footprint=found,
        price_per_kwh=asked.price,
        cost=None if asked.price is None else found.facility_energy_j * joules_to_kwh(1.0) * asked.price,
        sci_g=sci_g,
        other_mfu=other,
        assumed=tuple(assumed),
        missing=tuple(missing),
        sources=tuple(sources),
    )


def _count(asked: Asked, assumed: list[str]) -> int:
    """How many accelerators."""
    if asked.count is None:
        assumed.append("one accelerator, for want of --count")
        return 1
    if asked.count < 1:
        raise ArgumentError(f"--count {asked.count}: at least one accelerator is needed")
    return asked.count


def _power(asked: Asked, tdp: float | None, assumed: list[str]) -> tuple[Span, Span | None]:
    """Watts of one accelerator, and the share of its TDP where it is that."""
    if asked.power is not None:
        if asked.utilization is not None:
            raise ArgumentError(
                "--power and --utilization are both given: --utilization is a share of TDP, --power watts; use one"
            )
        return span("--power", asked.power, hint=", in watts"), None
    assert tdp is not None
    if asked.utilization is None:
        assumed.append(f"full TDP ({tdp:g} W) all the time, for want of --utilization: the most that an accelerator may draw")
        return Span.exact(tdp), Span.exact(1.0)
    share = span("--utilization", asked.utilization, most=1.0, hint=": it is a share of TDP; for more, give watts with --power")
    return share * tdp, share


@dataclass(frozen=True, slots=True)
class _Work:
    """How long it takes, and where that follows from the work, the work and the rate."""

    duration: Span
    flops: float | None = None
    mfu: Span | None = None
    peak: DevicePeak | None = None


def _work(asked: Asked, known: KnownDevice, count: int, assumed: list[str], sources: list[str]) -> _Work:
    """The hours, typed or from the work at an MFU."""
    flops = _flops(asked, sources)
    if flops is None:
        if asked.mfu or asked.other_mfu:
            raise ArgumentError(
                "--mfu needs the work in place of --hours: --flops 3.14e23, or --parameters 175e9 --tokens 300e9"
            )
        if asked.hours is None:
            raise ArgumentError("how long? Give --hours 300, or the work and an MFU: --parameters 7e9 --tokens 2e12 --mfu 0.4")
        return _Work(span("--hours", asked.hours) * S_PER_HOUR)
    if asked.hours is not None:
        raise ArgumentError("--hours and the work (--flops, --parameters) are both given: hours follow from the work")
    if asked.mfu is None:
        raise ArgumentError("an MFU must be assumed to get hours from FLOPs: --mfu 0.4, or a range --mfu 0.35-0.45")
    mfu = span("--mfu", asked.mfu, most=1.0, hint=": it is a fraction of the peak")
    peak = peak_at(known, asked.dtype)
    if asked.dtype is None:
        assumed.append(f"the peak at {peak.dtype}, {si(peak.flop_per_s, 'FLOP/s')} dense, for want of --dtype")
    assumed.append("the MFU is what you typed: it is not known before the run")
    return _Work(duration_s(flops, count, peak.flop_per_s, mfu), flops, mfu, peak)


def _flops(asked: Asked, sources: list[str]) -> float | None:
    """The work, given or by 6ND."""
    if asked.tokens is not None:
        number("--tokens", asked.tokens)
    if asked.flops is not None:
        if asked.parameters is not None:
            raise ArgumentError("--flops and --parameters both give the work: use one")
        return number("--flops", asked.flops)
    if asked.parameters is None:
        return None
    if asked.tokens is None:
        raise ArgumentError("--parameters needs --tokens: the work is 6 × parameters × tokens")
    sources.append(
        "FLOPs: 6 × parameters × tokens (Kaplan et al. 2020, arXiv 2001.08361): a dense transformer, attention's own share left out"
    )
    return training_flops(number("--parameters", asked.parameters), asked.tokens)


def _share(embodied: Embodied | None, count: int) -> Embodied | None:
    """The manufacture of one card of so many."""
    if embodied is None:
        return None
    made = manufacturing_g(embodied) / (count * G_PER_KG)
    return replace(embodied, manufacturing_kg=made.value, manufacturing_lo_kg=made.lo, manufacturing_hi_kg=made.hi)


def _other_mfu(typed: str, work: _Work, taken: Callable[[Span], Footprint]) -> OtherMfu:
    """The same work at another MFU."""
    assert work.mfu is not None
    other = span("--against-mfu", typed, most=1.0)
    ratio = work.mfu.value / other.value
    return OtherMfu(other, taken(work.duration * ratio), 1.0 - ratio)


def _embodied(asked: Asked, device: str, count: int, assumed: list[str], missing: list[str]) -> Embodied | None:
    """The manufacture of all the cards, typed or from the table."""
    lifetime = 4.0 if asked.lifetime is None else number("--lifetime", asked.lifetime)
    in_use = 1.0 if asked.in_use is None else number("--in-use", asked.in_use, most=1.0)
    if asked.embodied_kg is not None:
        kg = span("--embodied-kg", asked.embodied_kg, least=0.0) * count
        found: Embodied | None = Embodied(kg.value, "given by the user", lifetime, in_use, kg.lo, kg.hi)
    else:
        found = embodied_for(device, count, server=asked.server, lifetime_years=lifetime, expected_utilization=in_use)
    if found is None:
        missing.append(f"embodied emissions: no published figure for {device}. Give your own for one card: --embodied-kg 150")
        return None
    if asked.lifetime is None:
        assumed.append("cards are kept for 4 years, for want of --lifetime")
    if asked.in_use is None:
        assumed.append("cards are in use all their life, for want of --in-use: the least that the run can be charged")
    if not asked.server and asked.embodied_kg is None:
        missing.append("making the servers around the accelerators: --server adds a share, where one is known")
    return found


# ── for people ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def show(one: Estimate, console: Console) -> None:
    """Prints the estimate, what was assumed, what is missing and where the figures are from."""
    found = one.footprint
    console.print(Text(f"{one.count:,} × {one.device}, estimated before the run", style="bold"))
    main = table("", "estimate", "between", "from")
    power = f"{percent(one.utilization.value)} of {one.tdp_w:g} W TDP" if one.utilization and one.tdp_w else "given"
    if one.flops is not None and one.mfu is not None and one.peak is not None:
        main.add_row("Model FLOPs", f"{one.flops:.3g}", "", "the work")
        rate = f"{percent(one.mfu.value)} MFU of {si(one.peak.flop_per_s, 'FLOP/s')}, {one.peak.dtype}"
    else:
        rate = "given"
    rows = [
        ("Duration", found.duration_s, _time, rate),
        ("Power of each", one.power_w, lambda value: si(value, "W"), power),
        ("Energy (IT)", found.energy_j, kwh, "power × time × count"),
        ("Energy (facility)", found.facility_energy_j, kwh, f"× PUE {one.pue.value:g}"),
        ("Operational", found.operational_g, grams, f"× {rounded(one.intensity_g_per_kwh.value)} gCO2e/kWh"),
    ]
    if found.embodied_g is not None and found.manufacturing_g is not None and one.embodied is not None:
        life = f"{one.embodied.lifetime_years:g} years, {percent(one.embodied.expected_utilization)} in use"
        rows.append(("Embodied, share", found.embodied_g, grams, f"of {grams(found.manufacturing_g.value)}, {life}"))
    rows.append(("Emissions", found.emissions_g, grams, "both" if found.embodied_g else "operational alone"))
    if one.cost is not None:
        rows.append(("Cost", one.cost, rounded, f"{one.price_per_kwh:g} a kWh (facility)"))
    rows += [(f"SCI per {unit}", sci, grams, "(E × I + M) / R") for unit, sci in one.sci_g.items() if unit != "run"]
    for name, value, words, source in rows:
        main.add_row(name, words(value.value), between(value, words), source)
    if found.manufacturing_g is not None:
        main.add_section()
        main.add_row("Making all the cards", grams(found.manufacturing_g.value), between(found.manufacturing_g, grams), "once")
    console.print(main)
    if one.other_mfu is not None and one.mfu is not None:
        there = one.other_mfu
        verb = f"{percent(there.saved)} less" if there.saved >= 0 else f"{percent(-there.saved)} more"
        console.print()
        console.print(
            Text(
                f"At {percent(there.mfu.value)} MFU in place of {percent(one.mfu.value)}: {_time(there.footprint.duration_s.value)}, "
                f"{kwh(there.footprint.energy_j.value)} (IT), {grams(there.footprint.emissions_g.value)}: {verb} of each."
            )
        )
    bullets(console, "Assumed", one.assumed)
    bullets(console, "Not counted", one.missing)
    bullets(console, "From", one.sources)


def _time(duration: float) -> str:
    hours = duration / S_PER_HOUR
    return f"{rounded(hours)} h" if hours < 240 else f"{rounded(hours)} h ({rounded(hours / 24)} days)"
