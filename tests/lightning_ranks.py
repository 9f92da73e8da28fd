"""A fit of two ranks on CPUs, for test_lightning_ranks.py: ``python -m tests.lightning_ranks DIRECTORY STRATEGY [options]``.

Each training step hands out joules that the test knows: on rank 0 to its GPU and to the node's CPU, on rank 1 to its GPU, and to a CPU
that is rank 0's to count. ``resumed`` is no strategy, but three fits on scripted clocks.
With ``--only RANK`` the other rank has no monitor, with ``--off RANK`` that rank has one that is not enabled; with ``--slow`` rank 0's
set-up takes long.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.algorithms import Join
from torch.distributed.fsdp import fully_shard

from green_torch.errors import UsageError
from green_torch.lightning import GreenMonitor
from green_torch.testing import ScriptedMeter
from tests import test_lightning_resume as resume
from tests.lightning_bench import Bench
from tests.rank_worker import CountedMeter

STEPS, FEWER, BROKEN, BATCH = 12, 5, 6, 8  # FEWER: of rank 1 with --fewer; BROKEN: where --raise and --kill strike
GPU_J, CPU_J = (10.0, 20.0), 1.0  # a step, by rank
SCRIPTED_W, SCRIPTED_CPU_W = (300.0, 100.0), 50.0


class Module(pl.LightningModule):
    """A linear layer; a step takes 20 ms and a bit."""

    def __init__(self, args: argparse.Namespace, gpu: CountedMeter, node: CountedMeter) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.args, self.gpu, self.node = args, gpu, node

    def forward(self, batch):
        return self.layer(batch)

    def on_train_start(self):
        if self.args.fewer:
            # Lightning 2.6 asks all ranks at each batch whether to stop, which Join knows nothing of: a user of Join turns that off
            self.trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
            self.joined = Join([self.trainer.model])
            self.joined.__enter__()

    def training_step(self, batch, index):
        time.sleep(0.02)
        if self.global_step == BROKEN:
            self.strike()
        self.gpu.energy_j += GPU_J[self.global_rank]
        self.node.energy_j += CPU_J
        loss = self(batch).square().mean()
        self.log("train_loss", loss)
        return loss

    def strike(self):
        if self.args.kill == self.global_rank:
            time.sleep(1.0)  # its totals are told meanwhile
            os.kill(os.getpid(), signal.SIGKILL)
        if self.args.raising == self.global_rank:
            time.sleep(0.3)  # the last joules are read before the run ends
            raise RuntimeError("rank is broken")

    def on_train_end(self):
        if self.args.fewer:
            self.joined.__exit__(None, None, None)
        time.sleep(0.3)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Slow(pl.Callback):
    """Prepares something on rank zero alone."""

    def setup(self, trainer, *_, **_named):
        time.sleep(1.5 * trainer.is_global_zero)


class Sharded(Module):
    """Its parameters are shared out over the ranks."""

    def configure_model(self) -> None:
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


def resumed(directory: Path) -> None:
    """A fit that runs through, one that every rank leaves in step 10, and one that goes on from its checkpoint at step 8."""
    rank = int(os.environ["RANK"])

    def fit(path: Path, **options) -> None:
        bench = Bench(path)
        power_w = {"gpu": SCRIPTED_W[rank], "cpu": SCRIPTED_CPU_W}
        meters = [ScriptedMeter(bench.clock, {name: watts}, period_s=0.02) for name, watts in power_w.items()]
        options |= {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
        resume.fit(path, bench.pl.__name__, bench=bench, monitor=bench.monitor(meters=meters), **options)

    fit(directory / "whole")
    fit(directory / "cut", until=10)
    fit(directory / "cut", ckpt_path=directory / "cut" / "ckpt" / "step=8.ckpt")


def main(options: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("strategy", choices=["ddp", "ddp_spawn", "fsdp", "resumed"])
    parser.add_argument("--raise", dest="raising", type=int)
    parser.add_argument("--kill", type=int)
    parser.add_argument("--fewer", action="store_true")
    parser.add_argument("--ckpt", type=Path)
    parser.add_argument("--only", type=int)
    parser.add_argument("--off", type=int)
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(options)
    strategy = args.strategy
    if strategy == "resumed":
        resumed(args.directory)
        return
    if strategy == "fsdp":
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    gpu, node = CountedMeter("gpu"), CountedMeter("cpu")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    green = GreenMonitor(
        meters=[gpu, node], intensity=100.0, flops_per_step=1e6, progress_bar=True, enabled=args.off is None or args.off != rank
    )
    callbacks: list[pl.Callback] = [Slow()] if args.slow else []
    callbacks += [green] if args.only in {None, rank} else []
    batches, length = STEPS, {"max_steps": args.steps, "max_epochs": -1}
    if args.fewer:
        batches, length = FEWER if os.environ["RANK"] == "1" else STEPS, {"max_epochs": 1, "enable_checkpointing": False}
    else:
        checkpoints = pl.callbacks.ModelCheckpoint(args.directory / "ckpt", "{step}", every_n_train_steps=4, save_top_k=-1)
        callbacks.append(checkpoints)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        logger=[pl.loggers.TensorBoardLogger(args.directory, name="exp"), pl.loggers.CSVLogger(args.directory, name="csv")],
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **length,
    )
    data = torch.utils.data.DataLoader(torch.randn(batches * BATCH, 4), batch_size=BATCH)
    trainer.fit((Sharded if args.strategy == "fsdp" else Module)(args, gpu, node), data, ckpt_path=args.ckpt)
    if args.strategy == "ddp_spawn":
        try:
            green.summary()
        except UsageError as error:
            sys.stdout.write(str(error))
    elif rank == int(args.only == 1 or args.off == 0):
        sys.stdout.write(str(green.summary()))


if __name__ == "__main__":
    main()
