"""A grid's intensity as a checked, piecewise constant function of time, and its integral. Pure; needs numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from green_torch.errors import IntensityError
from green_torch.intensity.online import iso
from green_torch.units import NS_PER_S, S_PER_HOUR, s_to_ns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from green_torch.records import IntensityPoint

MAX_GAP_S = 3 * S_PER_HOUR


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Intensity from ``knots_s[0]`` to ``knots_s[-1]``, in seconds since ``origin_unix_ns``.

    ``g_per_kwh[i]`` holds between knots i and i + 1; ``sums_gh[i]`` is the integral up to knot i, in g/kWh × h, which is the grams that
    a constant draw of one kW has caused by then.
    """

    origin_unix_ns: int
    knots_s: NDArray[np.float64]
    g_per_kwh: NDArray[np.float64]
    sums_gh: NDArray[np.float64]
    region: str
    source: str
    kind: str

    @property
    def end_s(self) -> float:
        """Where what is known ends."""
        return float(self.knots_s[-1])

    def upto(self, at_s: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """The integral from the first knot to each of these instants."""
        return np.asarray(np.interp(at_s, self.knots_s, self.sums_gh), dtype=np.float64)

    def between(self, start_s: float, end_s: float) -> float:
        """Grams per kW of constant draw between two instants."""
        before, after = self.upto(np.array([start_s, end_s]))
        return float(after - before)


def series(
    points: Sequence[IntensityPoint], now_unix_ns: int, *, max_gap_s: float = MAX_GAP_S, what: str = "the forecast"
) -> Series:
    """The points from now on, as a function of seconds from now.

    Each point holds until the next; the last one as long as is usual among them. A stretch without a figure that is longer than
    ``max_gap_s`` beyond that is unknown: within the series an error, and at its end the end.

    Raises:
        IntensityError: there are no points, they lie in the past or begin too late, one has no time or no finite figure >= 0, two
            contradict each other, they differ in kind, or there is a gap.
    """
    if not points:
        raise IntensityError(f"{what} is empty")
    first = points[0]
    named = f"{what} for {first.region} ({first.source})"
    figures: dict[int, float] = {}
    for point in points:
        at_ns, value = point.time_unix_ns, point.g_per_kwh
        if at_ns is None:
            raise IntensityError(f"{named} has a figure without a time")
        if not (math.isfinite(value) and value >= 0):
            raise IntensityError(f"{named} says {value!r} gCO2e/kWh at {iso(at_ns)}: a finite number >= 0 is needed")
        if figures.setdefault(at_ns, value) != value:
            raise IntensityError(f"{named} has two figures for {iso(at_ns)}")
        if point.kind != first.kind:
            raise IntensityError(f"{named} mixes {first.kind} and {point.kind} figures, which can't be compared")
    times = np.array(sorted(figures), dtype=np.int64)
    values = np.array([figures[int(at)] for at in times])
    gap_ns = s_to_ns(max_gap_s)
    step_ns = int(np.median(np.diff(times))) if len(times) > 1 else s_to_ns(S_PER_HOUR)
    knots = (np.append(times, times[-1] + step_ns) - now_unix_ns) / NS_PER_S
    if knots[-1] <= 0:
        raise IntensityError(f"{named} ended at {iso(int(times[-1]) + step_ns)}, in the past")
    if knots[0] > max_gap_s:
        raise IntensityError(f"{named} begins only at {iso(int(times[0]))}")
    begin = max(0, int(np.searchsorted(knots, 0.0, side="right")) - 1)
    knots, values = knots[begin:], values[begin:]
    knots[0] = 0.0  # cut off, or a first figure that begins a little later
    longest = int(np.argmax(np.diff(knots)))
    if np.diff(knots)[longest] > (step_ns + gap_ns) / NS_PER_S:
        at_ns = now_unix_ns + round(float(knots[longest]) * NS_PER_S)
        raise IntensityError(f"{named} has a gap after {iso(at_ns)}")
    sums = np.concatenate([[0.0], np.cumsum(values * np.diff(knots))]) / S_PER_HOUR
    return Series(now_unix_ns, knots, values, sums, first.region, first.source, first.kind)
