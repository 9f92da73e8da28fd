"""Makes a workload of a ``LightningModule`` by its own methods, without Lightning: see ``Workload.from_lightning``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import torch

from green_torch.batch import found_units
from green_torch.errors import ArgumentError
from green_torch.experiment.variants import Workload

_PASSED_OVER = {
    "max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "logger", "log_every_n_steps", "default_root_dir",
    "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "val_check_interval", "check_val_every_n_epoch",
    "num_sanity_val_steps", "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches",
    "barebones",
}  # fmt: skip


def workload_of(
    module: Any, data: Any, trainer: Mapping[str, Any], units: Callable[[Any], Mapping[str, int]] | None
) -> Workload:
    """The workload; arguments and errors as of ``Workload.from_lightning``."""
    accumulate, clip, device = _arguments(trainer)
    if not module.automatic_optimization:
        raise ArgumentError(
            f"{type(module).__name__} optimizes by hand (automatic_optimization=False), which is not covered: let build() return a "
            "callable that takes one step of your own loop."
        )
    warnings.filterwarnings("ignore", message=r".*self\.log\(\).*")  # there is no Trainer to log to
    module.prepare_data()
    if data is not None and not isinstance(data, Iterable):
        data.prepare_data()
        data.setup("fit")
    module.setup("fit")
    module.configure_model()
    # compiled and counted as a whole; under the module's own name, which the run's manifest states
    step = type(type(module).__name__, (_TrainingStep,), {})(module).to(device)

    def optimizer(_: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return _optimizer(module.configure_optimizers(), type(module).__name__)

    def batches(seed: int) -> Iterator[Any]:
        torch.manual_seed(seed)  # a shuffling loader takes its order from here
        if data is None:
            yield from module.train_dataloader()
        else:
            yield from data if isinstance(data, Iterable) else data.train_dataloader()

    return Workload(
        step,
        optimizer,
        lambda model, batch: model(batch),
        batches,
        units or found_units,
        accumulate=accumulate,
        gradient_clip_norm=clip,
    )


class _TrainingStep(torch.nn.Module):
    """A module whose forward is the other's training step, so that compiling and counting take all of it."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self._numbers = count()
        self._numbered = len(inspect.signature(module.training_step).parameters) > 1

    def forward(self, batch: Any) -> torch.Tensor:
        """The loss of a batch."""
        found = self.module.training_step(batch, next(self._numbers)) if self._numbered else self.module.training_step(batch)
        loss = found["loss"] if isinstance(found, Mapping) else found
        if not isinstance(loss, torch.Tensor):
            raise ArgumentError(
                f"{type(self.module).__name__}.training_step returned {type(loss).__name__}; a loss to go back from is needed"
            )
        return loss


def _arguments(trainer: Mapping[str, Any]) -> tuple[int, float | None, torch.device]:
    """Batches a step, the norm to clip to, and the device."""
    rest = {key: value for key, value in trainer.items() if key not in _PASSED_OVER and value is not None}
    accumulate, clip = rest.pop("accumulate_grad_batches", 1), rest.pop("gradient_clip_val", None)
    accelerator = rest.pop("accelerator", "auto")
    if "precision" in rest:
        raise ArgumentError(f"trainer={{'precision': {rest['precision']!r}}}: the variant sets the precision; leave it out.")
    harmless: dict[str, tuple[Any, ...]] = {
        "gradient_clip_algorithm": ("norm",),
        "devices": (1, "1", "auto", [0]),
        "num_nodes": (1,),
        "strategy": ("auto",),
        "callbacks": ([], ()),
    }
    odd = {key: value for key, value in rest.items() if value not in harmless.get(key, ())}
    if odd:
        raise ArgumentError(
            f"trainer={odd!r} would change the training and is not covered; covered are accelerator, accumulate_grad_batches and "
            "gradient_clip_val. Else let build() return a callable that takes one step of your own loop."
        )
    if accelerator == "cpu" or not torch.accelerator.is_available():
        if accelerator not in {"cpu", "auto"}:
            raise ArgumentError(f"trainer={{'accelerator': {accelerator!r}}}: torch finds no accelerator here.")
        return accumulate, clip or None, torch.device("cpu")
    return accumulate, clip or None, torch.accelerator.current_accelerator() or torch.device("cpu")


def _optimizer(configured: Any, name: str) -> torch.optim.Optimizer:
    """The one optimizer of what ``configure_optimizers`` returned; schedulers by step follow it."""
    schedulers: Sequence[Any] = ()
    if isinstance(configured, Sequence) and len(configured) == 2 and isinstance(configured[0], Sequence):
        configured, schedulers = configured
    if isinstance(configured, Sequence) and len(configured) == 1:
        configured = configured[0]
    if isinstance(configured, Mapping):
        schedulers = [found] if (found := configured.get("lr_scheduler")) is not None else []
        configured = configured.get("optimizer")
    if not isinstance(configured, torch.optim.Optimizer):
        raise ArgumentError(f"{name}.configure_optimizers gives not one optimizer but {configured!r}, which is not covered.")
    for given in schedulers:
        settings = given if isinstance(given, Mapping) else {"scheduler": given}
        if settings.get("interval", "epoch") == "step":
            _follow(configured, settings["scheduler"], settings.get("frequency", 1))
    return configured


def _follow(optimizer: torch.optim.Optimizer, scheduler: Any, frequency: int) -> None:
    """Steps a scheduler after each so many steps of the optimizer."""
    numbers = count(1)

    def step(*_: Any) -> None:
        if next(numbers) % frequency == 0:
            scheduler.step()

    optimizer.register_step_post_hook(step)
