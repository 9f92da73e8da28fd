"""Energy, efficiency and carbon of PyTorch training, measured step by step.

``with green_torch.track(model) as tracker: ... tracker.step(tokens=n)`` around a loop, ``green_torch.lightning.GreenMonitor`` as
a callback, TensorBoard for the result. Importing this package imports neither torch nor any optional package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from green_torch.errors import GreenTorchError, GreenTorchWarning
    from green_torch.flops import count_flops
    from green_torch.peaks import peak_flops
    from green_torch.records import DevicePeak, Embodied, FlopCount, IntensityPoint, RunSummary, StepRecord
    from green_torch.tracker import Tracker, track

__version__ = "0.1.0"

_HOME = {
    "DevicePeak": "records",
    "Embodied": "records",
    "FlopCount": "records",
    "GreenTorchError": "errors",
    "GreenTorchWarning": "errors",
    "IntensityPoint": "records",
    "RunSummary": "records",
    "StepRecord": "records",
    "Tracker": "tracker",
    "count_flops": "flops",
    "peak_flops": "peaks",
    "track": "tracker",
}

__all__ = [
    "DevicePeak",
    "Embodied",
    "FlopCount",
    "GreenTorchError",
    "GreenTorchWarning",
    "IntensityPoint",
    "RunSummary",
    "StepRecord",
    "Tracker",
    "count_flops",
    "peak_flops",
    "track",
]


def __getattr__(name: str) -> object:
    """Loads a public name from its module on first use (PEP 562)."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'green_torch' has no attribute {name!r}")
    value = getattr(import_module(f"green_torch.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
