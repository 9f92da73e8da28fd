"""Makes a workload of a ``LightningModule`` by its own methods, without Lightning: see ``Workload.from_lightning``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch

from green_torch.batch import found_units
from green_torch.errors import ArgumentError
from green_torch.experiment.applied import seed_all
from green_torch.experiment.variants import Workload

_PASSED_OVER = {
    "max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "logger", "log_every_n_steps", "default_root_dir",
    "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "val_check_interval", "check_val_every_n_epoch",
    "num_sanity_val_steps", "limit_val_batches", "limit_test_batches", "limit_predict_batches",
    "barebones",
}  # fmt: skip
_WATCHING = {
    "DeviceStatsMonitor", "EarlyStopping", "GreenMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "OnExceptionCheckpoint",
    "ProgressBar", "RichModelSummary", "RichProgressBar", "ThroughputMonitor", "Timer", "TQDMProgressBar",
}  # fmt: skip
_ONE_DEVICE = (
    "a comparison trains each variant in one process on one device; to compare runs over several, train each with "
    "green_torch.lightning.GreenMonitor and compare what they leave: green-torch compare runs/a runs/b"
)
_WHY_NOT = {
    "devices": _ONE_DEVICE,
    "num_nodes": _ONE_DEVICE,
    "strategy": _ONE_DEVICE,
    "callbacks": "there is no Trainer to call their hooks; those that only watch or stop are passed over",
    "gradient_clip_algorithm": "gradients are clipped by their norm",
}
_OVERRIDES = (
    "optimizer_step", "optimizer_zero_grad", "backward", "configure_gradient_clipping", "lr_scheduler_step", "transfer_batch_to_device",
    "on_before_batch_transfer", "on_after_batch_transfer",
)  # fmt: skip


def workload_of(
    module: Any,
    data: Any,
    trainer: Mapping[str, Any],
    units: Callable[[Any], Mapping[str, int]] | None,
    checkpoint_blocks: tuple[type[torch.nn.Module], ...],
) -> Workload:
    """The workload; arguments and errors as of ``Workload.from_lightning``."""
    accumulate, clip, limit, device = _arguments(trainer)
    if not module.automatic_optimization:
        raise ArgumentError(
            f"{type(module).__name__} optimizes by hand (automatic_optimization=False), which is not covered: let build() return a "
            "callable that takes one step of your own loop."
        )
    own = [name for name in _OVERRIDES if not _is_lightnings(getattr(type(module), name, None))]
    if own:
        raise ArgumentError(
            f"{type(module).__name__} overrides {own[0]}, which is not covered: let build() return a callable that takes one step "
            "of your own loop."
        )
    for name in ("log", "log_dict"):  # there is no Trainer to log to, and Lightning's warning of that breaks a compiled graph
        if _is_lightnings(getattr(type(module), name, None)):
            setattr(module, name, _nothing)
    module.prepare_data()
    if data is not None and not isinstance(data, Iterable):
        data.prepare_data()
        data.setup("fit")
    module.setup("fit")
    module.configure_model()
    # compiled and counted as a whole; under the module's own name, which the run's manifest states
    step = type(type(module).__name__, (_TrainingStep,), {})(module).to(device)

    numbers = count()  # of the batches of an epoch
    at_epochs_end: list[Callable[[], None]] = []

    def optimizer(_: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return _optimizer(module.configure_optimizers(), type(module).__name__, at_epochs_end)

    def batches(seed: int) -> Iterator[Any]:
        """An epoch; the next one begins when this is asked again, after the last step of the one before."""
        nonlocal numbers
        seed_all(seed)  # a shuffling loader takes its order from here, and augmentation its chances
        numbers = count()
        loader = module.train_dataloader() if data is None else data if isinstance(data, Iterable) else data.train_dataloader()
        yield from islice(loader, _most(loader, limit))
        for end in at_epochs_end:
            end()

    return Workload(
        step,
        optimizer,
        lambda model, batch: model(batch, _Number(next(numbers))),
        batches,
        units or found_units,
        checkpoint_blocks,
        accumulate=accumulate,
        gradient_clip_norm=clip,
    )


@dataclass(frozen=True, slots=True)
class _Number:
    """A batch's number, drawn outside the step: one that the compiled graph drew would compile it anew at every batch.

    Not a mere ``int``, which tells one kind of step from another where FLOPs are counted.
    """

    value: int


class _TrainingStep(torch.nn.Module):
    """A module whose forward is the other's training step, so that compiling and counting take all of it."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self._numbered = len(inspect.signature(module.training_step).parameters) > 1

    def forward(self, batch: Any, number: _Number) -> torch.Tensor:
        """The loss of a batch."""
        found = self.module.training_step(batch, number.value) if self._numbered else self.module.training_step(batch)
        loss = found["loss"] if isinstance(found, Mapping) else found
        if not isinstance(loss, torch.Tensor):
            raise ArgumentError(
                f"{type(self.module).__name__}.training_step returned {type(loss).__name__}; a loss to go back from is needed"
            )
        return loss


def _nothing(*_: Any, **_named: Any) -> None:
    """Does nothing."""


def _is_lightnings(hook: Any) -> bool:
    """Whether a hook is as Lightning has it; it is where there is none."""
    return hook is None or getattr(hook, "__module__", "").partition(".")[0] in {"lightning", "pytorch_lightning"}


def _most(loader: Iterable[Any], limit: float | None) -> int | None:
    """How many batches of a loader an epoch takes: so many, a share of them, or all."""
    if limit is None or isinstance(limit, int):
        return limit
    if not isinstance(loader, Sized):
        raise ArgumentError(
            f"trainer={{'limit_train_batches': {limit!r}}}: the data has no length to take a share of; give a number."
        )
    return int(len(loader) * limit)


def _arguments(trainer: Mapping[str, Any]) -> tuple[int, float | None, float | None, torch.device]:
    """Batches a step, the norm to clip to, the batches of an epoch (or their share), and the device."""
    rest = {key: value for key, value in trainer.items() if key not in _PASSED_OVER and value is not None}
    accumulate, clip = rest.pop("accumulate_grad_batches", 1), rest.pop("gradient_clip_val", None)
    accelerator, limit = rest.pop("accelerator", "auto"), rest.pop("limit_train_batches", None)
    if limit is not None and not (limit >= 1 if isinstance(limit, int) else 0 < limit <= 1):
        raise ArgumentError(
            f"trainer={{'limit_train_batches': {limit!r}}} leaves nothing to train on: 1 batch or more, or a share of them."
        )
    if "precision" in rest:
        raise ArgumentError(f"trainer={{'precision': {rest['precision']!r}}}: the variant sets the precision; leave it out.")
    harmless: dict[str, tuple[Any, ...]] = {
        "gradient_clip_algorithm": ("norm",),
        "devices": (1, "1", "auto", [0]),
        "num_nodes": (1,),
        "strategy": ("auto",),
    }
    callbacks = rest.pop("callbacks", [])
    listed = callbacks if isinstance(callbacks, Sequence) else [callbacks]
    changing = [one for one in listed if type(one).__name__ not in _WATCHING]
    odd = {key: value for key, value in rest.items() if value not in harmless.get(key, ())}
    if changing:
        odd["callbacks"] = changing
    if odd:
        reasons = "; ".join(f"{key}: {_WHY_NOT.get(key, 'nothing here knows what it does')}" for key in odd)
        raise ArgumentError(
            f"trainer={odd!r} would change the training and is not covered ({reasons}). Covered are accelerator, "
            "accumulate_grad_batches, gradient_clip_val and limit_train_batches. Else let build() return a callable that takes one step of "
            "your own loop."
        )
    if accelerator == "cpu" or not torch.accelerator.is_available():
        if accelerator not in {"cpu", "auto"}:
            raise ArgumentError(f"trainer={{'accelerator': {accelerator!r}}}: torch finds no accelerator here.")
        return accumulate, clip or None, limit, torch.device("cpu")
    return accumulate, clip or None, limit, torch.accelerator.current_accelerator() or torch.device("cpu")


def _optimizer(configured: Any, name: str, at_epochs_end: list[Callable[[], None]]) -> torch.optim.Optimizer:
    """The one optimizer of what ``configure_optimizers`` returned; its schedulers follow its steps, or are left for the epochs' ends."""
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
    at_epochs_end.clear()
    for given in schedulers:
        settings = given if isinstance(given, Mapping) else {"scheduler": given}
        scheduler = settings["scheduler"]
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or settings.get("reduce_on_plateau"):
            raise ArgumentError(
                f"{name}.configure_optimizers gives a {type(scheduler).__name__}, which goes by a metric that no Trainer is there to "
                "collect: compare with another scheduler or none, or let build() return a callable that takes one step of your own loop."
            )
        step = _every(settings.get("frequency", 1), scheduler.step)
        if settings.get("interval", "epoch") == "step":
            configured.register_step_post_hook(step)
        else:
            at_epochs_end.append(step)
    return configured


def _every(frequency: int, step: Callable[[], None]) -> Callable[..., None]:
    """Does something at every so many calls."""
    numbers = count(1)

    def called(*_: Any) -> None:
        if next(numbers) % frequency == 0:
            step()

    return called
