"""The worker process: one variant's whole life, from loading torch to closing its run."""

from __future__ import annotations

import importlib
import math
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from green_torch.errors import ArgumentError, GreenTorchWarning
from green_torch.experiment.results import Block, known_sum
from green_torch.experiment.variants import Build, Variant, Workload
from green_torch.records import Item, Manifest, Phase, RunSummary, StepRecord

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import torch

    from green_torch.tracker import Tracker

SETTLE_STEPS = 1  # taken before each block and left out of it: caches, clocks and allocators come back from the other's turn
_PATIENCE_S = 2.0  # how long a block waits for its records beyond the tracker's own patience
_WHOLE_BLOCK = 1_000_000_000  # steps a record: none ends before the block does


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker is started with."""

    build: Build
    variant: Variant
    seed: int
    warmup_steps: int
    log_dir: str | None
    threads: int | None
    track: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Order:
    """One block to measure."""

    round: int
    position: int
    n_steps: int


@dataclass(frozen=True, slots=True)
class Ready:
    """Torch and the user's code are loaded."""


@dataclass(frozen=True, slots=True)
class Warm:
    """The warm-up is over; ``step_s`` seconds is what a step took at its end."""

    step_s: float
    threads: int
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Measured:
    """The steps of a block were taken; the block comes with the next order, when its energy is settled."""


@dataclass(frozen=True, slots=True)
class Done:
    """The run is closed."""

    summary: RunSummary


@dataclass(frozen=True, slots=True)
class Failed:
    """The variant can't go on."""

    text: str


@dataclass(frozen=True, slots=True)
class Refused:
    """``green_torch.track`` was given a wrong argument, as it is for every variant."""

    error: ArgumentError


WARM_UP = "warm up"


def work(job: Job, pipe: Connection, stop: Any) -> None:
    """A worker's life: load, build, warm up, measure blocks when asked, close. Ends when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    warnings.simplefilter("ignore", GreenTorchWarning)  # they come back with the summary, once
    try:
        with closing(_serve(job, partial(_received, pipe), lambda: bool(stop.value))) as replies:
            for reply in replies:
                pipe.send(reply)
    except BaseException as error:  # whatever the user's code raises is this variant's result
        with suppress(OSError):  # the parent may be gone
            pipe.send(Failed(_told(error)))


def _received(pipe: Connection) -> Any:
    """The next order; the order to close where nobody is left to give one."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return None


def _told(error: BaseException) -> str:
    """What happened, and where."""
    trace = traceback.extract_tb(error.__traceback__)
    text = f"{type(error).__name__}: {error}" + (f" ({trace[-1].filename}:{trace[-1].lineno})" if trace else "")
    return f"does not fit in memory: {text}" if type(error).__name__ in {"OutOfMemoryError", "MemoryError"} else text


def _serve(job: Job, receive: Callable[[], Any], stopped: Callable[[], bool]) -> Generator[object, None, None]:
    """Does what it receives orders for, and yields the replies; ``None`` is the order to close."""
    build = _loaded(job.build)

    import torch

    from green_torch.tracker import track

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    yield Ready()
    if receive() is None:
        return
    torch.manual_seed(job.seed)
    bench = _Bench(job, build(job.variant))
    records = _Records()
    try:
        tracker = track(
            bench.model,
            log_dir=job.log_dir,
            run_name=job.variant.name,
            label=job.variant.name,
            # bounds are tight only over a whole block; on a CPU they are tight enough, or there are none
            log_every_n_steps=1 if bench.device.type == "cpu" else _WHOLE_BLOCK,
            **{**job.track, "sinks": (*job.track.get("sinks", ()), records)},
        )
    except ArgumentError as error:
        yield Refused(error)
        return
    with tracker:
        step_s = bench.warm_up(tracker, job.warmup_steps)
        with tracker.suspend():
            bench.write_losses(tracker)
            yield Warm(step_s, torch.get_num_threads(), tracker.manifest)
            order = receive()
        while order is not None:
            span = bench.run(tracker, order.n_steps, stopped)
            with tracker.suspend():
                bench.write_losses(tracker)
                yield Measured()
                following = receive()
                if span is not None:  # its energy was settled while another variant had its turn
                    if not records.reach(span.last_step):
                        tracker.flush()
                    yield _block(order, span, records.take(span.first_step, span.last_step, _PATIENCE_S))
                order = following
    yield Done(tracker.summary())


def _loaded(build: Build) -> Callable[[Variant], Workload]:
    if not isinstance(build, str):
        return build
    module, _, name = build.partition(":")
    function: Callable[[Variant], Workload] = getattr(importlib.import_module(module), name)
    return function


@dataclass(frozen=True, slots=True)
class _Span:
    """The steps of a block, by number; the seconds they took by the host's clock, and their mean loss."""

    first_step: int
    last_step: int
    duration_s: float
    loss: float


class _Bench:
    """A workload with its variant applied, training step by step."""

    def __init__(self, job: Job, workload: Workload) -> None:
        import torch

        variant, model = job.variant, workload.model
        first = next(model.parameters(), None)
        self.device = first.device if first is not None else torch.device("cpu")
        if variant.matmul_precision is not None:
            torch.set_float32_matmul_precision(variant.matmul_precision)
            torch.backends.cudnn.allow_tf32 = variant.matmul_precision != "highest"
        self._dtype = torch.bfloat16 if variant.precision == "bf16-true" else None
        model.to(self._dtype).train()
        if variant.gradient_checkpointing:
            _checkpoint(model)
        self._compiled = variant.compile
        self.model: Any = torch.compile(model) if variant.compile else model
        self._mixed = variant.precision == "bf16-mixed"
        self._sdpa_backend = variant.sdpa_backend
        self._workload = workload
        self._optimizer = workload.optimizer(model.parameters())
        self._batches = _endless(workload.batches, job.seed)
        self._n_steps = 0
        self._losses: list[torch.Tensor] = []  # since they were last written

    def warm_up(self, tracker: Tracker, n_steps: int) -> float:
        """Takes steps, counting the FLOPs of the first; returns the least seconds of the later half."""
        times_s = []
        for number in range(n_steps):
            start_s = time.monotonic()
            # counted live, except where counting would keep a graph from being compiled: then the tracker counts on a copy
            with tracker.count() if number == 0 and not self._compiled else nullcontext():
                loss, units = self._train()
            self._mark(tracker, loss, units, wait=True)
            times_s.append(time.monotonic() - start_s)
        return min(times_s[len(times_s) // 2 :])

    def run(self, tracker: Tracker, n_steps: int, stopped: Callable[[], bool]) -> _Span | None:
        """Settles, then takes the steps of a block; ``None`` where it was stopped on the way."""
        for _ in range(SETTLE_STEPS):
            self._mark(tracker, *self._train(), wait=True)
        with tracker.suspend():  # ends the record, so that the block begins with one of its own
            start_s = time.monotonic()
        first_step = self._n_steps
        for number in range(n_steps):
            if stopped():
                return None
            self._mark(tracker, *self._train(), wait=number == n_steps - 1)
        duration_s = time.monotonic() - start_s
        loss = math.fsum(float(loss) for loss in self._losses[-n_steps:]) / n_steps
        return _Span(first_step, self._n_steps - 1, duration_s, loss)

    def write_losses(self, tracker: Tracker) -> None:
        """Gives TensorBoard the losses since last time, on the step axis of everything else."""
        if tracker.writer is not None:
            for step, loss in enumerate(self._losses, self._n_steps - len(self._losses)):
                tracker.writer.add_scalar("loss", float(loss), step)
        self._losses.clear()

    def _train(self) -> tuple[torch.Tensor, Mapping[str, int]]:
        import torch

        batch = next(self._batches)
        moved = _moved(batch, self.device, self._dtype)
        with _attention(self._sdpa_backend):  # around backward too: recomputation must choose the same kernel
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._mixed):
                loss = self._workload.loss(self.model, moved)
            loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach(), self._workload.units(batch)

    def _mark(self, tracker: Tracker, loss: torch.Tensor, units: Mapping[str, int], *, wait: bool) -> None:
        """Ends a step; at either end of a block the device is waited for, so that the block's time and joules are its own."""
        if wait and self.device.type != "cpu":
            import torch

            torch.accelerator.synchronize()
        tracker.step(**units)
        self._n_steps += 1
        self._losses.append(loss)


class _Records:
    """A sink that keeps train records until they are taken."""

    def __init__(self) -> None:
        self._records: list[StepRecord] = []
        self._news = threading.Condition()

    def write(self, item: Item) -> None:
        """Keeps it if it is one."""
        if isinstance(item, StepRecord) and item.phase is Phase.TRAIN:
            with self._news:
                self._records.append(item)
                self._news.notify_all()

    def close(self) -> None:
        """Has nothing to close."""

    def reach(self, step: int) -> bool:
        """Whether the record of this step is there."""
        with self._news:
            return any(record.step >= step for record in self._records)

    def take(self, first_step: int, last_step: int, timeout_s: float) -> list[StepRecord]:
        """The records of these steps, waiting for the last one at most so long; forgets everything older."""
        with self._news:
            self._news.wait_for(lambda: any(record.step >= last_step for record in self._records), timeout_s)
            found = [record for record in self._records if first_step <= record.step <= last_step]
            self._records.clear()
        return found


def _block(order: Order, span: _Span, records: Sequence[StepRecord]) -> Block:
    """Sums records; where some are missing, what they would have told is not known."""
    n_steps = span.last_step - span.first_step + 1
    whole = sum(record.n_steps for record in records) == n_steps

    def total(name: str) -> float | None:
        return known_sum(getattr(record, name) for record in records) if whole else None

    def count(name: str) -> int | None:
        found = total(name)
        return None if found is None else int(found)

    return Block(
        round=order.round,
        position=order.position,
        n_steps=n_steps,
        duration_s=total("duration_s") or span.duration_s,
        energy_j=total("energy_j"),
        energy_lo_j=total("energy_lo_j"),
        energy_hi_j=total("energy_hi_j"),
        emissions_g=total("emissions_g"),
        model_flops=total("model_flops"),
        hardware_flops=total("hardware_flops"),
        capacity_flops=known_sum(_product(record.peak_flop_per_s, record.duration_s) for record in records) if whole else None,
        tokens=count("tokens"),
        samples=count("samples"),
        loss=span.loss,
        peak_memory_bytes=max((record.peak_memory_bytes for record in records if record.peak_memory_bytes), default=None),
        flags=tuple(sorted({flag for record in records for flag in record.flags})),
    )


def _product(a: float | None, b: float) -> float | None:
    return None if a is None else a * b


def _endless(batches: Callable[[int], Iterable[Any]], seed: int) -> Iterator[Any]:
    """The batches, again and again."""
    while True:
        empty = True
        for batch in batches(seed):
            empty = False
            yield batch
        if empty:
            raise ArgumentError(f"batches({seed}) yields nothing to train on.")


def _moved(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The batch on the device, its floating-point tensors in the dtype, through tuples, lists and mappings."""
    import torch

    if isinstance(batch, torch.Tensor):
        return batch.to(device, dtype if batch.is_floating_point() else None, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device, dtype) for key, value in batch.items()}
    return type(batch)(_moved(value, device, dtype) for value in batch) if isinstance(batch, list | tuple) else batch


def _attention(backend: str | None) -> AbstractContextManager[None]:
    """Pins torch's attention kernel."""
    if backend is None:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {
        "math": SDPBackend.MATH,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    pinned: AbstractContextManager[None] = sdpa_kernel(kernels[backend])
    return pinned


def _checkpoint(model: torch.nn.Module) -> None:
    """Recomputes each module of the outermost lists of modules in backward.

    Raises:
        ArgumentError: the model has none.
    """
    from torch.utils.checkpoint import checkpoint

    blocks = list(_listed(model))
    if not blocks:
        raise ArgumentError(
            f"gradient_checkpointing needs blocks in a torch.nn.ModuleList, and {type(model).__name__} has none."
        )
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _listed(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    import torch

    for child in model.children():
        yield from child if isinstance(child, torch.nn.ModuleList) else _listed(child)
