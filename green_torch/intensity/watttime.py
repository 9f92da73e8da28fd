"""WattTime: marginal operating emissions, what one kWh more or less would change, every five minutes, with an account.

Schema after https://docs.watttime.org (v3). A login by HTTP Basic gives a token for 30 minutes. Figures come in pounds of CO2 per MWh. They
are marginal, so they suit *when to run* and never compare with average ones. Free accounts cover ``CAISO_NORTH``.
"""

from __future__ import annotations

import base64
import os
import threading
import time
from typing import TYPE_CHECKING, Any, final

from green_torch.errors import ArgumentError, IntensityError
from green_torch.intensity.http import Api, Secret
from green_torch.intensity.online import Online, Signal, iso, recent, rows, unix_ns
from green_torch.units import G_PER_KWH_PER_LB_PER_MWH, S_PER_HOUR, ns_to_s

if TYPE_CHECKING:
    from green_torch.records import IntensityPoint

BASE_URL = "https://api.watttime.org"
USER_VARIABLES = ("WATTTIME_USER", "WATTTIME_USERNAME")  # the first is their own SDK's
PASSWORD_VARIABLE = "WATTTIME_PASSWORD"  # noqa: S105  (a variable's name)
_SIGNAL, _UNITS = "co2_moer", "lbs_co2_per_mwh"
_INTERVAL_S = 300.0
_TOKEN_S = 25 * 60.0  # they last 30 minutes
_LONGEST_S = 31 * 24 * S_PER_HOUR  # of one request; they allow 32 days
_LONGEST_AHEAD_H = 72
_MEND = f"Type export {USER_VARIABLES[0]}=<name> {PASSWORD_VARIABLE}=<password> (see https://watttime.org), and check the account's regions"


@final
class WattTime(Online):
    """``track(intensity=WattTime("CAISO_NORTH"))``, with the account in ``WATTTIME_USER`` and ``WATTTIME_PASSWORD``.

    Args:
        region: a grid region of theirs.
        username: of the account; from the environment where not given. Neither appears anywhere else.
        password: see ``username``.
        base_url: of a proxy or a stand-in.

    Raises:
        ArgumentError: an argument is wrong, or there is no account.
    """

    def __init__(
        self, region: str, *, username: str | None = None, password: str | None = None, base_url: str = BASE_URL
    ) -> None:
        if not isinstance(region, str) or not region.strip():
            raise ArgumentError(f'region={region!r}: a WattTime region like "CAISO_NORTH" is needed')
        name = username or next((os.environ[own] for own in USER_VARIABLES if os.environ.get(own)), None)
        word = password or os.environ.get(PASSWORD_VARIABLE)
        if not name or not word:
            raise ArgumentError(f"WattTime wants an account. {_MEND}, or give username= and password=")
        user, secret = Secret(name, "username"), Secret(word, "password")
        pair = base64.b64encode(f"{user.reveal()}:{secret.reveal()}".encode()).decode()
        self._login = Secret(f"Basic {pair}", "account")
        self._api = Api("WattTime", base_url, mend=_MEND, secrets=(user, secret, self._login))
        self._lock = threading.Lock()
        self._bearer: tuple[float, Secret] | None = None  # when it was given (monotonic seconds), and the header
        zone = region.strip()
        through = "" if self._api.base_url == BASE_URL else f" through {self._api.host}"
        self.signal = Signal(
            name=f"WattTime v3 {_SIGNAL}{through}",
            zone=zone,
            basis="direct",
            average=False,
            interval_s=_INTERVAL_S,
            key=f"watttime {self._api.base_url} {zone}",
        )

    def latest(self) -> IntensityPoint:
        """The figure in force now: the first of the newest forecast, which starts with it."""
        points = self._points(self._get("/v3/forecast", horizon_hours=1))
        if not points:
            raise IntensityError(f"WattTime has no figure for {self.signal.zone}")
        return recent(points[0])

    def history(self, start_unix_ns: int, end_unix_ns: int) -> tuple[IntensityPoint, ...]:
        """The past, asked for in stretches of at most 31 days."""
        points = [
            point
            for begin, end in self.signal.spans(start_unix_ns, end_unix_ns, _LONGEST_S)
            for point in self._points(self._get("/v3/historical", start=iso(begin), end=iso(end)))
        ]
        return self.signal.within(points, start_unix_ns, end_unix_ns)

    def forecast(self, start_unix_ns: int, end_unix_ns: int) -> tuple[IntensityPoint, ...]:
        """The newest forecast, up to 72 hours ahead."""
        ahead_h = ns_to_s(end_unix_ns - time.time_ns()) / S_PER_HOUR
        hours = min(max(1, int(-(-ahead_h // 1))), _LONGEST_AHEAD_H)
        return self.signal.within(self._points(self._get("/v3/forecast", horizon_hours=hours)), start_unix_ns, end_unix_ns)

    def _get(self, path: str, **params: str | int) -> dict[str, Any]:
        """An answer; a token that has run out is renewed once."""
        query = {"region": self.signal.zone, "signal_type": _SIGNAL, **params}
        bearer, new = self._authorized()
        try:
            return self._api.get(path, query, {"Authorization": bearer})
        except IntensityError as error:
            if new or not error.final:
                raise
        with self._lock:
            self._bearer = None
        return self._api.get(path, query, {"Authorization": self._authorized()[0]})

    def _authorized(self) -> tuple[Secret, bool]:
        """The header's token, and whether it has only now been given."""
        with self._lock:
            if self._bearer is not None and time.monotonic() - self._bearer[0] < _TOKEN_S:
                return self._bearer[1], False
            token = self._api.get("/login", None, {"Authorization": self._login}).get("token")
            if not isinstance(token, str):
                raise IntensityError("WattTime's login gave no token")
            self._bearer = time.monotonic(), Secret(f"Bearer {token}", "WattTime's token")
            return self._bearer[1], True

    def _points(self, content: dict[str, Any]) -> list[IntensityPoint]:
        meta = content.get("meta")
        if not isinstance(meta, dict) or meta.get("region") != self.signal.zone:
            told = meta.get("region") if isinstance(meta, dict) else None
            raise IntensityError(
                f"WattTime answered for region {told!r:.40} where {self.signal.zone!r} was asked for", final=True
            )
        if meta.get("signal_type", _SIGNAL) != _SIGNAL or meta.get("units", _UNITS) != _UNITS:
            raise IntensityError(f"WattTime answered in {meta.get('units')!r:.40}, not in {_UNITS} of {_SIGNAL}", final=True)
        points = []
        for row in rows(content, "data", self.signal.name):
            value = row.get("value")
            if value is None:
                continue
            if isinstance(value, int | float) and not isinstance(value, bool):
                value = value * G_PER_KWH_PER_LB_PER_MWH
            points.append(self.signal.point(value, unix_ns(row.get("point_time"), self.signal.name), estimated=True))
        return sorted(points, key=lambda point: point.time_unix_ns or 0)
