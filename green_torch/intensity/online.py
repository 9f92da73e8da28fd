"""What all providers that are asked over the network have in common: the meaning of their figures, and how an answer is checked."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from green_torch.errors import IntensityError
from green_torch.records import IntensityPoint
from green_torch.units import NS_PER_S, S_PER_HOUR, s_to_ns

if TYPE_CHECKING:
    from collections.abc import Iterable

MOST_G_PER_KWH = 10_000.0  # several times what the worst generator emits: beyond it an answer is a mistake
_OLDEST_S = 24 * S_PER_HOUR  # a "latest" figure that is older is none


@dataclass(frozen=True, slots=True)
class Signal:
    """What the figures of one provider mean.

    ``key`` names them in the cache (no credentials); ``tables``: regions of codecarbon's tables that may stand in, the nearest first;
    ``interval_s``: how long one figure holds.
    """

    name: str
    zone: str
    basis: str
    average: bool
    interval_s: float
    key: str
    tables: tuple[str, ...] = ()

    def point(self, g_per_kwh: object, time_unix_ns: int, *, estimated: bool, zone: str | None = None) -> IntensityPoint:
        """A checked figure.

        Raises:
            IntensityError: no finite number of gCO2e/kWh, or an impossible one.
        """
        if isinstance(g_per_kwh, bool) or not isinstance(g_per_kwh, int | float):
            raise IntensityError(f"{self.name} has no figure for {self.zone}: {g_per_kwh!r:.60}")
        if not (math.isfinite(g_per_kwh) and 0 <= g_per_kwh <= MOST_G_PER_KWH):
            raise IntensityError(f"{self.name} says {g_per_kwh!r:.60} gCO2e/kWh for {self.zone}, which can't be")
        return IntensityPoint(
            float(g_per_kwh),
            region=zone or self.zone,
            source=self.name,
            basis=self.basis,
            average=self.average,
            estimated=estimated,
            time_unix_ns=time_unix_ns,
        )

    def within(self, points: Iterable[IntensityPoint], start_unix_ns: int, end_unix_ns: int) -> tuple[IntensityPoint, ...]:
        """Those in force between two instants, in order, each instant once.

        Raises:
            IntensityError: none is.
        """
        by_time = {point.time_unix_ns: point for point in points if point.time_unix_ns is not None}
        step_ns = s_to_ns(self.interval_s)
        found = tuple(by_time[at] for at in sorted(by_time) if at + step_ns > start_unix_ns and at < end_unix_ns)
        if not found:
            raise IntensityError(
                f"{self.name} has no figure for {self.zone} between {iso(start_unix_ns)} and {iso(end_unix_ns)}"
            )
        return found

    def spans(self, start_unix_ns: int, end_unix_ns: int, longest_s: float) -> list[tuple[int, int]]:
        """A stretch of time, widened to whole intervals and cut into pieces that one request may ask for."""
        step_ns, longest_ns = s_to_ns(self.interval_s), s_to_ns(longest_s)
        first_ns, last_ns = start_unix_ns // step_ns * step_ns, -(-end_unix_ns // step_ns) * step_ns
        return [(at, min(at + longest_ns, last_ns)) for at in range(first_ns, last_ns, longest_ns)]


class Online(ABC):
    """A provider whose every call is a request: it blocks, and raises :class:`~green_torch.errors.IntensityError`.

    A tracker doesn't use it bare but through :class:`~green_torch.intensity.live.Live`, which remembers, waits for nobody and
    falls back.
    """

    signal: Signal

    @abstractmethod
    def latest(self) -> IntensityPoint:
        """The newest figure."""

    @abstractmethod
    def history(self, start_unix_ns: int, end_unix_ns: int) -> tuple[IntensityPoint, ...]:
        """Figures of the past, in order; each holds until the next."""

    @abstractmethod
    def forecast(self, start_unix_ns: int, end_unix_ns: int) -> tuple[IntensityPoint, ...]:
        """Figures expected, in order, each marked as estimated; fewer where the horizon is shorter."""

    def at(self, time_unix_ns: int) -> IntensityPoint:
        """The figure in force at a time: the latest around now, else from the history or the forecast."""
        ahead_ns, step_ns = time_unix_ns - time.time_ns(), s_to_ns(self.signal.interval_s)
        if abs(ahead_ns) <= step_ns:
            return self.latest()
        ask = self.forecast if ahead_ns > 0 else self.history
        return ask(time_unix_ns, time_unix_ns + 1)[-1]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.signal.zone!r}, {self.signal.basis}, {'average' if self.signal.average else 'marginal'})"


def recent(point: IntensityPoint) -> IntensityPoint:
    """The point, where it may pass for the latest.

    Raises:
        IntensityError: it is more than a day old.
    """
    if point.time_unix_ns is not None and time.time_ns() - point.time_unix_ns > s_to_ns(_OLDEST_S):
        raise IntensityError(
            f"{point.source}: the newest figure for {point.region} is of {iso(point.time_unix_ns)}, too old to use"
        )
    return point


def unix_ns(text: object, name: str) -> int:
    """Unix nanoseconds of an ISO 8601 time with an offset or Z.

    Raises:
        IntensityError: it is none; ``name`` is the provider's.
    """
    try:
        moment = datetime.fromisoformat(text)  # type: ignore[arg-type]  # anything else raises TypeError
    except (TypeError, ValueError):
        raise IntensityError(f"{name} gives {text!r:.60} for a time") from None
    if moment.tzinfo is None:
        raise IntensityError(f"{name} gives {text!r:.60}, a time without its offset")
    return round(moment.timestamp()) * NS_PER_S


def iso(time_unix_ns: int, pattern: str = "%Y-%m-%dT%H:%M:%SZ") -> str:
    """The time in UTC, to the second."""
    return datetime.fromtimestamp(time_unix_ns // NS_PER_S, UTC).strftime(pattern)


def rows(content: dict[str, Any], key: str, name: str) -> list[dict[str, Any]]:
    """The list of objects under a key.

    Raises:
        IntensityError: there is none.
    """
    found = content.get(key)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise IntensityError(f"{name} answered without a list of {key!r}")
    return found
