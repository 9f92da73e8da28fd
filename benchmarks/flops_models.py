"""The architectures of ``flops.py``, each with its model FLOPs of a training step written out by hand.

The hand counts use nothing of ours: sizes, 2 FLOPs a multiply-add, forward once, the gradient of a weight once where it is trained,
the gradient of an input once where something before it is trained. Element-wise work counts as nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from torch.utils.checkpoint import checkpoint

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model, its inputs, the FLOPs counted by hand, and how many tokens (or samples) 6ND would be asked about.

    ``large``: only its shapes are run (on ``meta``).
    """

    name: str
    build: Callable[[], tuple[nn.Module, tuple[Any, ...]]]
    by_hand: int
    tokens: int
    large: bool = False


def linear(rows: int, *widths: int) -> int:
    """Forward FLOPs of linear layers one after another: ``linear(rows, 784, 256, 10)``."""
    return sum(2 * rows * a * b for a, b in pairwise(widths))


def conv(positions: int, kernel: int, c_in: int, c_out: int, groups: int = 1) -> int:
    """Forward FLOPs of a convolution: ``positions`` of the output (transposed: input) with the batch, ``kernel`` its elements."""
    return 2 * positions * kernel * c_in * c_out // groups


def attention(batch: int, queries: int, keys: int, width: int) -> int:
    """Forward FLOPs of scores and mixing over all heads together."""
    return 4 * batch * queries * keys * width


def train(forward: int, first: int = 0) -> int:
    """Forward, weight gradients, input gradients; the ``first`` layers stand on data, whose gradient nobody asks for."""
    return 3 * forward - first


def heads(x: Tensor, n: int) -> Tensor:
    """``[batch, time, width]`` to ``[batch, heads, time, width / heads]``."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


# --- plain and convolutional -----------------------------------------------------------------------------------------------------


def mlp() -> tuple[nn.Module, tuple[Any, ...]]:
    """Three linear layers on data."""
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)), (
        torch.randn(64, 784),
    )


class Bottleneck(nn.Module):
    """ResNet-50's block: 1x1, 3x3, 1x1, and a 1x1 shortcut where the shape changes."""

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        changes = stride > 1 or c_in != 4 * width
        self.shortcut = nn.Conv2d(c_in, 4 * width, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Images to images."""
        return F.relu(self.body(x) + self.shortcut(x))


_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))


def resnet50() -> tuple[nn.Module, tuple[Any, ...]]:
    """The network of He et al. 2015 as torchvision has it."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    c_in = 64
    for width, blocks, stride in _STAGES:
        for index in range(blocks):
            layers.append(Bottleneck(c_in, width, stride if index == 0 else 1))
            c_in = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)), (torch.randn(1, 3, 224, 224),)


def resnet50_by_hand() -> int:
    """Forward 2 x 4,089,184,256 multiply-adds at 224 x 224, the figure in circulation; less the stem's input gradient."""
    stem, side, c_in = conv(112 * 112, 49, 3, 64), 56, 64
    forward = stem + linear(1, 2048, 1000)
    for width, blocks, stride in _STAGES:
        for index in range(blocks):
            before, side = side, side // (stride if index == 0 else 1)
            forward += conv(before**2, 1, c_in, width) + conv(side**2, 9, width, width) + conv(side**2, 1, width, 4 * width)
            forward += conv(side**2, 1, c_in, 4 * width) if index == 0 else 0
            c_in = 4 * width
    assert forward == 2 * 4_089_184_256
    return train(forward, stem)


class Inverted(nn.Module):
    """MobileNetV2's block: expand, depthwise, project."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        wide = width * factor
        self.body = nn.Sequential(
            nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Images to images."""
        y: Tensor = self.body(x)
        return x + y


def mobilenet() -> tuple[nn.Module, tuple[Any, ...]]:
    """A stem and three inverted residuals."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        *(Inverted(16, 6) for _ in range(3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ), (torch.randn(2, 3, 64, 64),)


def mobilenet_by_hand() -> int:
    """32 x 32 positions, 96 channels in the blocks."""
    p = 2 * 32 * 32
    stem = conv(p, 9, 3, 16)
    block = conv(p, 1, 16, 96) + conv(p, 9, 96, 96, groups=96) + conv(p, 1, 96, 16)
    return train(stem + 3 * block + linear(2, 16, 10), stem)


def resnext() -> tuple[nn.Module, tuple[Any, ...]]:
    """Grouped 3x3 convolutions, 32 groups."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3, 2, 1, groups=32), nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1, groups=32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    ), (torch.randn(2, 3, 32, 32),)  # fmt: skip


def resnext_by_hand() -> int:
    """Two grouped layers on 16 x 16."""
    stem = conv(2 * 32 * 32, 9, 3, 64)
    grouped = conv(2 * 256, 9, 64, 128, groups=32) + conv(2 * 256, 9, 128, 128, groups=32)
    return train(stem + grouped + linear(2, 128, 10), stem)


class ConvNeXtBlock(nn.Module):
    """A depthwise 7x7 and two linear layers over channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Images to images."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


def convnext() -> tuple[nn.Module, tuple[Any, ...]]:
    """A patchifying stem and two blocks."""
    return nn.Sequential(nn.Conv2d(3, 48, 4, 4), ConvNeXtBlock(48), ConvNeXtBlock(48)), (torch.randn(2, 3, 64, 64),)


def convnext_by_hand() -> int:
    """16 x 16 positions."""
    p = 2 * 256
    stem = conv(p, 16, 3, 48)
    return train(stem + 2 * (conv(p, 49, 48, 48, groups=48) + linear(p, 48, 192, 48)), stem)


class UNet(nn.Module):
    """Two levels down, two up by transposed convolutions, with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 16), (16, 32), (32, 64)))
        self.up_b, self.up_a = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.join_b, self.join_a, self.out = (
            nn.Conv2d(64, 32, 3, padding=1),
            nn.Conv2d(32, 16, 3, padding=1),
            nn.Conv2d(16, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images to a mask."""
        a = F.relu(self.a(x))
        b = F.relu(self.b(F.max_pool2d(a, 2)))
        c = F.relu(self.c(F.max_pool2d(b, 2)))
        b = F.relu(self.join_b(torch.cat([b, self.up_b(c)], 1)))
        a = F.relu(self.join_a(torch.cat([a, self.up_a(b)], 1)))
        y: Tensor = self.out(a)
        return y


def unet_by_hand() -> int:
    """64, 32 and 16 pixels a side; a transposed convolution works at each position of its input."""
    n, p, q, r = 2, 64**2, 32**2, 16**2
    stem = conv(n * p, 9, 3, 16)
    down = conv(n * q, 9, 16, 32) + conv(n * r, 9, 32, 64)
    up = (
        conv(n * r, 4, 64, 32)
        + conv(n * q, 9, 64, 32)
        + conv(n * q, 4, 32, 16)
        + conv(n * p, 9, 32, 16)
        + conv(n * p, 1, 16, 2)
    )
    return train(stem + down + up, stem)


def autoencoder() -> tuple[nn.Module, tuple[Any, ...]]:
    """Strided convolutions down, grouped and plain transposed ones up."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, 2, 1, groups=4), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1),
    ), (torch.randn(4, 1, 32, 32),)  # fmt: skip


def autoencoder_by_hand() -> int:
    """32 to 16 to 8 pixels a side and back."""
    n = 4
    stem = conv(n * 256, 16, 1, 16)
    rest = conv(n * 64, 16, 16, 32) + conv(n * 64, 16, 32, 16, groups=4) + conv(n * 256, 16, 16, 1)
    return train(stem + rest, stem)


def audio() -> tuple[nn.Module, tuple[Any, ...]]:
    """Dilated 1-D convolutions over a waveform."""
    return nn.Sequential(
        nn.Conv1d(1, 32, 10, 5), nn.GELU(), nn.Conv1d(32, 32, 3, padding=2, dilation=2), nn.GELU(), nn.Conv1d(32, 64, 3, 2)
    ), (torch.randn(2, 1, 4000),)


def audio_by_hand() -> int:
    """799 positions, 799 again, 399."""
    stem = conv(2 * 799, 10, 1, 32)
    return train(stem + conv(2 * 799, 3, 32, 32) + conv(2 * 399, 3, 32, 64), stem)


def video() -> tuple[nn.Module, tuple[Any, ...]]:
    """3-D convolutions over a clip."""
    return nn.Sequential(
        nn.Conv3d(3, 16, 3, (1, 2, 2), 1),
        nn.ReLU(),
        nn.Conv3d(16, 32, 3, 2, 1),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    ), (torch.randn(2, 3, 8, 32, 32),)


def video_by_hand() -> int:
    """8 x 16 x 16 positions, then 4 x 8 x 8."""
    stem = conv(2 * 8 * 256, 27, 3, 16)
    return train(stem + conv(2 * 4 * 64, 27, 16, 32) + linear(2, 32, 5), stem)


# --- attention -------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A GPT-2 block without biases; ``by_hand`` writes attention out."""

    def __init__(self, width: int, n_heads: int, *, by_hand: bool = False, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.by_hand, self.causal = n_heads, by_hand, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, time, width]`` to the same."""
        q, k, v = (heads(y, self.heads) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        if self.by_hand:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            y = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(mask, -math.inf).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        z: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return z


class GPT(nn.Module):
    """GPT-2 with a tied head; ``reentrant`` checkpoints every block, in that manner."""

    def __init__(
        self,
        layers: int = 12,
        width: int = 768,
        n_heads: int = 12,
        vocabulary: int = 50_304,
        *,
        by_hand: bool = False,
        reentrant: bool | None = None,
    ) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(1024, width)
        self.blocks = nn.ModuleList(Block(width, n_heads, by_hand=by_hand) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids to logits."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        y: Tensor = self.head(self.norm(x))
        return y


def gpt_by_hand(batch: int, time: int, layers: int, width: int, vocabulary: int) -> int:
    """12 width^2 multiply-adds a token and layer, attention in full, and the head."""
    block = 12 * 2 * batch * time * width**2 + attention(batch, time, time, width)
    return train(layers * block + linear(batch * time, width, vocabulary))


def gpt124(**options: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    """GPT-2 124M on 8 x 1024 tokens, without memory."""
    with torch.device("meta"):
        return GPT(**options), (torch.zeros(8, 1024, dtype=torch.long),)


def small_gpt(**options: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    """Two layers of 64 on 2 x 48 tokens."""
    return GPT(2, 64, 4, 100, **options), (torch.randint(100, (2, 48)),)


class Llama(nn.Module):
    """One key head for four query heads (GQA), rotary positions, gated feed-forward."""

    def __init__(self, layers: int = 2, width: int = 64, n_heads: int = 8, kv_heads: int = 2, hidden: int = 172) -> None:
        super().__init__()
        self.n_heads, self.kv_heads = n_heads, kv_heads
        kv = width // n_heads * kv_heads

        def lin(a: int, b: int) -> nn.Linear:
            return nn.Linear(a, b, bias=False)

        self.embed, self.head = nn.Embedding(100, width), lin(width, 100)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.RMSNorm(width), "q": lin(width, width), "k": lin(width, kv), "v": lin(width, kv), "o": lin(width, width),
                    "norm2": nn.RMSNorm(width), "gate": lin(width, hidden), "up": lin(width, hidden), "down": lin(hidden, width),
                }
            )
            for _ in range(layers)
        )  # fmt: skip

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary position embedding."""
        half = x.shape[-1] // 2
        angle = torch.outer(
            torch.arange(x.shape[2], device=x.device), 10_000.0 ** (-torch.arange(half, device=x.device) / half)
        )
        a, b = x.split(half, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids to logits."""
        x = self.embed(tokens)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            y = layer["norm"](x)
            q, k = self.rotate(heads(layer["q"](y), self.n_heads)), self.rotate(heads(layer["k"](y), self.kv_heads))
            v = heads(layer["v"](y), self.kv_heads)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + layer["o"](mixed.transpose(1, 2).flatten(2))
            y = layer["norm2"](x)
            x = x + layer["down"](F.silu(layer["gate"](y)) * layer["up"](y))
        logits: Tensor = self.head(x)
        return logits


def llama_by_hand() -> int:
    """Width 64, 2 of 8 heads for keys and values, hidden 172, 2 layers, vocabulary 100, 2 x 32 tokens. ``outer`` is element-wise."""
    n, d = 2 * 32, 64
    layer = 2 * linear(n, d, d) + 2 * linear(n, d, d // 4) + 3 * linear(n, d, 172) + attention(2, 32, 32, d)
    return train(2 * layer + linear(n, d, 100))


class ViT(nn.Module):
    """Patches of 16, a class token, four blocks."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.patch, self.cls, self.position = (
            nn.Conv2d(3, width, 16, 16),
            nn.Parameter(torch.zeros(1, 1, width)),
            nn.Parameter(torch.zeros(1, 197, width)),
        )
        self.blocks = nn.Sequential(*(Block(width, 6, causal=False) for _ in range(4)))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images to classes."""
        x = self.patch(images).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        y: Tensor = self.head(self.blocks(x)[:, 0])
        return y


def vit_by_hand() -> int:
    """196 patches and the class token; the head sees that alone."""
    n, d = 2 * 197, 96
    patch = conv(2 * 196, 256, 3, d)
    return train(patch + 4 * (12 * linear(n, d, d) + attention(2, 197, 197, d)) + linear(2, d, 10), patch)


class Mixer(nn.Module):
    """MLP-Mixer: linear layers over patches, then over channels."""

    def __init__(self, patches: int = 64, width: int = 48) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.over_patches = nn.Sequential(nn.Linear(patches, 96), nn.GELU(), nn.Linear(96, patches))
        self.over_channels = nn.Sequential(nn.Linear(width, 192), nn.GELU(), nn.Linear(192, width))

    def forward(self, images: Tensor) -> Tensor:
        """Images to features."""
        x = self.patch(images).flatten(2)
        x = x + self.over_patches(x)
        y: Tensor = x.mT + self.over_channels(x.mT)
        return y


def mixer_by_hand() -> int:
    """64 patches of 8 x 8, 48 channels."""
    patch = conv(2 * 64, 64, 3, 48)
    return train(patch + linear(2 * 48, 64, 96, 64) + linear(2 * 64, 48, 192, 48), patch)


class Bert(nn.Module):
    """``nn.TransformerEncoder`` on embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(64, 100)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids to logits."""
        y: Tensor = self.head(self.encoder(self.embed(tokens)))
        return y


def bert_by_hand() -> int:
    """3 layers of width 64 on 2 x 40 tokens."""
    n = 2 * 40
    return train(3 * (12 * linear(n, 64, 64) + attention(2, 40, 40, 64)) + linear(n, 64, 100))


class Seq2Seq(nn.Module):
    """``nn.Transformer``: encoder, decoder, cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.transformer = nn.Transformer(64, 4, 2, 2, 128, dropout=0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Source and target ids to features."""
        y: Tensor = self.transformer(self.embed(source), self.embed(target))
        return y


def seq2seq_by_hand() -> int:
    """2 x 40 source and 2 x 24 target tokens; keys and values of cross-attention come from the source."""
    d, s, t = 64, 2 * 40, 2 * 24
    encoder = 4 * linear(s, d, d) + linear(s, d, 128, d) + attention(2, 40, 40, d)
    cross = 2 * linear(t, d, d) + 2 * linear(s, d, d) + attention(2, 24, 40, d)
    decoder = 4 * linear(t, d, d) + attention(2, 24, 24, d) + cross + linear(t, d, 128, d)
    return train(2 * (encoder + decoder))


class Perceiver(nn.Module):
    """Learned queries over data through ``nn.MultiheadAttention``, weights asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 16, 64))
        self.attend, self.head = nn.MultiheadAttention(64, 4, kdim=32, vdim=32, batch_first=True), nn.Linear(64, 10)

    def forward(self, data: Tensor) -> Tensor:
        """``[batch, n, 32]`` to classes."""
        mixed, _ = self.attend(self.queries.expand(len(data), -1, -1), data, data, need_weights=True)
        y: Tensor = self.head(mixed.mean(1))
        return y


def perceiver_by_hand() -> int:
    """The projections of keys and values stand on data."""
    q, k = 4 * 16, 4 * 50
    on_data = 2 * linear(k, 32, 64)
    return train(2 * linear(q, 64, 64) + on_data + attention(4, 16, 50, 64) + linear(4, 64, 10), on_data)


class LinearAttention(nn.Module):
    """Attention without a softmax, by two ``einsum``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(100, 64), nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids to features."""
        q, k, v = (heads(y, 4) for y in self.qkv(self.embed(tokens)).chunk(3, -1))
        state = torch.einsum("bhtd,bhte->bhde", k.softmax(-2), v)
        y: Tensor = self.out(torch.einsum("bhtd,bhde->bhte", q, state).transpose(1, 2).flatten(2))
        return y


def linear_attention_by_hand() -> int:
    """4 heads of 16, 2 x 48 tokens: each einsum is 16 x 16 multiply-adds a token and head."""
    return train(linear(96, 64, 192) + linear(96, 64, 64) + 2 * 2 * 96 * 4 * 16 * 16)


# --- recurrent, sparse and special -----------------------------------------------------------------------------------------------


class LSTM(nn.Module):
    """A language model of two LSTM layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(100, 48), nn.LSTM(48, 64, 2, batch_first=True), nn.Linear(64, 100)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids to logits."""
        y: Tensor = self.head(self.lstm(self.embed(tokens))[0])
        return y


def lstm_by_hand() -> int:
    """Four gates; the first state is no parameter, so its gradient is not asked for: one step less of that product."""
    b, t, h = 3, 20, 64
    state = linear(b * t, h, 4 * h)
    layers = sum(train(linear(b * t, width, 4 * h)) + train(state) - state // t for width in (48, h))
    return layers + train(linear(b * t, h, 100))


class BiGRU(nn.Module):
    """A classifier of features over time, both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(20, 32, bidirectional=True), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        """``[time, batch, 20]`` to classes."""
        y: Tensor = self.head(self.gru(x)[0].mean(0))
        return y


def bigru_by_hand() -> int:
    """Three gates, twice; the input is data, the first state as above."""
    b, t, h = 4, 25, 32
    on_data, state = linear(b * t, 20, 3 * h), linear(b * t, h, 3 * h)
    return 2 * (train(on_data, on_data) + train(state) - state // t) + train(linear(b, 64, 5))


class RoutedExperts(nn.Module):
    """A mixture of experts: each token goes to one of four, by index."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Embedding(100, 32), nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids to features."""
        x = self.embed(tokens).flatten(0, 1)
        weight, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            y = y.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return y


def routed_by_hand() -> int:
    """Every token meets the router and one expert."""
    return train(linear(2 * 48, 32, 4) + linear(2 * 48, 32, 128, 32))


class GroupedExperts(nn.Module):
    """A mixture of experts in one grouped product; the tokens of each expert are as many as the others'."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        self.up, self.down = nn.Parameter(torch.randn(4, 32, 64)), nn.Parameter(torch.randn(4, 64, 32))

    def forward(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """Token ids, sorted by expert, and where each expert's end, to features."""
        x = self.embed(tokens).bfloat16()
        x = F.silu(F.grouped_mm(x, self.up.bfloat16(), offs=ends))
        return F.grouped_mm(x, self.down.bfloat16(), offs=ends) * 0.5


class GNN(nn.Module):
    """Messages along edges, added up at their targets."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(32, 24), nn.Linear(40, 16)
        self.message2, self.head = nn.Linear(32, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """``[nodes, 16]`` and edges to classes of nodes."""
        messages = F.relu(self.message(torch.cat([x[source], x[target]], 1)))
        mixed = x.new_zeros(len(x), 24).index_add(0, target, messages)
        x = F.relu(self.update(torch.cat([x, mixed], 1)))
        messages = F.relu(self.message2(torch.cat([x[source], x[target]], 1)))
        y: Tensor = self.head(x.new_zeros(len(x), 24).scatter_add(0, target[:, None].expand(-1, 24), messages))
        return y


def gnn_by_hand() -> int:
    """30 nodes, 90 edges; the first messages stand on data. The scatter adds, and counts as nothing."""
    first = linear(90, 32, 24)
    return train(first + linear(30, 40, 16) + linear(90, 32, 24) + linear(30, 24, 3), first)


class Recommender(nn.Module):
    """Embedding bags, a dense tower, and the products of all pairs of them (DLRM)."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(200, 16) for _ in range(5))
        self.dense = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 16))
        self.top = nn.Sequential(nn.Linear(16 + 36, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        """Dense features and ids ``[5, batch, n]`` to a score."""
        tower = self.dense(dense)
        features = torch.stack([tower, *(bag(one) for bag, one in zip(self.bags, ids, strict=True))], 1)
        pairs = torch.bmm(features, features.mT)
        y: Tensor = self.top(torch.cat([tower, pairs.flatten(1)], 1))
        return y


def recommender_by_hand() -> int:
    """Batch 32, 6 vectors of 16."""
    first = linear(32, 13, 64)
    return train(first + linear(32, 64, 16) + 32 * 2 * 6 * 6 * 16 + linear(32, 52, 32, 1), first)


class TwoTowers(nn.Module):
    """One user against all items by a matrix-vector product, and a bilinear term."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item, self.both = nn.Linear(30, 16), nn.Embedding(50, 16), nn.Bilinear(16, 16, 4)

    def forward(self, user: Tensor) -> Tensor:
        """A user's features ``[30]`` to 50 scores and 4 more."""
        u = self.user(user[None])[0]
        return torch.cat([torch.mv(self.item.weight, u), self.both(u[None], self.item.weight[:1])[0]])


def two_towers_by_hand() -> int:
    """A product of 50 x 16 by 16, and 4 x 16 x 16 for the bilinear term, each of whose three gradients costs as much again.

    The gradient of the matrix that meets a vector is an outer product: nothing is summed, so it is element-wise.
    """
    first = linear(1, 30, 16)
    return train(first, first) + 2 * (2 * 50 * 16) + 4 * (2 * 4 * 16 * 16)


class Frozen(nn.Module):
    """A frozen convolutional backbone under a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()
        ).requires_grad_(requires_grad=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images to classes."""
        y: Tensor = self.head(self.backbone(x).mean((2, 3)))
        return y


def frozen_by_hand() -> int:
    """The backbone runs forward alone, the head's weight alone has a gradient."""
    return conv(2 * 256, 9, 3, 32) + conv(2 * 64, 9, 32, 64) + 2 * linear(2, 64, 10)


class Adapted(nn.Module):
    """A frozen linear layer with a trained low-rank part (LoRA)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(requires_grad=False)
        self.a, self.b = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[rows, width]`` to the same."""
        y: Tensor = self.base(x) + self.b(self.a(x))
        return y


def lora_by_hand() -> int:
    """Three layers of width 64, rank 4, on data: the first has no input gradient, no base a weight gradient."""
    base, a, b = linear(40, 64, 64), linear(40, 64, 4), linear(40, 4, 64)
    return (base + 2 * a + 3 * b) + 2 * (2 * base + 3 * a + 3 * b)


class Critic(nn.Module):
    """A critic with a gradient penalty (WGAN-GP)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(32, 64), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[rows, 32]`` to the loss."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            score = self.out(torch.tanh(self.up(x)))
            (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
            return score.mean() + ((slope.norm(dim=1) - 1) ** 2).mean()


def critic_by_hand() -> int:
    """Forward; the slope (two input gradients); the loss's two gradients of each layer; the slope's own: both of ``up``'s, ``out``'s weight."""
    up, out = linear(20, 32, 64), linear(20, 64, 1)
    return (up + out) + (up + out) + 2 * (up + out) + (2 * up + out)


class Tied(nn.Module):
    """An autoencoder that uses one weight both ways, four times over."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 64))

    def forward(self, x: Tensor) -> Tensor:
        """``[rows, 64]`` to the same."""
        for _ in range(4):
            x = F.linear(torch.tanh(F.linear(x, self.weight)), self.weight.mT)
        return x


def ids(*shape: int, below: int = 100) -> Tensor:
    """Random ids."""
    return torch.randint(below, shape)


ARCHITECTURES = (
    Architecture("MLP", mlp, train(linear(64, 784, 256, 128, 10), linear(64, 784, 256)), 64),
    Architecture("ResNet-50, 224 px", resnet50, resnet50_by_hand(), 1),
    Architecture("MobileNetV2-like (depthwise)", mobilenet, mobilenet_by_hand(), 2),
    Architecture("ResNeXt-like (32 groups)", resnext, resnext_by_hand(), 2),
    Architecture("ConvNeXt-like (depthwise 7 × 7)", convnext, convnext_by_hand(), 2),
    Architecture("U-Net (transposed)", lambda: (UNet(), (torch.randn(2, 3, 64, 64),)), unet_by_hand(), 2),
    Architecture("autoencoder (grouped transposed)", autoencoder, autoencoder_by_hand(), 4),
    Architecture("audio, 1-D dilated convolutions", audio, audio_by_hand(), 2),
    Architecture("video, 3-D convolutions", video, video_by_hand(), 2),
    Architecture("ViT/16, 224 px", lambda: (ViT(), (torch.randn(2, 3, 224, 224),)), vit_by_hand(), 2 * 197),
    Architecture("MLP-Mixer", lambda: (Mixer(), (torch.randn(2, 3, 64, 64),)), mixer_by_hand(), 2 * 64),
    Architecture("BERT-like, nn.TransformerEncoder", lambda: (Bert(), (ids(2, 40),)), bert_by_hand(), 2 * 40),
    Architecture("nn.Transformer, cross-attention", lambda: (Seq2Seq(), (ids(2, 40), ids(2, 24))), seq2seq_by_hand(), 2 * 64),
    Architecture(
        "nn.MultiheadAttention on data", lambda: (Perceiver(), (torch.randn(4, 50, 32),)), perceiver_by_hand(), 4 * 50
    ),
    Architecture("linear attention (einsum)", lambda: (LinearAttention(), (ids(2, 48),)), linear_attention_by_hand(), 2 * 48),
    Architecture("Llama-like (GQA, SwiGLU)", lambda: (Llama(), (ids(2, 32),)), llama_by_hand(), 2 * 32),
    Architecture("GPT, attention by hand", lambda: small_gpt(by_hand=True), gpt_by_hand(2, 48, 2, 64, 100), 2 * 48),
    Architecture("GPT, SDPA", small_gpt, gpt_by_hand(2, 48, 2, 64, 100), 2 * 48),
    Architecture("GPT, SDPA, checkpointed", lambda: small_gpt(reentrant=False), gpt_by_hand(2, 48, 2, 64, 100), 2 * 48),
    Architecture("GPT-2 124M, 8 × 1024", gpt124, gpt_by_hand(8, 1024, 12, 768, 50_304), 8192, large=True),
    Architecture(
        "GPT-2 124M, checkpointed",
        lambda: gpt124(reentrant=True, by_hand=True),
        gpt_by_hand(8, 1024, 12, 768, 50_304),
        8192,
        large=True,
    ),
    Architecture("LSTM", lambda: (LSTM(), (ids(3, 20),)), lstm_by_hand(), 3 * 20),
    Architecture("GRU, both directions", lambda: (BiGRU(), (torch.randn(25, 4, 20),)), bigru_by_hand(), 4 * 25),
    Architecture("MoE, routed by index", lambda: (RoutedExperts(), (ids(2, 48),)), routed_by_hand(), 2 * 48),
    Architecture(
        "MoE, grouped_mm",
        lambda: (GroupedExperts(), (ids(64), torch.tensor([16, 32, 48, 64], dtype=torch.int32))),
        train(linear(64, 32, 64, 32)),
        64,
    ),
    Architecture(
        "GNN, messages by scatter",
        lambda: (GNN(), (torch.randn(30, 16), ids(90, below=30), ids(90, below=30))),
        gnn_by_hand(),
        30,
    ),
    Architecture(
        "DLRM-like recommender",
        lambda: (Recommender(), (torch.randn(32, 13), ids(5, 32, 4, below=200))),
        recommender_by_hand(),
        32,
    ),
    Architecture("two towers (mv, bilinear)", lambda: (TwoTowers(), (torch.randn(30),)), two_towers_by_hand(), 1),
    Architecture("frozen backbone, trained head", lambda: (Frozen(), (torch.randn(2, 3, 32, 32),)), frozen_by_hand(), 2),
    Architecture(
        "LoRA", lambda: (nn.Sequential(*(Adapted(64, 4) for _ in range(3))), (torch.randn(40, 64),)), lora_by_hand(), 40
    ),
    Architecture("WGAN-GP critic", lambda: (Critic(), (torch.randn(20, 32),)), critic_by_hand(), 20),
    Architecture(
        "autoencoder, one weight 8 times",
        lambda: (Tied(), (torch.randn(16, 64),)),
        train(8 * linear(16, 64, 24), linear(16, 64, 24)),
        16,
    ),
)
