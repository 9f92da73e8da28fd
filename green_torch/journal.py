"""What the training thread notes as it goes, and the spans that are made of it later, off that thread.

A mark costs the training thread one reading of the clock and one append. :meth:`Journal.read`, called by the recorder's thread, does
the rest: it checks what was given, gathers steps and phases (:mod:`green_torch.steps`), and hands a span on once the device has
passed all its boundaries.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from green_torch.records import Flag, Instant
from green_torch.steps import Cadence, StepBuilder

if TYPE_CHECKING:
    from collections.abc import Callable

    from green_torch.clock import Boundaries
    from green_torch.records import FlopCount, Phase
    from green_torch.steps import Span

Ran = tuple["FlopCount | None", tuple[str, ...]]  # FLOPs that ran since the last mark, with their flags
NOTHING_RAN: Ran = (None, ())
_MOST_NOTES = 1024  # beyond it the training thread reads them itself: the reader is starved


class Journal:
    """Notes of the training thread, in order; every method but ``read`` and what only looks belongs to that thread.

    ``put`` takes each span that is complete; ``peak_memory`` tells bytes, from any thread.
    """

    def __init__(
        self,
        boundaries: Boundaries,
        cadence: Cadence,
        *,
        put: Callable[[Span], None],
        warn: Callable[..., None],
        peak_memory: Callable[[], int | None],
    ) -> None:
        self._boundaries = boundaries
        self._mark = boundaries.marker
        self._peak_memory = peak_memory
        self._peak_bytes: int | None = None  # asked once for all that is read together
        self._put = put
        self._warn = warn
        self._notes: deque[tuple[Any, ...]] = deque()  # when, what to do (None: a step ended), and what was given
        self._builder = StepBuilder(Instant.exact(self._mark()), cadence, lambda: self._peak_bytes)
        self._waiting: deque[Span] = deque(self._builder.opening())  # spans whose boundaries the device has not passed
        self._reading = threading.RLock()  # a signal's handler that saves a checkpoint may strike within
        self._depth = 0
        self.read()

    @property
    def in_phase(self) -> bool:
        """Whether a phase is open."""
        return self._depth > 0

    @property
    def last_step(self) -> int:
        """The last step that ended; -1 before the first."""
        self.read()
        return self._builder.last_step

    @property
    def steps_done(self) -> int:
        """Steps that have ended, with those of earlier segments, whatever the step axis calls them."""
        self.read()
        return self._builder.steps_done

    def resume(self, step: int, steps_done: int) -> None:
        """Goes on after this step, the last of so many done by earlier starts of the process; before the first step here."""
        self._builder.resume(step, steps_done)

    @property
    def behind(self) -> bool:
        """Whether the device has still to pass a boundary of what was read."""
        return bool(self._waiting)

    def step(self, tokens: object, samples: object, step: object, ran: Ran) -> None:
        """A step ends here. What was given is checked when it is read, but a tensor, which may count on in place, is read now."""
        # All this runs after a step's whole work, in caches that have forgotten it: each name looked up here costs.
        if not (
            (tokens is None or type(tokens) is int)
            and (samples is None or type(samples) is int)
            and (step is None or type(step) is int)
        ):
            tokens, samples, step = _now(tokens), _now(samples), _now(step)
        notes = self._notes
        notes.append((self._mark(), None, tokens, samples, step, ran))
        if len(notes) > _MOST_NOTES:
            self.read()

    def open_phase(self, phase: Phase | None, ran: Ran) -> None:
        """A phase opens here (``None``: the run's clock stops)."""
        self._notes.append((self._mark(), self._open, phase, ran))
        self._depth += 1

    def close_phase(self, ran: Ran) -> None:
        """The innermost phase ends here."""
        self._notes.append((self._mark(), self._close, ran))
        self._depth -= 1
        if len(self._notes) > _MOST_NOTES:
            self.read()

    def flush(self) -> None:
        """The steps so far make a record, and all notes are read."""
        self._notes.append((0, self._flush))
        self.read()

    def finish(self) -> None:
        """The run ends here, and all notes are read."""
        self._notes.append((self._mark(), self._finish))
        self.read()

    def abandon(self) -> None:
        """Gives up on a device that does not get there: spans that wait for it are flagged, and handed on as they are known."""
        self._boundaries.abandon()
        with self._reading:
            self._waiting = deque(replace(span, flags=span.flags | {Flag.LATE}) for span in self._waiting)
            self._hand_on()

    def read(self, *, wait: bool = True) -> None:
        """Makes spans of the notes, and hands on those that the device has passed (any thread). Without ``wait``: unless another does."""
        if wait:
            with self._reading:  # unlike acquire() it can't be left locked by Ctrl-C
                self._read()
        elif self._reading.acquire(blocking=False):
            try:
                self._read()
            finally:
                self._reading.release()

    def _read(self) -> None:
        if self._notes:
            self._peak_bytes = None
            with suppress(Exception):  # a driver that fails must not cost the steps
                self._peak_bytes = self._peak_memory()
        for _ in range(len(self._notes)):  # no more: a loop of very short steps could keep the reader here
            at_ns, act, *given = self._notes.popleft()
            try:
                self._waiting.extend((act or self._end_step)(Instant.exact(at_ns), *given))
                self._boundaries.prune(at_ns, self._needed)
            except Exception as error:  # rule 9: one bad note must not cost the run
                self._warn(f"a step could not be read and is missing: {type(error).__name__}: {error}", key="journal")
        self._hand_on()

    @property
    def unread_since_ns(self) -> float:
        """From where on instants may become ends of spans without having been one already (the reader's thread)."""
        begun: list[float] = [span.start.at_ns for span in tuple(self._waiting)]
        with suppress(IndexError):  # another thread is reading
            begun.append(self._notes[0][0] or math.inf)
        return min(self._builder.unread_since_ns, *begun, math.inf)

    def _hand_on(self) -> None:
        while self._waiting:
            span = self._waiting[0]
            pieces = tuple((self._boundaries.resolve(start), self._boundaries.resolve(end)) for start, end in span.pieces)
            known = tuple((start, end) for start, end in pieces if start is not None and end is not None)
            if len(known) < len(pieces):
                return
            self._waiting.popleft()
            self._put(span if known == span.pieces else replace(span, pieces=known))

    def _needed(self) -> set[int]:
        """Boundaries whose spans are still to be handed on."""
        pieces = (*self._builder.open_pieces, *(piece for span in self._waiting for piece in span.pieces))
        return {at.at_ns for piece in pieces for at in piece}

    def _end_step(self, at: Instant, tokens: object, samples: object, step: object, ran: Ran) -> list[Span]:
        n_tokens, n_samples, number = self._count("tokens", tokens), self._count("samples", samples), self._number(step)
        whole = (n_tokens is None, n_samples is None, number is None) == (tokens is None, samples is None, step is None)
        self._builder.add_flops(*ran)
        return self._builder.step(at, samples=n_samples, tokens=n_tokens, flags=() if whole else (Flag.BAD_COUNT,), step=number)

    def _open(self, at: Instant, phase: Phase | None, ran: Ran) -> list[Span]:
        self._builder.add_flops(*ran)
        return self._builder.open_phase(at, phase)

    def _close(self, at: Instant, ran: Ran) -> list[Span]:
        self._builder.add_flops(*ran)
        return self._builder.close_phase(at)

    def _flush(self, _at: Instant) -> list[Span]:
        return self._builder.flush()

    def _finish(self, at: Instant) -> list[Span]:
        return self._builder.finish(at)

    def _count(self, name: str, value: object) -> int | None:
        """A count of units; ``None`` with one warning where it is not one."""
        if value is None:
            return None
        with suppress(TypeError, ValueError, OverflowError):
            whole = int(value)  # type: ignore[call-overload]  # the user may give anything
            if whole > 0 and whole == value:
                return int(whole)
        self._warn(
            f"{name}={value!r:.200} is no positive whole number: left out, and the record is flagged {Flag.BAD_COUNT}",
            key=f"bad {name}",
        )
        return None

    def _number(self, step: object) -> int | None:
        """A place on the step axis; ``None`` with one warning where it is none."""
        if step is None:
            return None
        with suppress(TypeError, ValueError, OverflowError):
            whole = int(step)  # type: ignore[call-overload]  # the user may give anything
            if whole == step:
                return int(whole)
        self._warn(f"step={step!r:.200} is no whole number: the next one stands in", key="bad step")
        return None


def _now(value: object) -> object:
    """The whole number that it is at this moment, or itself where it is none."""
    with suppress(Exception):
        whole = int(value)  # type: ignore[call-overload]  # the user may give anything
        if whole == value:
            return int(whole)
    return value
