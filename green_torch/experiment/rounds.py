"""Runs the blocks of all variants in turn, from the parent process: ``compare()``."""

from __future__ import annotations

import math
import multiprocessing
import pickle
import random
import time
import uuid
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from green_torch.errors import ArgumentError
from green_torch.experiment.results import LOSS_TOLERANCE, Block, Comparison, LargestBatch, VariantResult
from green_torch.experiment.variants import Build, Variant, parse_variant
from green_torch.experiment.worker import (
    CUT_SHORT,
    SETTLE_STEPS,
    WARM_UP,
    Done,
    Failed,
    Job,
    Measured,
    Order,
    Ready,
    Refused,
    Warm,
    ending,
    interrupts_held,
    work,
)
from green_torch.statistics import MIN_PAIRS_LOOKING, corrected_confidence

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from multiprocessing.connection import Connection

    from green_torch.records import Manifest

BLOCKS = 8
MOST_BLOCKS = 200  # where the width of the interval decides; a budget of time that decides is cut into no more
BUDGET_S = 40.0
_ENDLESS = 100_000  # blocks: a budget ends it before
_BLOCK_S = 2.5  # of each variant, where nothing else says how long: tens of updates of a counter
_MAX_STEPS_PER_BLOCK = 10_000
_FEWEST_STEPS = 4  # a block, where the time lets them: beside these, the step in which it settles wastes little
_FEWEST_ROUNDS = 4
_BALANCED_ROUNDS = 4  # after so many rounds, any two variants have come first equally often
_OWN = {"label", "log_dir", "log_every_n_steps", "model", "run_name"}  # arguments of track() that are ours to give
_CLOSE_S = 15.0  # how long the workers may take to close their runs
_HURRIED_CLOSE_S = 3.0  # likewise, once Ctrl-C came meanwhile: a block's energy takes up to two to settle
INTERRUPTED = "interrupted"  # why a largest batch was not found or not measured to the end


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a comparison stands: ``done`` of ``total`` blocks (at most, with ``until``; at the pace so far, where a budget decides).

    ``stage`` is "starting", "warming up", "measuring", "closing" or "largest batch". ``half_width`` is that of the widest interval so far,
    where ``until`` watches it.
    """

    stage: str
    variant: str
    done: int
    total: int
    half_width: float | None = None


def compare(
    build: Build,
    variants: Sequence[Variant | str],
    *,
    blocks: int | None = None,
    steps_per_block: int | None = None,
    until: float | None = None,
    budget_s: float | None = None,
    budget_j: float | None = None,
    warmup_steps: int = 3,
    seed: int = 0,
    log_dir: str | os.PathLike[str] | None = None,
    region: str | None = None,
    threads: int | None = None,
    confidence: float = 0.95,
    loss_tolerance: float = LOSS_TOLERANCE,
    largest_batch: bool | int = False,
    track: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Trains every variant from the same seed on the same data in the same order, block by block in turn, and compares them.

    Spawns processes: in a script, call it under ``if __name__ == "__main__":``. A variant that fails leaves its error as its
    result, and the others'. Ctrl-C ends the comparison with the blocks measured so far. The intervals are about these processes:
    what luck gives one process for its whole life (where its memory lies) is not in them; another run of the comparison is.

    Args:
        build: makes the workload of a variant, in a worker: "module:function", or a callable that pickles. It returns a
            :class:`Workload`, to which the variant is applied here, or a callable that takes one optimizer step (``UserStep``), to
            which it has applied the variant itself.
        variants: :class:`Variant`s, or names for :func:`parse_variant`; the first is the baseline.
        blocks: blocks of each variant, each in another round, at most; one gives no interval. None: as many as ``until`` and the budgets
            ask for (``until`` without a budget: 200 at most), and 8 where neither is given.
        steps_per_block: optimizer steps a block, the same for all variants. None: as many as fit the time, judged by the warm-up.
        until: stop as soon as the interval of every variant had at most this half-width (0.01: 1 %) at two looks in a row, the first
            of them after 10 rounds. The rule looks at the width alone, and the intervals allow for the looking
            (:mod:`green_torch.statistics`). Where no difference is left to watch, since a variant failed, the others get 8 blocks.
        budget_s: seconds for all blocks together: no round begins after it, but for the first four. None: where neither
            ``steps_per_block``, ``until`` nor ``budget_j`` is given, blocks are as long as make 40 in all; else there is no limit.
        budget_j: IT joules for all blocks together, likewise. Where no energy is known, it is as if none were given.

            What comes first of ``blocks``, ``until`` and the budgets ends it; one that is not given does not.
        warmup_steps: steps before the first block, left out; at least one (its FLOPs are counted).
        seed: for the weights, the data and the order of the blocks.
        log_dir: each variant's run goes to a folder here, named after it.
        region: where the electricity comes from, as in ``green_torch.track``.
        threads: CPU threads of a worker. None: torch's own choice.
        confidence: of the intervals, which hold together with it.
        loss_tolerance: relative; a variant whose mean loss over the later half differs by more is not the same training. At a high
            learning rate rounding alone may drive two trainings so far apart.
        largest_batch: also find each variant's largest batch that fits, and measure it there (:func:`largest_batch`). True: in the
            device's memory; a number: in so many bytes, which a CPU needs.
        track: further arguments of ``green_torch.track``; they must pickle.
        progress: called in this process whenever there is something to tell.

    Raises:
        ArgumentError: an argument is wrong, also where ``green_torch.track`` says so, and ``largest_batch=True`` where a variant is
            built on a CPU, which is known before the first block.
    """
    chosen = check_compare(build, variants, blocks=blocks, steps_per_block=steps_per_block, warmup_steps=warmup_steps)
    if not isinstance(largest_batch, bool) and not (math.isfinite(largest_batch) and largest_batch >= 1):
        raise ArgumentError(f"largest_batch={largest_batch!r} must be True, or so many bytes: 1 or more.")
    plan = _Plan.made(
        len(chosen),
        blocks=blocks,
        steps_per_block=steps_per_block,
        until=until,
        budget_s=budget_s,
        budget_j=budget_j,
        confidence=confidence,
        loss_tolerance=loss_tolerance,
    )
    tell = _Teller(progress, plan.blocks * len(chosen))
    options = {**(track or {}), **({} if region is None else {"region": region})}
    if taken := sorted(options.keys() & _OWN):
        raise ArgumentError(f"track={{{taken[0]!r}: …}}: a comparison sets {', '.join(sorted(_OWN))} itself; leave it out.")
    context = multiprocessing.get_context("spawn")
    stop = context.RawValue("b", 0)
    folders = [None if log_dir is None else str(Path(log_dir) / variant.name) for variant in chosen]
    shown = {"id": uuid.uuid4().hex, "confidence": confidence, "looking": until is not None, "loss_tolerance": loss_tolerance}
    arms = [
        _Arm(Job(build, variant, seed, warmup_steps, folder, threads, options, shown, largest_batch))
        for variant, folder in zip(chosen, folders, strict=True)
    ]
    stopped, n_steps = "", steps_per_block or 0
    try:
        try:
            _start(arms, context, stop, tell)
            n_steps = n_steps or plan.steps([arm.step_s for arm in arms if arm.step_s])
            stopped = _measure(arms, _orders(plan.most, len(arms), seed), n_steps, plan, tell)
        except KeyboardInterrupt:
            stopped = "interrupted"
        stop.value = CUT_SHORT if stopped == "interrupted" else 1
        if _close(arms, tell):
            stopped = "interrupted"
    finally:
        if _see_off(arms):
            stopped = "interrupted"
    found = plan.comparison(arms, n_steps, stopped)
    if largest_batch is False or found.interrupted:
        return found
    memory_bytes = None if largest_batch is True else largest_batch
    budget_s = BLOCKS * _block_s(found)
    size = partial(_sized, build, memory_bytes, seed=seed, threads=threads, blocks=BLOCKS, budget_s=budget_s, track=options)
    return _with_largest(found, size, tell)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How long a comparison goes on, and what is made of its blocks.

    It ends after ``most`` rounds; after ``blocks`` where there is no budget, or none that can be kept. A round is meant to take
    ``round_s``, and more where that is too short for a few steps of each variant, but never more than ``longest_round_s``.
    """

    blocks: int
    most: int
    round_s: float
    longest_round_s: float
    until: float | None
    budget_s: float | None
    budget_j: float | None
    confidence: float
    loss_tolerance: float

    @classmethod
    def made(
        cls,
        n_variants: int,
        *,
        blocks: int | None,
        steps_per_block: int | None,
        until: float | None,
        budget_s: float | None,
        budget_j: float | None,
        confidence: float,
        loss_tolerance: float,
    ) -> _Plan:
        """Checks, and fills in what was left open; errors as of :func:`compare`."""
        corrected_confidence(confidence)  # raises where it is none
        for key, value in (
            ("until", until),
            ("budget_s", budget_s),
            ("budget_j", budget_j),
            ("loss_tolerance", loss_tolerance),
        ):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ArgumentError(f"{key}={value!r} must be a positive number.")
        if until is not None:
            if until >= 1:
                raise ArgumentError(f"until={until!r} is half the interval's width as a fraction: 0.01 is 1 %.")
            if n_variants < 2:
                raise ArgumentError(f"until={until!r} watches a difference, and one variant alone has none: name two or more.")
            if blocks is not None and blocks < MIN_PAIRS_LOOKING:
                raise ArgumentError(
                    f"until={until!r} looks after {MIN_PAIRS_LOOKING} blocks at the earliest: blocks={blocks!r} ends before that."
                )
        usual = BLOCKS if until is None else MOST_BLOCKS
        most = usual if budget_s is None and budget_j is None else _ENDLESS
        round_s, longest_round_s = _round_s(n_variants, blocks, until, budget_s, budget_j)
        if (blocks, steps_per_block, until, budget_s, budget_j) == (None,) * 5:
            budget_s = BUDGET_S
        return cls(
            blocks or usual, blocks or most, round_s, longest_round_s, until, budget_s, budget_j, confidence, loss_tolerance
        )

    @property
    def goes_on(self) -> bool:
        """Whether it is not a number of blocks alone that ends it."""
        return self.until is not None or self.most > self.blocks

    def steps(self, step_s: Sequence[float]) -> int:
        """Steps a block, by the seconds of a step of each variant, so that a round, settling included, takes as long as it is meant to."""
        one_each_s = math.fsum(step_s)
        if not one_each_s:
            return 1
        wanted_s = max(self.round_s, (_FEWEST_STEPS + SETTLE_STEPS) * one_each_s)
        return max(1, min(_MAX_STEPS_PER_BLOCK, int(min(wanted_s, self.longest_round_s) / one_each_s) - SETTLE_STEPS))

    def spent(self, arms: Sequence[_Arm], elapsed_s: float) -> tuple[float, str]:
        """The share of a budget that is spent, and which budget that is; (0, "") where there is none, or none that can be kept.

        Joules are those of the blocks that are settled.
        """
        shares = [] if self.budget_s is None else [(elapsed_s / self.budget_s, "budget_s")]
        if self.budget_j is not None:
            known_j = [block.energy_j for arm in arms for block in arm.result().blocks if block.energy_j is not None]
            shares += [(math.fsum(known_j) / self.budget_j, "budget_j")] if known_j else []
        return max(shares, default=(0.0, ""))

    def comparison(self, arms: Sequence[_Arm], n_steps: int, stopped: str) -> Comparison:
        """Of what the workers have brought so far."""
        results = tuple(arm.result() for arm in arms)
        known = any(block.energy_j is not None for result in results for block in result.blocks)
        warnings = (
            ("the energy budget could not be kept: no energy is known here",) if self.budget_j is not None and not known else ()
        )
        return Comparison(
            results,
            n_steps,
            self.confidence,
            self.loss_tolerance,
            stopped == "interrupted",
            self.until,
            stopped,
            warnings=warnings,
        )

    def half_width(self, found: Comparison) -> float | None:
        """The widest interval of those that still can get narrower; ``None`` while one has no interval, or too few blocks."""
        widths = []
        for result in found.results[1:]:
            if result.error is not None:  # it gets no more blocks
                continue
            difference = found.energy(result.name) if found.headline == "energy" else None
            difference = difference or found.time(result.name)
            if difference is None or difference.half_width is None or difference.n_blocks < MIN_PAIRS_LOOKING:
                return None
            widths.append(difference.half_width)
        return max(widths, default=None)


class _Teller:
    """Counts blocks and tells how far the comparison is."""

    def __init__(self, progress: Callable[[Progress], None] | None, total: int) -> None:
        self.done = 0
        self.half_width: float | None = None
        self._progress = progress
        self._total = total

    def expect(self, total: int) -> None:
        """Changes how many blocks there will be."""
        self._total = total

    def __call__(self, stage: str, variant: str = "") -> None:
        """Tells it, if anyone listens."""
        if self._progress is not None:
            self._progress(Progress(stage, variant, self.done, self._total, self.half_width))


def _start(arms: Sequence[_Arm], context: Any, stop: Any, tell: _Teller) -> None:
    """Loading, which is most of a start, goes on side by side; building and warming up, one after another."""
    for arm in arms:
        tell("starting", arm.name)
        arm.start(context, stop)
    for arm in arms:
        arm.receive(Ready)
    for index, arm in enumerate(arms):
        if not arm.lost:
            tell("warming up", arm.name)
            _ask(arms, index, WARM_UP, Warm)


def _ask(arms: Sequence[_Arm], index: int, order: object, kind: type) -> None:
    """Asks one of them; where its memory does not suffice, its error names the others that held some of the same."""
    arm = arms[index]
    arm.ask(order, kind)
    if arm.result().fits is False:
        arm.blame([other for other in arms if other is not arm])


def _round_s(
    n_variants: int, blocks: int | None, until: float | None, budget_s: float | None, budget_j: float | None
) -> tuple[float, float]:
    """Seconds that one block of each variant is meant to take, and the most that it may."""
    usual_s = _BLOCK_S * n_variants
    if until is None and budget_s is None and budget_j is None:
        return (BUDGET_S / (blocks or BLOCKS),) * 2
    if budget_s is None:
        return usual_s, math.inf
    if until is not None:
        return usual_s, budget_s / MIN_PAIRS_LOOKING
    longest_s = budget_s / (blocks or BLOCKS)
    return (longest_s if blocks else max(usual_s, budget_s / MOST_BLOCKS)), longest_s


def _measure(
    arms: Sequence[_Arm],
    orders: Iterable[Sequence[int]],
    n_steps: int,
    plan: _Plan,
    tell: _Teller,
    *,
    now_s: Callable[[], float] = time.monotonic,
) -> str:
    """Every variant once a round, as long as any is left; what ended it, as in ``Comparison.stopped``.

    A look at the width or at a budget comes after a round, at the blocks that are settled: those of the rounds before it.
    """
    start_s = now_s()
    narrow = False
    for number, order in enumerate(orders):
        spent, budget = plan.spent(arms, now_s() - start_s)
        if number >= _FEWEST_ROUNDS and spent >= 1:
            return budget
        if number >= plan.blocks and not budget:
            return "blocks"
        if plan.most > plan.blocks and number and spent:
            tell.expect(min(plan.most, max(number + 1, _FEWEST_ROUNDS, round(number / spent))) * len(arms))
        if plan.until is not None and number >= MIN_PAIRS_LOOKING:
            tell.half_width = plan.half_width(plan.comparison(arms, n_steps, ""))
            before, narrow = narrow, tell.half_width is not None and tell.half_width <= plan.until
            if before and narrow:  # one look may have been lucky: the next block would widen the interval again
                return "until"
        unpaired = len(arms) > 1 and (arms[0].lost or all(arm.lost for arm in arms[1:]))
        if all(arm.lost for arm in arms) or (unpaired and plan.goes_on and number >= BLOCKS):
            return "failed"  # without a difference to watch, the others get the usual blocks
        for position, index in enumerate(order):
            if not arms[index].lost:
                tell("measuring", arms[index].name)
                _ask(arms, index, Order(number, position, n_steps), Measured)
            tell.done += 1
    return "blocks"


def _with_largest(found: Comparison, size: Callable[[Variant], LargestBatch], tell: _Teller) -> Comparison:
    """With the largest batch of each variant that could be built, one after another, alone; Ctrl-C keeps what was found until then."""
    sizes: list[LargestBatch] = []
    try:
        for result in found.results:
            if result.error is None or result.fits is False:
                tell("largest batch", result.name)
                sizes.append(size(result.variant))
                if sizes[-1].interrupted:
                    break
    except KeyboardInterrupt:
        return replace(found, largest=tuple(sizes), interrupted=True)
    return replace(found, largest=tuple(sizes), interrupted=any(one.interrupted for one in sizes))


def _sized(
    build: Build, memory_bytes: int | None, variant: Variant, *, seed: int, threads: int | None, **more: Any
) -> LargestBatch:
    """The largest batch, measured; what goes wrong is in it, for it must not cost the blocks that were measured before."""
    from green_torch.experiment.memory import measured, searched  # it measures with this module

    found = LargestBatch(variant, None, memory_bytes, "")
    try:
        found = searched(build, variant, memory_bytes, seed=seed, threads=threads)
        return measured(found, build, seed=seed, threads=threads, **more)
    except (ArgumentError, OSError) as error:
        return replace(found, error=found.error or str(error))
    except KeyboardInterrupt:
        return replace(found, error=found.error or INTERRUPTED, interrupted=True)


def _block_s(found: Comparison) -> float:
    """Seconds that a block took, in the mean over all variants; where none was measured, what one is meant to take."""
    times_s = [block.duration_s for result in found.results for block in result.blocks]
    return (math.fsum(times_s) / len(times_s) if times_s else 0.0) or _BLOCK_S


def _close(arms: Sequence[_Arm], tell: _Teller) -> bool:
    """All close their runs at the same time; whether Ctrl-C came meanwhile: then they are waited for less, and at the second no longer."""
    unasked = list(arms)
    for interrupts, patience_s in enumerate((_CLOSE_S, _HURRIED_CLOSE_S, 0.0)):
        try:
            while unasked:
                unasked[-1].send(None)
                unasked.pop()
            if not interrupts:
                tell("closing")
            end_s = time.monotonic() + patience_s
            for arm in arms:
                arm.receive_rest(end_s)
        except KeyboardInterrupt:
            continue
        return interrupts > 0
    return True


def _see_off(arms: Sequence[_Arm]) -> bool:
    """All workers end, also where Ctrl-C comes meanwhile; whether it did."""
    left, interrupted = list(arms), False
    while left:
        try:
            left[-1].end()
            left.pop()
        except KeyboardInterrupt:
            interrupted = True
    return interrupted


def check_compare(
    build: Build, variants: Sequence[Variant | str], *, blocks: int | None, steps_per_block: int | None, warmup_steps: int
) -> list[Variant]:
    """The variants, parsed; errors as of :func:`compare`."""
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


def _orders(rounds: int, n: int, seed: int) -> Iterator[tuple[int, ...]]:
    """A random order of ``n`` variants for each round.

    Every order comes with its reverse, so that any two variants precede each other equally often, which cancels steady drift; every
    four rounds are shuffled, which breaks any rhythm.
    """
    chance = random.Random(seed)  # noqa: S311  (a design of an experiment, not a secret)
    for first in range(0, rounds, _BALANCED_ROUNDS):
        some = [tuple(chance.sample(range(n), n)) for _ in range(_BALANCED_ROUNDS // 2)]
        some += [order[::-1] for order in some]
        chance.shuffle(some)
        yield from some[: rounds - first]


class _Arm:
    """The parent's end of one worker. A worker that fails or dies is remembered as such, and every later request does nothing."""

    def __init__(self, job: Job) -> None:
        self.name = job.variant.name
        self._job = job
        self._blocks: list[Block] = []
        self._error: str | None = None
        self._done: Done | None = None
        self._manifest: Manifest | None = None
        self._warm: Warm | None = None
        self._process: Any = None  # multiprocessing's SpawnProcess, which has no public name
        self._pipe: Connection | None = None

    @property
    def step_s(self) -> float | None:
        """Seconds a step at the end of the warm-up."""
        return self._warm.step_s if self._warm else None

    @property
    def device(self) -> str | None:
        """Where it trains, such as "cuda:0"; ``None`` until it is warm."""
        return self._warm.device if self._warm else None

    @property
    def lost(self) -> bool:
        """Whether it has failed."""
        return self._error is not None

    def blame(self, others: Sequence[_Arm]) -> None:
        """Adds to its error which workers had memory of the same device beside it (of any, where its own is not known)."""
        holding = [other for other in others if not other.lost and other.device and self.device in {None, other.device}]
        if holding:
            self._error = (
                f"{self._error}; meanwhile {' and '.join(other.name for other in holding)} held memory on "
                f"{' and '.join(dict.fromkeys(str(other.device) for other in holding))}: with fewer variants at once it may fit"
            )

    def start(self, context: Any, stop: Any) -> None:
        """Starts the worker, which loads torch and the user's code and waits."""
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=work, args=(self._job, theirs, stop), name=f"green_torch {self.name}", daemon=True
        )
        with interrupts_held():
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
                    self._error = "the worker had not closed its run when the waiting for it ended"
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
            threads=self._warm.threads if self._warm else None,
            log_dir=self._job.log_dir,
            kernels=self._warm.kernels if self._warm else (),
            ran=self._warm.ran if self._warm else "",
            applied_by_user=self._warm is not None and self._warm.applied_by_user,
            n_skipped_warming=self._warm.n_skipped if self._warm else 0,
        )

    def _file(self, reply: object) -> None:
        if isinstance(reply, Refused):
            raise reply.error
        if isinstance(reply, Block):
            self._blocks.append(reply)
        elif isinstance(reply, Warm):
            self._warm, self._manifest = reply, reply.manifest
        elif isinstance(reply, Done):
            self._done, self._manifest = reply, reply.summary.manifest
        elif isinstance(reply, Failed):
            self._error = reply.text

    def _died(self) -> None:
        self._process.join(timeout=2.0)
        code = self._process.exitcode
        self._error = ending("the worker", code)
        if code is None or code >= 0:
            self._error += '. In a script, call compare() under: if __name__ == "__main__":'
