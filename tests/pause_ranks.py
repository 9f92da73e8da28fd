"""A fit of two ranks on CPUs that pauses, for test_pause.py: ``python pause_ranks.py DIRECTORY TRACE wait|exit|loop [--ckpt]``.

The grid is dirty for the first seconds of the trace, which begins when the fit does. Each rank says what it did in ``rank-N``.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import lightning.pytorch as pl
import torch

from green_torch import track
from green_torch.intensity import Trace
from green_torch.lightning import CarbonAwarePause

STEPS, BATCH = 40, 4
HOW = {"max_wait": 60.0, "check_every": 0.3, "resume_overhead": 0.05, "idle_share": 0.0}


class Module(pl.LightningModule):
    """A linear layer with dropout, whose random numbers are the rank's own; a step takes 50 ms."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, index):
        time.sleep(0.05)
        return torch.nn.functional.dropout(self.layer(batch), 0.5).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loop(args: argparse.Namespace, trace: Trace) -> str:
    """A plain loop, by torchrun's environment."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{args.directory}/meet", rank=args.rank, world_size=2)
    paused = 0.0
    with track(meters=[], intensity=trace, planned_steps=STEPS) as tracker:
        for _ in range(STEPS):
            time.sleep(0.05)
            torch.distributed.all_reduce(torch.ones(1))
            tracker.step()
            paused += tracker.pause_if_dirty(**HOW)
    torch.distributed.destroy_process_group()
    return f"{paused:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("trace", type=Path)
    parser.add_argument("what", choices=["wait", "exit", "loop"])
    parser.add_argument("--dirty", type=float, default=0.0, help="for how many seconds more")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--ckpt", action="store_true")
    args = parser.parse_args()
    trace = Trace(args.trace, starts_at=datetime.now(UTC) + timedelta(seconds=args.dirty - 60))
    if args.what == "loop":
        Path(args.directory, f"rank-{args.rank}").write_text(loop(args, trace))
        return
    pause = CarbonAwarePause(trace, on_pause=args.what, **HOW)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=4, default_root_dir=args.directory, callbacks=[pause], **quiet
    )
    pl.seed_everything(1)
    data = torch.utils.data.DataLoader(torch.randn(2 * BATCH * STEPS // 4, 4), batch_size=BATCH, shuffle=True)
    module = Module()
    told = "failed"
    try:
        torch.manual_seed(2)  # else, each rank its own
        trainer.fit(module, data, ckpt_path="hpc" if args.ckpt else None)
        waited = sum(one.resume_unix_ns - one.stop_unix_ns for one in pause.pauses) / 1e9
        told = f"{len(pause.pauses)} {waited:.1f} {trainer.global_step} {module.layer.weight.sum().item():.9f} {torch.rand(1).item():.9f}"
    except SystemExit as leaving:
        told = f"left {leaving.code} {trainer.global_step}"
        raise
    finally:
        Path(args.directory, f"rank-{trainer.global_rank}").write_text(told)


if __name__ == "__main__":
    sys.exit(main())
