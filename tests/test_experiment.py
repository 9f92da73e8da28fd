"""Tests of the comparison: variants and their names, a worker's life on a scripted clock, real workers, and what is made of blocks."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import combinations, count
from multiprocessing import Pipe, parent_process

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from green_torch.cli.compare import _OPTIONS as OPTIONS
from green_torch.cli.options import in_options
from green_torch.errors import ArgumentError
from green_torch.experiment import (
    Block,
    Comparison,
    LargestBatch,
    Trial,
    Variant,
    VariantResult,
    Workload,
    compare,
    largest_batch,
    parse_variant,
    project,
)
from green_torch.experiment.applied import CACHE_VARIABLE, CannotRunError, apart_in_cache, applied
from green_torch.experiment.conditions import Watch, watch
from green_torch.experiment.kernels import Seen
from green_torch.experiment.memory import _apart, _check_heeded, _Job, _stepped, _Tried, bisected
from green_torch.experiment.rounds import (
    _Arm,
    _block_s,
    _close,
    _orders,
    _Plan,
    _see_off,
    _sized,
    _Teller,
    _with_largest,
)
from green_torch.experiment.worker import (
    WARM_UP,
    Done,
    Failed,
    Job,
    Measured,
    Order,
    Ready,
    Refused,
    Warm,
    _received,
    _serve,
    ending,
    told,
)
from green_torch.gpt import GPT, GPTConfig, byte_batches, next_byte_loss
from green_torch.meters.nvml import NvmlMeter
from green_torch.records import DevicePeak, Domain, Embodied, Flag, Manifest, Method
from green_torch.sinks.codec import plain
from green_torch.surroundings import peak_memory_bytes
from green_torch.testing import ScriptedClock, ScriptedMeter
from tests.block_noise import measured
from tests.simnvml import Gpu, constant, simulated

TOKENS = 10


class Power:
    """Watts that the workload sets, for a scripted meter."""

    def __init__(self, watts=100.0):
        self.watts = watts

    def __call__(self, _):
        return self.watts


class SimulatedGpu:
    """The simulated NVML's GPU under the real meter, at the workload's watts and the scripted clock's time; it opens where it is used."""

    interval_s = None

    def __init__(self, clock, power):
        self.clock = clock
        self.power = power
        self._meter = None

    @property
    def domains(self):
        return self._open().domains

    def read(self):
        meter = self._open()
        self._sim.go_to((self.clock.now_ns() - self._start_ns) / 1e9)
        return meter.read()

    def close(self):
        self._open().close()

    def _open(self):
        if self._meter is None:
            self._start_ns = self.clock.now_ns()
            self._context = simulated(Gpu(constant(self.power.watts), period_s=0.1, power_limit_w=700.0))
            self._sim = self._context.__enter__()
            self._meter = NvmlMeter(self._sim.gpus[0].uuid, now_ns=self.clock.now_ns)
        return self._meter


def scripted_build(variant, *, clock, power, step_s, watts, own):
    """A linear model, or an own step, that takes scripted seconds at scripted watts; "broken" fails, "dying" and "killed" take their process with them."""
    if variant.name == "broken":
        raise RuntimeError("this one can't be built")
    if variant.name == "dying":
        os._exit(3)
    if variant.name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    power.watts = watts.get(variant.name, 100.0)
    if variant.name == "too large":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
    seconds = step_s.get(variant.name, 0.25)
    jitter = random.Random(f"{variant.name} 1")
    if own:
        return OwnStep(clock, seconds, jitter)

    def loss(model, batch):
        clock.advance(seconds * jitter.gauss(1, 0.02))
        return ((model(batch) - 1) ** 2).mean()

    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(7):
            yield torch.randn(TOKENS, 4, generator=generator)

    return Workload(nn.Linear(4, 4), partial(torch.optim.SGD, lr=0.1), loss, batches, lambda batch: {"tokens": len(batch)})


class OwnStep:
    """A step of the user's own, of about 0.25 s; without torch, whose compiler takes a worker longer to load than all that it does."""

    units = {"tokens": TOKENS}  # noqa: RUF012

    def __init__(self, clock, seconds, jitter):
        self.clock, self.seconds, self.jitter = clock, seconds, jitter

    def __call__(self):
        self.clock.advance(self.seconds * self.jitter.gauss(1, 0.02))


def script(method=Method.COUNTER, step_s=None, watts=None, meter=None, own=False):
    """What scripted workers are given: the build (of an own step where ``own``), and the arguments of track()."""
    clock, power = ScriptedClock(), Power()
    if meter is None:
        meter = ScriptedMeter(clock, {"gpu0": power}, method=method, period_s=0.1 if method is Method.COUNTER else 0.0)
    else:
        meter = meter(clock, power)
    build = partial(scripted_build, clock=clock, power=power, step_s=step_s or {}, watts=watts or {}, own=own)
    return build, {"clock": clock, "meters": [meter], "intensity": 100.0, "poll_interval_s": 0.02, "peak_flop_per_s": 1e12}


def serve(variant, orders, *, build, track, warmup_steps=2, log_dir=None, stopped=lambda: False):
    """A worker's life in this process: everything that it answers."""
    inbox = iter([WARM_UP, *orders, None])
    job = Job(build, variant, 0, warmup_steps, log_dir, None, track)
    return list(_serve(job, lambda: next(inbox), stopped))


def blocks_of(replies):
    return [reply for reply in replies if isinstance(reply, Block)]


class TestVariants:
    """Names and what they stand for."""

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("fp32", {"precision": "32-true", "matmul_precision": "highest", "sdpa_backend": "math"}),
            ("tf32", {"precision": "32-true", "matmul_precision": "high", "sdpa_backend": "math"}),
            ("bf16", {"precision": "bf16-mixed", "sdpa_backend": "math"}),
            ("bf16+flash", {"precision": "bf16-mixed", "sdpa_backend": "flash"}),
            ("fp16", {"precision": "16-mixed", "sdpa_backend": "math"}),
            ("fp32+auto", {"sdpa_backend": None}),
            (
                "bf16+efficient+checkpoint+compile",
                {"sdpa_backend": "efficient", "gradient_checkpointing": True, "compile": True},
            ),
        ],
    )
    def test_names(self, name, expected):
        """A name sets what it says, pins attention, and is the variant's name."""
        variant = parse_variant(name)
        assert variant.name == name
        assert {key: getattr(variant, key) for key in expected} == expected

    @pytest.mark.parametrize("name", ["fp64", "bf16+warp", "", "+flash", "flash"])
    def test_unknown_names_list_the_known(self, name):
        """An unknown name lists what is known."""
        with pytest.raises(ArgumentError, match=r"fp32, tf32, bf16.*\+math, \+flash, \+efficient.*\+checkpoint, \+compile"):
            parse_variant(name)

    @pytest.mark.parametrize("name", ["bf16+flash+math", "fp32+compile+compile"])
    def test_contradictions(self, name):
        """A name that says a thing twice is refused."""
        with pytest.raises(ArgumentError, match="twice"):
            parse_variant(name)

    @pytest.mark.parametrize(
        ("more", "match"),
        [
            ({"precision": "8-bit"}, "32-true"),
            ({"matmul_precision": "low"}, "highest"),
            ({"sdpa_backend": "auto"}, "math"),
            ({"batch_size": 0}, "batch_size"),
            ({"name": "a/b"}, "folder"),
            ({"name": ".."}, "folder"),
            ({"name": ""}, "folder"),
        ],
    )
    def test_bad_settings(self, more, match):
        """What no library can apply is refused with what it can."""
        with pytest.raises(ArgumentError, match=match):
            Variant(**({"name": "mine"} | more))


class TestArguments:
    """What ``compare`` refuses before it starts anything."""

    @pytest.mark.parametrize(
        ("build", "variants", "more", "match"),
        [
            ("no_colon", ["fp32"], {}, "module:function"),
            (":f", ["fp32"], {}, "module:function"),
            (lambda _: None, ["fp32"], {}, "top level of a module"),
            ("m:f", [], {}, "one variant or more"),
            ("m:f", ["fp32", "fp32"], {}, "name of its own"),
            ("m:f", ["fp33"], {}, "not known"),
            ("m:f", ["fp32"], {"blocks": 0}, "blocks=0"),
            ("m:f", ["fp32"], {"steps_per_block": 0}, "steps_per_block=0"),
            ("m:f", ["fp32"], {"warmup_steps": 0}, "warmup_steps=0"),
            ("m:f", ["fp32", "bf16"], {"until": 0}, "until=0"),
            ("m:f", ["fp32", "bf16"], {"until": 1}, "0.01 is 1 %"),
            ("m:f", ["fp32", "bf16"], {"until": 0.01, "blocks": 9}, "10 blocks"),
            ("m:f", ["fp32"], {"until": 0.01}, "two or more"),
            ("m:f", ["fp32"], {"budget_s": 0}, "budget_s=0"),
            ("m:f", ["fp32"], {"budget_j": math.nan}, "budget_j=nan"),
            ("m:f", ["fp32"], {"confidence": 1.0}, "confidence"),
            ("m:f", ["fp32"], {"loss_tolerance": -1}, "loss_tolerance"),
            ("m:f", ["fp32"], {"largest_batch": 0}, "largest_batch=0"),
            ("m:f", ["fp32"], {"track": {"log_every_n_steps": 5}}, "log_every_n_steps.*leave it out"),
        ],
    )
    def test_refused(self, build, variants, more, match):
        """Each with the reason."""
        with pytest.raises(ArgumentError, match=match):
            compare(build, variants, **more)


class TestDesign:
    """The order of blocks and their length."""

    @pytest.mark.parametrize("n", [1, 2, 3, 5])
    def test_orders_are_balanced(self, n):
        """Each round holds every variant once; over every four rounds, each precedes each other one twice."""
        orders = list(_orders(24, n, seed=5))
        assert all(sorted(order) == list(range(n)) for order in orders)
        for start in range(0, 24, 4):
            for a, b in combinations(range(n), 2):
                assert sum(order.index(a) < order.index(b) for order in orders[start : start + 4]) == 2

    def test_orders_are_random_but_repeatable(self):
        """The same seed gives the same design, another seed another, and the rounds follow no rhythm."""
        orders = list(_orders(16, 2, 1))
        assert orders == list(_orders(16, 2, 1))
        assert orders != list(_orders(16, 2, 2))
        assert len({tuple(orders[k : k + 4]) for k in range(0, 16, 4)}) > 1
        assert len(list(_orders(5, 3, 1))) == 5

    @pytest.mark.parametrize(
        ("step_s", "given", "steps"),
        [
            ([0.1, 0.4], {}, 9),  # 40 s are eight rounds of 5 s
            ([0.1, 60.0], {}, 1),
            ([1e-9], {}, 10_000),
            ([], {}, 1),
            ([0.1, 0.4], {"blocks": 40}, 1),
            ([0.1, 0.4], {"blocks": 4, "budget_s": 20}, 9),
            ([0.1, 0.4], {"budget_s": 300}, 9),  # more blocks, not longer ones
            ([1.0, 4.0], {"budget_s": 300}, 4),  # unless few steps fit
            ([1.0, 4.0], {"budget_s": 80}, 1),
            ([0.1, 0.4], {"budget_s": 4000}, 39),  # 200 blocks of 20 s
            ([0.1, 0.4], {"budget_j": 1e6}, 9),
            ([1.0, 4.0], {"budget_j": 1e6}, 4),
            ([0.1, 0.4], {"until": 0.01}, 9),
            ([0.1, 0.4], {"until": 0.01, "budget_s": 4000}, 9),
            ([0.1, 0.4], {"until": 0.01, "budget_s": 10}, 1),
        ],
    )
    def test_steps_that_fit(self, step_s, given, steps):
        """Blocks take as many steps as the time holds, one more to settle; never less than one, the same for all."""
        nothing = {"blocks": None, "steps_per_block": None, "until": None, "budget_s": None, "budget_j": None}
        plan = _Plan.made(2, **(nothing | given), confidence=0.95, loss_tolerance=0.02)
        assert plan.steps(step_s) == steps


class TestWhatEndsIt:
    """The number of blocks, the width of the interval, and budgets of time and energy: what was asked for, whichever comes first."""

    @pytest.mark.parametrize(
        ("given", "power_w", "stopped", "blocks"),
        [
            ({}, 50.0, "blocks", 8),
            ({"blocks": 30}, 50.0, "blocks", 30),
            ({"budget_j": 4000.0}, 50.0, "budget_j", 41),  # 100 J a round, the last of them not settled
            ({"budget_j": 10.0}, 50.0, "budget_j", 4),
            ({"budget_j": 50_000.0}, 50.0, "budget_j", 501),
            ({"budget_j": 4000.0, "blocks": 12}, 50.0, "blocks", 12),
            ({"budget_j": 4000.0}, None, "blocks", 8),  # it can't be kept
            ({"budget_s": 60.0}, None, "budget_s", 30),
            ({"budget_s": 60.0, "blocks": 12}, None, "blocks", 12),
            ({"budget_s": 60.0, "budget_j": 2000.0}, 50.0, "budget_j", 21),
            ({"budget_s": 60.0, "budget_j": 5000.0}, 50.0, "budget_s", 30),
            ({"until": 0.001, "budget_j": 50_000.0}, 50.0, "budget_j", 501),
            ({"until": 0.001, "budget_j": 4000.0}, None, "blocks", 200),
            ({"until": 0.001}, 50.0, "blocks", 200),
            ({"until": 0.2, "budget_j": 4000.0}, 50.0, "until", 12),
        ],
    )
    def test_first(self, given, power_w, stopped, blocks):
        """A budget given alone is what ends it, after however many blocks; where no energy is known, one of energy ends nothing."""
        chance = random.Random(4)
        seconds = [[1.0 + 0.1 * chance.choice((-1, 1)) for _ in range(1000)] for _ in range(2)]
        found = measured(*seconds, power_w=power_w, **given)
        assert found.stopped == stopped
        assert [len(result.blocks) for result in found.results] == [pytest.approx(blocks, rel=0.05)] * 2
        assert bool(found.warnings) == ("budget_j" in given and power_w is None)

    def test_a_slow_step_is_not_cut_short(self):
        """A number of blocks that was asked for is measured, however long it takes; where none was, 40 s end it after four rounds."""
        slow = [[20.0] * 8] * 2
        assert len(measured(*slow, blocks=8, steps_per_block=None).baseline.blocks) == 8
        assert len(measured(*slow, steps_per_block=None).baseline.blocks) == 4

    def test_a_budget_with_nothing_left_to_compare(self):
        """Where all others failed, the baseline gets the usual blocks, not the whole budget; a variant that is alone from the start gets it."""
        found = measured([1.0] * 100, [1.0], budget_s=60.0)
        assert (found.stopped, len(found.baseline.blocks)) == ("failed", 8)
        found = measured([1.0] * 100, budget_s=60.0)
        assert (found.stopped, len(found.baseline.blocks)) == ("budget_s", 60)

    def test_progress_follows_the_budget(self):
        """How many blocks there will be is told by the pace so far, and is never less than are done."""
        told = []
        measured([1.0] * 100, [1.0] * 100, budget_s=60.0, progress=told.append)
        assert {at.total for at in told if at.done >= 8} == {60}
        assert all(at.done < at.total for at in told)


class TestWorker:
    """A worker's life, in this process, on a scripted clock."""

    def test_answers_in_order(self):
        """Ready, warm, a block for each order, done; a block has the steps, tokens and place that were ordered."""
        build, track = script()
        replies = serve(Variant("a"), [Order(0, 1, 3), Order(1, 0, 3)], build=build, track=track)
        assert [type(reply) for reply in replies] == [Ready, Warm, Measured, Block, Measured, Block, Done]
        first, second = blocks_of(replies)
        assert (first.round, first.position, first.n_steps, first.tokens) == (0, 1, 3, 3 * TOKENS)
        assert (second.round, second.position) == (1, 0)
        assert second.loss < first.loss
        assert replies[-1].summary.manifest.label == "a"

    @pytest.mark.parametrize("method", [Method.COUNTER, Method.ESTIMATED])
    def test_joules_are_the_meters(self, method):
        """A block's joules are those of its own steps, neither the settling step's nor another's turn; counted ones have bounds."""
        build, track = script(method, watts={"a": 350.0})
        replies = serve(Variant("a"), [Order(k, 0, 8) for k in range(3)], build=build, track=track)
        for block in blocks_of(replies):
            assert block.duration_s == pytest.approx(8 * 0.25, rel=0.05)
            assert block.energy_j == pytest.approx(350 * block.duration_s, rel=0.02)
            assert block.emissions_g == pytest.approx(block.energy_j / 3.6e6 * 100)
            if method is Method.COUNTER:
                assert block.energy_lo_j <= 350 * block.duration_s <= block.energy_hi_j
            else:
                assert block.energy_lo_j is None

    @pytest.mark.parametrize(
        ("more", "match"),
        [
            ({"loss": lambda model, batch: 3.0}, "returned float; return a tensor that holds one number"),
            ({"loss": lambda model, batch: model(batch)}, r"returned a tensor of shape \(10, 4\)"),
            ({"units": lambda batch: {"words": 3}}, "{'words': 3}; count tokens, samples or both"),
            ({"units": len}, "are 10; count tokens"),
        ],
    )
    def test_a_workload_that_can_not_be_trained(self, more, match):
        """A loss that is none, and work of a kind that is not counted, say what to return instead."""
        build, track = script()
        workload = replace(build(Variant("a")), **more)
        with pytest.raises(ArgumentError, match=match) as wrong:
            serve(Variant("a"), [], build=lambda _: workload, track=track)
        assert told(wrong.value) == str(wrong.value)  # where in our code it was found is nothing to the user

    def test_units_of_a_users_own_step(self):
        """Likewise where the step is the user's."""
        build, track = script(own=True)
        step = build(Variant("a"))
        step.units = lambda: {"images": 3}
        with pytest.raises(ArgumentError, match=r"{'images': 3}; count tokens"):
            serve(Variant("a"), [], build=lambda _: step, track=track)

    def test_grams_of_manufacturing_are_kept_apart(self):
        """A block tells how many of its grams are of manufacturing, which go by time, and how many of its energy."""
        build, track = script()
        track["embodied"] = Embodied(150.0, "a study")
        (block,) = blocks_of(serve(Variant("a"), [Order(0, 0, 8)], build=build, track=track))
        assert block.embodied_g == pytest.approx(150e3 * block.duration_s / (4 * 365.25 * 24 * 3600))
        assert block.operational_g == pytest.approx(block.energy_j / 3.6e6 * 100)
        assert block.emissions_g == pytest.approx(block.operational_g + block.embodied_g)

    def test_a_block_without_its_meter_has_no_joules(self):
        """What the other meters read while one failed is no block's energy: it would read as a saving. Time and work are told."""
        build, track = script(watts={"a": 300.0})
        (gpu,) = track["meters"]
        track["meters"] = [gpu, ScriptedMeter(track["clock"], {"cpu": 100.0}, period_s=0.1)]

        def orders():
            for order in (WARM_UP, Order(0, 0, 3), Order(1, 0, 3), None):
                yield order
                track["clock"].advance(3.0)  # another variant's turn
                if order == Order(0, 0, 3):
                    gpu.fail()

        inbox = orders()
        job = Job(build, Variant("a"), 0, 2, None, None, track)
        first, last = blocks_of(_serve(job, lambda: next(inbox), lambda: False))
        assert first.energy_j == pytest.approx(400 * first.duration_s, rel=0.1)
        assert first.metered
        assert not last.metered
        assert last.flagged(Flag.METER_FAILED)
        assert (last.energy_j, last.energy_lo_j, last.energy_hi_j, last.emissions_g, last.domains_j) == (
            None,
            None,
            None,
            None,
            {},
        )
        assert (last.tokens, last.duration_s) == (3 * TOKENS, pytest.approx(0.75, rel=0.1))

    def test_losses_are_written(self, tmp_path):
        """Every loss goes to TensorBoard on the step axis of our own tags, in the one event file of the run."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        build, track = script()
        serve(Variant("a"), [Order(0, 0, 3)], build=build, track=track, log_dir=str(tmp_path / "a"))
        assert len(list((tmp_path / "a").glob("events.out.tfevents.*"))) == 1
        events = EventAccumulator(str(tmp_path / "a")).Reload()
        assert [event.step for event in events.Scalars("loss")] == [0, 1, 2, 3, 4, 5]
        assert {event.step for event in events.Scalars("green/step_time_s")} <= set(range(6))

    def test_blocks_are_given_to_the_dashboard(self, tmp_path):
        """Every block goes to TensorBoard as it went to the parent, with what the dashboard must know of the comparison."""
        import json

        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        build, track = script()
        inbox = iter([WARM_UP, *(Order(number, number % 2, 3) for number in range(3)), None])
        comparison = {"id": "one", "looking": True, "confidence": 0.9, "loss_tolerance": 0.02}
        job = Job(build, Variant("a"), 0, 2, str(tmp_path / "a"), None, track, comparison)
        blocks = blocks_of(_serve(job, lambda: next(inbox), lambda: False))
        events = EventAccumulator(str(tmp_path / "a")).Reload()
        tensors = events.Tensors("green/comparison")
        told = json.loads(tensors[-1].tensor_proto.string_val[0])
        assert told["blocks"] == [{**plain(block), "diverged": False} for block in blocks]
        assert len(told["blocks"]) == 3
        assert {key: told[key] for key in comparison} == comparison
        assert told["built_in"] is False

    def test_stopped_in_a_block(self):
        """A block that is stopped on the way gives no block, and the run is closed."""
        build, track = script()
        asked = count()
        replies = serve(Variant("a"), [Order(0, 0, 3)], build=build, track=track, stopped=lambda: next(asked) == 1)
        assert [type(reply) for reply in replies] == [Ready, Warm, Measured, Done]
        assert replies[-1].summary.status == "completed"

    def test_wrong_argument_of_track(self):
        """What track() refuses is told as such: it holds for every variant."""
        build, track = script()
        replies = serve(Variant("a"), [], build=build, track={**track, "intensity": -1.0})
        assert isinstance(replies[-1], Refused)
        arm = _Arm(Job(build, Variant("a"), 0, 1, None, None, track))
        with pytest.raises(ArgumentError, match="intensity"):
            arm._file(replies[-1])

    def test_a_largest_batch_without_a_limit(self):
        """On a CPU it is refused as soon as that is known, before the first step, in words that the command can translate."""
        build, track = script()
        job = Job(build, Variant("a"), 0, 2, None, None, track, largest_batch=True)
        ready, refused = _serve(job, lambda: WARM_UP, lambda: False)
        assert (type(ready), type(refused)) == (Ready, Refused)
        assert "such as largest_batch=4 * 2**30 (4 GiB)" in str(refused.error)
        assert "such as --largest-batch 4GiB." in in_options(str(refused.error), OPTIONS)
        replies = iter(_serve(replace(job, largest_batch=2**30), iter([WARM_UP, None]).__next__, lambda: False))
        assert [type(reply) for reply in replies] == [Ready, Warm, Done]

    def test_a_function_that_is_not_there(self):
        """It is a wrong argument for all variants, and the reply names what there is."""
        (reply,) = serve(Variant("a"), [], build=f"{__name__}:hungri", track={})
        assert isinstance(reply, Refused)
        assert "no function 'hungri'" in str(reply.error)
        assert "hungry" in str(reply.error)

    def test_data_that_ends_is_gone_through_again(self):
        """Seven batches serve any number of steps; none at all is an error."""
        build, track = script()
        (block,) = blocks_of(serve(Variant("a"), [Order(0, 0, 20)], build=build, track=track))
        assert block.n_steps == 20

        def empty(variant):
            work = build(variant)
            return Workload(work.model, work.optimizer, work.loss, lambda _: [], work.units)

        with pytest.raises(ArgumentError, match="nothing to train on"):
            serve(Variant("a"), [], build=empty, track=script()[1])

    def test_parent_gone(self):
        """A closed pipe is the order to close."""
        ours, theirs = Pipe()
        ours.close()
        assert _received(theirs) is None

    def test_out_of_memory_is_a_result(self):
        """Running out of memory reads as such; other errors say where they happened."""
        assert told(torch.OutOfMemoryError("CUDA out of memory")).startswith("does not fit in memory")
        on_cpu = RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to ..."
        )
        assert told(on_cpu).startswith("does not fit in memory")
        assert told(RuntimeError("No available kernel. Aborting execution.")).startswith("can't run here")
        with pytest.raises(IndexError) as raised:
            [].pop()
        assert "test_experiment.py" in told(raised.value)


class _Watch(TorchDispatchMode):
    """Remembers the names of the operations that ran."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def warmed(name):
    """What a small GPT's warm-up tells under a built-in variant."""
    config = GPTConfig(layers=2, heads=2, width=16, block_size=16)
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    before = torch.get_float32_matmul_precision()

    def build(_):
        batches = partial(byte_batches, batch_size=2, block_size=16)
        return Workload(GPT(config), optimizer, next_byte_loss, batches, lambda b: {"tokens": b.numel()})

    try:
        replies = serve(parse_variant(name), [], build=build, track=script()[1])
    finally:
        torch.set_float32_matmul_precision(before)
    return next(reply for reply in replies if isinstance(reply, Warm))


def run_gpt(name, n_steps=3):
    """A small GPT under a built-in variant: its block, the operations of its forward, the dtypes of logits and weights."""
    _, track = script()
    clock, seen, dtypes, batches = track["clock"], set(), set(), []

    def build(_):
        config = GPTConfig(layers=2, heads=2, width=16, block_size=16)

        def loss(model, batch):
            clock.advance(0.1)
            batches.append(batch.clone())
            with _Watch(seen):
                return next_byte_loss(model, batch)

        model = GPT(config)
        model.register_forward_hook(lambda m, i, logits: dtypes.update({logits.dtype, m.position.weight.dtype}))
        optimizer = partial(torch.optim.AdamW, lr=1e-3)
        return Workload(model, optimizer, loss, lambda seed: byte_batches(seed, 2, 16), lambda b: {"tokens": b.numel()})

    before = torch.get_float32_matmul_precision()
    try:
        replies = serve(parse_variant(name), [Order(0, 0, n_steps)], build=build, track=track)
    finally:
        torch.set_float32_matmul_precision(before)
    return blocks_of(replies)[0], seen, dtypes, batches


class TestApplying:
    """What a variant does to a model that knows nothing of it."""

    def test_attention_is_pinned(self):
        """Math and flash run different kernels, with the same result."""
        math_block, math_ops, *_ = run_gpt("fp32")
        flash_block, flash_ops, *_ = run_gpt("fp32+flash")
        assert not any("flash" in op for op in math_ops)
        assert any("flash" in op for op in flash_ops)
        assert flash_block.loss == pytest.approx(math_block.loss, rel=1e-4)

    def test_precision(self):
        """Mixed BF16 computes in BF16 on FP32 weights; true BF16 has BF16 weights; both are about the same training."""
        reference, _, dtypes, _ = run_gpt("fp32")
        assert dtypes == {torch.float32}
        mixed, _, dtypes, _ = run_gpt("bf16")
        assert dtypes == {torch.bfloat16, torch.float32}
        true, _, dtypes, _ = run_gpt("bf16-true")
        assert dtypes == {torch.bfloat16}
        assert mixed.loss == pytest.approx(reference.loss, rel=0.01)
        assert true.loss == pytest.approx(reference.loss, rel=0.02)

    def test_checkpointing_recomputes(self):
        """The same losses and model FLOPs, and more FLOPs that ran: of each block's forward, once more."""
        plain, *_ = run_gpt("fp32")
        again, *_ = run_gpt("fp32+checkpoint")
        assert again.loss == pytest.approx(plain.loss, rel=1e-6)
        assert again.model_flops == pytest.approx(plain.model_flops)
        assert 1.05 < again.hardware_flops / plain.hardware_flops < 4 / 3

    def test_checkpointing_needs_blocks(self):
        """A model without lists of modules has nothing to recompute, unless the classes of its blocks are named."""
        build, track = script()
        with pytest.raises(ArgumentError, match="ModuleList"):
            serve(Variant("a", gradient_checkpointing=True), [], build=build, track=track)

        def named(variant, build):
            work = build(variant)
            model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
            return replace(work, model=model, checkpoint_blocks=(nn.Sequential,))

        def measured(variant):
            build, track = script()
            return blocks_of(serve(variant, [Order(0, 0, 2)], build=partial(named, build=build), track=track))[0]

        plain, again = measured(Variant("a")), measured(Variant("a", gradient_checkpointing=True))
        assert again.loss == pytest.approx(plain.loss)
        assert again.hardware_flops > plain.hardware_flops

    def test_half_precision_has_a_scaler(self):
        """FP16 computes in FP16 about the same training; steps whose gradients overflow are skipped, counted and said."""
        reference, *_ = run_gpt("fp32")
        half, _, dtypes, _ = run_gpt("fp16")
        assert dtypes == {torch.float16, torch.float32}
        assert half.loss == pytest.approx(reference.loss, rel=0.01)
        assert half.n_skipped == 0
        build, track = script()

        def steep(variant):
            work = build(variant)
            return replace(work, loss=lambda model, batch: 1e4 * work.loss(model, batch))

        replies = serve(Variant("a", precision="16-mixed"), [Order(0, 0, 3)], build=steep, track=track)
        (warm,) = (reply for reply in replies if isinstance(reply, Warm))
        (block,) = blocks_of(replies)
        assert warm.n_skipped == 2
        assert block.n_skipped >= 1
        skipping = VariantResult(Variant("b"), (block,), n_skipped_warming=warm.n_skipped)
        (note,) = (note for note in comparison(result("a", []), skipping).notes("b") if "skipped" in note)
        assert note == f"steps skipped by the gradient scaler: {skipping.n_skipped}, of which 2 in the warm-up"

    def test_accumulated_batches_are_one_step(self):
        """Two batches of five are the step of one of ten: the same losses, tokens and weights; clipping bounds what a step changes."""

        def halves(variant, build):
            work = build(variant)

            def batches(seed):
                for batch in work.batches(seed):
                    yield from batch.chunk(2)

            return replace(work, batches=batches, accumulate=2)

        build, track = script()
        (whole,) = blocks_of(serve(Variant("a"), [Order(0, 0, 3)], build=build, track=track))
        build, track = script()
        (halved,) = blocks_of(serve(Variant("a"), [Order(0, 0, 3)], build=partial(halves, build=build), track=track))
        assert halved.loss == pytest.approx(whole.loss)
        assert (halved.tokens, halved.n_steps) == (whole.tokens, 3)
        work = replace(build(Variant("a")), gradient_clip_norm=1e-6)
        before = work.model.weight.detach().clone()
        applied(Variant("a"), work, 0).train()
        assert 0 < (work.model.weight - before).norm() <= 1.01e-7
        for bad in ({"accumulate": 0}, {"gradient_clip_norm": 0.0}):
            with pytest.raises(ArgumentError, match=next(iter(bad))):
                replace(work, **bad)

    @pytest.mark.parametrize("backend", ["efficient", "cudnn"])
    def test_a_kernel_that_is_not_here(self, backend):
        """It is said before a step is taken, with what to ask for instead."""
        build, track = script()
        with pytest.raises(CannotRunError, match=rf"{backend}.*float32 on the CPU.*\+math runs everywhere") as raised:
            serve(Variant("a", sdpa_backend=backend), [], build=build, track=track)
        assert told(raised.value).startswith("can't run here: ")

    def test_kernels_that_ran(self):
        """A warm step's attention kernel is named; what did the same reads the same: flash by torch's choice, TF32 without TF32."""
        ran = {name: warmed(name) for name in ("fp32", "fp32+flash", "fp32+auto", "tf32", "bf16")}
        assert {name: warm.kernels for name, warm in ran.items()} == {
            "fp32": ("math",),
            "fp32+flash": ("flash",),
            "fp32+auto": ("flash",),
            "tf32": ("math",),
            "bf16": ("math",),
        }
        assert ran["fp32+flash"].ran == ran["fp32+auto"].ran
        assert ran["fp32"].ran == ran["tf32"].ran
        assert len({warm.ran for warm in ran.values()}) == 3

    def test_kernels_that_nobody_saw_are_not_the_same(self):
        """Where the profiler can't run, math and flash are not said to have run the same: a difference in time is told."""
        build, _ = script()
        variants = [parse_variant(name) for name in ("fp32", "fp32+flash")]
        ran = [applied(variant, build(variant), 0).describe(Seen()) for variant in variants]
        blocks = [tuple(block(k, seconds=seconds) for k in range(4)) for seconds in (1.0, 0.5)]
        found = comparison(*(VariantResult(*one[:2], ran=one[2]) for one in zip(variants, blocks, ran, strict=True)))
        assert found.same_as("fp32+flash") == ""
        assert found.time("fp32+flash").distinguishable

    def test_compiled_graphs_are_kept_apart(self, monkeypatch):
        """The cache of torch would hand the graph of one attention kernel to another."""
        folders = set()
        for name in ("fp32+compile", "fp32+flash+compile", "fp32+auto+compile"):
            monkeypatch.setenv(CACHE_VARIABLE, "/somewhere")
            apart_in_cache(parse_variant(name))
            folders.add(os.environ[CACHE_VARIABLE])
        assert len(folders) == 3
        assert all(folder.startswith("/somewhere/") for folder in folders)
        monkeypatch.setenv(CACHE_VARIABLE, "/somewhere")
        apart_in_cache(parse_variant("fp32"))
        assert os.environ[CACHE_VARIABLE] == "/somewhere"

    def test_augmented_by_any_generator(self):
        """Variants of equal settings see the same losses, also where Python's or NumPy's generator draws the data."""

        def measured(name):
            build, track = script()

            def chance(variant):
                def batches(_):
                    return (torch.full((2, 4), random.random() + np.random.random()) for _ in range(7))  # noqa: NPY002

                return replace(build(variant), batches=batches)

            return [block.loss for block in blocks_of(serve(Variant(name), [Order(0, 0, 2)] * 2, build=chance, track=track))]

        assert measured("a") == measured("b")

    def test_same_data_in_the_same_order(self):
        """Every variant sees the same batches."""
        *_, first = run_gpt("fp32")
        *_, second = run_gpt("bf16+flash")
        assert len(first) == len(second)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TestUsersStep:
    """A plain callable, which applies the variant itself."""

    def test_measured_like_a_workload(self):
        """Its steps have time, joules and the units that it states; without a loss nothing is said of the training."""
        build, track = script(watts={"own step": 300.0}, own=True)
        replies = serve(Variant("own step"), [Order(0, 0, 4)], build=build, track=track)
        (warm,) = (reply for reply in replies if isinstance(reply, Warm))
        (block,) = blocks_of(replies)
        assert (warm.applied_by_user, warm.ran) == (True, "")
        assert (block.tokens, block.loss, block.n_skipped) == (4 * TOKENS, None, 0)
        assert block.energy_j == pytest.approx(300 * block.duration_s, rel=0.02)
        own = VariantResult(Variant("b"), (block,), applied_by_user=True)
        found = comparison(VariantResult(Variant("a"), (block,)), own)
        assert found.departure("b") == ""
        assert found.result("b").final_loss is None
        assert found.notes("b") == (
            "variant applied by the user's code",
            "whether it is the same training was not checked: its step gives no loss",
        )

    def test_what_it_may_carry(self, tmp_path):
        """A loss as a number or a tensor, units that change, a model: all are taken."""
        _, track = script()
        clock, model = track["clock"], nn.Linear(4, 4)

        def step():
            clock.advance(0.25)
            loss = model(torch.ones(2, 4)).square().mean()
            loss.backward()
            return loss

        step.units = lambda: {"samples": 2}
        step.model = model
        replies = serve(Variant("a"), [Order(0, 0, 2)], build=lambda _: step, track=track, log_dir=str(tmp_path))
        (block,) = blocks_of(replies)
        assert (block.samples, block.tokens) == (4, None)
        assert block.loss > 0
        assert block.model_flops > 0
        assert replies[-1].summary.manifest.parameters == 20

    def test_neither(self):
        """What is neither a workload nor a callable is refused."""
        with pytest.raises(ArgumentError, match="takes one optimizer step"):
            serve(Variant("a"), [], build=lambda _: 42, track=script()[1])


class TestPeakMemory:
    """The memory of each block."""

    @pytest.mark.parametrize(
        "device",
        [
            pytest.param("cpu", marks=pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")),
            pytest.param(
                "cuda",
                marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
            ),
        ],
    )
    def test_is_its_own(self, device):
        """A block's peak has what its own steps took, and neither what building and warming up took nor another block."""
        build, track = script()
        large = 2**28  # bytes
        steps = count()

        def hungry_at_times(variant):
            work = build(variant)

            def loss(model, batch):
                if next(steps) in {0, 7}:  # two steps warm up; each block of three settles by one before it
                    torch.zeros(large, dtype=torch.uint8, device=device).fill_(1)
                return work.loss(model, batch)

            return replace(work, model=work.model.to(device), loss=loss)

        orders = [Order(k, 0, 3) for k in range(3)]
        first, second, third = blocks_of(serve(Variant("a"), orders, build=hungry_at_times, track=track))
        assert second.peak_memory_bytes - first.peak_memory_bytes > large / 2
        assert second.peak_memory_bytes - third.peak_memory_bytes > large / 2


class TestConditions:
    """Heat and clocks beside each block."""

    def test_looks_while_the_block_runs(self):
        """The highest temperature, the mean clock and every reason of the block's looks, at most one each half second."""
        now = [0.0]
        throttle = 0x4  # a power cap
        with simulated(
            Gpu(temperature_c=71, sm_clock_mhz=1200, throttle=throttle), Gpu(temperature_c=64, sm_clock_mhz=1400)
        ) as sim:
            meters = [NvmlMeter(gpu.uuid, now_ns=sim.now_ns) for gpu in sim.gpus]
            watching = Watch(meters, lambda: now[0])
            untold = {"memory_traffic_bytes": None}
            assert watching.told() == {"temperature_c": None, "sm_clock_mhz": None, "throttled": (), **untold}
            watching.look()
            assert watching.told() == {"temperature_c": 71, "sm_clock_mhz": 1300, "throttled": ("power cap",), **untold}
            now[0] = 0.4
            watching.look()
            assert len(watching._temperatures_c) == 2
            watching.begin()
            watching.look()
            assert len(watching._temperatures_c) == 2
            for meter in meters:
                meter.close()

    def test_memory_traffic(self):
        """The sum over the GPUs in use, from the beginning of the block to its end; not known where one doesn't tell."""
        told = Gpu(traffic_b_per_j=1e9)
        for gpus, known in (((told, told), True), ((told, Gpu()), False)):
            with simulated(*gpus) as sim:
                meters = [NvmlMeter(gpu.uuid, now_ns=sim.now_ns) for gpu in sim.gpus]
                watching = Watch(meters, lambda: 0.0)
                sim.go_to(1.0)
                watching.begin()
                sim.go_to(3.0)
                traffic = watching.told()["memory_traffic_bytes"]
                assert traffic == (pytest.approx(2 * 2.0 * 200 * 1e9) if known else None)
                for meter in meters:
                    meter.close()
        blocks = [replace(block(k), memory_traffic_bytes=3e9 * block(k).n_steps) for k in range(4)]
        assert result("a", blocks).memory_traffic_per_step_bytes == pytest.approx(3e9)
        assert result("a", [*blocks, block(4)]).memory_traffic_per_step_bytes is None

    def test_in_a_block(self):
        """A block carries what the GPUs among its meters tell, and nothing where there is none."""
        build, track = script()
        with simulated(Gpu(temperature_c=71, sm_clock_mhz=1200)) as sim:
            clock = track["clock"]
            start_ns = clock.now_ns()
            clock.every(0.01, lambda: sim.go_to((clock.now_ns() - start_ns) / 1e9), "the GPU")
            meter = NvmlMeter(sim.gpus[0].uuid, now_ns=clock.now_ns)
            (hot,) = blocks_of(serve(Variant("a"), [Order(0, 0, 3)], build=build, track={**track, "meters": [meter]}))
            meter.close()
        assert (hot.temperature_c, hot.sm_clock_mhz, hot.throttled) == (71, 1200, ())
        build, track = script()
        (plain,) = blocks_of(serve(Variant("a"), [Order(0, 0, 3)], build=build, track=track))
        assert (plain.temperature_c, plain.sm_clock_mhz, plain.throttled) == (None, None, ())
        assert watch({}, torch.device("cpu"))._meters == ()

    def test_warnings(self):
        """A variant that ran more than 5 degrees hotter, or was held back, is said to be."""
        cool = [replace(block(k), temperature_c=60.0, sm_clock_mhz=1400.0) for k in range(4)]
        hot = [replace(block(k), temperature_c=67.0, sm_clock_mhz=1300.0, throttled=("thermal",) * (k > 1)) for k in range(4)]
        found = comparison(result("a", cool), result("b", hot), result("c", cool))
        assert found.notes("b") == (
            "ran 7 °C hotter than a (more than 5 °C): heat costs watts of its own",
            "throttled in 2 of 4 blocks: thermal",
        )
        assert found.notes("a") == found.notes("c") == ()
        assert (found.result("b").temperature_c, found.result("b").sm_clock_mhz) == (67, 1300)
        assert found.to_dict()["results"][1]["throttled"] == {"thermal": 2}


STEPS_S = {"slow": 3.0, "fast": 2.0, "hot": 3.0}  # tens of the counter's updates a step: its bounds are tight
WATTS = {"slow": 350.0, "fast": 500.0, "hot": 500.0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison of real workers on simulated GPUs, in their own time: whatever else runs here, a watt and a second are what they are.

    350 W for 3 s a step, 500 W for 2 s a step, 500 W for 3 s a step, and one that can't be built.
    """
    build, track = script(step_s=STEPS_S, watts=WATTS, meter=SimulatedGpu, own=True)
    folder, told = tmp_path_factory.mktemp("runs"), []
    variants = [Variant("slow"), Variant("broken"), Variant("fast"), Variant("hot")]
    comparison = compare(
        build, variants, blocks=6, steps_per_block=15, log_dir=folder, threads=1, track=track, progress=told.append, seed=3
    )
    return comparison, folder, told


@pytest.fixture(scope="module")
def unpaired():
    """A comparison that is to go on until an interval is narrow, whose baseline is killed: nothing is left to compare the rest with."""
    build, track = script(own=True)
    variants = [Variant("killed"), Variant("a"), Variant("too large")]
    return compare(build, variants, steps_per_block=4, until=0.01, track=track, threads=1)


class TestRealWorkers:
    """Spawned processes."""

    def test_known_truth(self, finished):
        """1,050 J against 1,000 J a step: the interval and the meter's bounds hold the truth, and time and energy differ."""
        comparison, *_ = finished
        time, energy = comparison.time("fast"), comparison.energy("fast")
        assert time.lo <= -1 / 3 <= time.hi
        assert energy.lo <= 100 / 105 - 1 <= energy.hi
        assert energy.instrument_lo <= 100 / 105 - 1 <= energy.instrument_hi
        assert time.distinguishable
        assert time.n_blocks == 6
        assert (energy.gain_lo, energy.gain_hi) == pytest.approx((energy.estimate, energy.estimate))
        assert comparison.headline == "energy"
        assert comparison.stopped == "blocks"
        assert comparison.result("fast").energy_per_token_j == pytest.approx(100, rel=0.02)

    def test_watts_alone(self, finished):
        """500 W against 350 W for steps as long: interval and meter's bounds hold the true joules a token, far from zero."""
        comparison, *_ = finished
        energy = comparison.energy("hot")
        seconds = [
            b.duration_s / a.duration_s
            for a, b in zip(comparison.baseline.blocks, comparison.result("hot").blocks, strict=True)
        ]
        truth = 500 / 350 * math.prod(seconds) ** (1 / len(seconds)) - 1
        assert energy.lo <= truth <= energy.hi
        assert energy.instrument_lo <= truth <= energy.instrument_hi
        assert min(energy.lo, energy.instrument_lo) > 0.3
        assert energy.estimate == pytest.approx(truth, abs=0.03)
        assert not comparison.time("hot").distinguishable
        assert energy.gain_lo == pytest.approx(energy.gain_hi)
        assert comparison.departure("hot") == ""
        assert not any("hotter" in note for note in comparison.notes("hot"))
        assert {result.temperature_c for result in comparison.results} <= {45.0, None}

    def test_every_block_is_the_known_power(self, finished):
        """Between its bounds, each block's joules are the variant's watts times the block's seconds."""
        comparison, *_ = finished
        for name, watts in WATTS.items():
            result = comparison.result(name)
            assert result.methods == {"gpu0": Method.COUNTER}
            assert result.power_w == pytest.approx(watts, rel=0.01)
            for block in result.blocks:
                assert block.energy_lo_j <= watts * block.duration_s <= block.energy_hi_j

    def test_a_failure_is_a_result(self, finished):
        """The variant that can't be built says why, and has no difference; the others are whole."""
        comparison, *_ = finished
        broken = comparison.result("broken")
        assert "this one can't be built" in broken.error
        assert broken.blocks == ()
        assert comparison.time("broken") is None
        assert comparison.saving("broken", planned_tokens=1e9) is None
        assert [result.error for result in (comparison.result("slow"), comparison.result("fast"))] == [None, None]

    def test_one_run_a_variant(self, finished):
        """Each variant is one run on disk, labelled, whose train time is its own steps' and not its waiting."""
        comparison, folder, _ = finished
        for name, step_s in STEPS_S.items():
            (file,) = (folder / name / "green").glob("rank-00000.segment-*.jsonl")
            assert name in file.read_text().splitlines()[0]
            result = comparison.result(name)
            assert result.manifest.label == name
            assert result.step_time_s == pytest.approx(step_s, rel=0.02)
            assert result.threads == 1

    def test_progress_and_json(self, finished):
        """Progress counts to the end, and everything found goes into JSON."""
        comparison, _, told = finished
        assert [stage for k, stage in enumerate(p.stage for p in told) if k == 0 or told[k - 1].stage != stage] == [
            "starting",
            "warming up",
            "measuring",
            "closing",
        ]
        assert (told[-1].done, told[-1].total) == (24, 24)
        read = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
        assert read["baseline"] == "slow"
        assert read["differences"]["broken"]["time"] is None
        assert len(read["results"][2]["blocks"]) == 6

    def test_interrupted_and_a_death(self):
        """Ctrl-C keeps the blocks measured so far, also where it comes again; a worker that dies leaves its exit code as the reason."""
        build, track = script(own=True)
        variants = [Variant("a"), Variant("dying")]

        def progress(at):
            if at.stage == "closing" or (at.stage == "measuring" and at.done >= 3):
                raise KeyboardInterrupt

        found = compare(build, variants, blocks=50, steps_per_block=2, track=track, progress=progress)
        assert found.interrupted
        assert found.stopped == "interrupted"
        assert "code 3" in found.result("dying").error
        assert 1 <= len(found.baseline.blocks) <= 2
        assert found.baseline.error is None
        assert found.baseline.manifest is not None

    @pytest.mark.parametrize("presses", [1, 2, 3])
    def test_interrupted_while_closing(self, presses):
        """Ctrl-C while a worker is waited for hurries, and again ends the waiting; it never leaves the function."""
        arm = _Arm(Job("m:f", Variant("a"), 0, 1, None, None, {}))
        arm._pipe, theirs = Pipe()
        left = count(presses - 1, -1)

        def press(*_):
            if next(left) == 0:
                signal.setitimer(signal.ITIMER_REAL, 0)
                theirs.send(Failed("it was waited for"))
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, press)
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        try:
            assert _close([arm], _Teller(None, 0))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert (arm.result().error == "it was waited for") == (presses < 3)
        assert not _see_off([arm])
        theirs.close()

    def test_until_and_a_step_of_the_users(self):
        """Measuring ends when the interval is narrow enough, after ten rounds at the earliest, and the intervals say that it was looked for."""
        build, track = script(own=True)
        told = []
        variants = [Variant("a"), Variant("b")]
        found = compare(build, variants, steps_per_block=4, until=0.006, track=track, threads=1, progress=told.append)
        assert found.stopped == "until"
        assert 11 <= len(found.baseline.blocks) < 40
        widths = [at.half_width for at in told if at.half_width is not None]
        assert widths[-1] <= 0.006 < widths[0]
        assert found.energy("b").looking
        assert found.energy("b").half_width < 0.0066
        assert found.result("b").applied_by_user
        assert found.notes("b")[0] == "variant applied by the user's code"

    def test_a_variant_that_died_is_not_waited_for(self):
        """The width that ends the looking is that of the variants that still get blocks, not of one whose interval stays as wide as it was."""
        plan = _Plan.made(
            3, blocks=None, steps_per_block=None, until=0.01, budget_s=None, budget_j=None, confidence=0.95, loss_tolerance=0.02
        )
        base, live = (
            result(name, [block(k, seconds=s + 0.001 * (k % 3)) for k in range(20)]) for name, s in (("a", 1.0), ("b", 0.9))
        )
        dead = result("c", [block(k, seconds=1 + 0.5 * (k % 2)) for k in range(12)], error="RuntimeError: died")
        found = comparison(base, live, dead)
        assert found.time("c").half_width > 0.1
        assert plan.half_width(found) < 0.01

    def test_until_without_a_baseline(self, unpaired):
        """Where no difference is left to watch, the others get the usual blocks all the same, and no more."""
        assert (unpaired.stopped, unpaired.until) == ("failed", 0.01)
        assert [len(result.blocks) for result in unpaired.results] == [0, 8, 0]
        assert unpaired.result("a").error is None

    def test_killed_for_want_of_memory(self, unpaired):
        """A worker that is ended as the kernel ends what takes too much memory did not fit, and its error says how that is known."""
        assert unpaired.baseline.fits is False
        assert unpaired.baseline.error == (
            "does not fit in memory: the worker was killed (SIGKILL), most likely by the kernel for want of memory"
        )
        later = VariantResult(Variant("a"), (block(0),), error=ending("the worker", -signal.SIGKILL))
        assert later.fits is False
        assert ending("the worker", -signal.SIGSEGV) == "the worker was ended by SIGSEGV"

    def test_memory_that_others_hold(self, unpaired):
        """A variant that finds no memory names those that had some of the same device; who failed before them blames nobody."""
        assert re.search(
            r"80 GiB.*; meanwhile a held memory on (cpu|cuda:0): with fewer variants at once it may fit",
            unpaired.result("too large").error,
        )
        assert "meanwhile" not in unpaired.baseline.error

    def test_budgets_and_a_baseline_that_does_not_fit(self):
        """An energy budget ends it; a baseline out of memory leaves the others' figures, and nothing to compare them with."""
        build, track = script(own=True)
        found = compare(
            build,
            [Variant("too large"), Variant("a")],
            blocks=50,
            steps_per_block=4,
            budget_j=450.0,
            track=track,
            threads=1,
        )
        assert found.stopped == "budget_j"
        assert len(found.result("a").blocks) == 6  # 100 J each; the fifth is settled after the sixth
        assert (found.baseline.fits, found.result("a").fits) == (False, True)
        assert "80 GiB" in found.baseline.error
        assert (found.time("a"), found.energy("a"), found.departure("a")) == (None, None, "")
        assert found.saving("a", planned_tokens=1e9) is None
        json.dumps(found.to_dict(), allow_nan=False)


def hungry(variant):
    """32 MiB a sample, and one sample where no batch size is asked for."""
    n = variant.batch_size or 1
    batches = lambda _: [torch.zeros(n, 2**22)]  # noqa: E731
    model = nn.Linear(1, 1)
    loss = lambda model, batch: (model(batch.view(-1, 1)[:1]) * 0 + (batch + 1).sum() * model.weight.sum()).mean()  # noqa: E731
    return Workload(model, partial(torch.optim.SGD, lr=0.0), loss, batches, lambda batch: {"samples": len(batch)})


def heedless(_):
    """The same four samples, whatever the batch size."""
    return hungry(Variant("a", batch_size=4))


def ctrl_c(variant, at, note=None):
    """Of one sample at most; where ``at`` is the name or the size, Ctrl-C reaches the process that asks for it; ``note`` gets the own id."""
    if at in {variant.name, str(variant.batch_size)}:
        note.write_text(str(os.getpid()))
        os.kill(parent_process().pid, signal.SIGINT)
        if variant.name != at:
            time.sleep(60)  # a search is ended in the middle of a size
    if variant.batch_size > 1:
        raise MemoryError
    return replace(heedless(variant), batches=lambda _: [torch.zeros(1, 1)])


def ended_or_zombie(process_id):
    """Whether a process has ended, after a moment's patience where it has not."""
    try:
        if psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE:  # nobody may be there to bury it
            return True
    except psutil.NoSuchProcess:
        return True
    time.sleep(0.1)
    return False


def found_after(build, *names, seconds=1.0):
    """The largest batches beside a comparison of a block each, in as much memory as there is."""
    before = comparison(*(result(name, [block(0, seconds=seconds)]) for name in names))
    more = {"seed": 0, "threads": 1, "blocks": 8, "budget_s": 8 * _block_s(before), "track": {"meters": [], "intensity": 100}}
    return _with_largest(before, partial(_sized, build, 2**40, **more), _Teller(None, 0))


class TestLargestBatch:
    """The largest batch that fits."""

    @given(st.integers(0, 500), st.integers(1, 500))
    def test_search(self, truth, most):
        """Within 1/16 below the true largest, and never above; a search that hits its end says so."""
        asked = []
        found, complete = bisected(lambda size: asked.append(size) or size <= truth, most)
        if truth == 0:
            assert (found, complete) == (None, True)
        elif complete:
            assert found <= truth < found + max(1, found // 16) + 1
        else:
            assert found <= truth
            assert 2 * found > most
        assert len(asked) == len(set(asked)) <= 2 + 2 * max(1, truth).bit_length()

    @pytest.mark.parametrize("after", [0, 1, 4])
    def test_search_that_ends_early(self, after):
        """Where a size can't be tried, the largest that fitted until then stands, and is not called complete."""
        answers = iter([True] * after + [None])
        assert bisected(lambda _: next(answers), 100) == (2 ** (after - 1) if after else None, False)

    def test_in_a_worker(self):
        """Beside a comparison on a CPU, within a limit that is given: what fits, what does not, and what a sample costs there."""
        limit = peak_memory_bytes(None) + 2**27
        meters = {"meters": [], "intensity": 100, "peak_flop_per_s": 1e12}
        whole = compare(hungry, ["fp32"], blocks=1, steps_per_block=1, threads=1, track=meters, largest_batch=limit)
        (found,) = whole.largest
        assert found.complete
        assert found.result.name == f"fp32@{found.batch_size}"
        assert found.result.blocks[0].samples == found.batch_size
        assert whole.result("fp32").blocks[0].samples == 1
        assert found.error is None
        assert found.memory_bytes == limit
        assert found.batch_size in {trial.batch_size for trial in found.trials if trial.fits}
        (fitting,) = (trial for trial in found.trials if trial.batch_size == found.batch_size)
        assert fitting.peak_memory_bytes <= limit
        assert found.peak_memory_bytes == max(fitting.peak_memory_bytes, found.result.peak_memory_bytes)
        assert all(trial.why.startswith("does not fit in memory") for trial in found.trials if not trial.fits)
        assert any(not trial.fits for trial in found.trials)

    def test_a_build_that_does_not_heed(self):
        """Two sizes with the same samples end the search, which would never end by itself."""
        four, eight = (_Tried(Trial(size, True), {"samples": 4}, None, "") for size in (4, 8))
        with pytest.raises(ArgumentError, match=r"batch_size=4 and 8.*heed"):
            _check_heeded(Variant("a"), [four], eight)
        _check_heeded(Variant("a"), [replace(four, units={})], replace(eight, units={}))

    def test_a_build_that_does_not_heed_costs_no_blocks(self):
        """What goes wrong in the search is that variant's error there; what was measured before stays."""
        found = found_after(heedless, "a")
        (largest,) = found.largest
        assert (largest.batch_size, found.interrupted) == (None, False)
        assert "let it heed variant.batch_size" in largest.error
        assert found.baseline.blocks

    def test_the_measurement_takes_as_long_as_the_blocks_did(self):
        """Its steps are chosen by the time of the comparison's blocks, not by their number of steps."""
        found = found_after(partial(ctrl_c, at=""), "a", seconds=1e-9)
        (largest,) = found.largest
        assert (largest.batch_size, largest.complete, largest.error) == (1, True, None)
        assert found.baseline.blocks[0].n_steps == 10
        assert {block.n_steps for block in largest.result.blocks} == {1}
        assert len(largest.result.blocks) <= 8
        assert _block_s(comparison(result("a", [block(0, seconds=1.0), block(1, seconds=3.0)]))) == pytest.approx(2.0)
        assert _block_s(comparison(result("a", []))) > 1

    @pytest.mark.parametrize(("at", "size"), [("2", None), ("a@1", 1)])
    def test_interrupted(self, at, size, tmp_path):
        """Ctrl-C in the search or while it measures there ends it for all variants, keeps what is known, and is marked; nothing runs on."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            found = found_after(partial(ctrl_c, at=at, note=tmp_path / "id"), "a", "b")
        finally:
            signal.signal(signal.SIGINT, before)
        (largest,) = found.largest
        assert (largest.batch_size, largest.error, largest.interrupted) == (1, "interrupted", True)
        assert largest.complete == (size is not None)
        assert (largest.result is None) == (size is None)
        assert found.interrupted
        assert found.to_dict()["largest"][0]["interrupted"] is True
        assert [len(one.blocks) for one in found.results] == [1, 1]
        assert any(ended_or_zombie(int((tmp_path / "id").read_text())) for _ in range(50))

    def test_a_cpu_needs_a_limit(self):
        """There is no honest default."""
        with pytest.raises(ArgumentError, match="memory_bytes="):
            _stepped(hungry, _Job(hungry, Variant("a"), 0, None, None), 1)
        with pytest.raises(ArgumentError, match="memory_bytes=0"):
            largest_batch(hungry, "fp32", 0)

    def test_killed_is_not_fitting(self):
        """The kernel ends what takes too much; any other death is a failure."""
        assert _apart(lambda: 7) == 7
        killed = _apart(lambda: os.kill(os.getpid(), signal.SIGKILL))
        assert isinstance(killed, Failed)
        assert killed.text.startswith("does not fit in memory")
        assert "code 3" in _apart(lambda: os._exit(3)).text

    def test_in_a_comparison(self):
        """It stands beside the results, with what a token costs there."""
        largest = LargestBatch(
            Variant("a"), 8, 2**30, "given", (Trial(8, True, 2**29, 0.5),), True, None, result("a@8", [block(0)])
        )
        found = comparison(result("a", [block(0)]), largest=(largest,))
        read = json.loads(json.dumps(found.to_dict(), allow_nan=False))["largest"][0]
        assert (read["batch_size"], read["peak_memory_bytes"]) == (8, 2**29)
        assert read["result"]["energy_per_token_j"] == pytest.approx(1.0)
        higher = replace(largest, result=result("a@8", [replace(block(0), peak_memory_bytes=2**30)]))
        assert higher.peak_memory_bytes == 2**30


def block(number, *, seconds=1.0, joules=100.0, tokens=100, loss=2.0, spread=None, position=0, steps=10):
    """A block by hand; ``spread`` gives relative bounds."""
    bounds = (None, None) if spread is None or joules is None else (joules * (1 - spread), joules * (1 + spread))
    return Block(
        number,
        position,
        steps,
        seconds,
        joules,
        *bounds,
        joules and joules / 100,
        1e9,
        1.5e9,
        4e9,
        tokens,
        None,
        loss,
        1000 + number,
    )


def result(name, blocks, methods=(Method.COUNTER,), **more):
    """A result by hand, on domains known by these methods."""
    domains = tuple(Domain(f"d{k}", method, "x", "y") for k, method in enumerate(methods))
    peaks = (DevicePeak(4e9, "x", "mm/float32", "measured", "here"),)
    manifest = Manifest("id", name, 1, 0, 1, 0, domains, (), None, 1.5, "test", peaks=peaks)
    return VariantResult(Variant(name), tuple(blocks), manifest=manifest, **more)


def comparison(*results, **more):
    return Comparison(results, 10, more.pop("confidence", 0.95), more.pop("loss_tolerance", 0.02), **more)


class TestResults:
    """What is made of blocks."""

    def test_means(self):
        """Figures are sums over sums, so that they multiply and divide, and a slow block counts in full."""
        found = result("a", [block(0, seconds=1.0, joules=100.0), block(1, seconds=4.0, joules=900.0, loss=1.5)])
        assert found.step_time_s == pytest.approx(5.0 / 20)
        assert found.energy_per_step_j == pytest.approx(1000 / 20)
        assert found.energy_per_token_j == pytest.approx(1000 / 200)
        assert found.power_w == pytest.approx(found.energy_per_step_j / found.step_time_s)
        assert found.tokens_per_s == pytest.approx(200 / 5.0)
        assert found.emissions_per_step_g == pytest.approx(found.energy_per_step_j * 0.01)
        assert found.hfu == pytest.approx(1.5 * found.mfu)
        assert found.mfu == pytest.approx(found.model_flop_per_s * 5.0 / sum(one.capacity_flops for one in found.blocks))

    def test_noise_is_in_the_costs_and_not_in_the_difference(self):
        """A newcomer's noisy blocks: figures and projection hold every second of them, the difference is by the ratios of pairs."""
        steps_s = [0.025, 0.028, 0.024, 0.089, 0.126, 0.106, 0.524, 0.335]
        found = comparison(
            result("a", [block(k, seconds=10 * x) for k, x in enumerate(steps_s)]),
            result("b", [block(k, seconds=25 * x) for k, x in enumerate(reversed(steps_s))]),
        )
        base = found.result("a")
        assert base.step_time_s == pytest.approx(sum(steps_s) / 8)  # 157 ms; their geometric mean is 88
        projected = project(base, planned_tokens=1e6).duration_h
        assert projected.value == pytest.approx(base.step_time_s * 1e6 / 10 / 3600)
        assert 0 <= projected.lo < projected.value < projected.hi < 3 * projected.value
        assert found.time("b").estimate == pytest.approx(1.5)
        assert found.saving("b", planned_tokens=1e6).duration_h.value == pytest.approx(-1.5 * projected.value)
        told = found.to_dict()["results"][0]
        assert told["step_time_s"] == pytest.approx(math.fsum(one["duration_s"] for one in told["blocks"]) / told["n_steps"])

    def test_memory_and_loss(self):
        """The last block's loss, and the most memory of any."""
        found = result("a", [block(0), block(1, loss=1.5)])
        assert (found.final_loss, found.peak_memory_bytes) == (1.5, 1001)
        assert found.energy_per_sample_j is None

    def test_unknown_stays_unknown(self):
        """One block without joules leaves the variant's joules unknown, not too low; time is still told."""
        found = comparison(result("a", [block(k) for k in range(4)]), result("b", [block(0), block(1, joules=None), block(2)]))
        assert found.result("b").energy_per_step_j is None
        assert found.energy("b") is None
        assert found.time("b").n_blocks == 3
        empty = VariantResult(Variant("c"), error="no")
        assert (empty.step_time_s, empty.mfu, empty.final_loss, empty.power_w) == (None, None, None, None)

    def test_a_meter_that_fails_saves_nothing(self):
        """Blocks in which a meter failed tell time and work; their joules are in no figure, and the notes say of how many."""
        good = [block(k, joules=100.0 + k % 2, spread=0.01) for k in range(8)]
        failed = replace(block(0, joules=25.0, spread=0.01), flags=("meter_failed:gpu0",))
        half = [one if k < 6 else replace(failed, round=k) for k, one in enumerate(good)]
        found = comparison(result("a", good), result("b", half), result("c", [replace(failed, round=k) for k in range(8)]))
        b = found.result("b")
        assert (found.energy("b").estimate, found.energy("b").n_blocks) == (pytest.approx(0.0), 6)
        assert not found.energy("b").distinguishable
        assert found.time("b").n_blocks == 8
        assert b.energy_per_token_j == pytest.approx(6 * 100.5 / 600)
        assert b.power_w == pytest.approx(100.5)
        assert b.emissions_per_step_g == pytest.approx(b.energy_per_step_j / 100)
        assert b.tokens_per_s == pytest.approx(100.0)
        planned = project(b, planned_tokens=3.6e6)
        assert planned.energy_kwh.value == pytest.approx(1.005)
        assert planned.energy_kwh.lo == pytest.approx(project(result("d", good[:6]), planned_tokens=3.6e6).energy_kwh.lo)
        assert found.notes("b") == ("a meter failed (gpu0) in 2 of 8 blocks: their energy is left out",)
        assert (found.energy("c"), found.result("c").energy_per_step_j, found.result("c").power_w) == (None, None, None)
        assert found.saving("c", planned_tokens=1e6).energy_kwh is None
        assert found.notes("c") == ("a meter failed (gpu0) in 8 of 8 blocks: their energy is left out",)
        failing_base = comparison(result("a", half), result("b", good))
        assert failing_base.energy("b").n_blocks == 6

    @pytest.mark.parametrize(
        ("flag", "told"),
        [
            ("counter_reset:gpu0", "a counter went back or leapt (gpu0) in 1 of 3 blocks"),
            ("counter_stuck:gpu0", "a counter stood still (gpu0) in 1 of 3 blocks"),
            ("part_time:gpu0", "(gpu0) in 1 of 3 blocks: their joules may be off by tens of percent"),
            ("late:cpu", "a counter did not change for 2 s or longer (cpu) in 1 of 3 blocks"),
        ],
    )
    def test_doubtful_joules_count_and_are_told(self, flag, told):
        """What befell a counter is said with what it means; the block's joules count all the same."""
        blocks = [block(0), replace(block(1), flags=(flag, "shared:gpu0")), block(2)]
        found = comparison(result("a", [block(k) for k in range(3)]), result("b", blocks))
        (note,) = found.notes("b")
        assert told in note
        assert found.energy("b").n_blocks == 3

    def test_pairs_are_of_the_same_round(self):
        """Where a variant misses a round, the rest are compared round by round."""
        seconds = [1.0, 2.0, 4.0, 8.0]
        found = comparison(
            result("a", [block(k, seconds=s) for k, s in enumerate(seconds)]),
            result("b", [block(k, seconds=2 * seconds[k], position=1) for k in (0, 2, 3)]),
        )
        time = found.time("b")
        assert (time.estimate, time.lo, time.hi) == pytest.approx((1.0, 1.0, 1.0))
        assert time.n_blocks == 3

    def test_batch_sizes_are_compared_per_token(self):
        """Twice the tokens in twice the time is no difference in time; and not the same training."""
        found = comparison(
            result("a", [block(k) for k in range(3)]), result("b", [block(k, seconds=2.0, tokens=200) for k in range(3)])
        )
        assert found.time("b").estimate == pytest.approx(0)
        assert "batch size" in found.departure("b")

    @pytest.mark.parametrize(
        ("methods", "expected"),
        [
            ((Method.ESTIMATED, Method.ESTIMATED), "time"),
            ((Method.ESTIMATED, Method.SAMPLED), "energy"),
            ((Method.COUNTER,), "energy"),
            ((), "time"),
        ],
    )
    def test_headline(self, methods, expected):
        """Where every joule is estimated, energy follows from time and the headline is time."""
        assert comparison(result("a", [block(0)], methods), result("b", [block(0)], methods)).headline == expected

    def test_instrument_bounds_count(self):
        """Bounds of the blocks become those of the difference, and keep it from being claimed."""
        a = [block(k, joules=100.0 + k, spread=0.2) for k in range(5)]
        b = [block(k, joules=90.0 + k, spread=0.2) for k in range(5)]
        energy = comparison(result("a", a), result("b", b)).energy("b")
        assert energy.hi < 0 < energy.instrument_hi
        assert not energy.distinguishable

    @pytest.mark.parametrize(
        ("losses", "expected"),
        [
            ([2.0, 1.99], ""),
            ([2.0, 2.1], "2.1 against 2"),
            ([9.0, 9.0, 2.07, 1.97], ""),
            ([2.0, 2.0, 2.0, 2.09], "2.045 against 2"),
            ([2.0, 2.0, 2.0, None], ""),
            ([math.nan, 2.0], "not finite"),
            ([math.inf, 2.0], "not finite"),
        ],
    )
    def test_departure(self, losses, expected):
        """A mean loss of the later half beyond the tolerance, or one that was ever not finite, is not the same training."""
        found = comparison(
            result("a", [block(k, loss=2.0) for k in range(len(losses))]),
            result("b", [block(k, loss=x) for k, x in enumerate(losses)]),
        )
        assert expected in found.departure("b")
        assert bool(found.departure("b")) == bool(expected)
        json.dumps(found.to_dict(), allow_nan=False)

    def test_a_baseline_that_diverged_is_named(self):
        """Where the baseline's loss is not finite either, the variant is not blamed."""
        nothing = [block(k, loss=math.nan) for k in range(2)]
        told = comparison(result("a", nothing), result("b", nothing)).departure("b")
        assert told == "not the same training: the baseline's loss is not finite"

    def test_losses_that_were_compared(self):
        """Both sides must give one in the later half; where the baseline gives none, nothing was compared, and a note says so."""
        silent = [block(k, loss=None) for k in range(4)]
        told = [block(k) for k in range(4)]
        both, neither = comparison(result("a", told), result("b", told)), comparison(result("a", silent), result("b", told))
        assert (both.losses_compared("b"), neither.losses_compared("b")) == (True, False)
        assert both.notes("b") == ()
        assert neither.notes("b") == ("whether it is the same training was not checked: a's step gives no loss",)
        assert not comparison(result("a", told), VariantResult(Variant("b"), error="no")).losses_compared("b")

    def test_json_tells_its_tolerance(self):
        """What the losses were held to, beside the confidence."""
        found = comparison(result("a", [block(0)]), result("b", [block(0)]), loss_tolerance=0.05).to_dict()
        assert (found["loss_tolerance"], found["confidence"]) == (0.05, 0.95)

    def test_unknown_name(self):
        """Asking for a variant that was not compared names those that were."""
        with pytest.raises(ArgumentError, match="a, b"):
            comparison(result("a", []), result("b", [])).result("c")


class TestProjection:
    """From blocks to a planned run."""

    def test_by_hand(self):
        """100 J, 1 s and 1 g for 100 tokens: 3.6e9 tokens take 10,000 h, 1,000 kWh at the device, 1,500 at the meter and 36 t."""
        found = project(result("a", [block(k) for k in range(4)]), planned_tokens=3.6e9)
        assert found.duration_h.value == pytest.approx(10_000)
        assert found.energy_kwh.value == pytest.approx(1000)
        assert found.facility_energy_kwh.value == pytest.approx(1500)
        assert found.emissions_g.value == pytest.approx(3.6e7)
        assert (found.energy_kwh.lo, found.energy_kwh.hi) == pytest.approx((1000, 1000))

    def test_scatter_and_bounds_widen_it(self):
        """Scatter gives a low and a high, and the meter's bounds go on top of it for energy, not for time."""
        scatter = [block(k, seconds=1 + 0.1 * (k % 2), joules=100 + 10 * (k % 2)) for k in range(8)]
        bounded = [block(k, seconds=1 + 0.1 * (k % 2), joules=100 + 10 * (k % 2), spread=0.1) for k in range(8)]
        plain, wide = (project(result("a", blocks), planned_tokens=1e6) for blocks in (scatter, bounded))
        assert plain.energy_kwh.lo < plain.energy_kwh.value < plain.energy_kwh.hi
        assert wide.energy_kwh.hi == pytest.approx(1.1 * plain.energy_kwh.hi)
        assert wide.energy_kwh.lo == pytest.approx(0.9 * plain.energy_kwh.lo)
        assert wide.duration_h == plain.duration_h

    def test_one_block_has_no_interval(self):
        """One block gives a figure without low and high; none, or another unit, gives nothing."""
        assert project(result("a", [block(0)]), planned_tokens=1e6).energy_kwh.lo is None
        assert project(result("a", []), planned_tokens=1e6) is None
        assert project(result("a", [block(0)]), planned_samples=1e6) is None

    def test_saving(self):
        """20 % less of the baseline's energy is saved; what takes longer has a negative saving, low below high."""
        a = [block(k, joules=100.0 + k % 2) for k in range(4)]
        b = [block(k, joules=0.8 * (100.0 + k % 2), seconds=1.1 + 0.01 * (k % 2)) for k in range(4)]
        found = comparison(result("a", a), result("b", b)).saving("b", planned_tokens=3.6e9)
        base = project(result("a", a), planned_tokens=3.6e9)
        assert found.baseline == "a"
        assert found.energy_kwh.value == pytest.approx(0.2 * base.energy_kwh.value)
        assert found.emissions_g.value == pytest.approx(0.2 * base.emissions_g.value)
        assert found.duration_h.lo <= found.duration_h.value <= found.duration_h.hi < 0
        assert found.time == comparison(result("a", a), result("b", b)).time("b")

    @pytest.mark.parametrize(("factor", "ends"), [(0.5, ("lo", "hi")), (2.0, ("hi", "lo"))])
    def test_a_saving_holds_the_baselines_uncertainty(self, factor, ends):
        """Half the time of a baseline that is not known better than by a factor is not known better either; likewise what it costs."""
        noisy = [1.0, 1.6, 0.7, 1.2]
        found = comparison(
            result("a", [block(k, seconds=s) for k, s in enumerate(noisy)]),
            result("b", [block(k, seconds=factor * s * (1 + 0.01 * (k % 2))) for k, s in enumerate(noisy)]),
        )
        base, time = project(found.baseline, planned_tokens=1e6).duration_h, found.time("b")
        saved = found.saving("b", planned_tokens=1e6).duration_h
        assert time.hi - time.lo < 0.1
        low, high = (getattr(base, end) for end in ends)
        assert (saved.lo, saved.hi) == pytest.approx((-time.hi * low, -time.lo * high))
        assert saved.lo < saved.value < saved.hi
        assert saved.hi - saved.lo > abs(factor - 1) * 0.9 * (base.hi - base.lo)

    def test_a_saving_holds_the_truth_where_the_meter_is_at_its_worst(self):
        """The meter's bounds go on top of the scatter: off by all that they allow, the saving's low and high still hold the true one."""
        noise, held, n = random.Random(1), 0, 200
        for _ in range(n):
            trues = [[joules * math.exp(noise.gauss(0, 0.01)) for _ in range(20)] for joules in (100.0, 80.0)]
            read = [[factor * true for true in one] for factor, one in zip((1 / 1.02, 1 / 0.98), trues, strict=True)]
            a, b = ([block(k, joules=joules, spread=0.02) for k, joules in enumerate(one)] for one in read)
            saved = comparison(result("a", a), result("b", b)).saving("b", planned_tokens=3.6e8).energy_kwh
            held += saved.lo <= 20.0 <= saved.hi
        assert held >= 0.95 * n

    def test_a_saving_is_of_the_comparisons_confidence(self):
        """The baseline's interval in it is as wide as the difference's."""
        results = [result(name, [block(k, seconds=s + k % 2) for k in range(6)]) for name, s in (("a", 2.0), ("b", 1.0))]
        for confidence in (0.8, 0.99):
            found = comparison(*results, confidence=confidence)
            base = project(results[0], planned_tokens=1e6, confidence=confidence).duration_h
            assert found.saving("b", planned_tokens=1e6).duration_h.hi == pytest.approx(-found.time("b").lo * base.hi)

    def test_a_difference_with_an_open_end(self):
        """Bounds that reach down to nothing leave the saving's end open; of a grid that emits nothing, nothing is saved all the same."""
        a = [replace(block(k, spread=1.0), emissions_g=0.0) for k in range(3)]
        b = [replace(block(k, joules=5.0 + k, spread=0.1), emissions_g=0.0) for k in range(3)]
        saved = comparison(result("a", a), result("b", b)).saving("b", planned_tokens=1e6)
        assert saved.energy_kwh.lo == -math.inf
        assert (saved.emissions_g.value, saved.emissions_g.lo, saved.emissions_g.hi) == (0, 0, 0)
        json.dumps(plain(saved), allow_nan=False)

    def test_grams_of_manufacturing_go_by_time(self):
        """Twice as fast on the same energy: half of the grams of manufacturing are saved, and none of the operational ones."""
        made_g = 3.0
        blocks = [replace(block(k), emissions_g=1.0 + made_g, embodied_g=made_g) for k in range(4)]
        half = [replace(one, duration_s=0.5, emissions_g=1.0 + made_g / 2, embodied_g=made_g / 2) for one in blocks]
        found = comparison(result("a", blocks), result("b", half))
        base = project(found.baseline, planned_tokens=1e6)
        assert (base.operational_g.value, base.embodied_g.value, base.emissions_g.value) == pytest.approx((1e4, 3e4, 4e4))
        saved = found.saving("b", planned_tokens=1e6).emissions_g
        assert (saved.value, saved.lo, saved.hi) == pytest.approx((1.5e4, 1.5e4, 1.5e4))
        assert project(found.result("b"), planned_tokens=1e6).emissions_g.value == pytest.approx(4e4 - 1.5e4)

    def test_steps(self):
        """Where neither tokens nor samples are counted, steps are planned: the variant's own, and a saving of the baseline's."""
        a = [block(k, tokens=None) for k in range(4)]
        b = [block(k, tokens=None, joules=50.0, seconds=2.0) for k in range(4)]
        found = comparison(result("a", a), result("b", b))
        plan = project(found.baseline, planned_steps=36_000)
        assert (plan.unit, plan.planned) == ("steps", 36_000)
        assert plan.duration_h.value == pytest.approx(1.0)
        saved = found.saving("b", planned_steps=36_000)
        assert (saved.unit, saved.duration_h.value) == ("steps", pytest.approx(-1.0))
        assert saved.energy_kwh.value == pytest.approx(plan.energy_kwh.value / 2)

    @pytest.mark.parametrize(
        "plan", [{}, {"planned_tokens": 0}, {"planned_tokens": math.inf}, {"planned_tokens": 1, "planned_samples": 1}]
    )
    def test_bad_plans(self, plan):
        """No plan, two plans, or a plan of nothing."""
        with pytest.raises(ArgumentError, match="Plan"):
            project(result("a", [block(0)]), **plan)
