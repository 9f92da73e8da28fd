"""A small fit that leaves with exit code 75 while the grid is dirty, for train.sh to queue again.

``python examples/slurm/train.py --trace FILE.csv`` takes a trace in place of a provider; its first row is moved to the present.
"""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch

from green_torch.intensity import Trace, UKNeso
from green_torch.lightning import CarbonAwarePause, GreenMonitor


class Module(pl.LightningModule):
    """A linear layer."""

    def __init__(self, step_s: float) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
        self.step_s = step_s

    def training_step(self, batch: torch.Tensor, _index: int) -> torch.Tensor:
        """The loss."""
        time.sleep(self.step_s)  # in place of work
        loss: torch.Tensor = self.layer(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    """Fits."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--trace", type=Path, help="a CSV file in place of Great Britain's forecast")
    arguments.add_argument("--root", type=Path, default=Path())
    arguments.add_argument("--epochs", type=int, default=20)
    arguments.add_argument("--step-s", type=float, default=0.1)
    arguments.add_argument("--check-every-s", type=float, default=900.0)
    arguments.add_argument("--resume-overhead-s", type=float, default=120.0)
    given = arguments.parse_args()
    started = given.root / "started"  # a real job's deadline is a date; this one's is a day after it first started
    given.root.mkdir(parents=True, exist_ok=True)
    if not started.exists():
        started.write_text(datetime.now(UTC).isoformat(), encoding="utf-8")
    first = datetime.fromisoformat(started.read_text(encoding="utf-8"))
    pause = CarbonAwarePause(
        Trace(given.trace, starts_at=first) if given.trace else UKNeso(),
        deadline=first + timedelta(days=1),
        on_pause="exit",
        check_every=given.check_every_s,
        resume_overhead=given.resume_overhead_s,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=given.epochs,
        default_root_dir=given.root,
        callbacks=[GreenMonitor(region="GB"), pause],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(Module(given.step_s), torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=8))
    print(f"done: {trainer.global_step} steps")


if __name__ == "__main__":
    main()
