"""A run over several starts of its process: what a checkpoint says of it, and what its earlier segments used.

A segment is one start of the process; its files are
``<log_dir>/green/rank-00000.segment-0001.jsonl``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from green_torch.errors import GreenTorchError
from green_torch.records import Deferral, RunTotals
from green_torch.sinks.jsonl import read_last, run_files
from green_torch.surroundings import restarts, same_job
from green_torch.totals import sum_of_known

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from green_torch.records import Manifest
    from green_torch.sinks.jsonl import RunFile

_VERSION = re.compile(r"version_(\d+)")  # how Lightning's loggers number the directories of their runs
_VERSIONS = 20  # so many of them are looked at
_FILES = 100  # of one directory, the last ones, that an earlier start of this job is sought in


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint says of the run that saved it. ``step`` is -1 before the first; ``log_dir`` "" where there was none.

    ``steps_done`` is how many steps the run had done, whatever its step axis calls them.
    """

    run_id: str
    segment: int
    step: int
    log_dir: str = ""
    steps_done: int = 0

    def state(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def checkpoint(state: object) -> Checkpoint | None:
    """The checkpoint that :meth:`Checkpoint.state` was made of; ``None`` for anything else."""
    if not isinstance(state, Mapping):
        return None
    run_id, segment, step, log_dir = (state.get(key) for key in ("run_id", "segment", "step", "log_dir"))
    numbers = all(isinstance(number, int) and not isinstance(number, bool) for number in (segment, step))
    if not (isinstance(run_id, str) and run_id and numbers):
        return None
    done = state.get("steps_done")
    if not isinstance(done, int) or isinstance(done, bool):
        done = int(step or 0) + 1  # one of an earlier version, which takes a step axis from 0 for granted
    return Checkpoint(run_id, int(segment or 0), int(step or 0), log_dir if isinstance(log_dir, str) else "", done)


@dataclass(frozen=True, slots=True)
class Carried:
    """What earlier segments used, wasted work included; ``None`` where none of them knows. ``unread`` names files that can't be read.

    ``deferrals`` are those that the newest of them knew of; ``left_unix_ns`` is when it left to be queued again, if it did.
    """

    energy_j: float | None = None
    emissions_g: float | None = None
    segments: int = 0
    unread: tuple[str, ...] = ()
    deferrals: tuple[Deferral, ...] = ()
    left_unix_ns: int | None = None


def carried(directories: Iterable[str | Path], manifest: Manifest, *, own: Path | None) -> Carried:
    """The sums of a run's earlier segments of one rank, from their files: the last record's totals where a segment never ended.

    Rank zero carries the ranks that are no more (the job was larger) as well. ``own`` is the file of the segment under way. Where the
    run has moved on more than once, a segment that is found tells what those before it used.
    """
    files: set[Path] = set()
    unread: list[str] = []
    runs: list[tuple[Manifest, RunTotals]] = []
    newest: RunFile | None = None
    for directory in directories:
        files |= {
            path.resolve()
            for path, rank, _ in run_files(directory)
            if rank == manifest.rank or (manifest.rank == 0 and rank >= manifest.world_size)
        }
    for path in sorted(files - {own.resolve()} if own else files):
        try:
            run = read_last(path)
        except GreenTorchError as error:
            unread.append(str(error))
            continue
        if run.manifest.run_id == manifest.run_id:
            last = run.summary or (run.records[-1] if run.records else None)
            runs.append((run.manifest, last.totals if last else RunTotals()))
            if run.manifest.rank == manifest.rank and (
                newest is None or run.manifest.started_unix_ns >= newest.manifest.started_unix_ns
            ):
                newest = run
    return Carried(
        _most([(run, totals.energy_j, run.carried_energy_j) for run, totals in runs], manifest.rank),
        _most([(run, totals.emissions_g, run.carried_emissions_g) for run, totals in runs], manifest.rank),
        len(runs),
        tuple(unread),
        newest.manifest.deferrals if newest else (),
        _left_unix_ns(newest) if newest else None,
    )


def _left_unix_ns(run: RunFile) -> int | None:
    """When a segment left to be queued again; ``None`` where it ended otherwise."""
    if run.summary is None or run.summary.status != "requeued":
        return None
    return run.records[-1].time_unix_ns if run.records else run.manifest.started_unix_ns


def _most(runs: Sequence[tuple[Manifest, float | None, float | None]], rank: int) -> float | None:
    """The largest sum that is known: of all that was found, or of what one carried, and of that one and those since."""
    sums = [sum_of_known(used for _, used, _ in runs)]
    for one, _, before in runs:
        if one.rank == rank and before is not None:
            since = [used for run, used, _ in runs if run.segment >= one.segment and run.started_unix_ns >= one.started_unix_ns]
            sums.append(sum_of_known([before, *since]))
    return max((known for known in sums if known is not None), default=None)


def last_of_job(log_dir: str | Path, manifest: Manifest) -> tuple[Path, Manifest] | None:
    """The last run, of this rank, that an earlier start of the same job began and did not complete, and the directory it lies in.

    A directory that Lightning numbers is another one at each start. Where nothing lies in it yet, the 20 before it are looked at; there
    the job must have had one run alone, since of several nobody tells which one this start is to do.
    """
    own = Path(log_dir)
    here = tuple(islice(_runs(own, manifest.rank), _FILES))
    if here:  # other tasks of an array may write here too
        last = next((run for run in here if same_job(run.manifest.job, manifest.job)), None)
        return (own, last.manifest) if last is not None and _left_off(last, manifest) else None
    runs: dict[str, tuple[Path, RunFile]] = {}
    for directory in _versions_before(own):
        for run in _runs(directory, manifest.rank):
            if same_job(run.manifest.job, manifest.job):
                runs.setdefault(run.manifest.run_id, (directory, run))
    if len(runs) != 1:
        return None
    ((directory, last),) = runs.values()
    return (directory, last.manifest) if _left_off(last, manifest) else None


def _runs(log_dir: Path, rank: int) -> Iterator[RunFile]:
    """The ends of a rank's files in a directory, the last one first; without those of which nothing can be read."""
    for path, one, _ in reversed(run_files(log_dir)):
        if one == rank:
            with suppress(GreenTorchError):  # a segment of which nothing is written yet, as this start's own
                yield read_last(path)


def _versions_before(log_dir: Path) -> list[Path]:
    """The directories beside a numbered one whose numbers are lower, the highest first."""
    name = _VERSION.fullmatch(log_dir.name)
    if name is None:
        return []
    numbers = {int(one[1]): path for path in log_dir.parent.glob("version_*") if (one := _VERSION.fullmatch(path.name))}
    lower = sorted((number for number in numbers if number < int(name[1])), reverse=True)
    return [numbers[number] for number in lower[:_VERSIONS]]


def _left_off(run: RunFile, manifest: Manifest) -> bool:
    """Whether an earlier start of the same job began this run and did not complete it."""
    completed = run.summary is not None and run.summary.status == "completed"
    earlier = restarts(run.manifest.job) < restarts(manifest.job)
    return earlier and same_job(run.manifest.job, manifest.job) and not completed
