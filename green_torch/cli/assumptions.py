"""What ``estimate`` and ``hardware`` share: a card by the name that people type, numbers with a spread, the grid, and notes on them."""

from __future__ import annotations

import difflib
import math
import re
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from green_torch.errors import ArgumentError
from green_torch.estimate import Span
from green_torch.peaks import DTYPES, known_devices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rich.console import Console

    from green_torch.peaks import KnownDevice
    from green_torch.records import DevicePeak, IntensityPoint

HALF = "half"  # the column of bfloat16, or float16 on a card without it
_VENDOR_WORDS = {"nvidia", "amd", "geforce", "rtx", "instinct", "tesla", "quadro", "generation"}
_NUMBER = r"\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?"


# ── cards ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def cards(name: str) -> tuple[KnownDevice, ...]:
    """Every card that a name may mean: as the driver prints it, or by its words in any case ("a100", "H100 PCIe", "4090").

    Raises:
        ArgumentError: none; the message names the nearest.
    """
    wanted = _words(name)
    exact = [known for known in known_devices() if known.matches(name) or _words(known.name) == wanted]
    exact = exact or [
        known for known in known_devices() if wanted and wanted - _VENDOR_WORDS == _words(known.name) - _VENDOR_WORDS
    ]
    found = exact or [known for known in known_devices() if wanted and wanted <= _words(known.name)]
    if not found:
        raise ArgumentError(f"{name!r} is not in the table of cards. {_nearest(name)}See all: green-torch hardware")
    return tuple(found)


def card(name: str) -> tuple[KnownDevice, str]:
    """The card that a name means, the table's first where several may be meant, and then a note that says so."""
    found = cards(name)
    others = ", ".join(repr(known.name) for known in found[1:])
    return found[0], f"{name} is taken for {found[0].name}; it may also be {others}" if others else ""


def peak_at(known: KnownDevice, dtype: str | None) -> DevicePeak:
    """A card's dense peak at "bf16" and the like; without one, at half precision: bfloat16, else float16.

    Raises:
        ArgumentError: an unknown dtype, or the card has no figure for it.
    """
    if dtype is None or dtype == HALF:
        found = known.peak("bfloat16") or known.peak("float16")
    else:
        name = DTYPES.get(dtype.lower(), dtype.lower())
        if name not in DTYPES.values():
            raise ArgumentError(f"--dtype {dtype}: use one of {', '.join(DTYPES)}")
        found = known.peak(name)
    if found is not None:
        return found
    has = ", ".join(short for short, name in DTYPES.items() if name in known.peaks_flop_per_s)
    raise ArgumentError(
        f"{known.name} has no figure for {dtype or 'half precision'} in the table; it has {has}: --dtype {has.split(', ')[0]}"
    )


def tdp_w(known: KnownDevice, hint: str = "") -> float:
    """A card's TDP; ``hint`` is what to do about it where the table has none.

    Raises:
        ArgumentError: the table has none.
    """
    if known.tdp_w is None:
        raise ArgumentError(f"{known.name} has no TDP of its own in the table{hint}")
    return known.tdp_w


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9.]+", name.lower()))


def _nearest(name: str) -> str:
    spelt = {" ".join(sorted(_words(known.name) - _VENDOR_WORDS)): known.name for known in known_devices()}
    spelt |= {word: known.name for known in reversed(known_devices()) for word in _words(known.name) - _VENDOR_WORDS}
    near = difflib.get_close_matches(" ".join(sorted(_words(name) - _VENDOR_WORDS)), spelt, n=6, cutoff=0.5)
    names = list(dict.fromkeys(spelt[key] for key in near))[:4]
    return f"Nearest: {', '.join(names)}. " if names else ""


# ── numbers ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def span(option: str, text: str, *, least: float | None = None, most: float = math.inf, hint: str = "") -> Span:
    """A number above 0 (or at least ``least``) and at most ``most``, or a range "0.5-0.7" of such, whose middle is the figure.

    Raises:
        ArgumentError: neither, or out of its bounds.
    """
    given = re.fullmatch(rf"\s*({_NUMBER})\s*(?:(?:-|\.\.)\s*({_NUMBER})\s*)?", text, flags=re.IGNORECASE)
    if not given:
        raise ArgumentError(
            f"{option} {text!r}: type a number that is not negative, {option} 0.5, or a range, {option} 0.4-0.6"
        )
    lo = float(given[1])
    hi = lo if given[2] is None else float(given[2])
    if lo > hi:
        raise ArgumentError(f"{option} {text}: the lower end comes first")
    for end in (lo, hi):
        number(option, end, least=least, most=most, hint=hint)
    return Span((lo + hi) / 2, lo, hi)


def number(option: str, value: float, *, least: float | None = None, most: float = math.inf, hint: str = "") -> float:
    """The number, if it is above 0 (or at least ``least``) and at most ``most``.

    Raises:
        ArgumentError: it is not.
    """
    if not (math.isfinite(value) and (value > 0 if least is None else value >= least) and value <= most):
        bound = "above 0" if least is None else f"at least {least:g}"
        limit = "" if math.isinf(most) else f" and at most {most:g}"
        raise ArgumentError(f"{option} {value:g}: a number {bound}{limit} is needed{hint}")
    return value


# ── the grid ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def grid(region: str | None, intensity: str | None, pue: str | None) -> tuple[IntensityPoint, Span, Span, str]:
    """The grid's point, its g/kWh with a spread where one was given, and the PUE with its source.

    Raises:
        UnknownRegionError: no table has the region.
        ArgumentError: no number, or out of its bounds.
    """
    from green_torch.intensity import pue_for, resolve  # codecarbon's tables take a moment to load

    typed = None if intensity is None else span("--intensity", intensity, least=0.0, hint=", in gCO2e/kWh")
    point = resolve(region, None if typed is None else typed.value).at(0)
    published, source = pue_for(region)
    if pue is None:
        return point, typed or Span.exact(point.g_per_kwh), Span.exact(published), source
    return point, typed or Span.exact(point.g_per_kwh), span("--pue", pue, least=1.0, hint=": facility over IT energy"), "given"


# ── words ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def between(one: Span, show: Callable[[float], str]) -> str:
    """The least and the most of it in words; empty where it has no spread."""
    return "" if one.is_exact else f"{show(one.lo)} to {show(one.hi)}"


def bullets(console: Console, title: str, lines: Iterable[str]) -> None:
    """A titled list whose lines wrap under themselves; nothing where it is empty."""
    listed: Sequence[str] = tuple(dict.fromkeys(line for line in lines if line))
    if not listed:
        return
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for line in listed:
        grid.add_row("•", Text(line))
    console.print()
    console.print(Text(title, style="bold"))
    console.print(grid)
