"""A training small enough to be compiled in seconds, with attention in a block of its own kind; loads no pytest, for workers."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from green_torch.experiment import Variant, Workload

BATCH, LENGTH, WIDTH, HEADS = 4, 16, 32, 2


class Block(nn.Module):
    """Causal attention over ``[batch, time, width]``, added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + mixed.transpose(1, 2).flatten(-2)


class Attentive(nn.Module):
    """A block, and a number for each place."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, time, width]`` to ``[batch, time, 1]``."""
        return self.head(self.block(x))


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """How far each number is from the mean of its place's input."""
    return (model(batch) - batch.mean(-1, keepdim=True)).square().mean()


def batches(seed: int, n: int = 4) -> list[torch.Tensor]:
    """So many of them."""
    return list(torch.randn(n, BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed)))


def build(_: Variant) -> Workload:
    """The workload, for any variant."""
    optimizer = partial(torch.optim.SGD, lr=0.1)
    return Workload(Attentive(), optimizer, loss, batches, lambda batch: {"samples": len(batch)}, checkpoint_blocks=(Block,))
