"""Lightning under its two names: ``lightning.pytorch`` and ``pytorch_lightning`` hold separate trees of the same classes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _installed() -> tuple[Any, ...]:
    found = []
    for name in _NAMES:
        try:
            found.append(import_module(name))
        except ImportError:
            continue
    if not found:
        raise ImportError("green_torch.lightning needs Lightning: pip install lightning")
    return tuple(found)


PACKAGES = _installed()

if TYPE_CHECKING:
    from pytorch_lightning import Callback as Callback  # noqa: PLC0414 - exported
else:  # at home in either package: their trainers ask for no common base
    Callback = type("Callback", tuple(package.Callback for package in PACKAGES), {})


def loggers(*names: str) -> tuple[type[Any], ...]:
    """The logger classes of these names, of each package."""
    return tuple(getattr(package.loggers, name) for package in PACKAGES for name in names)
