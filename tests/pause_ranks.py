"""One of two ranks on CPUs that pause, for test_pause.py: ``RANK=0 python -m tests.pause_ranks DIRECTORY``.

In one pair of processes, since their start takes longest: a fit that runs through, one that waits, one that leaves and one that comes again,
and a plain loop. Each rank has a clock of its own, on which a step takes a minute, and says what it did in ``rank-N.json``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from green_torch import track
from green_torch.testing import ScriptedClock
from tests.test_pause import EPOCH_NS, STEP_S, Fit, left, minutes, pausing, seed, trace_of

RANK = int(os.environ["RANK"])


def ended(fit: Fit, first: Fit | None = None) -> dict[str, Any]:
    """What a fit came to: its batches, its weights, and the random number that comes next."""
    weights = {name: value.flatten().tolist() for name, value in fit.module.state_dict().items()}
    return {"seen": [*(first.seen if first else []), *fit.seen], "weights": weights, "random": torch.rand(1).item()}


def scenarios(directory: Path) -> dict[str, Any]:
    """Each on a clock that begins anew, with the same seeds."""
    own, two = directory / f"own-{RANK}", {"devices": 2, "strategy": "ddp", "max_epochs": 8}
    own.mkdir()

    def begun() -> ScriptedClock:
        seed(RANK)
        return ScriptedClock(epoch_unix_ns=EPOCH_NS)

    clock = begun()
    told = {"whole": ended(Fit(directory, clock=clock, **two).run()), "whole_minutes": minutes(clock)}

    clock = begun()
    pause = pausing(own, clock)
    told["waited"] = ended(Fit(directory, pause, clock=clock, **two).run())
    told["waits"] = [(one.stop_unix_ns, one.resume_unix_ns) for one in pause.pauses]

    clock = begun()
    first = left(directory, clock, provider=trace_of(own, clock), **two)
    told["left_after"] = len(first.seen)
    clock.advance(2 * 3600)
    seed(10 + RANK)  # of which nothing must be left once the checkpoint is loaded
    again = Fit(directory, pausing(own, clock, on_pause="exit", provider=trace_of(own, clock)), clock=clock, **two)
    told["came_again"] = ended(again.run(ckpt_path="hpc"), first)

    clock = begun()
    paused = 0.0
    with track(meters=[], clock=clock, intensity=trace_of(own, clock), planned_steps=40) as tracker:
        for _ in range(40):
            clock.advance(STEP_S)
            torch.distributed.all_reduce(torch.ones(1))  # a loop whose ranks parted would hang here
            tracker.step()
            paused += tracker.pause_if_dirty(max_wait=7200, check_every=120, resume_overhead=30)
    told["loop_paused_s"] = paused
    return told


if __name__ == "__main__":
    Path(sys.argv[1], f"rank-{RANK}.json").write_text(json.dumps(scenarios(Path(sys.argv[1]))))
