"""Pauses while the grid is dirty: real fits on a scripted clock that wait or leave, and end bit for bit where an uninterrupted one does."""

from __future__ import annotations

import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from green_torch import ledger, track
from green_torch.clock import HostClock
from green_torch.errors import ArgumentError, GreenTorchWarning, IntensityError
from green_torch.intensity import ConstantIntensity, Trace
from green_torch.lightning import CarbonAwarePause
from green_torch.records import REQUEUE, IntensityPoint
from green_torch.schedule.accounting import Account, idle_share, present
from green_torch.schedule.pausing import RESUME_FILE, Pause, Pauses, described
from green_torch.testing import ScriptedClock, ScriptedMeter
from green_torch.units import NS_PER_S
from tests.lightning_bench import PACKAGES, POWER_W, Bench

pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning:lightning.*"),
    pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning.*"),
]
EPOCH_NS = 1_700_000_000 * NS_PER_S
MINUTE_S = 60.0
STEP_S = 60.0
N_EPOCHS, N_BATCHES, BATCH, WIDTH = 4, 10, 4, 6
DIRTY = (10, 70)  # minutes from the start between which the grid is dirty


def trace_of(tmp_path, clock: ScriptedClock, dirty=DIRTY, high=500, low=100) -> Trace:
    """Ten hours in steps of five minutes from the clock's beginning on."""
    start = datetime.fromtimestamp((clock.epoch_unix_ns + NS_PER_S) / 1e9, UTC)
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "grid.csv"
    rows = (
        f"{(start + timedelta(minutes=at)).isoformat()},{high if dirty[0] <= at < dirty[1] else low}" for at in range(0, 600, 5)
    )
    path.write_text("\n".join(["time,g_per_kwh", *rows]) + "\n")
    return Trace(path)


class Present:
    """A provider that tells the present alone."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.up = trace, True

    def at(self, time_unix_ns: int) -> IntensityPoint:
        if not self.up:
            raise IntensityError("nobody answers")
        return self.trace.at(time_unix_ns)


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return N_BATCHES * BATCH

    def __getitem__(self, index):
        return torch.full((WIDTH,), float(index)) + torch.rand(WIDTH)  # augmented by the random state of the process


class Kept:
    """A loader that knows where it is, in an order that each epoch draws anew; torch's own random numbers are left alone."""

    def __init__(self) -> None:
        self.at, self.epoch = 0, 0

    def __len__(self) -> int:
        return N_BATCHES

    def __iter__(self):
        if self.at >= N_BATCHES:  # nobody asks for what comes after the last one
            self.at, self.epoch = 0, self.epoch + 1
        order = torch.randperm(N_BATCHES * BATCH, generator=torch.Generator().manual_seed(self.epoch)).view(N_BATCHES, BATCH)
        while self.at < N_BATCHES:
            self.at += 1
            yield order[self.at - 1][:, None].expand(BATCH, WIDTH) / 40.0

    def state_dict(self):
        return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.at, self.epoch = state["at"], state["epoch"]


class Fit:
    """A fit of a model with dropout, Adam and a schedule; a step takes a minute. ``seen`` are the batches in order."""

    def __init__(
        self, tmp_path, *callbacks, clock, package="lightning.pytorch", loader=None, act=lambda _step: None, **options
    ):
        self.pl = pl = importlib.import_module(package)
        self.seen = seen = []

        class Module(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = torch.nn.Sequential(torch.nn.Linear(WIDTH, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))

            def training_step(self, batch, index):
                clock.advance(STEP_S)
                seen.append(batch.sum().item())
                act(self.global_step)
                noise = random.random() + np.random.rand()  # noqa: NPY002 - what users' code draws from
                return self.net(batch / 40).square().mean() * (1 + noise)

            def configure_optimizers(self):
                optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

        self.module = Module()
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        options = {"max_epochs": N_EPOCHS, "accelerator": "cpu", "default_root_dir": tmp_path, **quiet, **options}
        self.trainer = pl.Trainer(callbacks=list(callbacks), **options)
        self.loader = torch.utils.data.DataLoader(Numbers(), batch_size=BATCH, shuffle=True) if loader is None else loader

    def run(self, ckpt_path=None):
        self.trainer.fit(self.module, self.loader, ckpt_path=ckpt_path)
        return self

    def state(self):
        """Weights, optimizer, schedule and the next random numbers."""
        optimizer = self.trainer.optimizers[0].state_dict()
        return (
            self.module.state_dict(),
            optimizer,
            self.trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            (torch.rand(3), np.random.rand(), random.random()),  # noqa: NPY002
        )


def seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002
    random.seed(number)


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def uninterrupted(tmp_path, loader=None, **options) -> tuple[list, tuple]:
    seed(1)
    whole = Fit(tmp_path / "whole", clock=ScriptedClock(epoch_unix_ns=EPOCH_NS), loader=loader, **options).run()
    return whole.seen, whole.state()


def pausing(tmp_path, clock, dirty=DIRTY, **options) -> CarbonAwarePause:
    options = {"max_wait": 2 * 3600, "resume_overhead": 30, "check_every": 120, "clock": clock, **options}
    return CarbonAwarePause(options.pop("provider", None) or trace_of(tmp_path, clock, dirty), **options)


@pytest.fixture
def clock() -> ScriptedClock:
    return ScriptedClock(epoch_unix_ns=EPOCH_NS)


def minutes(clock) -> float:
    return (clock.now_ns() - NS_PER_S) / NS_PER_S / 60


# ── waiting in place ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("package", PACKAGES)
def test_waiting_changes_nothing_of_the_training(tmp_path, clock, package):
    """An hour is waited through in mid-epoch, and data, weights, optimizer, schedule and random numbers end as they would have."""
    expected = uninterrupted(tmp_path, package=package)
    pause = pausing(tmp_path, clock)
    seed(1)
    fit = Fit(tmp_path, pause, clock=clock, package=package).run()
    (made,) = pause.pauses
    assert 9 <= (made.stop_unix_ns - EPOCH_NS) / 60e9 <= 13  # when the next step ends, and the plan knew
    assert (made.resume_unix_ns - EPOCH_NS) / 60e9 == pytest.approx(70, abs=1.5)
    assert minutes(clock) == pytest.approx(40 + 59, abs=3)
    assert same((fit.seen, fit.state()), expected)
    assert not (tmp_path / "green_pause.ckpt").exists()


def test_a_paused_hour_is_metered_as_paused(tmp_path):
    """With a GreenMonitor, the wait's joules are in phase "paused", the checkpoint's in "save", and the steps keep theirs; bit by bit the run adds up."""
    bench = Bench(tmp_path)
    pause = pausing(tmp_path, bench.clock)
    monitor = bench.monitor(poll_interval_s=30.0, intensity=100.0, log_every_n_steps=1)
    seed(1)
    Fit(tmp_path, monitor, pause, clock=bench.clock).run()
    totals = monitor.summary().totals
    paused = totals.phase("paused")
    assert paused.duration_s == pytest.approx(sum((p.resume_unix_ns - p.stop_unix_ns) for p in pause.pauses) / 1e9, rel=1e-3)
    assert paused.duration_s > 3000
    assert paused.energy_j == pytest.approx(POWER_W * paused.duration_s, rel=0.02)
    assert totals.phase("train").duration_s == pytest.approx(39 * STEP_S + STEP_S, rel=0.01)
    assert totals.phase("train").n_steps == N_EPOCHS * N_BATCHES
    assert sum(phase.energy_j for phase in totals.phases) == pytest.approx(totals.energy_j)


def test_what_is_not_worth_it_is_run_through(tmp_path, clock):
    """A grid that is hardly dirtier, a wait that costs more than it saves, a deadline without slack: no pause."""
    for options in (
        {"provider": trace_of(tmp_path, clock, high=103)},
        {"idle_share": 0.95},
        {"resume_overhead": 3600 * 2},
        {"deadline": 41 * 60, "max_wait": None},
        {"max_wait": 5},
        {"min_saving": 0.9},
    ):
        fresh = ScriptedClock(epoch_unix_ns=EPOCH_NS)
        pause = pausing(tmp_path, fresh, **options)
        Fit(tmp_path, pause, clock=fresh).run()
        assert pause.pauses == (), options
        assert minutes(fresh) == pytest.approx(40)


def test_the_deadline_wins(tmp_path, clock):
    """With half an hour of slack in an hour that is dirty, the fit is done in time; a deadline that has passed means running on."""
    pause = pausing(tmp_path, clock, deadline=datetime.fromtimestamp(EPOCH_NS / 1e9 + 70 * 60, UTC), max_wait=None)
    Fit(tmp_path, pause, clock=clock).run()
    assert minutes(clock) <= 70
    late = ScriptedClock(epoch_unix_ns=EPOCH_NS)
    pause = pausing(tmp_path, late, deadline=datetime.fromtimestamp(EPOCH_NS / 1e9 - 60, UTC), max_wait=None)
    Fit(tmp_path, pause, clock=late).run()
    assert minutes(late) == pytest.approx(40)


def test_pauses_together_are_no_longer_than_allowed(tmp_path, clock):
    """20 minutes may be waited: however often the grid is dirty, the fit takes 60 at most."""
    pause = pausing(tmp_path, clock, max_wait=20 * 60, provider=trace_of(tmp_path, clock, dirty=(10, 25)))
    Fit(tmp_path, pause, clock=clock).run()
    assert pause.pauses
    assert minutes(clock) <= 60.1


class Down:
    """A grid that can't be asked."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def forecast(self, start_ns, end_ns):
        raise self.error


@pytest.mark.parametrize("error", [IntensityError("the provider is down"), RuntimeError("a bug of somebody's")])
def test_a_provider_that_fails_means_running_on(tmp_path, clock, error):
    """One warning, and no pause."""
    pause = pausing(tmp_path, clock, provider=Down(error))
    with pytest.warns(GreenTorchWarning, match=str(error)):
        Fit(tmp_path, pause, clock=clock).run()
    assert minutes(clock) == pytest.approx(40)


def test_nan_means_running_on(tmp_path, clock):
    """A forecast with NaN is no forecast, though the present may be known."""

    class Broken:
        def at(self, time_ns):
            return IntensityPoint(100.0, "XX", "x", time_unix_ns=time_ns)

        def forecast(self, start_ns, end_ns):
            return tuple(IntensityPoint(float("nan"), "XX", "x", time_unix_ns=start_ns + k * 3600 * NS_PER_S) for k in range(5))

    with pytest.warns(GreenTorchWarning, match="nan"):
        Fit(tmp_path, pausing(tmp_path, clock, provider=Broken()), clock=clock).run()
    assert minutes(clock) == pytest.approx(40)


def test_a_fit_without_an_end_is_not_paused(tmp_path, clock):
    """Nobody knows what is left, so the deadline could not be kept."""
    pause = pausing(tmp_path, clock)

    def stop(step: int) -> None:
        fit.trainer.should_stop = step >= 60

    fit = Fit(tmp_path, pause, clock=clock, max_epochs=-1, act=stop)
    fit.run()
    assert pause.pauses == ()
    assert minutes(clock) == pytest.approx(61)


def test_a_stop_ends_the_wait(tmp_path, clock):
    """trainer.should_stop, set while waiting, ends the wait within a second."""
    pause = pausing(tmp_path, clock)
    fit = Fit(tmp_path, pause, clock=clock)

    def stop() -> None:
        if minutes(clock) > 30:
            fit.trainer.should_stop = True

    clock.every(60.0, stop, "user")
    fit.run()
    assert minutes(clock) == pytest.approx(31, abs=2)


def test_a_signal_during_the_checkpoint_means_no_wait(tmp_path, clock):
    """SIGTERM while the checkpoint is written: it is whole, and the fit ends as Lightning ends it, without waiting."""
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    class Struck(TorchCheckpointIO):
        def save_checkpoint(self, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            super().save_checkpoint(*args, **kwargs)

    pause = pausing(tmp_path, clock)
    fit = Fit(tmp_path, pause, clock=clock, plugins=[Struck()])
    with pytest.raises(BaseException, match=r"^$|SIGTERM"):
        fit.run()
    assert minutes(clock) < 20
    saved = torch.load(tmp_path / "green_pause.ckpt", weights_only=False)
    assert saved["global_step"] == len(fit.seen)


def test_a_disk_that_is_full_means_running_on(tmp_path, clock):
    """No checkpoint, no pause: a warning, and every step."""
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    class Full(TorchCheckpointIO):
        def save_checkpoint(self, *args, **kwargs):
            raise OSError(28, "No space left on device")

    with pytest.warns(GreenTorchWarning, match="No space left"):
        fit = Fit(tmp_path, pausing(tmp_path, clock), clock=clock, plugins=[Full()]).run()
    assert minutes(clock) == pytest.approx(40)
    assert len(fit.seen) == 40


def test_two_pauses_at_once_are_refused(tmp_path, clock):
    """Two callbacks in a trainer (by Lightning itself), and a pause within a pause."""
    with pytest.raises(RuntimeError, match=r"more than one .*CarbonAwarePause"):
        Fit(tmp_path, pausing(tmp_path, clock), pausing(tmp_path, clock), clock=clock).run()
    pauses = Pauses(trace_of(tmp_path, clock), max_wait=7200, check_every=120, resume_overhead=30, clock=clock)
    pauses.open()
    found = None
    for left in range(40, 0, -1):
        clock.advance(STEP_S)
        found = found or pauses.boundary(left)

    def again() -> bool:
        with pytest.raises(ArgumentError, match="in a pause already"):
            pauses.wait(found, lambda: True)
        return True

    assert found is not None
    pauses.wait(found, again)


def test_a_clock_that_jumps_ahead_ends_the_wait(tmp_path, clock):
    """A machine that slept through the pause goes on at once."""
    pause = pausing(tmp_path, clock)
    fit = Fit(tmp_path, pause, clock=clock)
    jumped = []

    def jump() -> None:
        if minutes(clock) > 20 and not jumped:
            jumped.append(len(fit.seen))
            clock.epoch_unix_ns += 5 * 3600 * NS_PER_S

    clock.every(60.0, jump, "somebody")
    fit.run()
    assert len(pause.pauses) == 1
    assert minutes(clock) < 60
    assert len(fit.seen) == 40


# ── leaving ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def left(tmp_path, clock, dirty=DIRTY, **options) -> Fit:
    """A fit that leaves with 75."""
    pause = pausing(tmp_path, clock, dirty, on_pause="exit", provider=options.pop("provider", None))
    fit = Fit(tmp_path, pause, clock=clock, **options)
    with pytest.raises(SystemExit) as leaving:
        fit.run()
    assert leaving.value.code == REQUEUE
    return fit


@pytest.mark.parametrize("package", PACKAGES)
def test_leaving_between_epochs_and_coming_again(tmp_path, clock, package):
    """Without a stateful loader it leaves where the next epoch begins; started again, it ends where an uninterrupted fit does."""
    expected = uninterrupted(tmp_path, package=package)
    seed(1)
    first = left(tmp_path, clock, package=package)
    assert len(first.seen) % N_BATCHES == 0
    assert 0 < len(first.seen) < 40
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()
    assert datetime.fromisoformat((tmp_path / RESUME_FILE).read_text().strip())
    clock.advance(2 * 3600)
    seed(2)
    second = Fit(tmp_path, pausing(tmp_path, clock, on_pause="exit"), clock=clock, package=package).run(ckpt_path="hpc")
    assert same((first.seen + second.seen, second.state()), expected)
    assert not list(tmp_path.glob("hpc_ckpt_*"))
    assert not (tmp_path / RESUME_FILE).exists()


def test_leaving_within_an_epoch_with_a_stateful_loader(tmp_path, clock):
    """It leaves at the step, and comes again at the next batch, bit for bit."""
    expected = uninterrupted(tmp_path, loader=Kept())
    seed(1)
    first = left(tmp_path, clock, dirty=(15, 70), loader=Kept())
    assert len(first.seen) % N_BATCHES != 0
    clock.advance(2 * 3600)
    seed(2)
    second = Fit(tmp_path, pausing(tmp_path, clock, (15, 70), on_pause="exit"), clock=clock, loader=Kept()).run(ckpt_path="hpc")
    assert len(first.seen) + len(second.seen) == 40
    assert same((first.seen + second.seen, second.state()), expected)


def in_slurm(monkeypatch) -> None:
    """The environment of a job of one task."""
    for name, value in {
        "NTASKS": "1",
        "JOB_ID": "7",
        "JOB_NAME": "train",
        "PROCID": "0",
        "LOCALID": "0",
        "NODEID": "0",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_slurm_finds_the_checkpoint_by_itself(tmp_path, clock, monkeypatch):
    """In a Slurm job Lightning takes it up without being told."""
    left(tmp_path, clock)
    in_slurm(monkeypatch)
    clock.advance(2 * 3600)
    second = Fit(tmp_path, clock=clock).run()
    assert len(second.seen) < 40


def requeued(directory) -> bool:
    """Whether the one run on disk counts as queued again: not ended, nothing lost, nothing wasted."""
    (run,) = ledger.read(directory).runs
    return run.status == "requeued" and not (run.finished or run.lost) and not run.wasted.energy_j and run.n_steps > 0


def test_a_fit_that_leaves_is_not_wasted(tmp_path):
    """Its run ends as "requeued" and counts as useful; taken up from the checkpoint it is one run of two segments, completed."""
    bench = Bench(tmp_path)
    options = {"poll_interval_s": 30.0}
    with pytest.raises(SystemExit):
        Fit(tmp_path, bench.monitor(**options), pausing(tmp_path, bench.clock, on_pause="exit"), clock=bench.clock).run()
    assert requeued(tmp_path)
    bench.clock.advance(2 * 3600)
    again = pausing(tmp_path, bench.clock, on_pause="exit", provider=Trace(tmp_path / "grid.csv"))
    Fit(tmp_path, bench.monitor(**options), again, clock=bench.clock).run(ckpt_path="hpc")
    (run,) = ledger.read(tmp_path).runs
    assert [str(one.status) for one in run.segments] == ["requeued", "completed"]
    assert (str(run.status), run.n_steps) == ("completed", N_EPOCHS * N_BATCHES)
    assert run.redone.energy_j is None


# ── arguments ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_wait": None}, "how long may it take"),
        ({"max_wait": -1}, "max_wait=-1"),
        ({"deadline": datetime(2030, 1, 1)}, "with its offset"),  # noqa: DTZ001
        ({"deadline": float("nan")}, "deadline=nan"),
        ({"on_pause": "stop"}, "on_pause='stop'"),
        ({"min_saving": 5}, "min_saving=5"),
        ({"idle_share": -0.1}, "idle_share=-0.1"),
        ({"check_every": 0}, "check_every=0"),
        ({"provider": ConstantIntensity(IntensityPoint(1.0, "FR", "x"))}, "neither a forecast nor a history"),
        ({"provider": object()}, "nothing tells when to go on"),
        ({"provider": Present(None), "on_pause": "exit"}, "nobody looks at the grid while a run is away"),
    ],
)
def test_wrong_arguments_raise_at_construction(tmp_path, clock, change, says):
    """Before any training."""
    with pytest.raises(ArgumentError, match=says):
        pausing(tmp_path, clock, **change)


# ── plain loops ────────────────────────────────────────────────────────────────────────────────────────────────────────


def loop(tmp_path, clock, *, steps=40, **how):
    """A loop of minutes; returns its tracker and how long it paused."""
    meter = ScriptedMeter(clock, {"gpu0": POWER_W}, interval_s=10.0)
    how = {"max_wait": 7200, "check_every": 120, "resume_overhead": 30, **how}
    paused = 0.0
    with track(
        log_dir=tmp_path, clock=clock, meters=[meter], intensity=trace_of(tmp_path, clock), planned_steps=steps
    ) as tracker:
        for _ in range(steps):
            clock.advance(STEP_S)
            tracker.step()
            paused += tracker.pause_if_dirty(**how)
    return tracker, paused


def test_a_plain_loop_pauses(tmp_path, clock):
    """tracker.pause_if_dirty() waits through the dirty hour by the run's own provider, saves first, and the wait is phase "paused"."""
    saved: list[float] = []
    tracker, paused = loop(tmp_path, clock, save=lambda: saved.append(minutes(clock)))
    assert paused == pytest.approx(3540, abs=120)
    assert len(saved) == 1
    totals = tracker.summary().totals
    assert totals.phase("paused").duration_s == pytest.approx(paused)
    assert totals.phase("paused").energy_j == pytest.approx(POWER_W * paused, rel=0.01)
    assert totals.phase("train").n_steps == 40
    assert totals.phase("train").energy_j == pytest.approx(POWER_W * 2400, rel=0.01)


def test_a_plain_loop_goes_on_where_nothing_can_be_saved(tmp_path, clock):
    """A full disk means no pause, with a warning; Ctrl-C while saving ends the loop as it would anywhere, without a wait."""

    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.warns(GreenTorchWarning, match="No space left"):
        tracker, paused = loop(tmp_path / "full", clock, on_pause="exit", save=full)
    assert (paused, tracker.summary().status) == (0, "completed")
    assert tracker.summary().totals.phase("train").n_steps == 40

    def struck() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    again = ScriptedClock(epoch_unix_ns=EPOCH_NS)
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path / "struck", again, save=struck)
    assert minutes(again) < 20


def test_the_present_is_the_later_of_two_clocks(monkeypatch):
    """The system's where it was set forward or the machine slept; the run's own where the system's was set back."""
    clock = HostClock()
    own_ns = clock.epoch_unix_ns + clock.now_ns()
    for shift_s, expected_s in ((-7200, 0), (7200, 7200)):
        monkeypatch.setattr(time, "time_ns", lambda shift_s=shift_s: own_ns + shift_s * NS_PER_S)
        assert (present(clock) - own_ns) / NS_PER_S == pytest.approx(expected_s, abs=5)


def test_a_plain_loop_leaves(tmp_path, clock):
    """With on_pause="exit" it saves, says when it wants to go on, and raises SystemExit(75); what was measured is on disk."""
    saved: list[float] = []
    with pytest.raises(SystemExit) as leaving:
        loop(tmp_path, clock, on_pause="exit", save=lambda: saved.append(minutes(clock)))
    assert leaving.value.code == REQUEUE
    (at,) = saved
    assert 9 <= at <= 13
    assert requeued(tmp_path)
    told = datetime.fromisoformat((tmp_path / RESUME_FILE).read_text().strip()).astimezone().timestamp()
    assert (told - EPOCH_NS / 1e9) / 60 == pytest.approx(70, abs=2)


def test_a_pause_tells_what_it_saved(tmp_path, clock):
    """Planned and realised are against running on, by the same provider and the same sum: an hour at 500 g/kWh left out, 0.2 of it idled."""
    tracker, _ = loop(tmp_path, clock)
    (told,) = tracker.manifest.deferrals
    assert (told.method, told.kind, told.region) == ("forecast", "unknown, average", "grid")
    assert (told.idle_share, told.idle_basis, told.unknown) == (0.2, "assumed", "")
    begin, stop, resume, until = (
        (at - EPOCH_NS - NS_PER_S) / 60e9
        for at in (told.baseline_unix_ns, told.stop_unix_ns, told.resume_unix_ns, told.realised_until_unix_ns)
    )
    worked = (stop - begin) + (until - resume) - 0.5  # half a minute of it to resume
    dirty = max(0.0, stop - max(begin, DIRTY[0]))
    at_work = 100 * (stop - begin - dirty + until - resume) + 500 * dirty
    idled = 500 * (DIRTY[1] - stop) + 100 * (resume - DIRTY[1])
    share = told.realised_idle_share
    assert share == pytest.approx(1.0, abs=0.01)  # the meter's power is the same in a pause, as the run has metered by then
    assert told.realised_work_s / 60 == pytest.approx(worked, abs=1e-3)
    assert told.realised_g_per_kwh == pytest.approx((at_work + share * idled) / worked, rel=1e-3)
    clean = max(0.0, min(DIRTY[0] - begin, worked))
    assert told.realised_baseline_g_per_kwh == pytest.approx((100 * clean + 500 * (worked - clean)) / worked, rel=1e-3)
    assert told.planned_saving > 0.4
    assert told.realised_saving < told.planned_saving  # it idles at five times the draw that was assumed
    assert "against running on without a pause" in str(tracker.summary())


def test_a_run_that_comes_again_knows_what_leaving_saved(tmp_path, clock):
    """Left for an hour at 500 g/kWh: the next start takes the pause up from the files, with the time at which it really went on."""
    state: dict = {}
    with pytest.raises(SystemExit):
        loop(tmp_path, clock, on_pause="exit", save=lambda: state.update(step=0))
    (left_then,) = ledger.read(tmp_path).runs[0].deferrals
    assert left_then.planned_saving > 0.5
    clock.advance(2 * 3600)
    meter = ScriptedMeter(clock, {"gpu0": POWER_W}, interval_s=10.0)
    run = ledger.read(tmp_path).runs[0]
    with track(log_dir=tmp_path, clock=clock, meters=[meter], intensity=Trace(tmp_path / "grid.csv")) as tracker:
        tracker.load_state_dict({"run_id": run.run_id, "segment": 1, "step": run.segments[0].last_step})
        for _ in range(25):
            clock.advance(STEP_S)
            tracker.step()
    (told,) = ledger.read(tmp_path).runs[0].deferrals
    assert told == tracker.manifest.deferrals[0]
    assert (told.resume_unix_ns - left_then.stop_unix_ns) / 60e9 == pytest.approx(120, abs=0.1)
    assert told.realised_g_per_kwh == pytest.approx(100, rel=0.2)
    assert told.realised_saving == pytest.approx(told.planned_saving, abs=0.1)


def test_figures_of_another_grid_tell_nothing(tmp_path, clock):
    """A run that goes on by another provider says that the saving is not known, and why."""
    with pytest.raises(SystemExit):
        loop(tmp_path, clock, on_pause="exit", save=lambda: None)
    run = ledger.read(tmp_path).runs[0]
    clock.advance(2 * 3600)
    with track(log_dir=tmp_path, clock=clock, meters=[], intensity=100.0) as tracker:
        tracker.load_state_dict({"run_id": run.run_id, "segment": 1, "step": 9})
        clock.advance(STEP_S)
        tracker.step()
    (told,) = tracker.manifest.deferrals
    assert (told.realised_saving, told.realised_g_per_kwh) == (None, None)
    assert "given by the user" in told.unknown
    assert "saved not known (the figures since then are of" in str(tracker.summary())


def threshold_loop(tmp_path, clock, act=lambda _provider: None, **how):
    """A loop of 80 minutes on such a grid, dirty from 30 to 70."""
    provider = Present(trace_of(tmp_path, clock, dirty=(30, 70)))
    meter = ScriptedMeter(clock, {"gpu0": POWER_W}, interval_s=10.0)
    how = {"max_wait": 7200, "check_every": 120, "resume_overhead": 10, **how}
    with track(clock=clock, meters=[meter], intensity=provider, planned_steps=80) as tracker:
        clock.every(300.0, lambda: act(provider), "user")
        for _ in range(80):
            clock.advance(STEP_S)
            tracker.step()
            tracker.pause_if_dirty(**how)
    return tracker


def test_where_the_present_alone_is_known_a_threshold_pauses(tmp_path, clock):
    """It works while it has seen nothing dirtier, stops where the grid is dirty, and goes on when it is clean; the saving is known afterwards."""
    tracker = threshold_loop(tmp_path, clock)
    (told,) = tracker.manifest.deferrals
    assert told.method == "online threshold"
    assert told.planned_saving is None
    assert (told.stop_unix_ns - EPOCH_NS) / 60e9 == pytest.approx(31, abs=2.1)
    assert (told.resume_unix_ns - EPOCH_NS) / 60e9 == pytest.approx(70, abs=2.1)
    assert told.realised_baseline_g_per_kwh > 300
    assert told.realised_g_per_kwh == pytest.approx(100 + 500 * 39 / 49, rel=0.1)  # by this meter it idles at full power
    assert "saved" in str(tracker.summary())


def test_a_threshold_pause_ends_by_the_deadline_and_where_nobody_answers(tmp_path, clock):
    """Twenty minutes of slack are not exceeded; a grid that falls silent is not waited for."""
    threshold_loop(tmp_path, clock, max_wait=20 * 60)
    assert minutes(clock) <= 100.1
    silent = ScriptedClock(epoch_unix_ns=EPOCH_NS)

    def fall_silent(provider: Present) -> None:
        provider.up = minutes(silent) < 40

    threshold_loop(tmp_path, silent, fall_silent)
    assert minutes(silent) == pytest.approx(80 + 10, abs=4)


def test_a_metered_idle_draw_replaces_the_assumed_one(tmp_path, clock):
    """The first pause assumes a fifth of the draw at work and says so; the second takes the 40 % that the first was metered at."""
    start = datetime.fromtimestamp((EPOCH_NS + NS_PER_S) / 1e9, UTC)
    path = tmp_path / "grid.csv"
    dirty = (*range(20, 50), *range(70, 110))
    rows = (f"{(start + timedelta(minutes=at)).isoformat()},{500 if at in dirty else 100}" for at in range(0, 600, 5))
    path.write_text("\n".join(["time,g_per_kwh", *rows]) + "\n")
    account = Account(clock, lambda: idle_share((6000.0 * len(told), 60.0), (2400.0 * len(told), 60.0)), lambda _all: None)
    told: list[Pause] = []
    pauses = Pauses(Trace(path), max_wait=7200, check_every=120, resume_overhead=30, clock=clock)
    pauses.open(account=account)
    for left in range(60, 0, -1):
        clock.advance(STEP_S)
        pause = pauses.boundary(left)
        if pause is not None:
            pauses.wait(pause, lambda: False)
            told.append(pause)
    first, second = (one.deferral for one in told)
    assert (first.idle_share, first.idle_basis) == (0.2, "assumed")
    assert (second.idle_share, second.idle_basis) == (pytest.approx(0.4), "metered")
    assert "idle draw 20% of that at work, assumed" in described(told[0])
    assert idle_share((100.0, 1.0), (None, 100.0)) is None
    assert idle_share((100.0, 1.0), (10.0, 1.0)) is None  # too short to tell


def test_a_plain_loop_names_wrong_arguments(tmp_path, clock):
    """At the first call: no limit, an unknown word, leaving without a way to save, a provider that looks nowhere."""
    for how, says in (
        ({"max_wait": None}, "how long may it take"),
        ({"on_pause": "exit"}, "needs save="),
        ({"wait_max": 3}, "wait_max"),
        ({"provider": ConstantIntensity(IntensityPoint(1.0, "FR", "x"))}, "neither"),
    ):
        with pytest.raises(ArgumentError, match=says):
            loop(tmp_path, ScriptedClock(epoch_unix_ns=EPOCH_NS), **how)


def test_a_tracker_that_is_off_never_pauses():
    """Nor does one outside its context."""
    with track(enabled=False) as tracker:
        assert tracker.pause_if_dirty(max_wait=10) == 0


# ── Slurm ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

EXAMPLES = Path(__file__).parent.parent / "examples" / "slurm"


def job(tmp_path, *command: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The example's script without Slurm; a stand-in ``sbatch`` writes its arguments down."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    stand_in = tmp_path / "bin" / "sbatch"
    stand_in.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" "requeues=$GREEN_REQUEUES" > {tmp_path}/asked\n')
    stand_in.chmod(0o755)
    (tmp_path / "asked").unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "GREEN_LAUNCH": "",
        "GREEN_ROOT": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    ran = subprocess.run(
        ["bash", str(EXAMPLES / "train.sh"), *command],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    asked = tmp_path / "asked"
    return ran, asked.read_text().splitlines() if asked.exists() else []


@pytest.mark.filterwarnings("ignore::green_torch.errors.GreenTorchWarning")  # what this machine can't meter
def test_the_slurm_script_queues_itself_again(tmp_path, monkeypatch, capsys):
    """The example's fit leaves with 75, and with what it left behind sbatch gets --begin, the script and its arguments; in the clean hours it goes on and is done."""
    path = tmp_path / "grid.csv"
    rows = (
        f"{(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=at)).isoformat()},{500 if at < 600 else 100}"
        for at in range(0, 90000, 300)
    )
    path.write_text("\n".join(["time,g_per_kwh", *rows]) + "\n")
    options = {"root": tmp_path, "trace": path, "epochs": 20, "step-s": 0.01, "check-every-s": 0.1, "resume-overhead-s": 0.01}
    arguments = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")
    assert leaving.value.code == REQUEUE
    kept = (tmp_path / RESUME_FILE).rename(tmp_path / "kept")
    command = ["bash", "-c", f"cp {kept} {tmp_path / RESUME_FILE}; exit {REQUEUE}", "train.py", *arguments]
    ran, asked = job(tmp_path, *command)
    assert ran.returncode == 0, ran.stderr
    assert "going on at" in ran.stderr
    begin = datetime.fromisoformat(asked[0].removeprefix("--begin=")).astimezone()
    assert -60 < (begin - datetime.now(UTC)).total_seconds() < 660
    assert asked[1:] == ["--export=ALL", str(EXAMPLES / "train.sh"), *command, "requeues=1"]
    (tmp_path / "started").write_text((datetime.now(UTC) - timedelta(seconds=700)).isoformat())
    in_slurm(monkeypatch)
    runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")
    assert "done: 80 steps" in capsys.readouterr().out
    assert not list(tmp_path.glob("hpc_ckpt_*"))


@pytest.mark.parametrize("code", [0, 1, 75, 143])
def test_the_slurm_script_passes_exit_codes_on(tmp_path, code):
    """Where nothing asked to be queued again, whatever the code."""
    ran, asked = job(tmp_path, "bash", "-c", f"exit {code}")
    assert (ran.returncode, asked) == (code, [])


def test_the_slurm_script_has_a_bound(tmp_path):
    """A job that was queued again twenty times is not once more."""
    leave = f"echo 2026-01-01T00:00 > {tmp_path}/{RESUME_FILE}; exit 75"
    assert job(tmp_path, "bash", "-c", leave)[1][0] == "--begin=2026-01-01T00:00"
    ran, asked = job(tmp_path, "bash", "-c", leave, GREEN_REQUEUES="20")
    assert (ran.returncode, asked) == (75, [])


# ── several ranks ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two real processes with a process group came to, by tests/pause_ranks.py."""
    directory = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    places = [
        {"RANK": str(k), "LOCAL_RANK": str(k), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", **meet}
        for k in range(2)
    ]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.pause_ranks", str(directory)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **place},
            cwd=EXAMPLES.parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for place in places
    ]
    said = [one.communicate(timeout=240)[0] for one in started]
    assert [one.returncode for one in started] == [0, 0], "\n".join(said)[-5000:]
    return [json.loads((directory / f"rank-{k}.json").read_text()) for k in range(2)]


def test_ranks_pause_together(ranks):
    """Two ranks by DDP wait at the same step until the same time, and end with all that a fit has that was not paused."""
    one, other = ranks
    assert one["waits"] == other["waits"]
    ((stop_ns, resume_ns),) = one["waits"]
    assert (resume_ns - stop_ns) / 60e9 == pytest.approx(58, abs=3)
    assert all(told["waited"] == told["whole"] for told in ranks)
    assert one["whole"]["random"] != other["whole"]["random"]  # each has its own
    assert one["whole"]["weights"] == other["whole"]["weights"]


def test_ranks_leave_together_and_come_again(ranks):
    """Both leave with 75 at the same step; from the checkpoint, each with its own random numbers, they end as a fit that never left."""
    one, other = ranks
    assert 0 < one["left_after"] == other["left_after"] < len(one["whole"]["seen"])
    assert all(told["came_again"] == told["whole"] for told in ranks)


def test_plain_ranks_pause_together(ranks):
    """Two processes with a process group and tracker.pause_if_dirty() wait together."""
    one, other = ranks
    assert one["loop_paused_s"] == other["loop_paused_s"] == pytest.approx(58 * 60, abs=180)
