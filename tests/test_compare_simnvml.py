"""The comparison against a simulated GPU whose power is known: real workers, the real NVML meter, variants of 350 W and 500 W."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from functools import partial

import pytest

from green_torch.experiment import Variant, compare
from green_torch.meters.nvml import open_meters
from green_torch.records import Method
from tests.simnvml import Gpu, Sim, constant

WATTS = {"350 W": 350.0, "500 W": 500.0}
STEP_S = 0.3
STEPS = 2
BLOCKS = 7
TOKENS = 10
CONFIDENCE = 0.999  # so that the truth is outside by chance once in a thousand runs of this test
PATIENCE_S = STEP_S  # a step that comes later than this begins a turn: the other variant had the one before


class Step:
    """Steps that end every 0.3 s, and no torch model: its optimizer alone would take a worker longer to load than a block takes.

    Each ends a fixed time after the one before was due, not after it ended: what a busy machine delays in one step is made up for in
    the next, so that the two variants' seconds compare whatever else runs.
    """

    units = {"tokens": TOKENS}  # noqa: RUF012

    def __init__(self):
        self.due_s = 0.0

    def __call__(self):
        now_s = time.monotonic()
        self.due_s = (now_s if now_s > self.due_s + PATIENCE_S else self.due_s) + STEP_S
        time.sleep(max(0.0, self.due_s - now_s))
        return 1.0


def build(variant, configs):
    """A step of the user's own, on a machine whose one GPU draws the variant's power."""
    os.environ["SIMNVML_CONFIG"] = configs[variant.name]
    return Step()


class Gpus(Sequence):
    """The worker's GPUs, opened when they are first asked for: by then ``build`` has chosen the simulated machine."""

    def __init__(self):
        self.meters = []

    def __len__(self):
        if not self.meters:
            self.meters, missing = open_meters()
            assert not missing
        return len(self.meters)

    def __getitem__(self, place):
        return self.meters[place] if len(self) else None


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The comparison, in two worker processes."""
    configs, environment = {}, {}
    for name, watts in WATTS.items():
        sim = Sim((Gpu(constant(watts), period_s=0.01, power_limit_w=500.0),), virtual=False)
        environment = sim.child_env(tmp_path_factory.mktemp("simnvml"))
        configs[name] = environment["SIMNVML_CONFIG"]
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (environment | {"OMP_NUM_THREADS": "1"}).items():
            patch.setenv(key, value)
        return compare(
            partial(build, configs=configs),
            [Variant("350 W"), Variant("500 W", matmul_precision="highest")],
            blocks=BLOCKS,
            steps_per_block=STEPS,
            threads=1,
            confidence=CONFIDENCE,
            track={"intensity": 100.0, "meters": Gpus(), "peak_flop_per_s": 1e12},
        )


def truth(found):
    """Watts times the blocks' own seconds, per token; geometric means, as the difference has it."""
    pairs = list(zip(*(found.result(name).blocks for name in WATTS), strict=True))
    times = [b.duration_s / b.tokens / (a.duration_s / a.tokens) for a, b in pairs]
    return 500 / 350 * math.prod(times) ** (1 / len(times)) - 1


def test_the_interval_holds_the_truth(found):
    """Both the interval and the meter's bounds hold the true difference in joules a token, and are far from zero."""
    assert [result.error for result in found.results] == [None, None]
    energy = found.energy("500 W")
    assert energy.lo <= truth(found) <= energy.hi
    assert energy.instrument_lo <= truth(found) <= energy.instrument_hi
    assert min(energy.lo, energy.instrument_lo) > 0
    assert energy.estimate == pytest.approx(truth(found), abs=0.03)
    assert energy.n_blocks == BLOCKS
    assert found.headline == "energy"


def test_every_block_is_the_known_power(found):
    """Between its bounds, each block's joules are the variant's watts times the block's seconds."""
    for name, watts in WATTS.items():
        result = found.result(name)
        assert result.methods == {"gpu0": Method.COUNTER}
        assert result.power_w == pytest.approx(watts, rel=0.03)
        for block in result.blocks:
            assert block.energy_lo_j <= watts * block.duration_s <= block.energy_hi_j


def test_nothing_else_differs(found):
    """The gain error of one sensor cancels, and both ran as hot."""
    energy = found.energy("500 W")
    if energy.gain_lo is not None:
        assert energy.gain_lo == pytest.approx(energy.gain_hi)
    assert found.departure("500 W") == ""
    assert not any("hotter" in note for note in found.notes("500 W"))
    assert {result.temperature_c for result in found.results} <= {45.0, None}
