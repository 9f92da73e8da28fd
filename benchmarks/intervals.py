"""How often the 95 % interval of a comparison holds the truth: on scripted machines, with and without stopping by its width.

``python benchmarks/intervals.py`` (a few minutes; ``--repetitions``). Nothing is measured: every figure follows from the seed.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from report import table, write

from green_torch import statistics
from green_torch.statistics import MIN_PAIRS_LOOKING, Difference, mean_interval, t_quantile
from tests.block_noise import MACHINES, compared, compared_until, machine

MOST = 100
BLOCKS = (4, 8, 10, 16, 30)
PAIRS = (8, 10, 20, 40)
SHARES = (1.2, 1.0, 0.85, 0.7, 0.55, 0.4)


def coverage(found: list[Difference]) -> float:
    """The share of the intervals that hold zero."""
    return float(np.mean([one.lo is not None and one.hi is not None and one.lo <= 0 <= one.hi for one in found]))


def fixed(kind: str, repetitions: int) -> dict[int, float]:
    """Coverage by a number of blocks fixed beforehand."""
    runs = machine(kind, max(BLOCKS), repetitions)
    return {n: coverage([compared(series, n) for series in runs]) for n in BLOCKS}


def stopped(kind: str, repetitions: int) -> list[dict[str, float]]:
    """Coverage where the width ends the measuring, by how narrow it is asked to be; with the error rate spent in full, and as we do."""
    runs = machine(kind, MOST, repetitions)
    typical = float(np.median([compared(series, MIN_PAIRS_LOOKING).half_width for series in runs[:200]]))
    rows = []
    for share in SHARES:
        with patch.object(statistics, "_LOOKING_COSTS", 0.0):
            plain = coverage([compared_until(series, share * typical, MOST) for series in runs])
        found = [compared_until(series, share * typical, MOST) for series in runs]
        rows.append(
            {
                "half_width": share * typical,
                "blocks": float(np.mean([one.n_blocks for one in found])),
                "uncorrected": plain,
                "corrected": coverage(found),
            }
        )
    return rows


@dataclass(frozen=True, slots=True)
class Wandering:
    """Of a difference that wanders: how often its interval holds the mean, and the median of its width over the classic t-interval's."""

    coverage: float
    width: float


def wandering(correlation: float, n: int, repetitions: int) -> Wandering:
    """Where the difference itself wanders, an AR(1) process from pair to pair."""
    rng = np.random.default_rng(n)
    held, widths = 0, []
    for _ in range(repetitions):
        values = [rng.standard_normal()]
        while len(values) < n:
            values.append(correlation * values[-1] + math.sqrt(1 - correlation**2) * rng.standard_normal())
        found = mean_interval(values)
        assert found.lo is not None
        assert found.hi is not None
        held += found.lo <= 0 <= found.hi
        classic = t_quantile(0.975, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
        widths.append((found.hi - found.lo) / 2 / classic)
    return Wandering(held / repetitions, float(np.median(widths)))


def main() -> None:
    """Simulates and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=4000)
    n = parser.parse_args().repetitions
    fixed_by = {kind: fixed(kind, n) for kind in MACHINES}
    stopped_by = {kind: stopped(kind, n) for kind in MACHINES}
    wandering_by = {r: {k: wandering(r, k, n) for k in PAIRS} for r in (0.0, 0.3, 0.6)}
    body = "\n\n".join(
        (
            (
                f"How often the 95 % interval of fp32 against fp32 holds zero, over {n} comparisons each (standard error "
                f"{100 * math.sqrt(0.05 * 0.95 / n):.2f} %). The machines are those of tests/block_noise.py: {', '.join(MACHINES)}."
            ),
            "## A number of blocks fixed beforehand",
            table(
                ["machine", *(f"{k} blocks" for k in BLOCKS)],
                [[kind, *(f"{100 * found[k]:.1f} %" for k in BLOCKS)] for kind, found in fixed_by.items()],
            ),
            "## Stopped by the width (two looks in a row, the first after 10 blocks)",
            table(
                ["machine", "half-width", "blocks, mean", "error rate spent in full", "less of it with every look"],
                [
                    [
                        kind,
                        f"{100 * row['half_width']:.2f} %",
                        f"{row['blocks']:.1f}",
                        f"{100 * row['uncorrected']:.1f} %",
                        f"{100 * row['corrected']:.1f} %",
                    ]
                    for kind, rows in stopped_by.items()
                    for row in rows
                ],
            ),
            "## What no interval of few blocks can know: a difference that itself wanders",
            table(
                ["lag-1 autocorrelation of the difference", *(f"{k} pairs" for k in PAIRS)],
                [[f"{r:g}", *(f"{100 * one.coverage:.1f} %" for one in found.values())] for r, found in wandering_by.items()],
            ),
            (
                "The price, paid also where the difference does not wander, since ten pairs estimate an autocorrelation with a standard "
                "error of 0.3: the median width over that of Student's interval, which takes the pairs for independent."
            ),
            table(
                ["lag-1 autocorrelation of the difference", *(f"{k} pairs" for k in PAIRS)],
                [[f"{r:g}", *(f"{one.width:.2f} ×" for one in found.values())] for r, found in wandering_by.items()],
            ),
        )
    )
    write(
        "intervals",
        "Coverage of the comparison's interval",
        body,
        {
            "repetitions": n,
            "fixed": fixed_by,
            "stopped": stopped_by,
            "wandering": {r: {k: asdict(one) for k, one in found.items()} for r, found in wandering_by.items()},
        },
    )


if __name__ == "__main__":
    main()
