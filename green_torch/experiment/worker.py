"""The worker process: one variant's whole life, from loading torch to closing its run."""

from __future__ import annotations

import importlib
import math
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from green_torch.errors import ArgumentError, GreenTorchWarning
from green_torch.experiment.applied import CannotRunError, Loss, Trainee, apart_in_cache, applied, seed_all
from green_torch.experiment.conditions import watch
from green_torch.experiment.kernels import Seen, seen
from green_torch.experiment.results import NOT_FIT, Block, built_in
from green_torch.experiment.variants import Build, UserStep, Variant, Workload
from green_torch.records import Flag, Item, Manifest, Phase, RunSummary, StepRecord
from green_torch.sinks.codec import plain
from green_torch.surroundings import peak_memory_bytes
from green_torch.totals import whole_sum

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import torch

    from green_torch.tracker import Tracker

SETTLE_STEPS = 1  # taken before each block and left out of it: caches, clocks and allocators come back from the other's turn
_PATIENCE_S = 2.0  # how long a block waits for its records beyond the tracker's own patience
_CLEAR_REFS = Path("/proc/self/clear_refs")  # "5" sets VmHWM to what is resident: https://docs.kernel.org/filesystems/proc.html
CUT_SHORT = 2  # what the parent leaves in ``stop`` where the comparison was interrupted; 1 where it has come to its end
_WHOLE_BLOCK = 1_000_000_000  # steps a record: none ends before the block does
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # in a RuntimeError of torch's CPU allocator
_NO_KERNEL = ("No available kernel", "No viable backend for scaled_dot_product_attention")


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
    comparison: Mapping[str, Any] | None = None  # what the dashboard must know of it to pair its runs' blocks
    largest_batch: bool | int = False  # whether, and in how much memory, it is sought afterwards


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
    """The warm-up is over; ``step_s`` seconds is what a step took at its end. The rest is named as in ``VariantResult``.

    ``device`` is "cpu", or an accelerator's type and number: "cuda:0".
    """

    step_s: float
    threads: int
    manifest: Manifest
    kernels: tuple[str, ...]
    ran: str
    applied_by_user: bool
    n_skipped: int | None
    device: str


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
    """A wrong argument, as it is for every variant: of ``green_torch.track``, or of the search for the largest batch."""

    error: ArgumentError


WARM_UP = "warm up"


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the end of the block; a process that is started in it begins without hearing it, until it says otherwise."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_interrupts() -> None:
    """For a process that was started under :func:`interrupts_held`: Ctrl-C reaches the whole group, and the parent decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def work(job: Job, pipe: Connection, stop: Any) -> None:
    """A worker's life: load, build, warm up, measure blocks when asked, close. Ends when the parent is gone."""
    ignore_interrupts()
    warnings.simplefilter("ignore", GreenTorchWarning)  # they come back with the summary, once
    try:
        serving = _serve(job, partial(_received, pipe), lambda: bool(stop.value), lambda: stop.value == CUT_SHORT)
        with closing(serving) as replies:
            for reply in replies:
                pipe.send(reply)
    except BaseException as error:  # whatever the user's code raises is this variant's result
        with suppress(OSError):  # the parent may be gone
            pipe.send(Failed(told(error)))


def _received(pipe: Connection) -> Any:
    """The next order; the order to close where nobody is left to give one."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return None


def told(error: BaseException) -> str:
    """What happened, and where."""
    if isinstance(error, CannotRunError):
        return f"can't run here: {error}"
    if isinstance(error, ArgumentError):
        return str(error)
    trace = traceback.extract_tb(error.__traceback__)
    text = f"{type(error).__name__}: {error}" + (f" ({trace[-1].filename}:{trace[-1].lineno})" if trace else "")
    runtime = str(error) if isinstance(error, RuntimeError) else ""
    if type(error).__name__ in {"OutOfMemoryError", "MemoryError"} or any(sign in runtime for sign in _NO_MEMORY):
        return f"{NOT_FIT}: {text}"
    if any(sign in runtime for sign in _NO_KERNEL):
        return f"can't run here: the pinned attention kernel does not take this model's shapes, mask or dtype: {text}"
    return text


def ending(process: str, code: int | None) -> str:
    """How a process ended that was to answer, by its exit code; the kernel ends by SIGKILL what takes the memory that others need."""
    if code is None or code >= 0:
        return f"{process} ended with code {code} before it answered; what it printed says why"
    name = signal.Signals(-code).name
    if name == "SIGKILL":
        return f"{NOT_FIT}: {process} was killed (SIGKILL), most likely by the kernel for want of memory"
    return f"{process} was ended by {name}"


def _serve(
    job: Job, receive: Callable[[], Any], stopped: Callable[[], bool], interrupted: Callable[[], bool] = lambda: False
) -> Generator[object, None, None]:
    """Does what it receives orders for, and yields the replies; ``None`` is the order to close, as a run that was ``interrupted`` or not."""
    apart_in_cache(job.variant)
    try:
        build = loaded(job.build)
    except ArgumentError as error:
        yield Refused(error)
        return

    import torch

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    yield Ready()
    if receive() is None:
        return
    seed_all(job.seed)
    bench = _Bench(applied(job.variant, build(job.variant), job.seed), job.track)
    records = _Records()
    try:
        tracker = _tracker(job, bench, records)
    except ArgumentError as error:
        yield Refused(error)
        return
    blocks: list[Block] = []
    with suppress(KeyboardInterrupt), tracker:
        step_s = bench.warm_up(tracker, job.warmup_steps)
        with tracker.suspend():
            bench.leave(tracker)
            yield Warm(
                step_s,
                torch.get_num_threads(),
                tracker.manifest,
                bench.seen.kernels,
                bench.trainee.describe(bench.seen),
                bench.trainee.applied_by_user,
                bench.trainee.skipped(),
                _named(bench.trainee.device),
            )
            order = receive()
        while order is not None:
            span = bench.run(tracker, order.n_steps, stopped)
            with tracker.suspend():
                bench.leave(tracker)
                yield Measured()
                following = receive()
                if span is not None:  # its energy was settled while another variant had its turn
                    if not records.reach(span.last_step):
                        tracker.flush()
                    block = _block(order, span, records.take(span.first_step, span.last_step, _PATIENCE_S))
                    blocks.append(block)
                    if following is None or len(blocks).bit_count() == 1:
                        _show(tracker, job, bench, blocks, span.last_step)
                    yield block
                order = following
        if interrupted():
            raise KeyboardInterrupt
    yield Done(tracker.summary())


def _tracker(job: Job, bench: _Bench, records: _Records) -> Tracker:
    """The variant's run, not yet begun; ArgumentError where an option is wrong."""
    from green_torch.tracker import track

    if job.largest_batch is not False:
        check_memory(bench.trainee.device, None if job.largest_batch is True else job.largest_batch, "largest_batch")
    return track(
        bench.trainee.model,
        log_dir=job.log_dir,
        run_name=job.variant.name,
        label=job.variant.name,
        # bounds are tight only over a whole block; on a CPU they are tight enough, or there are none
        log_every_n_steps=1 if bench.trainee.device.type == "cpu" else _WHOLE_BLOCK,
        **{**job.track, "sinks": (*job.track.get("sinks", ()), records)},
    )


def _named(device: torch.device) -> str:
    return device.type if device.type == "cpu" else f"{device.type}:{device.index or 0}"


def _show(tracker: Tracker, job: Job, bench: _Bench, blocks: Sequence[Block], step: int) -> None:
    """Gives TensorBoard the blocks so far: after 1, 2, 4, … and at the end."""
    if tracker.writer is None or job.comparison is None:
        return
    from green_torch.sinks.tensorboard import TensorBoardSink

    TensorBoardSink(tracker.writer).write_comparison(
        {
            **job.comparison,
            "ran": bench.trainee.describe(bench.seen),
            "settings": repr(replace(job.variant, name="any")),
            "built_in": built_in(job.variant),
            "blocks": [
                {**plain(block), "diverged": block.loss is not None and not math.isfinite(block.loss)} for block in blocks
            ],
        },
        step,
    )


def loaded(build: Build) -> Callable[[Variant], Workload | UserStep]:
    """The function that ``build`` names, or is.

    Raises:
        ArgumentError: its module has no such function.
    """
    if not isinstance(build, str):
        return build
    module, _, name = build.partition(":")
    there = importlib.import_module(module)
    function: Callable[[Variant], Workload | UserStep] | None = getattr(there, name, None)
    if not callable(function):
        own = [key for key, value in vars(there).items() if getattr(value, "__module__", "") == module and callable(value)]
        raise ArgumentError(f"{build!r}: {module} has no function {name!r}; it has {', '.join(sorted(own)) or 'none'}.")
    return function


def check_memory(device: torch.device, memory_bytes: int | None, argument: str) -> None:
    """Whether a largest batch can be told there; ``argument`` is what the limit is called.

    Raises:
        ArgumentError: a CPU without a limit, or one that does not tell a process's peak memory.
    """
    if device.type != "cpu":
        return
    if memory_bytes is None:
        raise ArgumentError(
            f"On a CPU a batch fits until the machine swaps: say what must hold it, such as {argument}=4 * 2**30 (4 GiB)."
        )
    if sys.platform != "linux":
        raise ArgumentError("The largest batch on a CPU is found on Linux alone, where a process tells its peak memory.")


@dataclass(frozen=True, slots=True)
class _Span:
    """The steps of a block, by number; the seconds they took by the host's clock, their mean loss, and what was seen meanwhile."""

    first_step: int
    last_step: int
    duration_s: float
    loss: float | None
    n_skipped: int | None
    peak_memory_bytes: int | None
    conditions: Mapping[str, Any]


class _Bench:
    """Trains a trainee step by step, and keeps what is seen on the way; ``seen`` is what ran in a warm step."""

    def __init__(self, trainee: Trainee, track: Mapping[str, Any]) -> None:
        self.trainee = trainee
        self.seen = Seen()
        self._on_cpu = trainee.device.type == "cpu"
        self._watch = watch(track, trainee.device)
        self._n_steps = 0
        self._losses: list[Loss] = []  # since they were last written

    def warm_up(self, tracker: Tracker, n_steps: int) -> float:
        """Takes steps, counting the FLOPs of the first and looking at the kernels of the second; the least seconds of the later half."""
        times_s = []
        for number in range(n_steps):
            start_s = time.monotonic()
            # counted live, except where counting would keep a graph from being compiled: then the tracker counts on a copy
            counting = tracker.count() if number == 0 and not self.trainee.compiled else nullcontext()
            looking = seen() if number == min(1, n_steps - 1) else nullcontext(self.seen)
            with counting, looking as self.seen:
                loss, units = self.trainee.train()
            self._mark(tracker, loss, units, wait=True)
            times_s.append(time.monotonic() - start_s)
        return min(times_s[len(times_s) // 2 :])

    def run(self, tracker: Tracker, n_steps: int, stopped: Callable[[], bool]) -> _Span | None:
        """Settles, then takes the steps of a block; ``None`` where it was stopped on the way."""
        before = self.trainee.skipped()
        for _ in range(SETTLE_STEPS):
            self._mark(tracker, *self.trainee.train(), wait=True)
        with tracker.suspend():  # ends the record, so that the block begins with one of its own
            self._watch.begin()
            _forget_peak_memory(self.trainee.device)
            start_s = time.monotonic()
        first_step = self._n_steps
        for number in range(n_steps):
            if stopped():
                return None
            trained = self.trainee.train()
            self._watch.look()  # before the device is waited for: it is at work
            self._mark(tracker, *trained, wait=number == n_steps - 1)
        duration_s = time.monotonic() - start_s
        losses = [None if loss is None else float(loss) for loss in self._losses[-n_steps:]]
        total, after = whole_sum(losses), self.trainee.skipped()
        return _Span(
            first_step,
            self._n_steps - 1,
            duration_s,
            None if total is None else total / n_steps,
            None if before is None or after is None else after - before,
            _peak_memory_bytes(self.trainee.device),
            self._watch.told(),
        )

    def leave(self, tracker: Tracker) -> None:
        """Gives TensorBoard the losses since last time, on the step axis of everything else, and the device's spare memory to the others."""
        if tracker.writer is not None:
            for step, loss in enumerate(self._losses, self._n_steps - len(self._losses)):
                if loss is not None:
                    tracker.writer.add_scalar("loss", float(loss), step)
        self._losses.clear()
        if self.trainee.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def _mark(self, tracker: Tracker, loss: Loss, units: Mapping[str, int], *, wait: bool) -> None:
        """Ends a step; at either end of a block the device is waited for, so that the block's time and joules are its own."""
        if wait and not self._on_cpu:
            import torch

            torch.accelerator.synchronize()
        tracker.step(**units)
        self._n_steps += 1
        self._losses.append(loss)


def _peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory in use since it was forgotten: the GPU's by torch, else this process's by the kernel; ``None`` where neither tells.

    Not ``getrusage``: its figure of a spawned process begins with what its parent had.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    if device.type != "cpu":
        return None
    return peak_memory_bytes(None)


def _forget_peak_memory(device: torch.device) -> None:
    """The peak is what is in use now: a block begins, and what warming up took is not its own. Where this can't be, it stays."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with suppress(OSError):  # not Linux, or not its whole /proc
            _CLEAR_REFS.write_text("5", encoding="ascii")


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
    """Sums records; where some are missing, what they would have told is not known, and where a meter failed the joules are not."""
    n_steps = span.last_step - span.first_step + 1
    whole = sum(record.n_steps for record in records) == n_steps
    metered = whole and not any(record.flagged(Flag.METER_FAILED) for record in records)

    def total(name: str) -> float | None:
        return whole_sum(getattr(record, name) for record in records) if whole else None

    def of_energy(name: str) -> float | None:
        return total(name) if metered else None

    def count(name: str) -> int | None:
        found = total(name)
        return None if found is None else int(found)

    return Block(
        round=order.round,
        position=order.position,
        n_steps=n_steps,
        duration_s=total("duration_s") or span.duration_s,
        energy_j=of_energy("energy_j"),
        energy_lo_j=of_energy("energy_lo_j"),
        energy_hi_j=of_energy("energy_hi_j"),
        emissions_g=of_energy("emissions_g"),
        embodied_g=total("embodied_g"),
        model_flops=total("model_flops"),
        hardware_flops=total("hardware_flops"),
        capacity_flops=whole_sum(_product(record.peak_flop_per_s, record.duration_s) for record in records) if whole else None,
        tokens=count("tokens"),
        samples=count("samples"),
        loss=span.loss,
        peak_memory_bytes=span.peak_memory_bytes,
        flags=tuple(sorted({flag for record in records for flag in record.flags})),
        domains_j=_by_domain(records) if metered else {},
        n_skipped=span.n_skipped,
        **span.conditions,
    )


def _by_domain(records: Sequence[StepRecord]) -> dict[str, float]:
    """Joules of each device over all records."""
    total: Any = Counter()  # joules add up as counts do
    for record in records:
        total.update({domain.name: domain.energy_j for domain in record.domains})
    return dict(total)


def _product(a: float | None, b: float) -> float | None:
    return None if a is None else a * b
