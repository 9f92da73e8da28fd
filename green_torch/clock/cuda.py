"""The CUDA calls behind :class:`green_torch.clock.device.DeviceMarker`; ROCm answers to the same names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from typing import Any


class CudaEvents:
    """Timing events of the current device, used over and over. Nothing is recorded or asked while a graph is being captured."""

    def __init__(self) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._aside: torch.cuda.Stream | None = None
        self._free: list[torch.cuda.Event] = []

    def record(self, *, aside: bool) -> object | None:
        """Records an event on the current stream, or on a side stream of our own."""
        if torch.cuda.is_current_stream_capturing():
            return None
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        if aside:
            if self._aside is None:
                self._aside = torch.cuda.Stream(self._device, priority=-1)
            event.record(self._aside)
        else:
            event.record(torch.cuda.current_stream(self._device))
        return event

    def done(self, event: Any) -> bool:
        """Asks without waiting; "not yet" while a graph is being captured, since asking then would end the capture."""
        return not torch.cuda.is_current_stream_capturing() and bool(event.query())

    def elapsed_ms(self, first: Any, second: Any) -> float:
        """Milliseconds between two events that are done."""
        return float(first.elapsed_time(second))

    def release(self, event: Any) -> None:
        """Takes an event back for the next boundary."""
        self._free.append(event)
