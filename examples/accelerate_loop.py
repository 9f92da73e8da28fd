"""An Accelerate loop with gradient accumulation under ``green_torch.track()``, alone or on many processes.

A small network learns to add two digits, on data made here: no download::

    pip install -e ".[transformers]"
    accelerate launch examples/accelerate_loop.py            # all GPUs of this machine, or its CPU
    torchrun --nproc_per_node 2 examples/accelerate_loop.py  # two CPU processes: accelerate launch --cpu starts only one
    tensorboard --logdir runs/accelerate_loop

Each process measures its own GPU, what a node has once (CPU, memory) is measured by one of its processes, and the first process sums up.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import green_torch

MICRO_BATCHES, BATCH = 4, 32


def main() -> None:
    """Trains, then prints what it took."""
    parser = argparse.ArgumentParser(description="An Accelerate loop, with energy, MFU and carbon of every step.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--log-dir", type=Path, default=Path("runs/accelerate_loop"))
    args = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=MICRO_BATCHES)
    digits = torch.randint(10, (args.steps * MICRO_BATCHES * BATCH * accelerator.num_processes, 2))
    model = nn.Sequential(nn.Embedding(10, 64), nn.Flatten(), nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 19))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(digits, digits.sum(dim=1)), batch_size=BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)  # before track(): it counts on what will run

    with green_torch.track(model, log_dir=args.log_dir, region="FR", log_every_n_steps=1, planned_steps=args.steps) as tracker:
        samples = 0
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = functional.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            samples += len(inputs)
            if accelerator.sync_gradients:  # a step is one optimizer step, with all its micro-batches
                tracker.step(samples=samples)
                samples = 0
                tracker.writer.add_scalar("loss", loss.item(), tracker.last_step)  # writes on the first process alone

    if accelerator.is_main_process:
        print(tracker.summary())
        print(f"\nSee it: tensorboard --logdir {args.log_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
