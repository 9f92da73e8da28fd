"""What goes between an NVIDIA GPU and its memory, by the driver's GPM counters (Hopper and later).

NVML: https://docs.nvidia.com/deploy/nvml-api/group__nvmlGpmFunctions.html. The counters tell the mean share of the memory's bandwidth
between two samples, which must lie 100 ms apart; the bandwidth is two transfers a clock over the whole bus, at the highest memory clock.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pynvml

from green_torch.units import BITS_PER_BYTE, HZ_PER_MHZ, ns_to_s

if TYPE_CHECKING:
    from collections.abc import Callable

_LEAST_S = 0.1  # NVML's, between two samples
_FAILURES = (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError, AttributeError)  # the last: a pynvml that has no GPM


class MemoryTraffic:
    """Bytes between a GPU, found by its UUID, and its memory, other processes' included; NVML must be open. Raises nothing."""

    def __init__(self, uuid: str, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._uuid = uuid
        self._now_ns = now_ns
        self._first: tuple[int, Any] | None = None  # when, and the sample

    def begin(self) -> None:
        """Counts anew from here."""
        self._free()
        with suppress(*_FAILURES):
            handle = pynvml.nvmlDeviceGetHandleByUUID(self._uuid)
            if pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
                sample = pynvml.nvmlGpmSampleAlloc()
                begin_ns = self._now_ns()
                try:
                    pynvml.nvmlGpmSampleGet(handle, sample)
                except _FAILURES:
                    self._free(sample)  # nothing is in it: the driver must never be asked about it
                else:
                    self._first = begin_ns, sample

    def end(self) -> float | None:
        """Bytes since the beginning, once; ``None`` where the GPU doesn't tell, or too little time has passed."""
        if self._first is None:
            return None
        begin_ns, first = self._first
        second = None
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(self._uuid)
            second = pynvml.nvmlGpmSampleAlloc()
            pynvml.nvmlGpmSampleGet(handle, second)
            duration_s = ns_to_s(self._now_ns() - begin_ns)
            share = _share(first, second)
            return None if share is None or duration_s < _LEAST_S else share * _bandwidth(handle) * duration_s
        except _FAILURES:
            return None
        finally:
            self._free(second)

    def _free(self, other: Any = None) -> None:
        samples = [sample for sample in (self._first and self._first[1], other) if sample is not None]
        self._first = None
        for sample in samples:
            with suppress(*_FAILURES):
                pynvml.nvmlGpmSampleFree(sample)


def _share(first: Any, second: Any) -> float | None:
    """Of the memory's bandwidth, 0-1, that was used between two samples."""
    asked = pynvml.c_nvmlGpmMetricsGet_t()
    asked.version, asked.numMetrics = pynvml.NVML_GPM_METRICS_GET_VERSION, 1
    asked.sample1, asked.sample2 = first, second
    asked.metrics[0].metricId = pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL
    told = pynvml.nvmlGpmMetricsGet(asked).metrics[0]
    return told.value / 100 if told.nvmlReturn == pynvml.NVML_SUCCESS and told.value >= 0 else None


def _bandwidth(handle: Any) -> float:
    """Bytes a second."""
    clock_mhz = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM)
    return float(2 * clock_mhz * HZ_PER_MHZ * pynvml.nvmlDeviceGetMemoryBusWidth(handle) / BITS_PER_BYTE)
