"""What a run will take before it has begun, and when new hardware repays its making: pure arithmetic on numbers with a spread.

A :class:`Span` is a figure with the least and the most it may be. Sums and products take the worst case of every input at once, which
is wider than chance would have it: the inputs may well be wrong together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from green_torch.footprint import embodied_g, operational_g
from green_torch.units import G_PER_KG, HOURS_PER_YEAR, S_PER_HOUR, joules_to_kwh

if TYPE_CHECKING:
    from green_torch.records import Embodied

MONTHS_PER_YEAR = 12
FLOPS_PER_PARAMETER_AND_TOKEN = 6  # 2 forward, 4 backward: C = 6ND (Kaplan et al. 2020, arXiv 2001.08361, section 2.1)


@dataclass(frozen=True, slots=True)
class Span:
    """A figure that is not negative, and the least and most it may be."""

    value: float
    lo: float
    hi: float

    @classmethod
    def exact(cls, value: float) -> Span:
        """A figure without a spread."""
        return cls(value, value, value)

    @property
    def is_exact(self) -> bool:
        """Whether it has no spread."""
        return self.lo == self.value == self.hi

    def __add__(self, other: Span) -> Span:
        return Span(self.value + other.value, self.lo + other.lo, self.hi + other.hi)

    def __mul__(self, other: Span | float) -> Span:
        by = other if isinstance(other, Span) else Span.exact(other)
        return Span(self.value * by.value, self.lo * by.lo, self.hi * by.hi)

    def __truediv__(self, other: Span | float) -> Span:
        by = other if isinstance(other, Span) else Span.exact(other)
        return Span(self.value / by.value, self.lo / by.hi, self.hi / by.lo)


def training_flops(parameters: float, tokens: float) -> float:
    """Model FLOPs of training a dense transformer, ``6 N D``: attention's own share is left out (Kaplan et al. 2020)."""
    return FLOPS_PER_PARAMETER_AND_TOKEN * parameters * tokens


def duration_s(flops: float, count: int, peak_flop_per_s: float, mfu: Span) -> Span:
    """How long ``count`` devices take for the work, at a model FLOPs utilisation (a fraction)."""
    return Span.exact(flops) / (mfu * (count * peak_flop_per_s))


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a run takes: IT and facility energy (J), operational and embodied gCO2e, both together, and the manufacture in full.

    ``embodied_g`` is the run's share of ``manufacturing_g``; both ``None`` where no figure for the card is known, and then
    ``emissions_g`` is the operational part alone.
    """

    duration_s: Span
    energy_j: Span
    facility_energy_j: Span
    operational_g: Span
    embodied_g: Span | None
    manufacturing_g: Span | None
    emissions_g: Span


def footprint(
    power_w: Span, duration: Span, pue: Span, intensity_g_per_kwh: Span, embodied: Embodied | None = None
) -> Footprint:
    """What ``power_w`` watts of IT take in ``duration`` seconds. ``embodied`` is that of all the devices together."""
    energy_j = power_w * duration
    operational = Span(
        *(
            operational_g(getattr(energy_j, end), getattr(pue, end), getattr(intensity_g_per_kwh, end))
            for end in ("value", "lo", "hi")
        )
    )
    share = None if embodied is None else embodied_share_g(embodied, duration)
    return Footprint(
        duration_s=duration,
        energy_j=energy_j,
        facility_energy_j=energy_j * pue,
        operational_g=operational,
        embodied_g=share,
        manufacturing_g=None if embodied is None else manufacturing_g(embodied),
        emissions_g=operational if share is None else operational + share,
    )


def manufacturing_g(embodied: Embodied) -> Span:
    """All that making the devices emitted, in gCO2e."""
    lo, hi = embodied.manufacturing_lo_kg, embodied.manufacturing_hi_kg
    kg = embodied.manufacturing_kg
    return Span(kg, kg if lo is None else lo, kg if hi is None else hi) * G_PER_KG


def embodied_share_g(embodied: Embodied, duration: Span) -> Span:
    """The gCO2e of manufacture charged to so many seconds of use (SCI's ``M``)."""
    made = manufacturing_g(embodied)
    shares = (
        embodied_g(replace(embodied, manufacturing_kg=getattr(made, end) / G_PER_KG), getattr(duration, end))
        for end in ("value", "lo", "hi")
    )
    return Span(*shares)


@dataclass(frozen=True, slots=True)
class Payback:
    """When a new card repays its making: months, ``None`` where it never does; and what its life saves, less its making.

    ``months_lo`` and ``months_hi`` follow from the spread of its making. ``saved_lo_g`` may be below zero: it was not worth it.
    ``work_ratio`` is how many old cards' work one new one does in the same hours.
    """

    energy_old_j_per_flop: float
    energy_new_j_per_flop: float
    work_ratio: float
    saving_g_per_month: float
    made_g: Span
    months: float | None
    months_lo: float | None
    months_hi: float | None
    saved_g: float
    saved_lo_g: float
    saved_hi_g: float

    def within(self, lifetime_years: float) -> bool | None:
        """Whether that is within its life; ``None`` where the spread allows both."""
        life = lifetime_years * MONTHS_PER_YEAR
        if self.months_lo is None or self.months_lo > life:
            return False
        return True if self.months_hi is not None and self.months_hi <= life else None


def payback(
    *,
    energy_old_j_per_flop: float,
    flop_per_s_old: float,
    power_new_w: float,
    flop_per_s_new: float,
    facility_g_per_kwh: float,
    in_use: float,
    lifetime_years: float,
    made_g: Span,
) -> Payback:
    """Compares joules a model FLOP on an old and a new card, and sets what is saved against making the new one.

    The work stays the same, so the number of cards does not matter: each new one, in use for the share ``in_use`` of its life, does
    ``flop_per_s_new × in_use`` FLOPs a second that the old cards would have done. The old cards' making is spent either way.

    Args:
        energy_old_j_per_flop: measured IT joules a model FLOP.
        flop_per_s_old: measured model FLOP/s of one old card.
        power_new_w: IT watts of one new card at work, with its share of the host.
        flop_per_s_new: model FLOP/s of one new card at work.
        facility_g_per_kwh: grid intensity × PUE.
        in_use: the share of the time in which it works, 0-1.
        lifetime_years: how long the new card is kept.
        made_g: what making one new card emitted.
    """
    energy_new = power_new_w / flop_per_s_new
    saved_j_per_month = (
        (energy_old_j_per_flop - energy_new) * flop_per_s_new * in_use * HOURS_PER_YEAR * S_PER_HOUR / MONTHS_PER_YEAR
    )
    saving = joules_to_kwh(saved_j_per_month) * facility_g_per_kwh
    over_life = saving * lifetime_years * MONTHS_PER_YEAR

    def months(made: float) -> float | None:
        return made / saving if saving > 0 and math.isfinite(made / saving) else None

    return Payback(
        energy_old_j_per_flop=energy_old_j_per_flop,
        energy_new_j_per_flop=energy_new,
        work_ratio=flop_per_s_new / flop_per_s_old,
        saving_g_per_month=saving,
        made_g=made_g,
        months=months(made_g.value),
        months_lo=months(made_g.lo),
        months_hi=months(made_g.hi),
        saved_g=over_life - made_g.value,
        saved_lo_g=over_life - made_g.hi,
        saved_hi_g=over_life - made_g.lo,
    )
