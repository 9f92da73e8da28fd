"""Peak FLOP/s of a device at a dtype: dense, sourced (``data/peaks.csv``), or measured on the CPU at hand; never guessed.

A GPU is found by its name as the driver prints it, in full; whatever else stands in the name (Laptop, Max-Q, a MIG slice, a vGPU)
makes it another device, and an unknown device has no peak (``None``). Figures are without sparsity and with FP32 accumulation.
"""

# torch is imported where it is needed: the table is read without it.

from __future__ import annotations

import csv
import math
import os
import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from green_torch.cache import cache_file, entries, keep
from green_torch.errors import ArgumentError
from green_torch.processor import cpu_name, instructions
from green_torch.records import DevicePeak
from green_torch.units import FLOP_PER_TFLOP

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__all__ = ["DTYPES", "KnownDevice", "blended_peak", "known_devices", "measured_cpu_peak", "peak_flops"]

DTYPES = {  # columns of the table, as people call them, and what they stand for
    "fp64": "float64",
    "fp32": "float32",
    "tf32": "tf32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp8": "float8",
}
_IGNORED_SHARE = 0.01  # of a step's FLOPs that may lack a peak
_BUSY_FACTOR = 4  # how many times the budget the measurement may take where other processes hold the cores
_PROCESSES = 5  # that measure a CPU's peak, of which the best counts
_GEMM_SIZES = (128, 256, 384, 512, 768, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class KnownDevice:
    """One row of the table: a card as the driver names it. ``peaks_flop_per_s`` by dtype, dense.

    ``source`` is the vendor's document that the figures stand in and how they were got from it; ``confirmed`` is what was read to
    check them on the day ``checked`` (ISO). ``units`` is the number of multiprocessors (compute units) that torch reports for a
    whole device and ``boost_mhz`` its clock: with the architecture's FLOPs per clock they give the peaks a second time.
    """

    name: str
    pattern: str
    examples: tuple[str, ...]
    generation: str
    year: int | None
    tdp_w: float | None
    units: int | None
    boost_mhz: float | None
    peaks_flop_per_s: Mapping[str, float]
    basis: str
    source: str
    confirmed: str
    checked: str
    note: str

    def matches(self, device_name: str) -> bool:
        """Whether the driver's name, with or without the vendor in front, is this card's."""
        bare = re.sub(r"^(nvidia|amd)\s+", "", " ".join(device_name.split()), flags=re.IGNORECASE)
        return re.fullmatch(self.pattern, bare, flags=re.IGNORECASE) is not None

    @property
    def cited(self) -> str:
        """Where its figures are from, and on what basis."""
        return f"{self.source} ({self.basis})"

    def peak(self, dtype: str) -> DevicePeak | None:
        """Its dense peak at "bfloat16" and the like; ``None`` where the table has none."""
        flop_per_s = self.peaks_flop_per_s.get(dtype)
        return None if flop_per_s is None else DevicePeak(flop_per_s, self.name, dtype, "datasheet", self.cited)


@lru_cache(maxsize=1)
def known_devices() -> tuple[KnownDevice, ...]:
    """Every card in the table, in its order."""
    lines = (files("green_torch") / "data" / "peaks.csv").read_text(encoding="utf-8").splitlines()
    return tuple(_known(row) for row in csv.DictReader(lines))


def _known(row: dict[str, str]) -> KnownDevice:
    peaks = {dtype: float(row[column]) * FLOP_PER_TFLOP for column, dtype in DTYPES.items() if row[column]}
    return KnownDevice(
        name=row["name"],
        pattern=row["pattern"],
        examples=tuple(row["examples"].split(";")),
        generation=row["generation"],
        year=int(row["year"]) if row["year"] else None,
        tdp_w=float(row["tdp_w"]) if row["tdp_w"] else None,
        units=int(row["units"]) if row["units"] else None,
        boost_mhz=float(row["boost_mhz"]) if row["boost_mhz"] else None,
        peaks_flop_per_s=MappingProxyType(peaks),
        basis=row["basis"],
        source=row["source"],
        confirmed=row["confirmed"],
        checked=row["checked"],
        note=row["note"],
    )


def peak_flops(device: torch.device | str, dtype: torch.dtype | str) -> DevicePeak | None:
    """The dense peak of a device at a dtype, in FLOP/s, or ``None`` where it is not known.

    ``device`` is a torch device or a GPU's name as the driver prints it ("NVIDIA H100 80GB HBM3"); a CPU is measured. ``dtype`` is
    a torch dtype or one of "float64", "float32" (without TF32), "tf32", "bfloat16", "float16", "float8".
    """
    wanted = _dtype_name(dtype)
    if _is_cpu(device):
        return measured_cpu_peak(wanted)
    known = _find(device)
    return None if known is None else known.peak(wanted)


def blended_peak(
    flops_by_dtype: Mapping[str, float], device: torch.device | str, *, override_flop_per_s: float | None = None
) -> DevicePeak | None:
    """The peak over a mix of work, in FLOP/s: all FLOPs over the time that they take at their peaks, ``sum(f) / sum(f / peak)``.

    Keys are "mm/bfloat16", "conv/float32" and the like; float32 counts as TF32 where torch's flags say so now and the card has it.
    ``None`` where more than 1 % of the FLOPs have no peak (less is left out). ``override_flop_per_s`` is the user's own figure.

    Raises:
        ArgumentError: ``override_flop_per_s`` is not a positive number.
    """
    if override_flop_per_s is not None:
        if not (math.isfinite(override_flop_per_s) and override_flop_per_s > 0):
            raise ArgumentError(
                f"peak_flop_per_s={override_flop_per_s!r} is not a positive number of FLOP/s: "
                "give the dense peak of one device, peak_flop_per_s=312e12 for example"
            )
        return DevicePeak(float(override_flop_per_s), str(device), "any", "user", "peak_flop_per_s given by the user")
    total = sum(flops_by_dtype.values())
    peaks: dict[str, tuple[float, DevicePeak]] = {}
    for key, flops in flops_by_dtype.items():
        kind, _, dtype = key.partition("/")
        peak = peak_flops(device, _as_run(kind, _dtype_name(dtype), device)) if flops > 0 else None
        if peak is not None:
            peaks[key] = (flops, peak)
    covered = sum(flops for flops, _ in peaks.values())
    enough = total - covered <= _IGNORED_SHARE * total
    if not (covered and enough):
        return None
    several = {peak.dtype: peak for _, peak in peaks.values()}
    first = next(iter(several.values()))
    if len(several) == 1:
        return first
    return DevicePeak(
        covered / sum(flops / peak.flop_per_s for flops, peak in peaks.values()),
        first.device,
        " + ".join(f"{key.partition('/')[0]}/{peak.dtype} {flops / covered:.1%}" for key, (flops, peak) in peaks.items()),
        "blended",
        "; ".join(dict.fromkeys(peak.source for peak in several.values())),
    )


def _dtype_name(dtype: torch.dtype | str) -> str:
    name = str(dtype).removeprefix("torch.")
    return "float8" if name.startswith("float8_e") else name


def _as_run(kind: str, dtype: str, device: torch.device | str) -> str:
    """The dtype whose peak counts: "tf32" for float32 work that NVIDIA's tensor cores take under torch's flags as they are now."""
    if dtype != "float32" or _is_cpu(device):
        return dtype
    known = _find(device)
    if known is None or "tf32" not in known.peaks_flop_per_s or not known.name.startswith("NVIDIA"):
        return dtype  # ROCm asks for an environment variable besides the flags
    return "tf32" if _tf32_allowed(kind) else dtype


def _tf32_allowed(kind: str) -> bool:
    """What torch's TF32 flags say for matmuls or convolutions.

    The newer settings (torch 2.9) mirror the older ones; once they were used the older ones raise, so they are asked second.
    """
    import torch

    backends: Any = torch.backends
    with suppress(AttributeError):
        return bool((backends.cudnn.conv if kind == "conv" else backends.cuda.matmul).fp32_precision == "tf32")
    return bool(backends.cudnn.allow_tf32 if kind == "conv" else backends.cuda.matmul.allow_tf32)


def _is_cpu(device: torch.device | str) -> bool:
    return str(device) in {"cpu", "cpu:0"}


def _find(device: torch.device | str) -> KnownDevice | None:
    """The row of a GPU. A torch device must also have the row's number of multiprocessors: a slice or partition has fewer."""
    text = str(device)
    if not re.fullmatch(r"[a-z]+(:\d+)?", text):  # a name as a driver prints it
        return _by_name(text)
    if not text.startswith("cuda"):
        return None
    import torch

    try:
        properties = torch.cuda.get_device_properties(torch.device(text))
    except (RuntimeError, AssertionError):  # no such device here
        return None
    known = _by_name(properties.name)
    return known if known and known.units in {None, properties.multi_processor_count} else None


@lru_cache(maxsize=64)
def _by_name(device_name: str) -> KnownDevice | None:
    found = [known for known in known_devices() if known.matches(device_name)]
    return found[0] if len(found) == 1 else None


# --- the CPU at hand: a CPU has no datasheet peak


_measured: dict[tuple[Any, ...], DevicePeak] = {}


def measured_cpu_peak(
    dtype: torch.dtype | str, *, cache_dir: str | os.PathLike[str] | None = None, budget_s: float = 0.25
) -> DevicePeak | None:
    """The best GEMM rate of this CPU at a dtype, in FLOP/s; ``None`` where torch has no GEMM for it.

    Best of many square matrices and both layouts of the second one, within about ``budget_s`` seconds; the smallest is always
    tried. Whatever else ran meanwhile made it too low, so each of the first five processes measures once, and the best of all is kept in
    ``cache_dir`` (the user's cache directory) by CPU, instruction set, threads, dtype, matmul precision and torch version. Runs on a thread
    of its own: the caller's autocast, grad mode, default device and dispatch modes don't reach it, and no random number is drawn.
    """
    import torch

    name = _dtype_name(dtype)
    if name not in {"float64", "float32", "bfloat16", "float16"}:
        return None
    threads = torch.get_num_threads()
    asked = name, threads, _cpu_precision(name), cache_dir, os.environ.get("XDG_CACHE_HOME")  # asked for with every record
    if asked in _measured:
        return _measured[asked]
    cpu = " ".join(filter(None, (cpu_name(), instructions())))  # a home may be shared by virtual machines of one name
    key = " | ".join((cpu, f"{threads} threads", name, _cpu_precision(name), f"torch {torch.__version__}"))
    path = cache_file("cpu_peaks.json", cache_dir)
    kept, n_processes = _kept(path, key)
    if kept is None or n_processes < _PROCESSES:
        best = _best_gemm(getattr(torch, name), budget_s)
        if best is not None and (kept is None or best.flop_per_s > kept.flop_per_s):
            how = f"best of {best.n_runs} GEMMs ({best.size}^3), {threads} threads, torch {torch.__version__}"
            kept = DevicePeak(best.flop_per_s, "", "", "measured", how)
        if kept is None:
            return None
        keep(path, key, {"flop_per_s": kept.flop_per_s, "source": kept.source, "processes": n_processes + 1})
    peak = _measured[asked] = replace(kept, device=cpu_name(), dtype=name)
    return peak


@dataclass(frozen=True, slots=True)
class _Gemm:
    """The best GEMM of ``n_runs``: ``size``^3."""

    flop_per_s: float
    size: int
    n_runs: int


def _best_gemm(dtype: torch.dtype, budget_s: float) -> _Gemm | None:
    samples: list[tuple[float, int]] = []  # FLOP/s, size

    def measure() -> None:
        import torch

        start = time.perf_counter()
        undisturbed = False  # whether any GEMM had the cores to itself: then time goes by FLOPs, else by the waiting for a core
        last = {
            True: (0.0, 1.0),
            False: (0.0, 1.0),
        }  # seconds and FLOPs, with the second matrix transposed (a linear layer) or not
        with suppress(RuntimeError):  # no GEMM for this dtype, or no memory for a larger one
            for done, size in enumerate(_GEMM_SIZES):
                flops = 2.0 * size**3
                a = torch.ones(size, size, dtype=dtype, device="cpu")
                out = torch.empty_like(a)
                for transposed, (last_s, last_flops) in last.items():
                    left_s = start + budget_s * (1 if undisturbed else _BUSY_FACTOR) - time.perf_counter()
                    expected_s = last_s * (flops / last_flops if undisturbed else 1.0)
                    if 2 * expected_s > left_s:  # also a layout that torch only emulates
                        continue
                    until = time.perf_counter() + left_s / (2 * (len(_GEMM_SIZES) - done))
                    best_s, n_runs = math.inf, 0
                    while n_runs < 2 or time.perf_counter() < until:  # the first one warms up
                        switches, begin = _involuntary_switches(), time.perf_counter()
                        torch.mm(a, a.t() if transposed else a, out=out)
                        took_s = max(time.perf_counter() - begin, 1e-9)
                        undisturbed |= _involuntary_switches() == switches
                        samples.append((flops / took_s, size))
                        best_s, n_runs = min(best_s, took_s), n_runs + 1
                    last[transposed] = best_s, flops

    worker = threading.Thread(target=measure, name="green_torch-cpu-peak", daemon=True)
    worker.start()
    worker.join()
    return _Gemm(*max(samples), n_runs=len(samples)) if samples else None


def _involuntary_switches() -> int:
    """How often one of our threads has had to give up its core to another process so far; 0 where the system doesn't tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _cpu_precision(dtype: str) -> str:
    """How oneDNN may compute float32 matmuls: "bf16" where it may round to that; it makes no difference to the other dtypes.

    No CPU has TF32 instructions: oneDNN computes in float32 then, and the peak is the same.
    """
    if dtype != "float32":
        return "own"
    import torch

    backends: Any = torch.backends
    with suppress(AttributeError):
        return "bf16" if backends.mkldnn.matmul.fp32_precision == "bf16" else "float32"
    return "bf16" if torch.get_float32_matmul_precision() == "medium" else "float32"


def _kept(path: Path, key: str) -> tuple[DevicePeak | None, int]:
    """What is kept under a key, if it is a peak, and how many processes it is the best of."""
    with suppress(TypeError, KeyError, ValueError):
        entry = entries(path)[key]
        flop_per_s, n_processes = float(entry["flop_per_s"]), int(entry["processes"])
        if math.isfinite(flop_per_s) and flop_per_s > 0:
            return DevicePeak(flop_per_s, "", "", "measured", str(entry["source"])), n_processes
    return None, 0
