"""Runs the blocks of all variants in turn, from the parent process: ``compare()``."""

from __future__ import annotations

import math
import multiprocessing
import pickle
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from green_torch.errors import ArgumentError
from green_torch.experiment.results import Block, Comparison, VariantResult
from green_torch.experiment.variants import Build, Variant, parse_variant
from green_torch.experiment.worker import SETTLE_STEPS, WARM_UP, Done, Failed, Job, Measured, Order, Ready, Refused, Warm, work

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.connection import Connection

    from green_torch.records import Manifest

_MAX_STEPS_PER_BLOCK = 10_000
_FEWEST_ROUNDS = 4
_BALANCED_ROUNDS = 4  # after so many rounds, any two variants have come first equally often
_CLOSE_S = 15.0  # how long the workers may take to close their runs


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a comparison stands: ``done`` of ``total`` blocks; ``stage`` is "starting", "warming up", "measuring" or "closing"."""

    stage: str
    variant: str
    done: int
    total: int


def compare(
    build: Build,
    variants: Sequence[Variant | str],
    *,
    blocks: int = 8,
    steps_per_block: int | None = None,
    budget_s: float = 40.0,
    warmup_steps: int = 3,
    seed: int = 0,
    log_dir: str | os.PathLike[str] | None = None,
    region: str | None = None,
    threads: int | None = None,
    confidence: float = 0.95,
    loss_tolerance: float = 0.02,
    track: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Trains every variant from the same seed on the same data in the same order, block by block in turn, and compares them.

    Spawns processes: in a script, call it under ``if __name__ == "__main__":``. A variant that fails leaves its error as its
    result, and the others'. Ctrl-C ends the comparison with the blocks measured so far.

    Args:
        build: makes the workload of a variant, in a worker: "module:function", or a callable that pickles.
        variants: :class:`Variant`s, or names for :func:`parse_variant`; the first is the baseline.
        blocks: blocks of each variant, each in another round; one gives no interval.
        steps_per_block: optimizer steps a block, the same for all variants. None: as many as fit ``budget_s``, judged by the warm-up.
        budget_s: seconds for all blocks together, where ``steps_per_block`` is None: no more than four rounds go beyond it.
        warmup_steps: steps before the first block, left out; at least one (its FLOPs are counted).
        seed: for the weights, the data and the order of the blocks.
        log_dir: each variant's run goes to a folder here, named after it.
        region: where the electricity comes from, as in ``green_torch.track``.
        threads: CPU threads of a worker. None: torch's own choice.
        confidence: of the intervals.
        loss_tolerance: relative; a variant whose last loss differs by more is not the same training.
        track: further arguments of ``green_torch.track``; they must pickle.
        progress: called in this process whenever there is something to tell.

    Raises:
        ArgumentError: an argument is wrong, also where ``green_torch.track`` says so.
    """
    chosen = _check_compare(build, variants, blocks=blocks, steps_per_block=steps_per_block, warmup_steps=warmup_steps)
    tell = _Teller(progress, blocks * len(chosen))
    options = {**(track or {}), **({} if region is None else {"region": region})}
    context = multiprocessing.get_context("spawn")
    stop = context.RawValue("b", 0)
    folders = [None if log_dir is None else str(Path(log_dir) / variant.name) for variant in chosen]
    arms = [
        _Arm(Job(build, variant, seed, warmup_steps, folder, threads, options))
        for variant, folder in zip(chosen, folders, strict=True)
    ]
    interrupted = False
    n_steps = steps_per_block or 0
    try:
        try:
            _start(arms, context, stop, tell)
            n_steps = n_steps or _fitting_steps([arm.step_s for arm in arms if arm.step_s], budget_s / blocks)
            end_s = math.inf if steps_per_block else time.monotonic() + budget_s
            _measure(arms, _orders(blocks, len(arms), seed), n_steps, end_s, tell)
        except KeyboardInterrupt:
            interrupted = True
        stop.value = 1
        _close(arms, tell)
    finally:
        for arm in arms:
            arm.end()
    return Comparison(tuple(arm.result() for arm in arms), n_steps, confidence, loss_tolerance, interrupted)


class _Teller:
    """Counts blocks and tells how far the comparison is."""

    def __init__(self, progress: Callable[[Progress], None] | None, total: int) -> None:
        self.done = 0
        self._progress = progress
        self._total = total

    def __call__(self, stage: str, variant: str = "") -> None:
        """Tells it, if anyone listens."""
        if self._progress is not None:
            self._progress(Progress(stage, variant, self.done, self._total))


def _start(arms: Sequence[_Arm], context: Any, stop: Any, tell: _Teller) -> None:
    """Loading, which is most of a start, goes on side by side; building and warming up, one after another."""
    for arm in arms:
        tell("starting", arm.name)
        arm.start(context, stop)
    for arm in arms:
        arm.receive(Ready)
    for arm in arms:
        tell("warming up", arm.name)
        arm.ask(WARM_UP, Warm)


def _measure(arms: Sequence[_Arm], orders: Sequence[Sequence[int]], n_steps: int, end_s: float, tell: _Teller) -> None:
    """Every variant once a round, as long as any is left; after ``end_s`` (monotonic) no round begins beyond the fewest."""
    for number, order in enumerate(orders):
        if number >= _FEWEST_ROUNDS and time.monotonic() > end_s:
            return
        for position, index in enumerate(order):
            if not arms[index].lost:
                tell("measuring", arms[index].name)
                arms[index].ask(Order(number, position, n_steps), Measured)
            tell.done += 1


def _close(arms: Sequence[_Arm], tell: _Teller) -> None:
    """All close their runs at the same time."""
    tell("closing")
    for arm in arms:
        arm.send(None)
    end_s = time.monotonic() + _CLOSE_S
    for arm in arms:
        arm.receive_rest(end_s)


def _check_compare(
    build: Build, variants: Sequence[Variant | str], *, blocks: int, steps_per_block: int | None, warmup_steps: int
) -> list[Variant]:
    chosen = [parse_variant(variant) if isinstance(variant, str) else variant for variant in variants]
    names = [variant.name for variant in chosen]
    if not names or len(set(names)) < len(names):
        raise ArgumentError(f"Compare one variant or more, each under a name of its own, not {names}.")
    for key, value in (("blocks", blocks), ("steps_per_block", steps_per_block), ("warmup_steps", warmup_steps)):
        if value is not None and value < 1:
            raise ArgumentError(f"{key}={value!r} must be 1 or more.")
    if isinstance(build, str):
        module, _, function = build.partition(":")
        if not (module and function):
            raise ArgumentError(f"build={build!r} should read 'module:function', such as 'my_project.train:build'.")
    else:
        try:
            pickle.dumps(build)
        except Exception as error:
            raise ArgumentError(
                f"build={build!r} can't be sent to a worker process ({error}); define it at the top level of a module."
            ) from error
    return chosen


def _orders(rounds: int, n: int, seed: int) -> list[tuple[int, ...]]:
    """A random order of ``n`` variants for each round.

    Every order comes with its reverse, so that any two variants precede each other equally often, which cancels steady drift; every
    four rounds are shuffled, which breaks any rhythm.
    """
    chance = random.Random(seed)  # noqa: S311  (a design of an experiment, not a secret)
    orders: list[tuple[int, ...]] = []
    while len(orders) < rounds:
        some = [tuple(chance.sample(range(n), n)) for _ in range(_BALANCED_ROUNDS // 2)]
        some += [order[::-1] for order in some]
        chance.shuffle(some)
        orders += some
    return orders[:rounds]


def _fitting_steps(step_s: Sequence[float], round_s: float) -> int:
    """Steps a block so that one block of every variant, settling included, takes about ``round_s`` seconds."""
    one_each_s = math.fsum(step_s)
    return max(1, min(_MAX_STEPS_PER_BLOCK, int(round_s / one_each_s) - SETTLE_STEPS)) if one_each_s else 1


class _Arm:
    """The parent's end of one worker. A worker that fails or dies is remembered as such, and every later request does nothing."""

    def __init__(self, job: Job) -> None:
        self.name = job.variant.name
        self.step_s: float | None = None
        self._job = job
        self._blocks: list[Block] = []
        self._error: str | None = None
        self._done: Done | None = None
        self._manifest: Manifest | None = None
        self._threads: int | None = None
        self._process: Any = None  # multiprocessing's SpawnProcess, which has no public name
        self._pipe: Connection | None = None

    @property
    def lost(self) -> bool:
        """Whether it has failed."""
        return self._error is not None

    def start(self, context: Any, stop: Any) -> None:
        """Starts the worker, which loads torch and the user's code and waits."""
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=work, args=(self._job, theirs, stop), name=f"green_torch {self.name}", daemon=True
        )
        self._process.start()
        theirs.close()  # or the worker's death would not close the pipe

    def send(self, order: object) -> None:
        """Sends a request, if anyone is there to take it."""
        if self._pipe is not None and self._error is None:
            try:
                self._pipe.send(order)
            except OSError:
                self._died()

    def receive(self, kind: type) -> None:
        """Waits for a reply of this kind, a failure or the worker's death, and files what it brings."""
        while self._pipe is not None and self._error is None and self._done is None:
            try:
                reply = self._pipe.recv()
            except (EOFError, OSError):
                self._died()
                return
            self._file(reply)
            if isinstance(reply, kind):
                return

    def ask(self, order: object, kind: type) -> None:
        """Sends a request and waits for its reply."""
        self.send(order)
        self.receive(kind)

    def receive_rest(self, end_s: float) -> None:
        """Takes replies until the worker has closed its run or the monotonic time ``end_s`` has come."""
        while self._pipe is not None and self._error is None and self._done is None:
            try:
                if not self._pipe.poll(max(0.0, end_s - time.monotonic())):
                    self._error = "the worker did not close its run in time"
                    return
                self._file(self._pipe.recv())
            except (EOFError, OSError):
                self._died()

    def end(self) -> None:
        """Sees the worker off."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None and self._process.pid is not None:
            self._process.join(timeout=2.0 if self._done or self._error else 0.0)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()

    def result(self) -> VariantResult:
        """What the worker has brought home."""
        summary = self._done.summary if self._done else None
        return VariantResult(
            variant=self._job.variant,
            blocks=tuple(self._blocks),
            error=self._error,
            manifest=self._manifest,
            warnings=summary.warnings if summary else (),
            threads=self._threads,
            log_dir=self._job.log_dir,
        )

    def _file(self, reply: object) -> None:
        if isinstance(reply, Refused):
            raise reply.error
        if isinstance(reply, Block):
            self._blocks.append(reply)
        elif isinstance(reply, Warm):
            self.step_s, self._threads, self._manifest = reply.step_s, reply.threads, reply.manifest
        elif isinstance(reply, Done):
            self._done, self._manifest = reply, reply.summary.manifest
        elif isinstance(reply, Failed):
            self._error = reply.text

    def _died(self) -> None:
        self._process.join(timeout=2.0)
        code = self._process.exitcode
        if code is not None and code < 0:
            self._error = f"the worker was ended by {signal.Signals(-code).name}{' (out of memory?)' if code == -9 else ''}"
        else:
            self._error = (
                f"the worker ended with code {code} before it answered; what it printed says why. "
                'In a script, call compare() under: if __name__ == "__main__":'
            )
