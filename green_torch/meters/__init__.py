"""Cumulative energy of devices: ``nvml`` (GPUs), ``rapl`` (CPU, memory), ``codecarbon`` (estimates of both), found by :func:`discover`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from green_torch.protocols import Meter
from green_torch.records import kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    Opened = tuple[Sequence[Meter], Sequence[str]]

__all__ = ["NODE_UNKNOWN", "ONCE_PER_NODE", "Found", "discover"]

ONCE_PER_NODE = "cpu, dram: counted once for the node, by its local rank 0"
NODE_UNKNOWN = (
    "cpu, dram: not counted but on rank 0's node, since nothing tells which process is the first of another; "
    "start with torchrun or srun, or set LOCAL_RANK"
)


@dataclass(frozen=True, slots=True)
class Found:
    """The meters of this machine, and what was looked for in vain: each entry says what, why, and what mends it."""

    meters: tuple[Meter, ...]
    missing: tuple[str, ...]


def discover(*, local_rank: int | None = None, node: bool = True, rapl_root: str | Path = "/sys/class/powercap") -> Found:
    """Opens every meter that this machine has: a GPU's counter, RAPL, and codecarbon's estimates for what RAPL leaves open.

    Never raises; takes up to 2 s (codecarbon). ``local_rank`` narrows the GPUs to this rank's own (-1: which is not known, so that only a
    GPU that is visible alone is taken). Without ``node``, what a node has once (CPU, memory) is left out.
    """

    def gpus() -> Opened:
        from green_torch.meters.nvml import open_meters

        return open_meters(local_rank=local_rank)

    def counters() -> Opened:
        from green_torch.meters.rapl import open_meters

        return open_meters(rapl_root)

    def estimates() -> Opened:
        from green_torch.meters.codecarbon import open_meters

        counted = {kind_of(domain.name) for meter in meters for domain in meter.domains}
        return open_meters(cpu="cpu" not in counted, ram="dram" not in counted)

    meters: list[Meter] = []
    missing: list[str] = []
    wanted = [("gpu", gpus)]
    if node:
        wanted += [("cpu, dram counters", counters), ("cpu, dram estimates", estimates)]
    for what, opening in wanted:
        found, reasons = _attempt(what, opening)
        meters += found
        missing += reasons
    return Found(tuple(meters), tuple(missing))


def _attempt(what: str, opening: Callable[[], Opened]) -> Opened:
    try:
        return opening()
    except Exception as error:  # a driver or its binding may fail in any way: the run goes on without it
        return [], [f"{what}: {type(error).__name__}: {error}"]
