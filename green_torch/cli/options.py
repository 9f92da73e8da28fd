"""Errors of the library in the words of a command: its options where a message names Python arguments."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from green_torch.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


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
