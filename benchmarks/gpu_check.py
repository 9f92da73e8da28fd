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
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cuCtxSynchronize")
RECORDS = ("cudaEventRecord", "hipEventRecord")
AT_MOST_US = 1_000.0  # that a boundary may be off
BRACKET_AT_MOST_US = 1_500.0  # an anchor's 300 µs, and twice 100 ppm of the five seconds to the next one


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
    """The counter's update period, a reading's cost, agreement with integrated power, and whether it is part-time: all must be known.

    A dry run has nothing to make bursts with, so that whether the counter is part-time stays open.
    """
    with driver(dry=dry):
        found, missing = calibrate_gpus(1.0 if dry else 12.0, keep=not dry)
    rows = [[name, text] for one in found for name, text in one.lines()]
    body = table(["", ""], rows) + "".join(f"\n\nmissing: {text}" for text in missing)
    known = [
        one.period_median_s is not None and one.agreement is not None and (dry or one.part_time is not None) for one in found
    ]
    return Part(body, bool(found) and all(known), {"gpus": [asdict(one) for one in found], "missing": missing})


def synchronisation(*, dry: bool) -> Part:
    """A tracked loop while every synchronisation is an error, then under the profiler beside an untracked one; ``step()``'s cost.

    An error of our own calls, such as one of these, leaves the device for the host's clock: that must not have happened by the end.
    The profiler must see an event for each step.
    """
    device = "cpu" if dry else "cuda"
    model, step = training(device)
    n_steps = 20 if dry else 500
    n_profiled = n_steps // 5
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
            waits, records = calls(device, lambda: tracked(n_profiled))
        their_waits, their_records = calls(device, lambda: [step() for _ in range(n_profiled)])
    on_device = tracker._boundaries.on_device  # noqa: SLF001 - a user has no use for it
    mode = "on the CPU, which has nothing to wait for" if dry else "with torch.cuda.set_sync_debug_mode('error')"
    body = (
        f"{n_steps} tracked steps passed {mode}, and at the end boundaries were {'the device' if on_device else 'the host'}'s. Under "
        f"the profiler a loop of {n_profiled} steps made {waits} synchronising calls with tracking and {their_waits} without, and "
        f"recorded {records} events with and {their_records} without. `step()` took {median_us:.1f} µs (median; 95th percentile "
        f"{p95_us:.1f} µs) on the training thread."
    ) + "".join(f"\n\nwarning: {text}" for text in tracker.summary().warnings)
    result = {
        "steps": n_steps,
        "steps_profiled": n_profiled,
        "on_device": on_device,
        "syncs_tracked": waits,
        "syncs_untracked": their_waits,
        "events_tracked": records,
        "events_untracked": their_records,
        "step_median_us": median_us,
        "step_p95_us": p95_us,
        "warnings": tracker.summary().warnings,
    }
    return Part(body, waits <= their_waits and (dry or (on_device and records >= their_records + n_profiled)), result)


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


def calls(device: str, run: Callable[[], object]) -> tuple[int, int]:
    """CUDA calls that wait for the device (the profiler's own at the end included) and that record an event, while ``run`` runs."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as prof:
        run()
    names = [event.name for event in prof.events()]
    return sum(name.startswith(WAITS) for name in names), sum(name.startswith(RECORDS) for name in names)


class GpuQueue:
    """The GPU's queue, and a user's own events in it."""

    def __init__(self) -> None:
        self._a = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
        self._out = torch.empty_like(self._a)

    def busy(self, products: int) -> None:
        """Enqueues so many matrix products, of a quarter of a millisecond each on an H100."""
        for _ in range(products):
            torch.mm(self._a, self._a, out=self._out)

    def record(self) -> Any:
        """An event of the user's at this place of the queue."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def done(self, event: Any) -> bool:
        """Whether the GPU has passed it."""
        return bool(event.query())

    def elapsed_ms(self, first: Any, second: Any) -> float:
        """Milliseconds between two events that it has passed."""
        return float(first.elapsed_time(second))


class SimulatedQueue:
    """A device that works through a queue in the host's time, for a dry run; boundaries are marked on it, too (``DeviceEvents``)."""

    def __init__(self) -> None:
        self._free_ns = 0

    def busy(self, products: int) -> None:
        """Enqueues so many products of half a millisecond."""
        self._free_ns = max(self._free_ns, time.monotonic_ns()) + products * 500_000

    def record(self, *, aside: bool = False) -> Any:
        """An event, which is the instant at which it passes."""
        now_ns = time.monotonic_ns()
        return now_ns if aside else max(self._free_ns, now_ns)

    def done(self, event: Any) -> bool:
        """Whether it has passed."""
        return time.monotonic_ns() >= event

    def elapsed_ms(self, first: Any, second: Any) -> float:
        """Milliseconds between two events."""
        return (second - first) / 1e6

    def release(self, event: Any) -> None:
        """Nothing is kept of it."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the queue: between which instants the host, looking again and again, saw a user's event pass there, and our boundary.

    ``before_ns`` is ``None`` where it had passed at the first look. ``length_off_us``: how far the time since the place before it differs
    from that between the user's events; ``None`` of the first.
    """

    before_ns: int | None
    after_ns: int
    boundary: Instant
    length_off_us: float | None

    @property
    def off_us(self) -> float | None:
        """How far the boundary lies outside of what the host saw."""
        if self.before_ns is None:
            return None
        return max(self.before_ns - self.boundary.at_ns, self.boundary.at_ns - self.after_ns, 0) / 1e3

    @property
    def missed(self) -> bool:
        """Whether the boundary's bounds, widened by 50 µs since it is marked just behind the event, leave out what the host saw."""
        early = self.boundary.hi_ns + 50_000 < (self.before_ns or 0)
        return early or self.boundary.lo_ns - 50_000 > self.after_ns


def queued(queue: GpuQueue | SimulatedQueue, marker: Boundaries, ahead: int) -> list[Place]:
    """Marks a boundary beside a user's event at so many places of one queue and one more, and looks when each passes."""
    own, marks, seen = [], [], []
    for number in range(ahead + 1):
        queue.busy(16 if number % 2 else 4)
        own.append(queue.record())
        marks.append(marker.mark())
    for event in own:
        before_ns, look_ns = None, time.monotonic_ns()
        while not queue.done(event):
            before_ns, look_ns = look_ns, time.monotonic_ns()
        seen.append((before_ns, time.monotonic_ns()))
    time.sleep(0.003)  # so that when the marker first looks tells nothing of when a boundary passed
    marker.advance()
    boundaries = [marker.resolve(Instant.exact(mark)) for mark in marks]
    assert all(boundary is not None for boundary in boundaries), "a boundary that the device has passed is not resolved"
    lengths_us: list[float | None] = [None]
    for (first, second), (a, b) in zip(pairwise(own), pairwise(boundaries), strict=True):
        lengths_us.append(abs((b.at_ns - a.at_ns) / 1e3 - queue.elapsed_ms(first, second) * 1e3))
    return [Place(*bracket, *rest) for bracket, *rest in zip(seen, boundaries, lengths_us, strict=True)]


def boundaries(*, dry: bool) -> Part:
    """Where boundaries are put, against a user's own events at the same places of the queue: one or 20 steps of known lengths ahead.

    Each boundary must lie where the host, looking again and again, saw the user's event pass, and be as far from the one before as CUDA
    says of the user's events. Bounds must hold that, and be so narrow for so long that the clock must have been tied to the host's anew.
    """
    queue: GpuQueue | SimulatedQueue = SimulatedQueue() if dry else GpuQueue()
    marker = Boundaries(time.monotonic_ns, lambda text, **_: print(text, file=sys.stderr), may_use_device=not dry)
    if isinstance(queue, SimulatedQueue):
        marker.use(queue)
    queued(queue, marker, 20)  # warms up
    rows, result, passed = [], {}, True
    for ahead in (1, 20):
        places: list[Place] = []
        end_s = time.monotonic() + (0.1 if dry else 15.0)
        while time.monotonic() < end_s:
            places += queued(queue, marker, ahead)
        off_us = [place.off_us for place in places if place.off_us is not None]
        lengths_us = [place.length_off_us for place in places if place.length_off_us is not None]
        widths_us = [(place.boundary.hi_ns - place.boundary.lo_ns) / 1e3 for place in places]
        missed = sum(place.missed for place in places) / len(places)
        off, length, width = quantiles(off_us or [float("inf")]), quantiles(lengths_us), quantiles(widths_us)
        passed &= off[1] <= AT_MOST_US and length[1] <= AT_MOST_US and width[1] <= BRACKET_AT_MOST_US and missed <= 0.01
        rows.append([str(ahead), str(len(off_us)), *(f"{us:.0f}" for us in (*off, *length, *width)), f"{missed:.1%}"])
        result[f"ahead_{ahead}"] = {
            "places": len(places),
            "off_us": {"median": off[0], "p95": off[1], "max": max(off_us, default=None)},
            "length_off_us": {"median": length[0], "p95": length[1], "max": max(lengths_us)},
            "bracket_us": {"median": width[0], "p95": width[1]},
            "share_out_of_bounds": missed,
        }
    header = [
        "steps ahead",
        "places",
        "off µs, median",
        "p95",
        "length off µs, median",
        "p95",
        "bracket µs, median",
        "p95",
        "out of bounds",
    ]
    body = table(header, rows) + ("" if marker.on_device else "\n\nThe device was left for the host's clock.")
    return Part(body, passed and marker.on_device, {**result, "on_device": marker.on_device})


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
    """Variants of the built-in GPT compared: step time, joules, MFU, HFU, and whether traffic to and from memory is told.

    Its model FLOPs must not depend on the variant.
    """
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
    counts = not dry and torch.version.cuda is not None and torch.cuda.get_device_capability() >= (9, 0)
    told, n_variants = sum(one.memory_traffic_per_step_bytes is not None for one in compared.results), len(compared.results)
    body = table(header, rows) + (
        f"\n\nThe comparison's headline is {compared.headline}. What went to and from memory (NVML's GPM) was told of {told} of "
        f"{n_variants} variants"
        + (", though this GPU, of Hopper or later, counts it." if counts and told < n_variants else ".")
    )
    traffic = {"expected": counts, "variants_told": told}
    return Part(body, passed, {"expected_model_flops": expected, "memory_traffic": traffic, "comparison": compared.to_dict()})


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
            try:
                write("gpu_check", "What only a GPU can show", body, {"parts": results}, results=folder, quiet=True)
            except Exception as error:  # the parts to come must not be lost with it, and all is printed at the end
                print(f"the results so far are not written: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
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
