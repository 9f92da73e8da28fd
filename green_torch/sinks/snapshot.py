"""A run in at most 64 kB of JSON: what TensorBoard's loaders can't thin out or round, for the dashboard.

A snapshot is complete by itself: the manifest, totals, phases and flags so far, and the train records as up to 200 blocks, each the
sums of consecutive records. Neighbouring blocks are merged two by two as a run grows. Steps during which FLOPs were counted are not
typical, so they are summed apart. What else the run did stands under ``spans``: when each evaluation, save or pause was.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import islice, starmap
from typing import Any, NamedTuple, TypeVar

from green_torch.records import Flag, JobTotals, Manifest, Phase, RunSummary, RunTotals, StepRecord
from green_torch.sinks.codec import plain
from green_torch.units import ns_to_s

SCHEMA = 1
MAX_BYTES = 64_000
MAX_BLOCKS = 200
MAX_SPANS = 64
_ENCODE = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_DIGITS = 10  # of a block's sums; totals are carried in full
_MAX_VERSIONS, _MAX_FLAGS = 16, 32
_KEY_CHARS = 40
_LIMITS = ((200, 64), (60, 32), (20, 16), (8, 8))  # characters of a string, items of a list; the first that fits


class _Block(NamedTuple):
    """Sums over consecutive train records. Seconds count from the start of the first record.

    A sum covers what is known: ``unmetered_steps`` tells for how many steps energy is not, ``uncounted_steps`` FLOPs. Records without
    bounds stand at face value beside bounded ones. ``excluded_steps`` were left out in between. ``capacity_flops`` is the peak times
    the duration of the records whose FLOPs are known: what the device could have done in them.
    """

    first_step: int
    last_step: int
    n_steps: int
    start_s: float
    end_s: float
    duration_s: float
    samples: int | None
    tokens: int | None
    energy_j: float | None
    energy_lo_j: float | None
    energy_hi_j: float | None
    model_flops: float | None
    hardware_flops: float | None
    emissions_g: float | None
    unmetered_steps: int
    uncounted_steps: int
    excluded_steps: int = 0
    capacity_flops: float | None = None


class _Span(NamedTuple):
    """One occurrence of a phase other than train, and what it used. ``step``: the last train step before it."""

    phase: str
    step: int
    start_s: float
    end_s: float
    energy_j: float | None
    emissions_g: float | None


def _block(record: StepRecord, origin_ns: int) -> _Block:
    """A record as a block of its own."""
    energy_j, model_flops = _finite(record.energy_j), _finite(record.model_flops)
    return _Block(
        record.step - record.n_steps + 1,
        record.step,
        record.n_steps,
        ns_to_s(record.start_ns - origin_ns),
        ns_to_s(record.end_ns - origin_ns),
        _finite(record.duration_s) or 0.0,
        record.samples,
        record.tokens,
        energy_j,
        None if energy_j is None else _finite(record.energy_lo_j),
        None if energy_j is None else _finite(record.energy_hi_j),
        model_flops,
        _finite(record.hardware_flops),
        _finite(record.emissions_g),
        record.n_steps if energy_j is None else 0,
        record.n_steps if model_flops is None else 0,
        0,
        None if model_flops is None or record.peak_flop_per_s is None else _finite(record.peak_flop_per_s * record.duration_s),
    )


def _joined(a: _Block, b: _Block) -> _Block:
    """Two blocks as one; ``b`` follows ``a``."""
    lo_a, hi_a, lo_b, hi_b = a.energy_lo_j, a.energy_hi_j, b.energy_lo_j, b.energy_hi_j
    if lo_a is None and lo_b is not None:
        lo_a = hi_a = a.energy_j
    elif lo_b is None and lo_a is not None:
        lo_b = hi_b = b.energy_j
    return _Block(
        a.first_step,
        b.last_step,
        a.n_steps + b.n_steps,
        a.start_s,
        b.end_s,
        a.duration_s + b.duration_s,
        _known(a.samples, b.samples),
        _known(a.tokens, b.tokens),
        _known(a.energy_j, b.energy_j),
        _known(lo_a, lo_b),
        _known(hi_a, hi_b),
        _known(a.model_flops, b.model_flops),
        _known(a.hardware_flops, b.hardware_flops),
        _known(a.emissions_g, b.emissions_g),
        a.unmetered_steps + b.unmetered_steps,
        a.uncounted_steps + b.uncounted_steps,
        a.excluded_steps + b.excluded_steps,
        _known(a.capacity_flops, b.capacity_flops),
    )


class SnapshotBuilder:
    """Takes a run's items as they come; :meth:`build` may be asked at any time."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._summary: RunSummary | None = None
        self._totals = RunTotals()
        self._last_step: int | None = None
        self._flags: Counter[str] = Counter()
        self._origin_ns: int | None = None
        self._blocks: list[_Block] = []
        self._block_records = 1  # records that make a full block
        self._last_block_records = 0
        self._excluded: _Block | None = None
        self._excluded_before_steps = 0  # steps left out before the first block
        self._origin_unix_ns: int | None = None
        self._spans: list[_Span] = []
        self._n_spans = 0
        self._peak_memory_bytes: int | None = None
        self._job: JobTotals | None = None

    def manifest(self, manifest: Manifest) -> None:
        """Takes the manifest anew, now that more is known."""
        self._manifest = manifest

    def add(self, record: StepRecord) -> None:
        """Takes a record of any phase; the train ones make the blocks."""
        if self._origin_ns is None:
            self._origin_ns = record.start_ns
            self._origin_unix_ns = record.time_unix_ns - (record.end_ns - record.start_ns)
        if record.peak_memory_bytes is not None:
            self._peak_memory_bytes = max(record.peak_memory_bytes, self._peak_memory_bytes or 0)
        self._totals = record.totals
        self._job = record.job or self._job
        self._flags.update(record.flags)
        if record.phase is not Phase.TRAIN:
            self._add_span(record, self._origin_ns)
            return
        self._last_step = record.step
        block = _block(record, self._origin_ns)
        if record.flagged(Flag.COUNTED):
            self._exclude(block)
        elif self._blocks and self._last_block_records < self._block_records:
            self._blocks[-1] = _joined(self._blocks[-1], block)
            self._last_block_records += 1
        else:
            self._blocks.append(block._replace(excluded_steps=self._excluded_before_steps))
            self._excluded_before_steps = 0
            self._last_block_records = 1
            if len(self._blocks) > MAX_BLOCKS:
                self._merge()

    def summary(self, summary: RunSummary) -> None:
        """Takes the run's end."""
        self._summary = summary
        self._manifest, self._totals = summary.manifest, summary.totals
        self._job = summary.job or self._job

    def build(self) -> bytes:
        """The run so far as JSON, never over ``MAX_BYTES``: long names are cut first, long lists next, then blocks are merged."""
        head = self._head()
        for chars, items in _LIMITS:
            shortened = _shortened(head, chars, items)
            built = _json(shortened, self._blocks)
            if len(built) <= MAX_BYTES:
                return built
        blocks = self._blocks
        while len(built) > MAX_BYTES:
            blocks = _paired(blocks) if len(blocks) > 1 else []
            built = _json(shortened, blocks)
        return built

    def _exclude(self, block: _Block) -> None:
        self._excluded = block if self._excluded is None else _joined(self._excluded, block)
        if self._blocks:
            last = self._blocks[-1]
            self._blocks[-1] = last._replace(excluded_steps=last.excluded_steps + block.n_steps)
        else:
            self._excluded_before_steps += block.n_steps

    def _add_span(self, record: StepRecord, origin_ns: int) -> None:
        """Keeps when a phase was; of too many the longer half, and every second of the others."""
        end_s = ns_to_s(record.end_ns - origin_ns)
        used_s = _finite(record.duration_s) or 0.0  # less what was suspended
        start_s = max(ns_to_s(record.start_ns - origin_ns), end_s - used_s)
        self._spans.append(
            _Span(record.phase, record.step, start_s, end_s, _finite(record.energy_j), _finite(record.emissions_g))
        )
        self._n_spans += 1
        if len(self._spans) > MAX_SPANS:
            longest = sorted(self._spans, key=lambda span: span.start_s - span.end_s)
            self._spans = sorted(longest[: MAX_SPANS // 2] + sorted(longest[MAX_SPANS // 2 :], key=_start)[::2], key=_start)

    def _merge(self) -> None:
        """Halves the blocks. The newest, alone in its pair (201 is odd), stays and is filled up to the new width."""
        self._blocks = _paired(self._blocks)
        self._block_records *= 2

    def _head(self) -> dict[str, Any]:
        """Everything but the blocks."""
        summary = plain(self._summary) if self._summary else None
        if summary:
            for elsewhere in ("manifest", "totals", "flags", "job"):
                del summary[elsewhere]
        manifest, totals = plain(self._manifest), plain(self._totals)
        manifest["versions"] = dict(islice(manifest["versions"].items(), _MAX_VERSIONS))
        return {
            "schema": SCHEMA,
            "manifest": manifest,
            "status": self._summary.status if self._summary else "running",
            "last_step": self._last_step,
            "phases": totals.pop("phases"),
            "totals": totals,
            "flags": dict(self._flags.most_common(_MAX_FLAGS)),
            "excluded": plain(self._excluded._asdict()) if self._excluded else None,
            "job": None if self._job is None else plain(self._job),
            "origin_unix_s": None if self._origin_unix_ns is None else ns_to_s(self._origin_unix_ns),
            "peak_memory_bytes": self._peak_memory_bytes,
            "n_spans": self._n_spans,
            "span_columns": list(_Span._fields),
            "spans": [list(map(_rounded, span)) for span in self._spans],
            "summary": summary,
        }


def _paired(blocks: Sequence[_Block]) -> list[_Block]:
    """Neighbours merged two by two; the last of an odd number stays."""
    pairs = zip(blocks[::2], blocks[1::2], strict=False)
    return [*starmap(_joined, pairs), *blocks[len(blocks) // 2 * 2 :]]


def _shortened(value: Any, chars: int, items: int) -> Any:
    """The same JSON with strings of at most ``chars`` characters and lists of at most ``items`` items."""
    if isinstance(value, str):
        return value if len(value) <= chars else value[: chars - 1] + "…"
    if isinstance(value, list):
        return [_shortened(one, chars, items) for one in value[:items]]
    if isinstance(value, Mapping):
        return {key[:_KEY_CHARS]: _shortened(one, chars, items) for key, one in value.items()}
    return value


def _json(head: Mapping[str, Any], blocks: Sequence[_Block]) -> bytes:
    """The whole snapshot. A block is a row under ``columns``: a third of the size of an object."""
    columns = _ENCODE({**head, "columns": _Block._fields})
    return f'{columns[:-1]},"blocks":[{",".join(map(_row, blocks))}]}}'.encode()


@lru_cache(maxsize=2 * MAX_BLOCKS)
def _row(block: _Block) -> str:
    """A block's row. Kept, since all but the newest are the same in the next snapshot."""
    return _ENCODE([plain(_rounded(value)) for value in block])


def _rounded(value: float | str | None) -> float | str | None:
    """Sums and times at ten digits."""
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _start(span: _Span) -> float:
    return span.start_s


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


Number = TypeVar("Number", int, float)


def _known(a: Number | None, b: Number | None) -> Number | None:
    """The sum of what is known."""
    if a is None:
        return b
    return a if b is None else a + b
