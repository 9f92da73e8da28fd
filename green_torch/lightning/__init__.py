"""Callbacks for ``lightning.pytorch`` and ``pytorch_lightning``: ``GreenMonitor`` measures, ``CarbonAwarePause`` waits for a cleaner grid.

::

    trainer = Trainer(callbacks=[GreenMonitor(region="FR")])
"""

from __future__ import annotations

from green_torch.lightning.monitor import GreenMonitor
from green_torch.lightning.pause import CarbonAwarePause

__all__ = ["CarbonAwarePause", "GreenMonitor"]
