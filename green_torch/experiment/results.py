"""What is found: blocks, each variant's result, the comparison of them, and what follows for a planned run. Pure arithmetic.

A variant's figures are geometric means over its blocks: one block that something else disturbed weighs little, rates multiply and
divide as they should (joules per token over seconds per token is watts), and their ratio is the difference that is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from green_torch.errors import ArgumentError
from green_torch.experiment.variants import Variant
from green_torch.records import DevicePeak, Manifest, Method
from green_torch.statistics import Difference, mean_interval, paired_difference
from green_torch.units import S_PER_HOUR, joules_to_kwh


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive steps of one variant: sums over them, ``loss`` their mean. ``position`` is its place in the round.

    ``capacity_flops`` is the peak times the duration: what the device could have done.
    """

    round: int
    position: int
    n_steps: int
    duration_s: float
    energy_j: float | None
    energy_lo_j: float | None
    energy_hi_j: float | None
    emissions_g: float | None
    model_flops: float | None
    hardware_flops: float | None
    capacity_flops: float | None
    tokens: int | None
    samples: int | None
    loss: float
    peak_memory_bytes: int | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VariantResult:
    """What one variant did, over its measured blocks. ``error`` says what ended it early, if anything did."""

    variant: Variant
    blocks: tuple[Block, ...] = ()
    error: str | None = None
    manifest: Manifest | None = None
    warnings: tuple[str, ...] = ()
    threads: int | None = None
    log_dir: str | None = None

    @property
    def name(self) -> str:
        """The variant's."""
        return self.variant.name

    @property
    def n_steps(self) -> int:
        """Steps measured."""
        return sum(block.n_steps for block in self.blocks)

    @property
    def duration_s(self) -> float:
        """Seconds measured."""
        return math.fsum(block.duration_s for block in self.blocks)

    @property
    def step_time_s(self) -> float | None:
        """Seconds a step."""
        return self._typical("duration_s", "n_steps")

    @property
    def energy_per_step_j(self) -> float | None:
        """IT joules a step."""
        return self._typical("energy_j", "n_steps")

    @property
    def energy_per_token_j(self) -> float | None:
        """IT joules a token."""
        return self._typical("energy_j", "tokens")

    @property
    def energy_per_sample_j(self) -> float | None:
        """IT joules a sample."""
        return self._typical("energy_j", "samples")

    @property
    def emissions_per_step_g(self) -> float | None:
        """gCO2e a step, of facility energy and of manufacturing where that is known."""
        return self._typical("emissions_g", "n_steps")

    @property
    def power_w(self) -> float | None:
        """Watts."""
        return self._typical("energy_j", "duration_s")

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second."""
        return self._typical("tokens", "duration_s")

    @property
    def model_flop_per_s(self) -> float | None:
        """Model FLOP/s."""
        return self._typical("model_flops", "duration_s")

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over the peak's, 0-1."""
        return self._typical("model_flops", "capacity_flops")

    @property
    def hfu(self) -> float | None:
        """FLOPs that ran over the peak's, 0-1."""
        return self._typical("hardware_flops", "capacity_flops")

    @property
    def peaks(self) -> tuple[DevicePeak, ...]:
        """The peaks behind ``mfu``, each with its source."""
        return self.manifest.peaks if self.manifest else ()

    @property
    def final_loss(self) -> float | None:
        """Mean loss of the last block."""
        return self.blocks[-1].loss if self.blocks else None

    @property
    def peak_memory_bytes(self) -> int | None:
        """The most memory in use: the accelerator's, else the process's."""
        return max((block.peak_memory_bytes for block in self.blocks if block.peak_memory_bytes is not None), default=None)

    @property
    def methods(self) -> Mapping[str, Method]:
        """How the joules of each domain are known."""
        return {domain.name: domain.method for domain in self.manifest.domains} if self.manifest else {}

    def _typical(self, quantity: str, unit: str) -> float | None:
        """The geometric mean of the blocks' rates; ``None`` where one is not known."""
        rates = _rates(self.blocks, quantity, unit)
        if rates is None or min(rates) < 0:
            return None
        return math.exp(math.fsum(map(math.log, rates)) / len(rates)) if min(rates) > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every number by its name, unknown ones as ``None``."""
        names = (
            "n_steps", "duration_s", "step_time_s", "energy_per_step_j", "energy_per_token_j", "energy_per_sample_j",
            "emissions_per_step_g", "power_w", "tokens_per_s", "model_flop_per_s", "mfu", "hfu", "final_loss", "peak_memory_bytes",
            "error", "threads", "log_dir",
        )  # fmt: skip
        manifest = self.manifest
        figures: dict[str, Any] = _finite(
            {
                "variant": asdict(self.variant),
                **{name: getattr(self, name) for name in names},
                "methods": {name: str(method) for name, method in self.methods.items()},
                "peaks": [asdict(peak) for peak in self.peaks],
                "device": manifest.device if manifest else None,
                "model": manifest.model if manifest else None,
                "parameters": manifest.parameters if manifest else None,
                "intensity": asdict(manifest.intensity) if manifest and manifest.intensity else None,
                "pue": manifest.pue if manifest else None,
                "blocks": [asdict(block) for block in self.blocks],
                "warnings": list(self.warnings),
            }
        )
        return figures


@dataclass(frozen=True, slots=True)
class Comparison:
    """The results of all variants, the first being what the others are compared with."""

    results: tuple[VariantResult, ...]
    steps_per_block: int
    confidence: float
    loss_tolerance: float
    interrupted: bool = False

    @property
    def baseline(self) -> VariantResult:
        """The first variant."""
        return self.results[0]

    @property
    def headline(self) -> str:
        """What to look at: "energy", or "time" where every joule is estimated and energy follows from time."""
        methods = [method for result in self.results for method in result.methods.values()]
        return "energy" if any(method is not Method.ESTIMATED for method in methods) else "time"

    def result(self, name: str) -> VariantResult:
        """The result of a variant.

        Raises:
            ArgumentError: no variant has that name.
        """
        for result in self.results:
            if result.name == name:
                return result
        raise ArgumentError(f"No variant {name!r} was compared; there are {', '.join(result.name for result in self.results)}.")

    def time(self, name: str) -> Difference | None:
        """Time per unit of work against the baseline; ``None`` where the two have no round in common."""
        return self._difference(name, "duration_s")

    def energy(self, name: str) -> Difference | None:
        """Energy per unit of work against the baseline; ``None`` also where energy is not known."""
        return self._difference(name, "energy_j")

    def departure(self, name: str) -> str:
        """Why a variant is not the same training as the baseline; empty where it is, as far as the losses tell."""
        pairs = _paired(self.baseline, self.result(name))
        if any(not math.isfinite(loss) for a, b in pairs for loss in (a.loss, b.loss)):
            return "not the same training: the loss is not finite"
        if not pairs or name == self.baseline.name:
            return ""
        a, b = pairs[-1]
        if (a.tokens, a.samples) != (b.tokens, b.samples):
            return "not the same training: the batch size differs"
        if abs(b.loss - a.loss) > self.loss_tolerance * abs(a.loss):
            return f"not the same training: loss {b.loss:.4g} against {a.loss:.4g}, more than {self.loss_tolerance:.0%} apart"
        return ""

    def saving(self, name: str, *, planned_tokens: float | None = None, planned_samples: float | None = None) -> Saving | None:
        """What a planned run would save with this variant in place of the baseline; ``None`` where it isn't known.

        The baseline's projection times the difference; low and high by the wider of its interval and the meter's own bounds.

        Raises:
            ArgumentError: as :func:`project`.
        """
        base = project(self.baseline, planned_tokens=planned_tokens, planned_samples=planned_samples)
        duration, energy = self.time(name), self.energy(name)
        saved = None if base is None else _saved(base.duration_h, duration)
        if base is None or duration is None or saved is None:
            return None
        return Saving(
            variant=name,
            baseline=self.baseline.name,
            planned=base.planned,
            unit=base.unit,
            duration_h=saved,
            energy_kwh=_saved(base.energy_kwh, energy),
            facility_energy_kwh=_saved(base.facility_energy_kwh, energy),
            emissions_g=_saved(base.emissions_g, energy),
            time=duration,
            energy=energy,
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: results, and differences against the baseline by variant."""
        others = [result.name for result in self.results[1:]]
        return {
            "baseline": self.baseline.name,
            "headline": self.headline,
            "steps_per_block": self.steps_per_block,
            "confidence": self.confidence,
            "interrupted": self.interrupted,
            "results": [result.to_dict() for result in self.results],
            "differences": {
                name: {
                    "time": _finite(asdict(found)) if (found := self.time(name)) else None,
                    "energy": _finite(asdict(found)) if (found := self.energy(name)) else None,
                    "departure": self.departure(name),
                }
                for name in others
            },
        }

    def _difference(self, name: str, quantity: str) -> Difference | None:
        """Pairs the blocks of each round; per token, else per sample, else per step."""
        pairs = _paired(self.baseline, self.result(name))
        if not pairs:
            return None
        sides = list(zip(*pairs, strict=True))
        unit = next(unit for unit in ("tokens", "samples", "n_steps") if all(getattr(x, unit) for pair in pairs for x in pair))
        values = [_rates(side, quantity, unit) for side in sides]
        bounds = [_bounds(side, unit) if quantity == "energy_j" else None for side in sides]
        a, b = values
        if a is None or b is None or min(*a, *b) <= 0:
            return None
        if None in bounds:
            bounds = [None, None]
        gaps = [float(later.position - earlier.position) for earlier, later in pairs]
        return paired_difference(a, b, confidence=self.confidence, gaps=gaps, a_bounds=bounds[0], b_bounds=bounds[1])


@dataclass(frozen=True, slots=True)
class Range:
    """A figure with its lowest and highest; these are ``None`` where one block alone was measured."""

    value: float
    lo: float | None
    hi: float | None


@dataclass(frozen=True, slots=True)
class Projection:
    """What a planned run would take: hours, IT and facility kWh, gCO2e. ``None`` where not known."""

    variant: str
    planned: float
    unit: str
    duration_h: Range
    energy_kwh: Range | None
    facility_energy_kwh: Range | None
    emissions_g: Range | None


@dataclass(frozen=True, slots=True)
class Saving:
    """What a planned run would save with ``variant`` in place of ``baseline``: positive is less.

    ``time`` and ``energy`` say with what confidence, and whether the two can be told apart at all.
    """

    variant: str
    baseline: str
    planned: float
    unit: str
    duration_h: Range
    energy_kwh: Range | None
    facility_energy_kwh: Range | None
    emissions_g: Range | None
    time: Difference
    energy: Difference | None


def project(
    result: VariantResult,
    *,
    planned_tokens: float | None = None,
    planned_samples: float | None = None,
    confidence: float = 0.95,
) -> Projection | None:
    """Scales what was measured to a planned run on the same device; ``None`` where nothing was measured in that unit.

    Low and high: the interval of the block means, and for energy the meter's own bounds on top of it.

    Raises:
        ArgumentError: unless exactly one plan, positive and finite, is given.
    """
    plans = {"tokens": planned_tokens, "samples": planned_samples}
    given = [(unit, planned) for unit, planned in plans.items() if planned is not None]
    if len(given) != 1 or not (math.isfinite(given[0][1]) and given[0][1] > 0):
        raise ArgumentError(f"Plan a positive number of either tokens or samples, not {plans}.")
    unit, planned = given[0]
    duration_s = _projected(result.blocks, "duration_s", unit, planned, confidence)
    if duration_s is None:
        return None
    energy_j = _projected(result.blocks, "energy_j", unit, planned, confidence)
    emissions_g = _projected(result.blocks, "emissions_g", unit, planned, confidence)
    energy_kwh = None if energy_j is None else _mapped(energy_j, joules_to_kwh)
    pue = result.manifest.pue if result.manifest else None
    return Projection(
        variant=result.name,
        planned=planned,
        unit=unit,
        duration_h=_mapped(duration_s, lambda seconds: seconds / S_PER_HOUR),
        energy_kwh=energy_kwh,
        facility_energy_kwh=None if energy_kwh is None or pue is None else _mapped(energy_kwh, lambda kwh: kwh * pue),
        emissions_g=emissions_g,
    )


def _paired(a: VariantResult, b: VariantResult) -> list[tuple[Block, Block]]:
    """The blocks of the rounds that both have."""
    by_round = {block.round: block for block in b.blocks}
    return [(block, by_round[block.round]) for block in a.blocks if block.round in by_round]


def _rates(blocks: Sequence[Block], quantity: str, unit: str) -> list[float] | None:
    """The quantity per unit of work of each block; ``None`` where one is not known."""
    rates = [_ratio(getattr(block, quantity), getattr(block, unit)) for block in blocks]
    known = [rate for rate in rates if rate is not None]
    return known if known and len(known) == len(rates) else None


def _bounds(blocks: Sequence[Block], unit: str) -> list[tuple[float, float]] | None:
    """The meter's bounds of each block's joules per unit of work; ``None`` where one has none."""
    lows, highs = _rates(blocks, "energy_lo_j", unit), _rates(blocks, "energy_hi_j", unit)
    return None if lows is None or highs is None else list(zip(lows, highs, strict=True))


def _projected(blocks: Sequence[Block], quantity: str, unit: str, planned: float, confidence: float) -> Range | None:
    """``planned`` units of a quantity at its typical rate, with the interval of that; the meter's bounds widen it."""
    rates = _rates(blocks, quantity, unit)
    if rates is None:
        return None
    if min(rates) <= 0:  # nothing was used, or the grid emits nothing
        return Range(0.0, 0.0, 0.0) if max(rates) == 0 else None
    interval = mean_interval([math.log(rate) for rate in rates], confidence=confidence)
    typical = math.exp(interval.mean)
    if interval.lo is None or interval.hi is None:
        return Range(typical * planned, None, None)
    below = above = 1.0
    bounds, energy = _bounds(blocks, unit), _rates(blocks, "energy_j", unit)
    if quantity != "duration_s" and bounds and energy and (total := math.fsum(energy)):
        below, above = (math.fsum(side) / total for side in zip(*bounds, strict=True))
    return Range(typical * planned, math.exp(interval.lo) * below * planned, math.exp(interval.hi) * above * planned)


def _saved(base: Range | None, difference: Difference | None) -> Range | None:
    """The baseline's figure times what the variant uses less of it."""
    if base is None or difference is None:
        return None
    ends = [
        end for end in (difference.lo, difference.hi, difference.instrument_lo, difference.instrument_hi) if end is not None
    ]
    if difference.lo is None:
        return Range(-difference.estimate * base.value, None, None)
    return Range(-difference.estimate * base.value, -max(ends) * base.value, -min(ends) * base.value)


def _mapped(figure: Range, change: Callable[[float], float]) -> Range:
    return Range(*(None if value is None else change(value) for value in (figure.value, figure.lo, figure.hi)))  # type: ignore[arg-type]


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def known_sum(values: Iterable[float | None]) -> float | None:
    """The sum, or ``None`` where one is not known."""
    found = list(values)
    return None if not found or None in found else math.fsum(value for value in found if value is not None)


def _finite(value: Any) -> Any:
    """The same for JSON, which knows no infinity and no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
