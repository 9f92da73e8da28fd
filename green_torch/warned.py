"""Says each thing once, as a warning, and keeps it for the summary; never raises."""

from __future__ import annotations

import logging
import warnings

from green_torch.errors import GreenTorchWarning

_MOST_WARNINGS = 100  # of different kinds, in a run


class Warnings:
    """Says each thing once, as a :class:`GreenTorchWarning`, and never raises: not even under ``-W error``."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}  # key -> text

    @property
    def said(self) -> tuple[str, ...]:
        """Everything so far, in order."""
        return tuple(self._said.values())

    def note(self, text: str) -> None:
        """For the summary alone."""
        self._said[text] = text

    def __call__(self, text: str, *, key: str = "") -> None:
        """``key``: what makes two warnings one, where their texts vary."""
        key = key or text
        if key in self._said or len(self._said) >= _MOST_WARNINGS:
            return
        self._said[key] = text
        try:
            warnings.warn(text, GreenTorchWarning, stacklevel=4)
        except Exception:  # -W error, or a hook of the user's
            logging.getLogger("green_torch").warning(text)
