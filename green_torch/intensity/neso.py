"""Great Britain's Carbon Intensity API (National Energy System Operator): half-hourly, direct emissions, no key.

Schema after https://carbon-intensity.github.io/api-definitions. Its factors count what the stacks emit, so its figures don't compare
with lifecycle ones. What it calls ``actual`` comes after the half hour; until then its forecast stands, marked as estimated. Regional
figures are forecasts only.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, final

from green_torch.errors import ArgumentError, IntensityError
from green_torch.intensity.http import Api
from green_torch.intensity.online import Online, Signal, iso, recent, rows, unix_ns
from green_torch.units import S_PER_HOUR, s_to_ns

if TYPE_CHECKING:
    from green_torch.records import IntensityPoint

BASE_URL = "https://api.carbonintensity.org.uk"
_INTERVAL_S = 1800.0
_REGIONS = 17  # 1-14 are the network operators', 15 England, 16 Scotland, 17 Wales
_MINUTE = "%Y-%m-%dT%H:%MZ"
_LONGEST_S = 13 * 24 * S_PER_HOUR  # of one request; they allow 14 days


@final
class UKNeso(Online):
    """``track(intensity=UKNeso())`` for Great Britain, ``UKNeso(13)`` for London, ``UKNeso("RG10")`` for a postcode.

    Args:
        region: None is the whole of Great Britain; a region's number (1-17), or the first part of a postcode.
        base_url: of a proxy or a stand-in.

    Raises:
        ArgumentError: no such region.
    """

    def __init__(self, region: int | str | None = None, *, base_url: str = BASE_URL) -> None:
        self._where = _where(region)  # the end of a regional path
        self._api = Api("The GB Carbon Intensity API", base_url)
        through = "" if self._api.base_url == BASE_URL else f" through {self._api.host}"
        zone = "GB" if self._where is None else f"GB {' '.join(self._where)}"
        self.signal = Signal(
            name=f"NESO Carbon Intensity API{through}",
            zone=zone,
            basis="direct",
            average=True,
            interval_s=_INTERVAL_S,
            key=f"neso {self._api.base_url} {zone}",
            tables=("GB",),
        )

    def latest(self) -> IntensityPoint:
        """The half hour that is running."""
        points = self._points("/intensity" if self._where is None else f"/regional/{'/'.join(self._where)}")
        if not points:
            raise IntensityError(f"{self.signal.name} has no figure for {self.signal.zone}")
        return recent(points[-1])

    def history(self, start_unix_ns: int, end_unix_ns: int) -> tuple[IntensityPoint, ...]:
        """The past, asked for in stretches of at most 13 days."""
        points = [
            point
            for begin, end in self.signal.spans(start_unix_ns, end_unix_ns, _LONGEST_S)
            for point in self._points(self._path(f"{iso(begin, _MINUTE)}/{iso(end, _MINUTE)}"))
        ]
        return self.signal.within(points, start_unix_ns, end_unix_ns)

    def forecast(self, start_unix_ns: int, end_unix_ns: int) -> tuple[IntensityPoint, ...]:
        """Up to 48 hours from the start."""
        first_ns = start_unix_ns - start_unix_ns % s_to_ns(_INTERVAL_S)
        hours = "fw24h" if end_unix_ns - first_ns <= s_to_ns(24 * S_PER_HOUR) else "fw48h"
        points = self._points(self._path(f"{iso(first_ns, _MINUTE)}/{hours}"), expected=True)
        return self.signal.within(points, start_unix_ns, end_unix_ns)

    def _path(self, times: str) -> str:
        return f"/intensity/{times}" if self._where is None else f"/regional/intensity/{times}/{'/'.join(self._where)}"

    def _points(self, path: str, *, expected: bool = False) -> list[IntensityPoint]:
        content = self._api.get(path)
        if self._where is not None:  # their data stands one floor deeper, in a list of one or bare
            data = content.get("data")
            content = data[0] if isinstance(data, list) and data else data  # type: ignore[assignment]  # checked next
            if not isinstance(content, dict):
                raise IntensityError(f"{self.signal.name} answered without regional data")
            self._check(content)
        points = []
        for row in rows(content, "data", self.signal.name):
            figures = row.get("intensity")
            if not isinstance(figures, dict):
                raise IntensityError(f"{self.signal.name} answered without an intensity")
            actual = None if expected else figures.get("actual")
            value = figures.get("forecast") if actual is None else actual
            if value is not None:
                points.append(self.signal.point(value, unix_ns(row.get("from"), self.signal.name), estimated=actual is None))
        return points

    def _check(self, content: dict[str, Any]) -> None:
        """That the answer is for the region asked for."""
        kind, asked = self._where or ("", "")
        answered = content.get(kind)
        if str(answered).upper() != asked:
            raise IntensityError(
                f"{self.signal.name} answered for {kind} {answered!r:.40} where {asked} was asked for", final=True
            )


def _where(region: int | str | None) -> tuple[str, str] | None:
    if region is None:
        return None
    if isinstance(region, int) and not isinstance(region, bool) and 1 <= region <= _REGIONS:
        return "regionid", str(region)
    if isinstance(region, str) and re.fullmatch(r"[A-Za-z]{1,2}[0-9][0-9A-Za-z]?", region.strip()):
        return "postcode", region.strip().upper()
    raise ArgumentError(
        f'region={region!r}: None, a number from 1 to {_REGIONS}, or the first part of a postcode ("RG10") is needed'
    )
