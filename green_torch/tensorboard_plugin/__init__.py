"""The Green tab of TensorBoard: the entry point that TensorBoard loads in every process of its own.

An exception here would end TensorBoard for everybody who has green_torch installed, so nothing that can fail happens at import, and a
tab that can't be made is left out with one line in TensorBoard's log.
"""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["GreenLoader"]

try:
    from tensorboard.plugins.base_plugin import TBLoader  # type: ignore[import-untyped]  # tensorboard ships no types
except Exception:  # no TensorBoard that we know: whoever loads this then has none to break
    TBLoader = object


class GreenLoader(TBLoader):  # type: ignore[misc]  # tensorboard ships no types
    """Makes the tab when TensorBoard starts."""

    def load(self, context: Any) -> Any:
        """The plugin, or ``None`` (no tab) where it can't be made."""
        try:
            from green_torch.tensorboard_plugin.plugin import GreenPlugin

            return GreenPlugin(context)
        except Exception as error:
            logging.getLogger("tensorboard").warning("the Green tab is left out: %s: %s", type(error).__name__, error)
            return None
