"""Everything that only a GPU can show, in one call: ``python benchmarks/gpu_check.py`` (under ten minutes on a machine with CUDA).

The energy counter's period, cost and honesty; that a tracked loop synchronises nothing, and what ``step()`` costs; where step
boundaries are put against a synchronised truth; FLOP counts of each attention kernel; MFU and HFU of BF16, flash and checkpointing
against FP32 on a GPT of 124M; a run's joules against integrated power; the GPU-marked tests. Each part is guarded: one that fails
leaves the others' results, and results are written after each, so that a machine that is taken away loses the part under way alone.
``--dry-run`` runs on any machine what of each part a CPU and a simulated driver can run; ``--only NAME`` runs one part; ``--results
FOLDER`` writes elsewhere than under ``benchmarks/results``. Without a GPU it says so and leaves.

It needs a copy of the repository, torch, nvidia-ml-py, psutil and pytest; the package itself need not be installed. On a borrowed
machine that gives back what lies under ``$OUT``: ``python3 benchmarks/gpu_check.py --results $OUT``.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import statistics
import subprocess
import sys
import threading
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from report import RESULTS, ROOT, table, write
from torch.nn.attention import SDPBackend, sdpa_kernel

import green_torch
from green_torch.calibration import calibrate_gpus
from green_torch.clock import Boundaries
from green_torch.experiment import compare
from green_torch.flops import LiveCounter
from green_torch.meters.nvml import NvmlMeter, open_meters
from green_torch.records import Instant
from green_torch.testing import MemorySink
from green_torch.units import ns_to_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE_S = 540.0  # of the ten minutes that such a machine is lent for at a time
TESTS_AT_MOST_S = 150.0
GPT_124M_MODEL_FLOPS = 7_001_333_563_392  # a step of 8 x 1024 tokens, attention in full: FACTS.md, 3
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cuCtxSynchronize")


@dataclass(frozen=True, slots=True)
class Part:
    """What one part found: ``passed`` is ``None`` where there is nothing to pass."""

    body: str
    passed: bool | None
    result: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def driver(*, dry: bool) -> Iterator[Any]:
    """The machine's NVML, or a simulated one whose power is a square wave and known."""
    if not dry:
        yield None
        return
    from tests.simnvml import Gpu, simulated, square

    with simulated(Gpu(square(90, 330, period_s=0.11), period_s=0.02), virtual=False) as sim:
        yield sim


@contextlib.contextmanager
def meter_here() -> Iterator[NvmlMeter]:
    """A meter of the GPU that this process uses: torch's first device."""
    meters, missing = open_meters(local_rank=0)
    if not meters:
        raise RuntimeError("; ".join(missing))
    try:
        yield meters[0]
    finally:
        for meter in meters:
            meter.close()


def training(device: str) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """A small model on the device, and a step of its training."""
    torch.manual_seed(0)
    width = 1024 if device == "cuda" else 64
    model = torch.nn.Sequential(torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width)).to(
        device
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = torch.randn(512, width, device=device)

    def step() -> torch.Tensor:
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return model, step


def quantiles(values: list[float]) -> tuple[float, float]:
    """Median and 95th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[round(0.95 * (len(ordered) - 1))]


# --- the parts


def counter(*, dry: bool) -> Part:
    """The counter's update period, a reading's cost, agreement with integrated power, and whether it is part-time."""
    with driver(dry=dry):
        found, missing = calibrate_gpus(1.0 if dry else 12.0, keep=not dry)
    rows = [[name, text] for one in found for name, text in one.lines()]
    body = table(["", ""], rows) + "".join(f"\n\nmissing: {text}" for text in missing)
    return Part(body, bool(found), {"gpus": [asdict(one) for one in found], "missing": missing})


def synchronisation(*, dry: bool) -> Part:
    """A tracked loop while every synchronisation is an error, then under the profiler beside an untracked one; ``step()``'s cost."""
    device = "cpu" if dry else "cuda"
    model, step = training(device)
    n_steps = 20 if dry else 500
    costs_us: list[float] = []
    with driver(dry=dry), meter_here() as meter:
        with green_torch.track(model, meters=[meter], intensity=100, log_every_n_steps=1) as tracker:

            def tracked(n: int) -> None:
                for _ in range(n):
                    step()
                    before_ns = time.perf_counter_ns()
                    tracker.step(samples=512)
                    costs_us.append((time.perf_counter_ns() - before_ns) / 1e3)

            tracked(20)
            costs_us.clear()
            with sync_is_an_error(device):
                tracked(n_steps)
            median_us, p95_us = quantiles(costs_us)
            ours = synchronisations(device, lambda: tracked(n_steps // 5))
        theirs = synchronisations(device, lambda: [step() for _ in range(n_steps // 5)])
    mode = "on the CPU, which has nothing to wait for" if dry else "with torch.cuda.set_sync_debug_mode('error')"
    body = (
        f"{n_steps} tracked steps passed {mode}. Under the profiler a loop of {n_steps // 5} "
        f"steps made {ours} synchronising calls with tracking and {theirs} without. `step()` took {median_us:.1f} µs "
        f"(median; 95th percentile {p95_us:.1f} µs) on the training thread."
    )
    result = {
        "steps": n_steps,
        "syncs_tracked": ours,
        "syncs_untracked": theirs,
        "step_median_us": median_us,
        "step_p95_us": p95_us,
    }
    return Part(body, ours <= theirs, result)


@contextlib.contextmanager
def sync_is_an_error(device: str) -> Iterator[None]:
    """Any synchronisation that torch makes raises."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronisations(device: str, run: Callable[[], object]) -> int:
    """CUDA calls that wait for the device while ``run`` runs, as the profiler sees them (its own at the end included)."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as prof:
        run()
    return sum(event.name in SYNCS for event in prof.events())


def boundaries(*, dry: bool) -> Part:
    """Where boundaries are put, against the host's time just after a synchronisation: near runs, and with the host 20 steps ahead."""
    marker = Boundaries(time.monotonic_ns, lambda text, **_: print(text), may_use_device=not dry)
    a = torch.randn(64, 64) if dry else torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    out = torch.empty_like(a)
    rows, result, passed = [], {}, True
    for ahead in (1, 20):
        late_us: list[float] = []
        widths_us: list[float] = []
        end_s = time.monotonic() + (0.1 if dry else 15.0)
        while time.monotonic() < end_s:
            marks = []
            for _ in range(ahead):
                for _ in range(8):
                    torch.mm(a, a, out=out)
                marks.append(marker.mark())
            if not dry:
                torch.cuda.synchronize()
            seen_ns = time.monotonic_ns()
            marker.advance()
            instants = [marker.resolve(Instant.exact(mark)) for mark in marks]
            assert all(instant is not None for instant in instants), "a boundary that the device has passed is not resolved"
            late_us.append((seen_ns - instants[-1].at_ns) / 1e3)
            widths_us += [(instant.hi_ns - instant.lo_ns) / 1e3 for instant in instants]
            passed &= instants[-1].lo_ns <= seen_ns
        late, width = quantiles(late_us), quantiles(widths_us)
        early = sum(us < -50 for us in late_us) / len(late_us)
        passed &= early < 0.01
        rows.append([str(ahead), str(len(late_us)), *(f"{us:.0f}" for us in (*late, min(late_us), *width)), f"{early:.1%}"])
        result[f"ahead_{ahead}"] = {
            "rounds": len(late_us),
            "late_us": {"median": late[0], "p95": late[1], "min": min(late_us), "max": max(late_us)},
            "bracket_us": {"median": width[0], "p95": width[1]},
            "share_early": early,
        }
    header = [
        "steps ahead",
        "rounds",
        "sync − boundary µs, median",
        "p95",
        "min",
        "bracket µs, median",
        "p95",
        "ahead by > 50 µs",
    ]
    return Part(table(header, rows), passed, result)


def kernels(*, dry: bool) -> Part:
    """FLOPs of each attention kernel and of products that only GPUs have, forward and backward, against closed forms.

    The model's are the same whatever the kernel; with a fused backward the hardware runs a sixth more (7 / 6).
    """
    rows, result, passed = [], {}, True
    for name, (expected, ratio, run) in (attention_cases(dry=dry) | product_cases(dry=dry)).items():
        try:
            with LiveCounter() as live:
                run()
        except Exception as error:  # a kernel that this GPU, or this torch, lacks
            rows.append([name, "not here", f"{type(error).__name__}: {str(error).splitlines()[0][:60]}", "", ""])
            result[name] = None
            passed &= dry or not name.endswith("causal")  # every attention kernel takes plain causal attention
            continue
        count = live.count()
        found = count.hardware_flops / count.model_flops if count.model_flops else float("nan")
        right = count.model_flops == expected and not count.uncounted_ops and (ratio is None or abs(found - ratio) < 1e-9)
        passed &= right
        rows.append(
            [
                name,
                f"{count.model_flops:,.0f}",
                f"{found:.4f}",
                ", ".join(count.uncounted_ops),
                "yes" if right else f"NO: {expected:,}",
            ]
        )
        result[name] = {
            "expected_model_flops": expected,
            "model_flops": count.model_flops,
            "hardware_flops": count.hardware_flops,
            "by_dtype": count.flops_by_dtype,
            "uncounted": count.uncounted_ops,
        }
    body = table(["kernel", "model FLOPs", "hardware / model", "uncounted", "as by hand"], rows)
    return Part(body, passed and any(result.values()), result)


Case = tuple[int, "float | None", "Callable[[], object]"]


def attention_cases(*, dry: bool) -> dict[str, Case]:
    """Model FLOPs by hand, hardware over model FLOPs (``None``: any), and a forward and backward of each kernel."""
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    batch, heads, length, width = (2, 2, 64, 16) if dry else (4, 12, 1024, 64)

    def tensors(*shape: int, n: int = 3) -> list[torch.Tensor]:
        return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(n)]

    def run(backend: SDPBackend, key_heads: int = heads, keys: int = length, **options: Any) -> None:
        (q,), (k, v) = tensors(batch, heads, length, width, n=1), tensors(batch, key_heads, keys, width, n=2)
        with sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).sum().backward()

    def varlen() -> None:
        from torch.nn.attention.varlen import varlen_attn

        places = torch.tensor([0, length // 4, 2 * length], dtype=torch.int32, device=device)
        varlen_attn(*tensors(2 * length, heads, width), places, places, 2 * length, 2 * length).sum().backward()

    def jagged() -> None:
        parts = [torch.randn(n, heads * width, device=device, dtype=dtype) for n in (length // 4, length)]
        q = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
        heads_first = q.unflatten(-1, [heads, width]).transpose(1, 2)
        torch.nn.functional.scaled_dot_product_attention(heads_first, heads_first, heads_first).values().sum().backward()

    products = 3 * 4 * batch * heads * length**2 * width
    few = 2 if dry else 4
    backends = {
        "math": (SDPBackend.MATH, 1.0),
        "flash": (SDPBackend.FLASH_ATTENTION, 7 / 6),
        "efficient": (SDPBackend.EFFICIENT_ATTENTION, 7 / 6),
        "cudnn": (SDPBackend.CUDNN_ATTENTION, 7 / 6),
    }
    cases: dict[str, Case] = {}
    for name, (backend, ratio) in backends.items():
        cases[f"attention: {name}, causal"] = products, ratio, partial(run, backend, is_causal=True)
        cases[f"attention: {name}, twice the keys"] = 2 * products, ratio, partial(run, backend, keys=2 * length)
        cases[f"attention: {name}, GQA"] = products, ratio, partial(run, backend, key_heads=few, enable_gqa=True)
    of_parts = 3 * 4 * heads * width
    quarter = length // 4
    if not dry:
        cases["attention: varlen"] = of_parts * (quarter**2 + (2 * length - quarter) ** 2), 7 / 6, varlen
        cases["attention: jagged"] = of_parts * (quarter**2 + length**2), 7 / 6, jagged
    return cases


def product_cases(*, dry: bool) -> dict[str, Case]:
    """The same of products, convolutions and the fused LSTM."""
    if dry:
        return {}
    functional, cuda, bf16, n = torch.nn.functional, torch.device("cuda"), torch.bfloat16, 512

    def grouped() -> None:
        x = torch.randn(4 * n, n, device=cuda, dtype=bf16, requires_grad=True)
        experts = torch.randn(4, n, 2 * n, device=cuda, dtype=bf16, requires_grad=True)
        ends = torch.tensor([n, 2 * n, 3 * n, 4 * n], dtype=torch.int32, device=cuda)
        functional.grouped_mm(x, experts, offs=ends).sum(dtype=torch.float32).backward()

    def fp8() -> None:
        a, b = (torch.randn(n, n, device=cuda).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=cuda)
        torch._scaled_mm(a, b.t(), one, one, out_dtype=bf16)  # noqa: SLF001 - torch's name for it

    def integers() -> None:
        a, b = (torch.ones(n, n, device=cuda, dtype=torch.int8) for _ in range(2))
        torch._int_mm(a, b)  # noqa: SLF001 - as above

    def convolution(groups: int) -> None:
        layer = torch.nn.Conv2d(64, 64, 3, padding=1, groups=groups, bias=False).to(cuda, bf16)
        x = torch.randn(8, 64, 32, 32, device=cuda, dtype=bf16, requires_grad=True)
        layer(x).sum().backward()

    def recurrent() -> None:
        layer = torch.nn.LSTM(64, 128, bias=False).to(cuda)
        layer(torch.randn(20, 8, 64, device=cuda))[0].sum().backward()

    convolutions = 3 * 2 * 8 * 32 * 32 * 64 * 9
    lstm = 3 * 2 * 20 * 8 * 4 * 128 * (64 + 128) - 2 * 20 * 8 * 4 * 128 * 64 - 2 * 8 * 4 * 128 * 128
    return {
        "grouped_mm": (3 * 2 * 4 * n * n * 2 * n, 1.0, grouped),
        "_scaled_mm, fp8": (2 * n**3, 1.0, fp8),
        "_int_mm": (2 * n**3, 1.0, integers),
        "convolution": (convolutions * 64, 1.0, partial(convolution, 1)),
        "depthwise convolution": (convolutions, 1.0, partial(convolution, 64)),
        "LSTM (cuDNN)": (lstm, None, recurrent),
    }


def utilisation(*, dry: bool) -> Part:
    """Variants of the built-in GPT compared: step time, joules, MFU, HFU; its model FLOPs must not depend on the variant."""
    names = ["fp32", "bf16", "bf16+flash", "bf16+flash+checkpoint"]
    options: dict[str, Any] = (
        {"blocks": 2, "steps_per_block": 2, "warmup_steps": 1} if dry else {"blocks": 6, "budget_s": 100.0}
    )
    compared = compare("green_torch.gpt:workload", names[::3] if dry else names, track={"intensity": 100}, **options)
    rows, flops = [], {}
    for result in compared.results:
        if result.error or not result.blocks:
            rows.append([result.name, f"failed: {result.error}", *[""] * 8])
            continue
        per_step = result.model_flop_per_s * result.step_time_s if result.model_flop_per_s and result.step_time_s else None
        flops[result.name] = per_step
        rows.append(
            [
                result.name,
                *(
                    "unknown" if value is None else text.format(value)
                    for text, value in (
                        ("{:.4f}", result.step_time_s),
                        ("{:.2f}", result.energy_per_step_j),
                        ("{:.4g}", per_step),
                        ("{:.4g}", result.model_flop_per_s),
                        ("{:.1%}", result.mfu),
                        ("{:.1%}", result.hfu),
                        ("{:.4g}", result.peak_memory_bytes),
                        ("{:.4g}", result.memory_traffic_per_step_bytes),  # NVML's GPM: Hopper and later
                    )
                ),
                "; ".join(f"{peak.flop_per_s:.3g} ({peak.basis})" for peak in result.peaks),
            ]
        )
    large = not dry and torch.cuda.get_device_properties(0).total_memory >= 30e9  # else the built-in workload is a smaller GPT
    expected = GPT_124M_MODEL_FLOPS if large else None
    known = [value for value in flops.values() if value]
    same = bool(known) and max(known) - min(known) < 1e-3 * max(known)
    passed = same and len(known) == len(compared.results)
    if expected is not None:
        passed &= all(abs(value / expected - 1) < 1e-3 for value in known)
    header = [
        "variant",
        "s a step",
        "J a step",
        "model FLOPs a step",
        "model FLOP/s",
        "MFU",
        "HFU",
        "peak bytes",
        "bytes to and from memory a step",
        "peak FLOP/s",
    ]
    body = table(header, rows) + f"\n\nThe comparison's headline is {compared.headline}."
    return Part(body, passed, {"expected_model_flops": expected, "comparison": compared.to_dict()})


def energy(*, dry: bool) -> Part:
    """A run's joules by the tracker against power read beside it every 5 ms and integrated (simulated: against the truth)."""
    device = "cpu" if dry else "cuda"
    _, step = training(device)
    seconds = 1.0 if dry else 20.0
    sink = MemorySink()
    with driver(dry=dry) as sim, meter_here() as meter, meter_here() as beside:
        samples: list[tuple[int, float]] = []
        stop = threading.Event()

        def sample() -> None:
            while not stop.is_set():
                before_ns = time.monotonic_ns()
                power_w = beside.power_w()
                samples.append(((before_ns + time.monotonic_ns()) // 2, power_w))
                stop.wait(0.005)

        thread = threading.Thread(target=sample)
        with green_torch.track(meters=[meter], sinks=[sink], intensity=100) as tracker:
            thread.start()
            end_s = time.monotonic() + seconds
            while time.monotonic() < end_s:
                for _ in range(1 if dry else 50):
                    step()
                    tracker.step()
                if not dry:
                    torch.cuda.synchronize()
        stop.set()
        thread.join()
        start_ns, end_ns = sink.records[0].start_ns, sink.records[-1].end_ns
        truth_j = sim.truth_j(0, start_ns, end_ns) if sim is not None else None
    inside = [(ns, power_w) for ns, power_w in samples if start_ns <= ns <= end_ns]
    pairs = pairwise(inside)
    integrated_j = sum((a_w + b_w) / 2 * ns_to_s(b_ns - a_ns) for (a_ns, a_w), (b_ns, b_w) in pairs)
    integrated_j *= (end_ns - start_ns) / (inside[-1][0] - inside[0][0])
    totals = tracker.summary().totals
    ratio = totals.energy_j / integrated_j
    body = (
        f"{totals.duration_s:.1f} s: {totals.energy_j:.1f} J by the tracker, between {totals.energy_lo_j:.1f} and "
        f"{totals.energy_hi_j:.1f} J; {integrated_j:.1f} J by {len(inside)} power readings; ratio {ratio:.4f}."
    ) + ("" if truth_j is None else f" Truth: {truth_j:.1f} J.")
    result = {
        "energy_j": totals.energy_j,
        "energy_lo_j": totals.energy_lo_j,
        "energy_hi_j": totals.energy_hi_j,
        "integrated_j": integrated_j,
        "truth_j": truth_j,
        "flags": dict(tracker.summary().flags),
    }
    held = truth_j is None or totals.energy_lo_j <= truth_j <= totals.energy_hi_j
    return Part(body, held and abs(ratio - 1) < 0.1, result)


def marked_tests(*, dry: bool) -> Part:
    """``pytest -m gpu`` over the files that have such tests."""
    del dry
    files = sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text("utf-8")
    )
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *files, "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=TESTS_AT_MOST_S, check=False)
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        output, code = _text(error.stdout) + f"\nended after {TESTS_AT_MOST_S:.0f} s", -1
    lines = output.strip().splitlines()
    return Part("```\n" + "\n".join(lines[-25:]) + "\n```", code == 0, {"rc": code, "tail": lines[-60:]})


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


PARTS: dict[str, tuple[Callable[..., Part], float]] = {
    "counter": (counter, 60.0),
    "kernels": (kernels, 60.0),
    "synchronisation": (synchronisation, 60.0),
    "boundaries": (boundaries, 60.0),
    "energy": (energy, 60.0),
    "utilisation": (utilisation, 250.0),
    "marked_tests": (marked_tests, TESTS_AT_MOST_S),
}
"""Each part, the quick ones first, with the seconds that it may take: it is left out where less is left."""


def main() -> None:
    """Runs the parts and writes ``<results>/<device>/gpu_check.*``."""
    begin_s = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="run what a CPU can; write nothing unless --results is given")
    parser.add_argument("--only", choices=PARTS, help="run one part")
    parser.add_argument("--results", type=Path, help="the folder to write to (default: benchmarks/results)")
    chosen = parser.parse_args()
    dry = chosen.dry_run
    if not dry and not torch.cuda.is_available():
        print("There is no CUDA GPU here, so there is nothing to check: run this on a machine with one, or with --dry-run.")
        return
    warnings.simplefilter("ignore")
    rows: list[list[str]] = []
    bodies: list[str] = []
    results: dict[str, Any] = {}
    for name in [chosen.only] if chosen.only else PARTS:
        run, at_most_s = PARTS[name]
        part_s = time.monotonic()
        if part_s - begin_s + at_most_s > DEADLINE_S:
            part = Part(f"Left out: {DEADLINE_S - (part_s - begin_s):.0f} s were left.", False, {"error": "no time left"})
        else:
            part = guarded(run, dry=dry)
        took_s = time.monotonic() - part_s
        verdict = {True: "passed", False: "FAILED", None: "–"}[part.passed]
        print(f"{name}: {verdict} in {took_s:.0f} s", file=sys.stderr, flush=True)
        rows.append([name, verdict, f"{took_s:.0f}"])
        bodies.append(f"## {name}\n\n{inspect.getdoc(run)}\n\n{part.body}")
        results[name] = {"passed": part.passed, "seconds": round(took_s, 1), **part.result}
        body = table(["part", "result", "s"], rows) + "\n\n" + "\n\n".join(bodies)
        if not dry or chosen.results:  # after each part: the machine may be taken away
            folder = chosen.results or RESULTS
            write("gpu_check", "What only a GPU can show", body, {"parts": results}, results=folder, quiet=True)
    print(body)


def guarded(run: Callable[..., Part], *, dry: bool) -> Part:
    """What a part found; one that fails, even by an exit, must not lose the others."""
    try:
        return run(dry=dry)
    except (Exception, SystemExit) as error:
        trace = traceback.format_exc()[-2000:]
        return Part(f"```\n{trace}\n```", False, {"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
