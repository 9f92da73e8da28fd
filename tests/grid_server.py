"""A real HTTP server on 127.0.0.1 that speaks the grid providers' schemas, and every fault a test asks for.

``fault`` is what it does instead of answering: a key of :data:`FAULTS`. It remembers each request's path, query and headers.
"""

from __future__ import annotations

import gzip
import json
import threading
import time
from base64 import b64encode
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKEN = "s3cr3t-t0ken-9f1b"
USER, PASSWORD = "ada.l0velace", "p4ssw0rd-77"
HOUR_S, HALF_S, FIVE_S = 3600, 1800, 300
FAULTS: dict[str, tuple[int, Any]] = {  # status and body; others are done by hand below
    "401": (401, {"error": "Invalid auth-token"}),
    "401 plan": (401, {"error": "Unauthorized", "message": "Your plan has no access to zone=FR"}),
    "400": (400, {"status": "error", "message": "Zone 'XX' does not exist"}),
    "429": (429, {"error": "Too many requests"}),
    "500": (500, {"error": "oops"}),
    "500 no json": (500, b"<html>Bad gateway</html>"),
    "not json": (200, b"<html>Sign in to the hotel's network</html>"),
    "json list": (200, []),
    "empty": (200, b""),
    "nan": (200, b'{"zone": "FR", "carbonIntensity": NaN, "datetime": "2026-01-01T00:00:00Z"}'),
}
BY_HAND = ("401 echo", "hang", "half body", "huge", "bomb", "redirect", "closed")


@cache
def bomb() -> bytes:
    """32 MiB of blanks, packed."""
    return gzip.compress(b" " * 32 * 2**20, 1)


def figure(time_s: float) -> int:
    """The made-up grid's intensity in gCO2e/kWh: by the hour, 100 to 123."""
    return 100 + int(time_s // HOUR_S) % 24


def stamp(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass
class Grid:
    """The server's behaviour, to be changed while it runs, and what it was asked."""

    fault: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    change: dict[str, Any] = field(default_factory=dict)  # fields put over an answer's own
    now_s: float | None = None  # the made-up present; the real one where None
    tokens: list[str] = field(default_factory=list)  # WattTime's, the last one is good
    asked: list[tuple[str, dict[str, str], dict[str, str]]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    other: Grid | None = None

    def paths(self) -> list[str]:
        return [path for path, _, _ in self.asked]

    def present_s(self) -> float:
        return time.time() if self.now_s is None else self.now_s

    def answer(self, path: str, query: dict[str, str], headers: dict[str, str]) -> tuple[int, Any]:
        if path == "/login" or path.startswith(("/v3/forecast", "/v3/historical")):
            return self._watttime(path, query, headers)
        if "carbon-intensity" in path:
            return self._electricity_maps(path.rpartition("/")[2], query, headers)
        return self._neso(path)

    def _electricity_maps(self, endpoint: str, query: dict[str, str], headers: dict[str, str]) -> tuple[int, Any]:  # noqa: PLR0911  (an endpoint each)
        if headers.get("auth-token") != TOKEN:
            return FAULTS["401"]
        if query.get("disableCallerLookup") != "true":
            return 200, {"zone": "US-CAL-CISO", "carbonIntensity": 1, "datetime": stamp(self.present_s())}
        now_s = self.present_s() // HOUR_S * HOUR_S
        zone = query.get("zone", "FR")

        def row(at_s: float) -> dict[str, Any]:
            return {
                "zone": zone, "carbonIntensity": figure(at_s), "datetime": stamp(at_s), "isEstimated": at_s >= now_s,
                "emissionFactorType": query["emissionFactorType"], "estimationMethod": None,
            }  # fmt: skip

        if endpoint == "latest":
            return 200, {**row(now_s), **self.change}
        if endpoint == "history":
            return 200, {"zone": zone, "history": [row(now_s - k * HOUR_S) for k in range(23, -1, -1)], **self.change}
        if endpoint == "past-range":
            first, last = (datetime.fromisoformat(query[key]).timestamp() for key in ("start", "end"))
            if last - first > 240 * HOUR_S:
                return 400, {"status": "error", "message": "time range is limited to 10 days"}
            return 200, {
                "zone": zone,
                "data": [row(first + k * HOUR_S) for k in range(int((last - first) // HOUR_S))],
                **self.change,
            }
        hours = int(query["horizonHours"])
        ahead = [
            {"carbonIntensity": figure(now_s + k * HOUR_S), "datetime": stamp(now_s + k * HOUR_S)} for k in range(hours + 1)
        ]
        return 200, {"zone": zone, "forecast": ahead, "updatedAt": stamp(now_s), **self.change}

    def _neso(self, path: str) -> tuple[int, Any]:
        parts = path.strip("/").split("/")
        now_s = self.present_s() // HALF_S * HALF_S
        first, last = now_s, now_s + HALF_S
        times = [part for part in parts if part.startswith("20")]
        if times:
            first = datetime.fromisoformat(times[0]).timestamp()
            last = (
                datetime.fromisoformat(times[1]).timestamp()
                if len(times) > 1
                else first + (24 if "fw24h" in path else 48) * HOUR_S
            )
        regional = parts[0] == "regional"
        data = []
        for k in range(int((last - first) // HALF_S)):
            at_s = first + k * HALF_S
            intensity: dict[str, Any] = {"forecast": figure(at_s) + 1, "index": "low"}
            if not regional:
                intensity["actual"] = figure(at_s) if at_s + HALF_S <= now_s else None
            data.append(
                {
                    "from": stamp(at_s)[:16] + "Z",
                    "to": stamp(at_s + HALF_S)[:16] + "Z",
                    "intensity": {**intensity, **self.change},
                }
            )
        if not regional:
            return 200, {"data": data}
        kind = "regionid" if "regionid" in parts else "postcode"
        value: Any = parts[parts.index(kind) + 1]
        block = {"regionid": 13, "shortname": "London", kind: int(value) if kind == "regionid" else value, "data": data}
        block.update({key: value for key, value in self.change.items() if key in block})
        return 200, {"data": block if times else [block]}  # bare or in a list, as they do

    def _watttime(self, path: str, query: dict[str, str], headers: dict[str, str]) -> tuple[int, Any]:
        if path == "/login":
            if headers.get("Authorization") != "Basic " + b64encode(f"{USER}:{PASSWORD}".encode()).decode():
                return 401, {"error": "Invalid username or password"}
            self.tokens.append(f"jwt-{len(self.tokens)}-{TOKEN}")
            return 200, {"token": self.tokens[-1]}
        if not self.tokens or headers.get("Authorization") != f"Bearer {self.tokens[-1]}":
            return 401, {"error": "Token has expired", "message": f"got {headers.get('Authorization')}"}
        now_s = self.present_s() // FIVE_S * FIVE_S
        if path == "/v3/historical":
            first, last = (datetime.fromisoformat(query[key]).timestamp() for key in ("start", "end"))
        else:
            first, last = now_s, now_s + int(query["horizon_hours"]) * HOUR_S
        data = [{"point_time": stamp(first + k * FIVE_S), "value": 1000.0} for k in range(int((last - first) // FIVE_S))]
        meta = {
            "region": query["region"],
            "signal_type": "co2_moer",
            "units": "lbs_co2_per_mwh",
            "data_point_period_seconds": 300,
        }
        return 200, {"data": data, "meta": {**meta, **self.change}}


@contextmanager
def grid_server(**behaviour: Any) -> Iterator[Grid]:  # noqa: C901  (a fault each)
    """A server of its own thread; its address is the grid's ``url``."""
    grid = Grid(**behaviour)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            query, headers = dict(parse_qsl(parts.query)), dict(self.headers.items())
            grid.asked.append((parts.path, query, headers))
            with suppress(BrokenPipeError, ConnectionResetError):
                if grid.fault in BY_HAND:
                    self.misbehave(grid.fault)
                    return
                status, body = FAULTS[grid.fault] if grid.fault in FAULTS else grid.answer(parts.path, query, headers)
                self.say(status, body if isinstance(body, bytes) else json.dumps(body).encode())

        def misbehave(self, fault: str) -> None:
            if fault == "401 echo":
                given = self.headers.get("auth-token", self.headers.get("Authorization"))
                self.say(401, json.dumps({"error": f"Invalid auth-token: {given}"}).encode())
            elif fault == "hang":
                grid.released.wait(20)
            elif fault == "half body":
                self.say(200, b'{"zone": "FR", "carbonInt', length=400)
                self.close_connection = True
            elif fault == "huge":
                self.say(200, b'{"zone": "' + b"x" * 9 * 2**20 + b'"}')
            elif fault == "bomb":
                grid.headers["Content-Encoding"] = "gzip"
                self.say(200, bomb())
            elif fault == "redirect":
                assert grid.other is not None
                grid.headers["Location"] = grid.other.url + self.path
                self.say(302, b"")
            self.close_connection = True

        def say(self, status: int, body: bytes, length: int | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **grid.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    grid.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield grid
    finally:
        grid.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
