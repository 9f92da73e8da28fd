"""What a run of several processes and starts adds up to, how it ended, and which of its work counts. Pure.

A run is every file that bears its id: one for each rank and each start of the process. Its totals are the sums over them. *Useful*
totals leave out what an uninterrupted run would not have done: steps that a later segment did again, and the set-up of segments that
went on from a checkpoint. A run that failed or was killed, and was not taken up again, has no useful part; one that left to be queued
again, or that its user or scheduler interrupted, has.

A segment that goes on from a checkpoint of a run that had completed is a *branch*: fine-tuning, or training on for longer. What had
led to the completed end stays useful, steps beyond the checkpoint included, and setting up the branch is no waste. A branch that is
itself interrupted and taken up again is judged as any run is.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from green_torch.job import sharers
from green_torch.ledger.sums import combined, without_phase, work_alone
from green_torch.records import Flag, Manifest, Phase, RunTotals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from green_torch.records import Deferral, RunSummary, StepRecord

QUIET_S = 900.0  # so long a run may write nothing and still be taken for running
_QUIET_RECORDS = 10  # or so many times as long as its records or phases take, whichever is longer


class Status(StrEnum):
    """How a run, or one start of it, ended.

    ``requeued``: it left to be queued again (exit code 75), so what it used is not wasted. ``interrupted``: its user ended it (Ctrl-C), or
    its scheduler did (SIGTERM: preempted, cancelled, out of time), and its checkpoint may well be used, so that is no waste either.
    ``superseded`` is for a start whose every step was done again by a later one.
    """

    COMPLETED = "completed"
    REQUEUED = "requeued"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    KILLED = "killed"
    RUNNING = "running"
    SUPERSEDED = "superseded"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file or directory that is left out, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Segment:
    """One file: one rank of one start of the process. ``flags``: records that carry each one, where a summary tells.

    ``useful`` is the part of ``totals`` that no later segment did again; ``redone`` says after which step one did. ``capacity_flops`` is
    peak FLOP/s times the seconds of the train steps, the weight of ``mfu`` and ``hfu`` in a mean; ``None`` where the peak is unknown.
    """

    path: Path
    project: str
    manifest: Manifest
    status: Status
    ended_unix_ns: int
    last_step: int | None
    totals: RunTotals
    useful: RunTotals
    redone_after_step: int | None
    mfu: float | None
    hfu: float | None
    capacity_flops: float | None
    torn: bool
    flags: Mapping[str, int]
    branch: bool = False  # it goes on from a checkpoint of a run that had completed
    sharing: bool = (
        False  # another rank metered its devices as well, and their joules are counted there: its totals tell work and time
    )

    @property
    def redone(self) -> RunTotals:
        """What steps used that a later segment did again."""
        return RunTotals() if self.useful is self.totals else combined([(1, self.totals), (-1, self.useful)])

    @property
    def restart(self) -> RunTotals:
        """What setting up again after an interruption used: nothing in a first segment, or in a branch."""
        if self.manifest.resumed_from_step is None or self.branch:
            return RunTotals()
        return combined([(1, self.useful), (-1, without_phase(self.useful, Phase.SETUP))])


@dataclass(frozen=True, slots=True)
class Run:
    """A run: the sums over its segments on all ranks (steps and seconds too). ``notes`` say what is missing or uncertain in them.

    ``manifest`` is that of its last start, on the first rank.
    """

    run_id: str
    name: str
    project: str
    status: Status
    manifest: Manifest
    segments: tuple[Segment, ...]
    started_unix_ns: int
    ended_unix_ns: int
    totals: RunTotals
    useful: RunTotals
    redone: RunTotals
    restart: RunTotals
    mfu: float | None
    hfu: float | None
    notes: tuple[str, ...] = ()

    @property
    def n_steps(self) -> int:
        """Useful train steps: those of the first rank, since all ranks take each step together."""
        return 0 if self.lost else sum(one.useful.phase(Phase.TRAIN).n_steps for one in self.first_rank)

    @property
    def first_rank(self) -> tuple[Segment, ...]:
        """The segments of the first rank that left any."""
        if len(self.segments) == 1:
            return self.segments
        rank = min(one.manifest.rank for one in self.segments)
        return tuple(one for one in self.segments if one.manifest.rank == rank)

    @property
    def deferrals(self) -> tuple[Deferral, ...]:
        """What was put off for a cleaner grid, as each start of the first rank last knew it."""
        known = {one.baseline_unix_ns: one for segment in self.first_rank for one in segment.manifest.deferrals}
        return tuple(known[begin_ns] for begin_ns in sorted(known))

    @property
    def duration_s(self) -> float:
        """Seconds that it was under way, downtime left out: the first rank's."""
        return sum(one.totals.duration_s for one in self.first_rank)

    @property
    def finished(self) -> bool:
        """Whether it ended, well or not; one that is to be queued again has not."""
        return self.status not in {Status.RUNNING, Status.REQUEUED}

    @property
    def lost(self) -> bool:
        """Whether it failed or was killed, and nobody has taken it up again."""
        return self.status is Status.FAILED or self.status is Status.KILLED

    @property
    def wasted(self) -> RunTotals:
        """The totals less the useful part."""
        return self.totals if self.lost else total((self.redone, self.restart))


@dataclass(frozen=True, slots=True)
class Ledger:
    """The runs below some directories, by their start, and what there was left out, with the reason."""

    runs: tuple[Run, ...]
    skipped: tuple[Skipped, ...] = ()

    def select(self, keep: Callable[[Run], bool]) -> Ledger:
        """The same with these runs only."""
        return replace(self, runs=tuple(run for run in self.runs if keep(run)))


def status_of(summary: RunSummary | None, record: StepRecord | None, quiet_s: float, *, patience_s: float = QUIET_S) -> Status:
    """How a segment ended, or that it has not.

    Its own summary tells. Without one it was killed if it has been quiet for longer than ``patience_s``, or ten times what its last
    record, or one of its evaluations or other phases, took: whichever is longer.
    """
    if summary is not None and summary.status in {Status.COMPLETED, Status.REQUEUED, Status.INTERRUPTED, Status.FAILED}:
        return Status(summary.status)
    if record is not None:
        spans = [record.duration_s]
        spans += [
            phase.duration_s / phase.n_steps
            for phase in record.totals.phases
            if phase.phase is not Phase.TRAIN and phase.n_steps
        ]
        patience_s = max(patience_s, _QUIET_RECORDS * max(spans))
    return Status.RUNNING if quiet_s <= patience_s else Status.KILLED


def assembled(segments: Iterable[Segment], totals_at: Callable[[Segment, int], RunTotals]) -> Run:
    """The run that these segments, of one id, make up. ``totals_at`` tells a segment's totals up to a step.

    Of the steps that two segments did, the later one's count, unless the run had completed in between. A later segment is one that
    started after this one's last record.
    """
    ordered = sorted(segments, key=lambda one: (one.manifest.started_unix_ns, one.manifest.rank))
    ordered = [
        replace(one, status=Status.KILLED) if one.status is Status.RUNNING and _followed(one, ordered) else one
        for one in ordered
    ]
    last = ordered[-1]
    ordered = _metered_once(ordered)
    if any(one.manifest.resumed_from_step is not None for one in ordered):
        order = _Order.of(ordered)
        ordered = [_judged(one, order, totals_at) for one in ordered]
    job = [one for one in ordered if one.path == last.path or one.ended_unix_ns > last.manifest.started_unix_ns]
    status = next(
        (
            status
            for status in (Status.RUNNING, Status.FAILED, Status.KILLED, Status.INTERRUPTED, Status.REQUEUED)
            if any(one.status is status for one in job)
        ),
        Status.COMPLETED,
    )
    all_of_it = total(one.totals for one in ordered)
    kept = total(one.useful for one in ordered)
    restart = total(one.restart for one in ordered)
    lost = status in {Status.FAILED, Status.KILLED}
    manifest = next((one.manifest for one in job if one.manifest.rank == 0), last.manifest)
    return Run(
        run_id=manifest.run_id,
        name=manifest.label or manifest.run_name,
        project=ordered[0].project,
        status=status,
        manifest=manifest,
        segments=tuple(ordered),
        started_unix_ns=ordered[0].manifest.started_unix_ns,
        ended_unix_ns=max(one.ended_unix_ns for one in ordered),
        totals=all_of_it,
        useful=RunTotals() if lost else combined([(1, kept), (-1, restart)]) if restart.phases else kept,
        redone=total(one.redone for one in ordered),
        restart=restart,
        mfu=utilization(ordered, "mfu"),
        hfu=utilization(ordered, "hfu"),
        notes=tuple(_notes(ordered, job)),
    )


def _metered_once(segments: Sequence[Segment]) -> list[Segment]:
    """The segments, without the joules of those that metered at the same time what lower ranks did."""
    on: dict[str, list[Segment]] = {}
    for one in segments:
        for uuid in one.manifest.devices:
            on.setdefault(uuid, []).append(one)
    found = []
    for own in segments:
        candidates = (one for uuid in own.manifest.devices for one in on[uuid])
        beside = {one.manifest.rank: one.manifest.devices for one in candidates if not (_later(own, one) or _later(one, own))}
        if len(beside) > 1 and own.manifest.rank in sharers(beside):
            totals = work_alone(own.totals)
            own = replace(own, totals=totals, useful=totals, sharing=True)  # noqa: PLW2901
        found.append(own)
    return found


@dataclass(frozen=True, slots=True)
class _Order:
    """A run's segments in time: ``resumed`` by their start, ``completed`` by their end, ``ended_ns`` all ends in order."""

    resumed: Sequence[Segment]
    completed: Sequence[Segment]
    ended_ns: Sequence[int]

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> _Order:
        lost = [one for one in segments if one.status is not Status.COMPLETED]
        completed = [  # with all that were under way beside them
            one
            for one in segments
            if one.status is Status.COMPLETED and all(_later(one, other) or _later(other, one) for other in lost)
        ]
        return cls(
            sorted((one for one in segments if one.manifest.resumed_from_step is not None), key=_started),
            sorted(completed, key=_ended),
            sorted(map(_ended, segments)),
        )

    def branches(self, own: Segment) -> bool:
        """Whether the last that ended before this one had completed."""
        before = bisect_right(self.completed, _started(own), key=_ended)
        ended = bisect_right(self.ended_ns, _started(own))
        return before > 0 and self.completed[before - 1].ended_unix_ns == self.ended_ns[ended - 1]

    def resumed_from(self, own: Segment) -> list[int]:
        """The steps from which later ones did this one's again: what starts after the run has completed takes nothing back."""
        if own in self.completed:
            return []
        end_ns = min((one.ended_unix_ns for one in self.completed if _later(own, one)), default=math.inf)
        begin = bisect_left(self.resumed, own.ended_unix_ns, key=_started)
        after = self.resumed[begin : bisect_left(self.resumed, end_ns, key=_started)]
        return [one.manifest.resumed_from_step or 0 for one in after if one is not own]


def _started(one: Segment) -> int:
    return one.manifest.started_unix_ns


def _ended(one: Segment) -> int:
    return one.ended_unix_ns


def _judged(own: Segment, order: _Order, totals_at: Callable[[Segment, int], RunTotals]) -> Segment:
    """The segment with the part of it that counts."""
    steps = order.resumed_from(own)
    if own.manifest.resumed_from_step is not None and order.branches(own):
        own = replace(own, branch=True)
    if not steps:
        return own
    step = min(steps)
    begun_after = own.manifest.resumed_from_step
    if begun_after is not None and step <= begun_after:
        useful = RunTotals()
    elif own.last_step is not None and own.last_step <= step:
        return own
    else:
        useful = totals_at(own, step)
        useful = work_alone(useful) if own.sharing else useful
    status = own.status if useful.phase(Phase.TRAIN).n_steps else Status.SUPERSEDED
    return replace(own, useful=useful, redone_after_step=step, status=status)


def total(totals: Iterable[RunTotals]) -> RunTotals:
    """The sum of those that hold anything."""
    parts = [(1.0, one) for one in totals if one.phases]
    return combined(parts) if parts else RunTotals()


def utilization(segments: Iterable[Segment], name: str) -> float | None:
    """The mean of "mfu" or "hfu", each segment by what its device could have done; ``None`` where none tells both."""
    known = [
        (one.capacity_flops, value) for one in segments if one.capacity_flops and (value := getattr(one, name)) is not None
    ]
    return sum(capacity * value for capacity, value in known) / sum(capacity for capacity, _ in known) if known else None


def _notes(segments: Sequence[Segment], job: Sequence[Segment]) -> Iterable[str]:
    newest = job[-1].manifest
    absent = newest.world_size - len({one.manifest.rank for one in job})
    if absent > 0:
        yield f"{absent} of {newest.world_size} ranks left no file of this run: their joules are missing from it"
    yield from _unknown(segments)
    sharing = sorted({one.manifest.rank for one in segments if one.sharing})
    if sharing:
        yield f"ranks on a GPU that a lower one metered as well, which is counted once: {', '.join(map(str, sharing))}"
    for own in segments:
        step = own.manifest.resumed_from_step
        if own.branch and own.manifest.rank == newest.rank and _went_beyond(step, own, segments):
            yield f"its start {own.manifest.segment} goes on from step {step} of a run that had completed: a branch, and the steps of both count"
    yield from _unwritten(segments, newest.rank)
    more_starts = len(segments) > len({one.manifest.rank for one in segments})
    if more_starts and any(_began_after_another(one, segments) for one in segments if one.manifest.previous_segment is None):
        yield "a start of this run tells no checkpoint that it went on from: what was done twice before it is not known"


def _went_beyond(step: int | None, own: Segment, segments: Sequence[Segment]) -> bool:
    """Whether an earlier start did steps after the one that this start goes on from: else it is no branch, but more of the same training."""
    return any(
        _later(one, own) and one.last_step is not None and one.last_step > (-1 if step is None else step) for one in segments
    )


def _unwritten(segments: Sequence[Segment], rank: int) -> Iterable[str]:
    """Steps that a checkpoint had and no record has: their start was killed in between."""
    for own in segments:
        step = own.manifest.resumed_from_step
        if step is None or own.manifest.rank != rank:
            continue
        saved_by = own.manifest.previous_segment, rank  # a start whose files are elsewhere is another matter
        before = [one for one in segments if (one.manifest.segment, one.manifest.rank) == saved_by and _later(one, own)]
        before = [one for one in before if one.last_step is not None]
        last = max(before, key=lambda one: one.last_step or 0, default=None)
        if last is not None and last.last_step is not None and last.last_step < step:
            yield (
                f"steps {last.last_step + 1} to {step} are in no record (start {last.manifest.segment} ended before they were written)"
            )


def _unknown(segments: Sequence[Segment]) -> Iterable[str]:
    """What the sums lack, or rest on for want of better."""
    if all(one.totals.energy_j is None for one in segments):
        yield "nothing measured its energy: no joule of it is in any sum"
    if any(one.totals.operational_g is None and one.totals.energy_j is not None for one in segments):
        yield "the grid's intensity was not known: operational emissions of it are missing from every sum"
    flags: Counter[str] = Counter()
    for one in segments:
        flags.update(one.flags)
    for flag, number in sorted(flags.items()):
        if flag.startswith(f"{Flag.METER_FAILED}:"):
            yield f"{flag.partition(':')[2]} could not be read in {number:,} records: its joules are missing there"
    if flags[Flag.INTENSITY_FALLBACK]:
        yield f"in {flags[Flag.INTENSITY_FALLBACK]:,} records another grid figure stands in for the provider's"


def _followed(own: Segment, all_: Sequence[Segment]) -> bool:
    """Whether this rank was started again later: then this start is over."""
    return any(_later(own, other) and other.manifest.rank == own.manifest.rank for other in all_)


def _began_after_another(own: Segment, all_: Sequence[Segment]) -> bool:
    return any(_later(other, own) and other.manifest.rank == own.manifest.rank for other in all_)


def _later(own: Segment, other: Segment) -> bool:
    """Whether the other one began when this one's last record was written, or after that."""
    return other is not own and own.ended_unix_ns <= other.manifest.started_unix_ns
