"""Grid intensity from a CSV file: a year of hours for trials and tests, or a site's own figures.

One row an instant, one column of times, one of gCO2e/kWh. A figure holds until the next row's time. A row without a figure is a gap; a
short one is bridged by the figure before it, marked as estimated, a longer one is unknown. Times carry an offset or Z, or are local
times of a ``timezone``, in which the hour that comes twice in autumn may appear twice and the one missing in spring may not appear.
"""

from __future__ import annotations

import csv
import itertools
import math
import statistics
from bisect import bisect_right
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from green_torch.errors import ArgumentError, IntensityError
from green_torch.intensity.online import iso
from green_torch.records import IntensityPoint
from green_torch.units import NS_PER_S, S_PER_HOUR, ns_to_s, s_to_ns

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

_TIME_COLUMNS = ("time", "datetime", "timestamp", "point_time", "from")
_VALUE_COLUMNS = ("g_per_kwh", "carbon_intensity_gco2_per_kwh", "carbon_intensity", "carbonIntensity", "intensity")


@final
class Trace:
    """``track(intensity=Trace("CISO-2022-hourly.csv", region="US-CA", basis="direct", starts_at=...))``.

    Args:
        path: a CSV file with a header; columns ``time`` and ``g_per_kwh``, or others of these meanings.
        region: what stands in every output; the file's name where not given.
        basis: "lifecycle", "direct" or "unknown".
        average: False for marginal figures.
        estimated: whether the figures are estimates.
        starts_at: the trace is shifted so that its first row stands here: a ``datetime`` with its offset, or Unix nanoseconds.
        timezone: of times without an offset, by its IANA name ("Europe/Paris").
        time_column: where the header has none of the usual names.
        value_column: likewise.
        max_gap_s: the longest gap that is bridged, in seconds.

    Raises:
        ArgumentError: the file can't be read as a trace; the message names the line.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        region: str | None = None,
        basis: str = "unknown",
        average: bool = True,
        estimated: bool = False,
        starts_at: datetime | int | None = None,
        timezone: str | None = None,
        time_column: str | None = None,
        value_column: str | None = None,
        max_gap_s: float = 3 * S_PER_HOUR,
    ) -> None:
        if basis not in ("lifecycle", "direct", "unknown"):
            raise ArgumentError(f'basis={basis!r}: use "lifecycle", "direct" or "unknown"')
        file = Path(path)
        found = sorted(_rows(file, time_column, value_column, _zone(timezone)), key=lambda row: row[0])
        times = [at for at, _ in found]
        known = [(at, value) for at, value in found if value is not None]
        if len(known) < 2:
            raise ArgumentError(f"{file}: a trace needs two rows with figures at least")
        for before, after in itertools.pairwise(times):
            if before == after:
                raise ArgumentError(f"{file}: two rows for {iso(before)}; local times need timezone= where clocks change")
        self._step_ns = round(statistics.median(b - a for a, b in itertools.pairwise(times)))
        shift_ns = 0 if starts_at is None else _unix_ns(starts_at) - times[0]
        source = f"trace {file.name}" + (f", moved from {iso(times[0])} to {iso(times[0] + shift_ns)}" if shift_ns else "")
        template = IntensityPoint(
            0.0, region=region or file.stem, source=source, basis=basis, average=average, estimated=estimated
        )
        self._points = tuple(replace(template, g_per_kwh=value, time_unix_ns=at + shift_ns) for at, value in known)
        self._times = [at + shift_ns for at, _ in known]
        self._end_ns = times[-1] + shift_ns + self._step_ns
        self._max_gap_ns = s_to_ns(max_gap_s)
        self._file = file

    def __repr__(self) -> str:
        return f"Trace({str(self._file)!r}, {iso(self.start_unix_ns)} to {iso(self.end_unix_ns)})"

    @property
    def start_unix_ns(self) -> int:
        """Where the first figure begins to hold."""
        return self._times[0]

    @property
    def end_unix_ns(self) -> int:
        """Where the last row ceases to hold."""
        return self._end_ns

    def at(self, time_unix_ns: int) -> IntensityPoint:
        """The figure in force then; estimated within a gap that is bridged.

        Raises:
            IntensityError: the trace does not cover that time, or has too long a gap there.
        """
        index = bisect_right(self._times, time_unix_ns) - 1
        if index < 0 or time_unix_ns >= self._end_ns:
            raise IntensityError(
                f"{self._file.name} covers {iso(self.start_unix_ns)} to {iso(self._end_ns)}, not {iso(time_unix_ns)}: "
                "move it with starts_at="
            )
        late_ns = time_unix_ns - self._times[index] - self._step_ns
        if late_ns < 0:
            return self._points[index]
        next_ns = self._times[index + 1] if index + 1 < len(self._times) else self._end_ns
        gap_ns = next_ns - self._times[index] - self._step_ns
        if gap_ns > self._max_gap_ns:
            raise IntensityError(
                f"{self._file.name} has no figures for {ns_to_s(gap_ns) / S_PER_HOUR:.1f} h from "
                f"{iso(self._times[index] + self._step_ns)}: give max_gap_s= to bridge that"
            )
        since_ns = time_unix_ns - late_ns % self._step_ns
        return replace(self._points[index], estimated=True, time_unix_ns=since_ns)

    def history(self, start_unix_ns: int, end_unix_ns: int) -> tuple[IntensityPoint, ...]:
        """Every figure in force between two instants, in order, those that bridge a gap among them.

        Raises:
            IntensityError: the trace does not cover all of it, or has too long a gap in it.
        """
        points = [self.at(start_unix_ns)]
        while (at_ns := self._following(points[-1])) < end_unix_ns:
            points.append(self.at(at_ns))
        return tuple(points)

    def forecast(self, start_unix_ns: int, end_unix_ns: int) -> tuple[IntensityPoint, ...]:
        """What the trace holds, marked as estimated: a perfect forecast, which no real one is."""
        return tuple(replace(point, estimated=True) for point in self.history(start_unix_ns, end_unix_ns))

    def _following(self, point: IntensityPoint) -> int:
        """Where the next figure begins to hold."""
        at_ns = point.time_unix_ns or 0
        index = bisect_right(self._times, at_ns)
        row_ns = self._times[index] if index < len(self._times) else self._end_ns
        return min(row_ns, at_ns + self._step_ns)


def _zone(name: str | None) -> ZoneInfo | None:
    try:
        return None if name is None else ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ArgumentError(f'timezone={name!r} is unknown here: type an IANA name like "Europe/Paris"') from error


def _unix_ns(moment: datetime | int) -> int:
    if isinstance(moment, int) and not isinstance(moment, bool):
        return moment
    if isinstance(moment, datetime) and moment.tzinfo is not None:
        return round(moment.timestamp()) * NS_PER_S
    raise ArgumentError(f"starts_at={moment!r}: a datetime with its offset (tzinfo=), or Unix nanoseconds, is needed")


def _rows(
    file: Path, time_column: str | None, value_column: str | None, zone: ZoneInfo | None
) -> Iterator[tuple[int, float | None]]:
    """Unix nanoseconds and gCO2e/kWh (``None``: a gap) of each row."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{file} can't be read: {error}") from error
    reader = csv.DictReader(lines)
    header = list(reader.fieldnames or ())
    time_name = _column(file, header, time_column, _TIME_COLUMNS, "time_column")
    value_name = _column(file, header, value_column, _VALUE_COLUMNS, "value_column")
    twice: set[datetime] = set()
    for row in reader:
        where = f"{file}, line {reader.line_num}"
        yield _instant(row[time_name], zone, twice, where), _figure(row[value_name], where)


def _column(file: Path, header: list[str], wanted: str | None, usual: tuple[str, ...], argument: str) -> str:
    if wanted is not None and wanted in header:
        return wanted
    found = None if wanted is not None else next((name for name in usual if name in header), None)
    if found is None:
        raise ArgumentError(f"{file} has the columns {', '.join(header) or '(none)'}: name one with {argument}=")
    return found


def _instant(text: str | None, zone: ZoneInfo | None, seen: set[datetime], where: str) -> int:
    """Unix nanoseconds of a row's time. A local time that was seen before is the second of the hour that comes twice."""
    try:
        moment = datetime.fromisoformat((text or "").strip())
    except ValueError:
        raise ArgumentError(f"{where}: {text!r:.60} is no ISO 8601 time") from None
    if moment.tzinfo is None:
        if zone is None:
            raise ArgumentError(f'{where}: {text!r} has no offset: give timezone="UTC", or where its clock stands')
        local = moment
        moment = local.replace(tzinfo=zone, fold=int(local in seen))
        seen.add(local)
        if moment.astimezone(UTC).astimezone(zone).replace(tzinfo=None, fold=0) != local:
            raise ArgumentError(f"{where}: {text!r} did not exist in {zone.key}, where the clock was put forward")
    return round(moment.timestamp() * 1000) * (NS_PER_S // 1000)


def _figure(text: str | None, where: str) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        raise ArgumentError(f"{where}: {text!r:.60} is no number of gCO2e/kWh; leave a gap empty") from None
    if not (math.isfinite(value) and value >= 0):
        raise ArgumentError(f"{where}: {text!r:.60} is no finite number of gCO2e/kWh >= 0; leave a gap empty")
    return value
