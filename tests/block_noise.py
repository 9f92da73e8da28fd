"""Block means of two variants on scripted machines: noise that lasts, drift that dies out, in the order of the comparison's own design.

For the tests of the interval's coverage, and for ``benchmarks/intervals.py``.
"""

from __future__ import annotations

import math

import numpy as np

from green_torch.experiment.rounds import _orders
from green_torch.statistics import MIN_PAIRS_LOOKING, Difference, paired_difference

Series = list[tuple[float, float, float]]  # a, b, and how much later b was measured, by round

# Noise in percent of the level: of each block alone, and of what lasts from block to block (AR(1) by its lag-1 correlation);
# a drift that dies out as the machine warms up, and a random walk (room temperature, neighbours).
MACHINES = {
    "quiet": {"white": 1.6, "lasting": 0.8, "correlation": 0.5, "warming": 2.0, "walk": 0.05},
    "warming": {"white": 0.3, "lasting": 1.0, "correlation": 0.7, "warming": 8.0, "walk": 0.1},
    "shared": {"white": 0.5, "lasting": 2.0, "correlation": 0.9, "warming": 3.0, "walk": 0.5},
}


def machine(kind: str, rounds: int, repetitions: int, truth: float = 0.0, seed: int = 1) -> list[Series]:
    """So many comparisons on one kind of machine, ``b`` being ``truth`` more than ``a`` (0.02: 2 %)."""
    noise = MACHINES[kind]
    rng = np.random.default_rng([seed, list(MACHINES).index(kind)])
    shape = (repetitions, 2 * rounds)
    level = np.empty(shape)
    level[:, 0] = rng.standard_normal(repetitions)
    for k in range(1, 2 * rounds):
        step = rng.standard_normal(repetitions) * math.sqrt(1 - noise["correlation"] ** 2)
        level[:, k] = noise["correlation"] * level[:, k - 1] + step
    level = noise["lasting"] * level + noise["white"] * rng.standard_normal(shape)
    level += noise["walk"] * np.cumsum(rng.standard_normal(shape), axis=1) - noise["warming"] * np.exp(
        -np.arange(2 * rounds) / 8
    )
    level = np.exp(level / 100)
    runs = []
    for number, values in enumerate(level):
        orders = _orders(rounds, 2, number)
        series = []
        for k, order in enumerate(orders):
            first_is_a = order[0] == 0
            pair = values[2 * k : 2 * k + 2] if first_is_a else values[2 * k : 2 * k + 2][::-1]
            series.append((float(pair[0]), float(pair[1]) * (1 + truth), 1.0 if first_is_a else -1.0))
        runs.append(series)
    return runs


def log_ratio(series: Series, k: int) -> float:
    """The logarithm of b over a in round ``k``."""
    return math.log(series[k][1] / series[k][0])


def compared(series: Series, n: int, *, looking: bool = False) -> Difference:
    """The comparison after ``n`` rounds."""
    a, b, gaps = zip(*series[:n], strict=True)
    return paired_difference(a, b, gaps=gaps, looking=looking)


def compared_until(series: Series, until: float, most: int, *, looking: bool = True) -> Difference:
    """As ``compare(until=)`` goes on: a look after each round, at the rounds before it; two narrow ones in a row end it."""
    narrow = False
    for n in range(MIN_PAIRS_LOOKING, most):
        half_width = compared(series, n, looking=looking).half_width
        before, narrow = narrow, half_width is not None and half_width <= until
        if before and narrow:
            return compared(series, n + 1, looking=looking)
    return compared(series, most, looking=looking)
