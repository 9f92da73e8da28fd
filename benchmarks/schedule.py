"""What waiting for a cleaner grid saves, on a year of hourly intensity: jobs of 8, 24 and 48 h with 24 h and 7 d of slack.

``python benchmarks/schedule.py DIRECTORY`` reads every ``*.csv`` there (columns as :class:`green_torch.intensity.Trace` takes them; local
times need ``--timezone``, and the hours that clocks skip or repeat are then what they are) and starts each job every 37 hours of the
year, so at every hour of the day and the week. A job that would touch a gap of more than 3 hours is left out, and counted. Plans are made
once, at the start, and then held against what the grid did: saving = 1 − grams of all planned jobs / grams of all jobs started at once.

Methods: a perfect forecast to the deadline; a perfect one of 72 h; last week's profile; an online threshold that knows the past
alone. Each for a job that runs through and for one that may be interrupted, at 2 minutes of extra work for each resume.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from zoneinfo import ZoneInfo

import numpy as np
from report import table, write

from green_torch.errors import GreenTorchError, IntensityError
from green_torch.intensity import Trace
from green_torch.records import IntensityPoint
from green_torch.schedule import plan, plan_regions, repeated
from green_torch.schedule.outlook import quantile
from green_torch.schedule.series import Series, series
from green_torch.units import NS_PER_S, S_PER_HOUR

JOBS_H, SLACKS_H = (8, 24, 48), (24, 168)
EVERY_H, WEEK_H, RESUME_S = 37, 168, 120.0
METHODS = ("perfect forecast", "72 h forecast", "last week's profile", "online threshold")
KINDS = ("contiguous", "interruptible")
HOUR_NS = 3600 * NS_PER_S
# Median over 125 grids of 2022 with a perfect forecast, contiguous and interruptible, in %: what this project's facts sheet states.
KNOWN = {(8, 24): (11, 13), (8, 168): (24, 25), (24, 24): (4, 9), (24, 168): (13, 22), (48, 24): (2.5, 6.7)}
KNOWN_BLIND = {(8, 24, 0): "7", (8, 24, 1): "8", (24, 24, 0): "0"}
CLAIMS = {24: "20–40 % overnight", 168: "30–50 % by deferral"}


@dataclass
class Sums:
    """Grams per kW of the jobs as planned, and started at once."""

    planned: float = 0.0
    at_once: float = 0.0
    n: int = 0
    worse: int = 0

    def add(self, planned: float, at_once: float) -> None:
        """One job."""
        self.planned += planned
        self.at_once += at_once
        self.n += 1
        self.worse += planned > at_once * (1 + 1e-9)

    @property
    def saving(self) -> float:
        """A fraction."""
        return 1 - self.planned / self.at_once if self.at_once else 0.0


def truth(known: Series, parts: list[tuple[float, float]]) -> float:
    """Grams per kW that the intervals really caused."""
    return sum(known.between(start, end) for start, end in parts)


def planned(
    points: tuple[IntensityPoint, ...], job_h: int, total_h: int, now_ns: int, *, pieces: bool
) -> list[tuple[float, float]]:
    """The intervals of a plan, in seconds from now."""
    found = plan(
        points, job_h * S_PER_HOUR, total_h * S_PER_HOUR, pieces, resume_overhead=RESUME_S, now=now_ns, slot=S_PER_HOUR
    )
    return [((one.start_unix_ns - now_ns) / NS_PER_S, (one.end_unix_ns - now_ns) / NS_PER_S) for one in found.intervals]


def by_threshold(past_and_future: np.ndarray, job_h: int, total_h: int, *, pieces: bool) -> list[tuple[float, float]]:
    """Hour by hour, knowing the week before alone; the deadline always wins. The array begins a week before the start."""
    parts: list[tuple[float, float]] = []
    work_s, at = job_h * S_PER_HOUR, 0
    lengths = np.full(WEEK_H, S_PER_HOUR)
    running = False
    while work_s > 1e-6:
        left_s = total_h * S_PER_HOUR - at * S_PER_HOUR
        resume_s = RESUME_S if parts and not running else 0.0
        now = past_and_future[at + WEEK_H]
        level = quantile(past_and_future[at + 1 : at + WEEK_H + 1], lengths, min(1.0, work_s / left_s))
        # whoever stops now must be able to resume in an hour and be done in time
        must = left_s - S_PER_HOUR < work_s + RESUME_S
        if now <= level or must or (running and not pieces):
            start_s = at * S_PER_HOUR
            if must or not pieces:
                parts.append((start_s, start_s + work_s + resume_s))
                return _joined(parts)
            done_s = min(S_PER_HOUR, work_s + resume_s)
            parts.append((start_s, start_s + done_s))
            work_s -= done_s - resume_s
            running = True
        else:
            running = False
        at += 1
    return _joined(parts)


def _joined(parts: list[tuple[float, float]]) -> list[tuple[float, float]]:
    whole: list[tuple[float, float]] = []
    for start, end in parts:
        if whole and abs(whole[-1][1] - start) < 1e-6:
            whole[-1] = (whole[-1][0], end)
        else:
            whole.append((start, end))
    return whole


def year_of(path: Path, timezone: str | None) -> tuple[dict[tuple[int, int, str, str], Sums], int, Trace]:
    """The sums of every job, slack, method and kind, and how many starts a gap left out."""
    trace = Trace(path, timezone=timezone)
    sums = {(j, s, m, k): Sums() for j in JOBS_H for s in SLACKS_H for m in METHODS for k in KINDS}
    longest = max(JOBS_H) + max(SLACKS_H)
    first_ns, last_ns = trace.start_unix_ns + WEEK_H * HOUR_NS, trace.end_unix_ns - longest * HOUR_NS
    skipped = 0
    for now_ns in range(first_ns, last_ns + 1, EVERY_H * HOUR_NS):
        try:
            points = trace.history(now_ns - WEEK_H * HOUR_NS, now_ns + longest * HOUR_NS)
        except IntensityError:
            skipped += 1
            continue
        past, future = points[:WEEK_H], points[WEEK_H:]
        hourly = np.array([point.g_per_kwh for point in points])
        known = series(future, now_ns)
        for job_h in JOBS_H:
            at_once = known.between(0.0, job_h * S_PER_HOUR)
            for slack_h in SLACKS_H:
                total_h = job_h + slack_h
                weekly = repeated(past, now_ns, now_ns + total_h * HOUR_NS)
                for kind in KINDS:
                    several = kind == "interruptible"
                    found = {
                        METHODS[0]: planned(future[:total_h], job_h, total_h, now_ns, pieces=several),
                        METHODS[1]: planned(future[: min(72, total_h)], job_h, total_h, now_ns, pieces=several),
                        METHODS[2]: planned(weekly, job_h, total_h, now_ns, pieces=several),
                        METHODS[3]: by_threshold(hourly, job_h, total_h, pieces=several),
                    }
                    for method, parts in found.items():
                        if parts[-1][1] > total_h * S_PER_HOUR + 1e-3:
                            raise RuntimeError(f"{path}: {method}, {kind}: past the deadline")
                        sums[job_h, slack_h, method, kind].add(truth(known, parts), at_once)
    return sums, skipped, trace


def overnight(trace: Trace, zone: ZoneInfo) -> tuple[float, float]:
    """What 8 h from 22:00 on save against 8 h from 10:00 on the same day, and the share of days on which they are dirtier."""
    sums = Sums()
    day = datetime.fromtimestamp(trace.start_unix_ns / NS_PER_S, UTC).astimezone(zone).date()
    while True:
        day += timedelta(days=1)
        starts = [round(datetime(day.year, day.month, day.day, hour, tzinfo=zone).timestamp()) * NS_PER_S for hour in (22, 10)]
        if starts[0] + 8 * HOUR_NS > trace.end_unix_ns:
            return sums.saving, sums.worse / sums.n
        try:
            night, daytime = (
                series(trace.history(at_ns, at_ns + 8 * HOUR_NS), at_ns).between(0.0, 8 * S_PER_HOUR) for at_ns in starts
            )
        except IntensityError:
            continue
        sums.add(night, daytime)


def tables(zones: dict[str, dict[tuple[int, int, str, str], Sums]]) -> list[str]:
    """A table of each zone and of the median, for each slack."""
    parts = []
    header = ["job", "", *METHODS, "125 grids, perfect", "the article's claim"]
    for slack_h in SLACKS_H:
        for name, shown in [*((name, [name]) for name in zones), (f"median of {len(zones)}", [*zones])]:
            rows = []
            for job_h in JOBS_H:
                for at, kind in enumerate(KINDS):
                    cells = [
                        f"{median(100 * zones[one][job_h, slack_h, method, kind].saving for one in shown):.1f}"
                        for method in METHODS
                    ]
                    known = KNOWN.get((job_h, slack_h))
                    blind = KNOWN_BLIND.get((job_h, slack_h, at))
                    told = "–" if known is None else f"{known[at]}" + (f" ({blind} by last week)" if blind else "")
                    rows.append([f"{job_h} h", kind, *cells, told, CLAIMS[slack_h]])
            parts.append(f"## {name}, {slack_h} h of slack: saving in %\n\n{table(header, rows)}")
    return parts


def planning_time() -> dict[str, float]:
    """Processor seconds of the slowest of three job lengths, over 20 regions and 7 days at 5 minutes."""
    begin_ns = 1_700_000_000 * NS_PER_S
    forecasts = {
        f"R{k}": [
            IntensityPoint(
                200 + 100 * math.sin(0.0218 * at + k) + at * k % 17,
                f"R{k}",
                "made up",
                time_unix_ns=begin_ns + at * 300 * NS_PER_S,
            )
            for at in range(2016)
        ]
        for k in range(20)
    }
    took: dict[str, float] = {}
    for kind, interruptible in (("contiguous", False), ("interruptible", True)):
        for hours in (8, 24, 48):
            begin_s = time.process_time()
            plan_regions(forecasts, hours * 3600, 7 * 24 * 3600, interruptible, now=begin_ns)
            took[kind] = max(took.get(kind, 0.0), time.process_time() - begin_s)
    return took


def main() -> None:
    """Plans, and writes the result."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("directory", type=Path)
    arguments.add_argument("--timezone", help="of times without an offset")
    arguments.add_argument(
        "--clock", action="append", default=[], metavar="FILE-PREFIX=IANA", help="local time of a zone, for day and night"
    )
    arguments.add_argument("--dry", action="store_true", help="print, and write no result")
    given = arguments.parse_args()
    clocks = dict(one.split("=", 1) for one in given.clock)
    paths = sorted(given.directory.glob("*.csv"))
    if not paths:
        arguments.error(f"no *.csv in {given.directory}")
    zones: dict[str, dict[tuple[int, int, str, str], Sums]] = {}
    notes, nights = [], []
    for path in paths:
        try:
            zones[path.stem], skipped, trace = year_of(path, given.timezone)
        except GreenTorchError as error:
            notes.append(f"{path.stem} is left out: {error}.")
            continue
        n = next(iter(zones[path.stem].values())).n
        notes.append(f"{path.stem}: {n} starts, {skipped} more left out for gaps.")
        zone = next((name for prefix, name in clocks.items() if path.stem.startswith(prefix)), None)
        if zone:
            saved, dirtier = overnight(trace, ZoneInfo(zone))
            nights.append([path.stem, zone, f"{100 * saved:+.1f} %", f"{100 * dirtier:.0f} %", "20–40 %"])
    parts = tables(zones)
    if nights:
        header = ["zone", "clock", "8 h from 22:00 against from 10:00", "nights that are dirtier", "the article's claim"]
        parts.append(f"## Overnight\n\n{table(header, nights)}")
    planning_s = planning_time()
    parts.append(
        "## Time to plan\n\n"
        + table(
            ["20 regions, 7 days at 5 minutes", "processor time, s"],
            [[kind, f"{took:.2f}"] for kind, took in planning_s.items()],
        )
        + "\n\nThe target is under 1 s."
    )
    body = "\n\n".join([" ".join((__doc__ or "").split("\n\n", 1)[1].split()), " ".join(notes), *parts])
    result = {
        "zones": {
            name: [
                {
                    "job_h": j,
                    "slack_h": s,
                    "method": m,
                    "kind": k,
                    "saving": one.saving,
                    "starts": one.n,
                    "worse_than_at_once": one.worse,
                }
                for (j, s, m, k), one in sums.items()
            ]
            for name, sums in zones.items()
        },
        "overnight": nights,
        "planning_s": planning_s,
        "notes": notes,
    }
    if given.dry:
        print(body)
        return
    write("schedule", "What waiting for a cleaner grid saves", body, result)


if __name__ == "__main__":
    main()
