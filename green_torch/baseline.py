"""The run that another is held against: its joules per unit of work, whether the two are alike, and what a saving would need."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from green_torch.processor import ARCHITECTURES
from green_torch.records import Manifest, kind_of

if TYPE_CHECKING:
    from green_torch.records import Method

SAME_BATCH = 0.01
"""Relative: a last batch that is not full is no other batch size."""

_NO_NAME = re.compile(r"package-\d+(-die-\d+)?|unknown CPU|")  # what RAPL and codecarbon call a CPU whose name isn't told


@dataclass(frozen=True, slots=True)
class Baseline:
    """The run that savings are measured against: the train energy of all its ranks per unit of work, bounded where the meters' is."""

    manifest: Manifest
    unit: str  # "token" | "sample" | "step"
    energy_per_unit_j: float
    units_per_step: float
    energy_per_unit_lo_j: float | None = None
    energy_per_unit_hi_j: float | None = None

    def __str__(self) -> str:
        """Its name and its figure: "fp32 (0.12 J/token)"."""
        return f"{self.manifest.label or self.manifest.run_name} ({self.energy_per_unit_j:.4g} J/{self.unit})"

    def doubts(self, own: Manifest, *, counts_unit: bool) -> list[str]:
        """Why a run has no saving against this one, and why it would be none of like with like; each with what mends it."""
        missing = []
        if own.planned_steps is None:
            missing.append("the length of the run is not known: give planned_steps=10_000, say")
        if not counts_unit:
            missing.append(f"its joules are per {self.unit}, and this run counts none: say tracker.step({self.unit}s=n)")
        found = [f"no saving is told against baseline {self}: {'; '.join(missing)}"] if missing else []
        if self.unit == "step" and not missing:
            found.append(
                f"against baseline {self} a step is taken for a step, whatever it holds: to compare what the same work takes, let both "
                "runs count it, tracker.step(tokens=n) or samples=n"
            )
        others = unlike(own, self.manifest)
        if others:
            found.append(
                f"the saving against baseline {self} is none of like with like: {'; '.join(others)}. Give baseline= the directory of a "
                "run of the same model, on the same device, with the same meters"
            )
        return found

    def doubts_batch(self, units_per_step: float) -> str:
        """Why this run's steps, of so many units on all ranks together, hold another amount of work; empty where they don't."""
        if self.unit == "step" or abs(units_per_step / self.units_per_step - 1) <= SAME_BATCH:
            return ""
        return (
            f"the saving against baseline {self} is one of another batch as well: {units_per_step:,.6g} {self.unit}s a step against "
            f"{self.units_per_step:,.6g}"
        )


# ── whether two runs are alike ─────────────────────────────────────────────────────────────────────────────────────────


def unlike(own: Manifest, base: Manifest) -> list[str]:
    """Why a run can't be held against another, by what both tell of themselves; what one of them doesn't tell is no reason."""
    return [
        f"{what} {_said(ours)} against {_said(theirs)}"
        for what, ours, theirs in (
            ("the model is", own.model, base.model),
            ("parameters are", own.parameters, base.parameters),
            ("the device is", _name(own.device), _name(base.device)),
            ("metered are", _metered(own, base), _metered(base, own)),
            ("joules are known by", _methods(own), _methods(base)),
            ("processes are", own.world_size, base.world_size),
        )
        if ours and theirs and ours != theirs
    ]


def untold(own: Manifest, base: Manifest) -> list[str]:
    """What of that nobody can check, since one of the two doesn't tell it."""
    facts = (("model", own.model, base.model), ("device", _name(own.device), _name(base.device)))
    return [
        *(what for what, ours, theirs in facts if not (ours and theirs)),
        *(f"{kind}'s name" for kind in sorted(_unnamed(own) | _unnamed(base))),
    ]


def _name(device: str) -> str:
    """A device's name; nothing for what many devices are called."""
    return "" if device in ARCHITECTURES or _NO_NAME.fullmatch(device) else device


def _unnamed(manifest: Manifest) -> set[str]:
    return {kind_of(domain.name) for domain in manifest.domains if not _name(domain.device)}


def _metered(own: Manifest, other: Manifest) -> tuple[str, ...]:
    """What a run metered, less the kinds of device that either leaves unnamed."""
    unnamed = _unnamed(own) | _unnamed(other)
    return tuple(sorted(domain.device for domain in own.domains if kind_of(domain.name) not in unnamed))


def _methods(manifest: Manifest) -> tuple[tuple[str, Method], ...]:
    return tuple(sorted((kind_of(domain.name), domain.method) for domain in manifest.domains))


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(" by ".join(part) if isinstance(part, tuple) else str(part) for part in value)
    return f"{value:,}" if isinstance(value, int) else str(value)
