"""Turns marks (a step ended, a phase opened or closed) into spans: consecutive time of one phase, ready to be measured.

A step begins where the previous step or phase ended, so steps telescope and waiting for data is part of the step. A phase
opened in the middle of a step is cut out of it. What follows the last step is ``other``. Pure: instants come from the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from green_torch.records import Flag, FlopCount, Instant, Phase, Work
from green_torch.units import NS_PER_S

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
        )


def _joined(
    first: tuple[tuple[Instant, Instant], ...], second: tuple[tuple[Instant, Instant], ...]
) -> tuple[tuple[Instant, Instant], ...]:
    """Pieces one after another; where two touch they become one."""
    if first and second and first[-1][1] == second[0][0]:
        return (*first[:-1], (first[-1][0], second[0][1]), *second[1:])
    return first + second


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

    def made(self, n_steps: int, duration_s: float) -> None:
        """A train record was made of so many steps in so many seconds."""
        self._records += 1
        if self._fixed or self._records < _FIRST_RECORDS or duration_s <= 0:
            return
        gap_s = 2.0 ** (self._records // _RECORDS_PER_DOUBLING)
        wanted = gap_s * n_steps / duration_s
        self._n = next(base * 10**power for power in range(12) for base in _SERIES if base * 10**power >= wanted or power == 11)


@dataclass(slots=True)
class _Open:
    """A phase under way: where its current piece began, and what it has gathered."""

    phase: Phase | None
    since: Instant
    pieces: tuple[tuple[Instant, Instant], ...] = ()
    work: Work = field(default_factory=Work)
    flops: FlopCount | None = None
    flags: set[str] = field(default_factory=set)

    def cut(self, at: Instant) -> None:
        """Ends the current piece."""
        if at.at_ns > self.since.at_ns:
            self.pieces = _joined(self.pieces, ((self.since, at),))
        self.since = at


class StepBuilder:
    """Gathers steps and phases into spans. Every instant between ``begin`` and ``finish`` ends up in exactly one span."""

    def __init__(self, begin: Instant, cadence: Cadence, first_step: int = 0) -> None:
        self._cadence = cadence
        self._step = _Open(Phase.TRAIN, begin)  # the step under way
        self._record = _Open(Phase.TRAIN, begin)  # whole steps not yet made a record
        self._phases: list[_Open] = []
        self._last_step = first_step - 1

    @property
    def last_step(self) -> int:
        """The last step that ended; one less than the first where none has."""
        return self._last_step

    def add_flops(self, flops: FlopCount | None, flags: tuple[str, ...] = ()) -> None:
        """FLOPs that ran since the last mark: they belong to the innermost phase, or to the step under way."""
        under_way = self._phases[-1] if self._phases else self._step
        under_way.flags.update(flags)
        if flops is not None:
            under_way.flops = flops if under_way.flops is None else under_way.flops + flops

    def step(self, at: Instant, work: Work, flags: tuple[str, ...] = (), step: int | None = None) -> list[Span]:
        """A step ends; returns the spans that this completes. Inside a phase it only adds its work to the phase.

        A step during which FLOPs were counted is not typical, and gets a record of its own.
        """
        under_way = self._phases[-1] if self._phases else self._step
        work = Work(work.n_steps, work.samples, work.tokens, under_way.flops)
        under_way.flags.update(flags)
        under_way.flops = None
        if self._phases:
            under_way.work += work
            return []
        alone = Flag.COUNTED in under_way.flags
        spans = self.flush() if alone else []
        self._last_step = self._last_step + 1 if step is None else step
        self._step.cut(at)
        record = self._record
        record.pieces = _joined(record.pieces, self._step.pieces)
        record.work += work
        record.flags |= self._step.flags
        self._step = _Open(Phase.TRAIN, at)
        if alone or record.work.n_steps >= self._cadence.n_steps:
            spans += self.flush()
        return spans

    def open_phase(self, at: Instant, phase: Phase | None) -> list[Span]:
        """A phase opens (``None``: the run's clock stops), cut out of whatever is under way."""
        spans = self.flush()
        if self._phases:
            self._phases[-1].cut(at)
        else:
            self._step.cut(at)
            if phase is not None and sum(end.at_ns - start.at_ns for start, end in self._step.pieces) > _BETWEEN_STEPS_NS:
                self._step.flags.add(Flag.SPLIT)
        self._phases.append(_Open(phase, at))
        return spans

    def close_phase(self, at: Instant) -> list[Span]:
        """The innermost phase ends, and what was under way goes on."""
        closed = self._phases.pop()
        closed.cut(at)
        (self._phases[-1] if self._phases else self._step).since = at
        if not closed.pieces:
            return []
        work = closed.work if closed.work.n_steps else Work(1, flops=closed.flops)
        return [Span(closed.phase, max(self._last_step, 0), closed.pieces, work, frozenset(closed.flags))]

    def flush(self) -> list[Span]:
        """Makes a record of the whole steps gathered so far, if any."""
        record = self._record
        if not record.work.n_steps or not record.pieces:  # steps that took no time wait for one that did
            return []
        self._record = _Open(Phase.TRAIN, record.since)
        span = Span(Phase.TRAIN, self._last_step, record.pieces, record.work, frozenset(record.flags))
        self._cadence.made(record.work.n_steps, span.duration_s)
        return [span]

    def finish(self, at: Instant) -> list[Span]:
        """The run ends: open phases close, and what follows the last step is ``other``."""
        spans: list[Span] = []
        while self._phases:
            spans += self.close_phase(at)
        spans += self.flush()
        self._step.cut(at)
        if self._step.pieces:
            spans.append(Span(Phase.OTHER, max(self._last_step, 0), self._step.pieces, Work(1, flops=self._step.flops)))
            self._step.pieces = ()
        return spans
