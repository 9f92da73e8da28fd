"""``GreenCallback``: a callback for the Hugging Face ``Trainer`` that measures what ``track()`` measures.

::

    green = GreenCallback(region="FR")
    trainer = Trainer(model, args, train_dataset=data, callbacks=[green])
    trainer.train()
    print(green.summary())

The Trainer tells its callbacks when a step ends, but not when an evaluation or a checkpoint begins, nor that training raised, and gives
them no reference to itself. So the callback looks up who called it, once, and puts a thin layer around seven of that trainer's methods
(``train``, ``evaluate``, ``predict``, ``training_step``, ``prediction_step``, ``log``, ``_save_checkpoint``), which passes on everything
as it is, but for the values that it adds to what is logged. Where no Trainer is found (a loop of somebody's own that calls callbacks),
steps are measured all the same.
"""

from __future__ import annotations

import logging
import math
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from green_torch.adapter import OpenPhases, harmless, said_of, work_of
from green_torch.batch import found_units
from green_torch.errors import ArgumentError, UsageError
from green_torch.records import Item, Manifest, Phase, StepRecord, Work
from green_torch.sinks.tensorboard import scalars
from green_torch.tracker import POLL_INTERVAL_S, Tracker

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from transformers import TrainerControl, TrainerState, TrainingArguments

    from green_torch.protocols import Clock, IntensityProvider, Meter, Sink
    from green_torch.records import Embodied, RunSummary

__all__ = ["GreenCallback"]

_WATCHED = ("train", "evaluate", "predict", "training_step", "prediction_step", "log", "_save_checkpoint")
_PRINTED = ("green/energy_total_kWh", "green/emissions_total_gCO2e", "green/power_W", "green/mfu")
_STATE = "green_torch"  # our place among the callbacks' states in trainer_state.json


@final
class GreenCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not looked into: it takes mypy minutes
    """Measures energy, carbon and MFU of each optimizer step: ``Trainer(callbacks=[GreenCallback(region="FR")])``.

    A run lasts from ``on_train_begin`` to ``on_train_end`` (loading the checkpoint and moving the model come before it) and is kept in
    ``args.output_dir``: its files in ``green/``, its values through the writer of the Trainer's own ``TensorBoardCallback``, on the
    steps of the loss; without one, in an event file there. ``evaluate()`` and ``predict()`` on their own are runs in a sub-directory of
    that name. With ``train(resume_from_checkpoint=...)`` the run that saved the checkpoint goes on; one that SIGTERM stopped
    (``enable_jit_checkpoint``) had been interrupted.

    FLOPs are counted live in ``training_step``, once per input shape; an optimizer's own products are not among them.

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
        log_every_n_steps: steps per record, or "auto", whatever ``args.logging_steps`` says (500, unless you set it).
        baseline: a run's directory.
        planned_steps: steps of the whole run. None: the trainer's ``max_steps``.
        run_name: None: ``args.run_name``, else the directory's name.
        sinks: further destinations of a training run, closed at its end.
        label: what a comparison calls this run.
        units: gives ``dict(tokens=..., samples=...)`` (either may be missing) for the inputs of a (micro-)batch. None: tokens from
            ``state.num_input_tokens_seen`` where ``include_num_input_tokens_seen`` is on, else from ``input_ids``; samples from the
            first tensor's first dimension.
        logs: adds the values under ``green/``, as of the last settled record, to what the Trainer logs of its training every
            ``args.logging_steps``: to its log history, ``train()``'s metrics and every reporter (W&B, MLflow, ...), wherever it stands
            among the callbacks. Reporters name them as they name the loss: W&B's has ``train/green/mfu`` beside ``train/loss``. Printed
            lines get four of them; TensorBoard gets none this way, since every record is there already.
        enabled: False turns everything off.

    Raises:
        ArgumentError: an argument is wrong.
        UsageError: at the start of training, where another tracker is open.
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
        log_every_n_steps: int | Literal["auto"] = "auto",
        baseline: str | os.PathLike[str] | None = None,
        planned_steps: int | None = None,
        run_name: str | None = None,
        sinks: Sequence[Sink] | None = None,
        label: str = "",
        units: Callable[[Any], Mapping[str, int]] | None = None,
        logs: bool = True,
        enabled: bool = True,
    ) -> None:
        if units is not None and not callable(units):
            raise ArgumentError(f"units={units!r}: give a function: units=lambda inputs: dict(tokens=inputs['x'].numel())")
        self._units = units or found_units
        self._asks_state = units is None
        self._flops_of = flops_per_step if callable(flops_per_step) else None
        self._counts = flops_per_step is None
        self._logs = logs
        self._sinks = list(sinks or ())
        self._run_name = run_name
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
            "log_every_n_steps": log_every_n_steps,
            "baseline": baseline,
            "planned_steps": planned_steps,
            "label": label,
            "enabled": enabled,
        }
        with warnings.catch_warnings():  # a trial, so that a wrong argument raises here; the run itself will do the warning
            warnings.simplefilter("ignore")
            Tracker(**{**self._options, "meters": meters or ()})
        self._tracker: Tracker | None = None
        self._training: Tracker | None = None  # the last one of a training
        self._open = False
        self._latest = _Latest()
        self._phases = OpenPhases()
        self._lent = ExitStack()  # what is undone when the run ends: our layer around methods of other callbacks
        self._counting = False
        self._work = Work()  # of the micro-batches since the last step, or of the evaluation under way
        self._eval_work = Work()
        self._flops = 0.0
        self._tokens_seen = 0
        self._global_step = 0  # of the last step that ended
        self._ended_early: int | None = None  # a step that ended as a callback before this one saved
        self._told_to_go = False  # by SIGTERM

    @property
    def tracker(self) -> Tracker | None:
        """The tracker of the run under way, or of the last one; None before the first."""
        return self._tracker

    def summary(self) -> RunSummary:
        """The training as far as it is resolved, complete once ``train()`` has returned; without a training, the last evaluation.

        Raises:
            UsageError: nothing has run yet.
        """
        tracker = self._training or self._tracker
        if tracker is None:
            raise UsageError("no run yet: call trainer.train() with this callback first")
        return tracker.summary()

    def co2_eq_emissions(
        self, training_type: Literal["pre-training", "fine-tuning"] | None = None
    ) -> dict[str, float | str] | None:
        """``co2_eq_emissions`` of the training for a model card, in grams; ``None`` where they are not known.

        Into a card on disk, such as ``trainer.create_model_card()`` writes, and into one on the Hub after ``trainer.push_to_hub()``::

            from huggingface_hub import metadata_load, metadata_save, metadata_update

            metadata_save(card, {**metadata_load(card), "co2_eq_emissions": green.co2_eq_emissions()})
            metadata_update("you/model", {"co2_eq_emissions": green.co2_eq_emissions()})

        The sum over the run's segments and, on rank zero, over all ranks that report; of a location only what ``region=`` named.

        Raises:
            UsageError: nothing has run yet.
        """
        summary = self.summary()
        manifest, totals = summary.manifest, summary.job or summary.totals
        if totals.emissions_g is None:
            return None
        carried_g = summary.job.carried_emissions_g if summary.job else manifest.carried_emissions_g
        grid, job = manifest.intensity, summary.job
        known = [
            *summary.how_known(),
            f"operational, {summary.kind}" + ("" if manifest.embodied else "; embodied not counted"),
            f"PUE {manifest.pue:g}",
            f"{grid.g_per_kwh:.4g} gCO2e/kWh, {grid.region} ({grid.source})" if grid else "",
            f"embodied share included ({manifest.embodied.source})" if manifest.embodied else "",
            f"{job.reporting} of {job.world_size} processes" if job else "",
        ]
        card: dict[str, float | str] = {
            "emissions": float(f"{totals.emissions_g + (carried_g or 0.0):.4g}"),
            "source": f"green_torch {manifest.versions['green_torch']}: " + "; ".join(filter(None, known)),
        }
        if training_type is not None:
            card["training_type"] = training_type
        if self._options["region"] is not None:
            card["geographical_location"] = self._options["region"]
        devices = Counter(domain.device for domain in manifest.domains if domain.device)
        if devices:
            hardware = ", ".join(device if n == 1 else f"{n} × {device}" for device, n in devices.items())
            card["hardware_used"] = f"{job.world_size} processes, the first with {hardware}" if job else hardware
        return card

    # The Trainer's hooks.

    def on_init_end(self, *_: Any, **_named: Any) -> None:
        """Watches the trainer that is being made."""
        self._watch(_caller())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, *, model: Any = None, **_named: Any
    ) -> None:
        """Opens the run, in phase "setup"; states the model and how long the run will be."""
        trainer = _caller()
        self._watch(trainer)
        try:
            self._close(UsageError("training that began anew without an end"))  # a batch too large, say
            self._start(args, state, trainer)
        except UsageError:
            raise
        except Exception as error:  # rule 9
            _say(f"could not start: {type(error).__name__}: {error}")
        self._describe(args, state, trainer, model)

    @harmless
    def on_step_begin(self, *_: Any, **_named: Any) -> None:
        """Ends phase "setup": the first batches are there."""
        self._phases.leave(Phase.SETUP)

    @harmless
    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **_named: Any) -> None:
        """Ends a step: one optimizer step, all its micro-batches together."""
        if state.global_step != self._ended_early:
            self._end_step(args, state)

    def _end_step(self, args: TrainingArguments, state: TrainerState) -> None:
        self._phases.leave(Phase.SETUP)
        self._global_step = state.global_step
        work, self._work = self._work, Work()
        flops, self._flops = (None if self._flops_of is None else self._flops), 0.0
        tokens = work.tokens
        if self._asks_state and _counts_tokens(args):
            seen, before = int(state.num_input_tokens_seen), self._tokens_seen
            self._tokens_seen = seen
            rank, world_size = self._run.manifest.rank, self._run.manifest.world_size
            tokens = (seen - before + rank) // world_size or None  # the state's are of all ranks: shares that sum to them
        self._run.step(tokens=tokens, samples=work.samples, step=state.global_step, flops=flops)

    @harmless
    def on_train_end(self, _args: TrainingArguments, state: TrainerState, *_: Any, **_named: Any) -> None:
        """Closes the run: as interrupted where SIGTERM made the Trainer save and stop before its last step."""
        cut = self._told_to_go and state.global_step < state.max_steps
        self._close(SystemExit(128 + signal.SIGTERM) if cut else None)

    # Around the trainer's own methods: what they are given and return passes through as it is.

    def _watch(self, trainer: Trainer | None) -> None:
        """Puts our layer around the methods of a trainer, once; it stays, and does nothing while no run is open."""
        if trainer is None or vars(trainer).get("_green_torch") is self:
            return
        trainer._green_torch = self  # noqa: SLF001  (ours)
        for name in _WATCHED:
            inner = getattr(trainer, name, None)
            if inner is not None:
                around = getattr(self, f"_around_{name.removeprefix('_')}")
                setattr(trainer, name, wraps(inner)(partial(around, trainer, inner)))

    def _around_train(self, _trainer: Trainer, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        except BaseException as error:
            self._fail(error)
            raise

    def _around_evaluate(self, trainer: Trainer, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._evaluated(trainer, "evaluate", partial(inner, *args, **kwargs))

    def _around_predict(self, trainer: Trainer, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._evaluated(trainer, "predict", partial(inner, *args, **kwargs))

    def _evaluated(self, trainer: Trainer, name: str, evaluation: Callable[[], Any]) -> Any:
        entered, alone = self._begin_evaluation(trainer, name)
        problem: BaseException | None = None
        try:
            return evaluation()
        except BaseException as error:
            problem = error
            raise
        finally:
            if entered:
                self._end_evaluation(alone, problem)

    def _around_training_step(self, trainer: Trainer, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._begin_batch(trainer, _inputs(args, kwargs))
        try:
            loss = inner(*args, **kwargs)
        except BaseException:
            self._stop_counting()
            raise
        self._end_batch()
        return loss

    def _around_prediction_step(self, _trainer: Trainer, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._see_prediction(_inputs(args, kwargs))
        return inner(*args, **kwargs)

    def _around_log(self, _trainer: Trainer, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._add_values(kwargs["logs"] if "logs" in kwargs else args[0] if args else None)
        return inner(*args, **kwargs)

    def _around_save_checkpoint(self, trainer: Trainer, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._begin_save(trainer)
        try:
            return inner(*args, **kwargs)
        finally:
            self._end_save()

    # What they do on the way.

    @harmless
    def _begin_batch(self, trainer: Trainer, inputs: Any) -> None:
        self._work += work_of(inputs, self._units, self._run.warn)
        if self._flops_of is not None:
            self._flops += said_of(inputs, "flops_per_step", self._flops_of, math.nan, self._run.warn)
        if not self._counts:
            return
        if trainer.args.n_gpu > 1:
            self._run.warn(
                "FLOPs of DataParallel's threads can't be counted, so no MFU: start with torchrun, or pass flops_per_step="
            )
        elif not (isinstance(inputs, Mapping) and any(isinstance(value, torch.Tensor) for value in inputs.values())):
            self._run.warn(
                f"a batch that is a {type(inputs).__name__} without tensors tells nothing of the FLOPs, so no MFU: pass flops_per_step="
            )
        else:
            self._counting = True
            self._run.counter.begin_step(inputs)

    @harmless
    def _end_batch(self) -> None:
        if self._counting:
            self._counting = False
            self._run.counter.end_step()

    @harmless
    def _see_prediction(self, inputs: Any) -> None:
        if Phase.EVAL in self._phases:
            self._eval_work += work_of(inputs, self._units, self._run.warn)

    @harmless
    def _add_values(self, logs: Any) -> None:
        """Adds ours to what the Trainer is about to log of its training."""
        if not self._logs or not isinstance(logs, dict) or Phase.EVAL in self._phases:
            return
        if "train_runtime" in logs:  # the last of a training; what closing would wait for is waited for now
            self._run.flush()
            logs.update(self._latest.values)
        elif "loss" in logs:
            logs.update(self._latest.news())

    @harmless
    def _begin_save(self, trainer: Trainer) -> None:
        """Phase "save" begins, and the checkpoint gets our state."""
        if self._work.n_steps and trainer.state.global_step != self._global_step:
            # The step is over, and a callback before this one saves.
            self._end_step(trainer.args, trainer.state)
            self._ended_early = trainer.state.global_step
        self._phases.enter(self._run, Phase.SAVE)
        trainer.state.stateful_callbacks[_STATE] = {"args": {}, "attributes": self._run.state_dict()}

    @harmless
    def _end_save(self) -> None:
        self._phases.leave(Phase.SAVE)

    def _begin_evaluation(self, trainer: Trainer, name: str) -> tuple[bool, bool]:
        """Whether phase "eval" begins here, and whether its run does: it may be one of several data sets, or part of a training."""
        alone = not self._open
        try:
            if alone:
                if self not in trainer.callback_handler.callbacks:
                    return False, False
                self._start(trainer.args, trainer.state, trainer, alone=name)
            entered = self._open and self._phases.enter(self._run, Phase.EVAL)
        except UsageError:
            return False, False  # the user measures this already
        except Exception as error:  # rule 9
            _say(f"{name}() is not measured: {type(error).__name__}: {error}")
            return False, False
        return entered, alone

    @harmless
    def _end_evaluation(self, alone: bool, error: BaseException | None) -> None:
        work, self._eval_work = self._eval_work, Work()
        if work.n_steps:
            self._run.step(tokens=work.tokens, samples=work.samples)  # within the phase: its work, as one occurrence
        self._phases.leave(Phase.EVAL)
        if alone:
            self._close(error)

    # How it is done.

    def _start(self, args: TrainingArguments, state: TrainerState, trainer: Trainer | None, *, alone: str = "") -> None:
        """Opens the run of a training, or of an evaluation ``alone``."""
        self._work, self._eval_work, self._flops = Work(), Work(), 0.0
        self._global_step, self._ended_early, self._told_to_go = state.global_step, None, False
        self._latest = _Latest()
        options: dict[str, Any] = {**self._options, "run_name": self._run_name or args.run_name or None}
        board = None if alone else _board(trainer)
        writer = board.tb_writer if board is not None else None
        if not alone:
            options["sinks"] = [*self._sinks, self._latest]
        problem = ""
        try:
            tracker = Tracker(
                log_dir=Path(args.output_dir, state.trial_name or "", alone), writer=writer, **options
            ).__enter__()
        except UsageError:
            raise
        except Exception as error:  # the directory is the Trainer's choice, not the user's argument: measure without files
            problem = f"no files from GreenCallback: {error}"
            tracker = Tracker(**options).__enter__()
        self._tracker = tracker
        self._open = tracker.enabled
        if problem:
            tracker.warn(problem)
        if alone:
            return
        self._training = tracker
        tracker.load_state_dict(state.stateful_callbacks.get(_STATE, {}).get("attributes", {}))
        if self._open and trainer is not None:
            self._see_to(trainer.callback_handler.callbacks, board)

    @harmless
    def _describe(self, args: TrainingArguments, state: TrainerState, trainer: Trainer | None, model: Any) -> None:
        self._phases.enter(self._run, Phase.SETUP)
        if trainer is None:
            self._run.warn(
                "no Trainer was found around this callback: evaluation and saving are part of the steps, and there is no MFU"
            )
        self._tokens_seen = int(state.num_input_tokens_seen)
        planned = state.max_steps - state.global_step + self._run.steps_done
        dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
        if trainer is not None and args.torch_compile:
            model = trainer.model_wrapped  # the counter must know that it is compiled
        self._run.adopt(model, planned_steps=planned, dtype=dtype)

    def _see_to(self, callbacks: Sequence[TrainerCallback], board: TensorBoardCallback | None) -> None:
        """Lets the other callbacks be told what is theirs to tell: the reporters everything, the printed lines a part."""
        if board is not None:
            self._hide(board)  # its writer has every record, if it lends us one
            if board.tb_writer is not None:
                self._close_before(board)
        for callback in callbacks:
            if isinstance(callback, PrinterCallback | ProgressCallback):
                self._hide(callback, but=_PRINTED)
            if type(callback).__name__ == "JITCheckpointCallback":  # of enable_jit_checkpoint, since transformers 5
                self._hear_of_sigterm(callback)

    def _hear_of_sigterm(self, callback: Any) -> None:
        """Notes that SIGTERM has come: the Trainer has a handler for it, which saves and stops as if the training were done."""
        manager = callback.jit_manager
        if manager is None:
            return
        inner = manager.execute_jit_checkpoint

        @wraps(inner)
        def execute_jit_checkpoint() -> None:
            self._told_to_go = True
            inner()

        manager.execute_jit_checkpoint = execute_jit_checkpoint
        self._lent.callback(vars(manager).pop, "execute_jit_checkpoint", None)

    def _close_before(self, board: TensorBoardCallback) -> None:
        """Ends our run right before the Trainer's TensorBoard callback closes the writer."""
        inner = board.on_train_end

        @wraps(inner)
        def on_train_end(*args: Any, **kwargs: Any) -> Any:
            self.on_train_end(*args, **kwargs)
            return inner(*args, **kwargs)

        board.on_train_end = on_train_end
        self._lent.callback(vars(board).pop, "on_train_end", None)

    def _hide(self, callback: TrainerCallback, but: Sequence[str] = ()) -> None:
        """Keeps our values from a callback that is shown what the Trainer logs, while the run is open."""
        inner = callback.on_log

        @wraps(inner)
        def on_log(*args: Any, logs: Any = None, **kwargs: Any) -> Any:
            ours = [tag for tag in self._latest.values if tag not in but] if isinstance(logs, dict) else []
            hidden = {tag: logs.pop(tag) for tag in ours if tag in logs}
            try:
                return inner(*args, logs=logs, **kwargs)
            finally:
                if hidden:
                    logs.update(hidden)

        callback.on_log = on_log
        self._lent.callback(vars(callback).pop, "on_log", None)

    def _close(self, error: BaseException | None = None) -> None:
        if not self._open:
            return
        self._stop_counting()
        self._open = False
        self._lent.close()
        if error is None:
            self._run.__exit__(None, None, None)
        else:
            self._run.__exit__(type(error), error, error.__traceback__)
        self._phases.leave_all()

    @harmless
    def _fail(self, error: BaseException) -> None:
        self._close(error)

    def _give_up(self, error: Exception) -> None:
        self._run.warn(f"GreenCallback is switched off: {type(error).__name__}: {error}")
        try:
            self._close(error)
        except Exception as problem:  # rule 9
            self._run.warn(f"closing the run failed: {type(problem).__name__}: {problem}")

    @property
    def _run(self) -> Tracker:
        assert self._tracker is not None, "no run is open"
        return self._tracker

    def _stop_counting(self) -> None:
        if self._counting:
            self._counting = False
            self._run.counter.abort()


class _Latest:
    """A sink that keeps the latest of the values that go into the Trainer's logs."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._manifest: Manifest | None = None

    def write(self, item: Item) -> None:
        """Takes what is known of a record."""
        if isinstance(item, Manifest):
            self._manifest = item
        elif isinstance(item, StepRecord):
            values = scalars(item, self._manifest, detail=False)
            known = {tag: value for tag, value in values if value is not None and math.isfinite(value)}
            self.values = {**self.values, **known}  # a new one, since the training thread reads it

    def news(self) -> dict[str, float]:
        """The values, unless they were told before: a record comes after its step, and is not to be taken for that of the next one."""
        values, told = self.values, self._told
        self._told = values
        return {} if values is told else values

    def close(self) -> None:
        """Nothing is open."""


def _caller() -> Trainer | None:
    """The trainer whose method led here; it hands its callbacks no reference to itself."""
    frame = sys._getframe(1).f_back  # noqa: SLF001 - the documented way to the stack
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back
    return None


def _board(trainer: Trainer | None) -> TensorBoardCallback | None:
    """The trainer's own TensorBoard callback, where it has one."""
    callbacks = trainer.callback_handler.callbacks if trainer is not None else ()
    return next((callback for callback in callbacks if isinstance(callback, TensorBoardCallback)), None)


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The batch in the arguments of ``training_step`` or ``prediction_step``, whose second it is."""
    return kwargs["inputs"] if "inputs" in kwargs else args[1] if len(args) > 1 else None


def _counts_tokens(args: TrainingArguments) -> bool:
    """Whether the Trainer counts tokens: a switch once, a word ("all", "non_padding", "no") since."""
    return args.include_num_input_tokens_seen not in {False, "no"}


def _say(text: str) -> None:
    logging.getLogger("green_torch").warning("GreenCallback: %s", text)
