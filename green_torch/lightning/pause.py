"""``CarbonAwarePause``: a Lightning callback that lets a fit stop while the grid is dirty, and go on as if it never had."""

from __future__ import annotations

import logging
import random
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, final, runtime_checkable

import numpy as np
import torch

from green_torch.errors import GreenTorchError
from green_torch.lightning.monitor import GreenMonitor
from green_torch.lightning.packages import Callback
from green_torch.records import REQUEUE, Phase
from green_torch.schedule.pausing import (
    CHECK_EVERY_S,
    MIN_SAVING,
    RESUME_FILE,
    Pause,
    Pauses,
    described,
    leave_word,
)
from green_torch.schedule.planning import RESUME_OVERHEAD_S
from green_torch.warned import Warnings

if TYPE_CHECKING:
    from datetime import datetime

    from pytorch_lightning import LightningModule, Trainer

    from green_torch.protocols import Clock
    from green_torch.schedule.planning import Duration
    from green_torch.tracker import Tracker

_log = logging.getLogger("green_torch")
_IN_PLACE = "green_pause.ckpt"
T = TypeVar("T")


@runtime_checkable
class _Stateful(Protocol):
    """A data loader that knows where it is."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@final
class CarbonAwarePause(Callback):
    """``Trainer(callbacks=[GreenMonitor(...), CarbonAwarePause(UKNeso(), max_wait=6 * 3600)])``.

    Between two optimizer steps, where the plan for what is left of the fit says so, it saves a checkpoint and waits in place (phase
    ``paused`` of a :class:`GreenMonitor`), or leaves with exit code 75. Waiting changes nothing of the training. Leaving is done where an epoch
    begins, or within one where every train data loader has ``state_dict`` and ``load_state_dict``; the random states of all ranks
    travel in the checkpoint. The deadline always wins, and a grid that can't be asked means running on.

    A fit that leaves puts its checkpoint where Lightning looks for it when Slurm starts the job again (``hpc_ckpt_*`` in the trainer's
    ``default_root_dir``; elsewhere: ``trainer.fit(ckpt_path="hpc")``), and the time to queue it again into ``green_resume_at`` there, as
    ``sbatch --begin=`` takes it. Both are removed when the fit is done.

    Args:
        provider: with a forecast or a history: ``ElectricityMaps``, ``UKNeso``, ``WattTime``, ``Trace``. One with ``at`` alone makes it wait (in
            place only) while the grid is dirtier than it was wont to be.
        deadline: when the fit must be done: a ``datetime`` with its offset, or seconds (a ``timedelta``) from its start. A job that leaves and
            comes again needs a ``datetime``.
        max_wait: how long it may pause, each time it is started, in seconds or as a ``timedelta``.
        on_pause: "wait" or "exit".
        min_saving: less than this fraction of what is left of the fit isn't worth a pause.
        resume_overhead: what a pause adds to the work.
        idle_share: draw while waiting in place over that at work; where not given, what a :class:`GreenMonitor` beside it has metered in an
            earlier pause, and 0.2 (an assumption) before the first.
        queue_delay: time in the queue before a job that left goes on.
        check_every: how often to look ahead, off the training thread.
        checkpoint: whether to save one before waiting in place too.
        clock: for tests.

    Raises:
        ArgumentError: an argument is wrong.
    """

    def __init__(
        self,
        provider: object,
        *,
        deadline: datetime | Duration | None = None,
        max_wait: Duration | None = None,
        on_pause: Literal["wait", "exit"] = "wait",
        min_saving: float = MIN_SAVING,
        resume_overhead: Duration = RESUME_OVERHEAD_S,
        idle_share: float | None = None,
        queue_delay: Duration = 0.0,
        check_every: Duration = CHECK_EVERY_S,
        checkpoint: bool = True,
        clock: Clock | None = None,
    ) -> None:
        self._warnings = Warnings()
        self._leaves = on_pause == "exit"
        self._saves = checkpoint
        self._pauses = Pauses(
            provider,
            deadline=deadline,
            max_wait=max_wait,
            on_pause=on_pause,
            min_saving=min_saving,
            resume_overhead=resume_overhead,
            idle_share=idle_share,
            queue_delay=queue_delay,
            check_every=check_every,
            clock=clock,
            warn=self._warnings,
        )
        self._open = False
        self._global_step = 0
        self._pending: Pause | None = None  # waits for the next epoch
        self._random: list[dict[str, Any]] | None = None  # of each rank, while a checkpoint is saved or after one was loaded
        self._mid_epoch = False
        self._files: list[str] = []  # that this fit left behind, in all its starts

    @property
    def pauses(self) -> tuple[Pause, ...]:
        """The pauses made in this process, as they were planned and with the time at which work went on."""
        return tuple(self._pauses.made)

    def on_fit_start(self, _trainer: Trainer, _module: LightningModule) -> None:
        """Takes up the random states, for an epoch that is about to begin."""
        if self._random is not None and not self._mid_epoch:
            self._restore(_trainer)

    def on_train_start(self, trainer: Trainer, _module: LightningModule) -> None:
        """Begins to look ahead; within an epoch the loader's iterator, which drew from the random states, stands by now."""
        if self._random is not None:
            self._restore(trainer)
        self._global_step = trainer.global_step
        self._pending = None
        tracker = _tracker(trainer)
        self._pauses.open(_Strategy(trainer), tracker.account if tracker is not None else None)
        self._open = True

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Between two steps."""
        if not self._open or trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        try:
            pause = self._pauses.boundary(_steps_left(trainer))
        except Exception as error:  # rule 9
            self._give_up(error)
            return
        if pause is None or _Strategy(trainer).any(_stopping(trainer)):
            return
        if not self._leaves:
            self._wait(trainer, pause)
        elif trainer.is_last_batch or not _resumable(trainer):
            self._pending = pause
        else:
            self._leave(trainer, pause, mid_epoch=True)

    def on_train_epoch_start(self, trainer: Trainer, _module: LightningModule) -> None:
        """Leaves where it was to leave at the end of the epoch before."""
        pause, self._pending = self._pending, None
        if pause is None or not self._open or _Strategy(trainer).any(_stopping(trainer)):
            return
        late = self._pauses.now_unix_ns() >= pause.resume_unix_ns - (pause.resume_unix_ns - pause.stop_unix_ns) // 2
        if not _Strategy(trainer).told(late):  # more than half of it is over
            self._leave(trainer, pause, mid_epoch=False)

    def on_train_end(self, trainer: Trainer, _module: LightningModule) -> None:
        """The fit is done: removes what it left behind."""
        self._close()
        if trainer.is_global_zero:
            for name in self._files:
                with suppress(OSError):
                    _removed(Path(name))
        self._files = []

    def teardown(self, *_: Any, **_named: Any) -> None:
        """Looks no more."""
        self._close()

    def on_exception(self, *_: Any) -> None:
        """Looks no more."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: the files to be removed, and in one of its own the random states."""
        return {"files": list(self._files), "random": self._random, "mid_epoch": self._mid_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what a checkpoint held."""
        self._files = list(state_dict.get("files", ()))
        self._random, self._mid_epoch = state_dict.get("random"), bool(state_dict.get("mid_epoch"))

    def on_save_checkpoint(self, _trainer: Trainer, _module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lets a checkpoint saved where an epoch begins say that the one before, all of whose hooks have run, is ending.

        Only that does Lightning take up: from the beginning of an epoch it would skip to the next one (2.6.6).
        """
        if self._random is None or self._mid_epoch:
            return
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        for count in (epochs["total"], epochs["current"]):
            if not count["ready"] - 1 == count["started"] == count["completed"]:
                raise GreenTorchError(f"no checkpoint between epochs can be made of {epochs}, so the fit goes on")
            count["ready"] -= 1
            count["completed"] -= 1

    # How it is done.

    def _wait(self, trainer: Trainer, pause: Pause) -> None:
        _log.info("CarbonAwarePause: %s", described(pause))
        if self._saves:
            path = Path(trainer.default_root_dir, _IN_PLACE)
            self._note(path)
            try:
                self._save(trainer, path, mid_epoch=True)
            except Exception as error:  # rule 9: a full disk; without a checkpoint there is no pause
                if trainer.world_size > 1:
                    raise  # the other ranks may have saved theirs
                self._warnings(f"no pause, since no checkpoint could be saved: {type(error).__name__}: {error}")
                return
        with _phase(trainer):
            self._pauses.wait(pause, lambda: _stopping(trainer))

    def _leave(self, trainer: Trainer, pause: Pause, *, mid_epoch: bool) -> None:
        folder = Path(trainer.default_root_dir)
        path = _next_checkpoint(folder) if trainer.is_global_zero else folder
        path = Path(_Strategy(trainer).told(str(path)))
        self._note(path)
        self._note(folder / RESUME_FILE)
        try:
            self._save(trainer, path, mid_epoch=mid_epoch)
        except Exception as error:  # rule 9: without a checkpoint nobody leaves
            if trainer.world_size > 1:
                raise  # the other ranks may have saved theirs
            self._warnings(f"no pause, since no checkpoint could be saved: {type(error).__name__}: {error}")
            return
        if trainer.is_global_zero:
            leave_word(pause, folder)
            _log.warning(
                "CarbonAwarePause: %s. Leaving with exit code %d; the checkpoint is %s", described(pause), REQUEUE, path
            )
        self._pauses.leave(pause)
        raise SystemExit(REQUEUE)

    def _note(self, path: Path) -> None:
        if str(path.resolve()) not in self._files:
            self._files.append(str(path.resolve()))

    def _save(self, trainer: Trainer, path: Path, *, mid_epoch: bool) -> None:
        """Saves a checkpoint with the random states of all ranks in it."""
        self._random, self._mid_epoch = _gathered(trainer, _random_states()), mid_epoch
        try:
            trainer.save_checkpoint(path)
        finally:
            self._random = None

    def _restore(self, trainer: Trainer) -> None:
        states, self._random = self._random or [], None
        if len(states) != trainer.world_size:
            self._warnings(
                f"the checkpoint holds the random states of {len(states)} ranks and this fit has {trainer.world_size}: random numbers go on "
                "otherwise than they would have"
            )
            return
        try:
            _set_random_states(states[trainer.global_rank])
        except Exception as error:  # another torch, another numpy
            self._warnings(f"the random states could not be taken up: {type(error).__name__}: {error}")

    def _give_up(self, error: Exception) -> None:
        self._warnings(f"CarbonAwarePause is switched off: {type(error).__name__}: {error}")
        self._close()

    def _close(self) -> None:
        self._open = False
        self._pauses.close()


class _Strategy:
    """The ranks, by the trainer's strategy."""

    def __init__(self, trainer: Trainer) -> None:
        self._strategy = trainer.strategy
        self.leads = trainer.is_global_zero
        self.several = trainer.world_size > 1

    def told(self, value: T) -> T:
        """Broadcasts."""
        same: T = self._strategy.broadcast(value) if self.several else value
        return same

    def any(self, flag: bool) -> bool:
        """Reduces."""
        return bool(self._strategy.reduce_boolean_decision(flag, all=False)) if self.several else flag


def _stopping(trainer: Trainer) -> bool:
    return bool(trainer.should_stop or trainer.received_sigterm)


def _steps_left(trainer: Trainer) -> float | None:
    """Optimizer steps to come; ``None`` where the fit has no known end."""
    if len(trainer.optimizers) > 1:
        return None
    try:
        left = float(trainer.estimated_stepping_batches) - trainer.global_step
    except Exception:  # accumulation that changes with the epoch
        return None
    return max(0.0, left) if left != float("inf") else None


def _resumable(trainer: Trainer) -> bool:
    """Whether every train data loader can be taken up in mid-epoch."""
    loaders = torch.utils._pytree.tree_leaves(trainer.train_dataloader)  # noqa: SLF001 - torch's own way through nested containers
    return bool(loaders) and all(isinstance(one, _Stateful) for one in loaders)


def _phase(trainer: Trainer) -> AbstractContextManager[None]:
    """Phase ``paused`` of the monitor's run, if there is one."""
    tracker = _tracker(trainer)
    with suppress(GreenTorchError):
        if tracker is not None:
            return tracker.phase(Phase.PAUSED)
    return nullcontext()


def _tracker(trainer: Trainer) -> Tracker | None:
    """The run of a monitor beside it, if it measures anything."""
    for one in trainer.callbacks:  # type: ignore[attr-defined]  # declared nowhere
        if isinstance(one, GreenMonitor) and one.tracker is not None and one.tracker.enabled:
            return one.tracker
    return None


def _next_checkpoint(folder: Path) -> Path:
    """The next of the names by which Lightning finds a checkpoint when Slurm starts a job again."""
    numbers = [
        int(path.stem.rpartition("_")[2]) for path in folder.glob("hpc_ckpt_*.ckpt") if path.stem.rpartition("_")[2].isdigit()
    ]
    return folder / f"hpc_ckpt_{max(numbers, default=0) + 1}.ckpt"


def _removed(path: Path) -> None:
    if path.is_dir():  # a sharded checkpoint
        import shutil

        shutil.rmtree(path)
    else:
        path.unlink()


def _random_states() -> dict[str, Any]:
    """Of Python, numpy, torch and this rank's device, in types that ``torch.load(weights_only=True)`` takes."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - the state that users' code draws from
    version, internal, gauss_next = random.getstate()
    states: dict[str, Any] = {
        "python": [version, list(internal), gauss_next],
        "numpy": [name, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    version, internal, gauss_next = states["python"]
    name, keys, position, has_gauss, gauss = states["numpy"]
    random.setstate((version, tuple(internal), gauss_next))
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))  # noqa: NPY002 - likewise
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


def _gathered(trainer: Trainer, states: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of every rank, in order."""
    if trainer.world_size == 1:
        return [states]
    every: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(every, states)
    return every
