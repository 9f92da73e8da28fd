"""What the progress bar says of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from green_torch.units import grams, hours, si

if TYPE_CHECKING:
    from collections.abc import Mapping


def progress(values: Mapping[str, float], time_left_s: float | None) -> str:
    """Power, emissions of the run so far and what they will come to, and the time left: as far as each is known.

    ``values`` are the run's newest, by tag: of all ranks, and with what earlier segments used.
    """
    emissions = grams(values.get("green/emissions_total_gCO2e"))
    projected_g = values.get("green/projected_total_gCO2e")
    if projected_g is not None:
        emissions += f" of {grams(projected_g)}"
    left = "" if time_left_s is None else f", {hours(time_left_s)} left"
    return f"{si(values.get('green/power_W'), 'W')}, {emissions}{left}"
