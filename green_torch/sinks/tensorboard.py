"""TensorBoard: the run's scalars and its snapshot, through the event file that the user's own loss goes to.

A record becomes one event with all its values, since TensorBoard keeps a writer's events in order and two live event files in one
directory would hide most of the user's points.
"""

from __future__ import annotations

import json
import math
import re
import socket
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from green_torch.errors import ArgumentError, UsageError
from green_torch.records import Item, Manifest, Phase, RunSummary, StepRecord
from green_torch.sinks.snapshot import SnapshotBuilder
from green_torch.units import NS_PER_S, joules_to_kwh, ns_to_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch.utils.tensorboard import SummaryWriter

    from green_torch.records import JobTotals, PerStep, RunTotals, Spread

SNAPSHOT_TAG = "green/snapshot"
COMPARISON_TAG = "green/comparison"
PLUGIN_NAME = "green"

_SNAPSHOT_RECORDS = 128
_SNAPSHOT_NS = 30 * NS_PER_S
_SNAPSHOT_MAX_NS = 600 * NS_PER_S
_SNAPSHOT_SHARE = 200  # of the run so far, as many as a snapshot has blocks: a finer one would show nothing new
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(?P<opened_s>\d+)\.(?P<host>.+)\.(?P<pid>\d+)\.\d+(?:\D.*)?")
_IDLE_S = 600.0
_CLOCK_SLACK_S = 2.0


def open_writer(log_dir: str | Path) -> SummaryWriter:
    """A new SummaryWriter in ``log_dir``; in its sub-run ``green`` where somebody has an event file open there.

    Raises:
        ArgumentError: The directory can't be written to.
    """
    from torch.utils.tensorboard import SummaryWriter  # takes a second: only for those who log

    folder = Path(log_dir)
    try:
        if any(map(_is_live, folder.glob("events.out.tfevents.*"))):
            folder /= "green"
        return SummaryWriter(str(folder))
    except OSError as error:
        raise ArgumentError(f"can't open an event file in {folder}: {error}; pass a log_dir that can be written to") from error


class TensorBoardSink:
    """Writes records through the SummaryWriter of the user, who goes on owning it: ``close`` flushes and leaves it open.

    ``detail`` adds bounds, facility energy and each domain's power under ``green_detail/``. A writer that was closed before is opened
    anew, as any ``add_scalar`` of the user's would do; one that is closed afterwards stays closed.

    Raises:
        ArgumentError: ``writer`` is not a SummaryWriter.
    """

    def __init__(self, writer: SummaryWriter, *, detail: bool = True) -> None:
        from tensorboard.compat.proto import (  # type: ignore[import-untyped]  # tensorboard ships no types
            summary_pb2,
            tensor_pb2,
            types_pb2,
        )

        try:
            if writer.file_writer is None:
                reopen: Callable[[], object] = writer._get_file_writer  # noqa: SLF001 - no public name opens its file again
                reopen()
        except AttributeError:
            raise ArgumentError(
                f"writer is a {type(writer).__name__}, which has no event file; pass a torch.utils.tensorboard.SummaryWriter"
            ) from None
        self._writer: Any = writer
        self._detail = detail
        self._new_event = summary_pb2.Summary
        self._new_tensor = tensor_pb2.TensorProto
        self._string_type = types_pb2.DT_STRING
        self._metadata = summary_pb2.SummaryMetadata(
            plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME),
            data_class=summary_pb2.DATA_CLASS_TENSOR,
        )
        self._manifest: Manifest | None = None
        self._snapshot: SnapshotBuilder | None = None
        self._cadence = _Cadence()
        self._place: tuple[int, int | None] = (0, None)  # step and Unix time of the last record

    def write(self, item: Item) -> None:
        """Takes one item.

        Raises:
            UsageError: The writer was closed meanwhile.
            OSError: The event file can't be written to.
        """
        match item:
            case Manifest():
                self._manifest = item
                if self._snapshot is None:
                    self._snapshot = SnapshotBuilder(item)
                else:
                    self._snapshot.manifest(item)
            case StepRecord():
                self._place = item.step, item.time_unix_ns
                event = self._event(scalars(item, self._manifest, detail=self._detail))
                if self._snapshot is not None:
                    self._snapshot.add(item)
                    if self._cadence.due(item.end_ns):
                        self._add_snapshot(event, self._snapshot)
                self._send(event)
            case RunSummary():
                if self._snapshot is None:
                    self._snapshot = SnapshotBuilder(item.manifest)
                self._snapshot.summary(item)
                event = self._event(self._last_words(item.job))
                self._add_snapshot(event, self._snapshot)
                self._send(event)

    def write_comparison(self, comparison: Mapping[str, Any], step: int) -> None:
        """Adds what a comparison measured of this run, block by block, for the dashboard to pair with the other runs' blocks.

        ``comparison`` is plain JSON. The newest one counts.

        Raises:
            UsageError: The writer was closed meanwhile.
            OSError: The event file can't be written to.
        """
        self._place = step, None
        event = self._event(())
        self._add_tensor(event, COMPARISON_TAG, json.dumps(comparison, allow_nan=False, separators=(",", ":")).encode())
        self._send(event)

    def close(self) -> None:
        """Flushes the event file, where it is still open; safe to call twice."""
        if self._writer.file_writer is not None:
            self._writer.flush()

    def _last_words(self, job: JobTotals | None) -> Iterator[tuple[str, float | None]]:
        """What the ranks of a job used in the end: its last record was made before the others told."""
        if job is not None:
            yield from totals(job, job)
            if self._detail:
                yield from _ranks(job)

    def _event(self, values: Iterable[tuple[str, float | None]]) -> Any:
        known = [{"tag": tag, "simple_value": value} for tag, value in values if value is not None and math.isfinite(value)]
        return self._new_event(value=known)

    def _add_snapshot(self, event: Any, snapshot: SnapshotBuilder) -> None:
        self._add_tensor(event, SNAPSHOT_TAG, snapshot.build())

    def _add_tensor(self, event: Any, tag: str, content: bytes) -> None:
        tensor = self._new_tensor(dtype=self._string_type, string_val=[content])
        event.value.add(tag=tag, tensor=tensor, metadata=self._metadata)

    def _send(self, event: Any) -> None:
        file_writer = self._writer.file_writer
        if file_writer is None:
            raise UsageError(
                "the SummaryWriter was closed while the run went on, so TensorBoard misses the rest (a second event file would hide "
                "points of the first); call writer.close() after leaving green_torch.track()"
            )
        step, time_unix_ns = self._place
        file_writer.add_summary(event, step, None if time_unix_ns is None else ns_to_s(time_unix_ns))


class _Cadence:
    """When a snapshot is worth its bytes (TensorBoard takes milliseconds for the checksum of one, in Python).

    With record 1, 2, 4, ... 128, then every 30 s; in a long run once per 1/200 of its length, at most 10 minutes.
    """

    def __init__(self) -> None:
        self._records = 0
        self._first_ns = 0
        self._last_ns = 0

    def due(self, now_ns: int) -> bool:
        """Counts a record that ended at ``now_ns``; whether a snapshot goes with it."""
        self._records += 1
        if self._records == 1:
            self._first_ns = now_ns
        doubled = self._records <= _SNAPSHOT_RECORDS and self._records.bit_count() == 1
        wait_ns = max(_SNAPSHOT_NS, min((now_ns - self._first_ns) / _SNAPSHOT_SHARE, _SNAPSHOT_MAX_NS))
        if not doubled and now_ns - self._last_ns < wait_ns:
            return False
        self._last_ns = now_ns
        return True


def scalars(record: StepRecord, manifest: Manifest | None = None, *, detail: bool = True) -> Iterator[tuple[str, float | None]]:
    """A record's tags and values. Outside train only the cumulative ones: the others are means over train steps.

    Under ``green/`` a record of rank zero speaks for all ranks of its job; under ``green_detail/`` for this rank, and for the spread
    over the ranks. Totals go on from those of the run's earlier segments, as the manifest tells them.
    """
    job = record.job
    yield from totals(job or record.totals, job or manifest)
    if job is not None and detail:
        yield from _ranks(job)
        yield from _spread("green_detail/rank_step_time", job.rank_step_time_s, "s")
    if record.phase is not Phase.TRAIN:
        return
    yield from _step(job.per_step if job is not None else record.mean_step())
    yield "green/step_time_s", record.per_step(record.duration_s)
    yield "green/intensity_gCO2e_per_kWh", record.intensity_g_per_kwh
    projected = job or record
    yield "green/projected_total_gCO2e", projected.projected_total_g
    yield "green/projected_savings_gCO2e", projected.projected_savings_g
    if detail:
        yield "green_detail/energy_lo_per_step_J", record.per_step(record.energy_lo_j)
        yield "green_detail/energy_hi_per_step_J", record.per_step(record.energy_hi_j)
        yield "green_detail/facility_energy_per_step_J", record.per_step(record.facility_energy_j)
        if record.duration_s > 0:
            for domain in record.domains:
                power, lowest, highest = _power_tags(domain.name)
                yield power, domain.energy_j / record.duration_s
                if domain.energy_lo_j is not None and domain.energy_hi_j is not None:
                    yield lowest, domain.energy_lo_j / record.duration_s
                    yield highest, domain.energy_hi_j / record.duration_s


def _step(step: PerStep | None) -> Iterator[tuple[str, float | None]]:
    """What a step takes; nothing where that is not known of all ranks yet."""
    if step is None:
        return
    yield "green/energy_per_step_J", step.energy_j
    yield "green/emissions_per_step_gCO2e", step.emissions_g
    if step.energy_j is not None:
        if step.tokens:
            yield "green/energy_per_token_J", step.energy_j / step.tokens
        elif step.samples:
            yield "green/energy_per_sample_J", step.energy_j / step.samples
    yield "green/mfu", step.mfu
    yield "green/hfu", step.hfu
    yield "green/power_W", step.power_w


def totals(own: RunTotals | JobTotals, carried: Manifest | JobTotals | None) -> Iterator[tuple[str, float | None]]:
    """The cumulative tags: what this segment (of all ranks) used, and earlier ones did."""
    energy_j, emissions_g = (None, None) if carried is None else (carried.carried_energy_j, carried.carried_emissions_g)
    total_j = _sum(own.energy_j, energy_j)
    yield "green/energy_total_kWh", None if total_j is None else joules_to_kwh(total_j)
    yield "green/emissions_total_gCO2e", _sum(own.emissions_g, emissions_g)


def read_scalars(folder: Path, *, most: int = 10_000, since_unix_s: float = 0.0) -> dict[str, tuple[tuple[int, float], ...]]:
    """Step and value of every scalar in the event files of a directory, by tag, in order of the steps; of a long one ``most`` at random.

    What was logged before ``since_unix_s`` is left out.
    """
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # as above
        SCALARS,
        EventAccumulator,
    )

    events = EventAccumulator(str(folder), {SCALARS: most})
    events.Reload()
    found = {
        tag: tuple(sorted((event.step, event.value) for event in events.Scalars(tag) if event.wall_time >= since_unix_s))
        for tag in events.Tags()[SCALARS]
    }
    return {tag: curve for tag, curve in found.items() if curve}


def _sum(own: float | None, carried: float | None) -> float | None:
    return None if own is None else own + (carried or 0.0)


def _ranks(job: JobTotals) -> Iterator[tuple[str, float | None]]:
    """How many ranks are in the sums, how old the oldest word is, and who has used most."""
    yield "green_detail/ranks_reporting", job.reporting
    yield "green_detail/rank_oldest_age_s", job.oldest_age_s
    yield from _spread("green_detail/rank_energy", job.rank_energy_j, "kWh", joules_to_kwh)


def _spread(
    tag: str, spread: Spread | None, unit: str, convert: Callable[[float], float] = float
) -> Iterator[tuple[str, float | None]]:
    if spread is not None:
        for end in ("min", "median", "max"):
            yield f"{tag}_{end}_{unit}", convert(getattr(spread, end))


@lru_cache(maxsize=256)
def _power_tags(domain: str) -> tuple[str, str, str]:
    """A domain's tags (power, its lowest and its highest by the bounds), in the characters and lengths that TensorBoard shows."""
    name = re.sub(r"[^-.0-9A-Z_a-z]", "_", domain)[:64]
    return f"green_detail/power_{name}_W", f"green_detail/power_lo_{name}_W", f"green_detail/power_hi_{name}_W"


def _is_live(path: Path) -> bool:
    """Whether somebody may still write to this event file.

    Its name tells host, process and opening time. The file of a process that has ended (an earlier segment of a resumed run) is not live;
    another machine's, or one whose name tells less, is live while its last change is not 10 minutes old.
    """
    name = _EVENT_FILE.fullmatch(path.name)
    if name is None or name["host"] != socket.gethostname():
        return time.time() - path.stat().st_mtime < _IDLE_S
    try:
        return psutil.Process(int(name["pid"])).create_time() <= int(name["opened_s"]) + _CLOCK_SLACK_S
    except psutil.NoSuchProcess:
        return False
