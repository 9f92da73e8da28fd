"""``green-torch hardware``: what each card computes for a watt, and when moving a measured run to a new card repays making it.

:func:`examine` lists the cards, :func:`refresh` sets a run's measured joules a FLOP against a new card's; :func:`show` and
:func:`show_refresh` print.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from green_torch import ledger
from green_torch.cli.assumptions import HALF, between, bullets, card, cards, grid, number, peak_at, tdp_w
from green_torch.cli.console import grid_line, how_known, percent, rounded, table
from green_torch.embodied import embodied_for, made_device
from green_torch.errors import ArgumentError
from green_torch.estimate import MONTHS_PER_YEAR, Payback, Span, manufacturing_g, payback
from green_torch.peaks import DTYPES, known_devices
from green_torch.processor import ARCHITECTURES
from green_torch.records import DevicePeak, Embodied, IntensityPoint, Method, Phase
from green_torch.units import FLOP_PER_TFLOP, G_PER_KG, HOURS_PER_YEAR, grams, si

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from rich.console import Console

    from green_torch.ledger import Run
    from green_torch.peaks import KnownDevice

SCHEMA = "green_torch.hardware/1"
REFRESH_SCHEMA = "green_torch.refresh/1"
_SOURCES = 12  # cards: of so many each one's source is printed
_FEWEST_MONTHS = 2  # below, days are told
_HALF_NOTE = "half: bfloat16, or float16 on a card without it. TDP is a limit, not what a run draws: what yours draws is in green-torch report."
_MADE_NOTE = (
    "made: kgCO2e of making the accelerator alone, in brackets the least and most that is published or modelled; ~ where "
    "nothing but a model is known: it has no spread, and stands 1.6 to 5 times above makers' and studies' figures for the cards that "
    "have both; – is unknown."
)


@dataclass(frozen=True, slots=True)
class Card:
    """One card: dense TFLOP/s a watt at TDP by dtype ("half": bfloat16, or float16), and kgCO2e of making one with its spread."""

    name: str
    generation: str
    year: int | None
    tdp_w: float | None
    peaks_flop_per_s: dict[str, float]
    tflop_per_s_per_w: dict[str, float]
    source: str
    manufacturing_kg: float | None = None
    manufacturing_lo_kg: float | None = None
    manufacturing_hi_kg: float | None = None
    manufacturing_source: str = ""
    modelled: bool = False
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """Cards, the most TFLOP/s a watt at ``dtype`` first; those without a figure for it last."""

    schema: str
    dtype: str
    cards: tuple[Card, ...]


@dataclass(frozen=True, slots=True)
class Refresh:
    """When moving a run's work to another card repays making it. ``mfu_new`` and ``power_share_new`` (of TDP) are assumptions.

    ``mfu_of_cpu``: ``mfu_new`` is what the run reached on a CPU, for want of another, and tells next to nothing of a GPU.
    ``within_lifetime`` is ``None`` where the spread of the making allows both.
    """

    schema: str
    run: str
    device_old: str
    count_old: int
    energy_known: str
    energy_measured: bool
    mfu_old: float | None
    power_old_w: float
    host_power_w: float
    device_new: str
    peak_new: DevicePeak
    mfu_new: float
    power_share_new: float
    power_new_w: float
    intensity: IntensityPoint
    pue: float
    in_use: float
    lifetime_years: float
    embodied: Embodied
    payback: Payback
    within_lifetime: bool | None
    mfu_of_cpu: bool = False
    assumed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


# ── what a watt computes ───────────────────────────────────────────────────────────────────────────────────────────────


def examine(names: Sequence[str] = (), dtype: str | None = None) -> Report:
    """Every card of the table, or those that the names may mean, sorted by TFLOP/s a watt.

    Raises:
        ArgumentError: an unknown name or dtype.
    """
    wanted = HALF if dtype is None else DTYPES.get(dtype.lower(), dtype.lower())
    if wanted not in {HALF, *DTYPES.values()}:
        raise ArgumentError(f"--dtype {dtype}: use one of {', '.join(DTYPES)}")
    found = (
        {known.name: known for name in names for known in cards(name)} if names else {one.name: one for one in known_devices()}
    )
    rows = sorted((_card(known) for known in found.values()), key=lambda one: -one.tflop_per_s_per_w.get(wanted, -1.0))
    return Report(SCHEMA, wanted, tuple(rows))


def _card(known: KnownDevice) -> Card:
    peaks = dict(known.peaks_flop_per_s)
    half = peaks.get("bfloat16", peaks.get("float16"))
    if half is not None:
        peaks[HALF] = half
    made = made_device(known.examples[0])
    return Card(
        name=known.name,
        generation=known.generation,
        year=known.year,
        tdp_w=known.tdp_w,
        peaks_flop_per_s=peaks,
        tflop_per_s_per_w={}
        if known.tdp_w is None
        else {key: peak / FLOP_PER_TFLOP / known.tdp_w for key, peak in peaks.items()},
        source=known.cited,
        manufacturing_kg=made.kg if made else None,
        manufacturing_lo_kg=made.lo_kg if made else None,
        manufacturing_hi_kg=made.hi_kg if made else None,
        manufacturing_source=f"{made.basis}: {made.source}; {made.spread}" if made else "",
        modelled=made is not None and made.basis.startswith("model"),
        missing=() if made else ("no published figure of making it",),
    )


def show(report: Report, console: Console) -> None:
    """Prints the cards."""
    brief = {long: short for short, long in DTYPES.items()} | {HALF: "half"}
    columns = ["float32", "tf32", HALF, "float8"]
    if report.dtype not in columns:
        columns.insert(0, report.dtype)
    console.print(Text("Dense TFLOP/s a watt, at TDP; the most at " + brief[report.dtype] + " precision first", style="bold"))
    main = table("card", "year", "TDP W", *(brief[one] for one in columns), "made, kg")
    for column in main.columns[1:]:
        column.no_wrap = True
        column.justify = "right"
    for one in report.cards:
        made = "–" if one.manufacturing_kg is None else f"{'~' * one.modelled}{one.manufacturing_kg:.0f}"
        if one.manufacturing_lo_kg is not None and one.manufacturing_hi_kg is not None:
            made += f" ({one.manufacturing_lo_kg:.0f}-{one.manufacturing_hi_kg:.0f})"
        main.add_row(
            one.name.removeprefix("NVIDIA ").removeprefix("AMD "),
            str(one.year or "–"),
            "–" if one.tdp_w is None else f"{one.tdp_w:g}",
            *(f"{one.tflop_per_s_per_w[key]:.2f}" if key in one.tflop_per_s_per_w else "–" for key in columns),
            made,
        )
    console.print(main)
    notes = [_HALF_NOTE, _MADE_NOTE]
    if len(report.cards) > _SOURCES:
        notes.append("Each figure's source: green-torch hardware NAME… for a few cards, --json for all.")
    bullets(console, "Notes", notes)
    if len(report.cards) <= _SOURCES:
        bullets(console, "From", _card_sources(report.cards))


def _card_sources(found: Sequence[Card]) -> Iterator[str]:
    for one in found:
        yield f"{one.name}: {one.source}"
        if one.manufacturing_source:
            yield f"{one.name}, made: {one.manufacturing_source}"


# ── when a new one repays its making ───────────────────────────────────────────────────────────────────────────────────


def refresh(
    directory: Path,
    to: str,
    *,
    mfu_to: float | None = None,
    power_to: float | None = None,
    dtype: str | None = None,
    region: str | None = None,
    intensity: float | None = None,
    pue: float | None = None,
    in_use: float | None = None,
    lifetime: float | None = None,
    embodied_kg: float | None = None,
    server: bool = False,
) -> Refresh:
    """Sets the joules a model FLOP of a measured run's training against those of another card.

    Args:
        directory: where the run is.
        to: the new card.
        mfu_to: its MFU; without it, the one that was measured on the old card.
        power_to: its power as a share of TDP; without it, the old card's share, else all of it.
        dtype: at which its peak counts; without it, the one that the run's own peak was for.
        region: where it will stand, likewise ``intensity`` and ``pue``; without them, what the run recorded.
        intensity: gCO2e/kWh.
        pue: facility over IT energy.
        in_use: the share of its life in which it works; without it, all.
        lifetime: years; without it, 4.
        embodied_kg: kgCO2e of making one, where the table has none or another is wanted.
        server: counts a share of its server too.

    Raises:
        ArgumentError: no such card, run or region, numbers that can't be, or the run lacks energy, FLOPs or a footprint.
    """
    assumed: list[str] = []
    missing: list[str] = []
    run = _the_run(directory)
    new, note = card(to)
    assumed.append(note)
    old = _old(run)
    mfu_of_cpu = mfu_to is None and not old.is_gpu

    peak = peak_at(new, dtype or _dtype_of(run, new, assumed))
    mfu = _mfu_new(run, mfu_to, old.device, of_cpu=mfu_of_cpu, assumed=assumed)
    share = _power_share(power_to, old.power_w - old.host_w, old.device, assumed)
    if old.host_w:
        assumed.append(f"the host draws {si(old.host_w, 'W')} beside each card, as measured on the old one")
    else:
        missing.append("processors and memory of the new card's host: the run has no joules of one beside a GPU")
    used = 1.0 if in_use is None else number("--in-use", in_use, most=1.0)
    years = 4.0 if lifetime is None else number("--lifetime", lifetime)
    if in_use is None:
        assumed.append("the cards work all the time, for want of --in-use: the soonest that it can pay back")
    if lifetime is None:
        assumed.append("the new card is kept for 4 years, for want of --lifetime")

    point, factor, pue_source = _grid(run, region, intensity, pue, assumed)
    embodied = _embodied(new, embodied_kg, server=server, lifetime=years, in_use=used)
    if embodied_kg is None:
        missing += _not_in_making(embodied, server=server)
    missing.append("what cards draw while idle; making the old card, which is spent either way")
    power_new = share * tdp_w(new) + old.host_w
    result = payback(
        energy_old_j_per_flop=old.energy_j_per_flop,
        flop_per_s_old=old.flop_per_s,
        power_new_w=power_new,
        flop_per_s_new=peak.flop_per_s * mfu,
        facility_g_per_kwh=point.g_per_kwh * factor,
        in_use=used,
        lifetime_years=years,
        made_g=manufacturing_g(embodied),
    )
    assumed.append(f"there is work enough for the new card: that of {rounded(result.work_ratio)} old ones")
    return Refresh(
        schema=REFRESH_SCHEMA,
        run=run.name,
        device_old=old.device,
        count_old=old.count,
        energy_known=_known(run),
        energy_measured=not run.totals.share(Method.ESTIMATED),
        mfu_old=run.mfu,
        power_old_w=old.power_w,
        host_power_w=old.host_w,
        device_new=new.name,
        peak_new=peak,
        mfu_new=mfu,
        power_share_new=share,
        power_new_w=power_new,
        intensity=point,
        pue=factor,
        in_use=used,
        lifetime_years=years,
        embodied=embodied,
        payback=result,
        within_lifetime=result.within(years),
        mfu_of_cpu=mfu_of_cpu,
        assumed=tuple(line for line in assumed if line),
        missing=tuple(missing),
        sources=(
            f"joules a FLOP: the run's training, {_known(run)}",
            f"new card: {new.cited}",
            f"grid: {grid_line(point)}",
            f"PUE {factor:g}: {pue_source}",
            f"making the new card: {embodied.source}",
        ),
    )


def _the_run(directory: Path) -> Run:
    found = ledger.read(directory)
    if len(found.runs) == 1:
        return found.runs[0]
    if not found.runs:
        why = "".join(f"; {one.path.name}: {one.reason}" for one in found.skipped[:3])
        raise ArgumentError(f"--from {str(directory)!r}: no run of green_torch below it{why}")
    places = ", ".join(str(run.segments[0].path.parent.parent) for run in found.runs[:4])
    raise ArgumentError(f"--from {str(directory)!r}: {len(found.runs)} runs below it; give one: {places}")


@dataclass(frozen=True, slots=True)
class _Old:
    """What training took on each of a run's ``count`` devices. ``power_w`` holds its share of the host, which beside a GPU is ``host_w``."""

    device: str
    count: int
    is_gpu: bool
    energy_j_per_flop: float
    flop_per_s: float
    power_w: float
    host_w: float


def _old(run: Run) -> _Old:
    """What a run was on.

    Raises:
        ArgumentError: it has no joules or no FLOPs of training on record.
    """
    train = run.totals.phase(Phase.TRAIN)
    gpus = Counter(
        domain.device for segment in run.first_rank for domain in segment.manifest.domains if domain.name.startswith("gpu")
    )
    ranks = len({segment.manifest.rank for segment in run.segments})
    count = max(1, sum(gpus.values()) // len(run.first_rank)) * ranks
    if not train.energy_j or not train.model_flops:
        lacks = "energy" if not train.energy_j else "model FLOPs"
        how = "see green-torch doctor" if not train.energy_j else "pass the model, or flops_per_step=, to track()"
        raise ArgumentError(
            f"run {run.name!r} has no {lacks} of training on record, and what it needs a FLOP is not known: {how}"
        )
    duration_s = train.duration_s / ranks
    power_w = train.energy_j / duration_s / count
    return _Old(
        device=next(iter(gpus), "") or _processor(run),
        count=count,
        is_gpu=bool(gpus),
        energy_j_per_flop=train.energy_j / train.model_flops,
        flop_per_s=train.model_flops / duration_s / count,
        power_w=power_w,
        host_w=power_w * _host_share(run) if gpus else 0.0,
    )


def _processor(run: Run) -> str:
    """What a run without a metered GPU was on, by the processor's name where the system tells its architecture alone."""
    own = run.manifest.device
    named = (domain.device for domain in run.manifest.domains if domain.name.startswith("cpu"))
    return (own if own not in ARCHITECTURES else "") or next(filter(None, named), "") or own or "the CPU"


def _known(run: Run) -> str:
    return how_known({domain.name: domain.method for domain in run.totals.domains})


def _host_share(run: Run) -> float:
    """The share of the run's joules that no GPU used."""
    total = sum(domain.energy_j for domain in run.totals.domains)
    rest = sum(domain.energy_j for domain in run.totals.domains if not domain.name.startswith("gpu"))
    return rest / total if total else 0.0


def _dtype_of(run: Run, new: KnownDevice, assumed: list[str]) -> str | None:
    """The dtype that the run's own peak was for, where the new card has a figure for it."""
    for peak in run.manifest.peaks:
        mixed = re.findall(r"/(\w+) ([\d.]+)%", peak.dtype)  # a blend, "mm/bfloat16 98.2% + conv/tf32 1.8%"
        ran = max(mixed, key=lambda part: float(part[1]))[0] if mixed else peak.dtype.rpartition("/")[2]
        if peak.basis != "user" and ran in new.peaks_flop_per_s:
            assumed.append(
                f"the work runs at {ran} on the new card as it did, or most of it, on the old: --dtype says otherwise"
            )
            return ran
    dtype = peak_at(new, None).dtype
    assumed.append(
        f"the work runs at {dtype} on the new card, since the run's own dtype is not on record: --dtype says otherwise"
    )
    return dtype


def _mfu_new(run: Run, mfu_to: float | None, device_old: str, *, of_cpu: bool, assumed: list[str]) -> float:
    """The new card's MFU: what was typed, else the run's own."""
    mfu = run.mfu if mfu_to is None else number("--mfu-to", mfu_to, most=1.0)
    if mfu is None:
        raise ArgumentError(
            f"run {run.name!r} has no MFU on record (no peak is known for {device_old}): assume one, --mfu-to 0.4"
        )
    if of_cpu:
        assumed.append(
            f"the new card reaches {percent(mfu)}, the run's MFU on a CPU (no GPU was metered in it): a guess, since a GPU may reach far "
            "less or more. --mfu-to says otherwise, from a run of yours on such a card"
        )
    elif mfu_to is None:
        assumed.append(f"the new card reaches the run's own MFU, {percent(mfu)}: --mfu-to says otherwise")
    else:
        assumed.append(f"the new card reaches an MFU of {percent(mfu)}: what you typed, not measured")
    return mfu


def _power_share(given: float | None, power_old_w: float, device_old: str, assumed: list[str]) -> float:
    """The new card's power over its TDP."""
    if given is not None:
        share = number("--power-to", given, most=1.5, hint=": a share of TDP")
        assumed.append(f"the new card draws {percent(share)} of its TDP: what you typed, not measured")
        return share
    old = next((known for known in known_devices() if known.matches(device_old) and known.tdp_w), None)
    if old is None or old.tdp_w is None:
        assumed.append("the new card draws all of its TDP: the old one's share is not known. --power-to 0.7 says otherwise")
        return 1.0
    share = power_old_w / old.tdp_w
    assumed.append(f"the new card draws {percent(share)} of its TDP, as the old one did of its own: --power-to says otherwise")
    return share


def _grid(
    run: Run, region: str | None, intensity: float | None, pue: float | None, assumed: list[str]
) -> tuple[IntensityPoint, float, str]:
    """Where the new card will stand, or the run's own grid: its point, and the PUE with its source."""
    own = run.manifest
    typed = None if pue is None else number("--pue", pue, least=1.0, hint=": facility over IT energy")
    if region is None and intensity is None and own.intensity is not None:
        assumed.append(f"the run's own grid, {own.intensity.region}: --region says otherwise")
        return (own.intensity, own.pue, own.pue_source) if typed is None else (own.intensity, typed, "given by the user")
    point, _, published, source = grid(region, None if intensity is None else str(intensity), None)
    if region is None and intensity is None:
        assumed.append(f"{point.region}: --region FR, say")
    return (point, published.value, source) if typed is None else (point, typed, "given by the user")


def _embodied(new: KnownDevice, kg: float | None, *, server: bool, lifetime: float, in_use: float) -> Embodied:
    if kg is not None:
        return Embodied(number("--embodied-kg", kg, least=0.0), "given by the user", lifetime, in_use)
    found = embodied_for(new.examples[0], server=server, lifetime_years=lifetime, expected_utilization=in_use)
    if found is None:
        raise ArgumentError(f"what making a {new.name} emitted is not published: give your own figure, --embodied-kg 150")
    return found


def _not_in_making(embodied: Embodied, *, server: bool) -> Iterator[str]:
    """What the table's figure of making a card lacks."""
    if not server:
        yield "making the server around the new card: --server adds a share, where one is known"
    if embodied.manufacturing_lo_kg is None:
        yield "how far the figure of making the new card may be off: nothing but a model is known (see From)"


def show_refresh(one: Refresh, console: Console) -> None:
    """Prints when the new card repays its making, what was assumed and where the figures are from."""
    result = one.payback
    several = f"{one.count_old} × " if one.count_old > 1 else ""
    console.print(Text(f"{one.run}: from {several}{one.device_old} to {one.device_new}", style="bold"))
    main = table("", "the run", "new card, assumed")
    main.add_row(
        "MFU", percent(one.mfu_old), f"{percent(one.mfu_new)} of {si(one.peak_new.flop_per_s, 'FLOP/s')}, {one.peak_new.dtype}"
    )
    main.add_row("Power of each, with its host", si(one.power_old_w, "W"), si(one.power_new_w, "W"))
    main.add_row(
        "Energy a TFLOP of the model",
        si(result.energy_old_j_per_flop * FLOP_PER_TFLOP, "J"),
        si(result.energy_new_j_per_flop * FLOP_PER_TFLOP, "J"),
    )
    main.add_row("Old cards' work that one does", "1", rounded(result.work_ratio))
    main.add_row("Made, one card", "spent", _span(result.made_g))
    main.add_row("Saved a month by one", "", grams(result.saving_g_per_month))
    console.print(main)
    console.print()
    console.print(Text(verdict(one), style="bold"))
    bullets(console, "Assumed", one.assumed)
    bullets(console, "Not counted", one.missing)
    bullets(console, "From", one.sources)


def verdict(one: Refresh) -> str:
    """The answer in a sentence or two."""
    result = one.payback
    modelled = "" if one.energy_measured else " The run's joules are a model, not measured: the answer is no better."
    if one.mfu_of_cpu:
        modelled += " That the new card reaches the MFU of a run on a CPU is a guess: give one with --mfu-to."
    if result.months is None:
        if result.energy_new_j_per_flop >= result.energy_old_j_per_flop:
            return "Never pays back: at these assumptions the new card needs as much energy for the work, or more." + modelled
        return "Never pays back: the grid is counted at 0 gCO2e/kWh, so no emissions are saved." + modelled
    life = one.lifetime_years * MONTHS_PER_YEAR
    scale, unit = (1.0, "months") if result.months >= _FEWEST_MONTHS else (HOURS_PER_YEAR / 24 / MONTHS_PER_YEAR, "days")
    told_in = f"{rounded(scale * result.months)} {unit}"
    if result.months_lo is not None and result.months_hi is not None and result.months_lo < result.months_hi:
        told_in += f" ({rounded(scale * result.months_lo)} to {rounded(scale * result.months_hi)})"
    told = {
        True: f"within its life of {rounded(life)} months",
        False: f"not within its life of {rounded(life)} months",
        None: f"whether within its life of {rounded(life)} months can't be told: figures of making it lie too far apart",
    }[one.within_lifetime]
    saved = f"{grams(result.saved_g)} ({grams(result.saved_lo_g)} to {grams(result.saved_hi_g)})"
    return f"Pays back in {told_in}: {told}. Over that life one card saves {saved}, its making taken off.{modelled}"


def _span(one: Span) -> str:
    spread = between(one, lambda value: f"{rounded(value / G_PER_KG)} kg")
    return f"{rounded(one.value / G_PER_KG)} kgCO2e" + (f" ({spread})" if spread else "")
