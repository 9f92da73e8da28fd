"""The only place where conversions live.

Inside the package every quantity is in one unit: joules, watts, seconds (or nanoseconds of a monotonic clock, as
``int``), grams of CO2 equivalent, gCO2e per kWh, FLOPs. Everything that leaves or enters in another unit passes here.
"""

from __future__ import annotations

import math

J_PER_KWH = 3_600_000.0
J_PER_MJ = 1e-3  # mJ: NVML's counter
J_PER_UJ = 1e-6  # µJ: RAPL's counter
NS_PER_S = 1_000_000_000
G_PER_KG = 1000.0
HOURS_PER_YEAR = 365.25 * 24
S_PER_HOUR = 3600.0
HZ_PER_MHZ = 1e6
FLOP_PER_TFLOP = 1e12
BITS_PER_BYTE = 8
G_PER_KWH_PER_LB_PER_MWH = 0.45359237  # the international pound: 453.59237 g in 1000 kWh


def joules_to_kwh(energy_j: float) -> float:
    """Joules to kilowatt-hours."""
    return energy_j / J_PER_KWH


def kwh_to_joules(energy_kwh: float) -> float:
    """Kilowatt-hours to joules."""
    return energy_kwh * J_PER_KWH


def ns_to_s(duration_ns: float) -> float:
    """Nanoseconds to seconds."""
    return duration_ns / NS_PER_S


def s_to_ns(duration_s: float) -> int:
    """Seconds to whole nanoseconds."""
    return round(duration_s * NS_PER_S)


_PREFIXES = (
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
    (1.0, ""),
    (1e-3, "m"),
    (1e-6, "µ"),
    (1e-9, "n"),
    (1e-12, "p"),
)


def si(value: float | None, unit: str, digits: int = 3) -> str:
    """A number as a person reads it: ``si(0.00123, "J") == "1.23 mJ"``; ``None`` reads "unknown"."""
    if value is None:
        return "unknown"
    if value == 0 or not math.isfinite(value):
        return f"{value:.{digits}g} {unit}".strip()
    for scale, prefix in _PREFIXES:
        if abs(value) >= scale * (1 - 0.5 * 10**-digits):
            return f"{_digits(value / scale, digits)} {prefix}{unit}".strip()
    return f"{value:.{digits}g} {unit}".strip()


def grams(value_g: float | None, digits: int = 3) -> str:
    """Grams of CO2 equivalent as a person reads them, from µg to t: ``grams(1500.0) == "1.50 kgCO2e"``."""
    if value_g is not None and abs(value_g) >= 1e6 * (1 - 0.5 * 10**-digits):
        return f"{_digits(value_g / 1e6, digits)} tCO2e"
    return si(value_g, "gCO2e", digits)


def kwh(energy_j: float | None, digits: int = 3) -> str:
    """Joules printed as watt-hours with a prefix: ``kwh(3.6e6) == "1.00 kWh"``."""
    return si(None if energy_j is None else energy_j / S_PER_HOUR, "Wh", digits)


def share(fraction: float) -> str:
    """A fraction as a percentage, to a tenth, or to two digits where it is small: ``share(0.4312) == "43.1%"``."""
    return f"{fraction:.1%}" if abs(fraction) >= 0.01 or fraction == 0 else f"{100 * fraction:.2g}%"


def hours(duration_s: float) -> str:
    """A duration as a clock shows it: ``hours(3723.4) == "1:02:03"``."""
    minutes, seconds = divmod(round(duration_s), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _digits(value: float, digits: int) -> str:
    """So many significant digits: 99.996 reads "100", not "100.0"."""
    rounded = float(f"{value:.{digits}g}")
    whole = len(str(int(abs(rounded)))) if abs(rounded) >= 1 else 0 if rounded == 0 else 1
    return f"{rounded:.{max(0, digits - whole)}f}"
