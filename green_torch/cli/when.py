"""``green-torch when`` tells when a job had best start and what waiting saves; ``wait`` waits until then and becomes the job's command.

A grid that can't be asked, for want of a key too, never holds a job up: the answer is "now", said on stderr, with exit code 0 unless
``--strict``; and ``wait`` starts the command where no time is left to wait. ``wait`` watches a grid that tells the present alone, and starts when it is cleaner than it was wont to be, or when the deadline asks for it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NoReturn, final

from green_torch.cli.assumptions import number
from green_torch.cli.console import percent
from green_torch.cli.options import in_options, options_named, share
from green_torch.errors import ArgumentError, IntensityError
from green_torch.intensity.online import iso
from green_torch.records import IntensityPoint
from green_torch.schedule import THRESHOLD, Interval, Plan, outlook, plan_regions
from green_torch.schedule.accounting import handed, planned, shifted, unplanned
from green_torch.schedule.observed import Observed
from green_torch.surroundings import DEFERRAL
from green_torch.units import NS_PER_S, S_PER_HOUR, grams, ns_to_s, s_to_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.console import Console
    from rich.text import Text

    from green_torch.intensity import Trace
    from green_torch.records import Deferral

SCHEMA = "green_torch.when/1"
FORMATS = ("human", "slurm", "iso", "json")
PROVIDERS = ("auto", "electricitymaps", "neso", "watttime")
UNKNOWN = 3  # exit code of --strict where nothing is known ahead
_UNITS_S = {"s": 1.0, "m": 60.0, "h": S_PER_HOUR, "d": 24 * S_PER_HOUR}
_ASK_AGAIN_S = S_PER_HOUR
_WATCH_S = 900.0
_WAIT = "green-torch wait"
_LOOK_S = 60.0
_OPTIONS = {  # how this command says what the library's messages call by its arguments; some of them it lacks
    r": name one with (time|value)_column=": ": a trace has a column time, of ISO 8601, and one g_per_kwh",
    r"\b(region|zone)=": "--region ",
    r"\btimezone=(?=\S)": "--timezone ",
    r"\btimezone=": "--timezone",
    r": (give max_gap_s= to bridge that|move it with starts_at=)": "",
    r", or give (token=|username= and password=)": "",
    r"None, a number": "a number",
}
_COLUMNS, _ROWS = 60, 6


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be scheduled, and how it is asked for. Times are in seconds, ``power_w`` in watts, ``min_saving`` a fraction."""

    duration_s: float
    within_s: float
    interruptible: bool = False
    resume_overhead_s: float = 120.0
    queue_delay_s: float = 0.0
    power_w: float | None = None
    min_saving: float = 0.0

    def __post_init__(self) -> None:
        """Refuses, by the options' names, what no job can be.

        Raises:
            ArgumentError: no time for it or none that it takes, or a power below 0.
        """
        number("--hours", self.duration_s / S_PER_HOUR)
        number("--within", self.within_s / S_PER_HOUR, hint=" of hours, such as 24h")
        if self.power_w is not None:
            number("--power", self.power_w, least=0.0)


@dataclass(frozen=True, slots=True)
class Answer:
    """The plans of the regions that could be asked, the best first, and why others (or all) could not.

    ``present_alone``: the first region's provider looks neither ahead nor back, for good.
    """

    job: Job
    now_unix_ns: int
    plans: tuple[Plan, ...]
    ahead: dict[str, tuple[IntensityPoint, ...]]
    problems: tuple[str, ...]
    present_alone: bool = False

    @property
    def best(self) -> Plan | None:
        """The plan to follow, worth its wait or not; ``None`` where nothing is known."""
        return self.plans[0] if self.plans else None

    @property
    def worth_it(self) -> bool:
        """Whether the best plan saves anything, and as much as was asked for."""
        return self.best is not None and self.best.saving > 0 and self.best.saving >= self.job.min_saving

    @property
    def release_unix_ns(self) -> int:
        """When to hand the job to the queue."""
        return self.best.release_unix_ns if self.best is not None and self.worth_it else self.now_unix_ns


# ── what the options mean ──────────────────────────────────────────────────────────────────────────────────────────────


def parse_duration(text: str, option: str) -> float:
    """Seconds of "90m", "24h", "7d" or "1d12h".

    Raises:
        ArgumentError: it is none.
    """
    word = text.strip().lower()
    if not re.fullmatch(r"(\d+(\.\d+)?[smhd])+", word):
        raise ArgumentError(f"{option} {text!r}: give a duration with its unit, as 90m, 24h, 7d or 1d12h")
    return sum(float(number) * _UNITS_S[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)([smhd])", word))


def parse_fraction(text: str) -> float:
    """A fraction of "5%" or "0.05".

    Raises:
        ArgumentError: it is none between 0 and 1.
    """
    value = share(text)
    if not 0 <= value <= 1:
        raise ArgumentError(f"--min-saving {text!r}: give a share between 0 and 1, or per cent, as 5%")
    return value


def parse_moment(text: str) -> int:
    """Unix nanoseconds of an ISO 8601 time; one without an offset is in UTC.

    Raises:
        ArgumentError: it is none.
    """
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ArgumentError(f"--start {text!r}: give an ISO 8601 time, as 2026-01-31T18:00+01:00") from None
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()) * NS_PER_S


def present(start: str | None, *, traced: bool) -> int:
    """Unix nanoseconds of the present: the system's clock, or where a trace is entered.

    Raises:
        ArgumentError: a start without a trace, or none of ISO 8601.
    """
    if start is not None and not traced:
        raise ArgumentError("--start moves the present for a trace: give --trace FILE.csv, or leave it out")
    return time.time_ns() if start is None else parse_moment(start)


def sources(
    region: str | None,
    regions: str | None,
    provider: str,
    traces: Sequence[Path],
    now_unix_ns: int,
    *,
    timezone: str | None = None,
) -> dict[str, Any]:
    """Who is to be asked, by region; the first is where the job would run now.

    Raises:
        ArgumentError: no or unknown regions, no or unknown provider, traces that don't match, or one of another time.
    """
    names = list(
        dict.fromkeys([*([region] if region else []), *(one.strip() for one in (regions or "").split(",") if one.strip())])
    )
    if traces:
        from green_torch.intensity import Trace

        labels = names or [path.stem for path in traces]
        if len(labels) != len(traces):
            raise ArgumentError(
                f"{len(traces)} traces for {len(labels)} regions: give --trace once for each region, in their order"
            )
        with options_named(_OPTIONS):
            found = {name: Trace(path, region=name, timezone=timezone) for name, path in zip(labels, traces, strict=True)}
        for path, one in zip(traces, found.values(), strict=True):
            _covers(path, one, now_unix_ns)
        return found
    if not names:
        raise ArgumentError("where? Give --region DE, or --trace FILE.csv")
    with options_named(_OPTIONS):
        return {name: _provider(name, provider) for name in names}


def _covers(path: Path, trace: Trace, now_unix_ns: int) -> None:
    begin_ns, end_ns = trace.start_unix_ns, trace.end_unix_ns
    if not begin_ns <= now_unix_ns < end_ns:
        middle_ns = (begin_ns + end_ns) // 2
        day_ns = middle_ns - middle_ns % s_to_ns(24 * S_PER_HOUR)
        start = iso(day_ns, "%Y-%m-%d") if day_ns >= begin_ns else iso(begin_ns)
        raise ArgumentError(
            f"{path.name} covers {iso(begin_ns)} to {iso(end_ns)}, not {iso(now_unix_ns)}: give "
            f"--start {start}, say, to enter it there"
        )


def _provider(region: str, name: str) -> Any:
    from green_torch.intensity import ElectricityMaps, UKNeso, WattTime
    from green_torch.intensity.electricity_maps import TOKEN_VARIABLES

    if name not in PROVIDERS:
        raise ArgumentError(f"--provider {name!r}: use one of {', '.join(PROVIDERS)}")
    british = region.upper() in {"GB", "UK"}
    if name == "neso" or (name == "auto" and british and not any(os.environ.get(one) for one in TOKEN_VARIABLES)):
        return UKNeso(None if british else int(region) if region.isdigit() else region)
    try:
        return WattTime(region) if name == "watttime" else ElectricityMaps(region)
    except ArgumentError as error:
        with options_named(_OPTIONS):  # a region that can't be raises here, with any key
            WattTime(region, username="-", password="-") if name == "watttime" else ElectricityMaps(region, token="-")  # noqa: S106
        return _Keyless(in_options(str(error), _OPTIONS))


@final
@dataclass(frozen=True, slots=True)
class _Keyless:
    """A grid that can't be asked, for want of a key."""

    why: str

    def forecast(self, _start_unix_ns: int, _end_unix_ns: int) -> NoReturn:
        """Tells what is missing, and the line that mends it.

        Raises:
            IntensityError: always.
        """
        raise IntensityError(self.why)


# ── the answer ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def ask(grids: dict[str, Any], job: Job, now_unix_ns: int) -> Answer:
    """Looks ahead in each region and plans. A region that can't be used is left out, with the reason; without the first there is no plan.

    Raises:
        ArgumentError: the job can't be done in time, or one of its numbers is wrong.
    """
    with suppress(IntensityError):
        _planned({"": ()}, job, now_unix_ns)  # the arguments are looked at first
    ahead: dict[str, tuple[IntensityPoint, ...]] = {}
    methods: dict[str, str] = {}
    problems: list[str] = []
    home, present_alone = next(iter(grids)), False
    for name, provider in grids.items():
        try:
            seen = outlook(provider, now_unix_ns, now_unix_ns + s_to_ns(job.within_s))
            _planned({name: seen.points}, replace(job, interruptible=False), now_unix_ns)
        except IntensityError as error:
            problems.append(f"{name}: {in_options(str(error), _OPTIONS)}")
            present_alone |= name == home and error.final
            continue
        ahead[name], methods[name] = seen.points, seen.method
        if seen.why:
            problems.append(f"{name}: {seen.method} stands in for a forecast: {in_options(seen.why, _OPTIONS)}")
    plans: tuple[Plan, ...] = ()
    if home in ahead:
        try:
            plans = _planned(ahead, job, now_unix_ns)
        except IntensityError as error:  # the regions can't be compared
            problems.append(f"only {home} is planned for: {in_options(str(error), _OPTIONS)}")
            plans = _planned({home: ahead[home]}, job, now_unix_ns)
    return Answer(
        job,
        now_unix_ns,
        tuple(replace(one, method=methods[one.region]) for one in plans),
        ahead,
        tuple(problems),
        present_alone,
    )


def _planned(ahead: dict[str, tuple[IntensityPoint, ...]], job: Job, now_unix_ns: int) -> tuple[Plan, ...]:
    return plan_regions(
        ahead,
        job.duration_s,
        job.within_s,
        job.interruptible,
        resume_overhead=job.resume_overhead_s,
        queue_delay=job.queue_delay_s,
        power=job.power_w,
        now=now_unix_ns,
        asked=now_unix_ns,
    )


def complain(answer: Answer) -> None:
    """Says on stderr what is missing."""
    for problem in answer.problems:
        _say(problem)
    if answer.best is None:
        _say("nothing is known ahead, so the answer is: now")


def write(answer: Answer, form: str, console: Console) -> None:
    """Prints the answer: for a person, for ``sbatch --begin=``, as a time, or as JSON.

    Raises:
        ArgumentError: no such format.
    """
    match form:
        case "human":
            _show(answer, console)
        case "slurm":  # in the cluster's local time, without an offset; a time in the past is at once
            print(_local(answer.release_unix_ns, "%Y-%m-%dT%H:%M") if answer.best else "now")  # noqa: T201
        case "iso":
            print(_stamp(answer.release_unix_ns))  # noqa: T201
        case "json":
            print(json.dumps(as_json(answer), indent=2, ensure_ascii=False, allow_nan=False))  # noqa: T201
        case _:
            raise ArgumentError(f"--format {form!r}: use one of {', '.join(FORMATS)}")


def as_json(answer: Answer) -> dict[str, Any]:
    """Everything for a program to read. ``start`` to ``saving`` are those of what is advised: where waiting is not worth it, now."""
    best, job = answer.best, answer.job
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "now": _stamp(answer.now_unix_ns),
        "deadline": _stamp(answer.now_unix_ns + s_to_ns(job.within_s)),
        "hours": job.duration_s / S_PER_HOUR,
        "worth_it": answer.worth_it,
        "min_saving": job.min_saving,
        "problems": list(answer.problems),
    }
    if best is None:
        end_ns = answer.now_unix_ns + s_to_ns(job.duration_s)
        return content | {
            "method": None,
            "region": None,
            "release": _stamp(answer.now_unix_ns),
            "start": _stamp(answer.now_unix_ns),
            "end": _stamp(end_ns),
            "intervals": [{"start": _stamp(answer.now_unix_ns), "end": _stamp(end_ns), "g_per_kwh": None}],
            "emissions_g_per_kw": None,
            "baseline_g_per_kw": None,
            "saving": None,
            "regions": [],
        }
    told = _plan_json(best)
    if not answer.worth_it:
        told |= _now_json(answer, best)
    return content | told | {"regions": [_plan_json(one) for one in answer.plans]}


def _plan_json(one: Plan) -> dict[str, Any]:
    return {
        "region": one.region,
        "source": one.source,
        "kind": one.kind,
        "method": one.method,
        "horizon_h": one.horizon_s / S_PER_HOUR,
        "age_s": one.age_s,
        "release": _stamp(one.release_unix_ns),
        "start": _stamp(one.start_unix_ns),
        "end": _stamp(one.end_unix_ns),
        "intervals": [_interval_json(part) for part in one.intervals],
        "baseline": one.baseline,
        "emissions_g_per_kw": one.emissions_g_per_kw,
        "baseline_g_per_kw": one.baseline_g_per_kw,
        "saving": one.saving,
        "power_w": one.power_w,
        "saving_g": one.saving_g,
    }


def _interval_json(part: Interval) -> dict[str, Any]:
    return {
        "start": _stamp(part.start_unix_ns),
        "end": _stamp(part.end_unix_ns),
        "g_per_kwh": part.g_per_kwh,
        "resume_s": part.overhead_s,
    }


def _now_json(answer: Answer, best: Plan) -> dict[str, Any]:
    """Starting now, in the region that the baseline is of."""
    start_ns = answer.now_unix_ns + s_to_ns(answer.job.queue_delay_s)
    end_ns = start_ns + s_to_ns(answer.job.duration_s)
    mean = best.baseline_g_per_kw * S_PER_HOUR / answer.job.duration_s
    return {
        "region": next(iter(answer.ahead)),
        "release": _stamp(answer.now_unix_ns),
        "start": _stamp(start_ns),
        "end": _stamp(end_ns),
        "intervals": [_interval_json(Interval(start_ns, end_ns, mean))],
        "emissions_g_per_kw": best.baseline_g_per_kw,
        "saving": 0.0,
        "saving_g": None if best.power_w is None else 0.0,
    }


def _show(answer: Answer, console: Console) -> None:
    from rich.text import Text

    best, job = answer.best, answer.job
    if best is None:
        console.print("Start now: nothing is known ahead.")
        return
    if answer.worth_it:
        words = f"Start at {_local(best.start_unix_ns)}"
        if best.release_unix_ns != best.start_unix_ns:
            words += f", hand it to the queue at {_local(best.release_unix_ns)}"
        words += f", done at {_local(best.end_unix_ns)}" + (f", in {best.region}" if len(answer.plans) > 1 else "")
        console.print(Text(words, style="bold green"))
    else:
        gain = f"{percent(best.saving)} at best" + (
            f", less than the {percent(job.min_saving)} of --min-saving" if best.saving > 0 else ""
        )
        console.print(Text(f"Start now: waiting saves {gain}.", style="bold"))
        if best.saving > 0:
            console.print(
                f"  The best window, marked below, is from {_local(best.start_unix_ns)} on: it saves too little to wait for."
            )
    work = "" if job.power_w is not None else f" per kW drawn for the {job.duration_s / S_PER_HOUR:g} h"
    figures = (
        f"{_grams(best, best.emissions_g_per_kw)} in place of {_grams(best, best.baseline_g_per_kw)}{work}, for {best.baseline}"
    )
    console.print(
        f"  {figures}: {_against(best.saving)}, by {best.method} ({best.source}; {best.kind}), known {best.horizon_s / S_PER_HOUR:.3g} h "
        f"ahead; {job.duration_s / S_PER_HOUR:g} h of work within {job.within_s / S_PER_HOUR:g} h"
    )
    if best.horizon_s < job.within_s - 1:
        console.print("  What lies beyond is not known: ask again later, or let `green-torch wait` do it.")
    if len(best.intervals) > 1:
        for part in best.intervals:
            resumes = f", {part.overhead_s:.0f} s of it to resume" if part.overhead_s else ""
            console.print(
                f"  {_local(part.start_unix_ns)} to {_local(part.end_unix_ns)}  {part.g_per_kwh:.0f} gCO2e/kWh{resumes}"
            )
    for other in answer.plans if len(answer.plans) > 1 else ():
        console.print(
            f"  {other.region:<16} {_local(other.start_unix_ns)}  {_grams(other, other.emissions_g_per_kw)}  {_against(other.saving)}"
        )
    for line in plot(answer.ahead[best.region], best):
        console.print(line, no_wrap=True, crop=False)


def _grams(one: Plan, g_per_kw: float) -> str:
    return grams(g_per_kw if one.power_w is None else g_per_kw * one.power_w / 1000.0)


def _against(saving: float) -> str:
    return f"{percent(saving)} saved" if saving >= 0 else f"{percent(-saving)} more"


def plot(points: Sequence[IntensityPoint], one: Plan) -> list[Text]:
    """The intensity from now on as columns, those at work in green, with the scale and the times."""
    from rich.text import Text

    until_ns = min(one.deadline_unix_ns, one.now_unix_ns + s_to_ns(one.horizon_s))
    edges = [one.now_unix_ns + (until_ns - one.now_unix_ns) * k // _COLUMNS for k in range(_COLUMNS + 1)]
    times = sorted((point.time_unix_ns or 0, point.g_per_kwh) for point in points)
    means = []
    for left, right in itertools.pairwise(edges):
        within = [value for at, value in times if left <= at < right]
        before = [value for at, value in times if at <= left][-1:]
        found = within + before if within else before or [times[0][1]]
        means.append(sum(found) / len(found))
    low, high = min(means), max(means)
    blocks = " ▁▂▃▄▅▆▇█"
    levels = [1 + round((value - low) / (high - low or 1.0) * (8 * _ROWS - 1)) for value in means]
    middles = [(left + right) // 2 for left, right in itertools.pairwise(edges)]
    chosen = [any(part.start_unix_ns <= at < part.end_unix_ns for part in one.intervals) for at in middles]
    lines = []
    for row in range(_ROWS - 1, -1, -1):
        label = f"{high:7.0f} " if row == _ROWS - 1 else f"{low:7.0f} " if row == 0 else " " * 8
        line = Text(label)
        for level, picked in zip(levels, chosen, strict=True):
            line.append(blocks[max(0, min(8, level - 8 * row))], style="green" if picked else "bright_black")
        lines.append(line)
    lines[0].append(" gCO2e/kWh")
    lines.append(Text(" " * 8 + "".join("━" if picked else " " for picked in chosen), style="green"))
    first, last = _local(edges[0], "%a %H:%M"), _local(edges[-1], "%a %H:%M")
    lines.append(Text(" " * 8 + first + last.rjust(_COLUMNS - len(first))))
    return lines


# ── waiting ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def wait(
    grids: dict[str, Any],
    job: Job,
    command: Sequence[str],
    start_unix_ns: int,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> NoReturn:
    """Waits until the window, and becomes the command: signals and exit code are its own. Asks again each hour, as forecasts change.

    What waiting was planned to save is handed to the command by an environment variable, for the run that it starts. Where nothing is known
    ahead, but the present is, an online threshold on what was seen since tells when to start; with ``min_saving`` that is at once, since
    nobody knows what waiting would save.

    Args:
        grids: the one grid, by its name.
        job: what is to be done.
        command: what to run then.
        start_unix_ns: the present, or where a trace is entered; the time that really passes counts from there.
        sleep: how time passes.

    Raises:
        ArgumentError: an argument is wrong, or there is no such command; before any waiting.
    """
    program = shutil.which(command[0]) if command else None
    if program is None:
        raise ArgumentError(
            f"no such command: {command[0]!r}" if command else "wait for what? green-torch wait ... -- python train.py"
        )
    clock = _Clock(start_unix_ns)
    waiting = _Waiting(grids, job, clock.now_ns())
    while (until_ns := waiting.until(clock.now_ns())) is not None:
        _pass(clock, until_ns, sleep)
    environment = dict(os.environ)
    if waiting.put_off is not None:
        ended = replace(waiting.put_off, resume_unix_ns=clock.now_ns() + s_to_ns(job.queue_delay_s))
        environment[DEFERRAL] = handed(shifted(ended, time.time_ns() - clock.now_ns()))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(program, list(command), environment)  # noqa: S606 - the user's own command, no shell


class _Waiting:
    """How long to wait on. ``put_off``: what the first plan that was worth a wait promised."""

    def __init__(self, grids: dict[str, Any], job: Job, begin_ns: int) -> None:
        self._grids, self._job = grids, job
        self._deadline_ns = begin_ns + s_to_ns(job.within_s)
        self._watch = Observed(next(iter(grids.values())))
        self._release_ns: int | None = None
        self._asked_ns = -1  # when a plan was last asked for
        self.put_off: Deferral | None = None

    def until(self, now_ns: int) -> int | None:
        """Until when nothing is to be done; ``None``: start now."""
        job, first = self._job, self._asked_ns < 0
        left_s = ns_to_s(self._deadline_ns - now_ns)
        if left_s <= job.duration_s + job.queue_delay_s:
            if first:
                queued = f" and up to {_hours(job.queue_delay_s)} in the queue" if job.queue_delay_s else ""
                _say(
                    f"starting now: {_hours(job.duration_s)} of work{queued} within {_hours(job.within_s)} leave no time to wait "
                    "(--within gives more)"
                )
            return None
        if not first and now_ns >= (self._release_ns or self._deadline_ns):
            return None
        self._asked_ns = now_ns
        answer = ask(self._grids, replace(job, within_s=left_s), now_ns)
        if answer.best is None and self._release_ns is None:
            watches = answer.present_alone and not job.min_saving
            until_ns = self._watched(now_ns, left_s - job.queue_delay_s, answer.problems) if watches else None
            if until_ns is None and self.put_off is None:
                complain(answer)
            return until_ns
        if first:
            complain(answer)
        if answer.best is not None:
            self._take(answer, answer.best)
        if self._release_ns is None or self._release_ns <= now_ns:
            return None
        return min(self._release_ns, now_ns + s_to_ns(_ASK_AGAIN_S))

    def _take(self, answer: Answer, best: Plan) -> None:
        told_ns, self._release_ns = self._release_ns, answer.release_unix_ns
        if told_ns == self._release_ns or not answer.worth_it:
            return
        _say(f"starting at {_local(self._release_ns)}: {percent(best.saving)} saved against starting now ({best.method})")
        begin_ns = answer.now_unix_ns + s_to_ns(self._job.queue_delay_s)
        if self.put_off is None and self._release_ns > answer.now_unix_ns:
            where = {"stop_unix_ns": begin_ns, "resume_unix_ns": best.start_unix_ns, "baseline_unix_ns": begin_ns}
            named = replace(best, region=answer.ahead[best.region][0].region)  # as the provider calls it
            self.put_off = planned(named, _WAIT, **where)
        if self._release_ns > answer.now_unix_ns:
            _waits(ns_to_s(self._release_ns - answer.now_unix_ns))

    def _watched(self, now_ns: int, left_s: float, problems: tuple[str, ...]) -> int | None:
        """By an online threshold, where the grid tells its present at least: until when to look away; ``None``: start now."""
        job, watch = self._job, self._watch
        watch.look(now_ns)
        found = watch.threshold(now_ns, job.duration_s, left_s)
        if not watch.answers or (found is not None and found.runs):
            return None
        if self.put_off is None:
            for problem in problems:
                _say(problem)
            _say(f"nothing is known ahead: starting when the grid is cleaner than it is wont to be ({THRESHOLD})")
            _waits(max(0.0, left_s - job.duration_s), at_most=True)
            self.put_off = unplanned(
                watch.since(now_ns)[-1],
                _WAIT,
                begin_unix_ns=now_ns + s_to_ns(job.queue_delay_s),
                baseline="starting now",
                work_s=job.duration_s,
                resume_unix_ns=self._deadline_ns - s_to_ns(job.duration_s),
                deadline_unix_ns=self._deadline_ns,
            )
        return now_ns + s_to_ns(min(_WATCH_S, max(1.0, left_s - job.duration_s)))


def _pass(clock: _Clock, until_ns: int, sleep: Callable[[float], None]) -> None:
    """Sleeps, a minute at most at a time: the system's clock may be set, and a suspended machine's goes on without us."""
    while (left_ns := until_ns - clock.now_ns()) > 0:
        sleep(min(_LOOK_S, ns_to_s(left_ns)))


class _Clock:
    """The later of what the system's clock and the monotonic one say: neither a clock set back nor a machine that slept delays a job."""

    def __init__(self, start_unix_ns: int) -> None:
        self._wall_ns, self._steady_ns = time.time_ns(), time.monotonic_ns()
        self._start_ns = start_unix_ns

    def now_ns(self) -> int:
        """Unix nanoseconds: as much on from the start as has passed."""
        passed_ns = max(time.time_ns() - self._wall_ns, time.monotonic_ns() - self._steady_ns)
        return self._start_ns + passed_ns


def _waits(wait_s: float, *, at_most: bool = False) -> None:
    """Says how long this process will do nothing, by the clock on the wall: a trace stands in another time."""
    unit, length_s = ("h", S_PER_HOUR) if wait_s >= S_PER_HOUR else ("min", 60.0) if wait_s >= 60 else ("s", 1.0)
    told = f"{wait_s / length_s:.3g} {unit}"
    until = _local(time.time_ns() + s_to_ns(wait_s))
    _say(f"waiting {told}{' at most' if at_most else ''}, until {until}; Ctrl-C stops")


def _hours(duration_s: float) -> str:
    return f"{duration_s / S_PER_HOUR:.4g} h"


def _say(text: str) -> None:
    print(f"green-torch: {text}", file=sys.stderr, flush=True)  # noqa: T201  (a message for people)


def _stamp(time_unix_ns: int) -> str:
    return iso(time_unix_ns, "%Y-%m-%dT%H:%M:%S+00:00")


def _local(time_unix_ns: int, pattern: str = "%a %Y-%m-%d %H:%M %Z") -> str:
    return datetime.fromtimestamp(ns_to_s(time_unix_ns), UTC).astimezone().strftime(pattern)
