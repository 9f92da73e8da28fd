"""What the same joules would emit, and those saved would spare, on other grids: energy times each region's PUE and grid intensity.

Operational emissions only, from yearly means; the joules are those measured here, so the other region is thought to have this device.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from green_torch.experiment.results import Range
from green_torch.footprint import operational_g
from green_torch.intensity import pue_for, resolve
from green_torch.records import IntensityPoint
from green_torch.units import kwh_to_joules

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Grid:
    """A region's grid intensity and facility overhead, each with its source."""

    region: str
    point: IntensityPoint
    pue: float
    pue_source: str

    @property
    def basis(self) -> str:
        """What kind of figure it is: figures of different kinds can't be ranked. "lifecycle average", "direct marginal"."""
        return f"{self.point.basis} {'average' if self.point.average else 'marginal'}"

    def emissions_g(self, energy_kwh: Range) -> Range:
        """gCO2e of so much IT energy there, used or saved (below zero: costs more)."""
        value, lo, hi = (
            None if end is None else operational_g(kwh_to_joules(end), self.pue, self.point.g_per_kwh)
            for end in (energy_kwh.value, energy_kwh.lo, energy_kwh.hi)
        )
        assert value is not None
        return Range(value, lo, hi)


def grids(regions: Iterable[str]) -> tuple[Grid, ...]:
    """The regions' grids, those of one basis together, and within a basis the cleanest per IT joule first.

    Raises:
        UnknownRegionError: no table has one of them; the message names the nearest.
    """
    found = [Grid(region, resolve(region).at(time.time_ns()), *pue_for(region)) for region in dict.fromkeys(regions)]
    return tuple(sorted(found, key=lambda grid: (grid.basis, grid.pue * grid.point.g_per_kwh)))
