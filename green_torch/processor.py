"""What the CPU at hand is called and which matrix instructions it has, as far as the system tells."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

ARCHITECTURES = frozenset({"x86_64", "AMD64", "aarch64", "arm64", "arm", "i386", "ppc64le"})
"""What some systems call their processor: no name, since many share it."""

_CPUINFO = Path("/proc/cpuinfo")
_INSTRUCTIONS = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX512"}  # by Linux's flag, the widest first


@lru_cache(maxsize=8)
def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """The CPU's name as Linux tells it ("AMD EPYC 9654 96-Core Processor"), else what Python knows: its architecture, maybe."""
    return _first(cpuinfo, "model name") or platform.processor() or platform.machine() or "CPU"


@lru_cache(maxsize=8)
def instructions(cpuinfo: Path = _CPUINFO) -> str:
    """The widest matrix instructions that the CPU has beyond AVX2; empty where it has none or Linux doesn't tell.

    Virtual machines of one name differ in them.
    """
    flags = _first(cpuinfo, "flags").split()
    return next((name for flag, name in _INSTRUCTIONS.items() if flag in flags), "")


def _first(cpuinfo: Path, key: str) -> str:
    """The first value of a key that has one; empty where there is none."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((value for line in lines if line.startswith(key) and (value := line.partition(":")[2].strip())), "")
