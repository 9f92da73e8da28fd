"""Block means of two variants on scripted machines: noise that lasts, drift that dies out, in the order of the comparison's own design.

For the tests of the interval's coverage, and for ``benchmarks/intervals.py``.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from green_torch.experiment.results import Block, Comparison
from green_torch.experiment.rounds import Progress, _Arm, _measure, _orders, _Plan, _Teller
from green_torch.experiment.variants import Variant
from green_torch.experiment.worker import Failed, Job, Measured, Order
from green_torch.statistics import Difference, paired_difference
from green_torch.testing import ScriptedClock

if TYPE_CHECKING:
    from collections.abc import Callable

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
        orders = list(_orders(rounds, 2, number))
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
    """A worker's end of the pipe: each block of one step that takes the scripted seconds, at ``power_w`` if that is known, and comes one order late."""

    def __init__(self, step_s: list[float], clock: ScriptedClock, power_w: float | None) -> None:
        self._step_s = step_s
        self._clock = clock
        self._power_w = power_w
        self._replies: list[Block | Measured | Failed] = []
        self._settling: list[Block] = []

    def send(self, order: Order | None) -> None:
        """Settles the block before, and measures what was ordered, if anything; fails where the script has come to its end."""
        self._replies += self._settling
        self._settling.clear()
        if order is None:
            return
        if order.round >= len(self._step_s):
            self._replies.append(Failed("the script is at its end"))
            return
        seconds = self._step_s[order.round]
        self._clock.advance(seconds)
        unknown = dict.fromkeys(_UNKNOWN)
        energy_j = None if self._power_w is None else self._power_w * seconds
        self._settling.append(Block(order.round, order.position, order.n_steps, seconds, energy_j, **unknown))
        self._replies.append(Measured())

    def recv(self) -> Block | Measured | Failed:
        """The next reply."""
        return self._replies.pop(0)


_UNKNOWN = (
    "energy_lo_j", "energy_hi_j", "emissions_g", "model_flops", "hardware_flops", "capacity_flops", "tokens", "samples", "loss",
)  # fmt: skip


def measured(
    *step_s: list[float],
    orders: list[tuple[int, ...]] | None = None,
    power_w: float | None = None,
    progress: Callable[[Progress], None] | None = None,
    **options: float | None,
) -> Comparison:
    """What ``compare()`` measures by its own plan and looks; the workers alone are on a script, the seconds of each variant's blocks."""
    nothing = {"blocks": None, "steps_per_block": 1, "until": None, "budget_s": None, "budget_j": None}
    plan = _Plan.made(len(step_s), **{**nothing, "confidence": 0.95, "loss_tolerance": 0.02, **options})
    clock, arms = ScriptedClock(), []
    for number, seconds in enumerate(step_s):
        arms.append(_Arm(Job("scripted:build", Variant(f"v{number}"), 0, 1, None, None, {})))
        arms[-1]._pipe = ScriptedWorker(seconds, clock, power_w)
    tell = _Teller(progress, plan.blocks * len(arms))
    stopped = _measure(arms, orders or _orders(plan.most, len(arms), 0), 1, plan, tell, now_s=lambda: clock.now_ns() / 1e9)
    for arm in arms:
        arm.ask(None, Block)
    return plan.comparison(arms, 1, stopped)


def compared_until(series: Series, until: float, most: int, *, confidence: float = 0.95) -> Difference:
    """As ``compare(until=)`` measures it."""
    a, b, gaps = zip(*series[:most], strict=True)
    orders = [(0, 1) if gap > 0 else (1, 0) for gap in gaps]
    found = measured(list(a), list(b), orders=orders, until=until, blocks=most, confidence=confidence).time("v1")
    assert found is not None
    return found
