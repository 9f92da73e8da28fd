"""``track()`` and ``Tracker``: the composition root, which wires the stages together and owns none of their work."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import uuid
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, final

from green_torch.arguments import (
    attention,
    baseline_of,
    cadence,
    directory,
    embodied_of,
    embodied_of_cards,
    energy_meters,
    grid_of,
    not_negative,
    positive,
    whole,
)
from green_torch.calibration import part_time_periods
from green_torch.clock import Boundaries, HostClock
from green_torch.errors import ArgumentError, UsageError
from green_torch.journal import NOTHING_RAN, Journal
from green_torch.outlet import TICK_S
from green_torch.recorder import PATIENCE_S, Recorder
from green_torch.records import REQUEUE, DevicePeak, Embodied, Flag, FlopCount, Manifest, Phase, RunSummary, RunTotals
from green_torch.sampler import Sampler
from green_torch.segments import Checkpoint, carried, checkpoint, last_of_job
from green_torch.sinks.jsonl import JsonlSink, next_segment, run_file
from green_torch.steps import Cadence
from green_torch.surroundings import (
    DEFERRAL,
    common_run_id,
    described,
    device_of,
    dtype_name,
    job,
    peak_memory_bytes,
    place,
    restarted,
    versions,
)
from green_torch.units import s_to_ns
from green_torch.warned import Warnings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Self

    import torch
    from torch.utils.tensorboard import SummaryWriter

    from green_torch.flops import StepFlops
    from green_torch.journal import Ran
    from green_torch.protocols import Clock, IntensityProvider, Meter, Sink
    from green_torch.ranks import Ranks
    from green_torch.records import Deferral, JobTotals, RankTotals
    from green_torch.schedule.accounting import Account
    from green_torch.schedule.pausing import LoopPauses

POLL_INTERVAL_S = 0.01
_PHASES = tuple(phase for phase in Phase if phase is not Phase.TRAIN)
_BY_SIGNAL = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # the exit codes by which shells tell what ended a command

_active: Tracker | None = None  # the one that is open in this process


@final
class Tracker:
    """Measures a training loop: ``with track(model, log_dir="runs/a") as tracker: ... tracker.step(tokens=n)``.

    Everything is optional; ``track()`` alone works on any machine. One tracker at a time may be open in a process. In a job of several
    processes (torchrun, Slurm, Lightning) open one on every rank, where ``RANK`` or the process group tells it its place: each meters
    its own GPU and keeps its own file, local rank 0 a node's CPU and memory, and rank zero shows the sums of all.

    Args:
        model: counts FLOPs from its forward calls, for MFU.
        log_dir: the run's directory: TensorBoard events and ``green/rank-….jsonl``.
        writer: your own ``SummaryWriter``; our values go through it, and ``log_dir`` defaults to its directory.
        run_name: defaults to the directory's name.
        region: where the electricity comes from: "FR", "US-CA", "aws:us-west-2". None: the world average, named so.
        intensity: gCO2e/kWh, or a provider; wins over ``region``.
        pue: facility over IT energy, at least 1. None: the cloud provider's published figure, else 1.
        price: money per kWh of facility energy, in any currency.
        meters: what reads energy; they stay open, and yours to close. None: every device that is found. What they read of ``cpu`` and
            ``dram`` is used by local rank 0 alone.
        poll_interval_s: seconds between readings of a hardware counter; a GPU's is read ten times as often in its first second, and then
            two or three times around each update that is due where those are further apart than this.
        clock: the run's time; for tests, :class:`green_torch.testing.ScriptedClock`.
        flops_per_step: model FLOPs of a step, where they can't be counted.
        peak_flop_per_s: the device's dense peak, where the table has none or another is wanted.
        attention_flops: "full" counts attention in full (PaLM), "causal" halves causal attention.
        embodied: manufacturing footprint of the devices that this process uses (each rank tells its own): an :class:`Embodied`,
            kgCO2e, or "device" for the GPUs' published one.
        log_every_n_steps: steps per record; "auto" thins them out as the run grows.
        baseline: a run's directory; savings over ``planned_steps`` are projected against its energy per token, sample or step. A run
            of another model, on another device or with other meters is taken too, with a warning.
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
        embodied: Embodied | float | Literal["device"] | None = None,
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
        self._own_writer = self._looks_after = False  # whether the account is held against the grid's figures by itself
        self._warnings = Warnings()
        self._journal: Journal | None = None
        self._flops: StepFlops | None = None
        self._halts: list[Callable[[], None]] = []
        self._summary: RunSummary | None = None
        self._saved: Checkpoint | None = None  # the checkpoint that this run goes on from
        self._earlier: Path | None = None  # where the run is that this one goes on with, since the job was started again
        self._going_on = threading.Lock()  # one at a time states which run this is
        self._step, self._steps_done = -1, 0  # the last one before the context, or in it once it is left; how many by then
        self._file: Path | None = None
        self._ranks: Ranks | None = None
        self._pauses: LoopPauses | None = None
        self._account: Account | None = None
        self._dtype: str | None = None
        self._peaks: dict[str, DevicePeak] = {}
        self._given: FlopCount | None = None
        self._flops_per_step = positive("flops_per_step", flops_per_step)
        self._peak_flop_per_s = positive("peak_flop_per_s", peak_flop_per_s)
        self._attention = attention(attention_flops)
        self._cadence = Cadence(cadence(log_every_n_steps))
        poll_interval_s = positive("poll_interval_s", poll_interval_s) or POLL_INTERVAL_S
        self._log_dir = self._directory(log_dir, writer) if enabled else None
        self._place = place()
        self._user_sinks = list(sinks or ())
        self._asked_to_log, self._own_meters = log_dir is not None, meters is None
        manifest = Manifest(
            run_id=uuid.uuid4().hex[:12],
            run_name=run_name or (self._log_dir.name if self._log_dir else "run"),
            segment=1,
            rank=self._place.rank,
            world_size=self._place.world_size,
            started_unix_ns=0,
            domains=(),
            missing=(),
            intensity=None,
            pue=1.0,
            pue_source="",
            embodied=embodied_of(embodied),
            price_per_kwh=not_negative("price", price),
            planned_steps=None if planned_steps is None else whole("planned_steps", planned_steps),
            attention_flops=self._attention,
            label=label,
            versions=versions(),
            job=job(),
        )
        if not enabled:
            self._idle = manifest
            return
        self._clock = clock or HostClock()
        self._boundaries = Boundaries(
            self._clock.now_ns, self._warnings, may_use_device=clock is None, device=lambda: device_of(self._model)
        )
        provider, manifest = grid_of(region, intensity, pue, manifest, self._clock)
        self._provider = provider
        found, missing = energy_meters(meters, poll_interval_s, self._place, self._warnings)
        manifest = replace(
            manifest, domains=tuple(domain for meter in found for domain in meter.domains), missing=missing, **described(model)
        )
        if embodied == "device":
            made, problem = embodied_of_cards(manifest.domains)
            manifest = replace(manifest, embodied=made)
            if problem:
                self._warnings(problem)
        if not found and self._place.first_on_node:
            self._warnings(
                f"nothing here measures energy: {'; '.join(missing) or 'meters= is empty'}. See what would: green-torch doctor"
            )
        self._sampler = Sampler(self._clock, found, poll_interval_s)
        compared = baseline_of(baseline, self._place.rank)
        if compared is not None:
            manifest = replace(manifest, baseline=str(compared))
        self._recorder = Recorder(
            self._clock,
            self._sampler,
            manifest,
            intensity=provider,
            peak_of=self._peak_of,
            warn=self._warnings,
            baseline=compared,
            part_time_s=part_time_periods(manifest.domains),
            job_of=self._job_of if self._place.world_size > 1 else None,
            awaited=lambda: self._ranks is not None and self._ranks.awaited,
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
        """The last step that ended, on the step axis of the records; before the first the checkpoint's, or -1."""
        return self._journal.last_step if self._journal is not None else self._step

    @property
    def steps_done(self) -> int:
        """Steps that the run has done, with those before the checkpoint that it goes on from, whatever the step axis calls them."""
        return self._journal.steps_done if self._journal is not None else self._steps_done

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
        if _active is not None:
            raise UsageError(
                "another tracker is open in this process, and both would count the same joules: leave it first, or mark parts of "
                "the run with tracker.phase(...)"
            )
        if self._summary is not None:
            raise UsageError("this tracker's run has ended: make a new one with green_torch.track(...)")
        _active = self
        try:
            self._open()
        except BaseException:
            _active = None
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _active  # noqa: PLW0603
        if not self._enabled or self._journal is None:
            return
        _active = None
        status = "completed" if kind is None else _status_of(error)
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
        journal = self._journal
        if journal is None:
            self._step_outside()
            return
        if flops is None and self._flops_per_step is not None and not journal.in_phase:  # evaluation is no training step
            flops = self._flops_per_step
        ran = NOTHING_RAN
        if flops is not None:
            ran = self._given_flops(flops), ()
        elif self._flops is not None:
            ran = self._take_flops()
        journal.step(tokens, samples, step, ran)

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

    def pause_if_dirty(self, *, save: Callable[[], object] | None = None, steps_left: float | None = None, **how: Any) -> float:
        """After ``step()``, on every rank: waits while the grid is dirty, if the plan for what is left of the run says so.

        Args:
            save: saves a checkpoint before a pause.
            steps_left: steps to come; by ``planned_steps`` where not given. Unknown means no pause.
            how: ``max_wait=`` or ``deadline=``, and what else :class:`green_torch.schedule.pausing.Pauses` takes; ``provider=`` is
                the run's own where not given. The first call's count.

        Returns:
            Seconds waited, in phase "paused"; with ``on_pause="exit"`` it saves and leaves.

        Raises:
            ArgumentError: at the first call, where an argument is wrong.
            SystemExit: 75, with ``on_pause="exit"``.
        """
        if self._journal is None:
            return 0.0
        if self._pauses is None:
            from green_torch.schedule.pausing import LoopPauses

            options = {"provider": self._provider, "clock": self._clock, **how}
            directory = self._log_dir or Path.cwd()
            self._pauses = LoopPauses(directory=directory, save=save, warn=self._warnings, account=self.account, **options)
            self._halts.append(self._pauses.close)
        planned = self.manifest.planned_steps
        left = planned - self.steps_done if steps_left is None and planned is not None else steps_left
        return self._pauses.after_step(left, self.phase)

    @property
    def account(self) -> Account | None:
        """Keeps account of what is put off for a cleaner grid, for adapters; ``None`` where nothing is measured, and on ranks but zero."""
        if self._account is None and self._enabled and self._place.rank == 0:
            from green_torch.schedule.accounting import Account  # loads numpy

            self._account = Account(self._clock, self._idle_share, lambda all_: self._recorder.restate(deferrals=all_))
        return self._account

    def _idle_share(self) -> float | None:
        from green_torch.schedule.accounting import idle_share

        totals = self._recorder.totals
        train, paused = totals.phase(Phase.TRAIN), totals.phase(Phase.PAUSED)
        return idle_share((train.energy_j, train.duration_s), (paused.energy_j, paused.duration_s))

    def _put_off(self, before: tuple[Deferral, ...] = (), left_unix_ns: int | None = None) -> None:
        """Takes up what was put off before this start: by earlier segments, and by the command that started it."""
        text = os.environ.get(DEFERRAL)
        account = self.account if before or text or self._account else None
        if account is None:
            return
        from green_torch.schedule.accounting import LOOK_S, taken

        account.watch(self._provider)
        account.carry(before, left_unix_ns)
        waited = taken(text) if text else None
        if waited is not None:
            account.add(waited)
        if self._journal is not None and not self._looks_after:
            self._looks_after = True
            self._halts.append(self._clock.every(LOOK_S, account.look, "what waiting saves"))

    def _settle_account(self) -> None:
        if self._account is None:
            return
        try:
            self._account.reckon(tell=True)
        except Exception as error:  # rule 9
            self._warnings(f"what waiting saved is not told: {type(error).__name__}: {error}")

    def suspend(self) -> AbstractContextManager[None]:
        """Stops the run's clock: what passes within (another variant's turn, a debugger) belongs to nobody."""
        return self._cut(None)

    @contextmanager
    def count(self) -> Iterator[None]:
        """Counts the FLOPs of what runs within, live; for a step whose forward does not go through ``model(...)``."""
        if self._journal is None:
            yield
            return
        with self.counter.counting():
            yield

    def flush(self, timeout_s: float = PATIENCE_S) -> None:
        """Makes a record of the steps so far and waits, at most so long, until all are resolved and the sinks have them."""
        journal = self._journal
        if journal is None:
            return
        deadline_ns = self._clock.now_ns() + s_to_ns(timeout_s)
        journal.flush()
        self._settle(journal, deadline_ns)
        self._sampler.read_now()
        self._recorder.drain(deadline_ns)
        self._recorder.deliver(deadline_ns)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint should hold for :meth:`load_state_dict`: run id, segment, steps and directory, as plain JSON.

        Ends the record under way, so that steps after the checkpoint, which may have to be done again, stand in records of their own.
        Call it on every rank that saves; ``{}`` where nothing is measured.
        """
        if not self._enabled:
            return {}
        if self._journal is not None:
            self._journal.flush()
        return self._checkpoint().state()

    def _checkpoint(self) -> Checkpoint:
        log_dir = str(self._log_dir.resolve()) if self._log_dir else ""
        return Checkpoint(self.manifest.run_id, self.manifest.segment, self.last_step, log_dir, self.steps_done)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the run that saved this state: same run id, next segment, and steps count on after the checkpoint's.

        Call it on every rank, before the context is entered or within it before its first step. The manifest then tells the
        checkpoint's step, so that steps of earlier segments beyond it are known to have been done again (where the run had not
        completed: from a checkpoint of one that had, this is a branch, and the steps of both count), and what earlier segments used. The
        time between counts as nothing. Never raises: a state that is none of ours, or one that comes after the first step, is left out
        with a warning, and the run is a new one.
        """
        if not self._enabled or not state:
            return
        saved = checkpoint(state)
        if saved is None:
            self._warnings(f"load_state_dict() got no state of tracker.state_dict(): {state!r:.200}; this counts as a new run")
        elif self._summary is not None or (self._journal is not None and self._journal.last_step != self._step):
            self._warnings("load_state_dict() after the first step is ignored: load before the loop; this counts as a new run")
        elif saved != self._checkpoint():  # as when a trainer tries learning rates first, and goes back to where it was
            self._continue(saved)

    def _continue(self, saved: Checkpoint) -> None:
        """Takes the run's id and step axis from the checkpoint."""
        self._saved = saved
        self._step, self._steps_done = saved.step, saved.steps_done
        if self._journal is not None:
            self._journal.resume(saved.step, saved.steps_done)
        self._go_on(
            run_id=saved.run_id,
            segment=max(self.manifest.segment, saved.segment + 1),
            resumed_from_step=saved.step,
            steps_before=saved.steps_done,
            previous_segment=saved.segment,
        )

    def _requeued(self, log_dir: Path) -> None:
        """Goes on with the run that this job had before it was requeued."""
        found = last_of_job(log_dir, self.manifest)
        if found is None:
            return
        self._earlier, earlier = found
        self._go_on(run_id=earlier.run_id, segment=max(self.manifest.segment, earlier.segment + 1))

    def _go_on(self, **known: Any) -> None:
        """States which run this is, by fields of the manifest, and what its earlier segments used (any thread)."""
        with self._going_on:
            self._recorder.restate(**known)
            self._carry()

    def _carry(self) -> None:
        """States what earlier segments of this run used, from their files."""
        directories = {str(self._log_dir or ""), str(self._earlier or ""), self._saved.log_dir if self._saved else ""} - {""}
        try:
            found = carried(directories, self.manifest, own=self._file)
        except Exception as error:  # rule 9: somebody's disk
            self._warnings(f"what earlier segments of this run used is not known: {type(error).__name__}: {error}")
            return
        for why in found.unread:
            self._warnings(f"an earlier segment is left out of the run's totals: {why}")
        self._recorder.restate(carried_energy_j=found.energy_j, carried_emissions_g=found.emissions_g)
        self._put_off(found.deferrals, found.left_unix_ns)

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
        self._recorder.restate(planned_steps=planned, **described(model))

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

    def _leave_to_parent(self) -> None:
        """In a forked child: the run, its threads and its files are the parent's, so nothing is measured here."""
        self._idle = self._recorder.manifest
        self._enabled, self._journal = False, None

    def _directory(self, log_dir: str | os.PathLike[str] | None, writer: SummaryWriter | None) -> Path | None:
        """The run's directory: the writer's where none is given, if that is a local one."""
        if log_dir is None and writer is not None and "://" in str(writer.log_dir):
            self._warnings(
                f"{writer.log_dir} is no local directory: the values go there by the SummaryWriter, but the run leaves no files of its own "
                "(green/rank-00000.segment-0001.jsonl), by which green-torch report and the job's next start know it. For those, log to a "
                "local directory"
            )
            return None
        return directory(log_dir if log_dir is not None or writer is None else writer.log_dir)

    def _open(self) -> None:
        clock = self._clock
        sinks = list(self._user_sinks)
        manifest = replace(self._recorder.manifest, started_unix_ns=clock.epoch_unix_ns + clock.now_ns())
        if self._log_dir is not None:
            jsonl = _jsonl(self._log_dir, manifest)
            self._file = jsonl.path
            manifest = replace(manifest, segment=jsonl.segment)
            sinks.insert(0, jsonl)
        if self._saved is None and self._log_dir is not None and self._place.world_size > 1:
            manifest = replace(manifest, run_id=common_run_id(self._log_dir, manifest.segment) or manifest.run_id)
        self._recorder.manifest = manifest
        if self._saved is None and self._log_dir is not None and restarted(manifest.job):
            self._requeued(self._log_dir)
        if self._place.world_size > 1:
            self._join()
        if self._place.rank == 0 and (self._log_dir is not None or self._writer is not None):
            sinks += self._tensorboard()
        self._sampler.start()
        if self._model is not None and self._flops_per_step is None:
            self._flops = self._step_flops(self._model)
            self._flops.attach()
        self._recorder.open(sinks)
        journal = self._journal = Journal(
            self._boundaries,
            self._cadence,
            put=self._recorder.put,
            warn=self._warnings,
            peak_memory=lambda: peak_memory_bytes(self._model),
        )
        journal.resume(self._step, self._steps_done)

        def tick() -> None:
            journal.read(wait=False)
            self._recorder.tick(journal.unread_since_ns)

        self._halts.append(clock.every(TICK_S, tick, "recorder"))
        self._put_off()

    def _close(self, status: str) -> None:
        journal, self._journal = self._journal, None
        if self._flops is not None:
            self._flops.detach()
        deadline_ns = 0
        try:
            deadline_ns = self._clock.now_ns() + s_to_ns(PATIENCE_S)
            if journal is not None:
                self._step, self._steps_done = journal.last_step, journal.steps_done
                journal.finish()
                self._settle(journal, deadline_ns)
                if journal.behind:
                    journal.abandon()
                    self._warnings(
                        f"the device was more than {PATIENCE_S:g} s behind when the run ended: what it had not done then is not measured in "
                        "full. Wait for it (torch.cuda.synchronize()) before leaving the context"
                    )
            self._sampler.read_now()
            self._recorder.drain(deadline_ns)
        finally:
            for halt in self._halts:
                halt()
            self._sampler.stop(close=self._own_meters)
            for name, why in self._sampler.failing().items():
                self._warnings(f"{name} could not be read at the end ({why}): its joules are missing from then on")
            self._recorder.conclude(deadline_ns)
            self._settle_account()
            if self._earlier is not None and self._saved is None:  # an adapter's state may come long after the run was opened
                self._warnings.note(
                    f"the job was started again, and this goes on with its run {self.manifest.run_id}; with no state from the checkpoint "
                    "(tracker.load_state_dict) steps that were done again can't be told"
                )
            self._part(status, deadline_ns)
            self._summary = self._recorder.finish(status, lambda: self._warnings.said)
            if self._own_writer and self._writer is not None:
                self._writer.close()

    def _join(self) -> None:
        """Begins to exchange totals with the other ranks, and what rank zero leads."""
        from green_torch.intensity import Live
        from green_torch.ranks import Lead, Ranks  # only where there are several

        recorder, provider = self._recorder, self._provider
        live = provider if isinstance(provider, Live) and self._place.rank != 0 else None
        if live is not None:
            live.follow()

        def lead(session: str) -> Lead:
            manifest = self.manifest
            return Lead(session, manifest.run_id, *recorder.grid, steps_before=manifest.steps_before)

        def follow(lead: Lead) -> None:
            manifest = self.manifest
            before = lead.steps_before if self._saved is None else manifest.steps_before
            if (lead.run_id, before) != (manifest.run_id, manifest.steps_before):
                self._go_on(run_id=lead.run_id, steps_before=before)
            if live is not None and lead.point is not None:
                live.tell(lead.point, lead.point_unix_ns)

        self._ranks = Ranks(
            self._clock,
            self._place.rank,
            self._place.world_size,
            own=recorder.own_totals,
            lead=lead,
            follow=follow,
            warn=self._warnings,
        )

    def _job_of(self, own: Callable[[], RankTotals], *, ended: bool = False) -> JobTotals | None:
        return self._ranks.job(own, ended=ended) if self._ranks is not None else None

    def _part(self, status: str, deadline_ns: int) -> None:
        """The last word to the other ranks."""
        now = place()
        if self._ranks is not None:
            self._ranks.finish(self._recorder.own_totals(status), deadline_ns)
        elif now.world_size > self._place.world_size:
            self._warnings(
                f"this process is rank {now.rank} of {now.world_size}, but the run was opened as one alone, so that every rank metered "
                "every device: open it after torch.distributed.init_process_group(), or start with torchrun"
            )

    def _step_outside(self) -> None:
        if not self._enabled:
            return
        if self._summary is None:
            raise UsageError("step() outside the context: write `with green_torch.track(...) as tracker:` around the loop")
        self._warnings("step() after the run has ended is ignored")

    @contextmanager
    def _cut(self, phase: Phase | None) -> Iterator[None]:
        journal = self._journal
        if journal is None:
            if self._enabled and self._summary is None:
                raise UsageError("a phase outside the context: write `with green_torch.track(...) as tracker:` around the loop")
            yield
            return
        journal.open_phase(phase, self._take_flops())
        try:
            yield
        finally:
            if self._journal is journal:
                journal.close_phase(self._take_flops())

    def _take_flops(self) -> Ran:
        """FLOPs that ran since the last mark, with their flags; new work is counted here, before the mark is made."""
        if self._flops is None:
            return NOTHING_RAN
        work = self._flops.take()
        if work.flops is not None and Flag.COUNTED in work.flags:
            self._learn_peaks(work.flops)
        return work.flops, work.flags

    def _settle(self, journal: Journal, deadline_ns: int) -> None:
        """Waits, without synchronising and no longer than to the deadline, until the device has passed every boundary."""
        self._boundaries.advance()
        journal.read()
        while journal.behind and self._clock.now_ns() < deadline_ns:
            self._clock.sleep(0.002)
            self._boundaries.advance()
            journal.read()

    def _given_flops(self, flops: float) -> FlopCount | None:
        """Model FLOPs of the user's; what ran on the hardware is not known by them."""
        if self._given is not None and self._given.model_flops == flops:
            return self._given
        with suppress(TypeError, ValueError, OverflowError):
            given = float(flops)
            if math.isfinite(given) and given > 0:
                self._given = FlopCount(given, None, flops_by_dtype={f"mm/{self._dtype or dtype_name(self._model)}": given})
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

        device = device_of(self._model)
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
            self._recorder.restate(peaks=tuple(self._peaks.values()))


track = Tracker


def _status_of(error: BaseException | None) -> str:
    """How a run ended that this leaves: ``sys.exit()`` completes it, with 75 it is to be queued again; Ctrl-C and SIGTERM interrupt it.

    Whether a scheduler that sent SIGTERM starts the job again, or has cancelled it, nobody tells. Lightning answers the signal with a
    ``SystemExit`` of its own, the ``SIGTERMException``, which has no code.
    """
    if isinstance(error, SystemExit):
        if type(error).__name__ == "SIGTERMException" or error.code in _BY_SIGNAL:
            return "interrupted"
        return "completed" if not error.code else "requeued" if error.code == REQUEUE else "failed"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def _in_forked_child() -> None:
    global _active  # noqa: PLW0603
    if _active is not None:
        _active._leave_to_parent()  # noqa: SLF001 - the class is this module's
        _active = None


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_in_forked_child)


class _NoWriter:
    """Takes every call of a SummaryWriter and writes nothing: on ranks but the first, say, where a loop logs its loss as everywhere."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_args, **_named: None


def _jsonl(log_dir: Path, manifest: Manifest) -> JsonlSink:
    segment = max(manifest.segment, next_segment(log_dir, manifest.rank))
    return JsonlSink(run_file(log_dir, manifest.rank, segment))
