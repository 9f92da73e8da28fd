"""A provider that is asked over the network, made fit for a run: remembered, asked off-thread, and never without a way out.

``at`` is called for every record and answers from memory. Where the provider's interval (5 minutes to an hour) has turned, a thread of
its own fetches the new figure; the one caller that set it off waits a second at most. The figure is shared through a file in the
user's cache: of all processes on a machine, the one that creates the interval's claim file asks, and the others read the file. A
claim is no lock: nobody waits for its owner, and it is worth nothing after 90 s or in the next interval.

Where the provider fails, the last known figure stands in for up to three hours, then codecarbon's table, marked ``fallback`` and with
the cause in ``source``. What stands in is of the provider's own basis, so that a sum never mixes two; a table of another basis is
taken only where the provider has refused for good before it ever answered, and then for the whole run. Where nothing of the kind
is known, :class:`~green_torch.errors.IntensityError` is raised: unknown is not zero.

For ranks: ``isinstance(provider, Live)`` tells a provider that asks the network. Ranks but the first call ``follow()``: they read the
machine's cache and take what ``tell(point, time)`` hands them, and never ask.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, final

from green_torch.cache import cache_file, entries, keep
from green_torch.errors import ArgumentError, GreenTorchError, IntensityError
from green_torch.intensity.codecarbon_tables import table_point
from green_torch.intensity.online import iso
from green_torch.records import IntensityPoint
from green_torch.units import NS_PER_S, S_PER_HOUR, ns_to_s, s_to_ns

if TYPE_CHECKING:
    from green_torch.intensity.online import Online

MAX_AGE_S = 3 * S_PER_HOUR
WAIT_S = 1.0
_CLAIM_S = 90.0  # longer than a request can take
_RETRY_S = 60.0  # after a failure; doubled by each further one up to the provider's interval
_LONGEST_RETRY_S = 6 * S_PER_HOUR  # after a refusal, and at most where a server wants to be left alone
_OTHERS_S = 5.0  # how long another process's answer is looked out for
_LOOK_S = 0.05
_REMEMBERED = 4


@dataclass(frozen=True, slots=True)
class _Answer:
    """A figure, and the time for which it was asked."""

    asked_unix_ns: int
    point: IntensityPoint


@final
class Live:
    """An :class:`~green_torch.protocols.IntensityProvider` (and forecaster) over an :class:`Online` one; ``track()`` makes it by itself.

    Args:
        source: the provider.
        region: whose table stands in where the provider fails; by default the country of the provider's zone.
        max_age_s: how long the last known figure stands in, in seconds.
        wait_s: how long the caller that set off a request waits for it, in seconds.
        cache_dir: instead of the user's cache directory.

    Raises:
        ArgumentError: a time is negative.
    """

    def __init__(
        self,
        source: Online,
        *,
        region: str | None = None,
        max_age_s: float = MAX_AGE_S,
        wait_s: float = WAIT_S,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if not (max_age_s >= 0 and wait_s >= 0):
            raise ArgumentError(f"max_age_s={max_age_s!r}, wait_s={wait_s!r}: seconds of at least 0 are needed")
        self._source = source
        self._signal = signal = source.signal
        self._interval_ns = s_to_ns(signal.interval_s)
        self._max_age_ns = s_to_ns(max_age_s)
        self._wait_s = wait_s
        self._file = cache_file(f"intensity-{hashlib.sha256(signal.key.encode()).hexdigest()[:16]}.json", cache_dir)
        self._table = _table(((region,) if region else ()) + signal.tables)
        self._lock = threading.Lock()  # never held across a request or a file
        self._answers: deque[_Answer] = deque(maxlen=_REMEMBERED)
        self._asking: threading.Event | None = None  # a request is under way
        self._not_before_ns = 0  # Unix time of the next request
        self._failures = 0
        self._refused = False  # at the last request, and likely at the next
        self._settled = False  # on a table of another basis, for the whole run
        self._follows = False
        self._why = ""

    def __repr__(self) -> str:
        return f"Live({self._source!r})"

    def at(self, time_unix_ns: int) -> IntensityPoint:
        """The figure of the interval that the time lies in, or what stands in for it.

        Raises:
            IntensityError: nothing of the provider's basis is known.
        """
        with self._lock:
            held = self._held(time_unix_ns)
            if held is not None:
                return held
            asking = self._set_off(time_unix_ns)
        if asking is not None:
            asking.wait(self._wait_s)
        with self._lock:
            return self._held(time_unix_ns) or self._stand_in(time_unix_ns)

    def history(self, start_unix_ns: int, end_unix_ns: int) -> tuple[IntensityPoint, ...]:
        """The provider's, asked for anew; blocks."""
        return self._source.history(start_unix_ns, end_unix_ns)

    def forecast(self, start_unix_ns: int, end_unix_ns: int) -> tuple[IntensityPoint, ...]:
        """The provider's, asked for anew; blocks."""
        return self._source.forecast(start_unix_ns, end_unix_ns)

    def follow(self) -> None:
        """From now on this one never asks: it reads the machine's cache and takes what it is told."""
        self._follows = True

    def tell(self, point: IntensityPoint, time_unix_ns: int) -> None:
        """Takes a figure that was had elsewhere for that time; one that stands in for another is not taken."""
        if not point.fallback:
            self._take(_Answer(time_unix_ns, point))

    def _held(self, time_unix_ns: int) -> IntensityPoint | None:
        """The figure of the time's interval, or of the next; for a time before all that is held the oldest one, marked."""
        slot = self._slot(time_unix_ns)
        for wanted in (slot, slot + 1):
            for answer in reversed(self._answers):
                if self._slot(answer.asked_unix_ns) == wanted:
                    return answer.point
        if self._answers and time_unix_ns < self._answers[0].asked_unix_ns:
            return replace(self._answers[0].point, fallback=True)
        return None

    def _slot(self, time_unix_ns: int) -> int:
        """The number of the provider's interval that a time lies in."""
        return time_unix_ns // self._interval_ns

    def _set_off(self, time_unix_ns: int) -> threading.Event | None:
        """Starts a request where one is due."""
        if self._asking is not None or self._settled or time_unix_ns < self._not_before_ns:
            return None
        done = threading.Event()
        thread = threading.Thread(target=self._ask, args=(time_unix_ns, done), name="green_torch grid intensity", daemon=True)
        with suppress(RuntimeError):  # the interpreter is shutting down
            thread.start()
            self._asking = done
        return self._asking

    def _ask(self, time_unix_ns: int, done: threading.Event) -> None:
        """Another process's figure where there is one, else the provider's (the request's own thread)."""
        try:
            if self._shared(time_unix_ns) or time_unix_ns < self._not_before_ns:
                return
            if self._follows or not self._claim(time_unix_ns):
                until_s = time.monotonic() + _OTHERS_S
                while not self._shared(time_unix_ns) and time.monotonic() < until_s and time_unix_ns >= self._not_before_ns:
                    time.sleep(_LOOK_S)
                with self._lock:
                    self._not_before_ns = max(self._not_before_ns, time_unix_ns + NS_PER_S)
                return
            point = self._source.latest()
            if (point.basis, point.average) != (self._signal.basis, self._signal.average):
                raise IntensityError(f"{self._signal.name} changed its basis to {point.kind}", final=True)  # noqa: TRY301
            self._take(_Answer(time_unix_ns, point))
            keep(self._file, "latest", {"asked_unix_ns": time_unix_ns, "key": self._signal.key, "point": asdict(point)})
        except Exception as error:  # rule 9; what a library raises may hold the request, so only its kind is told
            self._fail(time_unix_ns, error if isinstance(error, IntensityError) else IntensityError(type(error).__name__))
        finally:
            with self._lock:
                self._asking = None
            done.set()

    def _take(self, answer: _Answer) -> None:
        with self._lock:
            self._answers.append(answer)
            self._failures, self._refused, self._why = 0, False, ""

    def _fail(self, time_unix_ns: int, error: IntensityError) -> None:
        with self._lock:
            wait_s = min(_RETRY_S * 2**self._failures, self._signal.interval_s)
            wait_s = _LONGEST_RETRY_S if error.final else max(wait_s, min(error.retry_after_s or 0.0, _LONGEST_RETRY_S))
            self._failures += 1
            self._refused = error.final
            self._why = str(error)
            self._not_before_ns = until_ns = time_unix_ns + s_to_ns(wait_s)
        if not error.final:  # a refusal may be this process's own, of its own credentials
            failure = {"asked_unix_ns": time_unix_ns, "until_unix_ns": until_ns, "why": str(error)}
            keep(self._file, "failure", failure)

    def _shared(self, time_unix_ns: int) -> bool:
        """Reads what other processes had: True where it answers; an older figure is remembered, a failure respected."""
        known = entries(self._file)
        failure = known.get("failure", {})
        asked_ns, until_ns = failure.get("asked_unix_ns"), failure.get("until_unix_ns")
        answer = self._decoded(known.get("latest", {}))
        ahead = None if answer is None else self._slot(answer.asked_unix_ns) - self._slot(time_unix_ns)
        if answer is not None and ahead is not None and ahead <= 1:  # another process may be an instant ahead
            with self._lock:
                newest_ns = self._answers[-1].asked_unix_ns if self._answers else -1
            if answer.asked_unix_ns > newest_ns:
                self._take(answer)
            if ahead >= 0:
                return True
        if isinstance(asked_ns, int) and isinstance(until_ns, int) and asked_ns <= time_unix_ns < until_ns:
            with self._lock:
                self._not_before_ns = min(until_ns, time_unix_ns + s_to_ns(_LONGEST_RETRY_S))
                self._why = str(failure.get("why", ""))
        return False

    def _decoded(self, entry: dict[str, Any]) -> _Answer | None:
        """A figure from the file, checked like one from the network."""
        with suppress(TypeError, ValueError, KeyError, GreenTorchError):
            point = IntensityPoint(**entry["point"])
            checked = self._signal.point(point.g_per_kwh, int(point.time_unix_ns or 0), estimated=bool(point.estimated))
            if (point.basis, point.average) == (checked.basis, checked.average) and entry.get("key") == self._signal.key:
                return _Answer(int(entry["asked_unix_ns"]), replace(checked, region=str(point.region)))
        return None

    def _claim(self, time_unix_ns: int) -> bool:
        """Whether it is this process that asks now: the one that creates the claim's file."""
        due_ns = max(self._slot(time_unix_ns) * self._interval_ns, self._not_before_ns)
        due_s = int(ns_to_s(due_ns) + (time_unix_ns - due_ns) // s_to_ns(_CLAIM_S) * _CLAIM_S)
        claim = self._file.with_name(f"{self._file.stem}.{due_s}.asked")
        with suppress(OSError):
            claim.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
        except OSError:  # no cache here: every process asks for itself
            return True
        for old in claim.parent.glob(f"{self._file.stem}.*.asked"):
            with suppress(OSError, ValueError):
                if int(old.suffixes[-2][1:]) < due_s:
                    old.unlink()
        return True

    def _stand_in(self, time_unix_ns: int) -> IntensityPoint:
        """What is known instead, marked, with the cause."""
        last = self._answers[-1] if self._answers else None
        why = self._why or f"{self._signal.name} has not answered yet"
        table = self._table
        same = table is not None and (table.basis, table.average) == (self._signal.basis, self._signal.average)
        self._settled = self._settled or (table is not None and not same and self._refused and last is None)
        if last is not None and (not same or time_unix_ns - last.asked_unix_ns <= self._max_age_ns):
            of = iso(last.asked_unix_ns, "%Y-%m-%d %H:%MZ")
            return replace(last.point, fallback=True, source=f"{last.point.source}, last known figure, of {of}: {why}")
        if table is not None and (same or self._settled):
            return replace(table, fallback=True, source=f"{table.source}, in place of {self._signal.name}: {why}")
        raise IntensityError(why)


def _table(regions: tuple[str, ...]) -> IntensityPoint | None:
    """The first of these regions that codecarbon's tables know."""
    for region in regions:
        with suppress(ArgumentError):
            return table_point(region)
    return None
