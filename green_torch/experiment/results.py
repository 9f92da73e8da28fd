"""What is found: blocks, each variant's result, the comparison of them, and what follows for a planned run. Pure arithmetic.

What a variant costs, and what a planned run would, is a ratio of sums over its blocks (joules over tokens): slow blocks count in full, as
they do in a long run, and joules per token over seconds per token is watts. How two variants differ is a geometric mean of the ratios of
their paired blocks, in which one block that something else disturbed weighs little: on a noisy machine it is not the ratio of the costs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from green_torch.errors import ArgumentError
from green_torch.experiment.variants import Variant, parse_variant
from green_torch.records import DevicePeak, Flag, Manifest, Method
from green_torch.statistics import Bounds, Difference, gain_range, mean_interval, paired_difference
from green_torch.totals import whole_sum
from green_torch.units import S_PER_HOUR, joules_to_kwh

HOTTER_C = (
    5.0  # a variant this much hotter than the baseline, block for block, is said to be: leakage costs watts, and clocks drop
)
LOSS_TOLERANCE = 0.02  # relative: losses further apart are not of the same training
FINDABLE = (0.02, 0.01)  # relative differences: how many blocks would find them is told where none was found
NOT_FIT = "does not fit in memory"  # what the error of a variant that ran out of memory begins with
_OF_ENERGY = {"energy_j", "energy_lo_j", "energy_hi_j", "emissions_g", "operational_g"}  # known where all meters were read
_DOUBTS = {  # what is said of the energy of blocks that bear a flag: what befell a meter, and what it means for the figures
    Flag.METER_FAILED: ("a meter failed", "their energy is left out"),
    Flag.COUNTER_RESET: ("a counter went back or leapt", "their joules across that are bounded by the power limit only"),
    Flag.COUNTER_STUCK: ("a counter stood still", "their joules are taken at the last power"),
    Flag.PART_TIME: (
        "a counter sees only part of the power, and steps were in time with it",
        "their joules may be off by tens of percent; another batch size mends it",
    ),
    Flag.LATE: ("a counter did not change for 2 s or longer", "where their joules begin or end is extrapolated"),
}


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive steps of one variant: sums over them, ``loss`` their mean. ``position`` is its place in the round.

    ``emissions_g`` are operational grams and, where they are counted, those of manufacturing: these are ``embodied_g``, ``None`` where not.
    ``capacity_flops`` is the peak times the duration: what the device could have done. ``loss`` is ``None`` where the user's own step gives
    none. ``domains_j`` are the joules of each device. ``flags`` are those of its records: where a meter failed, energy and what follows
    from it are left out of every figure. ``temperature_c`` is the highest seen, ``sm_clock_mhz`` the mean, and ``throttled``
    what held the clock back at any look, on any NVIDIA GPU in use; ``memory_traffic_bytes`` went between these and their memories;
    ``None`` and empty where nothing tells. ``n_skipped`` steps were left out by the gradient scaler (``None``: not known).
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
    loss: float | None
    peak_memory_bytes: int | None = None
    flags: tuple[str, ...] = ()
    domains_j: Mapping[str, float] = field(default_factory=dict)
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    throttled: tuple[str, ...] = ()
    n_skipped: int | None = 0
    memory_traffic_bytes: float | None = None
    embodied_g: float | None = None

    def flagged(self, flag: Flag) -> bool:
        """As :meth:`StepRecord.flagged`."""
        return any(own == flag or own.startswith(f"{flag}:") for own in self.flags)

    @property
    def metered(self) -> bool:
        """Whether no meter failed in it; else joules are missing, and what is left of them would read as a saving."""
        return not self.flagged(Flag.METER_FAILED)

    @property
    def operational_g(self) -> float | None:
        """gCO2e of its energy alone; ``None`` where energy or grid is not known."""
        if self.energy_j is None or self.emissions_g is None:
            return None
        return max(0.0, self.emissions_g - (self.embodied_g or 0.0))


@dataclass(frozen=True, slots=True)
class VariantResult:
    """What one variant did, over its measured blocks: rates are ratios of sums over them, of energy over those in which no meter failed.

    ``error`` says what ended it early, if anything did.
    ``kernels`` are the attention kernels that ran in one warm step ("math", "flash", ...), empty where none did or nobody looked.
    ``ran`` describes what the library ran (kernels, effective precision, checkpointing, compilation, batch size): two variants with
    the same text did the same; empty where the user's own code applied the variant (``applied_by_user``), and where nobody could look.
    ``n_skipped_warming`` steps were left out by the gradient scaler before the first block.
    """

    variant: Variant
    blocks: tuple[Block, ...] = ()
    error: str | None = None
    manifest: Manifest | None = None
    warnings: tuple[str, ...] = ()
    threads: int | None = None
    log_dir: str | None = None
    kernels: tuple[str, ...] = ()
    ran: str = ""
    applied_by_user: bool = False
    n_skipped_warming: int | None = 0

    @property
    def name(self) -> str:
        """The variant's."""
        return self.variant.name

    @property
    def fits(self) -> bool | None:
        """Whether it fitted in memory; ``None`` where it never came so far."""
        if self.error is not None and self.error.startswith(NOT_FIT):
            return False
        return True if self.blocks else None

    @property
    def n_skipped(self) -> int | None:
        """Steps that the gradient scaler left out since the beginning, warm-up included."""
        known = [self.n_skipped_warming, *(block.n_skipped for block in self.blocks)]
        return None if None in known else sum(n for n in known if n is not None)

    @property
    def temperature_c(self) -> float | None:
        """Degrees Celsius: the mean of the blocks' highest, on the hottest GPU; ``None`` where one block doesn't tell."""
        return _mean(block.temperature_c for block in self.blocks)

    @property
    def sm_clock_mhz(self) -> float | None:
        """MHz: the mean SM clock of the blocks; ``None`` where one doesn't tell."""
        return _mean(block.sm_clock_mhz for block in self.blocks)

    @property
    def throttled(self) -> Mapping[str, int]:
        """What held the clock back, each with the number of blocks in which it did."""
        return Counter(reason for block in self.blocks for reason in block.throttled)

    @property
    def memory_traffic_per_step_bytes(self) -> float | None:
        """Bytes a step between the GPUs and their memories; ``None`` where the driver doesn't tell (NVML's GPM: Hopper and later)."""
        return self._typical("memory_traffic_bytes", "n_steps")

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
    def samples_per_s(self) -> float | None:
        """Samples a second."""
        return self._typical("samples", "duration_s")

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
        """The quantity of all blocks that tell it over their unit of work; ``None`` where one of them doesn't know its own."""
        return _rate(self.blocks, quantity, unit)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every number by its name, unknown ones as ``None``."""
        names = (
            "n_steps", "duration_s", "step_time_s", "energy_per_step_j", "energy_per_token_j", "energy_per_sample_j",
            "emissions_per_step_g", "power_w", "tokens_per_s", "samples_per_s", "model_flop_per_s", "mfu", "hfu", "final_loss",
            "peak_memory_bytes", "error", "threads", "log_dir", "kernels", "ran", "applied_by_user", "n_skipped", "fits",
            "temperature_c", "sm_clock_mhz", "throttled", "memory_traffic_per_step_bytes",
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
class Trial:
    """One batch size that was tried: whether it fits, its peak memory, its seconds a step (two steps: a hint), and why not."""

    batch_size: int
    fits: bool
    peak_memory_bytes: int | None = None
    step_s: float | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class LargestBatch:
    """The largest batch of a variant that fits in memory, and what a token costs there.

    ``batch_size`` is ``None`` where not even the smallest fits. ``complete`` tells that the next larger size tried (by about 1/16) does not
    fit; otherwise the search ended earlier, and ``error`` says why. ``memory_bytes`` is the limit, as ``memory_source`` says.
    ``result`` is that variant measured alone at that size, where asked for. ``interrupted``: Ctrl-C ended the search or the measurement.
    """

    variant: Variant
    batch_size: int | None
    memory_bytes: int | None
    memory_source: str
    trials: tuple[Trial, ...] = ()
    complete: bool = False
    error: str | None = None
    result: VariantResult | None = None
    interrupted: bool = False

    @property
    def peak_memory_bytes(self) -> int | None:
        """At the largest batch, the most that was seen: of the trial, or while it was measured there."""
        seen = [trial.peak_memory_bytes for trial in self.trials if trial.fits and trial.batch_size == self.batch_size]
        if self.result is not None:
            seen.append(self.result.peak_memory_bytes)
        return max((peak for peak in seen if peak is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        figures: dict[str, Any] = _finite(
            {
                "variant": self.variant.name,
                "batch_size": self.batch_size,
                "peak_memory_bytes": self.peak_memory_bytes,
                "memory_bytes": self.memory_bytes,
                "memory_source": self.memory_source,
                "complete": self.complete,
                "error": self.error,
                "interrupted": self.interrupted,
                "trials": [asdict(trial) for trial in self.trials],
            }
        )
        return {**figures, "result": self.result.to_dict() if self.result else None}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The results of all variants, the first being what the others are compared with.

    ``stopped`` says what ended it: "blocks" (all were measured), "until" (every interval was narrow enough), "budget_s", "budget_j",
    "interrupted", "failed" (no variant was left, or no two to tell apart where it was to go on); empty where nobody noted it. ``until`` is the
    half-width that was asked for; intervals allow for the looking then. ``largest`` is the largest batch of each variant, where asked for.
    ``warnings`` are about the comparison.
    """

    results: tuple[VariantResult, ...]
    steps_per_block: int
    confidence: float
    loss_tolerance: float
    interrupted: bool = False
    until: float | None = None
    stopped: str = ""
    largest: tuple[LargestBatch, ...] = ()
    warnings: tuple[str, ...] = ()

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
        """Energy per unit of work against the baseline, in the rounds in which no meter failed; ``None`` also where energy is not known."""
        return self._difference(name, "energy_j")

    def memory_traffic(self, name: str) -> Difference | None:
        """Bytes between GPU and memory per unit of work against the baseline; ``None`` also where no counter told them."""
        return self._difference(name, "memory_traffic_bytes")

    @property
    def n_compared(self) -> int:
        """How many variants are compared with the baseline: their intervals hold together (:mod:`green_torch.statistics`)."""
        return max(1, sum(bool(result.blocks) for result in self.results[1:]))

    def departure(self, name: str) -> str:
        """Why a variant is not the same training as the baseline; empty where it is, as far as the losses tell.

        Both saw the same batches in the same order, so the means of their losses over the later half of the blocks are compared (early on, a
        step or two of lag is a large difference; a single block of few steps wanders). Where there is no loss to compare, :meth:`notes`
        says so.
        """
        pairs = _paired(self.baseline, self.result(name))
        for whose, side in (("the baseline's loss", 0), ("the loss", 1)):
            if any(loss is not None and not math.isfinite(loss) for loss in (pair[side].loss for pair in pairs)):
                return f"not the same training: {whose} is not finite"
        if not pairs or name == self.baseline.name:
            return ""
        if any((a.tokens, a.samples) != (b.tokens, b.samples) for a, b in pairs[-1:]):
            return "not the same training: the batch size differs"
        known = _later_losses(pairs)
        if not known:
            return ""
        base, own = (math.fsum(side) / len(known) for side in zip(*known, strict=True))
        if abs(own - base) > self.loss_tolerance * abs(base):
            return f"not the same training: loss {own:.4g} against {base:.4g}, more than {100 * self.loss_tolerance:g} % apart"
        return ""

    def losses_compared(self, name: str) -> bool:
        """Whether :meth:`departure` had losses of both to compare."""
        return bool(_later_losses(_paired(self.baseline, self.result(name))))

    def same_as(self, name: str) -> str:
        """The first variant before this one that ran the very same kernels in the same precision; empty where none did.

        Two variants of the user's own names and equal settings differ by what ``build`` makes of the names: they are not judged.
        """
        own = self.result(name)
        for result in self.results[: self.results.index(own)]:
            settings = replace(result.variant, name=name) == own.variant
            if own.ran and result.ran == own.ran and (not settings or (built_in(own.variant) and built_in(result.variant))):
                return result.name
        return ""

    def notes(self, name: str) -> tuple[str, ...]:
        """What a reader of a variant's figures must know: who applied it, what ran, what was skipped, how hot it was, how its meters did."""
        own, base = self.result(name), self.baseline
        said = []
        if own.applied_by_user:
            said.append("variant applied by the user's code")
        if own.kernels:
            said.append(f"attention kernel that ran: {', '.join(own.kernels)}")
        if same := self.same_as(name):
            said.append(f"same kernels as {same}: whatever differs between the two is not the variant's doing")
        if own.n_skipped is None:
            said.append("how many steps the gradient scaler skipped is not known (the optimizer is fused)")
        elif own.n_skipped:
            said.append(
                f"steps skipped by the gradient scaler: {own.n_skipped}, of which {own.n_skipped_warming} in the warm-up"
            )
        pairs = _paired(base, own)
        if pairs and not _later_losses(pairs):
            whose = "its" if all(block.loss is None for _, block in pairs[len(pairs) // 2 :]) else f"{base.name}'s"
            said.append(f"whether it is the same training was not checked: {whose} step gives no loss")
        hotter = [
            b.temperature_c - a.temperature_c for a, b in pairs if a.temperature_c is not None and b.temperature_c is not None
        ]
        if hotter and (mean := math.fsum(hotter) / len(hotter)) > HOTTER_C:
            said.append(f"ran {mean:.0f} °C hotter than {base.name} (more than {HOTTER_C:g} °C): heat costs watts of its own")
        said += [f"throttled in {n} of {len(own.blocks)} blocks: {reason}" for reason, n in own.throttled.items()]
        return (*said, *doubts(own.blocks, "blocks"))

    def saving(
        self,
        name: str,
        *,
        planned_tokens: float | None = None,
        planned_samples: float | None = None,
        planned_steps: float | None = None,
    ) -> Saving | None:
        """What a planned run would save with this variant in place of the baseline; ``None`` where it isn't known or not the same training.

        The baseline's projection, by its sums, times the difference, a geometric mean of ratios: operational grams by the difference in
        energy, those of manufacturing by that in time. Steps are the baseline's. Low and high are the extremes of the projection's interval
        times the difference's, each with the meter's own bounds, and the difference's with the sensors' gain errors: they hold both
        uncertainties, however these depend on each other.

        Raises:
            ArgumentError: as :func:`project`.
        """
        base = project(
            self.baseline,
            planned_tokens=planned_tokens,
            planned_samples=planned_samples,
            planned_steps=planned_steps,
            confidence=self.confidence,
        )
        return None if self.departure(name) else saving_of(name, base, self.time(name), self.energy(name))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: results, and differences against the baseline by variant."""
        others = [result.name for result in self.results[1:]]
        return {
            "baseline": self.baseline.name,
            "headline": self.headline,
            "steps_per_block": self.steps_per_block,
            "confidence": self.confidence,
            "loss_tolerance": self.loss_tolerance,
            "interrupted": self.interrupted,
            "until": self.until,
            "stopped": self.stopped,
            "n_compared": self.n_compared,
            "warnings": list(self.warnings),
            "largest": [largest.to_dict() for largest in self.largest],
            "results": [result.to_dict() for result in self.results],
            "differences": {
                name: {
                    "time": for_json(self.time(name), self.departure(name)),
                    "energy": for_json(self.energy(name), self.departure(name)),
                    "departure": self.departure(name),
                    "same_as": self.same_as(name),
                    "notes": list(self.notes(name)),
                }
                for name in others
            },
        }

    def _difference(self, name: str, quantity: str) -> Difference | None:
        """Pairs the blocks of each round that tell the quantity; per token, else per sample, else per step."""
        pairs = _paired(self.baseline, self.result(name))
        pairs = [pair for pair in pairs if len(_telling(pair, quantity)) == len(pair)]
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
        found = paired_difference(
            a,
            b,
            confidence=self.confidence,
            gaps=gaps,
            a_bounds=bounds[0],
            b_bounds=bounds[1],
            gain=self._gain(sides[0], sides[1]) if quantity == "energy_j" else None,
            n_compared=self.n_compared,
            looking=self.until is not None,
        )
        if found.distinguishable and self.same_as(name) == self.baseline.name:
            return replace(
                found, distinguishable=False, note=f"can't be told apart: it ran the same kernels as {self.baseline.name}"
            )
        return found

    def _gain(self, a: Sequence[Block], b: Sequence[Block]) -> Bounds | None:
        """How far the sensors' gain errors may shift the ratio."""
        of_a: Any = Counter()  # joules add up as counts do
        of_b: Any = Counter()
        for total, side in ((of_a, a), (of_b, b)):
            for block in side:
                total.update(block.domains_j)
        manifest = self.baseline.manifest
        return gain_range(of_a, of_b, {domain.name: domain.gain_error for domain in manifest.domains}) if manifest else None


def doubts(blocks: Sequence[Block], what: str) -> list[str]:
    """What befell the meters in so many of the blocks, which are called ``what``, and what that means for their energy."""
    found = []
    for flag, (befell, meaning) in _DOUBTS.items():
        n = sum(block.flagged(flag) for block in blocks)
        if n:
            names = {own.partition(":")[2] for block in blocks for own in block.flags if own.partition(":")[0] == flag} - {""}
            whose = f" ({', '.join(sorted(names))})" if names else ""
            found.append(f"{befell}{whose} in {n} of {len(blocks)} {what}: {meaning}")
    return found


def for_json(found: Difference | None, departure: str) -> dict[str, Any] | None:
    """A difference for JSON, with what keeps it from being a saving, and how many blocks would find 2 % and 1 % where it can't be told."""
    if found is None:
        return None
    needed = [{"difference": size, "n_blocks": found.blocks_needed(size)} for size in FINDABLE]
    return {
        **_finite(asdict(found)),
        "departure": departure,
        "blocks_needed": [one for one in needed if one["n_blocks"] is not None],
    }


@dataclass(frozen=True, slots=True)
class Range:
    """A figure with its lowest and highest; these are ``None`` where one block alone was measured."""

    value: float
    lo: float | None
    hi: float | None


@dataclass(frozen=True, slots=True)
class Projection:
    """What a planned run would take: hours, IT and facility kWh, gCO2e. ``None`` where not known.

    ``unit`` is "tokens", "samples" or "steps". ``emissions_g`` is the sum of ``operational_g``, which follow from energy, and
    ``embodied_g``, the share of manufacturing, which follows from time: ``None`` where it isn't counted.
    """

    variant: str
    planned: float
    unit: str
    duration_h: Range
    energy_kwh: Range | None
    facility_energy_kwh: Range | None
    emissions_g: Range | None
    operational_g: Range | None = None
    embodied_g: Range | None = None


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
    planned_steps: float | None = None,
    confidence: float = 0.95,
) -> Projection | None:
    """Scales what was measured, sums over sums, to a planned run on the same device; ``None`` where nothing was measured in that unit.

    Steps are the variant's own, whatever they hold: plan by tokens or samples where these are counted and batch sizes differ.
    Low and high: the interval of the arithmetic mean of the blocks' rates, and for energy the meter's own bounds on top of it.

    Raises:
        ArgumentError: unless exactly one plan, positive and finite, is given.
    """
    plans = {"tokens": planned_tokens, "samples": planned_samples, "steps": planned_steps}
    given = [(unit, planned) for unit, planned in plans.items() if planned is not None]
    if len(given) != 1 or not (math.isfinite(given[0][1]) and given[0][1] > 0):
        raise ArgumentError(f"Plan a positive number of either tokens, samples or steps, not {plans}.")
    unit, planned = given[0]
    counted = {"steps": "n_steps"}.get(unit, unit)

    def projected(quantity: str) -> Range | None:
        return _projected(result.blocks, quantity, counted, planned, confidence)

    duration_s = projected("duration_s")
    if duration_s is None:
        return None
    energy_j, operational_g, embodied_g = projected("energy_j"), projected("operational_g"), projected("embodied_g")
    energy_kwh = None if energy_j is None else _mapped(energy_j, joules_to_kwh)
    pue = result.manifest.pue if result.manifest else None
    return Projection(
        variant=result.name,
        planned=planned,
        unit=unit,
        duration_h=_mapped(duration_s, lambda seconds: seconds / S_PER_HOUR),
        energy_kwh=energy_kwh,
        facility_energy_kwh=None if energy_kwh is None or pue is None else _mapped(energy_kwh, lambda kwh: kwh * pue),
        emissions_g=_with_embodied(operational_g, embodied_g),
        operational_g=operational_g,
        embodied_g=embodied_g,
    )


def built_in(variant: Variant) -> bool:
    """Whether its name says all of it."""
    try:
        return parse_variant(variant.name) == variant
    except ArgumentError:
        return False


def _paired(a: VariantResult, b: VariantResult) -> list[tuple[Block, Block]]:
    """The blocks of the rounds that both have."""
    by_round = {block.round: block for block in b.blocks}
    return [(block, by_round[block.round]) for block in a.blocks if block.round in by_round]


def _later_losses(pairs: Sequence[tuple[Block, Block]]) -> list[tuple[float, float]]:
    """The losses of the later half of the pairs, where both sides give one."""
    return [(a.loss, b.loss) for a, b in pairs[len(pairs) // 2 :] if a.loss is not None and b.loss is not None]


def _telling(blocks: Sequence[Block], quantity: str) -> list[Block]:
    """The blocks that tell a quantity: where a meter failed none of energy, or of what follows from it."""
    return [block for block in blocks if block.metered or quantity not in _OF_ENERGY]


def _rates(blocks: Sequence[Block], quantity: str, unit: str) -> list[float] | None:
    """The quantity per unit of work of each block that tells it; ``None`` where one is not known."""
    rates = [_ratio(getattr(block, quantity), getattr(block, unit)) for block in _telling(blocks, quantity)]
    known = [rate for rate in rates if rate is not None]
    return known if known and len(known) == len(rates) else None


def _rate(blocks: Sequence[Block], quantity: str, unit: str) -> float | None:
    """The quantity of all blocks that tell it per unit of their work; ``None`` where one is not known."""
    rates = _rates(blocks, quantity, unit)
    if rates is None or min(rates) < 0:
        return None
    telling = _telling(blocks, quantity)
    return _ratio(*(whole_sum(getattr(block, name) for block in telling) for name in (quantity, unit)))


def _bounds(blocks: Sequence[Block], unit: str) -> list[tuple[float, float]] | None:
    """The meter's bounds of each block's joules per unit of work, where no meter failed; ``None`` where one has none."""
    lows, highs = _rates(blocks, "energy_lo_j", unit), _rates(blocks, "energy_hi_j", unit)
    return None if lows is None or highs is None else list(zip(lows, highs, strict=True))


def _projected(blocks: Sequence[Block], quantity: str, unit: str, planned: float, confidence: float) -> Range | None:
    """``planned`` units of a quantity at the rate of all blocks together, with the interval of that; the meter's bounds widen it.

    The interval is that of the blocks' arithmetic mean, relative to it: the same mean where the blocks hold equal work. Nothing costs less
    than none, so it ends at zero.
    """
    rate, rates = _rate(blocks, quantity, unit), _rates(blocks, quantity, unit)
    if rate is None or rates is None:
        return None
    if not rate:  # nothing was used, or the grid emits nothing
        return Range(0.0, 0.0, 0.0)
    interval = mean_interval(rates, confidence=confidence)
    if interval.lo is None or interval.hi is None:
        return Range(rate * planned, None, None)
    lo, hi = max(0.0, interval.lo / interval.mean), interval.hi / interval.mean
    below = above = 1.0
    bounds, energy = _bounds(blocks, unit), _rates(blocks, "energy_j", unit)
    if quantity not in {"duration_s", "embodied_g"} and bounds and energy and (total := math.fsum(energy)):
        below, above = (math.fsum(side) / total for side in zip(*bounds, strict=True))
    return Range(rate * planned, lo * below * rate * planned, hi * above * rate * planned)


def saving_of(name: str, base: Projection | None, time: Difference | None, energy: Difference | None) -> Saving | None:
    """What ``name`` saves of the baseline's projection, by how it differs in time and energy; ``None`` where time isn't known."""
    if base is None or time is None:
        return None
    duration_h = _saved_of(base.duration_h, time)
    if duration_h is None:
        return None
    return Saving(
        variant=name,
        baseline=base.variant,
        planned=base.planned,
        unit=base.unit,
        duration_h=duration_h,
        energy_kwh=_saved_of(base.energy_kwh, energy),
        facility_energy_kwh=_saved_of(base.facility_energy_kwh, energy),
        emissions_g=_with_embodied(_saved_of(base.operational_g, energy), _saved_of(base.embodied_g, time)),
        time=time,
        energy=energy,
    )


def _saved_of(base: Range | None, difference: Difference | None) -> Range | None:
    """The baseline's figure times what the variant uses less of it, with the extremes that the intervals of both allow."""
    if base is None or difference is None:
        return None
    saved = -difference.estimate * base.value
    if difference.lo is None or base.lo is None or base.hi is None:
        return Range(saved, None, None)
    low, high = _all_in_all(difference)
    least, most = -high, -low
    lo = _times(least, base.lo if least >= 0 else base.hi)
    hi = _times(most, base.hi if most >= 0 else base.lo)
    return Range(saved, lo, hi)


def _all_in_all(difference: Difference) -> tuple[float, float]:
    """Where a relative difference lies if scatter, the meter's bounds and the sensors' gains are all off at once: their factors multiply."""
    d, ratio = difference, 1 + difference.estimate
    low = high = ratio
    for lo, hi in ((d.lo, d.hi), (d.instrument_lo, d.instrument_hi), (d.gain_lo, d.gain_hi)):
        if lo is not None and hi is not None:
            low, high = low * (1 + lo) / ratio, high * (1 + hi) / ratio
    return low - 1, high - 1


def _times(end: float, base: float) -> float:
    """The product; of nothing it is nothing, also where the end is open."""
    return end * base if base else 0.0


def _with_embodied(operational: Range | None, embodied: Range | None) -> Range | None:
    """Both together: energy and time rise and fall together, so their ends add up. Where no manufacturing is counted, the former alone."""
    if operational is None or embodied is None:
        return operational
    ends = [(operational.lo, embodied.lo), (operational.hi, embodied.hi)]
    lo, hi = (None if a is None or b is None else a + b for a, b in ends)
    return Range(operational.value + embodied.value, lo, hi)


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean, or ``None`` where one is not known or there is none."""
    found = list(values)
    total = whole_sum(found)
    return None if total is None else total / len(found)


def _mapped(figure: Range, change: Callable[[float], float]) -> Range:
    return Range(*(None if value is None else change(value) for value in (figure.value, figure.lo, figure.hi)))  # type: ignore[arg-type]


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _finite(value: Any) -> Any:
    """The same for JSON, which knows no infinity and no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
