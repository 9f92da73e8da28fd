"""What adapters to a trainer share: hooks that can do no harm, phases that one hook opens and another closes, what users say of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol

from green_torch.records import Work

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from green_torch.records import Phase
    from green_torch.tracker import Tracker


class Adapter(Protocol):
    """What :func:`harmless` asks of a class."""

    _open: bool

    def _give_up(self, error: Exception) -> None: ...


def harmless(hook: Callable[..., None]) -> Callable[..., None]:
    """Lets a hook act only while a run is open, and an error in it end our measuring, not the training."""

    @wraps(hook)
    def guarded(self: Adapter, *args: Any, **kwargs: Any) -> None:
        if self._open:
            try:
                hook(self, *args, **kwargs)
            except Exception as error:  # rule 9
                self._give_up(error)

    return guarded


class OpenPhases:
    """Phases of a run that hooks open and close; each is open once at most."""

    def __init__(self) -> None:
        self._open: dict[Phase, AbstractContextManager[None]] = {}

    def __contains__(self, name: Phase) -> bool:
        return name in self._open

    def enter(self, tracker: Tracker, name: Phase) -> bool:
        """Opens a phase; false where it is open already."""
        if name in self._open:
            return False
        phase = tracker.phase(name)
        phase.__enter__()
        self._open[name] = phase
        return True

    def leave(self, name: Phase) -> None:
        """Closes a phase, if it is open."""
        phase = self._open.pop(name, None)
        if phase is not None:
            phase.__exit__(None, None, None)

    def leave_all(self) -> None:
        """Closes those that an exception left open, the last first; the tracker has ended them by then."""
        while self._open:
            self._open.popitem()[1].__exit__(None, None, None)


def said_of(batch: Any, name: str, function: Callable[[Any], Any], otherwise: Any, warn: Callable[[str], None]) -> Any:
    """What a function of the user's, given as ``name=``, says of a batch; where it fails, ``otherwise`` with a warning."""
    try:
        value = function(batch)
        if isinstance(value, Mapping if name == "units" else int | float):
            return value
        problem = f"it returned {value!r}"
    except Exception as error:  # rule 9
        problem = f"{type(error).__name__}: {error}"
    warn(f"{name}= gives nothing for a batch: {problem}")
    return otherwise


def work_of(batch: Any, units: Callable[[Any], Mapping[str, int]], warn: Callable[[str], None]) -> Work:
    """One (micro-)batch's work, its units by the user's function or ours."""
    said = said_of(batch, "units", units, {}, warn)
    return Work(1, said.get("samples"), said.get("tokens"))
