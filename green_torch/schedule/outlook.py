"""What is known ahead of a grid: its provider's forecast, or else the past repeated; and a rule for where neither is known.

Without a forecast the last week, repeated, stands for the next one: it knows the time of day and the day of the week. Where only a day
of history is to be had, the last day is repeated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from green_torch.errors import GreenTorchError, IntensityError
from green_torch.intensity.trace import Trace
from green_torch.records import IntensityPoint
from green_torch.schedule.planning import FORECAST
from green_torch.schedule.series import series
from green_torch.units import S_PER_HOUR, ns_to_s, s_to_ns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

LAST_WEEK, YESTERDAY, THRESHOLD = "last week's profile", "yesterday's profile", "online threshold"
WEEK_S, DAY_S = 7 * 24 * S_PER_HOUR, 24 * S_PER_HOUR


@dataclass(frozen=True, slots=True)
class Outlook:
    """Intensity from ``asked_unix_ns`` on, as far as it is known, and by what ``method``; ``why`` it isn't a forecast."""

    points: tuple[IntensityPoint, ...]
    method: str
    asked_unix_ns: int
    why: str = ""


def outlook(provider: object, now_unix_ns: int, until_unix_ns: int, *, forecast: bool = True) -> Outlook:
    """The provider's forecast, else last week's profile, else yesterday's. May do network, and blocks for as long as that takes.

    Args:
        provider: one with ``forecast`` or ``history``, or both (:class:`~green_torch.protocols.Forecaster`).
        now_unix_ns: from here on.
        until_unix_ns: to there; less where the forecast does not reach as far.
        forecast: False leaves the forecast out.

    Raises:
        IntensityError: nothing is known ahead; ``final`` where the provider has nothing of the kind, or has refused for good.
    """
    reasons = []
    final = True
    ask: Any = getattr(provider, "forecast", None)
    if forecast and callable(ask):
        ends_ns = (
            provider.end_unix_ns if isinstance(provider, Trace) else until_unix_ns
        )  # all that it holds is better than nothing
        try:
            return Outlook(tuple(ask(now_unix_ns, min(until_unix_ns, ends_ns))), FORECAST, now_unix_ns)
        except GreenTorchError as error:
            reasons.append(str(error))
            final = isinstance(error, IntensityError) and error.final
    ask = getattr(provider, "history", None)
    for period_s, method in ((WEEK_S, LAST_WEEK), (DAY_S, YESTERDAY)) if callable(ask) else ():
        try:
            past = tuple(ask(now_unix_ns - s_to_ns(period_s), now_unix_ns))
            points = repeated(past, now_unix_ns, until_unix_ns, period_s)
        except GreenTorchError as error:
            reasons.append(str(error))
            final = final and isinstance(error, IntensityError) and error.final
            continue
        return Outlook(points, method, now_unix_ns, "; ".join(reasons))
    name = type(provider).__name__
    raise IntensityError("; ".join(dict.fromkeys(reasons)) or f"{name} has neither a forecast nor a history", final=final)


def repeated(
    past: Sequence[IntensityPoint], now_unix_ns: int, until_unix_ns: int, period_s: float = WEEK_S
) -> tuple[IntensityPoint, ...]:
    """The period before now, again and again from now on; each point is marked as estimated.

    Raises:
        IntensityError: the past does not cover the period, or is broken.
    """
    period_ns = s_to_ns(period_s)
    begin_ns = now_unix_ns - period_ns
    known = series(past, begin_ns, what="the history")
    if known.end_s < period_s - 3 * S_PER_HOUR:  # the newest figures may be missing yet
        raise IntensityError(
            f"the history of {known.region} covers {known.end_s / S_PER_HOUR:.4g} h, not {period_s / S_PER_HOUR:g}"
        )
    template = replace(past[0], estimated=True)
    one = [
        replace(template, g_per_kwh=float(value), time_unix_ns=now_unix_ns + s_to_ns(float(at_s)))
        for at_s, value in zip(known.knots_s, known.g_per_kwh, strict=False)
        if at_s < period_s
    ]
    times = math.ceil((until_unix_ns - now_unix_ns) / period_ns)
    points = (
        replace(point, time_unix_ns=(point.time_unix_ns or 0) + turn * period_ns)
        for turn in range(max(1, times))
        for point in one
    )
    return tuple(point for point in points if (point.time_unix_ns or 0) < until_unix_ns)


@dataclass(frozen=True, slots=True)
class Threshold:
    """Runs where the grid is cleaner than it usually is, and whenever the deadline asks for it: for where nothing is known ahead.

    ``level_g_per_kwh`` is the quantile of the past that leaves just the time that the work needs: with 8 h of work in the next
    24 h, a third of the past day was cleaner. ``clean_g_per_kwh`` is the mean of that third.
    """

    level_g_per_kwh: float
    now_g_per_kwh: float
    clean_g_per_kwh: float
    runs: bool
    by_deadline: bool = False


def threshold(
    past: Sequence[IntensityPoint],
    now_unix_ns: int,
    work_s: float,
    left_s: float,
    *,
    resume_s: float = 0.0,
    period_s: float = WEEK_S,
) -> Threshold:
    """Whether to run now, by the past alone.

    Args:
        past: at most the last ``period_s``, up to now; the last point is in force now.
        now_unix_ns: now.
        work_s: useful work that is left, in seconds.
        left_s: time until the deadline, in seconds.
        resume_s: what a resume adds to the work.
        period_s: how far back the past counts.

    Raises:
        IntensityError: the past is empty or broken.
    """
    times = [point.time_unix_ns or 0 for point in past]
    begin_ns = max(now_unix_ns - s_to_ns(period_s), min(times, default=0))
    known = series(past, begin_ns, what="the history")
    now_s = max(ns_to_s(now_unix_ns - begin_ns), 1.0)
    lengths = np.diff(np.minimum(known.knots_s, now_s))
    at = int(np.searchsorted(known.knots_s, now_s, side="right")) - 1
    current = float(known.g_per_kwh[min(at, len(lengths) - 1)])
    share = min(1.0, work_s / left_s) if left_s > 0 else 1.0
    level = quantile(known.g_per_kwh, lengths, share)
    late = left_s <= work_s + resume_s
    clean = known.g_per_kwh <= level
    mean = float(np.average(known.g_per_kwh[clean], weights=np.maximum(lengths[clean], 1e-9)))
    return Threshold(level, current, mean, current <= level or late, by_deadline=late and current > level)


def quantile(g_per_kwh: NDArray[np.float64], lengths_s: NDArray[np.float64], share: float) -> float:
    """The least figure so that this share of the time had no higher one."""
    order = np.argsort(g_per_kwh, kind="stable")
    reached = np.cumsum(lengths_s[order]) >= share * lengths_s.sum() * (1 - 1e-9)
    return float(g_per_kwh[order[int(np.argmax(reached))]])
