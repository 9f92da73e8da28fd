"""A run's file on disk: one JSON object a line; a manifest, then records with cumulative totals, then a summary.

A file has one writer for its whole life: it is created exclusively, so two processes in one directory never share one. Each line
goes to the file as it comes, in one write, and survives the process from then on; a line cut short can only be the last.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from green_torch.errors import ArgumentError, LedgerError, UsageError
from green_torch.records import Item, Manifest, RunSummary, StepRecord
from green_torch.sinks.codec import from_dict, to_dict

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import FileIO

FILE_NAME = re.compile(r"rank-(\d+)\.segment-(\d+)\.jsonl")
_TAIL_BYTES = 16 * 1024
_MANIFEST_AT = (
    "manifest_at"  # key of a record's line: the byte at which the last manifest begins, where that is not the first line
)
_LONGEST_LINE = 32 * 1024 * 1024
_TOO_LONG = b"a line that never ends"  # no JSON


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


def run_files(log_dir: str | Path) -> list[tuple[Path, int, int]]:
    """The files of a directory with their rank and segment, in that order."""
    names = ((path, FILE_NAME.fullmatch(path.name)) for path in (Path(log_dir) / "green").glob("rank-*.jsonl"))
    return sorted(((path, int(name[1]), int(name[2])) for path, name in names if name), key=lambda file: file[1:])


def next_segment(log_dir: str | Path, rank: int) -> int:
    """One more than the last segment on disk; 1 in an empty directory."""
    return 1 + max((segment for _, own, segment in run_files(log_dir) if own == rank), default=0)


class JsonlSink:
    """Appends items to a new file; ``path`` and ``segment`` tell which one it became.

    Where ``path`` (named by :func:`run_file`) exists already, the next free segment is taken. Nothing is held back: a record may be
    the last for hours.

    Raises:
        ArgumentError: The file can't be created, or exists and has no segment number to count up.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._file = _create(Path(path))
        name = FILE_NAME.fullmatch(self.path.name)
        self.segment = int(name[2]) if name else 1
        self._pending = bytearray()  # what a full disk did not take
        self._bytes = 0  # taken so far: where the next line will begin
        self._manifest_at = 0  # where the manifest that counts begins

    def write(self, item: Item) -> None:
        """Takes one item.

        Raises:
            OSError: The disk is full or gone. Earlier lines stay whole; what could not be written waits for the next try.
            UsageError: The sink is closed.
        """
        if self._file.closed:
            raise UsageError(f"{self.path} is closed; nothing more can be written to it")
        data = to_dict(item)
        if isinstance(item, Manifest):
            self._manifest_at = self._bytes
        elif isinstance(item, StepRecord) and self._manifest_at:
            data[_MANIFEST_AT] = self._manifest_at  # whoever reads the end alone finds it
        line = json.dumps(data, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        self._bytes += len(line)
        self._pending += line
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


def _create(path: Path) -> tuple[Path, FileIO]:
    """A new unbuffered file at ``path``, or at the next segment that nobody holds, and which of the two it is."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path, path.open("xb", buffering=0)
        except OSError as error:
            name = FILE_NAME.fullmatch(path.name)
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


def read_last(path: str | Path, *, with_record: bool = True) -> RunFile:
    """The run so far without reading the whole file: its manifest, its last record (at most one) and its summary.

    The manifest is the summary's, else the last one before the last record, else the first line's. ``with_record=False`` leaves the
    record out where there is a summary, which holds the same totals.

    Raises:
        LedgerError: As in :func:`read_jsonl`, for the lines that are looked at.
    """
    manifest: Manifest | None = None
    summary: RunSummary | None = None
    records: tuple[StepRecord, ...] = ()
    torn = False
    with _opened(path) as file:
        for place, line in enumerate(_lines_from_end(file)):
            try:
                data = _parsed(line)
            except ValueError as error:
                if place:
                    raise _not_ours(path, None, error) from error
                torn = True
                continue
            match item := _item(data, path, None):
                case StepRecord():
                    records = (item,)
                    if manifest is None:
                        manifest = _manifest(file, path, data.get(_MANIFEST_AT))
                case RunSummary():
                    manifest, summary = item.manifest, item
                case Manifest():
                    manifest = manifest or item
            if records or (summary and not with_record):
                break
    if manifest is None:
        raise _no_manifest(path)
    return RunFile(manifest, records, summary, torn)


def read_at(path: str | Path, step: int) -> tuple[StepRecord | None, StepRecord | None]:
    """The last record that ends at ``step`` or before, and the one after it; ``None`` where there is none.

    Records stand in the order of their steps, so a few lines of the file are read, by bisection.

    Raises:
        LedgerError: As in :func:`read_jsonl`, for the lines that are looked at.
    """
    with _opened(path) as file:
        low, high = 0, file.seek(0, os.SEEK_END)
        while low < high:  # no line that begins before low ends after the step; every one that begins at high or later does
            middle = (low + high) // 2
            begin, data = _next_record(file, middle)
            if data is None or data["step"] > step:
                high = middle
            else:
                low = begin + 1
        lines = (_next_record(file, low - 1)[1] if low else None, _next_record(file, low)[1])
    before, after = (None if data is None else _item(data, path, None) for data in lines)
    assert not isinstance(before, Manifest | RunSummary)
    assert not isinstance(after, Manifest | RunSummary)
    return before, after


def _next_record(file: BinaryIO, at: int) -> tuple[int, dict[str, Any] | None]:
    """Where the first record that begins at this byte or later begins, and its line; ``None`` where there is none."""
    file.seek(max(0, at - 1))
    if at:
        file.readline(_LONGEST_LINE)
    while True:
        begin = file.tell()
        try:
            data = _parsed(file.readline(_LONGEST_LINE))
        except ValueError:  # the end, or a line cut short there
            return begin, None
        if data.get("type") == "record" and isinstance(data.get("step"), int):
            return begin, data


def _manifest(file: BinaryIO, path: str | Path, at: object) -> Manifest:
    """The manifest whose line begins at this byte; the first line's where the byte is not known or holds none."""
    for begin in (at, 0) if isinstance(at, int) and at > 0 else (0,):
        file.seek(begin)
        with suppress(ValueError):
            manifest = _item(_parsed(file.readline(_LONGEST_LINE)), path, None if begin else 1)
            if isinstance(manifest, Manifest):
                return manifest
    raise _no_manifest(path)


def _lines_from_end(file: BinaryIO) -> Iterator[bytes]:
    """The lines, last first. ValueError, in place of one, where it is longer than any of ours."""
    end, rest, chunk = file.seek(0, os.SEEK_END), b"", _TAIL_BYTES
    while end > 0:
        begin = max(0, end - chunk)
        file.seek(begin)
        lines = (file.read(end - begin) + rest).split(b"\n")
        rest = lines.pop(0) if begin > 0 else b""  # the end of a line that begins further up
        yield from (line for line in reversed(lines) if line)
        end, chunk = begin, chunk if lines else 2 * chunk
        if len(rest) > _LONGEST_LINE:
            yield _TOO_LONG
            return


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
