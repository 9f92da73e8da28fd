"""A report for programs and papers: CSV, JSON, a Hugging Face model card's block, sentences for a paper."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import green_torch
from green_torch import ledger
from green_torch.cli.report import Report, energy_text, hardware, made_text, printable
from green_torch.errors import ArgumentError, LedgerError
from green_torch.records import Method, Phase
from green_torch.sinks.codec import plain
from green_torch.units import grams, joules_to_kwh, kwh, ns_to_s

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from green_torch.ledger import Group, Run
    from green_torch.records import Manifest

SCHEMA = "green_torch.report/1"
TRAINING_TYPES = ("pre-training", "fine-tuning")  # of a model card
_IN_A_SENTENCE = {
    Method.COUNTER: "by hardware counters",
    Method.SAMPLED: "by power readings, integrated",
    Method.ESTIMATED: "modelled, not measured",
}
_FORMULAS = ("=", "+", "-", "@")  # what a spreadsheet takes for the beginning of one


def csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV; the first one's keys are the columns. Text that a spreadsheet would run as a formula gets a quote before it."""
    rows = [{key: _cell(value) for key, value in row.items()} for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip().startswith(_FORMULAS) else text


def run_rows(report: Report) -> list[dict[str, Any]]:
    """One row a run, with the unit in each column's name, in the order of the report's groups."""
    return [run_row(run) for group in report.groups for run in group.runs]


def run_row(run: Run) -> dict[str, Any]:
    """A run's figures, flat. Energy is IT energy; what is not known is ``None``."""
    one, totals, grid = ledger.group(run.name, [run]), run.totals, run.manifest.intensity
    train = run.useful.phase(Phase.TRAIN)
    by_method = {
        f"{method}_energy_j": None
        if totals.energy_j is None
        else sum(domain.energy_j for domain in totals.domains if domain.method is method)
        for method in Method
    }
    embodied = run.manifest.embodied
    return {
        "run_id": run.run_id,
        "run_name": run.name,
        "project": run.project,
        "model": run.manifest.model,
        "status": str(run.status),
        "started_utc": utc(run.started_unix_ns),
        "ended_utc": utc(run.ended_unix_ns),
        "month": ledger.period(run),
        "duration_s": run.duration_s,
        "ranks": run.manifest.world_size,
        "files": len(run.segments),
        "hardware": hardware(run),
        "steps": run.n_steps,
        "tokens": train.tokens,
        "samples": train.samples,
        "energy_j": totals.energy_j,
        "energy_lo_j": totals.energy_lo_j,
        "energy_hi_j": totals.energy_hi_j,
        "facility_energy_j": totals.facility_energy_j,
        **by_method,
        "share_estimated": one.share_estimated,
        "useful_energy_j": run.useful.energy_j,
        "wasted_energy_j": run.wasted.energy_j or 0.0,
        "redone_energy_j": run.redone.energy_j or 0.0,
        "operational_g": one.operational_g,
        "basis": "; ".join(one.operational_by_basis_g),
        "region": grid.region if grid else None,
        "intensity_g_per_kwh": _mean_intensity(run),
        "intensity_source": grid.source if grid else None,
        "pue": run.manifest.pue,
        "pue_source": run.manifest.pue_source,
        "embodied_g": totals.embodied_g,
        "embodied_source": embodied.source if embodied else None,
        "emissions_g": one.emissions_g,
        "mfu": run.mfu,
        "hfu": run.hfu,
        "notes": "; ".join(run.notes),
    }


def utc(unix_ns: int) -> str:
    """An instant to the second: "2026-01-31T12:00:00+00:00"."""
    return datetime.fromtimestamp(round(ns_to_s(unix_ns)), UTC).isoformat()


def _mean_intensity(run: Run) -> float | None:
    """Of the grid, over the facility's energy."""
    facility_j, operational_g = run.totals.facility_energy_j, run.totals.operational_g
    return None if not facility_j or operational_g is None else operational_g / joules_to_kwh(facility_j)


def json_text(report: Report) -> str:
    """Everything for a program to read, a run or a group a line. A run's ``files`` are its ranks and starts."""
    parts: Mapping[str, Any] = {
        "schema": SCHEMA,
        "version": green_torch.__version__,
        "by": report.by,
        "all": _group(report.whole),
        "groups": map(_group, report.groups),
        "failed": {**plain(report.failed), "share": report.failed.share},
        "runs": (_run(run, report) for run in report.whole.runs),
        "left_out": ({"path": str(one.path), "reason": one.reason} for one in report.ledger.skipped),
    }
    return "{\n" + ",\n".join(f'"{name}": {_written(part)}' for name, part in parts.items()) + "\n}\n"


def _written(part: Any) -> str:
    if isinstance(part, Iterator):
        return "[" + ",".join(f"\n{_written(one)}" for one in part) + "]"
    return printable(json.dumps(part, ensure_ascii=False, allow_nan=False))


def _run(run: Run, report: Report) -> dict[str, Any]:
    return {
        **run_row(run),
        "notes": list(run.notes),
        "missing": sorted({why for one in run.segments for why in one.manifest.missing}),
        "wasted": plain(run.wasted),
        "put_off": [
            {**plain(one), "planned_saving": one.planned_saving, "realised_saving": one.realised_saving}
            for one in run.deferrals
        ],
        "files": [
            {
                "path": str(one.path),
                "rank": one.manifest.rank,
                "segment": one.manifest.segment,
                "status": str(one.status),
                "torn": one.torn,
                "last_step": one.last_step,
                "resumed_from_step": one.manifest.resumed_from_step,
                "redone_after_step": one.redone_after_step,
                "totals": plain(one.totals),
                "useful": plain(one.useful),
            }
            for one in run.segments
        ],
        "detail": plain(report.details[run.run_id]) if run.run_id in report.details else None,
    }


def _group(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "runs": [run.run_id for run in group.runs],
        "status": {str(status): number for status, number in group.counts.items()},
        "totals": plain(group.totals),
        "useful": plain(group.useful),
        "wasted_energy_j": group.wasted.energy_j or 0.0,
        "wasted_share": group.wasted_share,
        "wasted_by_cause_j": {
            "failed_or_killed": group.lost.energy_j or 0.0,
            "steps_done_again": group.redone.energy_j or 0.0,
            "set_up_again": group.restart.energy_j or 0.0,
        },
        "energy_by_domain_j": [
            {"domain": kind, "method": str(method), "energy_j": joules}
            for (kind, method), joules in group.energy_by_kind_j.items()
        ],
        "share_estimated": group.share_estimated,
        "operational_by_basis_g": dict(group.operational_by_basis_g),
        "operational_g": group.operational_g,
        "embodied_g": group.totals.embodied_g,
        "emissions_g": group.emissions_g,
        "mfu": group.mfu,
        "sci_g": {unit: group.sci_g(unit) for unit in group.functional_units},
    }


def model_card(report: Report, training_type: str | None = None) -> str:
    """The front matter of a Hugging Face model card: ``co2_eq_emissions`` in grams, all runs of the report together.

    Raises:
        ArgumentError: a training type that the Hub does not know.
        LedgerError: no emissions are known, or they rest on grid figures of different bases.
    """
    if training_type not in (None, *TRAINING_TYPES):
        raise ArgumentError(f"--training-type {training_type!r}: use one of {', '.join(TRAINING_TYPES)}")
    whole = _summed(report)
    grids = _distinct(whole, "region")
    pue = _listed(f"{one.pue:g}" for one in _manifests(whole))
    parts = [
        f"recorded with green_torch {green_torch.__version__} (energy of {_methods(whole)})",
        f"operational {grams(whole.operational_g)}, location-based, PUE {pue}, {_grid_text(whole)}",
        f"embodied {grams(whole.totals.embodied_g)}"
        if whole.totals.embodied_g is not None
        else "embodied emissions not counted",
        f"{len(whole.runs)} runs, wasted work included ({whole.wasted_share or 0:.1%} of the energy)"
        if len(whole.runs) > 1
        else "wasted work included",
    ]
    fields = {
        "emissions": float(f"{whole.emissions_g:.6g}"),
        "source": printable("; ".join(parts)),
        "training_type": training_type,
        "geographical_location": printable("; ".join(grids)),
        "hardware_used": printable(_listed(hardware(run) for run in whole.runs)),
    }
    lines = [f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items() if value]  # JSON is YAML
    return "\n".join(["---", "co2_eq_emissions:", *lines, "---", ""])


def paper(report: Report) -> str:
    """Sentences to paste in a paper: energy with its bounds, hardware, grid with source, PUE, method.

    Raises:
        LedgerError: no emissions are known, or they rest on grid figures of different bases.
    """
    whole = _summed(report)
    totals = whole.totals
    n_runs = len(whole.runs)
    lost = report.failed.n_lost
    where = _listed(hardware(run) for run in whole.runs) or "hardware that the runs do not name"
    how = f"recorded with green_torch {green_torch.__version__}: {_methods(whole)}"
    sentences = [f"{n_runs} training run{'s' if n_runs > 1 else ''} on {where} drew {energy_text(totals)} of IT energy, {how}."]
    running = sum(run.status is ledger.Status.RUNNING for run in whole.runs)
    if running:
        told = "1 of them has" if running == 1 else f"{running} of them have"
        sentences.append(
            f"{told} not told of an end yet: what {'it uses' if running == 1 else 'they use'} from now on is not in it."
        )
    gains = sorted({domain.gain_error for one in _manifests(whole) for domain in one.domains if domain.gain_error})
    if totals.energy_lo_j is not None:
        assumed = "The bounds follow from the counters' update times, with power between 0 and 1.5 times the device's limit"
        gain = f"; the sensors' gain error of up to {gains[-1]:.0%} comes on top" if gains else ""
        sentences.append(f"{assumed}{gain}.")
    if whole.wasted.energy_j:
        of_them = (
            f"{lost} run{'s that failed or were' if lost > 1 else ' that failed or was'} killed"
            if lost
            else "work done again after interruptions"
        )
        sentences.append(f"This includes {kwh(whole.wasted.energy_j)} ({whole.wasted_share or 0:.1%}) for {of_them}.")
    pues = _listed(f"{one.pue:g} ({one.pue_source})" for one in _manifests(whole))
    sentences.append(
        f"With a PUE of {pues} and a grid intensity of {_grid_text(whole)}, operational emissions (location-based) are "
        f"{grams(whole.operational_g)}."
    )
    embodied = _listed(
        f"{made_text(one.embodied)} of manufacturing over {one.embodied.lifetime_years:g} years at "
        f"{one.embodied.expected_utilization:.0%} use ({one.embodied.source})"
        for one in _manifests(whole)
        if one.embodied
    )
    sentences.append(
        "Embodied emissions are not counted."
        if totals.embodied_g is None
        else f"Embodied emissions are {grams(totals.embodied_g)}: {embodied}."
    )
    if whole.mfu is not None:
        sentences.append(f"Model FLOPs utilisation was {whole.mfu:.1%} ({_listed(whole.peaks)}).")
    return printable(" ".join(sentences)) + "\n"


def _summed(report: Report) -> Group:
    whole = report.whole
    if not whole.one_basis:
        raise LedgerError(
            f"the runs' grid figures differ in basis ({'; '.join(whole.operational_by_basis_g)}), and are not added up: give one "
            "project's directory, or --since and --until"
        )
    if whole.operational_g is None:
        raise LedgerError(
            "no emissions are known here: there is no run, or none whose energy could be read (green-torch doctor)"
        )
    return whole


def _methods(whole: Group) -> str:
    """How the joules are known: "gpu by hardware counters (85.7%), cpu modelled, not measured (14.3%)"."""
    total = sum(whole.energy_by_kind_j.values())
    return ", ".join(
        f"{kind} {_IN_A_SENTENCE[method]} ({joules / total if total else 0:.1%})"
        for (kind, method), joules in whole.energy_by_kind_j.items()
    )


def _grid_text(whole: Group) -> str:
    facility_j = whole.totals.facility_energy_j
    mean = f"{(whole.operational_g or 0.0) / joules_to_kwh(facility_j):.3g} gCO2e/kWh" if facility_j else "unknown intensity"
    regions, sources = _distinct(whole, "region"), _distinct(whole, "source")
    return f"{mean} ({_listed(regions) or 'no region told'}; {_listed(whole.operational_by_basis_g)}; {_listed(sources) or 'no source told'})"


def _distinct(whole: Group, name: str) -> list[str]:
    return list(dict.fromkeys(str(getattr(one.intensity, name)) for one in _manifests(whole) if one.intensity))


def _manifests(whole: Group) -> list[Manifest]:
    return [one.manifest for run in whole.runs for one in run.segments]


def _listed(texts: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(text for text in texts if text))
