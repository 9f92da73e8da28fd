"""A tiny GPT in Lightning, with energy, MFU and carbon of every step. The lines marked ``# +`` are all that this takes.

Trains on the source of Python's standard library, byte by byte: no download::

    python examples/lightning_gpt.py --steps 60
    tensorboard --logdir runs/lightning_gpt
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from pytorch_lightning import LightningModule, Trainer  # lightning.pytorch works just as well
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from green_torch.lightning import GreenMonitor  # +

CONTEXT, WIDTH, HEADS, LAYERS = 64, 128, 4, 2


class Text(Dataset[torch.Tensor]):
    """Stretches of the text, one byte longer than the context: the model guesses each byte from those before it."""

    def __init__(self, files: list[Path]) -> None:
        self.data = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)

    def __len__(self) -> int:
        return (len(self.data) - 1) // CONTEXT

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.data[index * CONTEXT : (index + 1) * CONTEXT + 1].long()


class Block(nn.Module):
    """Causal attention and an MLP, each added to what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, width) to the same."""
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class GPT(LightningModule):
    """Nothing in it knows of green_torch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, CONTEXT) bytes to (batch, CONTEXT, 256) scores of the byte that follows each."""
        scores: torch.Tensor = self.head(self.blocks(self.tokens(tokens) + self.places.weight))
        return scores

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the next byte; ``batch`` is (batch, CONTEXT + 1)."""
        return functional.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: torch.Tensor, _index: int) -> torch.Tensor:
        """The loss, logged."""
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, _index: int) -> None:
        """The same on held-out text."""
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    """Trains, then prints what it took."""
    parser = argparse.ArgumentParser(description="A tiny GPT in Lightning, with energy, MFU and carbon of every step.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--log-dir", type=Path, default=Path("runs/lightning_gpt"))
    args = parser.parse_args()

    files = sorted(Path(os.__file__).parent.glob("*.py"))
    loader = DataLoader(Text(files[:-10]), batch_size=8, shuffle=True)
    val_loader = DataLoader(Text(files[-10:]), batch_size=8)

    green = GreenMonitor(  # +
        region="FR",
        units=lambda batch: {"tokens": batch[:, 1:].numel(), "samples": len(batch)},
        progress_bar=True,
    )
    trainer = Trainer(
        max_steps=args.steps,
        val_check_interval=max(1, args.steps // 2),
        limit_val_batches=5,
        log_every_n_steps=1,
        logger=TensorBoardLogger(args.log_dir.parent, name=args.log_dir.name),
        callbacks=[green],  # +
    )
    trainer.fit(GPT(), loader, val_loader)

    print(green.summary())  # +
    print(f"\nSee it: tensorboard --logdir {args.log_dir}")


if __name__ == "__main__":
    main()
