"""``green-torch demo``: trains a small GPT on Python's own source in FP32 and in BF16, and shows what either costs.

No download, no key, no GPU: a comparison of two variants of the smallest built-in workload (:mod:`green_torch.cli.compare`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.text import Text

from green_torch.cli import compare
from green_torch.cli.comparison import Plan
from green_torch.errors import ArgumentError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

SCHEMA = "green_torch.demo/1"
VARIANTS = ("fp32", "bf16")
PLANNED_TOKENS = 10e9
BUDGET_S = 40.0
_BLOCKS = 8


def demonstrate(log_dir: Path, *, steps: int | None, region: str | None, seed: int, console: Console) -> compare.Found:
    """Trains and measures, with a progress bar on ``console``. ``steps`` of each variant; ``None``: what fits in 40 s.

    Raises:
        ArgumentError: an unknown region, a directory that can't be written, or steps below 1.
    """
    if steps is not None and steps < 1:
        raise ArgumentError(f"--steps {steps}: give 1 or more")
    blocks = _BLOCKS if steps is None else min(_BLOCKS, steps)
    found, where = compare.measure(
        "green_torch.gpt:workload",
        VARIANTS,
        console,
        log_dir=log_dir,
        region=region,
        seed=seed,
        blocks=blocks,
        steps_per_block=None if steps is None else math.ceil(steps / blocks),
        budget_s=BUDGET_S if steps is None else None,
    )
    return compare.Found(found, Plan(tokens=PLANNED_TOKENS), where, seed)


def show(found: compare.Found, console: Console) -> None:
    """Prints the finding."""
    console.print(
        Text("The same small GPT trained on Python's own source, same seed, same data, in FP32 and in BF16", style="bold green")
    )
    compare.show(found, console)


def as_json(found: compare.Found) -> dict[str, Any]:
    """Everything for a program to read."""
    return compare.as_json(found, SCHEMA)
