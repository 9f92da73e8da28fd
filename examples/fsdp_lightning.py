"""A tiny GPT, fully sharded over two processes (FSDP2) by Lightning, with the energy, MFU and carbon of all ranks together.

Each rank meters its own GPU and a node's CPU is counted once; rank zero shows the sums. Without a GPU it runs on the CPU, over gloo::

    python examples/fsdp_lightning.py --steps 60
    tensorboard --logdir runs/fsdp_lightning

Lightning's older ``strategy="fsdp"`` (FSDP1) takes the same callback, but refuses to run without a GPU.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from lightning_gpt import GPT, Text  # the example beside this one
from pytorch_lightning import Trainer  # lightning.pytorch works just as well
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from green_torch.lightning import GreenMonitor  # +


class ShardedGPT(GPT):
    """The same GPT, each block a shard of its own."""

    def configure_model(self) -> None:
        """Shards the parameters over the ranks; Lightning calls it on each."""
        mesh = self.device_mesh["data_parallel"]
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)


def main() -> None:
    """Trains, then prints on rank zero what all ranks took."""
    parser = argparse.ArgumentParser(description="FSDP in Lightning, with energy, MFU and carbon of all ranks together.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--log-dir", type=Path, default=Path("runs/fsdp_lightning"))
    args = parser.parse_args()

    gpu = torch.cuda.device_count() > 1
    loader = DataLoader(Text(sorted(Path(os.__file__).parent.glob("*.py"))), batch_size=8, shuffle=True)
    green = GreenMonitor(region="FR", units=lambda batch: {"tokens": batch[:, 1:].numel(), "samples": len(batch)})  # +
    trainer = Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=2,
        strategy=ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, process_group_backend="nccl" if gpu else "gloo"
        ),
        max_steps=args.steps,
        log_every_n_steps=1,
        logger=TensorBoardLogger(args.log_dir.parent, name=args.log_dir.name),
        callbacks=[green],  # +
    )
    trainer.fit(ShardedGPT(), loader)

    if trainer.is_global_zero:
        print(green.summary())  # +
        print(f"\nSee it: tensorboard --logdir {args.log_dir}")


if __name__ == "__main__":
    main()
