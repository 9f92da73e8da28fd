"""Sums, differences and shares of run totals: one weighted sum serves all three. Pure."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from green_torch.records import DomainEnergy, Phase, PhaseTotals, RunTotals
from green_torch.totals import sum_of_known

if TYPE_CHECKING:
    from collections.abc import Sequence

    from green_torch.records import Method

    Weighted = Sequence[tuple[float, Any]]

_COUNTS = ("n_steps", "samples", "tokens")
_AMOUNTS = ("facility_energy_j", "operational_g", "embodied_g", "emissions_g", "model_flops", "hardware_flops")


def combined(parts: Sequence[tuple[float, RunTotals]]) -> RunTotals:
    """The weighted sum of totals: weights of 1 add, -1 takes away, a fraction takes a share.

    What a part does not know adds nothing. Bounds are those of interval arithmetic; parts without any stand at face value, and where
    none has any the sum has none.
    """
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    phases: dict[Phase, list[tuple[float, PhaseTotals]]] = {}
    domains: dict[tuple[str, Method], list[tuple[float, DomainEnergy]]] = {}
    for weight, totals in parts:
        for phase in totals.phases:
            phases.setdefault(phase.phase, []).append((weight, phase))
        for domain in totals.domains:
            domains.setdefault((domain.name, domain.method), []).append((weight, domain))
    energy_j, lo_j, hi_j = _energy(parts)
    return RunTotals(
        tuple(_phase(phase, phases[phase]) for phase in Phase if phase in phases),
        tuple(_domain(name, method, domains[name, method]) for name, method in sorted(domains)),
        _sum(parts, "duration_s") or 0.0,
        energy_j,
        lo_j,
        hi_j,
        *(_sum(parts, name) for name in _AMOUNTS[:4]),
    )


def without_phase(totals: RunTotals, phase: Phase) -> RunTotals:
    """The totals without one phase. What its domains used is not known apart: it is taken from each by its share."""
    gone = totals.phase(phase)
    if gone not in totals.phases:
        return totals
    one = RunTotals(
        (gone,),
        (),
        gone.duration_s,
        gone.energy_j,
        gone.energy_lo_j,
        gone.energy_hi_j,
        gone.facility_energy_j,
        gone.operational_g,
        gone.embodied_g,
        gone.emissions_g,
    )
    rest = combined([(1, totals), (-1, one)])
    share = (rest.energy_j or 0.0) / totals.energy_j if totals.energy_j else 0.0
    return replace(
        rest,
        phases=tuple(own for own in totals.phases if own is not gone),
        domains=tuple(_domain(domain.name, domain.method, [(share, domain)]) for domain in totals.domains),
    )


def work_alone(totals: RunTotals) -> RunTotals:
    """Steps, units of work, FLOPs and time of the totals, without joules and grams."""
    phases = tuple(
        PhaseTotals(
            one.phase,
            one.n_steps,
            one.duration_s,
            one.samples,
            one.tokens,
            model_flops=one.model_flops,
            hardware_flops=one.hardware_flops,
        )
        for one in totals.phases
    )
    return RunTotals(phases, (), totals.duration_s)


def _phase(phase: Phase, parts: Sequence[tuple[float, PhaseTotals]]) -> PhaseTotals:
    counts = {name: None if (value := _sum(parts, name)) is None else round(value) for name in _COUNTS}
    energy_j, lo_j, hi_j = _energy(parts)
    return PhaseTotals(
        phase,
        counts["n_steps"] or 0,
        _sum(parts, "duration_s") or 0.0,
        counts["samples"],
        counts["tokens"],
        energy_j,
        lo_j,
        hi_j,
        *(_sum(parts, name) for name in _AMOUNTS),
    )


def _domain(name: str, method: Method, parts: Sequence[tuple[float, DomainEnergy]]) -> DomainEnergy:
    energy_j, lo_j, hi_j = _energy(parts)
    return DomainEnergy(name, energy_j or 0.0, lo_j, hi_j, method)


def _sum(parts: Weighted, name: str) -> float | None:
    return sum_of_known(None if (value := getattr(part, name)) is None else weight * value for weight, part in parts)


def _energy(parts: Weighted) -> tuple[float | None, float | None, float | None]:
    known = [(weight, part) for weight, part in parts if part.energy_j is not None]
    if not known:
        return None, None, None
    energy_j = math.fsum(weight * part.energy_j for weight, part in known)
    if all(part.energy_lo_j is None or part.energy_hi_j is None for _, part in known):
        return energy_j, None, None
    ends = [(weight, *_ends(part)) for weight, part in known]
    lo_j = math.fsum(weight * (lo if weight > 0 else hi) for weight, lo, hi in ends)
    hi_j = math.fsum(weight * (hi if weight > 0 else lo) for weight, lo, hi in ends)
    return energy_j, max(0.0, lo_j), hi_j


def _ends(part: Any) -> tuple[float, float]:
    if part.energy_lo_j is None or part.energy_hi_j is None:
        return part.energy_j, part.energy_j
    return part.energy_lo_j, part.energy_hi_j
