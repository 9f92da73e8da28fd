"""``GreenMonitor``: a Lightning callback that measures what ``track()`` measures, for ``lightning.pytorch`` and ``pytorch_lightning``.

::

    trainer = Trainer(callbacks=[GreenMonitor(region="FR")])

The callback owns a :class:`~green_torch.tracker.Tracker` from ``setup`` to ``teardown`` of each ``fit``, ``validate``, ``test`` or
``predict`` and tells it where steps and phases begin and end. It adds no synchronisation and no collective, and an error of its own
switches it off with a warning.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import torch

from green_torch.errors import ArgumentError, UsageError
from green_torch.records import Phase, Work
from green_torch.tracker import POLL_INTERVAL_S, Tracker

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager

    from pytorch_lightning import LightningModule, Trainer
    from torch.utils.tensorboard import SummaryWriter

    from green_torch.protocols import Clock, IntensityProvider, Meter, Sink
    from green_torch.records import Embodied, RunSummary

__all__ = ["GreenMonitor"]

_AUTOCAST = {"bf16": "bfloat16", "16": "float16"}  # by the first word of Lightning's precision
_DEPTH = 4  # how deep a batch is searched for its first tensor


def _packages() -> tuple[Any, ...]:
    """The Lightning packages that are installed: two names for two separate trees of the same classes."""
    found = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found.append(import_module(name))
        except ImportError:
            continue
    if not found:
        raise ImportError("green_torch.lightning needs Lightning: pip install lightning")
    return tuple(found)


_LIGHTNING = _packages()
_TENSORBOARD_LOGGERS = tuple(package.loggers.TensorBoardLogger for package in _LIGHTNING)

if TYPE_CHECKING:
    from pytorch_lightning import Callback as _Callback
else:
    _Callback = type("_Callback", tuple(package.Callback for package in _LIGHTNING), {})


def _harmless(hook: Callable[..., None]) -> Callable[..., None]:
    """Lets a hook act only while a run is open, and an error in it end our measuring, not the training."""

    @wraps(hook)
    def harmless(self: GreenMonitor, *args: Any, **kwargs: Any) -> None:
        if self._open:
            try:
                hook(self, *args, **kwargs)
            except Exception as error:  # rule 9
                self._give_up(error)

    return harmless


@final
class GreenMonitor(_Callback):
    """Measures energy, carbon and MFU of each optimizer step: ``Trainer(callbacks=[GreenMonitor(region="FR")])``.

    With a ``TensorBoardLogger`` the values go through its own writer, on the steps of the loss; files go to the logger's directory, else
    to ``default_root_dir``. ``validate``, ``test`` and ``predict`` on their own are runs in a sub-directory of that name.

    Args:
        region: as in :func:`green_torch.track`, like all that is not described here.
        intensity: gCO2e/kWh, or a provider.
        pue: facility over IT energy.
        price: money per kWh.
        meters: what reads energy; None: every device that is found.
        poll_interval_s: seconds between readings of a hardware counter.
        clock: for tests.
        flops_per_step: model FLOPs of an optimizer step, or a function that gives them for one (micro-)batch. None: counted.
        peak_flop_per_s: the device's dense peak.
        attention_flops: "full" or "causal".
        embodied: manufacturing footprint.
        log_every_n_steps: steps per record, or "auto". None: the trainer's own setting.
        baseline: a run's directory.
        planned_steps: steps of the whole run. None: the trainer's estimate.
        run_name: defaults to the directory's name.
        sinks: further destinations.
        label: what a comparison calls this run.
        units: gives ``dict(tokens=..., samples=...)`` (either may be missing) for a batch. None: samples from the first tensor's first
            dimension, tokens from ``input_ids``.
        enabled: False turns everything off.

    Raises:
        ArgumentError: an argument is wrong.
        UsageError: at the start of the trainer's run, where another tracker is open.
    """

    def __init__(
        self,
        *,
        region: str | None = None,
        intensity: float | IntensityProvider | None = None,
        pue: float | None = None,
        price: float | None = None,
        meters: Sequence[Meter] | None = None,
        poll_interval_s: float = POLL_INTERVAL_S,
        clock: Clock | None = None,
        flops_per_step: float | Callable[[Any], float] | None = None,
        peak_flop_per_s: float | None = None,
        attention_flops: Literal["full", "causal"] = "full",
        embodied: Embodied | float | None = None,
        log_every_n_steps: int | Literal["auto"] | None = None,
        baseline: str | os.PathLike[str] | None = None,
        planned_steps: int | None = None,
        run_name: str | None = None,
        sinks: Sequence[Sink] | None = None,
        label: str = "",
        units: Callable[[Any], Mapping[str, int]] | None = None,
        enabled: bool = True,
    ) -> None:
        if units is not None and not callable(units):
            raise ArgumentError(f"units={units!r}: give a function: units=lambda batch: dict(tokens=batch.numel())")
        self._units = units or _found_units
        self._flops_of = flops_per_step if callable(flops_per_step) else None
        self._counts = flops_per_step is None
        self._every = log_every_n_steps
        self._options: dict[str, Any] = {
            "region": region,
            "intensity": intensity,
            "pue": pue,
            "price": price,
            "meters": meters,
            "poll_interval_s": poll_interval_s,
            "clock": clock,
            "flops_per_step": None if callable(flops_per_step) else flops_per_step,
            "peak_flop_per_s": peak_flop_per_s,
            "attention_flops": attention_flops,
            "embodied": embodied,
            "baseline": baseline,
            "planned_steps": planned_steps,
            "run_name": run_name,
            "sinks": sinks,
            "label": label,
            "enabled": enabled,
        }
        with warnings.catch_warnings():  # a trial, so that a wrong argument raises here; the run itself will do the warning
            warnings.simplefilter("ignore")
            every = "auto" if log_every_n_steps is None else log_every_n_steps
            Tracker(**{**self._options, "meters": meters or (), "log_every_n_steps": every})
        self._tracker: Tracker | None = None
        self._open = False
        self._phases: dict[Phase, AbstractContextManager[None]] = {}
        self._unwatch: Callable[[], None] = _nothing
        self._counting = False
        self._work = Work()  # of the micro-batches since the last step, or of the evaluation under way
        self._eval_work = Work()
        self._flops = 0.0
        self._global_step = 0
        self._n_batches = self._n_steps = 0

    @property
    def tracker(self) -> Tracker | None:
        """The tracker of the run under way, or of the last one; None before the first."""
        return self._tracker

    def summary(self) -> RunSummary:
        """The run as far as it is resolved; complete once the trainer has returned.

        Raises:
            UsageError: the trainer hasn't run yet.
        """
        if self._tracker is None:
            raise UsageError("no run yet: call trainer.fit(...) with this callback first")
        return self._tracker.summary()

    # The trainer's run begins and ends.

    def setup(self, trainer: Trainer, *_: Any, **_named: Any) -> None:
        """Opens the run, in phase "setup"."""
        try:
            self._close()  # a run that ended without telling
            self._start(trainer)
        except UsageError:
            raise
        except Exception as error:  # rule 9
            logging.getLogger("green_torch").warning("GreenMonitor could not start: %s: %s", type(error).__name__, error)

    @_harmless
    def teardown(self, *_: Any, **_named: Any) -> None:
        """Closes the run."""
        if self._n_batches and not self._n_steps:
            self._run.warn(
                f"Lightning saw no optimizer step in {self._n_batches} batches, so there are no steps to measure: in manual "
                "optimization, step what self.optimizers() returns"
            )
        self._close()

    @_harmless
    def on_exception(self, _trainer: Trainer, _module: LightningModule, exception: BaseException) -> None:
        """Closes the run as failed; what was measured is on disk."""
        self._close(exception)

    # Training.

    @_harmless
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """States the model, now on its device, and how long the run will be."""
        self._global_step = trainer.global_step
        dtype = _AUTOCAST.get(str(trainer.precision).split("-", maxsplit=1)[0])
        self._run.adopt(pl_module, planned_steps=_planned_steps(trainer), dtype=dtype)

    @_harmless
    def on_train_batch_start(self, trainer: Trainer, _module: LightningModule, batch: Any, index: int) -> None:
        """Begins to count FLOPs; waiting for the batch is part of the step already."""
        self._leave(Phase.SETUP)
        self._stop_counting()
        if self._counts:
            self._counting = True
            every = trainer.accumulate_grad_batches
            alike = batch if every == 1 else (batch, (index + 1) % every == 0)  # the batch that steps runs the optimizer too
            self._run.counter.begin_step(alike)

    @_harmless
    def on_train_batch_end(self, trainer: Trainer, _module: LightningModule, _outputs: Any, batch: Any, _index: int) -> None:
        """Ends a step, if this batch's optimizers stepped; else the batch's work waits for the one that does."""
        if self._counting:
            self._counting = False
            self._run.counter.end_step()
        self._n_batches += 1
        self._work += self._work_of(batch)
        if self._flops_of is not None:
            self._flops += self._call("flops_per_step", self._flops_of, batch, math.nan)
        if trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        self._n_steps += 1
        work, self._work = self._work, Work()
        flops, self._flops = (None if self._flops_of is None else self._flops), 0.0
        self._run.step(tokens=work.tokens, samples=work.samples, step=_loss_step(trainer), flops=flops)

    @_harmless
    def on_train_epoch_end(self, *_: Any) -> None:
        """Stops a count that a skipped epoch left open."""
        self._stop_counting()

    # Evaluation.

    @_harmless
    def on_validation_start(self, *_: Any) -> None:
        """Phase "eval" begins."""
        self._stop_counting()
        self._enter(Phase.EVAL)

    @_harmless
    def on_validation_batch_end(self, _trainer: Trainer, _module: LightningModule, _outputs: Any, batch: Any, *_: Any) -> None:
        """Adds the batch's work."""
        self._eval_work += self._work_of(batch)

    @_harmless
    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        """Phase "eval" ends; the sanity check has an end of its own."""
        if not trainer.sanity_checking:
            self._end_eval()

    @_harmless
    def on_sanity_check_end(self, *_: Any) -> None:
        """Phase "eval" ends."""
        self._end_eval()

    def _end_eval(self) -> None:
        work, self._eval_work = self._eval_work, Work()
        if work.n_steps:
            self._run.step(tokens=work.tokens, samples=work.samples)  # within the phase: its work, as one occurrence
        self._leave(Phase.EVAL)

    on_sanity_check_start = on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_predict_end = on_sanity_check_end

    # How it is done.

    def _start(self, trainer: Trainer) -> None:
        self._work, self._eval_work, self._flops = Work(), Work(), 0.0
        self._n_batches = self._n_steps = 0
        theirs: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # declared nowhere, set by the trainer's constructor
        every = self._every or theirs or "auto"  # 0 is Lightning's "never"
        options = {**self._options, "log_every_n_steps": every}
        writer, log_dir, problem = None, None, ""
        try:
            writer, log_dir = _destination(trainer)
            self._tracker = Tracker(writer=writer, log_dir=log_dir, **options).__enter__()
        except UsageError:
            raise
        except Exception as error:  # the directory is Lightning's choice, not the user's argument: measure without files
            problem = f"no files from GreenMonitor: {error}"
            self._tracker = Tracker(**options).__enter__()
        self._open = self._run.enabled
        if not self._open:
            return
        if problem:
            self._run.warn(problem)
        self._enter(Phase.SETUP)
        self._unwatch = self._watch_saving(trainer)

    def _watch_saving(self, trainer: Trainer) -> Callable[[], None]:
        """Books ``trainer.save_checkpoint`` as phase "save"; returns what undoes it.

        Every checkpoint passes through that method, from gathering the state to the barrier after writing it; no hook stands at its end.
        """
        save, own = trainer.save_checkpoint, vars(trainer)
        before = own.get("save_checkpoint")

        @wraps(save)
        def save_checkpoint(*args: Any, **kwargs: Any) -> None:
            self._begin_save()
            try:
                save(*args, **kwargs)
            finally:
                self._end_save()

        def unwatch() -> None:
            if own.get("save_checkpoint") is not save_checkpoint:
                return  # somebody wrapped it again: ours stays inside and only passes on
            if before is None:
                del own["save_checkpoint"]
            else:
                own["save_checkpoint"] = before

        own["save_checkpoint"] = save_checkpoint
        return unwatch

    def _close(self, error: BaseException | None = None) -> None:
        if not self._open:
            return
        self._stop_counting()
        self._open = False
        self._unwatch()
        self._unwatch = _nothing
        if error is None:
            self._run.__exit__(None, None, None)
        else:
            self._run.__exit__(type(error), error, error.__traceback__)
        while self._phases:  # those that an exception left open: the tracker has ended them
            self._phases.popitem()[1].__exit__(None, None, None)

    def _give_up(self, error: Exception) -> None:
        self._run.warn(f"GreenMonitor is switched off: {type(error).__name__}: {error}")
        try:
            self._close(error)
        except Exception as problem:  # rule 9
            self._run.warn(f"closing the run failed: {type(problem).__name__}: {problem}")

    @property
    def _run(self) -> Tracker:
        assert self._tracker is not None, "no run is open"
        return self._tracker

    def _enter(self, name: Phase) -> None:
        if name not in self._phases:
            phase = self._run.phase(name)
            phase.__enter__()
            self._phases[name] = phase

    def _leave(self, name: Phase) -> None:
        phase = self._phases.pop(name, None)
        if phase is not None:
            phase.__exit__(None, None, None)

    @_harmless
    def _begin_save(self) -> None:
        self._enter(Phase.SAVE)

    @_harmless
    def _end_save(self) -> None:
        self._leave(Phase.SAVE)

    def _stop_counting(self) -> None:
        if self._counting:
            self._counting = False
            self._run.counter.abort()

    def _work_of(self, batch: Any) -> Work:
        units = self._call("units", self._units, batch, {})
        return Work(1, units.get("samples"), units.get("tokens"))

    def _call(self, name: str, function: Callable[[Any], Any], batch: Any, otherwise: Any) -> Any:
        """What a function of the user's says of a batch; where it fails, ``otherwise`` with a warning."""
        try:
            value = function(batch)
            if isinstance(value, Mapping if name == "units" else int | float):
                return value
            problem = f"it returned {value!r}"
        except Exception as error:  # rule 9
            problem = f"{type(error).__name__}: {error}"
        self._run.warn(f"{name}= gives nothing for a batch: {problem}")
        return otherwise


def _nothing() -> None:
    pass


def _destination(trainer: Trainer) -> tuple[SummaryWriter | None, Path | None]:
    """The logger's writer, where it is TensorBoard's, and the run's directory; no files in a ``fast_dev_run``."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # declared nowhere, set by the trainer's constructor
        return None, None
    board = next((logger for logger in trainer.loggers if isinstance(logger, _TENSORBOARD_LOGGERS)), None)
    loggers = [board] if board is not None else trainer.loggers
    directory = next((d for d in (logger.log_dir for logger in loggers) if isinstance(d, str)), None)
    directory = directory or str(trainer.default_root_dir)
    if "://" in directory:
        raise ArgumentError(f"{directory} is not a local directory")
    if trainer.state.fn is not None and trainer.state.fn.value != "fit":
        return None, Path(directory, trainer.state.fn.value)
    return board.experiment if board is not None and trainer.is_global_zero else None, Path(directory)


def _loss_step(trainer: Trainer) -> int:
    """Where Lightning logs the loss of the batch that has just stepped: one less than what it will count after the batch."""
    try:
        return int(trainer.fit_loop.epoch_loop._batches_that_stepped)  # noqa: SLF001  (no public name; the fallback is public)
    except AttributeError:
        return trainer.global_step - 1


def _planned_steps(trainer: Trainer) -> int | None:
    """Steps that this fit will take, where that is known. The data are loaded by now, so asking costs nothing."""
    try:
        whole = trainer.estimated_stepping_batches
        left = int(whole) - (_loss_step(trainer) if trainer.global_step else 0)
    except Exception:  # unbounded, or accumulation that changes with the epoch
        return None
    return left if left > 0 else None


def _found_units(batch: Any) -> dict[str, int]:
    """Samples: the first tensor's first dimension. Tokens: the elements of ``input_ids``, where the batch has them."""
    units = {}
    first = _first_tensor(batch, _DEPTH)
    if first is not None:
        units["samples"] = first.shape[0]
    if isinstance(batch, Mapping) and isinstance(ids := batch.get("input_ids"), torch.Tensor):
        units["tokens"] = ids.numel()
    return units


def _first_tensor(value: Any, depth: int) -> torch.Tensor | None:
    """The first tensor with a dimension in nested mappings, sequences and dataclasses."""
    if isinstance(value, torch.Tensor):
        return value if value.dim() else None
    parts: Iterable[Any] = ()
    if depth and isinstance(value, Mapping):
        parts = value.values()
    elif depth and isinstance(value, list | tuple):
        parts = value
    elif depth and is_dataclass(value):
        parts = (getattr(value, field.name) for field in fields(value))
    return next((found for part in parts if (found := _first_tensor(part, depth - 1)) is not None), None)
