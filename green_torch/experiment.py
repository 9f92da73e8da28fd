"""Runs variants of one training side by side and compares them: ``compare(build, ["fp32", "bf16"])``.

One worker process a variant, alive through the comparison, one of them running at a time. Blocks of steps alternate in random order;
what is compared is pairs of neighbouring blocks (:mod:`green_torch.statistics`). Each worker is one ``green_torch.track()`` run whose
clock stands still while another has its turn. This module loads torch in the workers only.
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
import pickle
import random
import signal
import statistics as stdlib_statistics
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from green_torch.errors import ArgumentError, GreenTorchWarning
from green_torch.records import DevicePeak, Item, Manifest, Method, Phase, RunSummary, StepRecord
from green_torch.statistics import Difference, mean_interval, paired_difference
from green_torch.units import S_PER_HOUR, joules_to_kwh, ns_to_s

if TYPE_CHECKING:
    import os
    from multiprocessing.connection import Connection

    import torch

    from green_torch.tracker import Tracker

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
MATMUL_PRECISIONS = ("highest", "high", "medium")
SDPA_BACKENDS = ("math", "flash", "efficient", "cudnn")

_MAX_STEPS_PER_BLOCK = 10_000
_SETTLE_STEPS = 1  # run before each block and left out of it: caches, clocks and allocators come back from the other's turn
_PATIENCE_S = 2.0  # how long a block waits for its records beyond the tracker's own patience
_CLOSE_S = 15.0  # how long a worker may take to close its run
_WHOLE_BLOCK = 1_000_000_000  # steps a record: none ends before the block does


# ── what is asked ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to train; what is ``None`` is left as torch has it.

    ``precision`` as Lightning spells it (:data:`PRECISIONS`); ``matmul_precision`` of FP32 matmuls (``torch.set_float32_matmul_precision``:
    "high" is TF32 on a GPU that has it); ``sdpa_backend`` pins the attention kernel; ``gradient_checkpointing`` recomputes each module
    of the model's ``ModuleList``s in backward.

    Raises:
        ArgumentError: for a value that is not known.
    """

    name: str
    precision: str = "32-true"
    matmul_precision: str | None = None
    sdpa_backend: str | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not self.name or self.name != Path(self.name).name:
            raise ArgumentError(f"A variant's name becomes a folder's: {self.name!r} can't be one.")
        if self.precision == "16-mixed":
            raise ArgumentError("precision='16-mixed' needs a gradient scaler, which is not here yet; use 'bf16-mixed'.")
        for key, value, known in (
            ("precision", self.precision, PRECISIONS),
            ("matmul_precision", self.matmul_precision, (None, *MATMUL_PRECISIONS)),
            ("sdpa_backend", self.sdpa_backend, (None, *SDPA_BACKENDS)),
        ):
            if value not in known:
                raise ArgumentError(f"{key}={value!r} is not known; use one of {', '.join(map(repr, known))}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ArgumentError(f"batch_size={self.batch_size!r} must be 1 or more.")


_BASES = {
    "fp32": {"precision": "32-true", "matmul_precision": "highest"},
    "tf32": {"precision": "32-true", "matmul_precision": "high"},
    "bf16": {"precision": "bf16-mixed", "matmul_precision": "highest"},
    "bf16-mixed": {"precision": "bf16-mixed", "matmul_precision": "highest"},
    "bf16-true": {"precision": "bf16-true", "matmul_precision": "highest"},
}
_OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"sdpa_backend": name} for name in SDPA_BACKENDS},
    "auto": {"sdpa_backend": None},
    "checkpoint": {"gradient_checkpointing": True},
    "compile": {"compile": True},
}


def parse_variant(name: str) -> Variant:
    """The built-in variant of a name such as "fp32", "bf16+flash" or "bf16+flash+checkpoint+compile".

    Attention runs on torch's "math" kernel unless an option says otherwise ("+auto" leaves the choice to torch), so that two
    variants never differ, or agree, by torch's own choice.

    Raises:
        ArgumentError: for an unknown name; the message lists the known ones.
    """
    base, *options = name.split("+")
    known = f"{', '.join(_BASES)}; each with any of {', '.join('+' + option for option in _OPTIONS)}"
    unknown = [part for part, names in ((base, _BASES), *((option, _OPTIONS) for option in options)) if part not in names]
    if unknown:
        raise ArgumentError(f"The variant {name!r} is not known ({', '.join(map(repr, unknown))}). Known are {known}.")
    settings: dict[str, Any] = {"sdpa_backend": "math", **_BASES[base]}
    chosen: set[str] = set()
    for option in options:
        if chosen & _OPTIONS[option].keys():
            raise ArgumentError(f"The variant {name!r} says the same thing twice (+{option}). Known are {known}.")
        chosen |= _OPTIONS[option].keys()
        settings |= _OPTIONS[option]
    return Variant(name, **settings)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is trained; the library owns backward and step.

    ``model`` is on its device. ``optimizer(parameters)`` makes the optimizer. ``loss(model, batch)`` is the mean loss of a batch.
    ``batches(seed)`` yields batches (of tensors, however nested), the same for the same seed; they are moved to the model's
    device, and gone through again where they end. ``units(batch)`` counts what a batch holds: ``{"tokens": 4096, "samples": 8}``,
    either or both.
    """

    model: torch.nn.Module
    optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
    loss: Callable[[torch.nn.Module, Any], torch.Tensor]
    batches: Callable[[int], Iterable[Any]]
    units: Callable[[Any], Mapping[str, int]]


Build = str | Callable[[Variant], Workload]


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a comparison stands: ``done`` of ``total`` blocks; ``stage`` is "starting", "warming up", "measuring" or "closing"."""

    stage: str
    variant: str
    done: int
    total: int


# ── what is found ──────────────────────────────────────────────────────────────────────────────────────────────────────


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
        """Mean seconds a step."""
        return _ratio(self.duration_s, self.n_steps)

    @property
    def energy_per_step_j(self) -> float | None:
        """Mean IT joules a step."""
        return _ratio(self._sum("energy_j"), self.n_steps)

    @property
    def energy_per_token_j(self) -> float | None:
        """Mean IT joules a token."""
        return _ratio(self._sum("energy_j"), self._sum("tokens"))

    @property
    def energy_per_sample_j(self) -> float | None:
        """Mean IT joules a sample."""
        return _ratio(self._sum("energy_j"), self._sum("samples"))

    @property
    def emissions_per_step_g(self) -> float | None:
        """Mean gCO2e a step, of facility energy and of manufacturing where that is known."""
        return _ratio(self._sum("emissions_g"), self.n_steps)

    @property
    def power_w(self) -> float | None:
        """Mean watts."""
        return _ratio(self._sum("energy_j"), self.duration_s)

    @property
    def tokens_per_s(self) -> float | None:
        """Mean tokens a second."""
        return _ratio(self._sum("tokens"), self.duration_s)

    @property
    def model_flop_per_s(self) -> float | None:
        """Mean model FLOP/s."""
        return _ratio(self._sum("model_flops"), self.duration_s)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over the peak's, 0-1."""
        return _ratio(self._sum("model_flops"), self._sum("capacity_flops"))

    @property
    def hfu(self) -> float | None:
        """FLOPs that ran over the peak's, 0-1."""
        return _ratio(self._sum("hardware_flops"), self._sum("capacity_flops"))

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

    def _sum(self, name: str) -> float | None:
        values = [getattr(block, name) for block in self.blocks]
        return None if None in values or not values else math.fsum(values)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every number by its name, unknown ones as ``None``."""
        names = (
            "n_steps", "duration_s", "step_time_s", "energy_per_step_j", "energy_per_token_j", "energy_per_sample_j",
            "emissions_per_step_g", "power_w", "tokens_per_s", "model_flop_per_s", "mfu", "hfu", "final_loss", "peak_memory_bytes",
            "error", "threads", "log_dir",
        )  # fmt: skip
        manifest = self.manifest
        return _finite(
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
        """ "energy", or "time" where every joule is estimated: then energy follows from time and says nothing of its own."""
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

        The baseline's projection times the difference and its interval (the meter's own bounds included).

        Raises:
            ArgumentError: as :func:`project`.
        """
        base = project(self.baseline, planned_tokens=planned_tokens, planned_samples=planned_samples)
        duration, energy = self.time(name), self.energy(name)
        if base is None or duration is None:
            return None
        return Saving(
            variant=name,
            baseline=self.baseline.name,
            planned=base.planned,
            unit=base.unit,
            duration_h=_saved(base.duration_h, duration),
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
        unit = next(unit for unit in ("tokens", "samples", "n_steps") if all(getattr(x, unit) for pair in pairs for x in pair))
        values = [
            [_ratio(getattr(block, quantity), getattr(block, unit)) for block in side] for side in zip(*pairs, strict=True)
        ]
        if not pairs or any(not value for side in values for value in side):
            return None
        bounds: list[list[tuple[float, float]] | None] = [None, None]
        if quantity == "energy_j" and all(block.energy_lo_j is not None for pair in pairs for block in pair):
            bounds = [
                [(block.energy_lo_j / getattr(block, unit), block.energy_hi_j / getattr(block, unit)) for block in side]
                for side in zip(*pairs, strict=True)
            ]
        gaps = [float(b.position - a.position) for a, b in pairs]
        return paired_difference(
            values[0], values[1], confidence=self.confidence, gaps=gaps, a_bounds=bounds[0], b_bounds=bounds[1]
        )


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
    """What a planned run would save with ``variant`` in place of ``baseline``: positive is less. ``time`` and ``energy`` say with
    what confidence, and whether the two can be told apart at all.
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


def _projected(blocks: Sequence[Block], quantity: str, unit: str, planned: float, confidence: float) -> Range | None:
    """``planned`` units of a quantity from its block means, with their interval; the meter's bounds widen it."""
    rates = [_ratio(getattr(block, quantity), getattr(block, unit)) for block in blocks]
    known = [rate for rate in rates if rate is not None]
    if not known or len(known) < len(rates):
        return None
    interval = mean_interval(known, confidence=confidence)
    if interval.lo is None or interval.hi is None:
        return Range(interval.mean * planned, None, None)
    below = above = 1.0
    energy_j = [(block.energy_j, block.energy_lo_j, block.energy_hi_j) for block in blocks]
    if quantity != "duration_s" and all(lo is not None for _, lo, _ in energy_j):
        total, lowest, highest = (math.fsum(column) for column in zip(*energy_j, strict=True))  # type: ignore[arg-type]  # checked above
        below, above = lowest / total, highest / total
    return Range(interval.mean * planned, max(0.0, interval.lo * below * planned), interval.hi * above * planned)


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


def _known_sum(values: Iterable[float | None]) -> float | None:
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


# ── the comparison, in the parent process ──────────────────────────────────────────────────────────────────────────────


def compare(
    build: Build,
    variants: Sequence[Variant | str],
    *,
    blocks: int = 8,
    steps_per_block: int | None = None,
    budget_s: float = 40.0,
    warmup_steps: int = 3,
    seed: int = 0,
    log_dir: str | os.PathLike[str] | None = None,
    region: str | None = None,
    threads: int | None = None,
    confidence: float = 0.95,
    loss_tolerance: float = 0.02,
    track: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Trains every variant from the same seed on the same data in the same order, block by block in turn, and compares them.

    Spawns processes: in a script, call it under ``if __name__ == "__main__":``. A variant that fails leaves its error as its
    result, and the others'. Ctrl-C ends the comparison with the blocks measured so far.

    Args:
        build: makes the workload of a variant, in a worker: "module:function", or a callable that pickles.
        variants: :class:`Variant`s, or names for :func:`parse_variant`; the first is the baseline.
        blocks: blocks of each variant, each in another round; one gives no interval.
        steps_per_block: optimizer steps a block, the same for all variants. None: as many as fit ``budget_s``, judged by the warm-up.
        budget_s: seconds for all blocks together, where ``steps_per_block`` is None. One step a block is always taken.
        warmup_steps: steps before the first block, left out; at least one (its FLOPs are counted).
        seed: for the weights, the data and the order of the blocks.
        log_dir: each variant's run goes to a folder here, named after it.
        region: where the electricity comes from, as in ``green_torch.track``.
        threads: CPU threads of a worker. None: torch's own choice.
        confidence: of the intervals.
        loss_tolerance: relative; a variant whose last loss differs by more is not the same training.
        track: further arguments of ``green_torch.track``; they must pickle.
        progress: called in this process whenever there is something to tell.

    Raises:
        ArgumentError: an argument is wrong, also where ``green_torch.track`` says so.
    """
    chosen = _check_compare(build, variants, blocks=blocks, steps_per_block=steps_per_block, warmup_steps=warmup_steps)
    tell = progress or (lambda _: None)
    total = blocks * len(chosen)
    options = {**(track or {}), **({} if region is None else {"region": region})}
    context = multiprocessing.get_context("spawn")
    stop = context.RawValue("b", 0)
    jobs = [
        _Job(
            build, variant, seed, warmup_steps, None if log_dir is None else str(Path(log_dir) / variant.name), threads, options
        )
        for variant in chosen
    ]
    arms = [_Arm(job) for job in jobs]
    interrupted = False
    n_steps = steps_per_block or 0
    try:
        try:
            for arm in arms:
                tell(Progress("starting", arm.name, 0, total))
                arm.start(context, stop)
            for arm in arms:
                arm.receive(_Ready)
            for arm in arms:
                tell(Progress("warming up", arm.name, 0, total))
                arm.ask(_WARM_UP, _Warm)
            n_steps = n_steps or _fitting_steps([arm.step_s for arm in arms if arm.step_s], budget_s / blocks)
            done = 0
            for number, order in enumerate(_orders(blocks, len(arms), seed)):
                for position, index in enumerate(order):
                    arm = arms[index]
                    tell(Progress("measuring", arm.name, done, total))
                    arm.measure(_Order(number, position, n_steps))
                    done += 1
            tell(Progress("closing", "", total, total))
        except KeyboardInterrupt:
            interrupted = True
        stop.value = 1
        for arm in arms:
            arm.send(None)
        end_s = time.monotonic() + _CLOSE_S
        for arm in arms:
            arm.receive_rest(end_s)
    finally:
        for arm in arms:
            arm.end()
    return Comparison(tuple(arm.result() for arm in arms), n_steps, confidence, loss_tolerance, interrupted)


def _check_compare(
    build: Build, variants: Sequence[Variant | str], *, blocks: int, steps_per_block: int | None, warmup_steps: int
) -> list[Variant]:
    chosen = [parse_variant(variant) if isinstance(variant, str) else variant for variant in variants]
    names = [variant.name for variant in chosen]
    if not names or len(set(names)) < len(names):
        raise ArgumentError(f"Compare one variant or more, each under a name of its own, not {names}.")
    for key, value in (("blocks", blocks), ("steps_per_block", steps_per_block), ("warmup_steps", warmup_steps)):
        if value is not None and value < 1:
            raise ArgumentError(f"{key}={value!r} must be 1 or more.")
    if isinstance(build, str):
        module, _, function = build.partition(":")
        if not (module and function):
            raise ArgumentError(f"build={build!r} should read 'module:function', such as 'my_project.train:build'.")
    else:
        try:
            pickle.dumps(build)
        except Exception as error:
            raise ArgumentError(
                f"build={build!r} can't be sent to a worker process ({error}); define it at the top level of a module."
            ) from error
    return chosen


def _orders(rounds: int, n: int, seed: int) -> list[tuple[int, ...]]:
    """A random order of ``n`` variants for each round. Every order comes with its reverse, so that any two variants precede each
    other equally often, which cancels steady drift; the rounds are shuffled, which breaks any rhythm.
    """
    chance = random.Random(seed)  # noqa: S311  (a design of an experiment, not a secret)
    orders: list[tuple[int, ...]] = []
    while len(orders) < rounds:
        order = tuple(chance.sample(range(n), n))
        orders += [order, order[::-1]]
    orders = orders[:rounds]
    chance.shuffle(orders)
    return orders


def _fitting_steps(step_s: Sequence[float], round_s: float) -> int:
    """Steps a block so that one block of every variant, settling included, takes about ``round_s`` seconds."""
    one_each_s = math.fsum(step_s)
    return max(1, min(_MAX_STEPS_PER_BLOCK, int(round_s / one_each_s) - _SETTLE_STEPS)) if one_each_s else 1


class _Arm:
    """The parent's end of one worker. A worker that fails or dies is remembered as such, and every later request does nothing."""

    def __init__(self, job: _Job) -> None:
        self.name = job.variant.name
        self.step_s: float | None = None
        self._job = job
        self._blocks: list[Block] = []
        self._error: str | None = None
        self._done: _Done | None = None
        self._threads: int | None = None
        self._process: Any = None  # multiprocessing's SpawnProcess, which has no public name
        self._pipe: Connection | None = None

    def start(self, context: Any, stop: Any) -> None:
        """Starts the worker, which loads torch and the user's code and waits."""
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(self._job, theirs, stop), name=f"green_torch {self.name}", daemon=True
        )
        self._process.start()
        theirs.close()  # or the worker's death would not close the pipe

    def send(self, order: object) -> None:
        """Sends a request, if anyone is there to take it."""
        if self._pipe is not None and self._error is None:
            try:
                self._pipe.send(order)
            except OSError:
                self._died()

    def receive(self, kind: type) -> None:
        """Waits for a reply of this kind, a failure or the worker's death, and files what it brings."""
        while self._pipe is not None and self._error is None and self._done is None:
            try:
                reply = self._pipe.recv()
            except (EOFError, OSError):
                self._died()
                return
            self._file(reply)
            if isinstance(reply, kind):
                return

    def ask(self, order: object, kind: type) -> None:
        """Sends a request and waits for its reply."""
        self.send(order)
        self.receive(kind)

    def measure(self, order: _Order) -> None:
        """Has one block measured."""
        self.ask(order, Block)

    def receive_rest(self, end_s: float) -> None:
        """Takes replies until the worker has closed its run or the monotonic time ``end_s`` has come."""
        while self._pipe is not None and self._error is None and self._done is None:
            try:
                if not self._pipe.poll(max(0.0, end_s - time.monotonic())):
                    self._error = "the worker did not close its run in time"
                    return
                self._file(self._pipe.recv())
            except (EOFError, OSError):
                self._died()

    def end(self) -> None:
        """Sees the worker off."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None and self._process.pid is not None:
            self._process.join(timeout=2.0 if self._done or self._error else 0.0)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()

    def result(self) -> VariantResult:
        """What the worker has brought home."""
        manifest, summary = (self._done.manifest, self._done.summary) if self._done else (None, None)
        return VariantResult(
            variant=self._job.variant,
            blocks=tuple(self._blocks),
            error=self._error,
            manifest=manifest,
            warnings=summary.warnings if summary else (),
            threads=self._threads,
            log_dir=self._job.log_dir,
        )

    def _file(self, reply: object) -> None:
        if isinstance(reply, _Refused):
            raise reply.error
        if isinstance(reply, Block):
            self._blocks.append(reply)
        elif isinstance(reply, _Warm):
            self.step_s, self._threads = reply.step_s, reply.threads
        elif isinstance(reply, _Done):
            self._done = reply
        elif isinstance(reply, _Failed):
            self._error = reply.text

    def _died(self) -> None:
        self._process.join(timeout=2.0)
        code = self._process.exitcode
        if code is not None and code < 0:
            self._error = f"the worker was ended by {signal.Signals(-code).name}{' (out of memory?)' if code == -9 else ''}"
        else:
            self._error = (
                f"the worker ended with code {code} before it answered; what it printed says why. "
                'In a script, call compare() under: if __name__ == "__main__":'
            )


# ── the worker process ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Job:
    """What a worker is started with."""

    build: Build
    variant: Variant
    seed: int
    warmup_steps: int
    log_dir: str | None
    threads: int | None
    track: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Order:
    """One block to measure."""

    round: int
    position: int
    n_steps: int


@dataclass(frozen=True, slots=True)
class _Ready:
    """Torch and the user's code are loaded."""


@dataclass(frozen=True, slots=True)
class _Warm:
    """The warm-up is over; ``step_s`` seconds is what a step took at its end."""

    step_s: float
    threads: int


@dataclass(frozen=True, slots=True)
class _Done:
    """The run is closed."""

    manifest: Manifest
    summary: RunSummary


@dataclass(frozen=True, slots=True)
class _Failed:
    """The variant can't go on."""

    text: str


@dataclass(frozen=True, slots=True)
class _Refused:
    """``green_torch.track`` was given a wrong argument, as it is for every variant."""

    error: ArgumentError


_WARM_UP = "warm up"


def _work(job: _Job, pipe: Connection, stop: Any) -> None:
    """A worker's life: load, build, warm up, measure blocks when asked, close. Ends when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    warnings.simplefilter("ignore", GreenTorchWarning)  # they come back with the summary, once
    try:
        with closing(_serve(job, pipe.recv, lambda: bool(stop.value))) as replies:
            for reply in replies:
                pipe.send(reply)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # nobody is left to tell
    except BaseException as error:  # whatever the user's code raises is this variant's result
        pipe.send(_Failed(_told(error)))


def _told(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    return (
        f"does not fit in memory: {text}"
        if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
        else text
    )


def _serve(job: _Job, receive: Callable[[], Any], stopped: Callable[[], bool]) -> Generator[object, None, None]:
    """Does what it receives orders for, and yields the replies; ``None`` is the order to close."""
    build = _loaded(job.build)

    import torch

    from green_torch.tracker import track

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    yield _Ready()
    if receive() is None:
        return
    torch.manual_seed(job.seed)
    bench = _Bench(job, build(job.variant))
    records = _Records()
    try:
        tracker = track(
            bench.model,
            log_dir=job.log_dir,
            run_name=job.variant.name,
            label=job.variant.name,
            # bounds are tight only over a whole block; on a CPU they are tight enough, or there are none
            log_every_n_steps=1 if bench.device.type == "cpu" else _WHOLE_BLOCK,
            **{**job.track, "sinks": (*job.track.get("sinks", ()), records)},
        )
    except ArgumentError as error:
        yield _Refused(error)
        return
    with tracker:
        warm = _Warm(bench.warm_up(tracker, job.warmup_steps), torch.get_num_threads())
        with tracker.suspend():
            bench.write_losses(tracker)
            yield warm
            order = receive()
        while order is not None:
            span = bench.run(tracker, order.n_steps, stopped)
            with tracker.suspend():
                bench.write_losses(tracker)
                if span is not None:
                    tracker.flush()
                    yield _block(order, span, records.take(span.first_step, span.last_step, _PATIENCE_S))
                order = receive()
    yield _Done(tracker.manifest, tracker.summary())


def _loaded(build: Build) -> Callable[[Variant], Workload]:
    if not isinstance(build, str):
        return build
    module, _, name = build.partition(":")
    function: Callable[[Variant], Workload] = getattr(importlib.import_module(module), name)
    return function


@dataclass(frozen=True, slots=True)
class _Span:
    """The steps of a block, by number; the seconds they took by the host's clock, and their mean loss."""

    first_step: int
    last_step: int
    duration_s: float
    loss: float


class _Bench:
    """A workload with its variant applied, training step by step."""

    def __init__(self, job: _Job, workload: Workload) -> None:
        import torch

        variant, model = job.variant, workload.model
        first = next(model.parameters(), None)
        self.device = first.device if first is not None else torch.device("cpu")
        if variant.matmul_precision is not None:
            torch.set_float32_matmul_precision(variant.matmul_precision)
            torch.backends.cudnn.allow_tf32 = variant.matmul_precision != "highest"
        self._dtype = torch.bfloat16 if variant.precision == "bf16-true" else None
        self.model = model.to(self._dtype).train()
        if variant.gradient_checkpointing:
            _checkpoint(model)
        if variant.compile:
            model.compile()
        self._mixed = variant.precision == "bf16-mixed"
        self._sdpa_backend = variant.sdpa_backend
        self._workload = workload
        self._optimizer = workload.optimizer(model.parameters())
        self._batches = _endless(workload.batches, job.seed)
        self._n_steps = 0
        self._losses: list[torch.Tensor] = []  # since they were last written

    def warm_up(self, tracker: Tracker, n_steps: int) -> float:
        """Takes steps, counting the FLOPs of the first; returns the median seconds of the later half."""
        times_s = []
        for number in range(n_steps):
            start_s = time.monotonic()
            with tracker.count() if number == 0 else nullcontext():
                loss, units = self._train()
            self._mark(tracker, loss, units, wait=True)
            times_s.append(time.monotonic() - start_s)
        return stdlib_statistics.median(times_s[len(times_s) // 2 :])

    def run(self, tracker: Tracker, n_steps: int, stopped: Callable[[], bool]) -> _Span | None:
        """Settles, then takes the steps of a block; ``None`` where it was stopped on the way."""
        for _ in range(_SETTLE_STEPS):
            self._mark(tracker, *self._train(), wait=True)
        with tracker.suspend():  # ends the record, so that the block begins with one of its own
            start_s = time.monotonic()
        first_step = self._n_steps
        for number in range(n_steps):
            if stopped():
                return None
            self._mark(tracker, *self._train(), wait=number == n_steps - 1)
        duration_s = time.monotonic() - start_s
        loss = math.fsum(float(loss) for loss in self._losses[-n_steps:]) / n_steps
        return _Span(first_step, self._n_steps - 1, duration_s, loss)

    def write_losses(self, tracker: Tracker) -> None:
        """Gives TensorBoard the losses since last time, on the step axis of everything else."""
        if tracker.writer is not None:
            for step, loss in enumerate(self._losses, self._n_steps - len(self._losses)):
                tracker.writer.add_scalar("loss", float(loss), step)
        self._losses.clear()

    def _train(self) -> tuple[torch.Tensor, Mapping[str, int]]:
        import torch

        batch = next(self._batches)
        moved = _moved(batch, self.device, self._dtype)
        with _attention(self._sdpa_backend):  # around backward too: recomputation must choose the same kernel
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._mixed):
                loss = self._workload.loss(self.model, moved)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach(), self._workload.units(batch)

    def _mark(self, tracker: Tracker, loss: torch.Tensor, units: Mapping[str, int], *, wait: bool) -> None:
        """Ends a step; at either end of a block the device is waited for, so that the block's time and joules are its own."""
        if wait and self.device.type != "cpu":
            import torch

            torch.accelerator.synchronize()
        tracker.step(**units)
        self._n_steps += 1
        self._losses.append(loss)


class _Records:
    """A sink that keeps train records until they are taken."""

    def __init__(self) -> None:
        self._records: list[StepRecord] = []
        self._news = threading.Condition()

    def write(self, item: Item) -> None:
        """Keeps it if it is one."""
        if isinstance(item, StepRecord) and item.phase is Phase.TRAIN:
            with self._news:
                self._records.append(item)
                self._news.notify_all()

    def close(self) -> None:
        """Has nothing to close."""

    def take(self, first_step: int, last_step: int, timeout_s: float) -> list[StepRecord]:
        """The records of these steps, waiting for the last one at most so long; forgets everything older."""
        with self._news:
            self._news.wait_for(lambda: any(record.step >= last_step for record in self._records), timeout_s)
            found = [record for record in self._records if first_step <= record.step <= last_step]
            self._records.clear()
        return found


def _block(order: _Order, span: _Span, records: Sequence[StepRecord]) -> Block:
    """Sums records; where some are missing, what they would have told is not known."""
    n_steps = span.last_step - span.first_step + 1
    whole = sum(record.n_steps for record in records) == n_steps

    def total(name: str) -> float | None:
        return _known_sum(getattr(record, name) for record in records) if whole else None

    def count(name: str) -> int | None:
        found = total(name)
        return None if found is None else int(found)

    return Block(
        round=order.round,
        position=order.position,
        n_steps=n_steps,
        duration_s=total("duration_s") or span.duration_s,
        energy_j=total("energy_j"),
        energy_lo_j=total("energy_lo_j"),
        energy_hi_j=total("energy_hi_j"),
        emissions_g=total("emissions_g"),
        model_flops=total("model_flops"),
        hardware_flops=total("hardware_flops"),
        capacity_flops=_known_sum(_product(record.peak_flop_per_s, record.duration_s) for record in records) if whole else None,
        tokens=count("tokens"),
        samples=count("samples"),
        loss=span.loss,
        peak_memory_bytes=max((record.peak_memory_bytes for record in records if record.peak_memory_bytes), default=None),
        flags=tuple(sorted({flag for record in records for flag in record.flags})),
    )


def _product(a: float | None, b: float) -> float | None:
    return None if a is None else a * b


def _endless(batches: Callable[[int], Iterable[Any]], seed: int) -> Iterator[Any]:
    """The batches, again and again."""
    while True:
        empty = True
        for batch in batches(seed):
            empty = False
            yield batch
        if empty:
            raise ArgumentError(f"batches({seed}) yields nothing to train on.")


def _moved(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The batch on the device, its floating-point tensors in the dtype, through tuples, lists and mappings."""
    import torch

    if isinstance(batch, torch.Tensor):
        return batch.to(device, dtype if batch.is_floating_point() else None, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device, dtype) for key, value in batch.items()}
    return type(batch)(_moved(value, device, dtype) for value in batch) if isinstance(batch, list | tuple) else batch


def _attention(backend: str | None) -> AbstractContextManager[None]:
    """Pins torch's attention kernel."""
    if backend is None:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {
        "math": SDPBackend.MATH,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    pinned: AbstractContextManager[None] = sdpa_kernel(kernels[backend])
    return pinned


def _checkpoint(model: torch.nn.Module) -> None:
    """Recomputes each module of the outermost lists of modules in backward.

    Raises:
        ArgumentError: the model has none.
    """
    from torch.utils.checkpoint import checkpoint

    blocks = list(_listed(model))
    if not blocks:
        raise ArgumentError(
            f"gradient_checkpointing needs blocks in a torch.nn.ModuleList, and {type(model).__name__} has none."
        )
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _listed(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    import torch

    for child in model.children():
        yield from child if isinstance(child, torch.nn.ModuleList) else _listed(child)
