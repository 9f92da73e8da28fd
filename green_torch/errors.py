"""The exception tree.

::

    GreenTorchError
    ├── ArgumentError (ValueError)      a wrong argument; raised at construction, before training
    │   └── UnknownRegionError          a region that no table knows; names the nearest
    ├── UsageError (RuntimeError)       a call in the wrong place: step() outside the context, a nested track()
    ├── MeterError                      a meter can't be opened or read
    ├── CountingError                   a model's FLOPs can't be counted
    ├── IntensityError                  a grid's carbon intensity can't be had
    └── LedgerError                     a run directory can't be read

    GreenTorchWarning (UserWarning)     said once per cause, while training goes on

A message says what happened, why, and the line to type.
"""

from __future__ import annotations


class GreenTorchError(Exception):
    """Root of everything that this package raises."""


class ArgumentError(GreenTorchError, ValueError):
    """An argument is wrong; raised before training begins."""


class UnknownRegionError(ArgumentError):
    """No table knows this region; the message names the nearest ones."""


class UsageError(GreenTorchError, RuntimeError):
    """A call in the wrong place or order."""


class MeterError(GreenTorchError):
    """A meter can't be opened or read; the message says why and what mends it."""


class CountingError(GreenTorchError):
    """The FLOPs of this model can't be counted; the message says which operation stands in the way."""


class IntensityError(GreenTorchError):
    """A grid's carbon intensity can't be had; the message says why and what mends it, and never holds a credential.

    ``final``: asking again in this run won't help. ``retry_after_s``: how long the server wants to be left alone.
    """

    def __init__(self, message: str, *, final: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.final = final
        self.retry_after_s = retry_after_s


class LedgerError(GreenTorchError):
    """A run directory or file can't be read as one of ours."""


class GreenTorchWarning(UserWarning):
    """Something is missing or uncertain in the numbers; training is not affected."""
