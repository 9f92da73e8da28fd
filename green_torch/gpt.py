"""The built-in workload: a small byte-level GPT trained on the source of Python's standard library, which every machine has."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from green_torch.errors import ArgumentError, GreenTorchError
from green_torch.experiment import Workload

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from green_torch.experiment import Variant

_CORPUS_BYTES = 4_000_000
_INIT_STD = 0.02
_ROOM_FOR_124M_BYTES = 30e9  # FP32 with math attention peaks near 24 GB at batch 8 x 1024


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """Shape of a :class:`GPT`. The vocabulary is the 256 bytes unless a larger one is wanted for comparable FLOPs."""

    layers: int
    heads: int
    width: int
    block_size: int
    vocabulary: int = 256

    def __post_init__(self) -> None:
        if self.width % self.heads or min(self.layers, self.heads, self.width, self.block_size) < 1:
            raise ArgumentError(f"A GPT needs positive sizes and a width that its heads divide, not {self}.")


@dataclass(frozen=True, slots=True)
class _Size:
    config: GPTConfig
    batch_size: int
    learning_rate: float
    cpu_batch_size: int | None = None  # where the same as on a GPU would take minutes a step


# Learning rates at which rounding dies out, so that losses compare: changing the weights by 1e-6 moves the mean loss of steps 75 to 150 of
# 10M (1,020 tokens a step) by 2.6 % at 1e-3, 1.8 % at 3e-4 and 0.004 % at 1e-4, where it also falls fastest; 1M bears 5e-4.
SIZES = {
    "1M": _Size(GPTConfig(layers=4, heads=4, width=128, block_size=128), batch_size=4, learning_rate=5e-4),
    "10M": _Size(GPTConfig(layers=6, heads=6, width=384, block_size=256), batch_size=16, learning_rate=1e-4, cpu_batch_size=1),
    # GPT-2's shape, its vocabulary padded as is usual, so that FLOPs and MFU compare with others'; bytes use 256 of its entries
    "124M": _Size(
        GPTConfig(layers=12, heads=12, width=768, block_size=1024, vocabulary=50_304), batch_size=8, learning_rate=1e-4
    ),
    "350M": _Size(  # GPT-2 medium's shape; half the batch, so that FP32 with math attention fits 80 GB
        GPTConfig(layers=24, heads=16, width=1024, block_size=1024, vocabulary=50_304), batch_size=4, learning_rate=1e-4
    ),
}


class _Block(nn.Module):
    """Attention and a feed-forward network, each normalised before and added to what came in."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.feed_norm = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, 4 * width, bias=False)
        self.feed_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, time, width]`` to the same."""
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, time, width))
        fed: torch.Tensor = self.feed_out(functional.gelu(self.feed_in(self.feed_norm(x))))
        return x + fed


class GPT(nn.Module):
    """A decoder-only transformer with learned positions, its head tied to its embedding; Radford et al. 2019, without biases."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.block_size, config.width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=_INIT_STD)
        for name, parameter in self.named_parameters():
            if name.endswith("_out.weight"):  # 2 x layers of these add up in the residual stream
                nn.init.normal_(parameter, std=_INIT_STD / (2 * config.layers) ** 0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids ``[batch, time]`` to logits ``[batch, time, vocabulary]``; ``time`` is at most the block size."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.embedding.weight)


def next_byte_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, in nats, of each token given those before it; ``batch`` is ``[batch, time + 1]``."""
    logits = model(batch[:, :-1])
    loss: torch.Tensor = functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
    return loss


def byte_batches(seed: int, batch_size: int, block_size: int) -> Iterator[torch.Tensor]:
    """Endless batches of random passages, ``int64 [batch_size, block_size + 1]``; the same ones in the same order for a seed.

    Raises:
        GreenTorchError: where this Python has no readable standard library.
    """
    corpus = _corpus()
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(block_size + 1)
    while True:
        starts = torch.randint(len(corpus) - block_size, (batch_size, 1), generator=generator)
        yield corpus[starts + window].long()


@lru_cache(maxsize=1)
def _corpus() -> torch.Tensor:
    """The standard library's top-level modules one after another, in order of name: ``uint8``, 4 MB at most."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= _CORPUS_BYTES:
            break
    if len(text) < _CORPUS_BYTES // 10:
        raise GreenTorchError(
            f"The demo trains on the source of Python's standard library, and {folder} holds only {len(text)} bytes of it. "
            "Run it under a Python installed with its library, or compare your own code: green-torch compare module:build"
        )
    return torch.frombuffer(text[:_CORPUS_BYTES], dtype=torch.uint8)


def workload(variant: Variant, device: str | torch.device | None = None, size: str = "auto") -> Workload:
    """Builds the workload of a variant on a device (the GPU where there is one).

    ``size`` is a name in :data:`SIZES`; "auto" takes 1M parameters on a CPU (steps of about 0.1 s on two old cores), 124M on a
    GPU with room for it and 10M on a smaller one.

    Raises:
        ArgumentError: for an unknown size.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if size == "auto":
        size = _size_for(device)
    if size not in SIZES:
        raise ArgumentError(f"There is no GPT of size {size!r}; the sizes are {', '.join(SIZES)} and auto.")
    chosen = SIZES[size]
    usual = chosen.batch_size if device.type != "cpu" else chosen.cpu_batch_size or chosen.batch_size
    batch_size = variant.batch_size or usual

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=chosen.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)

    def batches(seed: int) -> Iterator[torch.Tensor]:
        return byte_batches(seed, batch_size, chosen.config.block_size)

    return Workload(GPT(chosen.config).to(device), optimizer, next_byte_loss, batches, _units)


def _size_for(device: torch.device) -> str:
    if device.type != "cuda":
        return "1M"
    return "124M" if torch.cuda.get_device_properties(device).total_memory >= _ROOM_FOR_124M_BYTES else "10M"


def _units(batch: Any) -> dict[str, int]:
    return {"tokens": batch.shape[0] * (batch.shape[1] - 1), "samples": batch.shape[0]}
