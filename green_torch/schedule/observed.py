"""What a grid's intensity has been, as far as its provider tells: its history where it has one, and each figure that it gave when asked."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

from green_torch.errors import GreenTorchError, IntensityError
from green_torch.schedule.outlook import DAY_S, Threshold, threshold
from green_torch.units import S_PER_HOUR, ns_to_s, s_to_ns

if TYPE_CHECKING:
    from green_torch.records import IntensityPoint

_REVISED_S = 3 * S_PER_HOUR  # so far back figures may yet change
_WATCHED_SHARE = 0.25  # of the slack, a day at most, is watched before the past counts as one


@final
class Observed:
    """Remembers the figures of a provider. :meth:`look` may do network and is called off the training thread; the rest is memory."""

    def __init__(self, provider: object) -> None:
        self._provider: Any = provider
        self._lock = threading.Lock()
        self._seen: dict[int, IntensityPoint] = {}  # by the time that was asked for
        self._past: dict[int, IntensityPoint] = {}  # of the history, by its own times
        self.answers = False  # whether the last look brought the present figure

    def look(self, now_unix_ns: int, since_unix_ns: int | None = None) -> None:
        """Asks for the present figure, and with ``since_unix_ns`` for what is not yet known of the past from there on. Never raises."""
        at, history = (getattr(self._provider, name, None) for name in ("at", "history"))
        found: dict[int, IntensityPoint] = {}
        with suppress(Exception):  # rule 9: a provider may be anybody's
            if callable(at):
                point = at(now_unix_ns)
                found = {} if point.fallback else {now_unix_ns: replace(point, time_unix_ns=now_unix_ns)}
        past: list[IntensityPoint] = []
        with suppress(Exception):
            if since_unix_ns is not None and callable(history):
                known_ns = max((known for known in self._past if known >= since_unix_ns), default=since_unix_ns)
                past = list(history(max(since_unix_ns, known_ns - s_to_ns(_REVISED_S)), now_unix_ns))
        with self._lock:
            self.answers = bool(found)
            self._seen |= found
            self._past |= {point.time_unix_ns: point for point in past if point.time_unix_ns is not None and not point.fallback}

    def since(self, begin_unix_ns: int) -> tuple[IntensityPoint, ...]:
        """What is known from there on, in order; the figures seen stand in where the history ends."""
        with self._lock:
            last_ns = max(self._past, default=-1)
            known = self._past | {at_ns: point for at_ns, point in self._seen.items() if at_ns > last_ns}
        before = [at_ns for at_ns in known if at_ns <= begin_unix_ns]
        first_ns = max(before, default=begin_unix_ns)
        return tuple(known[at_ns] for at_ns in sorted(known) if at_ns >= first_ns)

    def threshold(self, now_unix_ns: int, work_s: float, left_s: float, *, resume_s: float = 0.0) -> Threshold | None:
        """Whether to run now, by the past alone; ``None`` where the grid can't be asked, or was not watched for long enough.

        It is watched for a quarter of the slack, a day at most, before the past tells what is clean.
        """
        points = self.since(now_unix_ns - s_to_ns(7 * DAY_S))
        times = [point.time_unix_ns or 0 for point in points]
        if not self.answers or not times:
            return None
        if ns_to_s(now_unix_ns - times[0]) < min(DAY_S, _WATCHED_SHARE * max(0.0, left_s - work_s)):
            return None
        try:
            return threshold(points, now_unix_ns, work_s, left_s, resume_s=resume_s)
        except GreenTorchError:
            return None

    def checked(self, begin_unix_ns: int, region: str, source: str, kind: str) -> tuple[IntensityPoint, ...]:
        """What is known from there on, if it is of this grid, source and kind.

        Raises:
            IntensityError: it is of others, or nothing is known.
        """
        points = self.since(begin_unix_ns)
        if not points:
            raise IntensityError(f"{type(self._provider).__name__} gave no figures since then")
        for point in points:
            if (point.region, point.source, point.kind) != (region, source, kind):
                raise IntensityError(
                    f"the figures since then are of {point.region} ({point.source}, {point.kind}), the plan's of {region} ({source}, {kind})"
                )
        return points
