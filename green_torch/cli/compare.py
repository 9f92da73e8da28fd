"""``green-torch compare``: variants of your training side by side, or runs that are on disk already, and what a planned run would save.

:func:`measure` runs a comparison behind a progress bar, :func:`show` prints it, :func:`as_json` is the same for a program; the tables
are :mod:`green_torch.cli.comparison`'s.
"""

from __future__ import annotations

import importlib.util
import math
import re
import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

import green_torch
from green_torch import experiment
from green_torch.cli.comparison import Compared, Plan, comparison_parts, findings, in_counted_work
from green_torch.cli.options import options_named, share
from green_torch.errors import ArgumentError, GreenTorchWarning
from green_torch.experiment.elsewhere import grids
from green_torch.experiment.recorded import compare_runs
from green_torch.experiment.results import NOT_FIT
from green_torch.sinks.codec import plain
from green_torch.units import S_PER_HOUR, kwh_to_joules

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

SCHEMA = "green_torch.compare/1"
VARIANTS = "fp32,bf16,bf16+flash"
_CPU_SIZE = "10M"
# What lies behind at each stage, in blocks' time; above 0 at first, since that is where the pace counts from.
_AHEAD = {"starting": 0.1, "warming up": 3, "measuring": 5}
_EXPECTED = (NOT_FIT, "can't run here")  # errors that are findings: what a variant was tried for
_WHOLE_RUN_S = 3600.0
_MOST_PLANNED = 1e30  # of anything: what is made of more may be no number, and a plan is refused before anything is measured
_BUDGET = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[a-zA-Z]*)")
_SECONDS = {"s": 1.0, "min": 60.0, "m": 60.0, "h": S_PER_HOUR}
_BYTES = {"mb": 10**6, "gb": 10**9, "mib": 2**20, "gib": 2**30}
_OPTIONS = {  # how this command says what the library's messages call by its arguments
    r"\bsteps_per_block=": "--steps ",
    r"\blargest_batch=4 \* 2\*\*30 \(4 GiB\)": "--largest-batch 4GiB",
    r"\blargest_batch=": "--largest-batch ",
    r"\b(blocks|until|region)=": r"--\1 ",
    r"\blog_dir=": "--log-dir ",
    r", (a cloud region [^,]*), or the figure itself: intensity=<gCO2e/kWh>": r" or \1",
}
_MEASURING = {"steps_per_block": "--steps", "budget_s": "--budget", "budget_j": "--budget"}  # the others are called as they are
_JOULES = {"j": 1.0, "kj": 1e3, "mj": 1e6, "wh": kwh_to_joules(1e-3), "kwh": kwh_to_joules(1.0)}


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """Builds the built-in GPT in a worker; "auto" is what fits the device: 10M parameters on a CPU, 124M on a GPU with room for it."""

    size: str = "auto"

    def __call__(self, variant: experiment.Variant) -> experiment.Workload:
        """The workload of a variant."""
        import torch

        from green_torch.gpt import workload

        size = _CPU_SIZE if self.size == "auto" and not torch.cuda.is_available() else self.size
        return workload(variant, size=size)


@dataclass(frozen=True, slots=True)
class Found:
    """What a comparison found, the plan that it is projected to, and where its runs are."""

    comparison: Compared
    plan: Plan | None
    log_dir: Path | None
    seed: int | None

    @property
    def command(self) -> str:
        """The line that shows the runs in TensorBoard."""
        return f"green-torch tensorboard {shlex.quote(str(self.log_dir))}"

    @property
    def nothing_left(self) -> bool:
        """Whether no variant was measured."""
        return not any(result.blocks for result in self.comparison.results)

    @property
    def failed(self) -> bool:
        """Whether the baseline was not measured, or a variant failed by more than not fitting in memory or not running on this machine."""
        if not isinstance(self.comparison, experiment.Comparison):
            return False
        errors = [result.error for result in self.comparison.results if result.error]
        return not self.comparison.baseline.blocks or not all(one.startswith(_EXPECTED) for one in errors)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it."""
        return isinstance(self.comparison, experiment.Comparison) and self.comparison.interrupted


# ── what was typed ─────────────────────────────────────────────────────────────────────────────────────────────────────


def parse_plan(
    *,
    tokens: float | None = None,
    samples: float | None = None,
    steps: float | None = None,
    price: float | None = None,
    regions: str | None = None,
) -> Plan | None:
    """The plan that the options speak of; ``None`` where they speak of none.

    Raises:
        ArgumentError: more than one amount, an amount or price that is none, a price or regions without an amount, or an unknown region.
    """
    given = {
        key: value
        for key, value in (("--tokens", tokens), ("--samples", samples), ("--planned-steps", steps))
        if value is not None
    }
    if len(given) > 1:
        raise ArgumentError(f"{' and '.join(given)}: plan one amount of work")
    for key, value in given.items():
        if not 0 < value <= _MOST_PLANNED:
            raise ArgumentError(f"{key} {value:g}: give a positive number, up to {_MOST_PLANNED:g}")
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise ArgumentError(f"--price {price:g}: give money per kWh, 0 or more")
    if not given and (price is not None or regions):
        raise ArgumentError(
            "--price and --regions are about a planned run: say how long, such as --tokens 10e9 or --planned-steps 100000"
        )
    with options_named({r"\bregion=": "--regions ", **_OPTIONS}):
        found = grids(_listed(regions)) if regions else ()
    return Plan(tokens, samples, price, found, steps) if given else None


def parse_share(text: str) -> float:
    """Half an interval's width as a fraction: "1%" or "0.01".

    Raises:
        ArgumentError: no number between 0 and 1 (100 %).
    """
    value = share(text)
    if not 0 < value < 1:
        raise ArgumentError(f"--until {text}: give half the interval's width, such as 1% or 0.01")
    return value


def parse_budget(text: str) -> dict[str, float]:
    """A time ("90s", "5m", "1h") as ``budget_s``, an energy ("20kJ", "0.05kWh") as ``budget_j``.

    Raises:
        ArgumentError: neither time nor energy, or a number without a unit.
    """
    match = _BUDGET.fullmatch(text.strip())
    unit = match["unit"].lower() if match and match["unit"] != "mJ" else "none"  # of millijoules nobody means so many million
    if match and not unit:
        number = match["number"]
        raise ArgumentError(
            f"--budget {text}: say of what, such as {number}s, {number}m or {number}kJ (seconds, minutes, kilojoules; also 90s, 0.05kWh)"
        )
    for key, units in (("budget_s", _SECONDS), ("budget_j", _JOULES)):
        if match and unit in units and float(match["number"]) > 0:
            return {key: float(match["number"]) * units[unit]}
    raise ArgumentError(f"--budget {text}: give a time or an energy, such as 90s, 5m, 1h, 20kJ or 0.05kWh")


def parse_memory(text: str) -> bool | int:
    """What ``largest_batch`` of :func:`green_torch.experiment.compare` takes: "device", or so many bytes ("8GiB", "500MB").

    Raises:
        ArgumentError: neither.
    """
    if text.strip().lower() == "device":
        return True
    match = _BUDGET.fullmatch(text.strip())
    scale = _BYTES.get(match["unit"].lower()) if match else None
    if match is None or scale is None or float(match["number"]) <= 0:
        raise ArgumentError(f'--largest-batch {text}: give "device" for the GPU\'s own memory, or so much of it, such as 8GiB')
    return int(float(match["number"]) * scale)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _build(target: str | None, size: str) -> experiment.Build:
    """What to train: the user's, found from the current directory, or the built-in GPT.

    Raises:
        ArgumentError: there is no such module or size, or a size for what is not ours.
    """
    if target is None:
        if size != "auto":
            from green_torch.gpt import SIZES  # loads torch, so only where a size is asked for

            if size not in SIZES:
                raise ArgumentError(f"--size {size}: the built-in GPT comes as {', '.join(SIZES)} or auto")
        return BuiltIn(size)
    if size != "auto":
        raise ArgumentError(f"--size {size} is of the built-in GPT; {target} has its own")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as python -m does: modules of the current folder; workers inherit it
    module = target.partition(":")[0]
    try:
        there = not module or importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        there = False
    if not there and module.endswith(".py"):
        name = module.removesuffix(".py").replace("/", ".")
        raise ArgumentError(f"{target!r}: {module} is a file; say its module: {name}:{target.partition(':')[2] or 'build'}")
    if not there:
        raise ArgumentError(f"{target!r}: there is no module {module!r}: run it where `python -c 'import {module}'` works")
    return target


# ── measuring ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def compare(
    targets: Sequence[str],
    console: Console,
    *,
    variants: str | None = None,
    size: str = "auto",
    log_dir: Path | None = None,
    region: str | None = None,
    seed: int = 0,
    force: bool = False,
    plan: Plan | None = None,
    options: dict[str, Any] | None = None,
) -> Found:
    """Compares what the targets name: runs on disk (two directories or more), or variants of a ``module:build`` (none: the built-in GPT).

    Raises:
        ArgumentError: a wrong argument, also where :func:`green_torch.experiment.compare` says so.
        LedgerError: a run on disk that can't be read.
    """
    folders = [one for one in targets if Path(one).is_dir() or (":" not in one and (len(targets) > 1 or "/" in one))]
    found: Compared
    if folders:
        if len(folders) < len(targets) or len(folders) == 1:
            raise ArgumentError(
                f"{' '.join(targets)}: give one module:build, or two directories of runs or more, such as runs/a runs/b"
            )
        _check_over(
            targets, {"variants": variants, "size": size != "auto", "log_dir": log_dir, "seed": seed, **(options or {})}
        )
        found, where = compare_runs(folders, force=force, region=region), None
    elif len(targets) > 1 or force:
        raise ArgumentError(
            "--force is for runs on disk: green-torch compare runs/a runs/b --force" if force else "give one module:build"
        )
    else:
        build = _build(targets[0] if targets else None, size)
        with options_named(_OPTIONS):
            found, where = measure(
                build,
                _listed(variants or VARIANTS),
                console,
                log_dir=log_dir or Path("runs/compare"),
                region=region,
                seed=seed,
                **options or {},
            )
    return Found(found, None if plan is None else in_counted_work(found, plan), where, None if folders else seed)


def _check_over(targets: Sequence[str], given: Mapping[str, Any]) -> None:
    """Refuses what is about measuring where runs are over.

    Raises:
        ArgumentError: some of it was given.
    """
    refused = dict.fromkeys(_MEASURING.get(key, f"--{key.replace('_', '-')}") for key, value in given.items() if value)
    if refused:
        raise ArgumentError(
            f"{', '.join(refused)}: of a training that is measured now; {' '.join(targets)} are runs that are over: leave "
            f"{'it' if len(refused) == 1 else 'them'} out"
        )


def measure(
    build: experiment.Build,
    variants: Sequence[str],
    console: Console,
    *,
    log_dir: Path,
    region: str | None,
    seed: int,
    **options: Any,
) -> tuple[experiment.Comparison, Path]:
    """Trains and measures, with a progress bar on ``console``; the comparison, and where its runs went.

    Raises:
        ArgumentError: as :func:`green_torch.experiment.compare`, before a worker has loaded torch where it can be told.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GreenTorchWarning)
        green_torch.track(log_dir=log_dir, region=region, meters=())
    free = _free(log_dir, variants)
    line = _Lines(console)
    elsewhere = [] if free == log_dir else [f"{log_dir} holds earlier runs: these go to {free}"]
    with _bar(console) as bar:
        task = bar.add_task("loading torch", total=None)

        def tell(at: experiment.Progress) -> None:
            while elsewhere:  # told where it starts: not where an argument is refused
                console.print(elsewhere.pop(), highlight=False, markup=False)
            stage = "loading torch" if at.stage == "starting" else f"{at.stage} {at.variant}"
            width = "" if at.half_width is None else f", ±{100 * at.half_width:.2g} % so far"
            ahead = _AHEAD.get(at.stage, _AHEAD["measuring"])
            line(f"{stage.strip()}{width}, {at.done} of {at.total} blocks done")
            bar.update(task, description=f"{stage}{width}", completed=ahead + at.done, total=_AHEAD["measuring"] + at.total)

        found = experiment.compare(build, variants, seed=seed, log_dir=free, region=region, progress=tell, **options)
    return found, free


class _Lines:
    """Where there is no terminal, and so no bar: a line for each stage and block, none twice."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = ""

    def __call__(self, text: str) -> None:
        """Prints it, unless it is what was printed last or a bar shows it."""
        if not self._console.is_terminal and text != self._last:
            self._last = text
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _bar(console: Console) -> Progress:
    """Stage, bar, percent, and the time left by the pace so far."""
    return Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %  time left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # it would leave an empty line
        speed_estimate_period=_WHOLE_RUN_S,
    )


def _free(log_dir: Path, variants: Sequence[str]) -> Path:
    """The directory itself, or ``…-2`` and so on where runs stand already: two runs in one directory would read as one resumed."""
    number, free = 1, log_dir
    while any((free / variant).exists() for variant in variants):
        number += 1
        free = log_dir.with_name(f"{log_dir.name}-{number}")
    return free


# ── what was found ─────────────────────────────────────────────────────────────────────────────────────────────────────


def show(found: Found, console: Console) -> None:
    """Prints the finding."""
    for part in comparison_parts(found.comparison, found.plan):
        console.print(part)
    if found.log_dir is not None and any(result.blocks for result in found.comparison.results):
        console.print()
        console.print(Text.assemble("See every step: ", (found.command, "bold")), soft_wrap=True)


def as_json(found: Found, schema: str = SCHEMA) -> dict[str, Any]:
    """Everything for a program to read."""
    comparison, plan = found.comparison, found.plan
    content: dict[str, Any] = {
        "schema": schema,
        "version": green_torch.__version__,
        "seed": found.seed,
        "findings": findings(comparison),
        "comparison": comparison.to_dict(),
        "log_dir": None if found.log_dir is None else str(found.log_dir),
        "tensorboard": None if found.log_dir is None else found.command,
    }
    return content if plan is None else {**content, **_planned(comparison, plan)}


def _planned(comparison: Compared, plan: Plan) -> dict[str, Any]:
    """A planned run under each variant, what each saves or why nothing is told, its money, and its grams on other grids."""
    ran = [result for result in comparison.results if result.blocks]
    projections = {result.name: plan.project(result, comparison.confidence) for result in ran}
    others = [result.name for result in ran if result is not comparison.baseline]
    savings = {name: plan.saving(comparison, name) for name in others}
    unsaved = {name: plan.unsaved(comparison, name) for name in others}
    costs = {name: plan.cost(one) for name, one in projections.items() if one is not None}
    saved = {name: plan.cost(one) for name, one in savings.items() if one is not None}
    return {
        "planned_tokens": plan.tokens,
        "planned_samples": plan.samples,
        "planned_steps": plan.steps,
        "price_per_kwh": plan.price_per_kwh,
        "projections": {name: plain(one) for name, one in projections.items()},
        "savings": {name: plain(one) for name, one in savings.items() if one is not None},
        "no_saving": {name: why for name, why in unsaved.items() if why},
        "costs": {name: plain(one) for name, one in costs.items()},
        "costs_saved": {name: plain(one) for name, one in saved.items()},
        "elsewhere": [
            {
                **plain(grid),
                "basis": grid.basis,
                "emissions_g": {
                    name: plain(grid.emissions_g(one.energy_kwh))
                    for name, one in projections.items()
                    if one is not None and one.energy_kwh is not None
                },
                "emissions_saved_g": {
                    name: plain(grid.emissions_g(one.energy_kwh))
                    for name, one in savings.items()
                    if one is not None and one.energy_kwh is not None
                },
            }
            for grid in plan.elsewhere
        ],
    }
