"""``green-torch doctor``: what this machine can measure, how each joule will be known, and the line that mends what is missing.

:func:`examine` looks and never raises but for a wrong argument; :func:`show` prints. No network, except that a key of Electricity
Maps in the environment is tried, once; a few seconds, most of them for loading torch and codecarbon. Works without torch, and says so.
"""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

import green_torch
from green_torch.calibration import Calibration, calibrate_gpus
from green_torch.cli.console import HOW_KNOWN
from green_torch.errors import ArgumentError, IntensityError
from green_torch.intensity import ElectricityMaps, pue_for, resolve
from green_torch.intensity.electricity_maps import TOKEN_VARIABLES
from green_torch.meters import discover
from green_torch.peaks import known_devices, peak_flops
from green_torch.records import DevicePeak, Domain, IntensityPoint, Method
from green_torch.units import NS_PER_S, ns_to_s, si

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console

    from green_torch.protocols import Meter

SCHEMA = "green_torch.doctor/1"
_SHORTEST_READING_S = 0.3
_CPU_DTYPES = ("float32", "bfloat16", "float16")
_GPU_DTYPES = ("float32", "tf32", "bfloat16", "float16", "float8")
_INTEGRATIONS = (  # distribution, module of ours, what it gives
    ("lightning", "green_torch.lightning", "GreenMonitor for lightning.pytorch"),
    ("pytorch-lightning", "green_torch.lightning", "GreenMonitor for pytorch_lightning"),
    ("transformers", "green_torch.transformers", "GreenCallback for its Trainer"),
    ("accelerate", "green_torch.tracker", "track() in its loop; Trainer needs it"),
    ("tensorboard", "green_torch.sinks.tensorboard", "the green/ tags"),
    ("codecarbon", "green_torch.meters.codecarbon", "CPU and memory models, grid tables"),
    ("nvidia-ml-py", "green_torch.meters.nvml", "energy counters of NVIDIA GPUs"),
)


@dataclass(frozen=True, slots=True)
class Device:
    """Something that torch computes on. ``torch_name`` is how torch spells it, ``None`` where torch can't use it."""

    name: str
    torch_name: str | None
    note: str


@dataclass(frozen=True, slots=True)
class Metered:
    """A domain, and the mean watts that its meter gave while the doctor looked around (``None``: it gave none)."""

    domain: Domain
    power_w: float | None


@dataclass(frozen=True, slots=True)
class Integration:
    """An optional package: ``version`` installed (``None``: not), ``needed`` at least; ``mend`` is the line to type."""

    name: str
    gives: str
    version: str | None
    needed: str | None
    ok: bool
    mend: str


@dataclass(frozen=True, slots=True)
class Report:
    """All that the doctor found; the JSON has these fields. ``missing``: what is not there, why, and what mends it."""

    schema: str
    version: str
    python: str
    platform: str
    torch: str | None
    cuda: str | None
    devices: tuple[Device, ...]
    meters: tuple[Metered, ...]
    peaks: tuple[DevicePeak, ...]
    known_gpus: int
    grid: IntensityPoint
    live_grid: IntensityPoint | None
    pue: float
    pue_source: str
    integrations: tuple[Integration, ...]
    calibrations: tuple[Calibration, ...]
    missing: tuple[str, ...]


def examine(region: str | None = None, *, calibrate: bool = False) -> Report:
    """Looks at this machine; ``calibrate`` also measures each GPU's energy counter, which takes some seconds and keeps it busy.

    Raises:
        ArgumentError: no table knows the region (:class:`~green_torch.errors.UnknownRegionError` names the nearest).
    """
    grid = resolve(region).at(time.time_ns())
    pue, pue_source = pue_for(region)
    found = discover()
    missing = list(found.missing)
    live_grid = _live_grid(region, missing)
    before = [_read(meter) for meter in found.meters]
    begin_ns = time.monotonic_ns()
    torch = _torch(missing)
    gpus = [domain.device for meter in found.meters for domain in meter.domains if domain.name.startswith("gpu")]
    peaks = tuple(_peaks(torch, gpus, missing))
    devices = tuple(_devices(torch, gpus, peaks, found.meters, missing))
    integrations = tuple(_integration(*row) for row in _INTEGRATIONS)
    time.sleep(max(0.0, _SHORTEST_READING_S - ns_to_s(time.monotonic_ns() - begin_ns)))
    metered = [one for meter, first in zip(found.meters, before, strict=True) for one in _metered(meter, first, missing)]
    for meter in found.meters:
        meter.close()
    calibrations, not_calibrated = calibrate_gpus() if calibrate else ([], [])
    missing += [text for text in not_calibrated if text not in missing]
    if calibrate and not calibrations:
        missing.append(
            "calibration: no GPU was calibrated: --calibrate measures the energy counter of an NVIDIA GPU, and none answers here"
        )
    missing += [f"{one.name}: {one.mend}" for one in integrations if one.version is not None and "pip" in one.mend]
    return Report(
        schema=SCHEMA,
        version=green_torch.__version__,
        python=platform.python_version(),
        platform=platform.platform(terse=True),
        torch=None if torch is None else str(torch.__version__),
        cuda=None if torch is None else torch.version.cuda,
        devices=devices,
        meters=tuple(metered),
        peaks=peaks,
        known_gpus=len(known_devices()),
        grid=grid,
        live_grid=live_grid,
        pue=pue,
        pue_source=pue_source,
        integrations=integrations,
        calibrations=tuple(calibrations),
        missing=tuple(missing),
    )


def _live_grid(region: str | None, missing: list[str]) -> IntensityPoint | None:
    """The region's figure now, where a key for it stands in the environment; the key is not shown."""
    variable = next((name for name in TOKEN_VARIABLES if os.environ.get(name)), None)
    if variable is None:
        return None
    if region is None:
        missing.append(
            f"live grid intensity: {variable} is set, but not tried without a zone: type green-torch doctor --region FR, say"
        )
        return None
    try:
        return ElectricityMaps(region).latest()
    except (ArgumentError, IntensityError) as error:
        missing.append(f"live grid intensity: {error}")
        return None


def _torch(missing: list[str]) -> Any:
    """The module, or ``None``."""
    try:
        import torch
    except Exception as error:  # a broken build raises OSError and others
        missing.append(f"torch: can't be imported ({type(error).__name__}: {error}): type pip install torch")
        return None
    return torch


def _read(meter: Meter) -> tuple[int, dict[str, float]]:
    """An instant and the joules then; nothing where the meter fails, which the second reading will tell."""
    try:
        reading = meter.read()
    except Exception:  # any driver
        return 0, {}
    return reading.end_ns, dict(reading.energy_j)


def _metered(meter: Meter, first: tuple[int, dict[str, float]], missing: list[str]) -> Iterator[Metered]:
    begin_ns, begin_j = first
    try:
        reading = meter.read()
    except Exception as error:  # any driver
        missing.append(f"{', '.join(domain.name for domain in meter.domains)}: found, but can't be read: {error}")
        yield from (Metered(domain, None) for domain in meter.domains)
        return
    for domain in meter.domains:
        energy_j = reading.energy_j.get(domain.name)
        power_w = None
        if energy_j is not None and domain.name in begin_j and reading.end_ns > begin_ns:
            power_w = (energy_j - begin_j[domain.name]) * NS_PER_S / (reading.end_ns - begin_ns)
            if domain.method is Method.COUNTER and power_w <= 0:
                span_s = ns_to_s(reading.end_ns - begin_ns)
                missing.append(
                    f"{domain.name}: its counter did not rise in {span_s:.1f} s: the joules that it gives are not to be trusted"
                )
        yield Metered(domain, power_w)


def _peaks(torch: Any, gpus: Sequence[str], missing: list[str]) -> Iterator[DevicePeak]:
    """The CPU's measured peaks, and the GPUs' from the table, whether torch can use them or not."""
    cuda = torch is not None and torch.cuda.is_available()
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if cuda else gpus
    pairs = [("cpu", dtype) for dtype in _CPU_DTYPES if torch is not None]
    pairs += [(name, dtype) for name in names for dtype in _GPU_DTYPES]
    known = set()
    for name, dtype in pairs:
        try:
            peak = peak_flops(name, dtype)
        except Exception as error:  # a peak is not worth the report
            missing.append(f"peak of {name} at {dtype}: {type(error).__name__}: {error}")
            continue
        if peak is not None:
            known.add(name)
            yield peak
    for name in names:
        if name not in known:
            model = torch.cuda.get_device_name(name) if cuda else name
            missing.append(f"{model}: its peak FLOP/s is not in the table, so no MFU: give peak_flop_per_s= (dense, in FLOP/s)")


def _devices(
    torch: Any, gpus: Sequence[str], peaks: Sequence[DevicePeak], meters: Sequence[Meter], missing: list[str]
) -> Iterator[Device]:
    cpu = [peak.device for peak in peaks if peak.basis == "measured"]
    cpu += [domain.device for meter in meters for domain in meter.domains if domain.name == "cpu"]
    threads = "" if torch is None else f", torch uses {torch.get_num_threads()}"
    yield Device(
        (cpu or [platform.processor() or platform.machine()])[0],
        "cpu" if torch is not None else None,
        f"{os.cpu_count()} logical CPUs{threads}",
    )
    if torch is None:
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Device(properties.name, f"cuda:{index}", f"{properties.total_memory / 2**30:.0f} GiB")
    elif gpus:
        yield from (Device(name, None, "seen by the driver, not by torch") for name in gpus)
        missing.append(
            f"torch {torch.__version__} can't use {', '.join(gpus)}: it is built "
            + (
                f"for CUDA {torch.version.cuda}, which this driver may be too old for: type nvidia-smi"
                if torch.version.cuda
                else "without CUDA: see https://pytorch.org/get-started for the line to type"
            )
        )
    if torch.backends.mps.is_available():
        yield Device("Apple GPU", "mps", "")
        missing.append("mps: no meter reads Apple's GPU: its joules are missing")


def _integration(name: str, module: str, gives: str) -> Integration:
    needed = _floors().get(name)
    if find_spec(module) is None:
        return Integration(
            name, gives, _version(name), needed, ok=False, mend=f"not part of green_torch {green_torch.__version__}"
        )
    version = _version(name)
    wanted = f"{name}>={needed}" if needed else name
    if version is None:
        return Integration(name, gives, None, needed, ok=False, mend=f"not installed: type pip install '{wanted}'")
    ok = needed is None or _numbers(version) >= _numbers(needed)
    return Integration(name, gives, version, needed, ok, "" if ok else f"{version} is too old: type pip install -U '{wanted}'")


def _floors() -> dict[str, str]:
    """The least versions that our own package asks for, by distribution; empty where it runs uninstalled."""
    try:
        asked = metadata.requires("green-torch") or []
    except metadata.PackageNotFoundError:
        return {}
    return {match[1]: match[2] for text in asked if (match := re.match(r"([\w-]+)[^;]*?>=([\d.]+)", text))}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The release's leading numbers: "2.13.0+cpu" -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def show(report: Report, console: Console) -> None:
    """Prints the report."""
    torch = f"torch {report.torch}" if report.torch else "no torch"
    cuda = f", CUDA {report.cuda}" if report.cuda else ", no CUDA" if report.torch else ""
    console.print(
        f"[bold]green_torch {report.version}[/] on Python {report.python}, {escape(torch)}{cuda}, {escape(report.platform)}"
    )
    _print(console, "Devices", ("torch", "device", ""), ((one.torch_name or "–", one.name, one.note) for one in report.devices))
    _print(
        console,
        "Meters: how each joule will be known",
        ("domain", "known as", "now", "bounds", "from"),
        (
            (
                one.domain.name,
                f"{one.domain.method}: {HOW_KNOWN[one.domain.method]}",
                si(one.power_w, "W"),
                _bounds(one.domain),
                f"{one.domain.source}{' (shared with other processes)' if one.domain.shared else ''}",
            )
            for one in report.meters
        ),
        "none: steps will be timed, and no joule known",
    )
    _print(
        console,
        "Peaks, dense: what MFU is measured against",
        ("device", "peak", "basis", "source"),
        _peak_rows(report.peaks),
        "none known: no MFU without peak_flop_per_s=",
    )
    for one in report.calibrations:
        _print(console, "Energy counter, calibrated", ("", ""), one.lines())
    _print(
        console,
        "Grid",
        ("region", "intensity", "basis", "source"),
        (
            (
                grid.region,
                f"{grid.g_per_kwh:.4g} gCO2e/kWh",
                grid.kind + (f", {grid.year}" if grid.year else " now" if grid.time_unix_ns else ""),
                grid.source,
            )
            for grid in (report.grid, report.live_grid)
            if grid is not None
        ),
    )
    console.print(Text(f"PUE {report.pue:g}: {report.pue_source}", style="dim"))
    _print(
        console,
        "Integrations",
        ("package", "version", "needed", "for", ""),
        (
            (one.name, one.version or "–", f"≥ {one.needed}" if one.needed else "any", one.gives, "ok" if one.ok else one.mend)
            for one in report.integrations
        ),
    )
    console.print()
    if not report.missing:
        console.print("[bold green]Nothing is missing.[/]")
        return
    console.print("[bold]Missing, why, and what mends it[/]")
    for text in report.missing:
        console.print(Text(f"• {text}"), soft_wrap=True)


def _peak_rows(peaks: Sequence[DevicePeak]) -> Iterator[tuple[str, ...]]:
    """One row a device and source, its dtypes one under the other."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for peak in peaks:
        rows.setdefault((peak.device, peak.basis, peak.source), []).append(f"{peak.dtype} {si(peak.flop_per_s, 'FLOP/s')}")
    for (device, basis, source), lines in rows.items():
        yield device, "\n".join(lines), basis, source


def _bounds(domain: Domain) -> str:
    """What bounds a step's joules."""
    if domain.method is not Method.COUNTER:
        return "none"
    return f"0 to 1.5 × {domain.power_limit_w:.0f} W" if domain.power_limit_w else "no limit known"


def _print(console: Console, title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], empty: str = "none") -> None:
    """One titled table, or what its absence means."""
    console.print()
    console.print(Text(title, style="bold"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table if table.row_count else Text(f"  {empty}"))
