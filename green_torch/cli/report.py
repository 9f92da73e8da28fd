"""``green-torch report DIR…``: what the runs below some directories used, emitted and wasted.

:func:`examine` reads; :func:`sections` puts what was found in words, which :func:`show` prints and :func:`markdown` writes. Exports for
programs and papers are in :mod:`green_torch.cli.report_exports` and :mod:`green_torch.cli.report_codecarbon`, the plots in
:mod:`green_torch.cli.report_plot`.
"""

from __future__ import annotations

import gc
import io
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from green_torch import ledger
from green_torch.cli.console import HOW_KNOWN, bounded, grid_line, percent, sensor_note
from green_torch.cli.options import share
from green_torch.errors import ArgumentError, LedgerError
from green_torch.ledger import Detail, FailedShare, Group, Ledger, Run, Segment, Status
from green_torch.processor import ARCHITECTURES
from green_torch.records import Method, RunTotals
from green_torch.units import S_PER_HOUR, grams, kwh, ns_to_s, si

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from green_torch.records import Domain, Embodied

FORMATS = ("table", "markdown", "csv", "json", "png", "model-card", "codecarbon", "paper")
_FILE_WIDTH = 160
_NAME_CHARS = 60
_SHOWN = 20  # files left out, or notes: so many are listed
_NONE = "–"


@dataclass(frozen=True, slots=True)
class Report:
    """What was found: the runs, in groups and as one; ``details`` by run id where every record was read."""

    by: str
    ledger: Ledger
    groups: tuple[Group, ...]
    whole: Group
    failed: FailedShare
    details: Mapping[str, Detail]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report: a title, a table (the last ``n_totals`` rows are sums) and notes."""

    title: str
    headings: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    n_totals: int = 0


def examine(
    directories: Sequence[Path],
    *,
    by: str = "project",
    since: str | None = None,
    until: str | None = None,
    detail: bool = False,
    target_failed_share: str | None = None,
) -> Report:
    """Reads the runs below the directories that began between two dates.

    ``since`` and ``until`` are ISO dates or times, in UTC unless they say otherwise; a date means the whole day. ``detail`` reads every
    record.

    Raises:
        ArgumentError: no such directory, grouping, date or share.
    """
    target = None if target_failed_share is None else fraction(target_failed_share)
    begin, end = _instant(since, end=False), _instant(until, end=True)
    with _no_garbage():
        found = ledger.read(directories).select(lambda run: begin <= ns_to_s(run.started_unix_ns) < end)
        groups = ledger.grouped(found, by)
        whole = ledger.group("all", found.runs)
    failed = ledger.failed_share(whole, target)
    details: dict[str, Detail] = {}
    skipped = list(found.skipped)
    for run in found.runs if detail else ():
        try:
            details[run.run_id] = ledger.detail(run)
        except LedgerError as error:
            skipped.append(ledger.Skipped(run.segments[0].path, f"its records are not shown: {error}"))
    return Report(by, ledger.Ledger(found.runs, tuple(skipped)), groups, whole, failed, details)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Without looking for cycles among records, which make none: of 10,000 runs it takes a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def fraction(text: str) -> float:
    """A share as people type it: "5%" and "0.05" are 0.05.

    Raises:
        ArgumentError: neither.
    """
    value = share(text)
    if not 0 <= value < math.inf:
        raise ArgumentError(f"{text!r} is no share: type 5% or 0.05")
    return value


def _instant(text: str | None, *, end: bool) -> float:
    """Unix seconds; without a text, the far end."""
    if text is None:
        return math.inf if end else -math.inf
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ArgumentError(f"{text!r} is no date: type 2026-01-31, or 2026-01-31T12:00+01:00") from None
    if end and at.time() == time.min and not re.search(r"\d[T ]\d", text):
        at += timedelta(days=1)
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def printable(text: str, chars: int | None = None) -> str:
    """A name as it can be printed anywhere: one line, no control, bidirectional or broken characters, at most so long."""
    clean = (
        text if text.isprintable() else "".join(char if char.isprintable() else " " if char.isspace() else "�" for char in text)
    )
    return clean if chars is None or len(clean) <= chars else clean[: chars - 1] + "…"


def hardware(run: Run) -> str:
    """What the run's last start ran on: "8 × NVIDIA H100 80GB HBM3"."""
    last = [one.manifest for one in run.segments if one.ended_unix_ns >= run.segments[-1].manifest.started_unix_ns]
    devices = Counter(
        domain.device or domain.name for manifest in last for domain in manifest.domains if domain.name.startswith("gpu")
    )
    if not devices:  # a GPU that nobody could meter
        devices = Counter(manifest.device for manifest in last if manifest.device and manifest.device not in ARCHITECTURES)
    if not devices:
        devices = Counter(domain.device for manifest in last for domain in manifest.domains if domain.name.startswith("cpu"))
    return ", ".join(f"{number} × {device}" if number > 1 else device for device, number in devices.items() if device)


def sections(report: Report) -> Iterator[Section]:
    """The report in words, part by part."""
    whole = report.whole
    if not whole.runs:
        yield Section(
            "No runs found",
            notes=("A run leaves its files under <log_dir>/green/: give the directory that holds the log_dirs.",),
        )
    else:
        yield _used(report)
        yield _energy(whole)
        yield _emissions(whole)
        yield _waste(report)
        if any(run.deferrals for run in whole.runs):
            yield _put_off(whole)
        if whole.functional_units:
            yield _sci(whole)
        if report.details:
            yield from _detailed(report)
        notes = [
            f"{printable(run.name, _NAME_CHARS)} ({run.run_id}): {printable(note)}" for run in whole.runs for note in run.notes
        ]
        if notes:
            yield Section("What is missing or uncertain", notes=tuple(_first(notes)))
    if report.ledger.skipped:
        left_out = [f"{printable(str(one.path))}: {printable(one.reason)}" for one in report.ledger.skipped]
        yield Section(f"Left out: {len(left_out)}", notes=tuple(_first(left_out)))


def _used(report: Report) -> Section:
    whole = report.whole
    groups = (*report.groups, whole) if len(report.groups) > 1 else report.groups
    methods = {method for _, method in whole.energy_by_kind_j}
    notes = [
        "Energy is IT energy, in brackets its bounds where joules were counted; wasted is part of it. Emitted in operation, + embodied.",
        *([sensor_note(_domains(whole))] if Method.COUNTER in methods and sensor_note(_domains(whole)) else []),
    ]
    if any(not group.one_basis for group in groups):
        notes.append("Operational emissions are not summed where their grid figures differ in basis: see Emissions.")
    if any(group.mfu is None and any(run.mfu is not None for run in group.runs) for group in groups):
        notes.append("MFUs over different peaks don't compare, so they have no mean: --by run shows each.")
    return Section(
        f"{_plural(len(whole.runs), 'run')} by {report.by}",
        (report.by, "runs", "energy", "wasted", "modelled", "emitted", "MFU"),
        tuple(_group_row(group, report.by if group is not whole else "all") for group in groups),
        tuple(notes),
        n_totals=len(groups) - len(report.groups),
    )


def _group_row(group: Group, by: str) -> tuple[str, ...]:
    embodied_g = group.totals.embodied_g
    return (
        _named(group.runs[0], project=True) if by == "run" and len(group.runs) == 1 else printable(group.name, _NAME_CHARS),
        "\n".join(f"{group.counts[status]} {status}" for status in Status if group.counts[status]),
        energy_text(group.totals, between="\n"),
        _NONE if not group.wasted.energy_j else f"{kwh(group.wasted.energy_j)}\n{percent(group.wasted_share)}",
        percent(group.share_estimated),
        (grams(group.operational_g) if group.one_basis else "several bases")
        + ("" if embodied_g is None else f"\n+ {grams(embodied_g)}"),
        _NONE if group.mfu is None else percent(group.mfu),
    )


def made_text(embodied: Embodied) -> str:
    """What making the devices emitted, with its spread: "328 kgCO2e (328 to 1150)"; one without any says so."""
    lo, hi = embodied.manufacturing_lo_kg, embodied.manufacturing_hi_kg
    spread = "spread not known" if lo is None or hi is None else f"{lo:.4g} to {hi:.4g}"
    return f"{embodied.manufacturing_kg:.4g} kgCO2e ({spread})"


def energy_text(totals: RunTotals, *, between: str = " ") -> str:
    """Watt-hours with their bounds: "98.8 Wh (98.7 to 98.9)"."""
    value, lo, hi = (
        None if joules is None else joules / S_PER_HOUR for joules in (totals.energy_j, totals.energy_lo_j, totals.energy_hi_j)
    )
    return bounded(value, lo, hi, lambda wh: si(wh, "Wh"), between=between)


def _energy(whole: Group) -> Section:
    total = sum(whole.energy_by_kind_j.values())
    rows = tuple(
        (printable(kind, _NAME_CHARS), HOW_KNOWN[method], kwh(joules), percent(joules / total if total else None))
        for (kind, method), joules in whole.energy_by_kind_j.items()
    )
    sums = [("IT", "the domains together", kwh(whole.totals.energy_j), "")]
    sums.append(("facility", "IT energy × PUE", kwh(whole.totals.facility_energy_j), ""))
    missing = _once(
        "Looked for and not readable", (why for run in whole.runs for one in run.segments for why in one.manifest.missing)
    )
    return Section("Energy", ("domain", "how it is known", "energy", "share"), (*rows, *sums), tuple(missing), n_totals=2)


def _emissions(whole: Group) -> Section:
    rows = [(f"operational ({name})", grams(value)) for name, value in whole.operational_by_basis_g.items()]
    rows.append(
        (
            "embodied",
            "not counted: no run tells the devices' footprint"
            if whole.totals.embodied_g is None
            else bounded(whole.totals.embodied_g, *whole.embodied_span_g, grams),
        )
    )
    totals = (
        [("both", grams(whole.emissions_g))] if whole.emissions_g is not None and whole.totals.embodied_g is not None else []
    )
    manifests = [segment.manifest for run in whole.runs for segment in run.segments]
    notes = [
        *_once("Grid", (grid_line(one.intensity) for one in manifests)),
        *_once("PUE", (f"{one.pue:g} ({one.pue_source})" for one in manifests)),
        *_once(
            "Embodied",
            (
                f"{made_text(one.embodied)} over {one.embodied.lifetime_years:g} years at "
                f"{percent(one.embodied.expected_utilization)} use ({one.embodied.source})"
                for one in manifests
                if one.embodied
            ),
        ),
    ]
    if not whole.one_basis:
        notes.insert(0, "Grid figures of different bases are not added up.")
    return Section("Emissions, location-based", ("part", "gCO2e"), tuple(rows + totals), tuple(notes), n_totals=len(totals))


def _once(what: str, texts: Iterable[str]) -> list[str]:
    """Each text once, with the number of files that say it where they differ."""
    found = Counter(map(printable, texts))
    if len(found) == 1:
        return [f"{what}: {next(iter(found))}."]
    return [f"{what}: {text} ({_plural(number, 'file')})." for text, number in found.most_common(_SHOWN)]


def _waste(report: Report) -> Section:
    whole, failed = report.whole, report.failed
    total = whole.totals.energy_j
    rows = tuple(
        (
            name,
            kwh(part.energy_j or 0.0),
            percent((part.energy_j or 0.0) / total if total else None),
            grams(part.emissions_g or 0.0) if whole.one_basis else _NONE,
        )
        for name, part in (
            ("runs that failed or were killed", whole.lost),
            ("steps done again after a resume", whole.redone),
            ("set-up after a resume", whole.restart),
            ("together", whole.wasted),
        )
    )
    notes = [
        (
            f"{failed.n_lost} of {_plural(failed.n_ended, 'run')} that ended failed or were killed: {percent(failed.share)} of them, "
            f"{percent(failed.energy_share)} of their energy."
        )
    ]
    if failed.target is not None and failed.saved_energy_j is not None:
        grid = "" if failed.saved_g is None else f" and {grams(failed.saved_g)}"
        notes.append(
            f"Were it {100 * failed.target:g} %: {kwh(failed.saved_energy_j)}{grid} less, if a failed run goes on costing "
            f"{kwh((whole.lost.energy_j or 0.0) / failed.n_lost)}, the mean so far, and the others stay as they are."
        )
    elif failed.target is not None:
        notes.append(f"Were it {100 * failed.target:g} %, nothing would be saved: no run failed or was killed.")
    notes.append(
        "A run without an end that has written nothing for 15 minutes (longer where its records are longer) reads as killed."
    )
    return Section("Wasted", ("", "energy", "of all", "gCO2e"), rows, tuple(notes), n_totals=1)


def _put_off(whole: Group) -> Section:
    """What was put off for a cleaner grid: planned against realised, each by its own baseline."""
    rows = []
    for run in whole.runs:
        for one in run.deferrals:
            slack_s = ns_to_s(one.deadline_unix_ns - one.baseline_unix_ns) - one.work_s
            idle = f"\nidle draw {one.idle_share:.0%} of that at work, {one.idle_basis}" if one.idle_basis else ""
            rows.append(
                (
                    _named(run),
                    f"{utc_minute(one.stop_unix_ns)} to\n{utc_minute(one.resume_unix_ns)}\n{one.policy}",
                    _saving_text(one.planned_saving, one.planned_g_per_kwh, one.planned_baseline_g_per_kwh) + idle,
                    _saving_text(one.realised_saving, one.realised_g_per_kwh, one.realised_baseline_g_per_kwh)
                    + (
                        f"\n{printable(one.unknown)}"
                        if one.realised_work_s is None
                        else f"\nover {one.realised_work_s / S_PER_HOUR:.3g} h of work"
                    ),
                    f"{one.baseline}\nfrom {utc_minute(one.baseline_unix_ns)}, slack {slack_s / S_PER_HOUR:.3g} h",
                    printable(f"{one.region}: {one.method}, {one.kind}, {one.source}"),
                )
            )
    return Section(
        "Put off for a cleaner grid",
        ("run", "from, to (UTC)", "planned saving", "realised saving", "against", "grid"),
        tuple(rows),
        (
            (
                "Fractions of the baseline's emissions at a constant draw at work, in brackets both as gCO2e per kW and useful hour; "
                "realised: by the same provider's figures after the fact. Savings of one run overlap, each from its own plan on: the first is "
                "the run's."
            ),
        ),
    )


def _saving_text(saving: float | None, g_per_kwh: float | None, baseline_g_per_kwh: float | None) -> str:
    if saving is None:
        return "not known"
    return f"{percent(saving)} ({g_per_kwh:.0f} against {baseline_g_per_kwh:.0f})"


def utc_minute(unix_ns: int) -> str:
    """An instant to the minute: "2026-01-31 12:00"."""
    return datetime.fromtimestamp(ns_to_s(unix_ns), UTC).strftime("%Y-%m-%d %H:%M")


def _sci(whole: Group) -> Section:
    rows = tuple(
        (f"per {unit}", grams(whole.sci_g(unit)), f"{whole.counts[Status.COMPLETED] if unit == 'run' else whole.units[unit]:,}")
        for unit in whole.functional_units
    )
    missing = "" if whole.totals.embodied_g is not None else " M is not counted here, so it is too low."
    return Section(
        "Software Carbon Intensity (GSF, ISO/IEC 21031)",
        ("", "gCO2e", "useful units"),
        rows,
        (
            f"(E × I + M) / R: all emissions, wasted work included, over the work that counts; per run: over those that completed.{missing}",
        ),
    )


def _detailed(report: Report) -> Iterator[Section]:
    rows = []
    for run in report.whole.runs:
        seen = report.details.get(run.run_id)
        if seen is None:
            continue
        flags = ", ".join(f"{printable(flag)} {number}" for flag, number in seen.flags)
        lo, hi = seen.intensity_lo_g_per_kwh, seen.intensity_hi_g_per_kwh
        rows.append(
            (
                _named(run),
                f"{seen.n_records:,}",
                kwh(seen.energy_j),
                _NONE if lo is None or hi is None else f"{lo:.0f} to {hi:.0f} g/kWh" if lo < hi else f"{lo:.0f} g/kWh",
                flags or _NONE,
            )
        )
    yield Section(
        "Records",
        ("run", "records", "their energy", "grid", "flags (records)"),
        tuple(rows),
        ("The records' energy can fall short of the totals where a sink was too slow for some of them.",),
    )
    segments = tuple(
        (
            f"{_named(run)}\nrank {one.manifest.rank}, start {one.manifest.segment}",
            str(one.status) + (", cut short" if one.torn else ""),
            _NONE if one.last_step is None else str(one.last_step),
            _NONE if one.redone_after_step is None else f"after {one.redone_after_step}",
            kwh(one.totals.energy_j),
            kwh(_useful_j(run, one)),
            "\n".join(f"{phase.phase} {kwh(phase.energy_j)}" for phase in one.totals.phases),
        )
        for run in report.whole.runs
        for one in run.segments
    )
    yield Section("Files", ("file", "status", "last step", "done again", "energy", "useful", "phases"), segments)


def _useful_j(run: Run, one: Segment) -> float | None:
    """Nothing of a run that is lost, or of a start whose every step was done again."""
    return 0.0 if run.lost or one.status is Status.SUPERSEDED else one.useful.energy_j


def _named(run: Run, *, project: bool = False) -> str:
    """A run in a table: its name, and its id on a line of its own."""
    return f"{printable(f'{run.project}/{run.name}' if project else run.name, _NAME_CHARS)}\n{run.run_id}"


def _domains(whole: Group) -> list[Domain]:
    return list({domain.name: domain for run in whole.runs for domain in run.manifest.domains}.values())


def _first(lines: Sequence[str]) -> Iterator[str]:
    yield from lines[:_SHOWN]
    if len(lines) > _SHOWN:
        yield f"… and {len(lines) - _SHOWN} more: --format json lists all"


def _plural(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def write(report: Report, form: str, output: Path | None, *, training_type: str | None = None) -> None:
    """Writes the report in one of :data:`FORMATS`, to a file or to stdout.

    Raises:
        ArgumentError: an unknown format, a picture without a file, or a file that can't be written.
        LedgerError: the runs can't be summed in this format.
    """
    if form not in FORMATS:
        raise ArgumentError(f"--format {form!r}: use one of {', '.join(FORMATS)}")
    if form == "png":
        if output is None:
            raise ArgumentError("--format png needs a file: --output report.png")
        from green_torch.cli.report_plot import save

        save(report, output)
        return
    if form == "table" and output is None:
        show(report, Console(highlight=False))
        return
    text = _as_text(report, form, training_type)
    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"--output {str(output)!r} can't be written: {error.strerror}") from error


def _as_text(report: Report, form: str, training_type: str | None) -> str:
    from green_torch.cli import report_exports as exports
    from green_torch.cli.report_codecarbon import rows

    def table() -> str:
        console = Console(file=io.StringIO(), width=_FILE_WIDTH, highlight=False, color_system=None)
        with console.capture() as captured:
            show(report, console)
        return captured.get()

    forms: Mapping[str, Callable[[], str]] = {
        "table": table,
        "markdown": lambda: markdown(report),
        "csv": lambda: exports.csv_text(exports.run_rows(report)),
        "json": lambda: exports.json_text(report),
        "model-card": lambda: exports.model_card(report, training_type),
        "codecarbon": lambda: exports.csv_text(rows(report)),
        "paper": lambda: exports.paper(report),
    }
    return forms[form]()


def show(report: Report, console: Console) -> None:
    """Prints the report."""
    for index, section in enumerate(sections(report)):
        if index:
            console.print()
        console.print(Text(section.title, style="bold"))
        if section.headings:
            console.print(_table(section))
        for note in section.notes:
            console.print(Text(note, style="dim"), soft_wrap=True)


def _table(section: Section) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for heading in section.headings:  # with a least width of one of them rich makes tables that are too wide, and crops them
        table.add_column(Text(heading), overflow="fold")
    for index, row in enumerate(section.rows):
        if index == len(section.rows) - section.n_totals:
            table.add_section()
        table.add_row(*map(Text, row))
    return table


def markdown(report: Report) -> str:
    """The report as Markdown."""
    parts = []
    for section in sections(report):
        parts.append(f"## {_escaped(section.title)}\n")
        if section.headings:
            lines = [
                section.headings,
                tuple("---" for _ in section.headings),
                *(tuple(map(_cell, row)) for row in section.rows),
            ]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
        parts += [f"- {_escaped(note)}" for note in section.notes]
        parts.append("")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return "<br>".join(map(_escaped, text.split("\n")))


def _escaped(text: str) -> str:
    """Text that Markdown and HTML take for nothing but text."""
    return (
        re.sub(r"([\\`*_{}\[\]<>#|~!&$])", r"\\\1", printable(text))
        .replace("\\<", "&lt;")
        .replace("\\>", "&gt;")
        .replace("\\&", "&amp;")
    )
