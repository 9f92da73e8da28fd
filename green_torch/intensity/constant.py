"""A grid intensity that never changes: a figure given by the user, or the yearly mean of a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from green_torch.errors import ArgumentError
from green_torch.records import IntensityPoint


@dataclass(frozen=True, slots=True)
class ConstantIntensity:
    """An :class:`~green_torch.protocols.IntensityProvider` that answers with the same point at any time."""

    point: IntensityPoint

    def at(self, time_unix_ns: int) -> IntensityPoint:  # noqa: ARG002  (the protocol's argument; a constant has no use for it)
        """The point, whatever the time; its ``time_unix_ns`` stays ``None`` since the figure belongs to no instant."""
        return self.point


def given(g_per_kwh: object, region: str | None) -> ConstantIntensity:
    """The user's own figure in gCO2e/kWh, named after ``region`` where one was given too.

    Raises:
        ArgumentError: not a number, not finite, or negative. Zero is allowed.
    """
    if isinstance(g_per_kwh, bool) or not isinstance(g_per_kwh, Real):
        raise ArgumentError(
            f"intensity={g_per_kwh!r} is neither a number of gCO2e/kWh nor a provider with at(time): type intensity=56.0, say."
        )
    value = float(g_per_kwh)
    if not math.isfinite(value) or value < 0:
        raise ArgumentError(f"intensity={value} gCO2e/kWh is not a finite number >= 0: type intensity=56.0, say.")
    return ConstantIntensity(IntensityPoint(value, region=region or "no region set", source="given by the user"))
