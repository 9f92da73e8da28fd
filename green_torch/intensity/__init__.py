"""gCO2e per kWh at a time: what ``region=`` and ``intensity=`` mean, and a cloud provider's facility overhead."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from green_torch.intensity.cloud_regions import published_pue
from green_torch.intensity.codecarbon_tables import known_regions, table_point, world_point
from green_torch.intensity.constant import ConstantIntensity, given
from green_torch.intensity.electricity_maps import ElectricityMaps
from green_torch.intensity.live import Live
from green_torch.intensity.neso import UKNeso
from green_torch.intensity.online import Online
from green_torch.intensity.trace import Trace
from green_torch.intensity.watttime import WattTime

if TYPE_CHECKING:
    from green_torch.protocols import IntensityProvider

__all__ = [
    "ConstantIntensity",
    "ElectricityMaps",
    "Live",
    "Online",
    "Trace",
    "UKNeso",
    "WattTime",
    "known_regions",
    "pue_for",
    "resolve",
]


def resolve(region: str | None = None, intensity: float | IntensityProvider | None = None) -> IntensityProvider:
    """The provider behind the two arguments. Where both are given ``intensity`` wins, and ``region`` is kept as its name.

    Args:
        region: ISO country ("FR", "FRA"), country-subdivision ("US-CA", "SE-SE3"), or cloud region ("aws:us-west-2"); any case.
            ``None`` is the world average, named as such.
            With a provider it may be a zone of that provider's; where the provider fails, its table stands in if there is one.
        intensity: a number of gCO2e/kWh (>= 0), or a provider (anything with ``at(time_unix_ns)``), which is returned as it is; one
            that is asked over the network comes back as a :class:`Live` one.

    Raises:
        UnknownRegionError: no table has the region; the message names the nearest.
        ArgumentError: the intensity is no finite number >= 0 and no provider.
    """
    if isinstance(intensity, Online):
        return Live(intensity, region=region)
    if intensity is not None:
        if callable(getattr(intensity, "at", None)):
            return cast("IntensityProvider", intensity)
        return given(intensity, region)
    return ConstantIntensity(world_point() if region is None else table_point(region))


def pue_for(region: str | None) -> tuple[float, str]:
    """Facility energy over IT energy for a region, with its source: the cloud provider's published average, else 1.0."""
    provider = region.strip().lower().partition(":")[0] if region and ":" in region else ""
    return published_pue().get(provider, (1.0, "no facility overhead counted"))
