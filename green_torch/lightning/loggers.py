"""Where a trainer's values go: TensorBoard's writer, the run's directory, and every other logger through its ``log_metrics``.

Records come late and off the training thread, and loggers are called on it: a :class:`Mailbox` keeps the records until the next hook.
"""

from __future__ import annotations

import math
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from green_torch.errors import ArgumentError
from green_torch.lightning.packages import loggers
from green_torch.records import Item, Manifest, RunSummary, StepRecord
from green_torch.sinks.tensorboard import scalars, totals
from green_torch.units import ns_to_s, s_to_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pytorch_lightning import Trainer
    from torch.utils.tensorboard import SummaryWriter

    from green_torch.protocols import Clock, Sink

_KEPT = 1024  # rows that wait for a hook; the oldest go first, since later ones carry the run's totals
_SHARE = 0.02  # of the run's time, at most, for all calls of one logger
_ADVANCE_NS = s_to_ns(1.0)  # and this much before that is looked at
_TOO_LONG_S = 5.0  # a call that takes so long is the last one

_TENSORBOARD = loggers("TensorBoardLogger")
_ANY_STEP = loggers("TensorBoardLogger", "CSVLogger", "WandbLogger", "MLFlowLogger")  # take a step earlier than the last one


@dataclass(frozen=True, slots=True)
class Row:
    """What a record says under ``green/``, as far as it is known, and its step."""

    step: int
    values: dict[str, float]


class Mailbox:
    """A sink that keeps what the records say until it is asked for."""

    def __init__(self) -> None:
        self._manifest: Manifest | None = None
        self._rows: deque[Row] = deque(maxlen=_KEPT)
        self._last_step = 0

    def write(self, item: Item) -> None:
        """Keeps a record's row; at the end, with the other ranks' last words, their totals."""
        match item:
            case Manifest():
                self._manifest = item
            case StepRecord():
                self._last_step = item.step
                self._keep(scalars(item, self._manifest, detail=False))
            case RunSummary():
                self._keep(totals(item.job, item.job) if item.job is not None else ())

    def close(self) -> None:
        """Nothing is open."""

    def take(self) -> list[Row]:
        """The rows since the last time."""
        rows = []
        while self._rows:
            rows.append(self._rows.popleft())
        return rows

    def _keep(self, values: Iterable[tuple[str, float | None]]) -> None:
        known = {tag: value for tag, value in values if value is not None and math.isfinite(value)}
        if known:
            self._rows.append(Row(self._last_step, known))


def lent(sink: Sink) -> Sink:
    """A sink of the user's as one run sees it: written to, and not closed, since another run may follow. Named by the user's class."""
    methods = {"write": staticmethod(sink.write), "close": staticmethod(lambda: None)}
    own: Sink = type(type(sink).__name__, (), methods)()
    return own


class LoggerFeed:
    """Logs records' ``green/`` values to one logger, on the thread of the caller.

    A logger of Lightning's own that files values by the step they come with gets each record on its own step. Any other may demand
    that steps don't go back (as ``wandb.log(step=...)`` does): it gets the newest values, on the step of the last loss. All calls
    together take at most 2 % of the run's time, beyond which records are passed over (later ones carry the totals); a call that
    raises or takes more than 5 s is the last one.
    """

    def __init__(self, logger: Any, clock: Clock, warn: Callable[[str], None]) -> None:
        self._logger = logger
        self._name = type(logger).__name__
        self._clock = clock
        self._warn = warn
        self._any_step = isinstance(logger, _ANY_STEP)
        self._since_ns = clock.now_ns()
        self._spent_ns = 0
        self._off = False

    def log(self, rows: Sequence[Row], step: int, *, last: bool = False) -> None:
        """Logs them; ``step`` is that of the loss logged last, ``last`` tells that no more will come."""
        if not self._any_step:
            merged: dict[str, float] = {}
            for row in rows:
                merged |= row.values
            rows = [Row(max(step, rows[-1].step), merged)]
        for number, row in enumerate(rows, start=1):
            if self._affordable() or (last and number == len(rows)):
                self._log(row)

    def _affordable(self) -> bool:
        return self._spent_ns <= _ADVANCE_NS + _SHARE * (self._clock.now_ns() - self._since_ns)

    def _log(self, row: Row) -> None:
        if self._off:
            return
        begin_ns = self._clock.now_ns()
        try:
            self._logger.log_metrics(metrics=row.values, step=row.step)
        except Exception as error:  # rule 9
            self._off = True
            self._warn(f"{self._name} takes no values of green_torch: {type(error).__name__}: {error}. It gets no more of them")
            return
        took_ns = self._clock.now_ns() - begin_ns
        self._spent_ns += took_ns
        if ns_to_s(took_ns) > _TOO_LONG_S:
            self._off = True
            self._warn(f"{self._name} took {ns_to_s(took_ns):.1f} s for values of green_torch, and gets no more of them")


def writer(trainer: Trainer) -> SummaryWriter | None:
    """The writer of the trainer's first TensorBoard logger: on rank zero, in a fit."""
    board = _board(trainer)
    return board.experiment if board is not None and fitting(trainer) and trainer.is_global_zero else None


def others(trainer: Trainer) -> list[Any]:
    """The loggers that :func:`writer` does not reach: on rank zero, in a fit."""
    if not fitting(trainer) or not trainer.is_global_zero or _dry(trainer):
        return []
    board = _board(trainer)
    return [logger for logger in trainer.loggers if logger is not board]


def shows(trainer: Trainer) -> bool:
    """Whether there is a progress bar here: on rank zero, in a fit."""
    return fitting(trainer) and trainer.is_global_zero and trainer.progress_bar_callback is not None


def directory(trainer: Trainer) -> Path | None:
    """The run's directory: TensorBoard's, else the first logger's, where its checkpoints go too; ``None`` in a ``fast_dev_run``.

    What is no fit has a sub-directory of its own, named after it.

    Raises:
        ArgumentError: it is not a local one.
    """
    if _dry(trainer):
        return None
    board = _board(trainer)
    first = board if board is not None else next(iter(trainer.loggers), None)
    path = str(trainer.default_root_dir) if first is None else _directory_of(first, str(trainer.default_root_dir))
    if "://" in path:
        raise ArgumentError(f"{path} is not a local directory")
    return Path(path) if fitting(trainer) or trainer.state.fn is None else Path(path, trainer.state.fn.value)


def _directory_of(logger: Any, root: str) -> str:
    """As ``ModelCheckpoint`` finds it where a logger has no directory for each of its runs: by its name and version."""
    if isinstance(logger.log_dir, str):
        return logger.log_dir
    name, version = logger.name, logger.version
    parts = (name, version if version is None or isinstance(version, str) else f"version_{version}")
    return os.path.join(logger.save_dir or root, *(str(part) for part in parts if part is not None))  # noqa: PTH118 - may be a URL


def _board(trainer: Trainer) -> Any:
    return next((logger for logger in trainer.loggers if isinstance(logger, _TENSORBOARD)), None)


def fitting(trainer: Trainer) -> bool:
    """Whether the trainer runs a fit, evaluation within it included."""
    return trainer.state.fn is not None and trainer.state.fn.value == "fit"


def _dry(trainer: Trainer) -> bool:
    dry: bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # declared nowhere, set by the trainer's constructor
    return bool(dry)
