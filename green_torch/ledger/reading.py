"""Finds the runs below a directory and reads of each file no more than its end, so that thousands of runs take seconds.

A file that is broken, foreign, empty or unreadable is named and left out. Nothing is written, locked or waited for.
"""

from __future__ import annotations

import os
import stat
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from green_torch.errors import ArgumentError, LedgerError
from green_torch.ledger.runs import QUIET_S, Ledger, Run, Segment, Skipped, assembled, status_of
from green_torch.ledger.sums import combined
from green_torch.records import Phase, RunTotals
from green_torch.sinks.jsonl import FILE_NAME, read_at, read_jsonl, read_last
from green_torch.units import ns_to_s, s_to_ns

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from green_torch.records import Manifest, RunSummary, StepRecord
    from green_torch.sinks.jsonl import RunFile

_FOLDER = "green"


def read(
    directories: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    now_unix_ns: int | None = None,
    patience_s: float = QUIET_S,
) -> Ledger:
    """The runs below these directories, from manifests and last lines alone.

    A run's project is the first directory below the one given, or that one itself where the run lies directly in it. ``now_unix_ns``
    (``None``: now) and ``patience_s`` tell a run that writes nothing any more from one that is still going: see :func:`status_of`.

    Raises:
        ArgumentError: no such directory.
    """
    now_unix_ns = time.time_ns() if now_unix_ns is None else now_unix_ns
    given = [directories] if isinstance(directories, str | os.PathLike) else list(directories)
    skipped: list[Skipped] = []
    by_place: dict[tuple[str, int, int, int], Segment] = {}
    seen: set[tuple[int, int]] = set()
    for top in map(Path, given):
        if not top.is_dir():
            raise ArgumentError(f"{str(top)!r} is no directory: give one with runs somewhere below it")
        for path, found, project in _files(top, skipped):
            if (found.st_dev, found.st_ino) in seen:
                continue  # given twice
            seen.add((found.st_dev, found.st_ino))
            try:
                segment = _segment(path, project, ns_to_s(now_unix_ns - found.st_mtime_ns), patience_s)
            except (LedgerError, RecursionError) as error:
                skipped.append(Skipped(path, str(error).replace(str(path), "it")))
                continue
            manifest = segment.manifest
            place = manifest.run_id, manifest.rank, manifest.segment, manifest.started_unix_ns
            other = by_place.setdefault(place, segment)
            if other is not segment:
                kept, copy = sorted((other, segment), key=lambda one: (-one.ended_unix_ns, len(str(one.path)), str(one.path)))
                by_place[place] = kept
                skipped.append(Skipped(copy.path, f"a copy of {kept.path}: counted once"))
    by_run: dict[str, list[Segment]] = {}
    for segment in by_place.values():
        by_run.setdefault(segment.manifest.run_id, []).append(segment)
    runs = [_run(segments, skipped) for segments in by_run.values()]
    return Ledger(tuple(sorted(runs, key=lambda run: (run.started_unix_ns, run.run_id))), tuple(skipped))


def _files(top: Path, skipped: list[Skipped]) -> Iterator[tuple[Path, os.stat_result, str]]:
    """Every file of a rank below a directory, and its project. Links to directories are not followed."""
    folders = [str(top.resolve() if top.name in {"", ".", ".."} else top)]
    root = len(folders[0])
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            skipped.append(Skipped(Path(folder), f"can't be listed: {error.strerror}"))
            continue
        folders += [entry.path for entry in reversed(entries) if entry.is_dir(follow_symlinks=False)]
        if os.path.basename(folder) != _FOLDER:  # noqa: PTH119 - paths as text: a tree may be large
            continue
        project, *deeper = folder[root:].strip(os.sep).split(os.sep)  # noqa: PTH206
        if len(deeper) < 2:  # the run lies in the directory itself, or is it
            project = top.resolve().name
        for entry in entries:
            if not entry.name.endswith(".jsonl") or entry.is_dir(follow_symlinks=False):
                continue
            path = Path(entry.path)
            try:
                status = entry.stat()
            except OSError as error:
                skipped.append(Skipped(path, f"can't be read: {error.strerror}"))
                continue
            if not FILE_NAME.fullmatch(entry.name):
                skipped.append(Skipped(path, "not named as a run's file: rank-00000.segment-0001.jsonl"))
            elif not stat.S_ISREG(status.st_mode):
                skipped.append(Skipped(path, "no regular file"))
            else:
                yield path, status, project


def _segment(path: Path, project: str, quiet_s: float, patience_s: float) -> Segment:
    """What the end of a file tells.

    Raises:
        LedgerError: it can't be read.
    """
    file = read_last(path, with_record=False)
    manifest, summary = file.manifest, file.summary
    record = file.records[-1] if file.records else None
    totals = _totals(file)
    mfu, hfu, capacity_flops = _utilisation(manifest, summary, record)
    ended_unix_ns = record.time_unix_ns if record else manifest.started_unix_ns + s_to_ns(totals.duration_s)
    return Segment(
        path,
        project,
        manifest,
        status_of(summary, record, quiet_s, patience_s=patience_s),
        ended_unix_ns,
        summary.last_step if summary else record.step if record else None,
        totals,
        totals,
        None,
        mfu,
        hfu,
        capacity_flops,
        file.torn,
        summary.flags if summary else {},
    )


def _totals(file: RunFile) -> RunTotals:
    return file.summary.totals if file.summary else file.records[-1].totals if file.records else RunTotals()


def _utilisation(
    manifest: Manifest, summary: RunSummary | None, record: StepRecord | None
) -> tuple[float | None, float | None, float | None]:
    """MFU, HFU and their weight. Without a summary they are means over all train steps, the counted ones included."""
    last = summary or record
    train = last.totals.phase(Phase.TRAIN) if last else None
    if train is None or train.duration_s <= 0:
        return None, None, None
    if summary is not None:
        peak = summary.peak_flop_per_s
        return summary.mfu, summary.hfu, None if peak is None else peak * train.duration_s
    peak = record.peak_flop_per_s if record else None
    if peak is None:
        stated = {one.flop_per_s for one in manifest.peaks}
        peak = stated.pop() if len(stated) == 1 else None
    if not peak:
        return None, None, None
    capacity = peak * train.duration_s
    mfu, hfu = (None if flops is None else flops / capacity for flops in (train.model_flops, train.hardware_flops))
    return mfu, hfu, capacity


def _run(segments: list[Segment], skipped: list[Skipped]) -> Run:
    if any(
        one.manifest.resumed_from_step is not None for one in segments
    ):  # then the order of the starts matters, to the record
        segments = [_timed(one) for one in segments]

    def totals_at(segment: Segment, step: int) -> RunTotals:
        try:
            return _totals_at(segment.path, step)
        except LedgerError as error:
            skipped.append(Skipped(segment.path, f"which of its steps were done again is not known: {error}"))
            return segment.totals

    return assembled(segments, totals_at)


def _timed(segment: Segment) -> Segment:
    """The segment with the instant of its last record, which a summary does not tell."""
    try:
        records = read_last(segment.path).records
    except LedgerError:
        return segment
    return replace(segment, ended_unix_ns=records[-1].time_unix_ns) if records else segment


def _totals_at(path: Path, step: int) -> RunTotals:
    """A file's totals up to and with a step; of a record that goes on beyond it, the share of its steps."""
    before, after = read_at(path, step)
    done = before.totals if before else RunTotals()
    if after is not None and after.phase is Phase.TRAIN and after.step - after.n_steps < step:
        share = (step - (after.step - after.n_steps)) / after.n_steps
        return combined([(1 - share, done), (share, after.totals)])
    return done


@dataclass(frozen=True, slots=True)
class Detail:
    """What only a run's records tell, all of them read.

    ``flags``: records that carry each flag. ``energy_j``: the sum over the records, to hold against the totals.
    ``intensity_lo_g_per_kwh`` and ``..._hi_...``: the lowest and highest grid figure of a record.
    """

    n_records: int
    energy_j: float | None
    intensity_lo_g_per_kwh: float | None
    intensity_hi_g_per_kwh: float | None
    flags: tuple[tuple[str, int], ...]
    torn: int


def detail(run: Run) -> Detail:
    """Reads every record of a run.

    Raises:
        LedgerError: a line that is not ours.
    """
    flags: Counter[str] = Counter()
    n_records = torn = 0
    energy_j: float | None = None
    intensities: list[float] = []
    for segment in run.segments:
        file = read_jsonl(segment.path)
        torn += file.torn
        n_records += len(file.records)
        flags.update(flag for record in file.records for flag in record.flags)
        known = [record.energy_j for record in file.records if record.energy_j is not None]
        energy_j = (energy_j or 0.0) + sum(known) if known else energy_j
        found = [record.intensity_g_per_kwh for record in file.records if record.intensity_g_per_kwh is not None]
        intensities = [min(found + intensities), max(found + intensities)] if found else intensities
    lo, hi = intensities or (None, None)
    return Detail(n_records, energy_j, lo, hi, tuple(sorted(flags.items())), torn)
