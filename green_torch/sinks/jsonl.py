"""A run's file on disk: one JSON object a line; a manifest, then records with cumulative totals, then a summary.

A file has one writer for its whole life: it is created exclusively, so two processes in one directory never share one. Whatever
was flushed survives the process; a line cut short can only be the last.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from green_torch.errors import ArgumentError, LedgerError, UsageError
from green_torch.records import Item, Manifest, RunSummary, StepRecord
from green_torch.sinks.codec import from_dict, to_dict
from green_torch.units import s_to_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import FileIO

_NAME = re.compile(r"rank-(\d+)\.segment-(\d+)\.jsonl")
_BUFFER_BYTES = 256 * 1024
_TAIL_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class RunFile:
    """What one file holds. ``torn``: its last line was cut short (the process ended while writing it) and is left out."""

    manifest: Manifest
    records: tuple[StepRecord, ...]
    summary: RunSummary | None
    torn: bool


def run_file(log_dir: str | Path, rank: int, segment: int) -> Path:
    """Where a rank's records of one process start (segment) stand: ``<log_dir>/green/rank-00000.segment-0001.jsonl``."""
    return Path(log_dir) / "green" / f"rank-{rank:05d}.segment-{segment:04d}.jsonl"


def next_segment(log_dir: str | Path, rank: int) -> int:
    """One more than the last segment on disk; 1 in an empty directory."""
    names = (_NAME.fullmatch(path.name) for path in (Path(log_dir) / "green").glob("rank-*.jsonl"))
    return 1 + max((int(name[2]) for name in names if name and int(name[1]) == rank), default=0)


class JsonlSink:
    """Appends items to a new file; ``path`` and ``segment`` tell which one it became.

    Where ``path`` (named by :func:`run_file`) exists already, the next free segment is taken. Lines reach the disk
    ``flush_interval_s`` after the last ones did, and at once for a manifest, a summary and ``close``. ``now_ns`` is a monotonic clock.

    Raises:
        ArgumentError: The file can't be created, or exists and has no segment number to count up.
    """

    def __init__(
        self, path: str | Path, *, flush_interval_s: float = 1.0, now_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.path, self._file = _create(Path(path))
        name = _NAME.fullmatch(self.path.name)
        self.segment = int(name[2]) if name else 1
        self._pending = bytearray()
        self._flush_interval_ns = s_to_ns(flush_interval_s)
        self._now_ns = now_ns
        self._flushed_ns = now_ns()

    def write(self, item: Item) -> None:
        """Takes one item.

        Raises:
            OSError: The disk is full or gone. Earlier lines stay whole; what could not be written waits for the next try.
            UsageError: The sink is closed.
        """
        if self._file.closed:
            raise UsageError(f"{self.path} is closed; nothing more can be written to it")
        self._pending += json.dumps(to_dict(item), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        due = self._now_ns() - self._flushed_ns >= self._flush_interval_ns or len(self._pending) >= _BUFFER_BYTES
        if due or not isinstance(item, StepRecord):
            self._flush()

    def close(self) -> None:
        """Flushes and closes the file; safe to call twice. Raises OSError where the rest could not be written."""
        try:
            if not self._file.closed:
                self._flush()
        finally:
            self._file.close()

    def _flush(self) -> None:
        """Writes what is pending. A short write (full disk) leaves the rest pending, so the next try completes the cut line."""
        while self._pending:
            written = self._file.write(self._pending)
            del self._pending[:written]
        self._flushed_ns = self._now_ns()


def _create(path: Path) -> tuple[Path, FileIO]:
    """A new unbuffered file at ``path``, or at the next segment that nobody holds, and which of the two it is."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path, path.open("xb", buffering=0)
        except OSError as error:
            name = _NAME.fullmatch(path.name)
            if not isinstance(error, FileExistsError) or not path.exists() or not name:
                raise ArgumentError(f"can't create {path}: {error.strerror}; pass a log_dir that can be written to") from error
            path = path.with_name(f"rank-{name[1]}.segment-{int(name[2]) + 1:04d}.jsonl")


def read_jsonl(path: str | Path) -> RunFile:
    """Everything that a file holds. The last manifest counts.

    Raises:
        LedgerError: The file can't be opened, has no manifest, or holds a line that is not ours (the message names it).
    """
    manifest, summary, torn = None, None, None
    records: list[StepRecord] = []
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if torn is not None:
                raise torn
            try:
                data = _parsed(line)
            except ValueError as error:
                torn = _not_ours(path, number, error)
                continue
            match item := _item(data, path, number):
                case StepRecord():
                    records.append(item)
                case Manifest():
                    manifest = item
                case RunSummary():
                    summary = item
    if manifest is None:
        raise _no_manifest(path)
    return RunFile(manifest, tuple(records), summary, torn is not None)


def read_last(path: str | Path) -> RunFile:
    """The run so far without reading the whole file: its manifest, its last record (at most one) and its summary.

    The manifest is the summary's, else the first line's: one repeated in between is not looked for.

    Raises:
        LedgerError: As in :func:`read_jsonl`, for the lines that are looked at.
    """
    with _opened(path) as file:
        try:
            first = _item(_parsed(file.readline()), path, 1)
        except ValueError:
            raise _no_manifest(path) from None
        if not isinstance(first, Manifest):
            raise _no_manifest(path)
        manifest, summary, torn = first, None, False
        for place, line in enumerate(_lines_from_end(file, file.tell())):
            try:
                data = _parsed(line)
            except ValueError as error:
                if place:
                    raise _not_ours(path, None, error) from error
                torn = True
                continue
            match item := _item(data, path, None):
                case StepRecord():
                    return RunFile(manifest, (item,), summary, torn)
                case RunSummary():
                    manifest, summary = item.manifest, item
                case Manifest():
                    manifest = manifest if summary else item
    return RunFile(manifest, (), summary, torn)


def _lines_from_end(file: BinaryIO, start: int) -> Iterator[bytes]:
    """The lines after byte ``start``, last first."""
    end, rest = file.seek(0, os.SEEK_END), b""
    while end > start:
        begin = max(start, end - _TAIL_BYTES)
        file.seek(begin)
        lines = (file.read(end - begin) + rest).split(b"\n")
        rest = lines.pop(0) if begin > start else b""  # the end of a line that begins further up
        yield from (line for line in reversed(lines) if line)
        end = begin


def _opened(path: str | Path) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise LedgerError(f"can't read {path}: {error.strerror}") from error


def _parsed(line: bytes) -> dict[str, Any]:
    """A line's JSON object; ValueError where it is none, as in a line cut short."""
    data = json.loads(line)
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - both kinds of garbage are one to the callers
    return data


def _item(data: dict[str, Any], path: str | Path, number: int | None) -> Item:
    try:
        return from_dict(data)
    except LedgerError as error:
        raise _not_ours(path, number, error) from error


def _not_ours(path: str | Path, number: int | None, error: Exception) -> LedgerError:
    where = f"line {number} of {path}" if number else f"a line near the end of {path}"
    return LedgerError(f"{where} can't be read: {error}")


def _no_manifest(path: str | Path) -> LedgerError:
    return LedgerError(f"{path} has no manifest: it is not a run of green_torch, or ended before its first line was written")
