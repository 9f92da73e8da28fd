"""From joules and FLOPs to grams, MFU and projections: pure arithmetic.

Operational emissions are ``energy × PUE × grid intensity`` (location-based, GHG Protocol Scope 2); embodied ones follow the Green
Software Foundation's SCI (ISO/IEC 21031), ``M = TE × time / lifetime``, with the device's idle time spread over its use. MFU is the
PaLM paper's (arXiv 2204.02311, appendix B): model FLOPs over what the peak would have done in the same time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from green_torch.units import G_PER_KG, HOURS_PER_YEAR, S_PER_HOUR, joules_to_kwh

if TYPE_CHECKING:
    from green_torch.records import Embodied


def facility_energy_j(energy_j: float, pue: float) -> float:
    """Joules drawn by the building for ``energy_j`` joules of IT energy."""
    return energy_j * pue


def operational_g(energy_j: float, pue: float, intensity_g_per_kwh: float) -> float:
    """gCO2e of running: IT joules × PUE × gCO2e/kWh."""
    return joules_to_kwh(facility_energy_j(energy_j, pue)) * intensity_g_per_kwh


def embodied_g(embodied: Embodied, duration_s: float) -> float:
    """gCO2e of manufacturing charged to ``duration_s`` seconds of use."""
    used_s = embodied.lifetime_years * HOURS_PER_YEAR * S_PER_HOUR * embodied.expected_utilization
    return embodied.manufacturing_kg * G_PER_KG * duration_s / used_s


def utilization(flops: float | None, duration_s: float, peak_flop_per_s: float | None) -> float | None:
    """MFU (of model FLOPs) or HFU (of hardware FLOPs), a fraction; ``None`` where FLOPs or peak are unknown."""
    if flops is None or peak_flop_per_s is None or duration_s <= 0:
        return None
    return flops / (duration_s * peak_flop_per_s)


def projected_total(so_far: float, per_step: float, around: float, done_steps: int, planned_steps: int) -> float | None:
    """The planned run's total: what was spent, and for each remaining step a typical one's and its share of what goes on around.

    ``around`` is what evaluation, saving and the like have used so far; set-up, which comes once, is in ``so_far`` alone. ``None``
    before the first step.
    """
    if done_steps <= 0:
        return None
    return so_far + (per_step + around / done_steps) * max(0, planned_steps - done_steps)


def saving(baseline_per_unit: float, own_per_unit: float, units: float) -> float:
    """What a planned amount of work saves against a baseline; negative where it costs more."""
    return (baseline_per_unit - own_per_unit) * units
