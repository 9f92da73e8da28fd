"""CPU package and memory energy from RAPL's counters, as Linux serves them under ``/sys/class/powercap`` (Intel, and AMD since 5.8).

One domain per package (``cpu``; ``cpu0``, ``cpu1`` where there are several) and one per memory zone (``dram``). ``core`` and ``uncore`` are
parts of the package, ``psys`` holds it: none of them is added. The ``intel-rapl-mmio`` tree shows the same packages again and is
left out, and so is a die whose counter mirrors its package's first one (AMD on some kernels).

The counters wrap at ``max_energy_range_uj`` (262 kJ on most machines: 15 minutes at 300 W). A fall is taken for one wrap; where
one wrap would need more power than the package can draw, it is a reset (the machine slept) and the reading goes back, which the
sampler flags. Several wraps between two readings can't be told from one: a process stopped for longer than a wrap loses them.

Bounds need a limit on the power: the highest of the zone's long- and short-term limits and their maxima. AMD shows none, nor do
many memory zones; ``power_limit_w`` is then ``None``.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from green_torch.errors import MeterError
from green_torch.processor import cpu_name
from green_torch.records import Domain, Method, Reading
from green_torch.units import J_PER_UJ, ns_to_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from green_torch.protocols import Meter

_ZONE = re.compile(r"intel-rapl:(\d+)(?::(\d+))?")
_COUNTS = 2**32 - 1  # the counters are 32 bits wide, so the range over this is one count's energy
_PERIOD_S = 1e-3  # about 1 ms, says Intel's SDM, vol. 3B, "RAPL Interfaces"
_MIRROR_UJ = 100_000  # two dies of a package this close have one counter: 0.1 J of 262 kJ
_MOST_OVER_LIMIT = 3.0  # more than this over the limit is not power but a counter that was reset
_SLACK_J = 1.0
_MEND = (
    "type sudo chmod a+r {root}/intel-rapl:*/energy_uj (until the next boot), or for good: "
    """echo 'SUBSYSTEM=="powercap", KERNEL=="intel-rapl:*", ACTION=="add", RUN+="/bin/chmod a+r /sys%p/energy_uj"' """
    "| sudo tee /etc/udev/rules.d/60-rapl.rules"
)


class Counter:
    """One zone's counter, unwrapped: microjoules that only rise, but for a reset."""

    def __init__(self, zone: Path, limit_w: float | None) -> None:
        self.zone = zone
        self.limit_w = limit_w
        self.range_uj = _number(zone / "max_energy_range_uj")
        if self.range_uj <= 0:
            raise MeterError(f"{zone}/max_energy_range_uj is {self.range_uj}: where the counter wraps is not known")
        self._raw_uj: int | None = None
        self._total_uj = 0
        self._at_ns = 0

    def read_uj(self, now_ns: int) -> int:
        """Cumulative microjoules.

        Raises:
            OSError, ValueError: the file can't be read or holds no number.
        """
        return self.unwrap(_number(self.zone / "energy_uj"), now_ns)

    def unwrap(self, raw_uj: int, now_ns: int) -> int:
        """Adds the step from the last raw value, across a wrap where it fell; starts over from the raw value after a reset."""
        if self._raw_uj is None:
            self._total_uj = raw_uj
        else:
            step_uj = raw_uj - self._raw_uj
            if step_uj < 0:
                step_uj = max(0, step_uj + self.range_uj)
                if self._impossible(step_uj, now_ns):
                    self._total_uj, step_uj = raw_uj, 0
            self._total_uj += step_uj
        self._raw_uj, self._at_ns = raw_uj, now_ns
        return self._total_uj

    def _impossible(self, step_uj: int, now_ns: int) -> bool:
        if self.limit_w is None:
            return False
        return step_uj * J_PER_UJ > _SLACK_J + _MOST_OVER_LIMIT * self.limit_w * ns_to_s(now_ns - self._at_ns)


class RaplMeter:
    """Every readable zone of the machine in one meter; reads a small file each (about 20 µs)."""

    interval_s: float | None = None

    def __init__(self, counters: dict[str, Counter], now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.domains = tuple(_domain(name, counter) for name, counter in counters.items())
        self._counters = counters
        self._now_ns = now_ns

    def read(self) -> Reading:
        """Cumulative joules of every zone that answers.

        Raises:
            MeterError: none does.
        """
        begin_ns = self._now_ns()
        energy_j: dict[str, float] = {}
        reasons = []
        for name, counter in self._counters.items():
            try:
                energy_j[name] = counter.read_uj(self._now_ns()) * J_PER_UJ
            except (OSError, ValueError) as error:
                reasons.append(f"{name}: {error}")
        if not energy_j:
            raise MeterError("no RAPL counter answers: " + "; ".join(reasons))
        return Reading(begin_ns, self._now_ns(), energy_j)

    def close(self) -> None:
        """Nothing is held open."""


def open_meters(
    root: str | Path = "/sys/class/powercap", *, now_ns: Callable[[], int] = time.monotonic_ns
) -> tuple[list[Meter], list[str]]:
    """One meter over what can be read, and a reason for what can't, with the line that mends it. Never raises."""
    counters: dict[str, Counter] = {}
    missing: list[str] = []
    denied: list[str] = []
    try:
        zones = _zones(Path(root))
    except OSError as error:
        return [], [f"cpu, dram: no RAPL counters ({error}): Linux on bare metal has them, virtual machines mostly don't"]
    for name, zone in zones.items():
        try:
            counter = Counter(zone, _limit_w(zone))
            counter.read_uj(now_ns())
            counters[name] = counter
        except PermissionError:
            denied.append(name)
        except (OSError, ValueError, MeterError) as error:
            missing.append(f"{name}: its RAPL counter can't be read ({error})")
    if denied:
        why = "only root may read RAPL since Linux 5.10 (CVE-2020-8694: fine power readings leak secrets to other users)"
        missing.append(f"{', '.join(denied)}: {why}: {_MEND.format(root=root)}")
    if not zones:
        missing.append(
            f"cpu, dram: no RAPL counters in {root}: a virtual machine (most hide them), a container (docker run -v "
            "/sys/devices/virtual/powercap:/sys/devices/virtual/powercap:ro shows them), or a module to load: "
            "type sudo modprobe intel_rapl_msr"
        )
    return ([RaplMeter(counters, now_ns)] if counters else []), missing


def _zones(root: Path) -> dict[str, Path]:
    """Package and memory zones by domain name, each package's own memory beside it."""
    packages: dict[int, str] = {}
    memories: dict[int, Path] = {}
    for path in root.iterdir():
        match = _ZONE.fullmatch(path.name)
        label = _text(path / "name") if match else ""
        if match and label == "dram":
            memories[int(match[1])] = path
        elif match and match[2] is None and label.startswith("package"):
            packages[int(match[1])] = label
    own = _without_mirrors(root, packages)
    kept_memories = [index for index in sorted(memories) if index in own or index not in packages]
    named = {"cpu" if len(own) == 1 else f"cpu{n}": root / f"intel-rapl:{index}" for n, index in enumerate(own)}
    return named | {"dram" if len(kept_memories) == 1 else f"dram{n}": memories[i] for n, i in enumerate(kept_memories)}


def _without_mirrors(root: Path, packages: dict[int, str]) -> list[int]:
    """Package zones in order, less the dies that show their package's counter again."""
    kept: list[int] = []
    seen: dict[str, list[int]] = {}
    for index in sorted(packages):
        package = packages[index].partition("-die-")[0]
        try:
            raw_uj = _number(root / f"intel-rapl:{index}" / "energy_uj")
        except (OSError, ValueError):
            raw_uj = -1
        if raw_uj >= 0 and any(abs(raw_uj - other) <= _MIRROR_UJ for other in seen.get(package, ())):
            continue
        seen.setdefault(package, []).extend([raw_uj] if raw_uj >= 0 else [])
        kept.append(index)
    return kept


def _domain(name: str, counter: Counter) -> Domain:
    return Domain(
        name,
        Method.COUNTER,
        device=cpu_name() if name.startswith("cpu") else _text(counter.zone / "name"),  # the zone's name is every CPU's
        source=f"RAPL energy counter {counter.zone}",
        power_limit_w=counter.limit_w,
        quantum_j=max(1.0, counter.range_uj / _COUNTS) * J_PER_UJ,
        period_s=_PERIOD_S,
    )


def _limit_w(zone: Path) -> float | None:
    """The highest of the zone's long- and short-term limits and their maxima, in watts; zero is a limit that isn't set."""
    found = [0]
    for label in _matching(zone, r"constraint_\d+_name"):
        if _text(label) == "peak_power":  # lasts for milliseconds
            continue
        for kind in ("power_limit_uw", "max_power_uw"):
            try:
                found.append(_number(zone / label.name.replace("name", kind)))
            except (OSError, ValueError):
                continue
    return max(found) * J_PER_UJ or None  # µW to W: the same factor


def _matching(zone: Path, pattern: str) -> Iterable[Path]:
    return [path for path in sorted(zone.iterdir()) if re.fullmatch(pattern, path.name)]


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def _text(path: Path) -> str:
    """A file's line, or nothing where it can't be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
