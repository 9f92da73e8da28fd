"""Turns marks (a step ended, a phase opened or closed) into spans: consecutive time of one phase, ready to be measured.

A step begins where the previous step or phase ended, so steps telescope and waiting for data is part of the step. A phase
opened in the middle of a step is cut out of it. What follows the last step is ``other``. Pure: instants come from the caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from green_torch.records import Flag, FlopCount, Instant, Phase, Work
from green_torch.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Callable

_KINDS_OF_WORK = 16  # different step works kept apart before they are summed
_SERIES = (1, 2, 5)
_FIRST_RECORDS = 10  # with "auto", the first steps get a record each
_BETWEEN_STEPS_NS = 1_000_000  # a phase opened within a millisecond of a step's end stands between steps, not in one
_RECORDS_PER_DOUBLING = 1000  # then a second between records, twice that after a thousand, and so on


@dataclass(frozen=True, slots=True)
class Span:
    """Time of one phase, as pieces ``(start, end)`` in order; several where phases were cut out of it.

    ``phase`` is ``None`` for time that belongs to nobody (the run's clock was stopped).
    """

    phase: Phase | None
    step: int
    pieces: tuple[tuple[Instant, Instant], ...]
    work: Work
    flags: frozenset[str] = frozenset()
    peak_memory_bytes: int | None = None
    open_since_ns: int | None = None  # where the oldest of what was still open began

    @property
    def start(self) -> Instant:
        """Where it begins."""
        return self.pieces[0][0]

    @property
    def end(self) -> Instant:
        """Where it ends."""
        return self.pieces[-1][1]

    @property
    def duration_s(self) -> float:
        """Seconds in its pieces."""
        return sum(end.at_ns - start.at_ns for start, end in self.pieces) / NS_PER_S

    def merged(self, later: Span) -> Span:
        """Both as one; the later one must be of the same phase."""
        return Span(
            self.phase,
            later.step,
            _joined(self.pieces, later.pieces),
            self.work + later.work,
            self.flags | later.flags | {Flag.MERGED},
            max((m for m in (self.peak_memory_bytes, later.peak_memory_bytes) if m is not None), default=None),
            self.open_since_ns,
        )


def _joined(
    first: tuple[tuple[Instant, Instant], ...], second: tuple[tuple[Instant, Instant], ...]
) -> tuple[tuple[Instant, Instant], ...]:
    """Pieces one after another; where two touch they become one."""
    if first and second and first[-1][1] == second[0][0]:
        return (*first[:-1], (first[-1][0], second[0][1]), *second[1:])
    return first + second


def _touch(at: Instant) -> Span:
    return Span(None, 0, ((at, at),), Work())


class Cadence:
    """How many steps make a record.

    ``"auto"``: one each at first, then the smallest of 1, 2, 5, 10, … that leaves a second between records; twice as long with
    every thousand records, so that a run of any length leaves a few thousand.
    """

    def __init__(self, every: int | str) -> None:
        self._fixed = every if isinstance(every, int) else None
        self._records = 0
        self._n = 1

    @property
    def n_steps(self) -> int:
        """Steps that the next record takes."""
        return self._fixed or self._n

    def due(self, n_steps: int, last_step: int) -> bool:
        """Whether so many steps, up to that one, make a record.

        A fixed number counts on the step axis too, so that records fall on the steps at which a trainer logs the loss (the last of
        every ten, say) even after a phase or a counted step made one out of turn.
        """
        return n_steps >= self.n_steps or (self._fixed is not None and (last_step + 1) % self._fixed == 0)

    def made(self, n_steps: int, duration_s: float) -> None:
        """A train record was made of so many steps in so many seconds."""
        self._records += 1
        if self._fixed or self._records < _FIRST_RECORDS or duration_s <= 0:
            return
        gap_s = 2.0 ** (self._records // _RECORDS_PER_DOUBLING)
        wanted = gap_s * n_steps / duration_s
        self._n = next(base * 10**power for power in range(12) for base in _SERIES if base * 10**power >= wanted or power == 11)


class _Tally:
    """Work added up in place, since this happens at every step; a sum with something unknown in it is unknown."""

    __slots__ = ("_flops", "flops_known", "n_steps", "samples", "tokens")

    def __init__(self) -> None:
        self.n_steps = 0
        self.samples: int | None = None
        self.tokens: int | None = None
        self.flops_known = True
        self._flops: list[tuple[FlopCount, int]] = []  # equal work comes as one object, again and again

    def add_flops(self, flops: FlopCount | None, times: int = 1) -> None:
        """FLOPs that ran, or ``None`` where nobody knows."""
        if flops is None:
            self.flops_known = False
        elif self._flops and self._flops[-1][0] is flops:
            self._flops[-1] = (flops, self._flops[-1][1] + times)
        elif len(self._flops) < _KINDS_OF_WORK:
            self._flops.append((flops, times))
        else:
            self._flops = [(self._sum() + flops.scaled(times), 1)]

    def count(self, samples: int | None, tokens: int | None) -> None:
        """One more step, and its units."""
        first = self.n_steps == 0
        self.n_steps += 1
        self.samples = samples if first else None if samples is None or self.samples is None else self.samples + samples
        self.tokens = tokens if first else None if tokens is None or self.tokens is None else self.tokens + tokens

    def add_all(self, step: _Tally) -> None:
        """The FLOPs of a step that has just been counted here."""
        if not step._flops or not step.flops_known:
            self.flops_known = False
        for flops, times in step._flops:
            self.add_flops(flops, times)

    def work(self) -> Work:
        """The sum so far; outside train, at least one occurrence."""
        return Work(max(self.n_steps, 1), self.samples, self.tokens, self._sum() if self._flops and self.flops_known else None)

    def _sum(self) -> FlopCount:
        (flops, times), *others = self._flops
        total = flops.scaled(times) if times > 1 else flops
        for more, count in others:
            total += more.scaled(count)
        return total


class _Open:
    """A phase, step or record under way: where its current piece began, and what it has gathered."""

    __slots__ = ("flags", "phase", "pieces", "since", "tally")

    def __init__(self, phase: Phase | None, since: Instant) -> None:
        self.phase = phase
        self.since = since
        self.pieces: tuple[tuple[Instant, Instant], ...] = ()
        self.tally = _Tally()
        self.flags: set[str] = set()

    def cut(self, at: Instant) -> None:
        """Ends the current piece. One assignment, so that an interruption finds it done or not begun."""
        pieces = _joined(self.pieces, ((self.since, at),)) if at.at_ns > self.since.at_ns else self.pieces
        self.pieces, self.since = pieces, at

    @property
    def began_ns(self) -> int:
        """Where it began."""
        return (self.pieces[0][0] if self.pieces else self.since).at_ns


class StepBuilder:
    """Gathers steps and phases into spans. Every instant between ``begin`` and ``finish`` ends up in exactly one span."""

    def __init__(self, begin: Instant, cadence: Cadence, peak_memory: Callable[[], int | None] = lambda: None) -> None:
        self._cadence = cadence
        self._peak_memory = peak_memory
        self._step = _Open(Phase.TRAIN, begin)  # the step under way
        self._record = _Open(Phase.TRAIN, begin)  # whole steps not yet made a record
        self._phases: list[_Open] = []
        self._last_step = -1
        self._steps_done = 0

    @property
    def last_step(self) -> int:
        """The last step that ended; -1 before the first."""
        return self._last_step

    @property
    def steps_done(self) -> int:
        """Steps that have ended, whatever the step axis calls them; with those of earlier segments."""
        return self._steps_done

    def resume(self, step: int, steps_done: int) -> None:
        """Goes on after this step, when so many had been done by earlier segments; before the first step here."""
        self._last_step, self._steps_done = step, steps_done

    @property
    def unread_since_ns(self) -> float:
        """From where on instants may become ends of spans without having been one already; infinity while a phase is open."""
        return math.inf if self._phases else self._step.since.at_ns

    @property
    def open_pieces(self) -> list[tuple[Instant, Instant]]:
        """The pieces of all that is open, and where each goes on."""
        parts = (self._record, self._step, *self._phases)
        return [piece for part in parts for piece in (*part.pieces, (part.since, part.since))]

    def opening(self) -> list[Span]:
        """An empty span of nobody's at the run's first instant, so that its level is taken while its readings are there."""
        return [_touch(self._step.since)]

    @property
    def in_phase(self) -> bool:
        """Whether a phase is open."""
        return bool(self._phases)

    def add_flops(self, flops: FlopCount | None, flags: tuple[str, ...] = ()) -> None:
        """FLOPs that ran since the last mark: they belong to the innermost phase, or to the step under way."""
        under_way = self._phases[-1] if self._phases else self._step
        if flags:
            under_way.flags.update(flags)
        if flops is not None or Flag.FLOPS_UNKNOWN in flags:
            under_way.tally.add_flops(flops)

    def step(
        self,
        at: Instant,
        *,
        samples: int | None = None,
        tokens: int | None = None,
        flags: tuple[str, ...] = (),
        step: int | None = None,
    ) -> list[Span]:
        """A step ends; returns the spans that this completes. Inside a phase it only adds its work to the phase.

        A step during which FLOPs were counted is not typical, and gets a record of its own.
        """
        if self._phases:
            self._phases[-1].tally.count(samples, tokens)
            self._phases[-1].flags.update(flags)
            return []
        under_way = self._step
        if flags:
            under_way.flags.update(flags)
        alone = Flag.COUNTED in under_way.flags
        spans = self.flush() if alone else []
        record, following = self._record, _Open(Phase.TRAIN, at)
        record.tally.count(samples, tokens)
        record.tally.add_all(under_way.tally)
        record.flags |= under_way.flags
        under_way.cut(at)
        pieces, number = _joined(record.pieces, under_way.pieces), self._last_step + 1 if step is None else step
        done = self._steps_done + 1  # what follows is as one, for the sake of an interruption
        record.pieces, self._step, self._last_step, self._steps_done = pieces, following, number, done
        if alone or self._cadence.due(record.tally.n_steps, self._last_step):
            spans += self.flush()
        return spans

    def open_phase(self, at: Instant, phase: Phase | None) -> list[Span]:
        """A phase opens (``None``: the run's clock stops), cut out of whatever is under way.

        What is under way, and the phase itself, will be measured when the readings at their starts may be forgotten: empty spans of
        nobody's have the levels there taken now.
        """
        spans = self.flush()
        under_way = self._phases[-1] if self._phases else self._step
        if not under_way.pieces and under_way.since.at_ns < at.at_ns:
            spans.append(_touch(under_way.since))
        spans.append(_touch(at))
        under_way.cut(at)
        if under_way is self._step and phase is not None and Flag.SPLIT not in under_way.flags:
            elapsed_ns = sum(end.at_ns - start.at_ns for start, end in under_way.pieces)
            if elapsed_ns > _BETWEEN_STEPS_NS:
                under_way.flags.add(Flag.SPLIT)
        self._phases.append(_Open(phase, at))
        return spans

    def close_phase(self, at: Instant) -> list[Span]:
        """The innermost phase ends, and what was under way goes on."""
        closed = self._phases.pop()
        closed.cut(at)
        (self._phases[-1] if self._phases else self._step).since = at
        return [self._span(closed)] if closed.pieces else []

    def flush(self) -> list[Span]:
        """Makes a record of the whole steps gathered so far, if any."""
        record = self._record
        if not record.tally.n_steps or not record.pieces:  # steps that took no time wait for one that did
            return []
        self._record = _Open(Phase.TRAIN, record.since)
        span = self._span(record)
        self._cadence.made(record.tally.n_steps, span.duration_s)
        return [span]

    def finish(self, at: Instant) -> list[Span]:
        """The run ends: open phases close, and what follows the last step is ``other``."""
        spans: list[Span] = []
        while self._phases:
            spans += self.close_phase(at)
        spans += self.flush()
        self._step.cut(at)
        self._step.phase = Phase.OTHER
        if self._step.pieces:
            spans.append(self._span(self._step))
        return spans

    def _span(self, done: _Open) -> Span:
        """What has been gathered there, as a span."""
        return Span(
            done.phase,
            max(self._last_step, 0),
            done.pieces,
            done.tally.work(),
            frozenset(done.flags),
            self._peak_memory(),
            self._record.began_ns,  # the step under way and its phases began no earlier
        )
