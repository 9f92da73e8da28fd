"""Watches how hot the GPUs in use are, how fast they are clocked, what holds them back, and their memory's traffic, while a block runs."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from green_torch.meters.nvml import NvmlMeter, open_meters
from green_torch.totals import whole_sum

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

LOOK_EVERY_S = 0.5


class Watch:
    """Asks NVML between steps, at most every :data:`LOOK_EVERY_S`: steps are queued ahead, so that the GPU is at work meanwhile."""

    def __init__(self, meters: Sequence[NvmlMeter], now_s: Callable[[], float] = time.monotonic) -> None:
        self._meters = meters
        self._now_s = now_s
        self._traffic = [meter.memory_traffic() for meter in meters]
        self.begin()

    def begin(self) -> None:
        """Forgets everything: a block begins."""
        self._due_s = -math.inf
        self._temperatures_c: list[float] = []
        self._clocks_mhz: list[float] = []
        self._reasons: set[str] = set()
        for traffic in self._traffic:
            traffic.begin()

    def look(self) -> None:
        """Asks, if it is time to."""
        if not self._meters or self._now_s() < self._due_s:
            return
        self._due_s = self._now_s() + LOOK_EVERY_S
        for meter in self._meters:
            told = meter.conditions()
            self._temperatures_c += [] if told.temperature_c is None else [told.temperature_c]
            self._clocks_mhz += [] if told.sm_clock_mhz is None else [told.sm_clock_mhz]
            self._reasons.update(told.throttle_reasons or ())

    def told(self) -> dict[str, Any]:
        """Since the beginning, named as in a ``Block``: the highest temperature, the mean clock, every reason to throttle, bytes (once)."""
        return {
            "temperature_c": max(self._temperatures_c, default=None),
            "sm_clock_mhz": math.fsum(self._clocks_mhz) / len(self._clocks_mhz) if self._clocks_mhz else None,
            "throttled": tuple(sorted(self._reasons)),
            "memory_traffic_bytes": whole_sum([traffic.end() for traffic in self._traffic]),
        }


def watch(track: Mapping[str, Any], device: torch.device) -> Watch:
    """Watches the GPUs among the meters that ``track`` is given, else the one that the model is on, where NVML knows it."""
    given = track.get("meters")
    if given is not None:
        return Watch([meter for meter in given if isinstance(meter, NvmlMeter)])
    return Watch(open_meters(local_rank=device.index or 0)[0] if device.type == "cuda" else ())
