"""When things happen: the host's clock, and the instants at which step boundaries pass on a device."""

from __future__ import annotations

from green_torch.clock.device import DeviceMarker, HostMarker
from green_torch.clock.host import HostClock

__all__ = ["DeviceMarker", "HostClock", "HostMarker"]
