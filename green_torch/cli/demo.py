"""``green-torch demo``: trains a small GPT on Python's own source in FP32 and in BF16, and shows what either costs.

No download, no key, no GPU. :func:`demonstrate` measures; the finding is printed by :mod:`green_torch.cli.console`.
"""

from __future__ import annotations

import math
import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

import green_torch
from green_torch import experiment
from green_torch.cli.console import comparison_parts, findings
from green_torch.errors import ArgumentError, GreenTorchWarning
from green_torch.sinks.codec import plain

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "green_torch.demo/1"
VARIANTS = ("fp32", "bf16")
PLANNED_TOKENS = 10e9
BUDGET_S = 40.0
_BLOCKS = 8
# What lies behind at each stage, in blocks' time; above 0 at first, since that is where the pace counts from.
_AHEAD = {"starting": 0.1, "warming up": 3, "measuring": 5}
_WHOLE_RUN_S = 3600.0


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo found, and where its runs are."""

    comparison: experiment.Comparison
    log_dir: Path
    seed: int

    @property
    def command(self) -> str:
        """The line that shows the runs in TensorBoard."""
        return f"tensorboard --logdir {shlex.quote(str(self.log_dir))}"


def demonstrate(log_dir: Path, *, steps: int | None, region: str | None, seed: int, console: Console) -> Demo:
    """Trains and measures, with a progress bar on ``console``. ``steps`` of each variant; ``None``: what fits in 40 s.

    Raises:
        ArgumentError: an unknown region, a directory that can't be written, or steps below 1.
    """
    if steps is not None and steps < 1:
        raise ArgumentError(f"--steps {steps}: give 1 or more")
    with warnings.catch_warnings():  # wrong arguments raise here, before two workers have loaded torch
        warnings.simplefilter("ignore", GreenTorchWarning)
        green_torch.track(log_dir=log_dir, region=region, meters=())
    free = _free(log_dir)
    if free != log_dir:
        console.print(f"{log_dir} holds an earlier demo: this one goes to {free}", highlight=False, markup=False)
    blocks = _BLOCKS if steps is None else min(_BLOCKS, steps)
    with _bar(console) as bar:
        task = bar.add_task("loading torch", total=_AHEAD["measuring"] + blocks * len(VARIANTS))

        def tell(at: experiment.Progress) -> None:
            stage = "loading torch" if at.stage == "starting" else f"{at.stage} {at.variant}"
            bar.update(task, description=stage, completed=_AHEAD.get(at.stage, _AHEAD["measuring"]) + at.done)

        found = experiment.compare(
            "green_torch.gpt:workload",
            VARIANTS,
            blocks=blocks,
            steps_per_block=None if steps is None else math.ceil(steps / blocks),
            budget_s=BUDGET_S,
            seed=seed,
            log_dir=free,
            region=region,
            progress=tell,
        )
    return Demo(found, free, seed)


def _bar(console: Console) -> Progress:
    """Stage, bar, percent, and the time left by the pace so far."""
    return Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %  time left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        speed_estimate_period=_WHOLE_RUN_S,
    )


def _free(log_dir: Path) -> Path:
    """The directory itself, or ``…-2`` and so on where an earlier demo stands: two runs in one directory would read as one resumed."""
    number, free = 1, log_dir
    while any((free / variant).exists() for variant in VARIANTS):
        number += 1
        free = log_dir.with_name(f"{log_dir.name}-{number}")
    return free


def show(demo: Demo, console: Console) -> None:
    """Prints the finding."""
    console.print(
        Text("The same small GPT trained on Python's own source, same seed, same data, in FP32 and in BF16", style="bold green")
    )
    for part in comparison_parts(demo.comparison, PLANNED_TOKENS):
        console.print(part)
    console.print()
    console.print(Text.assemble("See every step: ", (demo.command, "bold")), soft_wrap=True)


def as_json(demo: Demo) -> dict[str, Any]:
    """Everything for a program to read."""
    found = demo.comparison
    projections = {
        r.name: plain(experiment.project(r, planned_tokens=PLANNED_TOKENS, confidence=found.confidence))
        for r in found.results
        if r.blocks
    }
    savings = {
        r.name: plain(found.saving(r.name, planned_tokens=PLANNED_TOKENS))
        for r in found.results[1:]
        if r.blocks and found.baseline.blocks and not found.departure(r.name)
    }
    return {
        "schema": SCHEMA,
        "version": green_torch.__version__,
        "seed": demo.seed,
        "findings": findings(found),
        "comparison": found.to_dict(),
        "planned_tokens": PLANNED_TOKENS,
        "projections": projections,
        "savings": savings,
        "log_dir": str(demo.log_dir),
        "tensorboard": demo.command,
    }
