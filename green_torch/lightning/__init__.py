"""Callbacks for ``lightning.pytorch`` and ``pytorch_lightning``: ``GreenMonitor`` measures what ``track()`` measures.

::

    trainer = Trainer(callbacks=[GreenMonitor(region="FR")])
"""

from __future__ import annotations

from green_torch.lightning.monitor import GreenMonitor

__all__ = ["GreenMonitor"]
