"""Everything that only a GPU can show, in one call: ``python benchmarks/gpu_check.py`` (under ten minutes on a machine with CUDA).

The energy counter's period, cost and honesty; that a tracked loop synchronises nothing, and what ``step()`` costs; where step
boundaries are put against a synchronised truth; FLOP counts of each attention kernel; MFU and HFU of BF16, flash and checkpointing
against FP32 on a GPT of 124M; a run's joules against integrated power; the GPU-marked tests. Each part is guarded: one that fails
leaves the others' results. ``--dry-run`` runs on any machine what of each part a CPU and a simulated driver can run, and writes
nothing; ``--only NAME`` runs one part. Without a GPU it says so and leaves.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import threading
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from report import table, write
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

ROOT = Path(__file__).resolve().parent.parent
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
    sys.path.insert(0, str(ROOT))
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


def attention(*, dry: bool) -> Part:
    """FLOPs of each attention kernel, forward and backward: the model's are the same, the hardware's what the kernel does."""
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    batch, heads, length, width = (2, 2, 64, 16) if dry else (4, 12, 1024, 64)
    expected = 3 * 4 * batch * heads * length**2 * width
    rows, result, passed = [], {}, True
    backends = {
        "math": SDPBackend.MATH,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    for name, backend in backends.items():
        q, k, v = (torch.randn(batch, heads, length, width, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        try:
            with sdpa_kernel(backend), LiveCounter() as live:
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
        except RuntimeError as error:
            rows.append([name, "not here", str(error).splitlines()[0][:60], "", ""])
            result[name] = None
            continue
        count = live.count()
        right = count.model_flops == expected and not count.uncounted_ops
        passed &= right
        ratio = count.hardware_flops / count.model_flops if count.model_flops else float("nan")
        rows.append(
            [name, f"{count.model_flops:,.0f}", f"{ratio:.4f}", ", ".join(count.uncounted_ops), "yes" if right else "NO"]
        )
        result[name] = {
            "model_flops": count.model_flops,
            "hardware_flops": count.hardware_flops,
            "uncounted": count.uncounted_ops,
        }
    body = table(["kernel", "model FLOPs", "hardware / model", "uncounted", f"= {expected:,}"], rows)
    return Part(body, passed, {"expected_model_flops": expected, **result})


def utilisation(*, dry: bool) -> Part:
    """Variants of the built-in GPT compared: step time, joules, MFU, HFU; its model FLOPs must not depend on the variant."""
    names = ["fp32", "bf16", "bf16+flash", "bf16+flash+checkpoint"]
    options: dict[str, Any] = (
        {"blocks": 2, "steps_per_block": 2, "warmup_steps": 1} if dry else {"blocks": 6, "budget_s": 120.0}
    )
    compared = compare("green_torch.gpt:workload", names[::3] if dry else names, track={"intensity": 100}, **options)
    rows, flops = [], {}
    for result in compared.results:
        if result.error or not result.blocks:
            rows.append([result.name, f"failed: {result.error}", *[""] * 6])
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
    header = ["variant", "s a step", "J a step", "model FLOPs a step", "model FLOP/s", "MFU", "HFU", "peak FLOP/s"]
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
    """``pytest -m gpu``."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests", "-q", "-rs", "-p", "no:cacheprovider"]
    command[5:6] = ["tests/test_gpu.py"] if dry else ["tests"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200, check=False)
    lines = done.stdout.strip().splitlines()
    return Part("```\n" + "\n".join(lines[-25:]) + "\n```", done.returncode == 0, {"rc": done.returncode, "tail": lines[-60:]})


PARTS: dict[str, Callable[..., Part]] = {
    "counter": counter,
    "synchronisation": synchronisation,
    "boundaries": boundaries,
    "attention": attention,
    "energy": energy,
    "utilisation": utilisation,
    "marked_tests": marked_tests,
}


def main() -> None:
    """Runs the parts and writes ``results/<device>/gpu_check.*``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="run what a CPU can; write nothing")
    parser.add_argument("--only", choices=PARTS, help="run one part")
    chosen = parser.parse_args()
    dry = chosen.dry_run
    if not dry and not torch.cuda.is_available():
        print("There is no CUDA GPU here, so there is nothing to check: run this on a machine with one, or with --dry-run.")
        return
    warnings.simplefilter("ignore")
    rows, bodies, results = [], [], {}
    for name in [chosen.only] if chosen.only else PARTS:
        begin_s = time.monotonic()
        try:
            part = PARTS[name](dry=dry)
        except Exception as error:  # one part must not lose the others
            part = Part(f"```\n{traceback.format_exc()[-2000:]}\n```", False, {"error": f"{type(error).__name__}: {error}"})
        took_s = time.monotonic() - begin_s
        verdict = {True: "passed", False: "FAILED", None: "–"}[part.passed]
        print(f"{name}: {verdict} in {took_s:.0f} s", file=sys.stderr, flush=True)
        doc = (PARTS[name].__doc__ or "").strip()
        rows.append([name, verdict, f"{took_s:.0f}"])
        bodies.append(f"## {name}\n\n{doc}\n\n{part.body}")
        results[name] = {"passed": part.passed, "seconds": round(took_s, 1), **part.result}
    body = table(["part", "result", "s"], rows) + "\n\n" + "\n\n".join(bodies)
    if dry:
        print(body)
    else:
        write("gpu_check", "What only a GPU can show", body, {"parts": results})


if __name__ == "__main__":
    main()
