"""The report as a picture: energy and emissions by group, energy by month, and each run's MFU. Needs matplotlib."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from green_torch import ledger
from green_torch.cli.report import printable
from green_torch.errors import ArgumentError
from green_torch.units import S_PER_HOUR, ns_to_s

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from green_torch.cli.report import Report
    from green_torch.ledger import Group, Run

_MOST_GROUPS = 12
_NAME_CHARS = 28
_TICKS = 4
# Okabe and Ito's colours, told apart by colour-blind people too.
_GREEN, _ORANGE, _BLUE, _PURPLE, _RED = "#009E73", "#E69F00", "#0072B2", "#CC79A7", "#D55E00"


def save(report: Report, path: Path) -> None:
    """Draws the report into a file; its suffix tells the format (PNG, SVG, PDF).

    Raises:
        ArgumentError: matplotlib is not installed, or the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ArgumentError("pictures need matplotlib: pip install 'green-torch[plot]'") from None
    groups = _largest(report.groups)
    figure = Figure(figsize=(15, 5.0 + 0.5 * len(groups)), layout="constrained")
    (energy, emissions), (months, mfu) = figure.subplots(2, 2)
    _energy(energy, groups, report.by)
    _emissions(emissions, groups, report.by)
    _months(months, report)
    _mfu(mfu, report)
    for axes in (energy, emissions, months, mfu):
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"the picture can't be written to {path}: {error}") from error


def _largest(groups: Sequence[Group]) -> list[Group]:
    """The groups that used most, the others as one."""
    ordered = sorted(groups, key=lambda one: -(one.totals.energy_j or 0.0))
    if len(ordered) <= _MOST_GROUPS:
        return ordered
    shown, rest = ordered[: _MOST_GROUPS - 1], ordered[_MOST_GROUPS - 1 :]
    return [*shown, ledger.group(f"{len(rest)} others", [run for one in rest for run in one.runs])]


def _names(axes: Any, groups: Sequence[Group]) -> None:
    axes.set_yticks(range(len(groups)), [_name(one.name) for one in groups])
    axes.invert_yaxis()


def _name(text: str, chars: int = _NAME_CHARS) -> str:
    """As matplotlib prints it: a dollar sign would begin mathematics."""
    return printable(text, chars).replace("$", r"\$")


def _energy(axes: Any, groups: Sequence[Group], by: str) -> None:
    parts = (
        ("useful, or still running", _GREEN, [_wh(one.totals.energy_j) - _wh(one.wasted.energy_j) for one in groups]),
        ("failed or killed", _RED, [_wh(one.lost.energy_j) for one in groups]),
        ("done again, set up again", _ORANGE, [_wh(one.redone.energy_j) + _wh(one.restart.energy_j) for one in groups]),
    )
    _stacked(axes, parts)
    _names(axes, groups)
    axes.set(title=f"IT energy by {by}")
    _units(axes.xaxis, "Wh")


def _emissions(axes: Any, groups: Sequence[Group], by: str) -> None:
    bases = sorted({basis for one in groups for basis in one.operational_by_basis_g})
    parts = [
        (f"operational ({basis})", colour, [one.operational_by_basis_g.get(basis, 0.0) for one in groups])
        for basis, colour in zip(bases, (_BLUE, _PURPLE, _ORANGE, _RED, _GREEN) * len(bases), strict=False)
    ]
    if len(bases) <= 1:
        parts.append(("embodied", "0.6", [one.totals.embodied_g or 0.0 for one in groups]))
        _stacked(axes, parts)
        axes.set(title=f"Emissions by {by}, location-based")
    else:  # side by side: figures of different bases are not added up
        height = 0.8 / len(parts)
        for index, (label, colour, values) in enumerate(parts):
            axes.barh(
                [place - 0.4 + height * (index + 0.5) for place in range(len(values))],
                values,
                height,
                label=label,
                color=colour,
            )
        axes.set(title=f"Operational emissions by {by}: different bases, not added up")
        _legend(axes)
    _units(axes.xaxis, "gCO2e")
    _names(axes, groups)


def _stacked(axes: Any, parts: Sequence[tuple[str, str, list[float]]]) -> None:
    """Bars of several parts; a part that is nowhere is left out."""
    shown = [part for part in parts if any(part[2])] or parts[:1]
    left = [0.0] * len(parts[0][2])
    for label, colour, values in shown:
        axes.barh(range(len(values)), values, left=left, label=label, color=colour)
        left = [a + b for a, b in zip(left, values, strict=True)]
    if len(shown) > 1:
        _legend(axes)


def _units(axis: Any, unit: str) -> None:
    """A few ticks of any size with their unit: "350 mWh", "1.2 MWh"."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(_TICKS))
    axis.set_major_formatter(EngFormatter(unit))


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)


def _months(axes: Any, report: Report) -> None:
    months = ledger.grouped(report.ledger, "month")
    kinds = sorted({kind for one in months for kind in one.energy_by_kind_j})
    bottom = [0.0] * len(months)
    for (kind, method), colour in zip(kinds, (_BLUE, _PURPLE, _ORANGE, _GREEN, _RED) * len(kinds), strict=False):
        values = [_wh(one.energy_by_kind_j.get((kind, method))) for one in months]
        axes.bar(range(len(months)), values, bottom=bottom, label=f"{kind}, {method}", color=colour, width=0.6)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    axes.set_xticks(range(len(months)), [one.name for one in months], rotation=45 if len(months) > 6 else 0)
    axes.set(title="IT energy by month of the run's start (UTC)")
    _units(axes.yaxis, "Wh")
    if kinds:
        _legend(axes)


def _mfu(axes: Any, report: Report) -> None:
    runs = [run for run in report.whole.runs if run.mfu is not None]
    by_peak: dict[str, list[Run]] = {}
    for run in runs:
        by_peak.setdefault(", ".join(sorted({f"{peak.device} {peak.dtype}" for peak in run.manifest.peaks})), []).append(run)
    colours = (_BLUE, _PURPLE, _ORANGE, _GREEN, _RED)
    for index, (peak, own) in enumerate(sorted(by_peak.items())):
        axes.scatter(
            [datetime.fromtimestamp(ns_to_s(run.started_unix_ns), UTC) for run in own],
            [100 * (run.mfu or 0.0) for run in own],
            label=_name(peak, 2 * _NAME_CHARS),
            color=colours[index % len(colours)],
            s=16,
        )
    axes.set(title="MFU of each run, by its peak", ylabel="% of peak FLOP/s")
    if runs:
        axes.set_ylim(0, 110 * max(run.mfu or 0.0 for run in runs))
        _legend(axes)
        axes.tick_params(axis="x", rotation=30)
    else:
        axes.text(0.5, 0.5, "no run knows its FLOPs and its peak", ha="center", transform=axes.transAxes)


def _wh(energy_j: float | None) -> float:
    return (energy_j or 0.0) / S_PER_HOUR
