"""Step boundaries wherever the run is: on the host, and on the device from the moment that it is in use."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from green_torch.clock.device import DeviceMarker

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from green_torch.clock.device import DeviceEvents
    from green_torch.records import Instant


class Boundaries:
    """Marks boundaries on the training thread; what they come to may be asked from any.

    ``may_use_device``: CUDA events are taken once CUDA is in use, of the device that ``device`` tells then (the model's; ``None``, or
    one that is none of CUDA's: the current one). A device that fails is left, with one warning, for the host's clock.
    """

    def __init__(
        self,
        now_ns: Callable[[], int],
        warn: Callable[..., None],
        *,
        may_use_device: bool,
        device: Callable[[], torch.device | None] = lambda: None,
    ) -> None:
        self._now_ns = now_ns
        self._warn = warn
        self._where = device
        self._may_use_device = may_use_device and _device_possible()
        self._device: DeviceMarker | None = None

    @property
    def on_device(self) -> bool:
        """Whether boundaries are a device's: one has come into use, and was not left for the host's clock."""
        return self._device is not None and not self._device.abandoned

    def use(self, events: DeviceEvents) -> None:
        """Takes boundaries on a device from now on."""
        self._device = DeviceMarker(events, self._now_ns)
        self._may_use_device = False

    @property
    def marker(self) -> Callable[[], int]:
        """The shortest way to :meth:`mark`: the host's clock itself where no device can come into use any more."""
        return self._now_ns if self._device is None and not self._may_use_device else self.mark

    def mark(self) -> int:
        """A boundary, now on the host; on a device, when its queue gets there. The nanoseconds are its key in :meth:`resolve`."""
        if self._may_use_device and cuda_in_use():
            self._use_cuda()
        device = self._device
        if device is None:
            return self._now_ns()
        try:
            return device.mark()
        except Exception as error:  # rule 9; the second try is the host's
            self._leave(device, error)
            return device.mark()

    def advance(self) -> None:
        """Looks, without waiting, how far the device has come (training thread; :meth:`mark` does so too)."""
        if self._device is not None:
            try:
                self._device.advance()
            except Exception as error:  # rule 9
                self._leave(self._device, error)

    def resolve(self, mark: Instant) -> Instant | None:
        """When a boundary passed; ``None`` while the device has not been seen to pass it."""
        return mark if self._device is None else self._device.resolve(mark.at_ns)

    def prune(self, before_ns: int, needed: Callable[[], set[int]]) -> None:
        """Forgets what earlier boundaries came to, but for those that are needed, when there are many."""
        if self._device is not None:
            self._device.prune(before_ns, needed)

    def abandon(self) -> None:
        """Gives up on a device that does not get there (training thread)."""
        if self._device is not None:
            self._device.abandon()

    def _use_cuda(self) -> None:
        try:
            from green_torch.clock.cuda import CudaEvents, capturing

            if not capturing():  # else at a later boundary
                self.use(CudaEvents(self._where()))
        except Exception as error:  # rule 9
            self._may_use_device = False
            self._warn(f"step boundaries are taken on the host, since CUDA events can't be used: {error}", key="events")

    def _leave(self, device: DeviceMarker, error: Exception) -> None:
        self._warn(f"step boundaries are taken on the host from now on, since the device failed: {error}", key="events")
        device.abandon()


def cuda_in_use() -> bool:
    """Whether this process has initialised CUDA (or ROCm, which answers to that name)."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def _device_possible() -> bool:
    """False where torch is loaded and was built for the CPU alone; asks no driver."""
    torch = sys.modules.get("torch")
    return torch is None or bool(torch.backends.cuda.is_built())
