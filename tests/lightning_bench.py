"""What the tests of the Lightning callbacks share: a trainer, a module and a monitor on one scripted clock."""

from __future__ import annotations

import importlib
import itertools
from typing import TYPE_CHECKING

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from green_torch.lightning import GreenMonitor
from green_torch.testing import MemorySink, ScriptedClock, ScriptedMeter
from green_torch.units import NS_PER_S

if TYPE_CHECKING:
    from pathlib import Path

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
CLOSE = 5e-4  # the counter is read every 10 ms: what a boundary's own interval holds is an estimate
POWER_W = 300.0
BATCH, WIDTH = 8, 4


class Bench:
    """A trainer, a module and a monitor on one scripted clock: a training step takes 0.2 s, an evaluation step 0.1 s.

    Each bench's clock stands a day after the last one's, as a process that comes later finds it.
    """

    _days = itertools.count()

    def __init__(self, tmp_path: Path, package: str = "lightning.pytorch") -> None:
        self.pl = importlib.import_module(package)
        self.path = tmp_path
        self.clock = ScriptedClock(epoch_unix_ns=(1_700_000_000 + 86400 * next(self._days)) * NS_PER_S)
        self.meter = ScriptedMeter(self.clock, {"gpu0": POWER_W}, period_s=0.02)
        self.sink = MemorySink()

    def monitor(self, **options) -> GreenMonitor:
        options = {
            "clock": self.clock,
            "meters": [self.meter],
            "sinks": [self.sink],
            "intensity": 100.0,
            "flops_per_step": 1e6,
            **options,
        }
        self.green = GreenMonitor(**options)
        return self.green

    def trainer(self, *callbacks, **options):
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        return self.pl.Trainer(
            **{"accelerator": "cpu", "max_steps": 5, "log_every_n_steps": 1, "default_root_dir": self.path, **quiet, **options},
            callbacks=list(callbacks),
        )

    def module(self, *, act=lambda _name: None, manual: int = 0, every: int = 1, wrapped: bool = True):  # noqa: C901  (the hooks of one class)
        """A linear layer; ``act`` is told each hook by name; ``manual`` optimizers are stepped by hand at ``every`` so many batches."""
        clock, pl = self.clock, self.pl

        class Module(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(WIDTH, 1, bias=False)
                self.automatic_optimization = not manual

            def setup(self, stage):
                act("setup")

            def training_step(self, batch, index):
                clock.advance(0.2)
                act("training_step")
                batch = batch["x"] if isinstance(batch, dict) else batch
                loss = self.layer(batch).square().mean()
                self.log("train_loss", loss)
                if manual:
                    self.manual_backward(loss)
                    optimizers = self.optimizers(use_pl_optimizer=wrapped)
                    for optimizer in (optimizers if manual > 1 else [optimizers]) if (index + 1) % every == 0 else ():
                        optimizer.step()
                        optimizer.zero_grad()
                    return None
                return loss

            def on_train_batch_start(self, batch, index):
                return act("on_train_batch_start")

            def validation_step(self, batch, index):
                clock.advance(0.1)
                act("validation_step")

            def test_step(self, batch, index):
                clock.advance(0.1)

            def predict_step(self, batch, index):
                clock.advance(0.1)

            def configure_optimizers(self):
                n = manual or 1
                return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(n)]

        return Module()

    def of(self, phase: str) -> list:
        return [record for record in self.sink.records if record.phase == phase]


def data(n_batches: int = 20, batch: int = BATCH) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(torch.randn(n_batches * batch, WIDTH), batch_size=batch)


def events(directory: Path) -> EventAccumulator:
    files = list(directory.glob("events.out.tfevents.*"))
    assert len(files) == 1, files
    accumulator = EventAccumulator(str(files[0]), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def steps_of(accumulator: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in accumulator.Scalars(tag)]
