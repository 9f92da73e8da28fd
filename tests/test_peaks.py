"""Peaks: every row found by its own names and by no other, dense throughout, blended over the mix; the CPU measured and kept."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from green_torch import peaks
from green_torch.errors import ArgumentError
from green_torch.peaks import KnownDevice, blended_peak, known_devices, measured_cpu_peak, peak_flops

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROWS = known_devices()
H100 = "NVIDIA H100 80GB HBM3"
A100 = "NVIDIA A100-SXM4-40GB"

# As printed in vendors' documents: (name, dtype, dense TFLOP/s). Written by hand here, apart from the data file.
DATASHEETS = [
    ("Tesla V100-SXM2-16GB", "float16", 125),
    ("Tesla V100-SXM2-16GB", "float32", 15.7),
    ("Tesla T4", "float16", 65),
    (A100, "float32", 19.5),
    (A100, "tf32", 156),
    (A100, "bfloat16", 312),
    (A100, "float64", 19.5),
    ("NVIDIA A10", "bfloat16", 125),
    ("NVIDIA A10G", "bfloat16", 70),
    ("NVIDIA A30", "bfloat16", 165),
    ("NVIDIA A40", "bfloat16", 149.7),
    ("NVIDIA RTX A6000", "tf32", 77.4),
    ("NVIDIA L4", "bfloat16", 121),
    ("NVIDIA L40", "tf32", 90.5),
    ("NVIDIA L40S", "bfloat16", 362),
    ("NVIDIA L40S", "float8", 733),
    ("NVIDIA RTX 6000 Ada Generation", "bfloat16", 364),
    ("NVIDIA GeForce RTX 2080 Ti", "float16", 56.9),
    ("NVIDIA GeForce RTX 3090", "bfloat16", 71),
    ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
    ("NVIDIA GeForce RTX 4090", "tf32", 82.6),
    ("NVIDIA GeForce RTX 5090", "bfloat16", 209.5),
    (H100, "bfloat16", 989.4),
    (H100, "float8", 1979),
    (H100, "tf32", 494.7),
    ("NVIDIA H100 PCIe", "bfloat16", 756),
    ("NVIDIA H100 NVL", "bfloat16", 835),
    ("NVIDIA H200", "bfloat16", 989.4),
    ("NVIDIA H20", "bfloat16", 148),
    ("NVIDIA GH200 480GB", "bfloat16", 989.4),
    ("NVIDIA B200", "bfloat16", 2250),
    ("NVIDIA GB200", "bfloat16", 2500),
    ("AMD Instinct MI250X", "bfloat16", 191.5),
    ("AMD Instinct MI300X", "bfloat16", 1307.4),
    ("AMD Instinct MI300X", "float32", 163.4),
    ("AMD Instinct MI355X", "bfloat16", 2516.6),
]

REFUSED = [
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    "GRID A100-10C",
    "NVIDIA A100-SXM-64GB",
    "NVIDIA A10M",
    "NVIDIA H100",
    "NVIDIA H100 NVL MIG 1g.12gb",
    "NVIDIA H20-3e",
    "NVIDIA H2000",
    "NVIDIA L40G",
    "NVIDIA L400",
    "NVIDIA T400",
    "NVIDIA T400 4GB",
    "NVIDIA T4G",
    "NVIDIA RTX A400",
    "NVIDIA RTX A4000H",
    "NVIDIA RTX A4000 Laptop GPU",
    "NVIDIA RTX A5000 Laptop GPU",
    "NVIDIA RTX 4000 Ada Generation Laptop GPU",
    "NVIDIA RTX 5000 Ada Generation Embedded GPU",
    "NVIDIA GeForce RTX 3080 Laptop GPU",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 5090 Laptop GPU",
    "NVIDIA GeForce RTX 2080 with Max-Q Design",
    "NVIDIA GeForce RTX 2080",
    "NVIDIA GeForce RTX 5090 D v2",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
    "AMD Instinct MI250X / MI250",
    "AMD Instinct MI300X VF",
    "AMD Radeon Graphics",
    "Apple M3 Max",
    "NVIDIA",
    "",
]


def found(name: str) -> list[KnownDevice]:
    return [row for row in ROWS if row.matches(name)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_is_whole(row: KnownDevice) -> None:
    """Every row has peaks, a basis, a source, what confirmed it and the date."""
    assert row.peaks_flop_per_s
    assert all(flop_per_s > 1e12 / 2 for flop_per_s in row.peaks_flop_per_s.values())
    assert row.basis.startswith("dense")
    assert "http" in row.source or "reseller" in row.source
    assert row.confirmed
    assert date(2026, 1, 1) <= date.fromisoformat(row.checked) <= date(2100, 1, 1)
    assert row.year is not None
    assert 2016 <= row.year <= 2026
    assert row.examples


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_is_found_by_its_names_alone(row: KnownDevice) -> None:
    """Each driver string of a row finds that row and no other, in any case, and without the vendor."""
    for example in row.examples:
        assert found(example) == [row]
        assert found(example.upper()) == [row]
        assert found(example.removeprefix("NVIDIA ").removeprefix("AMD ")) == [row]
        for more in (" Laptop GPU", " with Max-Q Design", " MIG 1g.5gb", "X"):
            assert row not in found(example + more)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """A slice, a laptop or custom part, a name that stands for several parts and an unknown device have no peak."""
    assert found(name) == []
    assert peak_flops(name, "float32") is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA L40S", "NVIDIA L40S"),
        ("NVIDIA L40", "NVIDIA L40"),
        ("NVIDIA L4", "NVIDIA L4"),
        ("NVIDIA RTX A4000", "NVIDIA RTX A4000"),
        ("NVIDIA A40", "NVIDIA A40"),
        (H100, "NVIDIA H100 SXM5 80GB"),
        ("NVIDIA H200", "NVIDIA H200 SXM"),
        ("NVIDIA H20", "NVIDIA H20"),
        ("NVIDIA H800", "NVIDIA H800 SXM5"),
        ("NVIDIA A800-SXM4-80GB", "NVIDIA A800 SXM4"),
        ("NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 D"),
        ("nvidia  geforce rtx 4070 ti super", "NVIDIA GeForce RTX 4070 Ti SUPER"),
    ],
)
def test_traps(name: str, expected: str) -> None:
    """Names that hold one another are told apart."""
    assert [row.name for row in found(name)] == [expected]


@pytest.mark.parametrize(("name", "dtype", "tflops"), DATASHEETS)
def test_datasheet(name: str, dtype: str, tflops: float) -> None:
    """The figure is the datasheet's dense one, with its source."""
    peak = peak_flops(name, dtype)
    assert peak is not None
    assert peak.flop_per_s == pytest.approx(tflops * 1e12, rel=2e-3)
    assert peak.basis == "datasheet"
    assert peak.dtype == dtype
    assert "dense" in peak.source


# Dense FP16 FLOPs per clock and multiprocessor, FP32 accumulate: the architectures' whitepapers.
PER_CLOCK = {
    "Pascal": 256,
    "Volta": 1024,
    "Turing": 1024,
    "Ampere": 1024,
    "Ada": 1024,
    "Hopper": 4096,
    "Blackwell": 8192,
    "CDNA": 1024,
    "CDNA 2": 1024,
    "CDNA 3": 2048,
    "CDNA 4": 4096,
}
HALF_RATE = {"NVIDIA L40", "NVIDIA L20"}


@pytest.mark.parametrize("row", [row for row in ROWS if row.units and row.boost_mhz], ids=lambda row: row.name)
def test_no_sparse_figure(row: KnownDevice) -> None:
    """Multiprocessors x clock x the architecture's dense rate give the figure a second time; a sparse one would be twice that."""
    per_clock = PER_CLOCK[row.generation]
    if "GeForce" in row.name or row.name in HALF_RATE:
        per_clock = 512
    if row.generation == "Ampere" and row.boost_mhz in {1410, 1440}:  # GA100
        per_clock = 2048
    assert row.units is not None
    assert row.boost_mhz is not None
    silicon = row.units * row.boost_mhz * 1e6 * per_clock
    if "float16" in row.peaks_flop_per_s:
        assert 0.86 < row.peaks_flop_per_s["float16"] / silicon < 1.01
    if row.name.startswith("NVIDIA"):
        cores = 64 if row.generation in {"Pascal", "Volta", "Turing"} or per_clock == 2048 else 128
        assert row.peaks_flop_per_s["float32"] == pytest.approx(row.units * row.boost_mhz * 1e6 * 2 * cores, rel=0.03)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_dtypes_stand_in_their_ratios(row: KnownDevice) -> None:
    """Within a row TF32 is half of 16 bits and FP8 twice it, so no single cell can be a sparse figure."""
    peaks = row.peaks_flop_per_s
    half = peaks.get("float16")
    if half is None:
        return
    if "bfloat16" in peaks and row.name != "AMD Instinct MI100":
        assert peaks["bfloat16"] == half
    if "tf32" in peaks:
        assert peaks["tf32"] == pytest.approx(half / 2, rel=0.02)
    if "float8" in peaks:
        assert peaks["float8"] == pytest.approx(half * 2, rel=0.02)


def test_dtype_spellings() -> None:
    """Dtypes of torch and their names mean the same; what a card doesn't have is None."""
    assert peak_flops(H100, torch.bfloat16) == peak_flops(H100, "bfloat16") == peak_flops(H100, "torch.bfloat16")
    assert peak_flops(H100, torch.float8_e4m3fn) == peak_flops(H100, "float8")
    assert peak_flops("Tesla T4", torch.bfloat16) is None
    assert peak_flops(A100, "float8") is None
    assert peak_flops(H100, torch.int8) is None
    assert peak_flops("NVIDIA GeForce RTX 5090 D", "bfloat16") is None


@pytest.mark.parametrize("device", ["mps", "meta", "xpu:0", "cuda:97"])
def test_devices_without_a_source(device: str) -> None:
    """A torch device that isn't here, or that has no sourced figure, has no peak and raises nothing."""
    assert peak_flops(torch.device(device), "float32") is None
    assert peak_flops(device, "float32") is None


# --- the blend


def test_blend_is_time_at_peak() -> None:
    """Half the FLOPs at 312 and half at 19.5 TFLOP/s blend to their harmonic mean."""
    peak = blended_peak({"mm/bfloat16": 1e12, "mm/float64": 1e12}, A100)
    assert peak is not None
    assert peak.flop_per_s == pytest.approx(2 / (1 / 312e12 + 1 / 19.5e12))
    assert peak.basis == "blended"
    assert peak.dtype == "mm/bfloat16 50.0% + mm/float64 50.0%"


@given(st.lists(st.floats(1, 1e18), min_size=3, max_size=3))
def test_blend_lies_between(flops: list[float]) -> None:
    """A blend lies between its peaks, and doing everything twice does not move it."""
    mix = dict(zip(("mm/bfloat16", "conv/float64", "mm/float8"), flops, strict=True))
    once, twice = (blended_peak({key: value * n for key, value in mix.items()}, H100) for n in (1, 2))
    assert once is not None
    assert twice is not None
    assert 66.9e12 < once.flop_per_s < 1979e12
    assert twice.flop_per_s == pytest.approx(once.flop_per_s)


def test_blend_of_one_dtype_is_that_peak() -> None:
    """Matmuls and convolutions of one dtype keep the datasheet's peak and its source."""
    assert blended_peak({"mm/bfloat16": 3.0, "conv/bfloat16": 5.0, "mm/int8": 0.0}, H100) == peak_flops(H100, "bfloat16")


@pytest.mark.parametrize(("unknown", "known"), [(0.011, False), (0.009, True)])
def test_blend_with_an_unknown_share(unknown: float, known: bool) -> None:
    """More than 1 % of the FLOPs without a peak leave no blend; less is left out."""
    peak = blended_peak({"mm/bfloat16": 1 - unknown, "mm/int8": unknown}, H100)
    assert peak == (peak_flops(H100, "bfloat16") if known else None)


@pytest.mark.parametrize("mix", [{}, {"mm/bfloat16": 0.0}, {"mm/bfloat16": float("nan")}, {"": 1.0}])
def test_blend_of_nothing(mix: dict[str, float]) -> None:
    """No FLOPs, no blend."""
    assert blended_peak(mix, H100) is None


def test_blend_on_an_unknown_device() -> None:
    """An unknown device has no blend, but the user's own figure counts."""
    assert blended_peak({"mm/bfloat16": 1.0}, "NVIDIA Z9") is None
    peak = blended_peak({"mm/bfloat16": 1.0}, "NVIDIA Z9", override_flop_per_s=5e12)
    assert peak is not None
    assert (peak.flop_per_s, peak.basis) == (5e12, "user")


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf")])
def test_wrong_override(wrong: float) -> None:
    """A peak that is not a positive number is a wrong argument."""
    with pytest.raises(ArgumentError, match="peak_flop_per_s"):
        blended_peak({}, H100, override_flop_per_s=wrong)


@pytest.fixture
def tf32_flags() -> Iterator[None]:
    """Leaves torch's TF32 flags as they were, readable by the older names too."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cuda.matmul.allow_tf32, cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    _, cuda.matmul.allow_tf32, cudnn.allow_tf32 = before
    assert (torch.get_float32_matmul_precision(), cuda.matmul.allow_tf32, cudnn.allow_tf32) == before


def blended_tflops(key: str, device: str = A100) -> float:
    peak = blended_peak({key: 1.0}, device)
    assert peak is not None
    return peak.flop_per_s / 1e12


@pytest.mark.usefixtures("tf32_flags")
def test_tf32_follows_the_flags() -> None:
    """FP32 matmuls and convolutions each follow their own flag, as torch has them by default and when set."""
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    assert (blended_tflops("mm/float32"), blended_tflops("conv/float32")) == pytest.approx((19.5, 156))
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = True, False
    assert (blended_tflops("mm/float32"), blended_tflops("conv/float32")) == pytest.approx((156, 19.5))
    torch.set_float32_matmul_precision("highest")
    assert blended_tflops("mm/float32") == pytest.approx(19.5)
    torch.set_float32_matmul_precision("high")
    assert blended_tflops("mm/float32") == pytest.approx(156)


@pytest.mark.usefixtures("tf32_flags")
@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 has the older flags only")
def test_tf32_follows_the_newer_settings() -> None:
    """The newer settings are followed too; they make the older flags raise, which must not reach the user."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert (blended_tflops("mm/float32"), blended_tflops("conv/float32")) == pytest.approx((156, 19.5))
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert blended_tflops("mm/float32") == pytest.approx(19.5)


@pytest.mark.usefixtures("tf32_flags")
def test_tf32_only_where_the_card_has_it() -> None:
    """A card without TF32, and an AMD card (where the flags do not decide), stay at their FP32 rate."""
    torch.backends.cuda.matmul.allow_tf32 = True
    assert blended_tflops("mm/float32", "Tesla V100-SXM2-16GB") == pytest.approx(15.7)
    assert blended_tflops("mm/float32", "AMD Instinct MI300X") == pytest.approx(163.4)
    assert peak_flops(A100, "float32").flop_per_s == 19.5e12


# --- the CPU


def in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets what this process has measured."""
    monkeypatch.setattr(peaks, "_measured", {})


def test_cpu_is_measured_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The best of five processes is kept, and the sixth takes it as it stands; the key names threads, dtype and torch."""
    path = tmp_path / "cpu_peaks.json"
    best = 0.0
    for n_processes in range(1, 6):
        in_a_new_process(monkeypatch)
        peak = measured_cpu_peak("float32", cache_dir=tmp_path, budget_s=0.01)
        ((key, entry),) = json.loads(path.read_text()).items()
        assert (entry["processes"], entry["flop_per_s"], entry["source"]) == (n_processes, peak.flop_per_s, peak.source)
        assert peak.flop_per_s >= best
        best = peak.flop_per_s
    assert f"{torch.get_num_threads()} threads | float32" in key
    assert key.endswith(f"torch {torch.__version__}")
    path.write_text(json.dumps({key: {"flop_per_s": 123.0, "source": "edited", "processes": 5}}))
    assert measured_cpu_peak(torch.float32, cache_dir=tmp_path).flop_per_s == best  # once a process
    in_a_new_process(monkeypatch)
    peak = measured_cpu_peak(torch.float32, cache_dir=tmp_path)
    assert (peak.flop_per_s, peak.source, peak.basis, peak.dtype) == (123.0, "edited", "measured", "float32")


def test_a_disturbed_cpu_peak_is_mended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A better one replaces a kept one that is too low; a kept one that is better stays."""
    measured_cpu_peak("float32", cache_dir=tmp_path, budget_s=0.01)
    path = tmp_path / "cpu_peaks.json"
    (key,) = json.loads(path.read_text())
    for kept_flop_per_s, replaced in ((1.0, True), (1e18, False)):
        path.write_text(json.dumps({key: {"flop_per_s": kept_flop_per_s, "source": "kept", "processes": 1}}))
        in_a_new_process(monkeypatch)
        peak = measured_cpu_peak("float32", cache_dir=tmp_path, budget_s=0.01)
        assert (peak.source != "kept", peak.flop_per_s > 1e6) == (replaced, True)


@pytest.mark.usefixtures("tf32_flags")
def test_cpu_tf32_is_float32(tmp_path: Path) -> None:
    """A CPU has no TF32: with and without the flag it has one peak; rounding to BF16 has its own."""
    settings = ["highest", "high", "medium"]
    peaks_of = []
    for precision in settings:
        torch.set_float32_matmul_precision(precision)
        peaks_of.append(measured_cpu_peak("float32", cache_dir=tmp_path, budget_s=0.01))
    assert peaks_of[0] is peaks_of[1]
    assert peaks_of[2] is not peaks_of[0]


def test_cpu_source_says_how(tmp_path: Path) -> None:
    """A measured peak says so: what was run, on how many threads, with which torch."""
    peak = measured_cpu_peak("float32", cache_dir=tmp_path, budget_s=0.01)
    assert peak.basis == "measured"
    assert peak.flop_per_s > 1e6
    assert "GEMM" in peak.source
    assert f"{torch.get_num_threads()} threads, torch {torch.__version__}" in peak.source


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        '"x"',
        '{"a": 1}',
        '{"KEY": {"flop_per_s": -1, "source": "s", "processes": 5}}',
        '{"KEY": {"flop_per_s": NaN, "source": "s", "processes": 5}}',
    ],
)
def test_corrupt_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str) -> None:
    """A cache that can't be read, or holds nonsense, is passed over."""
    path = tmp_path / "cpu_peaks.json"
    measured_cpu_peak("float32", cache_dir=tmp_path, budget_s=0.01)
    key = next(iter(json.loads(path.read_text())), "KEY") if path.exists() else "KEY"
    path.write_text(content.replace("KEY", key.replace("\\", "")))
    in_a_new_process(monkeypatch)
    peak = measured_cpu_peak("float32", cache_dir=tmp_path, budget_s=0.01)
    assert peak.flop_per_s > 1e6


def test_unusable_cache_directory(tmp_path: Path) -> None:
    """Where the cache can't be written (its directory is a file) the measurement still comes back, and once a process."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    first = measured_cpu_peak("float32", cache_dir=blocked, budget_s=0.01)
    assert first is not None
    assert measured_cpu_peak("float32", cache_dir=blocked, budget_s=0.01) == first
    assert blocked.read_text() == ""


def test_cpu_dtypes_without_gemm(tmp_path: Path) -> None:
    """FP8, TF32 and integers are not measured on a CPU."""
    for dtype in ("float8", "tf32", torch.int8):
        assert measured_cpu_peak(dtype, cache_dir=tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_cpu_blend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A CPU's mix is blended from measured peaks, kept in the user's cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    peak_flops("cpu", "float64")
    single = blended_peak({"mm/float64": 1.0, "conv/float64": 2.0}, torch.device("cpu"))
    assert single is not None
    assert single.basis == "measured"
    assert single == peak_flops(torch.device("cpu"), torch.float64)


def test_measuring_leaves_the_caller_alone(tmp_path: Path) -> None:
    """RNG, grad mode, default dtype, threads and dispatch modes are as before, and the caller's modes see nothing of it."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(7)
    state, dtype, threads = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        peak = measured_cpu_peak("float64", cache_dir=tmp_path / "a", budget_s=0.01)
    assert peak is not None
    assert counter.get_total_flops() == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert (torch.get_default_dtype(), torch.get_num_threads()) == (dtype, threads)


def test_no_torch_until_needed() -> None:
    """The table is read, and a named GPU looked up, without importing torch."""
    code = "import sys; from green_torch import peaks; p = peaks.peak_flops('NVIDIA L4', 'bfloat16'); sys.exit(p is None or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
