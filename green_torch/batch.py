"""What a batch holds, found without being told: samples and tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

_DEPTH = 4  # how deep a batch is searched for its first tensor


def found_units(batch: Any) -> dict[str, int]:
    """Samples: the first tensor's first dimension. Tokens: the elements of ``input_ids``, where the batch has them."""
    units = {}
    first = _first_tensor(batch, _DEPTH)
    if first is not None:
        units["samples"] = first.shape[0]
    if isinstance(batch, Mapping) and isinstance(ids := batch.get("input_ids"), torch.Tensor):
        units["tokens"] = ids.numel()
    return units


def _first_tensor(value: Any, depth: int) -> torch.Tensor | None:
    """The first tensor with a dimension in nested mappings, sequences and dataclasses."""
    if isinstance(value, torch.Tensor):
        return value if value.dim() else None
    parts: Iterable[Any] = ()
    if depth and isinstance(value, Mapping):
        parts = value.values()
    elif depth and isinstance(value, list | tuple):
        parts = value
    elif depth and is_dataclass(value):
        parts = (getattr(value, field.name) for field in fields(value))
    return next((found for part in parts if (found := _first_tensor(part, depth - 1)) is not None), None)
