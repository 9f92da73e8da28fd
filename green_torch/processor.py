"""What the CPU at hand is called, as far as the system tells."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

ARCHITECTURES = frozenset({"x86_64", "AMD64", "aarch64", "arm64", "arm", "i386", "ppc64le"})
"""What some systems call their processor: no name, since many share it."""


@lru_cache(maxsize=8)
def cpu_name(cpuinfo: str | Path = "/proc/cpuinfo") -> str:
    """The CPU's name as Linux tells it ("AMD EPYC 9654 96-Core Processor"), else what Python knows: its architecture, maybe."""
    with suppress(OSError):
        for line in Path(cpuinfo).read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name") and (name := line.partition(":")[2].strip()):
                return name
    return platform.processor() or platform.machine() or "CPU"
