"""FLOPs by module and by operation: every part sums to what count_flops says, and belongs where it was asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from torch.utils.checkpoint import checkpoint

from green_torch.errors import ArgumentError
from green_torch.flops import count_by_module, count_flops


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])


class Net(nn.Module):
    def __init__(self, reentrant=None, asks=False):
        super().__init__()
        self.reentrant, self.asks = reentrant, asks
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.scale = nn.Parameter(torch.ones(16, 16))

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        if self.asks:
            assert x.sum().item() == x.sum().item()
        return x @ self.scale


class Penalty(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.out = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x):
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(self.out(torch.tanh(self.up(x))).sum(), x, create_graph=True)
        return slope.pow(2).sum()


class Doubled(torch.autograd.Function):
    """Its forward computes nothing that counts, its backward does."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0], None


class Custom(nn.Module):
    def forward(self, x, weight):
        return Doubled.apply(x, weight)


TOKENS = torch.arange(24).reshape(2, 12)
TOKEN_COUNT, WIDTH = 24, 16
CASES = {
    "plain": (Net, (TOKENS,)),
    "reentrant": (lambda: Net(reentrant=True), (TOKENS,)),
    "non-reentrant": (lambda: Net(reentrant=False), (TOKENS,)),
    "computed": (lambda: Net(asks=True), (TOKENS,)),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(96, 2)),
        (torch.randn(2, 3, 8, 8),),
    ),
    "lstm": (lambda: nn.LSTM(5, 7, 2), (torch.randn(4, 3, 5),)),
    "transformer": (lambda: nn.Transformer(16, 2, 1, 1, 32, batch_first=True), (torch.randn(2, 4, 16), torch.randn(2, 5, 16))),
    "penalty": (Penalty, (torch.randn(4, 8),)),
    "meta": (lambda: Net().to("meta"), (TOKENS,)),
}


def of(rows, name):
    return sum(row.model_flops for row in rows if row.module == name)


@pytest.mark.parametrize("name", CASES)
def test_parts_sum_to_the_whole(name):
    """The rows' model, hardware and recomputed FLOPs sum to count_flops exactly, by dtype too, and the model is as it was."""
    build, args = CASES[name]
    torch.manual_seed(0)
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()} if name != "meta" else {}
    table, whole = count_by_module(model, *args), count_flops(model, *args)
    assert table.total == whole
    for field in ("model_flops", "hardware_flops", "recompute_flops"):
        assert sum(getattr(row, field) for row in table.rows) == getattr(whole, field)
    for dtype, flops in whole.flops_by_dtype.items():
        assert sum(row.hardware_flops for row in table.rows if row.dtype == dtype) == flops
    assert {row.module for row in table.rows} <= {module for module, _ in model.named_modules()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_parts_belong_where_they_were_asked_for(reentrant):
    """Linear layers, attention and what the model itself multiplies have their own FLOPs, forward and backward, checkpointed or not."""
    rows = count_by_module(Net(reentrant=reentrant), TOKENS).rows
    one = 2 * TOKEN_COUNT * WIDTH * WIDTH
    for index in range(2):
        assert of(rows, f"blocks.{index}.qkv") == 3 * 3 * one
        assert of(rows, f"blocks.{index}.out") == 3 * one
        assert of(rows, f"blocks.{index}") == 3 * 4 * 2 * 12 * 12 * WIDTH
        replayed = sum(row.recompute_flops for row in rows if row.module == f"blocks.{index}.qkv")
        assert replayed == (0 if reentrant is None else 3 * one)
    assert of(rows, "") == 3 * one
    forward = sum(row.model_flops for row in rows if row.module == "blocks.0.out" and not row.backward)
    assert forward == one


def test_a_derivative_inside_a_forward_belongs_to_its_layers():
    """Both derivatives of a gradient penalty are booked to the layers that they pass through."""
    rows = count_by_module(Penalty(), torch.randn(4, 8)).rows
    assert {row.module for row in rows} == {"up", "out"}
    assert of(rows, "up") == 6 * 2 * 4 * 8 * 16


def test_a_custom_function_belongs_to_its_module():
    """What only the backward of an autograd function computes belongs to the module that called it."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.own, self.last = nn.Linear(4, 4), Custom(), nn.Linear(4, 4)

        def forward(self, x, weight):
            return self.last(self.own(self.first(x), weight))

    rows = count_by_module(Chain(), torch.randn(3, 4), torch.randn(4, 4)).rows
    assert {row.op for row in rows if row.module == "own"} == {"aten::mm"}
    assert of(rows, "own") == 2 * 3 * 4 * 4


def test_calls_are_counted():
    """A module that runs twice has two calls forward, and a weight and an input gradient of each."""
    layer = nn.Linear(4, 4, bias=False)
    rows = count_by_module(nn.Sequential(nn.Linear(4, 4), layer, layer), torch.randn(3, 4)).rows
    calls = {row.backward: row.calls for row in rows if row.module == "1"}
    assert calls == {False: 2, True: 4}


def test_wrong_arguments():
    """What is no module is refused by count_flops's own words."""
    with pytest.raises(ArgumentError, match=r"torch\.nn\.Module"):
        count_by_module(3)
