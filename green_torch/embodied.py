"""What it took to make a card, in kgCO2e, sourced and with its spread (``data/embodied.csv``); never guessed.

Published figures for one card lie up to five times apart, since makers, life-cycle studies and models draw other lines: each row
carries its figure, the lowest and the highest found, and where each is from; one that rests on a model alone has no spread. An unknown
card has no figure (``None``).
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from green_torch.errors import ArgumentError
from green_torch.records import Embodied

__all__ = ["MadeDevice", "embodied_for", "made_device", "made_devices"]


@dataclass(frozen=True, slots=True)
class MadeDevice:
    """One row: a card as the driver names it, and what making it emitted (kgCO2e), with the least and most that is published.

    ``lo_kg`` and ``hi_kg`` are ``None`` where one source alone tells; ``spread`` says what is known of it. ``server_kg`` is an accelerator's share of what stands around it in a server (hosts, memory, storage, case), with its own spread;
    ``None`` where no figure was found.
    """

    name: str
    pattern: str
    kg: float
    lo_kg: float | None
    hi_kg: float | None
    basis: str
    source: str
    spread: str
    server_kg: float | None
    server_lo_kg: float | None
    server_hi_kg: float | None
    server_source: str
    checked: str

    def matches(self, device_name: str) -> bool:
        """Whether the driver's name, with or without the vendor in front, is this card's."""
        bare = re.sub(r"^(nvidia|amd)\s+", "", " ".join(device_name.split()), flags=re.IGNORECASE)
        return re.fullmatch(self.pattern, bare, flags=re.IGNORECASE) is not None


@cache
def made_devices() -> tuple[MadeDevice, ...]:
    """Every row of the table, in its order."""
    text = (files("green_torch") / "data" / "embodied.csv").read_text(encoding="utf-8")
    return tuple(_made(row) for row in csv.DictReader(text.splitlines()))


def made_device(device_name: str) -> MadeDevice | None:
    """The row of a card, by its name as the driver prints it ("NVIDIA H100 80GB HBM3"); ``None`` where nobody has published one."""
    found = [made for made in made_devices() if made.matches(device_name)]
    return found[0] if len(found) == 1 else None


def embodied_for(
    device_name: str,
    count: int = 1,
    *,
    server: bool = False,
    lifetime_years: float = 4.0,
    expected_utilization: float = 1.0,
) -> Embodied | None:
    """The manufacturing footprint of ``count`` cards, for ``track(embodied=…)``; ``None`` for a card that is not in the table.

    Args:
        device_name: as the driver prints it.
        count: how many of them.
        server: adds each one's share of its server, where a figure for it was found; ``source`` says whether it was.
        lifetime_years: how long they are kept.
        expected_utilization: the share of that time in which they are in use, 0-1.

    Raises:
        ArgumentError: a count, lifetime or utilization that can't be.
    """
    if count < 1 or int(count) != count:
        raise ArgumentError(f"count={count!r}: a whole number of at least 1 is needed")
    if not (math.isfinite(lifetime_years) and lifetime_years > 0):
        raise ArgumentError(f"lifetime_years={lifetime_years!r}: a positive number is needed")
    if not 0 < expected_utilization <= 1:
        raise ArgumentError(f"expected_utilization={expected_utilization!r}: a share of the time, above 0 and at most 1")
    made = made_device(device_name)
    if made is None:
        return None
    kg, lo_kg, hi_kg, source = made.kg, made.lo_kg, made.hi_kg, f"{made.name}, {made.basis}: {made.source} ({made.spread})"
    if server and made.server_kg is not None:
        kg, lo_kg, hi_kg = kg + made.server_kg, _sum(lo_kg, made.server_lo_kg), _sum(hi_kg, made.server_hi_kg)
        source += f"; and its share of the server, {made.server_kg:g} kg: {made.server_source}"
    elif server:
        source += "; its share of a server is not known and left out"
    return Embodied(
        manufacturing_kg=count * kg,
        source=f"{count} × {source}" if count > 1 else source,
        lifetime_years=lifetime_years,
        expected_utilization=expected_utilization,
        manufacturing_lo_kg=None if lo_kg is None else count * lo_kg,
        manufacturing_hi_kg=None if hi_kg is None else count * hi_kg,
    )


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def _made(row: dict[str, str]) -> MadeDevice:
    return MadeDevice(
        name=row["name"],
        pattern=row["pattern"],
        kg=float(row["kg"]),
        lo_kg=_number(row["low_kg"]),
        hi_kg=_number(row["high_kg"]),
        basis=row["basis"],
        source=row["source"],
        spread=row["spread"],
        server_kg=_number(row["server_kg"]),
        server_lo_kg=_number(row["server_low_kg"]),
        server_hi_kg=_number(row["server_high_kg"]),
        server_source=row["server_source"],
        checked=row["checked"],
    )


def _number(text: str) -> float | None:
    return float(text) if text else None
