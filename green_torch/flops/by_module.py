"""The FLOPs of one training step by module and by operation, forward and backward told apart.

An operation belongs to the innermost module whose forward calls it, found on the Python stack; one of the backward belongs to the
module that made its node of the graph, found by the node's number in the order of making. Nothing is hooked or replaced.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from green_torch.flops.once import tally_of
from green_torch.flops.stack import in_backward
from green_torch.records import FlopCount

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from torch import nn

    from green_torch.flops.counter import Attention, Entry

_ENGINE = torch.autograd.graph._engine_run_backward.__code__  # noqa: SLF001 - only to know the frame when it is seen
_CALL = torch.nn.Module._call_impl.__code__  # noqa: SLF001 - as above
_node: Callable[[], Any] = getattr(torch._C, "_current_autograd_node", lambda: None)  # noqa: SLF001 - no public way; guarded
_next_number: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]  # noqa: SLF001 - no public way


@dataclass(frozen=True, slots=True)
class ModuleFlops:
    """FLOPs that one operation ran for one module itself, the modules inside it left out.

    ``module`` its name as ``named_modules()`` gives it ("" is the model), ``op`` as ``aten::mm``, ``dtype`` as ``mm/bfloat16``,
    ``backward`` whether autograd ran it (replays of checkpoints included), ``calls`` how often.
    """

    module: str
    op: str
    dtype: str
    backward: bool
    calls: int
    model_flops: float
    hardware_flops: float
    recompute_flops: float


@dataclass(frozen=True, slots=True)
class FlopTable:
    """A step's FLOPs and their parts; the ``rows``, in the order in which they first ran, sum to the ``total`` exactly."""

    total: FlopCount
    rows: tuple[ModuleFlops, ...]


def count_by_module(model: nn.Module, *args: Any, attention: Attention = "full", **kwargs: Any) -> FlopTable:
    """FLOPs of one training step as :func:`count_flops` counts it, by module and by operation.

    What runs outside of any module's forward (a loss function) belongs to the model itself.

    Raises:
        ArgumentError: ``model`` is not a module, or ``attention`` neither "full" nor "causal".
        CountingError: the model can't run on these inputs; the message names the cause.
    """
    tally = tally_of(model, args, kwargs, attention=attention, locator=_Modules())
    groups: dict[tuple[str, str, str, bool], list[Entry]] = {}
    for entry in tally.entries:
        name, _, when = entry.place.partition(":")
        groups.setdefault((name, entry.op, f"{entry.kind}/{entry.dtype}", when == "backward"), []).append(entry)
    rows = tuple(
        ModuleFlops(
            *key,
            len(entries),
            float(sum(entry.model_flops for entry in entries)),
            float(sum(entry.cost.hardware for entry in entries)),
            float(sum(entry.recompute_flops for entry in entries)),
        )
        for key, entries in groups.items()
    )
    return FlopTable(tally.count(), rows)


class _Modules:
    """Where in a model an operation belongs."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._numbers: list[int] = []  # of the nodes that were made just before an operation ran, rising, and whose they are
        self._makers: list[str] = []

    def watch(self, replica: nn.Module) -> Callable[[], str]:
        """Begins anew on this copy."""
        self._names = {id(module): name for name, module in replica.named_modules()}
        self._numbers, self._makers = [], []
        return self._where

    def _where(self) -> str:
        """``name:backward`` or ``name:forward``."""
        backward = in_backward()
        name = self._caller()
        if name is None:
            node = _node() if backward else None
            name = "" if node is None else self._maker(node._sequence_nr())  # noqa: SLF001 - no public way
        number = _next_number() - 1
        if not self._numbers or number > self._numbers[-1]:
            self._numbers.append(number)
            self._makers.append(name)
        return f"{name}:{'backward' if backward else 'forward'}"

    def _caller(self) -> str | None:
        """The innermost module on the stack, up to where autograd's engine was called."""
        frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the documented way to the stack
        while frame is not None and frame.f_code is not _ENGINE:
            if frame.f_code is _CALL:
                name = self._names.get(id(frame.f_locals.get("self")))
                if name is not None:
                    return name
            frame = frame.f_back
        return None

    def _maker(self, number: int) -> str:
        """Whose node it is: the next operation that ran after the node was made was its own."""
        index = bisect_right(self._numbers, number - 1)
        return self._makers[min(index, len(self._makers) - 1)] if self._makers else ""
