"""TensorBoard: the run's scalars and its snapshot, through the event file that the user's own loss goes to.

A record becomes one event with all its values, since TensorBoard keeps a writer's events in order and two live event files in one
directory would hide most of the user's points.
"""

from __future__ import annotations

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
    from collections.abc import Callable, Iterator

    from torch.utils.tensorboard import SummaryWriter

SNAPSHOT_TAG = "green/snapshot"
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
                if self._snapshot is None:
                    self._snapshot = SnapshotBuilder(item)
                else:
                    self._snapshot.manifest(item)
            case StepRecord():
                self._place = item.step, item.time_unix_ns
                event = self._new_event(
                    value=[
                        {"tag": tag, "simple_value": value}
                        for tag, value in _scalars(item, detail=self._detail)
                        if value is not None and math.isfinite(value)
                    ]
                )
                if self._snapshot is not None:
                    self._snapshot.add(item)
                    if self._cadence.due(item.end_ns):
                        self._add_snapshot(event, self._snapshot)
                self._send(event)
            case RunSummary():
                if self._snapshot is None:
                    self._snapshot = SnapshotBuilder(item.manifest)
                self._snapshot.summary(item)
                event = self._new_event()
                self._add_snapshot(event, self._snapshot)
                self._send(event)

    def close(self) -> None:
        """Flushes the event file, where it is still open; safe to call twice."""
        if self._writer.file_writer is not None:
            self._writer.flush()

    def _add_snapshot(self, event: Any, snapshot: SnapshotBuilder) -> None:
        tensor = self._new_tensor(dtype=self._string_type, string_val=[snapshot.build()])
        event.value.add(tag=SNAPSHOT_TAG, tensor=tensor, metadata=self._metadata)

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


def _scalars(record: StepRecord, *, detail: bool) -> Iterator[tuple[str, float | None]]:
    """A record's tags and values. Outside train only the cumulative ones: the others are means over train steps."""
    totals = record.totals
    yield "green/energy_total_kWh", None if totals.energy_j is None else joules_to_kwh(totals.energy_j)
    yield "green/emissions_total_gCO2e", totals.emissions_g
    if record.phase is not Phase.TRAIN:
        return
    yield "green/energy_per_step_J", record.per_step(record.energy_j)
    yield "green/emissions_per_step_gCO2e", record.per_step(record.emissions_g)
    if record.energy_j is not None:
        if record.tokens:
            yield "green/energy_per_token_J", record.energy_j / record.tokens
        elif record.samples:
            yield "green/energy_per_sample_J", record.energy_j / record.samples
    yield "green/mfu", record.mfu
    yield "green/hfu", record.hfu
    yield "green/power_W", record.power_w
    yield "green/step_time_s", record.per_step(record.duration_s)
    yield "green/intensity_gCO2e_per_kWh", record.intensity_g_per_kwh
    yield "green/projected_total_gCO2e", record.projected_total_g
    yield "green/projected_savings_gCO2e", record.projected_savings_g
    if detail:
        yield "green_detail/energy_lo_per_step_J", record.per_step(record.energy_lo_j)
        yield "green_detail/energy_hi_per_step_J", record.per_step(record.energy_hi_j)
        yield "green_detail/facility_energy_per_step_J", record.per_step(record.facility_energy_j)
        if record.duration_s > 0:
            for domain in record.domains:
                yield _power_tag(domain.name), domain.energy_j / record.duration_s


@lru_cache(maxsize=256)
def _power_tag(domain: str) -> str:
    """A domain's tag, in the characters and lengths that TensorBoard shows."""
    return f"green_detail/power_{re.sub(r'[^-.0-9A-Z_a-z]', '_', domain)[:64]}_W"


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
