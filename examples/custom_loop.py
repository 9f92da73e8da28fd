"""A plain PyTorch loop under ``green_torch.track()``: steps, an evaluation phase, and the loss beside the energy in TensorBoard.

A small network guesses the next byte of Python's standard library from the 32 before it: no download::

    python examples/custom_loop.py --steps 200
    tensorboard --logdir runs/custom_loop
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import green_torch

CONTEXT, BATCH = 32, 128


def batches(data: torch.Tensor, n: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``n`` random batches: bytes of shape (BATCH, CONTEXT), and the byte that follows each row."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - CONTEXT, (n, BATCH, 1), generator=generator)
    windows = data[starts + torch.arange(CONTEXT + 1)].long()
    return [(window[:, :-1], window[:, -1]) for window in windows]


def main() -> None:
    """Trains, then prints what it took."""
    parser = argparse.ArgumentParser(description="A plain loop, with energy, MFU and carbon of every step.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--log-dir", type=Path, default=Path("runs/custom_loop"))
    args = parser.parse_args()

    files = sorted(Path(os.__file__).parent.glob("*.py"))
    data = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    train, held_out = batches(data, args.steps, seed=0), batches(data, 5, seed=1)

    model = nn.Sequential(nn.Embedding(256, 64), nn.Flatten(), nn.Linear(64 * CONTEXT, 512), nn.GELU(), nn.Linear(512, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    with green_torch.track(model, log_dir=args.log_dir, region="FR", log_every_n_steps=1, planned_steps=args.steps) as tracker:
        for step, (inputs, targets) in enumerate(train):
            loss = functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.step(samples=len(inputs))  # the end of a step; waiting for data is part of it

            if tracker.writer is not None:  # one event file for both: the writer is lent
                tracker.writer.add_scalar("loss", loss.item(), step)

            if (step + 1) % max(1, args.steps // 2) == 0:
                with tracker.phase("eval"), torch.no_grad():  # booked apart, and no part of a step
                    val_loss = sum(functional.cross_entropy(model(x), y).item() for x, y in held_out) / len(held_out)
                print(f"step {step + 1}: loss {loss.item():.3f}, held out {val_loss:.3f}")

    print(tracker.summary())
    print(f"\nSee it: tensorboard --logdir {args.log_dir}")


if __name__ == "__main__":
    main()
