"""The CUDA calls behind :class:`green_torch.clock.device.DeviceMarker`; ROCm answers to the same names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from typing import Any


def capturing() -> bool:
    """Whether a graph is being captured: what is done now would enter it, or end it."""
    return torch.cuda.is_current_stream_capturing()


class CudaEvents:
    """Timing events of one device, used over and over. Nothing is recorded or asked while a graph is being captured.

    ``device``: the model's; where that is unknown or none of CUDA's, the current one is taken. Make it while nothing is captured.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        index = device.index if device is not None and device.type == "cuda" else None
        self._device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        # The first stream of a device makes torch's whole pool, for milliseconds: not between an anchor's looks at the host's clock.
        self._aside = torch.cuda.Stream(self._device, priority=-1)
        first = torch.cuda.Event(enable_timing=True)
        first.record(self._aside)
        self._free = [first]

    def record(self, *, aside: bool) -> object | None:
        """Records an event on the device's current stream, or on a side stream of our own."""
        if capturing():
            return None
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(self._aside if aside else torch.cuda.current_stream(self._device))
        return event

    def done(self, event: Any) -> bool:
        """Asks without waiting; "not yet" while a graph is being captured, since asking then would end the capture."""
        return not capturing() and bool(event.query())

    def elapsed_ms(self, first: Any, second: Any) -> float:
        """Milliseconds between two events that are done."""
        return float(first.elapsed_time(second))

    def release(self, event: Any) -> None:
        """Takes an event back for the next boundary."""
        self._free.append(event)
