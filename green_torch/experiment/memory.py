"""Finds the largest batch of a variant that fits in memory: doubled until it doesn't, then halved in between.

Each size is tried in a process of its own (on Linux; elsewhere one process tries all, and only on an accelerator): it builds the
workload with ``variant.batch_size`` set and takes two steps, the second of which has the optimizer's state beside it. Running out of
memory, by whatever sign, is an answer.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from green_torch.errors import ArgumentError
from green_torch.experiment.applied import seed_all
from green_torch.experiment.results import NOT_FIT, LargestBatch, Trial
from green_torch.experiment.rounds import INTERRUPTED, check_compare, compare
from green_torch.experiment.variants import Build, Variant, parse_variant
from green_torch.experiment.worker import (
    Failed,
    Refused,
    check_memory,
    ending,
    ignore_interrupts,
    interrupts_held,
    loaded,
    told,
)
from green_torch.surroundings import peak_memory_bytes

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import torch

_MOST = 2**16
_FINE = 16  # the search ends when the next size up to try is less than 1/16 above
_STEPS = 2
_MOST_STEPS = 30  # a gradient scaler skips the first few, and the optimizer's state comes with the first that it does not skip
_PR_SET_PDEATHSIG = 1  # https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html


@dataclass(frozen=True, slots=True)
class _Job:
    """What the trying process is started with."""

    build: Build
    variant: Variant
    seed: int
    memory_bytes: int | None
    threads: int | None


@dataclass(frozen=True, slots=True)
class _Tried:
    """One size, the units of its batch, and the memory that it was held against, with where that limit comes from."""

    trial: Trial
    units: Mapping[str, int]
    memory_bytes: int | None
    memory_source: str


def largest_batch(
    build: Build,
    variant: Variant | str,
    memory_bytes: int | None = None,
    *,
    measure: bool = False,
    most: int = _MOST,
    seed: int = 0,
    threads: int | None = None,
    steps_per_block: int | None = None,
    track: Mapping[str, Any] | None = None,
) -> LargestBatch:
    """The largest batch of a variant that fits, to within 1/16, and with ``measure`` what a token costs there.

    Args:
        build: as of :func:`compare`; it must heed ``variant.batch_size``.
        variant: a :class:`Variant`, or its name.
        memory_bytes: what must hold it. None: all memory of the accelerator; a CPU needs a number, which the process's peak resident
            memory (torch's own libraries included) is held against.
        measure: then train 8 blocks at that size, alone, as :func:`compare` does; the result is that of a variant "name@size".
        most: no larger batch is tried.
        seed: for the weights and the data.
        threads: CPU threads. None: torch's own choice.
        steps_per_block: of the measurement, as in :func:`compare`.
        track: further arguments of ``green_torch.track`` for the measurement.

    Ctrl-C ends it with what was found until then (``LargestBatch.interrupted``).

    Raises:
        ArgumentError: a wrong argument, a CPU without ``memory_bytes``, or a ``build`` that does not heed the batch size.
    """
    variant = parse_variant(variant) if isinstance(variant, str) else variant
    check_compare(build, [variant], blocks=None, steps_per_block=steps_per_block, warmup_steps=1)
    for key, value in (("memory_bytes", memory_bytes), ("most", most)):
        if value is not None and not (math.isfinite(value) and value >= 1):
            raise ArgumentError(f"{key}={value!r} must be 1 or more.")
    found = searched(build, variant, memory_bytes, most=most, seed=seed, threads=threads)
    if not measure:
        return found
    return measured(found, build, steps_per_block=steps_per_block, seed=seed, threads=threads, track=track)


def measured(found: LargestBatch, build: Build, **more: Any) -> LargestBatch:
    """With what a token costs there, where a size was found: its variant, trained alone; ``more`` goes to :func:`compare`."""
    if found.batch_size is None or found.interrupted:
        return found
    name = f"{found.variant.name}@{found.batch_size}"
    at_largest = compare(build, [replace(found.variant, name=name, batch_size=found.batch_size)], **more)
    error = found.error or (INTERRUPTED if at_largest.interrupted else None)
    return replace(found, result=at_largest.baseline, error=error, interrupted=at_largest.interrupted)


def searched(
    build: Build, variant: Variant, memory_bytes: int | None, *, most: int = _MOST, seed: int, threads: int | None
) -> LargestBatch:
    """The largest batch, not measured: asks a process of its own about one size after another; errors as of :func:`largest_batch`."""
    job = _Job(build, variant, seed, memory_bytes, threads)
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_work, args=(job, theirs), name=f"green_torch memory {job.variant.name}", daemon=True)
    with interrupts_held():
        process.start()
    theirs.close()
    tried: list[_Tried] = []
    error: str | None = None
    interrupted = False

    def ask(batch_size: int) -> bool | None:
        """Whether it fits; ``None`` where that could not be found out."""
        nonlocal error, interrupted
        try:
            pipe.send(batch_size)
            answer = pipe.recv()
        except (EOFError, OSError):
            process.join(timeout=2.0)
            answer = Failed(ending("the worker", process.exitcode))
        except KeyboardInterrupt:
            interrupted, answer = True, Failed(INTERRUPTED)
        if isinstance(answer, Refused):
            raise answer.error
        if isinstance(answer, Failed):
            error = answer.text
            return None
        _check_heeded(job.variant, tried, answer)
        tried.append(answer)
        return bool(answer.trial.fits)

    try:
        largest, complete = bisected(ask, most)
    finally:
        pipe.close()
        try:
            process.join(timeout=0.0 if interrupted else 2.0)
        finally:
            if process.is_alive():
                process.kill()
                process.join()
    last = max(tried, key=lambda one: one.trial.fits) if tried else None  # one that got so far as to know its device
    return LargestBatch(
        job.variant,
        largest,
        last.memory_bytes if last else job.memory_bytes,
        last.memory_source if last else "",
        tuple(one.trial for one in tried),
        complete,
        error,
        interrupted=interrupted,
    )


def bisected(fits: Callable[[int], bool | None], most: int) -> tuple[int | None, bool]:
    """The largest size that fits, to within 1/16, and whether the next one up does not; it ends early where ``fits`` can't tell."""
    low, high = 0, 1
    while high <= most and (answer := fits(high)):
        low, high = high, 2 * high
    if high > most or answer is None:
        return low or None, False
    while high - low > max(1, low // _FINE):
        middle = (low + high) // 2
        answer = fits(middle)
        if answer is None:
            return low or None, False
        low, high = (middle, high) if answer else (low, middle)
    return low or None, True


def _check_heeded(variant: Variant, before: list[_Tried], now: _Tried) -> None:
    """Two sizes with the same units: the search would never end."""
    for one in before:
        if one.units and one.units == now.units and one.trial.batch_size != now.trial.batch_size:
            raise ArgumentError(
                f"build({variant.name!r}) makes the same batch ({dict(now.units)}) for batch_size={one.trial.batch_size} and "
                f"{now.trial.batch_size}: let it heed variant.batch_size."
            )


# ── the trying process ─────────────────────────────────────────────────────────────────────────────────────────────────


def _work(job: _Job, pipe: Connection) -> None:
    """Answers for one batch size after another, until the parent closes the pipe."""
    ignore_interrupts()
    try:
        try:
            build = loaded(job.build)
        except ArgumentError as error:
            pipe.send(Refused(error))
            return

        import torch
        import torch._dynamo  # torch's optimizers load it when they are made: seconds, once here or again in each fork

        if job.threads is not None:
            torch.set_num_threads(job.threads)
        while True:
            batch_size = pipe.recv()
            task = partial(_try, build, job, batch_size)
            if sys.platform == "linux" and not torch.cuda.is_initialized():  # no process can be split once CUDA is up in it
                answer = _apart(task)
                pipe.send(answer if not isinstance(answer, Failed) else _failed(job, batch_size, answer.text))
            else:
                pipe.send(task())
    except (EOFError, OSError):
        return
    except BaseException as error:  # whatever the user's module raises while it is loaded
        pipe.send(Failed(told(error)))


def _apart(task: Callable[[], object]) -> object:
    """What the task returns in a fork of this process, whose memory goes back as it ends."""
    if sys.platform == "win32":
        raise AssertionError("there is no fork")
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # or it would go on where Ctrl-C ended the search
            os.close(readable)
            with os.fdopen(writable, "wb") as out:
                out.write(pickle.dumps(task()))
            code = 0
        finally:
            os._exit(code)  # nothing of the parent's is to be closed twice
    os.close(writable)
    with os.fdopen(readable, "rb") as answer:
        content = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 0:
        found: object = pickle.loads(content)  # noqa: S301  (from our own fork)
        return found
    return Failed(ending("the process", status))


def _try(build: Callable[[Variant], object], job: _Job, batch_size: int) -> object:
    """A :class:`_Tried`, or what went wrong."""
    import torch

    seed_all(job.seed)
    try:
        return _stepped(build, job, batch_size)
    except ArgumentError as error:
        return Refused(error)
    except BaseException as error:  # whatever the user's code raises is an answer
        return _failed(job, batch_size, told(error))
    finally:
        if torch.cuda.is_initialized():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _stepped(build: Callable[[Variant], object], job: _Job, batch_size: int) -> _Tried:
    """Builds and takes steps."""
    import torch

    from green_torch.experiment.applied import applied

    variant = replace(job.variant, batch_size=batch_size)
    trainee = applied(variant, build(variant), job.seed)
    limit, source = _limited(trainee.device, job.memory_bytes)
    number = 0
    while True:
        start_s = time.monotonic()
        _, units = trainee.train()
        if trainee.device.type != "cpu":
            torch.accelerator.synchronize()
        step_s = time.monotonic() - start_s
        number += 1
        if number - (trainee.skipped() or 0) >= _STEPS or number >= _MOST_STEPS:
            break
    peak = peak_memory_bytes(None) if trainee.device.type == "cpu" else _accelerator_peak_bytes(trainee.device)
    fits = peak is None or limit is None or peak <= limit
    why = "" if fits else f"{NOT_FIT}: its peak is {(peak or 0) / 2**20:,.0f} MiB"
    return _Tried(Trial(batch_size, fits, peak, step_s, why), dict(units), limit, source)


def _failed(job: _Job, batch_size: int, text: str) -> object:
    """Out of memory is an answer like another."""
    if not text.startswith(NOT_FIT):
        return Failed(text)
    return _Tried(Trial(batch_size, False, why=text), {}, job.memory_bytes, "given" if job.memory_bytes else "")


def _limited(device: torch.device, memory_bytes: int | None) -> tuple[int | None, str]:
    """Holds this process to the limit, so that nothing beyond is ever taken; the limit, and where it comes from.

    Raises:
        ArgumentError: a CPU without a limit, or one that can't be held.
    """
    import torch

    check_memory(device, memory_bytes, "memory_bytes")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if memory_bytes is not None and memory_bytes < total:
            torch.cuda.set_per_process_memory_fraction(memory_bytes / total, device)
            return memory_bytes, f"given, of {torch.cuda.get_device_name(device)}"
        return total, f"all of {torch.cuda.get_device_name(device)}"
    if device.type != "cpu" or memory_bytes is None:
        return memory_bytes, "given" if memory_bytes else f"all of {device.type}"
    if sys.platform != "linux":
        raise AssertionError("refused before")
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = memory_bytes + _data_bytes()  # a safety net: what is measured in the end is what was resident
    resource.setrlimit(resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
    return memory_bytes, "given, against the process's peak resident memory"


def _data_bytes() -> int:
    """What RLIMIT_DATA counts of this process already: its private writable memory (``VmData``)."""
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123  (not a path of the user's)
        return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:")), 0)


def _accelerator_peak_bytes(device: torch.device) -> int | None:
    import torch

    return int(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else None
