"""Sees what runs in a step, and by which attention kernels: the operations that torch dispatches, from compiled code too."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_PREFIX = "aten::_scaled_dot_product_"
_NAMES = {
    "attention_math": "math",
    "attention_math_for_mps": "math",
    "flash_attention": "flash",
    "flash_attention_for_cpu": "flash",
    "efficient_attention": "efficient",
    "cudnn_attention": "cudnn",
}


@dataclass(frozen=True, slots=True)
class Seen:
    """How often each operation ran, by name; nothing where nobody could look."""

    operations: Counter[str] = field(default_factory=Counter)

    @property
    def kernels(self) -> tuple[str, ...]:
        """The attention kernels among them, in order of name; one that is not known stands under torch's own name."""
        forward = {name.removeprefix(_PREFIX) for name in self.operations if name.startswith(_PREFIX)}
        return tuple(sorted({_NAMES.get(part, part) for part in forward if not part.endswith("_backward")}))

    def __str__(self) -> str:
        """Their number, and a short digest of names and counts: equal where the same operations ran."""
        digest = hashlib.sha256(repr(sorted(self.operations.items())).encode()).hexdigest()[:12]
        return f"{self.operations.total()} operations ({digest})"


@contextmanager
def seen() -> Iterator[Seen]:
    """What runs within, known once the context is left.

    Uses torch's profiler on the host side alone, which leaves the device as it is; it costs about a third of a step (measured on a CPU).
    Where the profiler can't run (another one is on), nothing is seen.
    """
    from torch.profiler import ProfilerActivity, profile

    found = Seen()
    profiler = profile(activities=[ProfilerActivity.CPU])
    running = False
    with _quiet(), suppress(RuntimeError):
        profiler.start()
        running = True
    try:
        yield found
    finally:
        if running:
            with _quiet(), suppress(RuntimeError):
                profiler.stop()
                found.operations.update(_ours(event.name for event in profiler.events() or ()))


def _ours(names: Iterable[str]) -> Iterator[str]:
    """Operations and compiled graphs; not the profiler's other marks."""
    return (name for name in names if name.startswith(("aten::", "## Call CompiledFxGraph")))


@contextmanager
def _quiet() -> Iterator[None]:
    """Drops what the profiler writes to standard error as it starts and stops."""
    try:
        kept = os.dup(2)
    except OSError:  # standard error is closed: there is nothing to drop
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  (a path to nowhere)
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
