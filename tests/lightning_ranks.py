"""A fit of two ranks on CPUs, for test_lightning_ranks.py: ``python lightning_ranks.py DIRECTORY STRATEGY [--raise RANK] [--ckpt PATH]``.

``--only RANK``: the other one has no monitor. Rank 0 draws 300 W, rank 1 100 W, by meters that know it exactly.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from green_torch.clock import HostClock
from green_torch.errors import UsageError
from green_torch.lightning import GreenMonitor
from green_torch.testing import ScriptedMeter

STEPS, BATCH, POWER_W = 12, 8, (300.0, 100.0)


class Module(pl.LightningModule):
    """A linear layer; a step takes 20 ms and a bit."""

    def __init__(self, raising: int | None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.raising = raising

    def forward(self, batch):
        return self.layer(batch)

    def training_step(self, batch, index):
        time.sleep(0.02)
        if self.raising == self.global_rank and self.global_step == 6:
            raise RuntimeError("rank is broken")
        loss = self(batch).square().mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Sharded(Module):
    """Its parameters are shared out over the ranks."""

    def configure_model(self) -> None:
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


class PerRank(ScriptedMeter):
    """A meter whose power is that of the rank it finds itself in."""

    def __init__(self, clock: HostClock) -> None:
        super().__init__(clock, {"gpu": 0.0})

    def read(self):
        self._power["gpu"] = POWER_W[torch.distributed.get_rank()]
        return super().read()


def main(options: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("strategy", choices=["ddp", "ddp_spawn", "fsdp"])
    parser.add_argument("--raise", dest="raising", type=int)
    parser.add_argument("--ckpt", type=Path)
    parser.add_argument("--only", type=int)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(options)
    strategy = args.strategy
    if strategy == "fsdp":
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    clock = HostClock()
    green = GreenMonitor(clock=clock, meters=[PerRank(clock)], intensity=100.0, flops_per_step=1e6, progress_bar=True)
    saves = pl.callbacks.ModelCheckpoint(args.directory / "ckpt", filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=args.steps,
        max_epochs=-1,
        log_every_n_steps=1,
        logger=[pl.loggers.TensorBoardLogger(args.directory, name="exp"), pl.loggers.CSVLogger(args.directory, name="csv")],
        callbacks=[green, saves] if args.only in {None, int(os.environ.get("LOCAL_RANK", "0"))} else [saves],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.DataLoader(torch.randn(2 * BATCH * STEPS, 4), batch_size=BATCH)
    trainer.fit((Sharded if args.strategy == "fsdp" else Module)(args.raising), data, ckpt_path=args.ckpt)
    if args.strategy == "ddp_spawn":
        try:
            green.summary()
        except UsageError as error:
            sys.stdout.write(str(error))
    elif trainer.is_global_zero and args.only != 1:
        sys.stdout.write(str(green.summary()))


if __name__ == "__main__":
    main()
