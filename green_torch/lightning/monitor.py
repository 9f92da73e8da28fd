"""``GreenMonitor``: a Lightning callback that measures what ``track()`` measures, for ``lightning.pytorch`` and ``pytorch_lightning``.

The callback owns a :class:`~green_torch.tracker.Tracker` from ``setup`` to ``teardown`` of each ``fit``, ``validate``, ``test`` or
``predict`` and tells it where steps and phases begin and end. It adds no synchronisation and no collective, and an error of its own
switches it off with a warning.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import sys
import time
import warnings
import weakref
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

from green_torch.adapter import OpenPhases, harmless, said_of, work_of
from green_torch.batch import found_units
from green_torch.clock import HostClock
from green_torch.errors import ArgumentError, UsageError
from green_torch.lightning import loggers
from green_torch.lightning.packages import Callback
from green_torch.lightning.progress import progress
from green_torch.records import Phase, Work
from green_torch.tracker import POLL_INTERVAL_S, Tracker
from green_torch.units import NS_PER_S

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from pytorch_lightning import LightningModule, Trainer

    from green_torch.protocols import Clock, IntensityProvider, Meter, Sink
    from green_torch.records import Embodied, RunSummary

_AUTOCAST = {"bf16": "bfloat16", "16": "float16"}  # by the first word of Lightning's precision
_BAR_NS = NS_PER_S  # between two texts of the progress bar: each takes a summary of the run
_PATIENCE_S = 1.0  # for rank zero's word in set-up; what comes later is taken up after it

_setups = itertools.count()  # of monitors, in this process: the same number on every rank


@final
class GreenMonitor(Callback):
    """Measures energy, carbon and MFU of each optimizer step: ``Trainer(callbacks=[GreenMonitor(region="FR")])``.

    With a ``TensorBoardLogger`` the values go through its own writer, on the steps of the loss; every other logger gets them by its
    ``log_metrics``, at most 2 % of the run's time. Files go to the logger's directory, else to ``default_root_dir``. ``validate``,
    ``test`` and ``predict`` on their own are runs in a sub-directory of that name. FLOPs are those of training: MFU and HFU say how well
    train steps use the device, and evaluation has time, energy and units of work alone.

    The state is in Lightning's checkpoints: ``trainer.fit(ckpt_path=...)`` goes on with the run that saved it, as its next segment; a
    fit without a checkpoint is a new run, in whatever directory, unless a job that is started again had left one undone there.

    Where there are several ranks, give each of them the callback: they share rank zero's directory, and rank zero has the sums.

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
        sinks: further destinations; each run of the trainer goes to them, and they are closed when this callback is no more.
        label: what a comparison calls this run.
        units: gives ``dict(tokens=..., samples=...)`` (either may be missing) for a batch. None: samples from the first tensor's first
            dimension, tokens from ``input_ids``.
        progress_bar: shows power, emissions and, where the run's length is known, what they will come to and the time left.
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
        progress_bar: bool = False,
        enabled: bool = True,
    ) -> None:
        if units is not None and not callable(units):
            raise ArgumentError(f"units={units!r}: give a function: units=lambda batch: dict(tokens=batch.numel())")
        self._units = units or found_units
        self._flops_of = flops_per_step if callable(flops_per_step) else None
        self._counts = flops_per_step is None
        self._every = log_every_n_steps
        self._sinks = list(sinks or ())
        weakref.finalize(self, _close_all, self._sinks)
        self._progress_bar = progress_bar
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
            "label": label,
            "enabled": enabled,
        }
        with warnings.catch_warnings():  # a trial, so that a wrong argument raises here; the run itself will do the warning
            warnings.simplefilter("ignore")
            every = "auto" if log_every_n_steps is None else log_every_n_steps
            Tracker(**{**self._options, "meters": meters or (), "log_every_n_steps": every})
        self._tracker: Tracker | None = None
        self._trainer: Trainer | None = None  # while a run is open
        self._put_off: tuple[Trainer, int] | None = None  # a run that is still to be opened, and the number of its set-up
        self._mailbox = loggers.Mailbox()
        self._newest: dict[str, float] = {}  # values by tag, for the progress bar
        self._bar = False  # whether one is shown here
        self._shown_ns: int | None = None  # when it last got a text
        self._feeds: list[loggers.LoggerFeed] = []
        self._open = self._fits = False
        self._state: dict[str, Any] = {}
        self._phases = OpenPhases()
        self._unwatch: Callable[[], None] = _nothing
        self._counting = False
        self._work = Work()  # of the micro-batches since the last step, or of the evaluation under way
        self._eval_work = Work()
        self._flops = 0.0
        self._global_step = -1  # before training begins
        self._logged_step = 0  # of the loss that Lightning logged last, at the earliest
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
            raise UsageError(
                "no run in this process yet: call trainer.fit(...) with this callback first. A strategy that spawns processes "
                "(ddp_spawn) leaves the summary in theirs: it is the last line of each file in the run's directory"
            )
        return self._tracker.summary()

    # The trainer's run begins and ends.

    def setup(self, trainer: Trainer, *_: Any, **_named: Any) -> None:
        """Opens the run, in phase "setup"; or right after set-up, where rank zero has not told its directory by then."""
        self._begin(trainer, next(_setups), _PATIENCE_S)

    def on_fit_start(self, *_: Any) -> None:
        """Opens the run, if that was put off."""
        self._begin_late()

    @harmless
    def teardown(self, *_: Any, **_named: Any) -> None:
        """Closes the run."""
        if self._n_batches and not self._n_steps:
            self._run.warn(
                f"Lightning saw no optimizer step in {self._n_batches} batches, so there are no steps to measure: in manual "
                "optimization, step what self.optimizers() returns"
            )
        self._close()

    @harmless
    def on_exception(self, _trainer: Trainer, _module: LightningModule, exception: BaseException) -> None:
        """Closes the run as failed, or as interrupted by Ctrl-C or SIGTERM; what was measured is on disk."""
        self._close(exception)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the fit under way, or of the last one; ``{}`` before the first."""
        if self._fits:
            self._remember()
        return dict(self._state)

    @harmless
    def _remember(self) -> None:
        self._state = self._run.state_dict()
        trainer = self._trainer
        if self._state and trainer is not None and trainer.global_step != self._global_step >= 0:
            self._state["step"] = _loss_step(trainer)  # a callback that comes before this one is saving
            self._state["steps_done"] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the run that saved the checkpoint."""
        self._begin_late()
        if self._fits and not self._n_batches:
            self._continue(state_dict)

    @harmless
    def _continue(self, state: dict[str, Any]) -> None:
        self._run.load_state_dict(state)

    # Training.

    @harmless
    def on_train_start(self, trainer: Trainer, _module: LightningModule) -> None:
        """Notes where training begins."""
        self._global_step = trainer.global_step

    @harmless
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: int) -> None:
        """Begins to count FLOPs; waiting for the batch is part of the step already, but for the first one, which ends phase "setup"."""
        if Phase.SETUP in self._phases:
            self._describe(trainer, pl_module)
            self._phases.leave(Phase.SETUP)
        self._stop_counting()
        if self._counts:
            self._counting = True
            every = trainer.accumulate_grad_batches
            alike = batch if every == 1 else (batch, (index + 1) % every == 0)  # the batch that steps runs the optimizer too
            self._run.counter.begin_step(alike)

    def _describe(self, trainer: Trainer, module: LightningModule) -> None:
        """States the model, now on its device, and how long the run will be: Lightning counts its batches right from the first one on.

        Where the module steps its optimizers itself, its first step tells how many batches one takes.
        """
        left = None
        if module.automatic_optimization:
            left = _steps_left(trainer)
        elif self._n_steps:
            left = _steps_left_by_hand(trainer, self._n_batches)
        planned = None if left is None else self._run.steps_done + left
        dtype = _AUTOCAST.get(str(trainer.precision).split("-", maxsplit=1)[0])
        self._run.adopt(module, planned_steps=planned or None, dtype=dtype)

    @harmless
    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, _outputs: Any, batch: Any, _index: int) -> None:
        """Ends a step, if this batch's optimizers stepped; else the batch's work waits for the one that does."""
        if self._counting:
            self._counting = False
            self._run.counter.end_step()
        self._show(trainer)
        self._n_batches += 1
        self._work += work_of(batch, self._units, self._run.warn)
        if self._flops_of is not None:
            self._flops += said_of(batch, "flops_per_step", self._flops_of, math.nan, self._run.warn)
        done = trainer.global_step
        if done == self._global_step:
            return
        self._global_step = done
        self._n_steps += 1
        work, self._work = self._work, Work()
        flops, self._flops = (None if self._flops_of is None else self._flops), 0.0
        self._logged_step = _loss_step(trainer)  # is logged right after this hook
        self._run.step(tokens=work.tokens, samples=work.samples, step=self._logged_step, flops=flops)
        if self._n_steps == 1 and not module.automatic_optimization:
            self._describe(trainer, module)

    @harmless
    def on_train_epoch_end(self, *_: Any) -> None:
        """Stops a count that a skipped epoch left open."""
        self._stop_counting()

    # Evaluation.

    def on_validation_start(self, *_: Any, **_named: Any) -> None:
        """Phase "eval" begins."""
        self._begin_late()
        self._begin_eval()

    @harmless
    def _begin_eval(self) -> None:
        self._stop_counting()
        self._phases.enter(self._run, Phase.EVAL)

    @harmless
    def on_validation_batch_end(self, _trainer: Trainer, _module: LightningModule, _outputs: Any, batch: Any, *_: Any) -> None:
        """Adds the batch's work."""
        self._eval_work += work_of(batch, self._units, self._run.warn)

    @harmless
    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        """Phase "eval" ends; the sanity check has an end of its own."""
        if not trainer.sanity_checking:
            self._end_eval()

    @harmless
    def on_sanity_check_end(self, *_: Any) -> None:
        """Phase "eval" ends."""
        self._end_eval()

    def _end_eval(self) -> None:
        work, self._eval_work = self._eval_work, Work()
        if self._trainer is not None:
            self._show(self._trainer)
        if work.n_steps:
            self._run.step(tokens=work.tokens, samples=work.samples)  # within the phase: its work, as one occurrence
        self._phases.leave(Phase.EVAL)

    on_sanity_check_start = on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_predict_end = on_sanity_check_end

    # How it is done.

    def _begin(self, trainer: Trainer, number: int, patience_s: float) -> None:
        """Opens the run, or puts that off where rank zero has told no directory."""
        self._put_off = None
        try:
            self._close()  # a run that ended without telling
            told = _directory(trainer, number, patience_s) if self._options["enabled"] else (None, "")
            if told is None:
                self._put_off = trainer, number
            else:
                self._start(trainer, *told)
        except UsageError:
            raise
        except Exception as error:  # rule 9
            logging.getLogger("green_torch").warning("GreenMonitor could not start: %s: %s", type(error).__name__, error)

    def _begin_late(self) -> None:
        """Opens the run that was put off: all ranks are through with set-up by now."""
        if self._put_off is not None:
            self._begin(*self._put_off, patience_s=0)

    def _start(self, trainer: Trainer, directory: Path | None, problem: str) -> None:
        self._work, self._eval_work, self._flops = Work(), Work(), 0.0
        self._n_batches = self._n_steps = self._logged_step = 0
        self._global_step = -1
        theirs: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # declared nowhere, set by the trainer's constructor
        every = self._every or theirs or "auto"  # 0 is Lightning's "never"
        others = loggers.others(trainer)
        sinks: list[Sink] = [loggers.lent(sink) for sink in self._sinks]
        self._bar = self._progress_bar and loggers.shows(trainer)
        if others or self._bar:
            self._mailbox, self._newest, self._shown_ns = loggers.Mailbox(), {}, None
            sinks.append(self._mailbox)
        options = {**self._options, "log_every_n_steps": every, "sinks": sinks}
        writer = None
        try:
            writer = loggers.writer(trainer)
            self._tracker = Tracker(writer=writer, log_dir=directory, **options).__enter__()
        except UsageError:
            raise
        except Exception as error:  # the directory is Lightning's choice, not the user's argument: measure without files
            problem, writer = str(error), None
            self._tracker = Tracker(**options).__enter__()
        self._open = self._run.enabled
        if not self._open:
            return
        self._phases.enter(self._run, Phase.SETUP)
        if problem and writer is None:  # of a writer that writes elsewhere the tracker has told itself
            self._run.warn(f"no files from GreenMonitor: {problem}")
        self._trainer = trainer
        self._fits = loggers.fitting(trainer)
        self._clock: Clock = self._options["clock"] or HostClock()
        self._feeds = [loggers.LoggerFeed(logger, self._clock, self._run.warn) for logger in others]
        self._unwatch = self._watch_saving(trainer)

    def _show(self, trainer: Trainer, *, last: bool = False) -> None:
        """Hands what has come in since the last hook to the loggers and the progress bar."""
        rows = self._mailbox.take()
        if not rows:
            return
        for feed in self._feeds:
            feed.log(rows, self._logged_step, last=last)
        if not self._bar:
            return
        for row in rows:
            self._newest |= row.values
        now_ns = self._clock.now_ns()
        if last or self._shown_ns is None or now_ns - self._shown_ns >= _BAR_NS:
            self._shown_ns = now_ns
            text: Any = progress(self._newest, self._run.summary().time_left_s)
            trainer.progress_bar_metrics["green"] = text  # shown as it is by either bar

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
        if self._fits:
            self._fits = False
            self._remember()
        self._open = False
        trainer, self._trainer = self._trainer, None
        self._unwatch()
        self._unwatch = _nothing
        if error is None:
            self._run.__exit__(None, None, None)
        else:
            self._run.__exit__(type(error), error, error.__traceback__)
        self._phases.leave_all()
        if trainer is not None:
            self._show(trainer, last=True)
        self._feeds = []

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

    @harmless
    def _begin_save(self) -> None:
        self._phases.enter(self._run, Phase.SAVE)

    @harmless
    def _end_save(self) -> None:
        self._phases.leave(Phase.SAVE)

    def _stop_counting(self) -> None:
        if self._counting:
            self._counting = False
            self._run.counter.abort()


def _nothing() -> None:
    pass


def _close_all(sinks: Iterable[Sink]) -> None:
    for sink in sinks:
        with suppress(Exception):  # rule 9
            sink.close()


def _directory(trainer: Trainer, number: int, patience_s: float) -> tuple[Path | None, str] | None:
    """The run's directory, or none and why: on every rank rank zero's, since a logger that numbers its runs gives each another one.

    Rank zero leaves it in the process group's store, under the number of this set-up, and goes on. The others look for it there for
    ``patience_s``: ``None`` where it has not come by then. Without patience, after set-up, what is not there won't come: rank zero has
    no monitor that tells. No collective, so that a rank without this callback stops nobody.
    """
    path, problem = None, ""
    if trainer.is_global_zero:
        try:
            path = loggers.directory(trainer)
        except Exception as error:  # loggers may be anybody's code: rule 9
            problem = str(error)
    if trainer.world_size == 1:
        return path, problem
    key = f"green_torch/directory/{number}"
    try:
        distributed: Any = sys.modules["torch.distributed"]
        store = distributed.distributed_c10d._get_default_store().clone()  # noqa: SLF001 - it has no public name
        if trainer.is_global_zero:
            store.set(key, json.dumps([path and str(path), problem]))
        elif _comes(store, key, patience_s):
            path, problem = json.loads(store.get(key))
        elif patience_s:
            return None
        else:
            problem = "rank zero tells no directory. Give rank zero's trainer a GreenMonitor too, one that is enabled"
    except Exception as error:  # no process group of torch's
        if not trainer.is_global_zero:
            problem = f"rank zero can't tell its directory: {type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
    return path and Path(path), problem


def _comes(store: Any, key: str, patience_s: float) -> bool:
    """Whether this is in the store, or is put there before long (a wait of the store's own that ends in vain prints a page)."""
    give_up_s = time.monotonic() + patience_s
    while not (there := store.check([key])) and time.monotonic() < give_up_s:
        time.sleep(0.01)
    return bool(there)


def _loss_step(trainer: Trainer) -> int:
    """Where Lightning logs the loss of the batch that has just stepped: one less than what it will count after the batch."""
    try:
        return int(trainer.fit_loop.epoch_loop._batches_that_stepped)  # noqa: SLF001  (no public name; the fallback is public)
    except AttributeError:
        return trainer.global_step - 1


def _steps_left(trainer: Trainer) -> int | None:
    """Steps that this fit will still take, where that is known. The data are loaded by now, so asking costs nothing.

    ``max_steps`` counts each optimizer's steps: with several, nobody knows how many of them a batch will step.
    """
    if len(trainer.optimizers) > 1 and trainer.max_steps != -1:
        return None
    try:
        left = int(trainer.estimated_stepping_batches) - (_loss_step(trainer) if trainer.global_step else 0)
    except Exception:  # unbounded, or accumulation that changes with the epoch
        return None
    return left if left >= 0 else None


def _steps_left_by_hand(trainer: Trainer, batches_per_step: int) -> int | None:
    """The same after a step, where the module steps its optimizers itself, at every so many batches: Lightning's own estimate knows of none."""
    if len(trainer.optimizers) > 1 and trainer.max_steps != -1:
        return None
    left = [] if trainer.max_steps == -1 else [trainer.max_steps - trainer.global_step]
    if trainer.max_epochs not in {None, -1} and math.isfinite(trainer.num_training_batches):
        batches = trainer.num_training_batches * trainer.max_epochs - (trainer.fit_loop.total_batch_idx + 1)
        left.append(math.ceil(batches / batches_per_step))
    return max(0, min(left)) if left else None
