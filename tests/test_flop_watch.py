"""FLOPs of the steps of a run: keys, gradient accumulation, live steps, scaling, and what happens when counting fails."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
import tracemalloc
import warnings

import pytest
import torch
from torch import nn

from green_torch.errors import ArgumentError, GreenTorchWarning
from green_torch.flops import COUNTS_COMPILED, StepFlops, StepWork
from green_torch.records import Flag
from tests.processes import forked_ranks, preload

preload("tests.sharded_ranks")

ONE = 2 * 2 * 4 * 4  # a product of (2, 4) and (4, 4)


@pytest.fixture(autouse=True)
def _nothing_left():
    yield
    assert torch._C._len_torch_dispatch_stack() == 0, "a mode was left behind"


class Net(nn.Module):
    """One product of ``(n, 4)`` and ``(4, 4)``; takes tensors in any wrapping."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.asks = False

    def forward(self, x=None, *rest, batch=None, times=1):
        if self.asks:
            x.max().item()
        x = x if batch is None else batch
        while not isinstance(x, torch.Tensor):
            x = next(iter(x.values())) if isinstance(x, dict) else x[0] if isinstance(x, list | tuple) else x.x
        for _ in range(times):
            x = self.layer(x)
        return {"logits": x}


def x(rows=2):
    return torch.randn(rows, 4)


def watched(model=None, **options):
    flops = StepFlops(model if model is not None else Net(), **options)
    flops.attach()
    return flops._model, flops


def loss_of(output):
    return output["logits"].sum()


def test_a_step_is_counted_once():
    """The first step on a shape is counted and flagged; the next has the same FLOPs and no flag; one without a forward has none."""
    model, flops = watched()
    loss_of(model(x())).backward()
    first = flops.take()
    loss_of(model(x())).backward()
    second = flops.take()
    assert first.flags == (Flag.COUNTED,)
    assert second.flags == ()
    assert first.flops == second.flops
    assert first.flops.model_flops == 2 * ONE
    assert flops.take() == StepWork(None, ())


def test_accumulated_forwards_add_up():
    """Micro-batches of one step are summed, each at its own shape."""
    model, flops = watched()
    for rows in (2, 2, 4):
        loss_of(model(x(rows))).backward()
    assert flops.take().flops.model_flops == 2 * (1 + 1 + 2) * ONE


def test_forwards_without_gradients_count_forward_alone():
    """Under no_grad a forward has no backward, and is another key than with gradients."""
    model, flops = watched()
    with torch.no_grad():
        model(x())
    assert flops.take().flops.model_flops == ONE
    model(x())
    assert flops.take().flops.model_flops == 2 * ONE
    with torch.inference_mode():
        model(x())
    assert flops.take().flops.model_flops == ONE


@dataclasses.dataclass
class Data:
    x: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: ((t,), {}),
        lambda t: ((), {"batch": t}),
        lambda t: (({"x": t, "ids": torch.arange(3), "name": "a", "none": None},), {}),
        lambda t: (([[t], 3.5],), {}),
        lambda t: ((Data(t),), {}),
    ],
)
def test_inputs_in_any_wrapping(wrap):
    """Keys see tensors in dictionaries, lists, keywords and objects: a new shape is counted, a known one isn't."""
    model, flops = watched()
    for rows, flags in ((2, (Flag.COUNTED,)), (2, ()), (4, (Flag.COUNTED,)), (4, ()), (2, ())):
        args, kwargs = wrap(x(rows))
        model(*args, **kwargs)
        work = flops.take()
        assert work.flops.model_flops == rows * ONE
        assert work.flags == flags


def test_whole_numbers_are_part_of_the_key():
    """A model steered by an int counts each value by itself; one without any tensor input counts too."""
    model, flops = watched()
    for times in (1, 3):
        model(x(), times=times)
        assert flops.take().flops.model_flops == (3 * times - 1) * ONE  # nobody asks for the input's gradient

    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, rows):
            return self.layer(torch.zeros(rows, 4, device=self.layer.weight.device))

    model, flops = watched(Noise())
    model(2)
    assert flops.take().flops.model_flops == 2 * ONE


def test_autocast_is_part_of_the_key():
    """The same shapes under autocast are another key, counted in its dtype."""
    model, flops = watched()
    model(x())
    assert set(flops.take().flops.flops_by_dtype) == {"mm/float32"}
    with torch.autocast("cpu", torch.bfloat16):
        model(x())
    assert set(flops.take().flops.flops_by_dtype) == {"mm/bfloat16"}


def test_many_shapes_are_scaled():
    """After 16 keys a new shape is scaled by its elements from the nearest of its kind, and flagged."""
    model, flops = watched()
    for rows in range(1, 17):
        model(x(rows))
        assert flops.take().flags == (Flag.COUNTED,)
    model(x(32))
    work = flops.take()
    assert work.flags == (Flag.FLOPS_SCALED,)
    assert work.flops.model_flops == 32 * ONE
    with torch.no_grad():
        model(x(32))
    assert flops.take() == StepWork(None, (Flag.FLOPS_UNKNOWN,))


def test_a_model_that_cant_be_counted_is_said_once():
    """A model that asks for values leaves FLOPs unknown with one warning, trains on, and can be counted by hand."""
    model, flops = watched()
    model.asks = True
    with pytest.warns(GreenTorchWarning, match="flops_per_step=") as caught:
        for rows in (2, 2, 4):
            model(x(rows))
            work = flops.take()
            assert work.flops is None
            assert Flag.FLOPS_UNKNOWN in work.flags
    assert len(caught) == 1
    with flops.counting():
        loss_of(model(x(2))).backward()
    assert flops.take().flops.model_flops == 2 * ONE
    for rows, flags in ((2, ()), (8, (Flag.FLOPS_SCALED,))):
        model(x(rows))
        work = flops.take()
        assert (work.flops.model_flops, work.flags) == (rows * ONE, flags)


def test_generate_has_no_flops():
    """A model that is never called as a module has nothing pending: no FLOPs, no flag, no warning."""
    model, flops = watched()
    model.forward(x())
    assert flops.take() == StepWork(None, ())


def test_counting_leaves_model_and_randomness_alone():
    """take() counts without touching the random state, gradients, buffers or hooks; detach() takes the one hook off."""
    model, calls = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    model, flops = watched(model)
    model(x()).sum().backward()
    before = torch.get_rng_state(), [p.grad.clone() for p in model.parameters()], [b.clone() for b in model.buffers()]
    assert flops.take().flags == (Flag.COUNTED,)
    assert torch.equal(before[0], torch.get_rng_state())
    assert all(torch.equal(a, p.grad) for a, p in zip(before[1], model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before[2], model.buffers(), strict=True))
    assert calls == [1]
    flops.detach()
    flops.detach()
    assert len(model._forward_pre_hooks) == 1


def test_frozen_later():
    """Freezing a layer in the middle of a run is noticed within 64 steps."""
    model, flops = watched(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)))
    model(x())
    assert flops.take().flops.model_flops == 5 * ONE
    model[0].requires_grad_(False)
    for _ in range(64):
        model(x())
        work = flops.take()
        assert work.flops is not None
    assert work.flops.model_flops == 3 * ONE


def test_a_live_step():
    """Where the whole step is ours, the first on each batch shape is counted live, loss and all, the others are known."""
    model = Net()
    flops, matrix = StepFlops(model), torch.randn(4, 4)
    for flags in ((Flag.COUNTED,), (), ()):
        batch = {"x": x()}
        flops.begin_step(batch)
        (loss_of(model(batch)) + (batch["x"] @ matrix).sum()).backward()
        flops.end_step()
        work = flops.take()
        assert work.flops.model_flops == 3 * ONE
        assert work.flags == flags


def test_live_accumulation():
    """Two micro-batches between takes add up."""
    model = Net()
    flops = StepFlops(model)
    for _ in range(2):
        flops.begin_step(x())
        loss_of(model(x())).backward()
        flops.end_step()
    assert flops.take().flops.model_flops == 4 * ONE


def test_a_live_step_counts_once_whatever_the_mode_is_at_its_begin():
    """A trainer that sets the model to train after the step began (transformers', after evaluation) doesn't count it anew."""
    model, flops = watched()
    found = []
    for training in (True, False, True):
        model.train(training)
        flops.begin_step(x())
        loss_of(model.train()(x())).backward()
        flops.end_step()
        found.append(flops.take().flags)
    assert found == [(Flag.COUNTED,), (), ()]


def test_the_usual_step_and_the_others():
    """A step like the last is answered from memory; any other, a new one or one counted by hand, is not."""
    model, flops = watched()
    counts = []
    for rows in (2, 2, 2, 4, 2, 2):
        loss_of(model(x(rows))).backward()
        counts.append(flops.take().flops.model_flops / (2 * ONE))
    assert counts == [1, 1, 1, 2, 1, 1]
    with flops.counting():
        model(x())
    assert flops.take().flags == (Flag.COUNTED,)
    model(x())
    assert flops.take().flops.model_flops == ONE  # what was counted by hand holds
    assert flops.take().flops is None


def test_a_step_that_raises():
    """abort() drops the open step; no mode stays, and the same shape is counted next time."""
    model = Net()
    flops = StepFlops(model)
    flops.begin_step(x())
    assert torch._C._len_torch_dispatch_stack() == 1
    flops.abort()
    flops.abort()
    assert torch._C._len_torch_dispatch_stack() == 0
    assert flops.take() == StepWork(None, ())
    flops.begin_step(x())  # this one never ends: the next begin drops it
    flops.begin_step(x())
    loss_of(model(x())).backward()
    flops.end_step()
    assert flops.take().flops.model_flops == 2 * ONE


def test_live_steps_are_scaled_too():
    """The 17th batch shape is scaled."""
    model = Net()
    flops = StepFlops(model)
    for rows in range(1, 18):
        flops.begin_step(x(rows))
        loss_of(model(x(rows))).backward()
        flops.end_step()
        work = flops.take()
        assert work.flops.model_flops == rows * ONE
    assert work.flags == (Flag.FLOPS_SCALED,)


def test_counting_by_hand():
    """counting() enters one step whatever ran in it, its forwards not twice; an exception in it goes through and enters nothing."""
    model, flops = watched()
    with flops.counting():
        loss_of(model(x())).backward()
        torch.randn(2, 4) @ torch.randn(4, 4)
    work = flops.take()
    assert (work.flops.model_flops, work.flags) == (3 * ONE, (Flag.COUNTED,))
    with flops.counting():  # a callback that counts as well doesn't count twice
        flops.begin_step(x())
        loss_of(model(x())).backward()
        flops.end_step()
    assert flops.take().flops.model_flops == 2 * ONE
    with pytest.raises(ZeroDivisionError), flops.counting():
        model(x())
        1 / 0  # noqa: B018
    assert flops.take() == StepWork(None, ())


def test_wrapped_models_are_counted_inside():
    """A compiled wrapper is watched from outside and counted from inside, at no compilation of ours."""
    torch._dynamo.reset()
    graphs = []
    model, flops = watched(torch.compile(Net(), backend=lambda graph, _: graphs.append(graph) or graph.forward))
    for _ in range(3):
        loss_of(model(x())).backward()
        assert flops.take().flops.model_flops == 2 * ONE
    assert len(graphs) == 1


@pytest.mark.parametrize("inside", [False, True])
def test_a_hook_inside_a_compiled_graph_is_harmless(inside):
    """A model that is compiled after it was hooked trains as ever, compiled once; that its forwards aren't seen is flagged and said once."""
    torch._dynamo.reset()
    graphs, said = [], []
    net, flops = watched(warn=said.append)
    options = {"backend": lambda graph, _: graphs.append(graph) or graph.forward, "fullgraph": True}
    if inside:
        net.compile(**options)
        model = net
    else:
        model = torch.compile(net, **options)
    works = []
    for _ in range(4):
        loss_of(model(x())).backward()
        works.append(flops.take())
    assert works == [StepWork(None, ())] + [StepWork(None, (Flag.FLOPS_UNKNOWN,))] * 3
    assert len(graphs) == 1
    assert len(said) == 1
    assert "track(compiled)" in said[0]


def test_other_peoples_compiling_says_nothing():
    """Where the model's forwards are seen, what else is compiled does not make its steps suspect, idle ones neither."""
    torch._dynamo.reset()
    model, flops = watched()
    torch.compile(lambda y: y + 1, backend="eager")(x())
    flops.take()  # the beginning of a phase, say
    loss_of(model(x())).backward()
    assert flops.take().flops.model_flops == 2 * ONE
    assert [flops.take() for _ in range(3)] == [StepWork(None, ())] * 3


@pytest.mark.skipif(not COUNTS_COMPILED, reason="this torch can't")
def test_a_live_compiled_step_is_an_estimate():
    """A compiled model in a live step stays compiled, and its FLOPs are marked as estimated."""
    torch._dynamo.reset()
    net = Net()
    net.layer = torch.compile(net.layer, backend="aot_eager")
    flops = StepFlops(net)
    flops.begin_step(x())
    loss_of(net(x())).backward()
    flops.end_step()
    work = flops.take()
    assert work.flops.model_flops == 2 * ONE
    assert work.flops.estimated


def test_users_modes_around_a_live_step():
    """Modes entered before, and left in between or after, are on exactly as long as their owner says."""
    from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

    class Plain(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    flops, first, second = StepFlops(Net()), Plain(), Plain()
    with first:
        flops.begin_step(x(1))
        flops.end_step()
        assert _get_current_dispatch_mode_stack() == [first]
        flops.take()
    first.__enter__()
    flops.begin_step(x(2))
    first.__exit__(None, None, None)  # takes ours off, and leaves itself on
    flops.end_step()
    assert _get_current_dispatch_mode_stack() == []
    flops.begin_step(x(3))
    second.__enter__()
    flops.end_step()
    assert _get_current_dispatch_mode_stack()[-1] is second
    second.__exit__(None, None, None)
    flops.take()
    assert _get_current_dispatch_mode_stack() == []


def test_uncounted_operations_are_said_once():
    """An operation without a formula is named in one warning, with the way to register one."""

    class Inverse(nn.Module):
        def forward(self, y):
            return torch.linalg.inv(y)

    model, flops = watched(Inverse())
    with pytest.warns(GreenTorchWarning, match="register_flop_formula") as caught:
        for _ in range(2):
            model(torch.eye(3))
            assert flops.take().flops.uncounted_ops == ("aten::linalg_inv_ex",)
    assert len(caught) == 1


def test_nothing_raises():
    """Inputs that refuse to be looked at, and calls in any order, raise nothing and end counting with one warning."""

    class Hostile:
        @property
        def __dict__(self):
            raise RuntimeError("no")

    class Takes(nn.Module):
        def forward(self, _value):
            return 1

    model, flops = watched(Takes())
    with pytest.warns(GreenTorchWarning, match="flops_per_step="):
        assert model(Hostile()) == 1
    assert flops.take() == StepWork(None, (Flag.FLOPS_UNKNOWN,))
    alone = StepFlops()
    alone.attach()
    alone.end_step()
    alone.detach()
    assert alone.take() == StepWork(None, ())
    with pytest.raises(ArgumentError):
        StepFlops(attention="half")


def test_a_known_forward_is_cheap_and_leaves_no_trace():
    """Seeing a known key costs less than calling one small layer, and 20,000 forwards grow by nothing."""
    model, flops = watched()
    batch, labels = x(), torch.arange(2)
    hook = next(iter(model._forward_pre_hooks.values()))
    hook(model, (batch, labels), {})
    flops.take()
    plain = Net().layer
    costs = [(_timed(lambda: hook(model, (batch, labels), {})), _timed(lambda: plain(batch))) for _ in range(5)]
    assert min(ours for ours, _ in costs) < min(layers for _, layers in costs)
    gc.collect()
    tracemalloc.start()
    for step in range(20_000):
        hook(model, (batch, labels), {})
        if step % 10 == 0:
            flops._pending.clear()
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 20_000


def _timed(call, times=500):
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def test_forwards_that_nobody_takes_are_bounded():
    """A loop that never takes, on ever new shapes, stops remembering at some point, and says so."""
    model, flops = watched()
    hook = next(iter(model._forward_pre_hooks.values()))
    for rows in range(1, 1100):
        hook(model, (torch.empty(rows, 4, device="meta"),), {})
    assert len(flops._pending) <= 1024
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Flag.FLOPS_UNKNOWN in flops.take().flags


def test_a_model_that_ranks_share_out(tmp_path):
    """DDP, FSDP1 and FSDP2 on two ranks: the whole model under its own name, and FLOPs as counted live, in the dtype that they run in."""
    ended = forked_ranks("tests.sharded_ranks", [], tmp_path, CUDA_VISIBLE_DEVICES="")
    assert [code for code, _, _ in ended] == [0, 0], ended
    told = [json.loads(line) for _, out, _ in ended for line in out.splitlines()]
    alone = told[0]
    assert (alone["way"], alone["flops"]) == ("alone", [alone["live"]] * 2)
    for one in told:
        assert (one["model"], one["compiled"], one["parameters"]) == ("Tied", "Tied", alone["parameters"]), one
        assert (one["flops"], one["live"], one["warnings"]) == (alone["flops"], alone["live"], []), one
        assert one["hardware"] == [one["live_hardware"]] * 2, one
        assert (one["live_hardware"] > one["live"]) == ("checkpointed" in one["way"]), one
        dtype = "bfloat16" if "bfloat16" in one["way"] else "float32"
        assert (one["peaks"], one["dtypes"], one["dtype"]) == ([f"mm/{dtype}"], [f"mm/{dtype}"], dtype), one
    inside = {one["way"]: one["inside"] for one in told if one["way"].startswith("FSDP1")}
    assert inside["FSDP1"] == inside["FSDP1 by blocks"] == alone["parameters"]
    assert (
        inside["FSDP1 original"] is inside["FSDP1 original by blocks"] is None
    )  # nothing leads to the shapes: no shard for the whole
