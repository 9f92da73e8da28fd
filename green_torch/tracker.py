"""``track()`` and ``Tracker``: the composition root, which wires the stages together and owns none of their work."""

from __future__ import annotations

import logging
import math
import os
import platform
import sys
import uuid
import warnings
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, final

import green_torch
from green_torch.calibration import part_time_periods
from green_torch.clock import DeviceMarker, HostClock, HostMarker
from green_torch.errors import ArgumentError, GreenTorchWarning, UsageError
from green_torch.outlet import TICK_S
from green_torch.recorder import PATIENCE_S, Baseline, Recorder
from green_torch.records import DevicePeak, Embodied, Flag, FlopCount, Instant, Manifest, Phase, RunSummary, RunTotals
from green_torch.sampler import Sampler
from green_torch.steps import Cadence, StepBuilder
from green_torch.units import s_to_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Self

    import torch
    from torch.utils.tensorboard import SummaryWriter

    from green_torch.flops import StepFlops
    from green_torch.protocols import Clock, IntensityProvider, Meter, Sink
    from green_torch.steps import Span

POLL_INTERVAL_S = 0.01
_PHASES = tuple(phase for phase in Phase if phase is not Phase.TRAIN)

_MOST_WARNINGS = 100  # of different kinds, in a run

_active: tuple[int, Tracker] | None = None  # with the process that opened it: a forked child has none


@final
class Tracker:
    """Measures a training loop: ``with track(model, log_dir="runs/a") as tracker: ... tracker.step(tokens=n)``.

    Everything is optional; ``track()`` alone works on any machine. One tracker at a time may be open in a process.

    Args:
        model: counts FLOPs from its forward calls, for MFU.
        log_dir: the run's directory: TensorBoard events and ``green/rank-….jsonl``.
        writer: your own ``SummaryWriter``; our values go through it, and ``log_dir`` defaults to its directory.
        run_name: defaults to the directory's name.
        region: where the electricity comes from: "FR", "US-CA", "aws:us-west-2". None: the world average, named so.
        intensity: gCO2e/kWh, or a provider; wins over ``region``.
        pue: facility over IT energy, at least 1. None: the cloud provider's published figure, else 1.
        price: money per kWh of facility energy, in any currency.
        meters: what reads energy; they stay open, and yours to close. None: every device that is found.
        poll_interval_s: seconds between readings of a hardware counter.
        clock: the run's time; for tests, :class:`green_torch.testing.ScriptedClock`.
        flops_per_step: model FLOPs of a step, where they can't be counted.
        peak_flop_per_s: the device's dense peak, where the table has none or another is wanted.
        attention_flops: "full" counts attention in full (PaLM), "causal" halves causal attention.
        embodied: manufacturing footprint of the devices used: an :class:`Embodied`, or kgCO2e.
        log_every_n_steps: steps per record; "auto" thins them out as the run grows.
        baseline: a run's directory; savings are projected against its energy per token, sample or step.
        planned_steps: steps of the whole run, for projections.
        sinks: further destinations beside JSONL and TensorBoard.
        label: what a comparison calls this run.
        enabled: False turns everything off.

    Raises:
        ArgumentError: an argument is wrong (:class:`UnknownRegionError` for a region).
        UsageError: another tracker is open, on entering.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        *,
        log_dir: str | os.PathLike[str] | None = None,
        writer: SummaryWriter | None = None,
        run_name: str | None = None,
        region: str | None = None,
        intensity: float | IntensityProvider | None = None,
        pue: float | None = None,
        price: float | None = None,
        meters: Sequence[Meter] | None = None,
        poll_interval_s: float = POLL_INTERVAL_S,
        clock: Clock | None = None,
        flops_per_step: float | None = None,
        peak_flop_per_s: float | None = None,
        attention_flops: Literal["full", "causal"] = "full",
        embodied: Embodied | float | None = None,
        log_every_n_steps: int | Literal["auto"] = "auto",
        baseline: str | os.PathLike[str] | None = None,
        planned_steps: int | None = None,
        sinks: Sequence[Sink] | None = None,
        label: str = "",
        enabled: bool = True,
    ) -> None:
        self._enabled = enabled
        self._model = model
        self._writer = writer
        self._own_writer = False
        self._warnings = _Warnings()
        self._builder: StepBuilder | None = None
        self._flops: StepFlops | None = None
        self._waiting: deque[Span] = deque()  # spans whose boundaries the device has not reached
        self._halts: list[Callable[[], None]] = []
        self._summary: RunSummary | None = None
        self._dtype: str | None = None
        self._peaks: dict[str, DevicePeak] = {}
        self._given: FlopCount | None = None
        self._flops_per_step = _positive("flops_per_step", flops_per_step)
        self._peak_flop_per_s = _positive("peak_flop_per_s", peak_flop_per_s)
        self._attention = _attention(attention_flops)
        self._cadence = Cadence(_cadence(log_every_n_steps))
        poll_interval_s = _positive("poll_interval_s", poll_interval_s) or POLL_INTERVAL_S
        self._log_dir = _directory(log_dir if log_dir is not None or writer is None else writer.log_dir) if enabled else None
        self._rank, self._world_size = _place()
        self._user_sinks = list(sinks or ())
        self._asked_to_log = log_dir is not None
        self._own_meters = meters is None
        manifest = Manifest(
            run_id=uuid.uuid4().hex[:12],
            run_name=run_name or (self._log_dir.name if self._log_dir else "run"),
            segment=1,
            rank=self._rank,
            world_size=self._world_size,
            started_unix_ns=0,
            domains=(),
            missing=(),
            intensity=None,
            pue=1.0,
            pue_source="",
            embodied=_embodied(embodied),
            price_per_kwh=_not_negative("price", price),
            planned_steps=None if planned_steps is None else _whole("planned_steps", planned_steps),
            attention_flops=self._attention,
            label=label,
            versions=_versions(),
        )
        if not enabled:
            self._idle = manifest
            return
        self._clock = clock or HostClock()
        self._marker: HostMarker | DeviceMarker = HostMarker(self._clock.now_ns)
        self._may_use_device = clock is None
        provider, manifest = _grid(region, intensity, pue, manifest, self._clock)
        found, missing = _meters(meters, poll_interval_s)
        manifest = replace(
            manifest, domains=tuple(domain for meter in found for domain in meter.domains), missing=missing, **_described(model)
        )
        if not found:
            self._warnings("nothing here measures energy: " + "; ".join(missing) + ". See what would: green-torch doctor")
        self._sampler = Sampler(self._clock, found, poll_interval_s)
        compared = _baseline(baseline)
        if compared is not None:
            manifest = replace(manifest, baseline=f"{compared.name} ({compared.energy_per_unit_j:.4g} J/{compared.unit})")
        self._recorder = Recorder(
            self._clock,
            self._sampler,
            manifest,
            intensity=provider,
            peak_of=self._peak_of,
            warn=self._warnings,
            baseline=compared,
            part_time_s=part_time_periods(manifest.domains),
            unread_since_ns=self._unread_since_ns,
        )

    @property
    def writer(self) -> SummaryWriter | None:
        """The TensorBoard writer in use: yours, or the one opened in ``log_dir`` (lent while the context is open).

        With a ``log_dir`` there always is one; where nothing is to be written (not the first rank, not enabled, no TensorBoard) it
        writes nothing.
        """
        if self._writer is None and self._asked_to_log:
            return cast("SummaryWriter", _NoWriter())
        return self._writer

    @property
    def last_step(self) -> int:
        """The last step that ended, on the step axis of the records; -1 before the first."""
        return self._builder.last_step if self._builder is not None else -1

    @property
    def log_dir(self) -> Path | None:
        """The run's directory, if it has one."""
        return self._log_dir

    @property
    def enabled(self) -> bool:
        """Whether anything is measured."""
        return self._enabled

    @property
    def manifest(self) -> Manifest:
        """What the numbers of this run mean, as far as it is known now."""
        return self._recorder.manifest if self._enabled else self._idle

    def __enter__(self) -> Self:
        global _active  # noqa: PLW0603  (one tracker per process is the point)
        if not self._enabled:
            return self
        if _active is not None and _active[0] == os.getpid():
            raise UsageError(
                "another tracker is open in this process, and both would count the same joules: leave it first, or mark parts of "
                "the run with tracker.phase(...)"
            )
        if self._summary is not None:
            raise UsageError("this tracker's run has ended: make a new one with green_torch.track(...)")
        _active = os.getpid(), self
        try:
            self._open()
        except BaseException:
            _active = None
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _active  # noqa: PLW0603
        if not self._enabled or self._builder is None:
            return
        _active = None
        status = "completed" if kind is None or (isinstance(error, SystemExit) and not error.code) else "failed"
        if kind is not None and status == "failed":
            self._warnings.note(f"ended by {kind.__name__}")
        try:
            self._close(status)
        except Exception as problem:  # rule 9: the user's own error, or none, must come through
            self._warnings(f"closing the run failed: {type(problem).__name__}: {problem}")
        finally:
            if self._summary is None:
                self._summary = RunSummary(self.manifest, status, None, None, RunTotals(), warnings=self._warnings.said)

    def step(
        self,
        *,
        tokens: int | None = None,
        samples: int | None = None,
        step: int | None = None,
        flops: float | None = None,
    ) -> None:
        """Marks the end of a step (one optimizer step). Only enqueues: the record comes when its energy is settled.

        Args:
            tokens: tokens of the step, all micro-batches together; likewise ``samples``.
            samples: samples of the step.
            step: its place on your own step axis; otherwise steps count from 0.
            flops: model FLOPs of this step, where they are neither counted nor constant.

        Raises:
            UsageError: before the context is entered.
        """
        builder = self._builder
        if builder is None:
            if not self._enabled:
                return
            if self._summary is None:
                raise UsageError("step() outside the context: write `with green_torch.track(...) as tracker:` around the loop")
            self._warnings("step() after the run has ended is ignored")
            return
        if flops is None and not builder.in_phase:  # a step of evaluation is no training step
            flops = self._flops_per_step
        if flops is not None:
            builder.add_flops(self._given_flops(flops))
        else:
            self._take_flops(builder)
        n_tokens, n_samples = self._count("tokens", tokens), self._count("samples", samples)
        number = None if step is None else self._number(step)
        whole = (n_tokens, n_samples, number) == (tokens, samples, step)
        self._put(
            builder.step(
                self._mark(), samples=n_samples, tokens=n_tokens, flags=() if whole else (Flag.BAD_COUNT,), step=number
            )
        )

    @contextmanager
    def phase(self, name: Phase | str) -> Iterator[None]:
        """Books the time within to a phase: "eval", "save", "setup", "paused" or "other"; cut out of the step that it interrupts.

        Raises:
            ArgumentError: no such phase.
        """
        if name not in _PHASES:
            raise ArgumentError(f"no phase {name!r}: use one of {', '.join(repr(str(phase)) for phase in _PHASES)}")
        with self._cut(Phase(name)):
            yield

    def suspend(self) -> AbstractContextManager[None]:
        """Stops the run's clock: what passes within (another variant's turn, a debugger) belongs to nobody."""
        return self._cut(None)

    @contextmanager
    def count(self) -> Iterator[None]:
        """Counts the FLOPs of what runs within, live; for a step whose forward does not go through ``model(...)``."""
        if self._builder is None:
            yield
            return
        with self.counter.counting():
            yield

    def flush(self, timeout_s: float = PATIENCE_S) -> None:
        """Makes a record of the steps so far and waits, at most so long, until all are resolved and the sinks have them."""
        if self._builder is None:
            return
        deadline_ns = self._clock.now_ns() + s_to_ns(timeout_s)
        self._put(self._builder.flush())
        self._settle(deadline_ns)
        self._sampler.read_now()
        self._recorder.drain(deadline_ns)
        self._recorder.deliver(deadline_ns)

    def warn(self, text: str, *, key: str = "") -> None:
        """Says once (per ``key``) what is missing or uncertain, and keeps it for the summary; for adapters. Never raises."""
        self._warnings(text, key=key)

    def adopt(self, model: torch.nn.Module, *, planned_steps: int | None = None, dtype: str | None = None) -> None:
        """Tells late what is trained, for a trainer that builds and moves it after the run began.

        Args:
            model: the model, on its device. Its calls are not watched: count with :attr:`counter` or :meth:`count`.
            planned_steps: steps of the whole run, where the user gave none.
            dtype: what its matmuls compute in ("bfloat16"), where that is not its parameters' dtype.
        """
        if not self._enabled:
            return
        self._model = model
        self._dtype = dtype
        known = self._recorder.manifest
        planned = known.planned_steps if known.planned_steps is not None else planned_steps
        self._recorder.restate(replace(known, planned_steps=planned, **_described(model)))

    @property
    def counter(self) -> StepFlops:
        """Counts FLOPs live, for a trainer whose hooks stand at both ends of a step."""
        if self._flops is None:
            self._flops = self._step_flops(self._model)
        return self._flops

    def summary(self) -> RunSummary:
        """The run as far as it is resolved; complete once the context is left."""
        if self._summary is not None:
            return self._summary
        if not self._enabled:
            return RunSummary(self._idle, "disabled", None, None, RunTotals())
        return self._recorder.summary(self._warnings.said)

    def _open(self) -> None:
        clock = self._clock
        sinks = list(self._user_sinks)
        manifest = replace(self._recorder.manifest, started_unix_ns=clock.epoch_unix_ns + clock.now_ns())
        if self._log_dir is not None:
            jsonl, manifest = _jsonl(self._log_dir, manifest)
            sinks.insert(0, jsonl)
        if self._rank == 0 and (self._log_dir is not None or self._writer is not None):
            sinks += self._tensorboard()
        self._recorder.manifest = manifest
        self._sampler.start()
        if self._model is not None and self._flops_per_step is None:
            self._flops = self._step_flops(self._model)
            self._flops.attach()
        self._recorder.open(sinks)
        self._builder = StepBuilder(self._mark(), self._cadence, lambda: _peak_memory_bytes(self._model))
        self._put(self._builder.opening())
        self._halts.append(clock.every(TICK_S, self._recorder.tick, "recorder"))

    def _close(self, status: str) -> None:
        builder, self._builder = self._builder, None
        if self._flops is not None:
            self._flops.detach()
        deadline_ns = 0
        try:
            deadline_ns = self._clock.now_ns() + s_to_ns(PATIENCE_S)
            if builder is not None:
                self._put(builder.finish(self._mark()))
            self._settle(deadline_ns)
            if self._waiting and isinstance(self._marker, DeviceMarker):
                self._marker.abandon()
                self._warnings(
                    f"the device was more than {PATIENCE_S:g} s behind when the run ended: what it had not done then is not measured in "
                    "full. Wait for it (torch.cuda.synchronize()) before leaving the context"
                )
                self._waiting = deque(replace(span, flags=span.flags | {Flag.LATE}) for span in self._waiting)
                self._put([])
            self._sampler.read_now()
            self._recorder.drain(deadline_ns)
        finally:
            for halt in self._halts:
                halt()
            self._sampler.stop(close=self._own_meters)
            for name, why in self._sampler.failing().items():
                self._warnings(f"{name} could not be read at the end ({why}): its joules are missing from then on")
            self._summary = self._recorder.finish(status, lambda: self._warnings.said, deadline_ns)
            if self._own_writer and self._writer is not None:
                self._writer.close()

    @contextmanager
    def _cut(self, phase: Phase | None) -> Iterator[None]:
        builder = self._builder
        if builder is None:
            if self._enabled and self._summary is None:
                raise UsageError("a phase outside the context: write `with green_torch.track(...) as tracker:` around the loop")
            yield
            return
        self._take_flops(builder)
        self._put(builder.open_phase(self._mark(), phase))
        try:
            yield
        finally:
            if self._builder is builder:
                self._take_flops(builder)
                self._put(builder.close_phase(self._mark()))

    def _take_flops(self, builder: StepBuilder) -> None:
        """Books the FLOPs that ran since the last mark; new work is counted here, before the mark is made."""
        if self._flops is None:
            return
        work = self._flops.take()
        if work.flops is not None and Flag.COUNTED in work.flags:
            self._learn_peaks(work.flops)
        builder.add_flops(work.flops, work.flags)

    def _mark(self) -> Instant:
        """A boundary, now on the host; on a device, when its queue gets there."""
        if self._may_use_device and isinstance(self._marker, HostMarker) and _cuda_in_use():
            self._may_use_device = False
            try:
                from green_torch.clock.cuda import CudaEvents

                self._marker = DeviceMarker(CudaEvents(), self._clock.now_ns, self._needed_marks)
            except Exception as error:  # rule 9
                self._warnings(f"step boundaries are taken on the host, since CUDA events can't be used: {error}", key="events")
        try:
            return self._marker.mark()
        except Exception as error:  # rule 9
            self._leave_device(error)
            return self._marker.mark()

    def _leave_device(self, error: Exception) -> None:
        self._warnings(f"step boundaries are taken on the host from now on, since the device failed: {error}", key="events")
        if isinstance(self._marker, DeviceMarker):
            self._marker.abandon()

    def _needed_marks(self) -> set[int]:
        """Boundaries whose spans are still to be handed on."""
        open_pieces = self._builder.open_pieces if self._builder is not None else ()
        return {at.at_ns for piece in (*open_pieces, *(p for span in self._waiting for p in span.pieces)) for at in piece}

    def _unread_since_ns(self) -> float:
        """From where on the recorder may yet be asked for levels (asked from its thread)."""
        builder, waiting = self._builder, list(self._waiting)
        return min(
            builder.unread_since_ns if builder is not None else math.inf,
            *(piece[0].at_ns for span in waiting for piece in span.pieces),
            math.inf,
        )

    def _put(self, spans: list[Span]) -> None:
        self._waiting.extend(spans)
        while self._waiting:
            span = self._waiting.popleft()
            if not self._forward(span):
                self._waiting.appendleft(span)
                return

    def _forward(self, span: Span) -> bool:
        """Hands a span on once the device has passed all its boundaries."""
        if isinstance(self._marker, HostMarker):
            self._recorder.put(span)
            return True
        pieces = []
        try:
            for start, end in span.pieces:
                begun, ended = self._marker.resolve(start), self._marker.resolve(end)
                if begun is None or ended is None:
                    return False
                pieces.append((begun, ended))
        except Exception as error:  # rule 9; a second try is answered without the device
            self._leave_device(error)
            return self._forward(span)
        self._recorder.put(replace(span, pieces=tuple(pieces)))
        return True

    def _settle(self, deadline_ns: int) -> None:
        """Waits, without synchronising and no longer than to the deadline, until the device has passed every boundary."""
        self._put([])
        while self._waiting and self._clock.now_ns() < deadline_ns:
            self._clock.sleep(0.002)
            self._put([])

    def _count(self, name: str, value: float | None) -> int | None:
        """A count of units; ``None`` with one warning where it is not one."""
        if value is None:
            return None
        try:
            whole = int(value)
            if whole > 0 and whole == value:
                return whole
        except (TypeError, ValueError, OverflowError):
            pass
        self._warnings(
            f"{name}={value!r:.200} is no positive whole number: left out, and the record is flagged {Flag.BAD_COUNT}",
            key=f"bad {name}",
        )
        return None

    def _number(self, step: int) -> int | None:
        """A place on the step axis; ``None`` with one warning where it is none."""
        with suppress(TypeError, ValueError, OverflowError):
            if int(step) == step:
                return int(step)
        self._warnings(f"step={step!r:.200} is no whole number: the next one stands in", key="bad step")
        return None

    def _given_flops(self, flops: float) -> FlopCount | None:
        """Model FLOPs of the user's; what ran on the hardware is not known by them."""
        if self._given is not None and self._given.model_flops == flops:
            return self._given
        with suppress(TypeError, ValueError, OverflowError):
            given = float(flops)
            if math.isfinite(given) and given > 0:
                self._given = FlopCount(given, None, flops_by_dtype={f"mm/{self._dtype or _dtype_name(self._model)}": given})
                self._learn_peaks(self._given)
                return self._given
        self._warnings(f"flops={flops!r:.200} is no positive number: left out", key="bad flops")
        return None

    def _step_flops(self, model: torch.nn.Module | None) -> StepFlops:
        from green_torch.flops import StepFlops  # torch is loaded only where there is a model

        return StepFlops(model, attention=self._attention, warn=self._warnings)

    def _tensorboard(self) -> list[Sink]:
        try:
            from green_torch.sinks.tensorboard import TensorBoardSink, open_writer  # loads torch and tensorboard

            if self._writer is None and self._log_dir is not None:
                self._writer = open_writer(self._log_dir)
                self._own_writer = True
            return [TensorBoardSink(self._writer)] if self._writer is not None else []
        except Exception as error:  # TensorBoard may be broken or absent: rule 9
            self._warnings(f"no TensorBoard output: {type(error).__name__}: {error}. Mend it: pip install -U tensorboard")
            return []

    def _peak_of(self, flops_by_dtype: Mapping[str, float]) -> DevicePeak | None:
        from green_torch.peaks import blended_peak  # only where FLOPs are known

        device = _device(self._model)
        return blended_peak(flops_by_dtype, device, override_flop_per_s=self._peak_flop_per_s)

    def _learn_peaks(self, count: FlopCount) -> None:
        """Looks up (on a CPU: measures, once) the peaks that new work asks for, and states them in the manifest."""
        for key, flops in count.flops_by_dtype.items():
            if key in self._peaks or flops <= 0:
                continue
            try:
                peak = self._peak_of({key: flops})
            except Exception as error:  # rule 9
                self._warnings(f"no peak for {key}: {type(error).__name__}: {error}")
                continue
            if peak is None:
                self._warnings(
                    f"no peak FLOP/s is known for {key} on {self.manifest.device or 'this device'}, so no MFU: give peak_flop_per_s="
                )
                continue
            self._peaks[key] = replace(peak, dtype=key)
            self._recorder.restate(replace(self._recorder.manifest, peaks=tuple(self._peaks.values())))


track = Tracker


class _Warnings:
    """Says each thing once, as a :class:`GreenTorchWarning`, and never raises: not even under ``-W error``."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}  # key -> text

    @property
    def said(self) -> tuple[str, ...]:
        return tuple(self._said.values())

    def note(self, text: str) -> None:
        """For the summary alone."""
        self._said[text] = text

    def __call__(self, text: str, *, key: str = "") -> None:
        """``key``: what makes two warnings one, where their texts vary."""
        key = key or text
        if key in self._said or len(self._said) >= _MOST_WARNINGS:
            return
        self._said[key] = text
        try:
            warnings.warn(text, GreenTorchWarning, stacklevel=4)
        except GreenTorchWarning:
            logging.getLogger("green_torch").warning(text)


class _NoWriter:
    """Takes every call of a SummaryWriter and writes nothing: on ranks but the first, say, where a loop logs its loss as everywhere."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_args, **_named: None


def _place() -> tuple[int, int]:
    """Rank and world size: of the process group where there is one (Lightning's launcher sets no RANK), else of the environment."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _positive(name: str, value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ArgumentError(f"{name}={value!r}: a positive number is needed")
    return value


def _not_negative(name: str, value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise ArgumentError(f"{name}={value!r}: a number that is not negative is needed")
    return value


def _whole(name: str, value: int) -> int:
    if isinstance(value, bool | str) or int(value) != value or value < 1:
        raise ArgumentError(f"{name}={value!r}: a whole number of at least 1 is needed")
    return int(value)


def _attention(value: Literal["full", "causal"]) -> Literal["full", "causal"]:
    if value not in ("full", "causal"):
        raise ArgumentError(f"attention_flops={value!r}: use 'full' or 'causal'")
    return value


def _cadence(value: int | str) -> int | str:
    return value if value == "auto" else _whole("log_every_n_steps", value)  # type: ignore[arg-type]  # checked inside


def _embodied(value: Embodied | float | None) -> Embodied | None:
    if value is None or isinstance(value, Embodied):
        return value
    return Embodied(manufacturing_kg=_not_negative("embodied", value) or 0.0, source="given by the user")


def _directory(path: str | os.PathLike[str] | None) -> Path | None:
    """The run's directory, made and tried.

    Raises:
        ArgumentError: it can't be written.
    """
    if path is None:
        return None
    directory = Path(path)
    probe = directory / f".green_torch-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ArgumentError(
            f"log_dir={str(directory)!r} can't be written: {error.strerror}. Give a directory of yours"
        ) from error
    return directory


def _grid(
    region: str | None, intensity: float | IntensityProvider | None, pue: float | None, manifest: Manifest, clock: Clock
) -> tuple[IntensityProvider, Manifest]:
    """The intensity provider, and the manifest with grid and PUE stated."""
    from green_torch.intensity import pue_for, resolve  # codecarbon's tables take a moment to load

    provider = resolve(region, intensity)
    published, source = pue_for(region)
    if pue is not None:
        if not (math.isfinite(pue) and pue >= 1):
            raise ArgumentError(f"pue={pue!r}: facility energy over IT energy is at least 1")
        published, source = float(pue), "given by the user"
    point = None
    if isinstance(intensity, int | float) or intensity is None:  # a table or a number: no network behind it
        point = provider.at(clock.epoch_unix_ns + clock.now_ns())
    return provider, replace(manifest, intensity=point, pue=published, pue_source=source)


def _meters(given: Sequence[Meter] | None, poll_interval_s: float) -> tuple[list[Meter], tuple[str, ...]]:
    if given is not None:
        names = [domain.name for meter in given for domain in meter.domains]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ArgumentError(
                f"meters=: {', '.join(sorted(twice))} is read by more than one meter, and would be counted twice"
            )
        return list(given), ()
    from green_torch.meters import discover  # opens drivers

    found = discover()
    if not any(domain.name.startswith("gpu") for meter in found.meters for domain in meter.domains):
        return list(found.meters), found.missing
    from green_torch.sampler_child import in_child  # GPUs are read by a small process of their own

    return in_child(found.meters, poll_interval_s), found.missing


def _jsonl(log_dir: Path, manifest: Manifest) -> tuple[Sink, Manifest]:
    from green_torch.sinks.jsonl import JsonlSink, next_segment, run_file  # only where there is a directory

    sink = JsonlSink(run_file(log_dir, manifest.rank, next_segment(log_dir, manifest.rank)))
    return sink, replace(manifest, segment=sink.segment)


def _baseline(path: str | os.PathLike[str] | None) -> Baseline | None:
    """The baseline run's train energy per token, or sample, or step.

    Raises:
        ArgumentError: nothing usable is there.
    """
    if path is None:
        return None
    from green_torch.sinks.jsonl import read_last

    files = sorted((Path(path) / "green").glob("rank-00000.segment-*.jsonl"))
    if not files:
        raise ArgumentError(f"baseline={str(path)!r}: no run there (looked for green/rank-00000.segment-….jsonl)")
    run = read_last(files[-1])
    name = run.manifest.label or run.manifest.run_name
    if run.summary is not None:  # its means leave the steps out in which FLOPs were counted
        summary = run.summary
        for unit, energy_j in (
            ("token", summary.energy_per_token_j),
            ("sample", summary.energy_per_sample_j),
            ("step", summary.energy_per_step_j),
        ):
            if energy_j is not None:
                return Baseline(name, unit, energy_j)
    train = (run.records[-1].totals if run.records else RunTotals()).phase(Phase.TRAIN)
    for unit, count in (("token", train.tokens), ("sample", train.samples), ("step", train.n_steps)):
        if count and train.energy_j is not None:
            return Baseline(name, unit, train.energy_j / count)
    raise ArgumentError(f"baseline={str(path)!r}: that run holds no train step with known energy")


def _versions() -> dict[str, str]:
    versions = {"green_torch": green_torch.__version__, "python": platform.python_version()}
    for name in ("torch", "codecarbon", "nvidia-ml-py", "lightning", "pytorch-lightning", "tensorboard"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cuda_in_use() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def _device(model: torch.nn.Module | None) -> torch.device:
    import torch  # only where FLOPs are counted

    first = next(model.parameters(), None) if model is not None else None
    if first is not None:
        return first.device
    return torch.device("cuda" if _cuda_in_use() else "cpu")


def _dtype_name(model: torch.nn.Module | None) -> str:
    first = next(model.parameters(), None) if model is not None else None
    return str(first.dtype).removeprefix("torch.") if first is not None else "float32"


def _described(model: torch.nn.Module | None) -> dict[str, Any]:
    """``model``, ``parameters`` and ``device`` of the manifest."""
    if model is None:
        return {}
    import torch

    device = _device(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "model": type(model).__name__,
        "parameters": _size(model),
        "device": name,
    }


def _size(model: torch.nn.Module) -> int | None:
    """Its parameters; ``None`` while some have no shape yet."""
    from torch.nn.parameter import is_lazy

    parameters = list(model.parameters())
    return None if any(is_lazy(one) for one in parameters) else sum(one.numel() for one in parameters)


def _peak_memory_bytes(model: torch.nn.Module | None) -> int | None:
    """Peak memory of the process so far: of the accelerator where the model is on one, else resident."""
    torch = sys.modules.get("torch")
    if model is not None and torch is not None and _cuda_in_use():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
