"""Electricity Maps: hourly or finer average intensity of most of the world's grids, lifecycle or direct, with a key.

Schema after https://portal.electricitymaps.com/docs/api (v3 and v4 serve the same paths and fields used here). Free keys cover
``latest`` and the last 24 hours of one zone; forecasts and longer histories need a plan.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Literal, final

from green_torch.errors import ArgumentError, IntensityError
from green_torch.intensity.http import Api, Secret
from green_torch.intensity.online import Online, Signal, iso, recent, rows, unix_ns
from green_torch.units import S_PER_HOUR, ns_to_s, s_to_ns

if TYPE_CHECKING:
    from green_torch.records import IntensityPoint

BASE_URL = "https://api.electricitymaps.com"
TOKEN_VARIABLES = ("ELECTRICITYMAPS_API_KEY", "ELECTRICITY_MAPS_API_KEY")  # the second is their own SDK's
_INTERVALS_S = {"hourly": 3600.0, "15_minutes": 900.0, "5_minutes": 300.0}
_HORIZONS_H = (6, 24, 48, 72)
_HISTORY_S = 24 * S_PER_HOUR  # what the free endpoint reaches back
_LONGEST_S = 240 * S_PER_HOUR  # of one request for past hours
_LONGEST_FINE_S = 24 * S_PER_HOUR  # of one for finer figures
_MEND = (
    f"Type export {TOKEN_VARIABLES[0]}=<your key> (one is free: https://portal.electricitymaps.com), and check that its plan "
    "has this zone"
)


@final
class ElectricityMaps(Online):
    """``track(intensity=ElectricityMaps("FR"))``, with the key in ``ELECTRICITYMAPS_API_KEY``.

    Args:
        zone: a zone of theirs ("FR", "US-CAL-CISO"), or a data center as in ``region=`` ("aws:eu-west-1", "gcp:europe-west1").
        lat: instead of a zone, degrees north; with ``lon``, degrees east.
        lon: see ``lat``.
        token: the key; from the environment where not given. It is sent in a header and appears nowhere else.
        version: "v4" or "v3".
        emission_factor_type: "lifecycle", or "direct" (what leaves the stacks). The two are never mixed.
        temporal_granularity: "hourly", "15_minutes" or "5_minutes": how long a figure holds, and how often one is asked for.
        base_url: of a proxy or a stand-in.

    Raises:
        ArgumentError: an argument is wrong, or there is no token.
    """

    def __init__(
        self,
        zone: str | None = None,
        *,
        lat: float | None = None,
        lon: float | None = None,
        token: str | None = None,
        version: Literal["v4", "v3"] = "v4",
        emission_factor_type: Literal["lifecycle", "direct"] = "lifecycle",
        temporal_granularity: Literal["hourly", "15_minutes", "5_minutes"] = "hourly",
        base_url: str = BASE_URL,
    ) -> None:
        if version not in ("v4", "v3"):
            raise ArgumentError(f'version={version!r}: use "v4" or "v3"')
        if emission_factor_type not in ("lifecycle", "direct"):
            raise ArgumentError(f'emission_factor_type={emission_factor_type!r}: use "lifecycle" or "direct"')
        if temporal_granularity not in _INTERVALS_S:
            raise ArgumentError(f"temporal_granularity={temporal_granularity!r}: use one of {', '.join(_INTERVALS_S)}")
        self._place, name = _place(zone, lat, lon)
        self._zone = self._place.get("zone")  # None: only their answer tells it
        self._token = _token(token)
        self._basis, self._granularity, self._version = emission_factor_type, temporal_granularity, version
        self._api = Api("Electricity Maps", base_url, mend=_MEND, secrets=(self._token,))
        through = "" if self._api.base_url == BASE_URL else f" through {self._api.host}"
        self.signal = Signal(
            name=f"Electricity Maps {version}{through}",
            zone=name,
            basis=emission_factor_type,
            average=True,
            interval_s=_INTERVALS_S[temporal_granularity],
            key=f"electricity_maps {self._api.base_url} {version} {name} {emission_factor_type} {temporal_granularity}",
            tables=(name, name.partition("-")[0]) if self._zone or ":" in name else (),
        )

    def latest(self) -> IntensityPoint:
        """The newest figure."""
        content = self._get("latest")
        return recent(self._point(content, self._answered_zone(content)))

    def history(self, start_unix_ns: int, end_unix_ns: int) -> tuple[IntensityPoint, ...]:
        """The past; from the free endpoint where the last 24 hours are enough."""
        if start_unix_ns >= time.time_ns() - s_to_ns(_HISTORY_S):
            points = self._points(self._get("history"), "history")
        else:
            longest_s = _LONGEST_S if self._granularity == "hourly" else _LONGEST_FINE_S
            points = [
                point
                for begin, end in self.signal.spans(start_unix_ns, end_unix_ns, longest_s)
                for point in self._points(self._get("past-range", start=iso(begin), end=iso(end)), "data")
            ]
        return self.signal.within(points, start_unix_ns, end_unix_ns)

    def forecast(self, start_unix_ns: int, end_unix_ns: int) -> tuple[IntensityPoint, ...]:
        """The newest forecast, up to 72 hours ahead."""
        ahead_h = ns_to_s(end_unix_ns - time.time_ns()) / S_PER_HOUR
        horizon_h = next((hours for hours in _HORIZONS_H if hours >= ahead_h), _HORIZONS_H[-1])
        points = self._points(self._get("forecast", horizonHours=horizon_h), "forecast", estimated=True)
        return self.signal.within(points, start_unix_ns, end_unix_ns)

    def _get(self, endpoint: str, **params: str | int) -> dict[str, Any]:
        content = self._api.get(
            f"/{self._version}/carbon-intensity/{endpoint}",
            {
                **self._place,
                "disableCallerLookup": "true",  # else an unknown zone becomes the caller's own
                "emissionFactorType": self._basis,
                "temporalGranularity": self._granularity,
                **params,
            },
            {"auth-token": self._token},
        )
        if "_disclaimer" in content:
            raise IntensityError(f"Electricity Maps gave made-up figures: the key is a sandbox key. {_MEND}", final=True)
        factor = content.get("emissionFactorType", self._basis)
        if factor != self._basis:
            raise IntensityError(
                f"Electricity Maps gave {factor!r:.40} figures where {self._basis} ones were asked for", final=True
            )
        return content

    def _answered_zone(self, content: dict[str, Any]) -> str:
        """The zone of an answer, which must be the one asked for."""
        zone = content.get("zone")
        if not isinstance(zone, str) or (self._zone is not None and zone.upper() != self._zone.upper()):
            raise IntensityError(
                f"Electricity Maps answered for zone {zone!r:.40} where {self.signal.zone!r} was asked for: "
                "see https://app.electricitymaps.com/map for the zones",
                final=True,
            )
        return zone

    def _points(self, content: dict[str, Any], key: str, *, estimated: bool = False) -> list[IntensityPoint]:
        zone = self._answered_zone(content)
        return [
            self._point(row, zone, estimated=estimated)
            for row in rows(content, key, self.signal.name)
            if row.get("carbonIntensity") is not None
        ]

    def _point(self, row: dict[str, Any], zone: str, *, estimated: bool = False) -> IntensityPoint:
        return self.signal.point(
            row.get("carbonIntensity"),
            unix_ns(row.get("datetime"), self.signal.name),
            estimated=estimated or row.get("isEstimated") is not False,
            zone=zone,
        )


def _token(given: str | None) -> Secret:
    if given is not None:
        return Secret(given, "token")
    for variable in TOKEN_VARIABLES:
        if os.environ.get(variable):
            return Secret(os.environ[variable], variable)
    raise ArgumentError(f"Electricity Maps wants a key. {_MEND}, or give token=")


def _place(zone: str | None, lat: float | None, lon: float | None) -> tuple[dict[str, str], str]:
    """The query that names the place, and the place's name."""
    if (zone is None) == (lat is None and lon is None):
        raise ArgumentError('where? Give a zone, ElectricityMaps("FR"), or lat= and lon=, and not both')
    if zone is None:
        if lat is None or lon is None or not (abs(lat) <= 90 and abs(lon) <= 180):
            raise ArgumentError(f"lat={lat!r}, lon={lon!r}: degrees within 90 and 180 are needed")
        return {"lat": f"{lat:g}", "lon": f"{lon:g}"}, f"{lat:g},{lon:g}"
    if not isinstance(zone, str) or not zone.strip():
        raise ArgumentError(
            f'zone={zone!r}: a zone like "FR" or "US-CAL-CISO", or a data center like "aws:eu-west-1", is needed'
        )
    name = zone.strip()
    provider, colon, region = name.partition(":")
    if not colon:
        return {"zone": name}, name
    if not provider or not region:
        raise ArgumentError(f'zone={zone!r}: a data center is written "aws:eu-west-1"')
    return {"dataCenterProvider": provider.lower(), "dataCenterRegion": region.lower()}, name.lower()
