"""When things happen: the host's clock, and the instants at which step boundaries pass on a device."""

from __future__ import annotations

from green_torch.clock.boundaries import Boundaries, cuda_in_use
from green_torch.clock.device import DeviceMarker
from green_torch.clock.host import HostClock

__all__ = ["Boundaries", "DeviceMarker", "HostClock", "cuda_in_use"]
