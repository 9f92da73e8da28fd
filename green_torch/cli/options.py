"""What commands have in common: a share as people type it, and errors of the library that name options in place of Python arguments."""

from __future__ import annotations

import math
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from green_torch.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def share(text: str) -> float:
    """What "5%" and "0.05" mean, 0.05; NaN where it is no number."""
    number = text.strip().removesuffix("%")
    try:
        return float(number) / (100 if number != text.strip() else 1)
    except ValueError:
        return math.nan


def in_options(text: str, options: Mapping[str, str]) -> str:
    """The text with each pattern (a regular expression) replaced."""
    for pattern, option in options.items():
        text = re.sub(pattern, option, text)
    return text


@contextmanager
def options_named(options: Mapping[str, str]) -> Iterator[None]:
    """Argument errors from within say what :func:`in_options` makes of their messages."""
    try:
        yield
    except ArgumentError as error:
        raise type(error)(in_options(str(error), options)) from error
