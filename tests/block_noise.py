"""Block means of two variants on scripted machines: noise that lasts, drift that dies out, in the order of the comparison's own design.

For the tests of the interval's coverage, and for ``benchmarks/intervals.py``.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from green_torch.experiment.results import Block
from green_torch.experiment.rounds import _Arm, _measure, _orders, _Plan, _Teller
from green_torch.experiment.variants import Variant
from green_torch.experiment.worker import Job, Measured, Order
from green_torch.statistics import Difference, paired_difference

Series = list[tuple[float, float, float]]  # a, b, and how much later b was measured, by round

# Noise in percent of the level: of each block alone, and of what lasts from block to block (AR(1) by its lag-1 correlation);
# a drift that dies out as the machine warms up, and a random walk (room temperature, neighbours).
MACHINES = {
    "quiet": {"white": 1.6, "lasting": 0.8, "correlation": 0.5, "warming": 2.0, "walk": 0.05},
    "warming": {"white": 0.3, "lasting": 1.0, "correlation": 0.7, "warming": 8.0, "walk": 0.1},
    "shared": {"white": 0.5, "lasting": 2.0, "correlation": 0.9, "warming": 3.0, "walk": 0.5},
}


@lru_cache(maxsize=1)  # several tests in turn ask for the same
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


class ScriptedWorker:
    """What a worker would answer at its end of the pipe: each block one order late, of one step that took as long as the script says."""

    def __init__(self, step_s: list[float]) -> None:
        self._step_s = step_s
        self._before: Order | None = None
        self._replies: list[Block | Measured] = []

    def send(self, order: Order | None) -> None:
        """Settles the block before, and measures what was ordered, if anything."""
        if self._before is not None:
            done = self._before
            unknown = dict.fromkeys(_UNKNOWN)
            self._replies.append(Block(done.round, done.position, 1, self._step_s[done.round], **unknown))
        self._before = order
        if order is not None:
            self._replies.append(Measured())

    def recv(self) -> Block | Measured:
        """The next reply."""
        return self._replies.pop(0)


_UNKNOWN = (
    "energy_j", "energy_lo_j", "energy_hi_j", "emissions_g", "model_flops", "hardware_flops", "capacity_flops", "tokens", "samples",
    "loss",
)  # fmt: skip


def compared_until(series: Series, until: float, most: int, *, confidence: float = 0.95) -> Difference:
    """As ``compare(until=)`` measures it, by its own plan, orders of blocks and looks; the workers alone are on a script."""
    plan = _Plan.made(
        2,
        blocks=most,
        steps_per_block=1,
        until=until,
        budget_s=None,
        budget_j=None,
        confidence=confidence,
        loss_tolerance=0.02,
    )
    arms = []
    for side, name in enumerate(("fp32", "again")):
        arm = _Arm(Job("scripted:build", Variant(name), 0, 1, None, None, {}))
        arm._pipe = ScriptedWorker([values[side] for values in series])
        arms.append(arm)
    orders = [(0, 1) if gap > 0 else (1, 0) for _, _, gap in series[: plan.blocks]]
    stopped = _measure(arms, orders, 1, plan, _Teller(None, 0))
    for arm in arms:
        arm.ask(None, Block)
    found = plan.comparison(arms, 1, stopped).time("again")
    assert found is not None
    return found
