"""Nothing of ours may end, block or corrupt a run: broken providers, sinks, meters, arguments and interruptions."""

from __future__ import annotations

import os
import threading
import time
import warnings

import pytest

import green_torch
from green_torch.errors import GreenTorchWarning
from green_torch.records import Domain, IntensityPoint, Method, Phase, Reading
from green_torch.testing import MemorySink, ScriptedClock, ScriptedMeter
from tests.processes import CtrlC


def scene(power_w=100.0, **options):
    """A scripted clock, meter, sink and tracker."""
    clock = ScriptedClock()
    meter = ScriptedMeter(clock, {"gpu0": power_w}, period_s=0.02)
    sink = MemorySink()
    options = {"intensity": 100.0, "log_every_n_steps": 1, **options}
    return clock, meter, sink, green_torch.track(clock=clock, meters=[meter], sinks=[sink], **options)


class Answers:
    """A provider that answers the first time as it should and then with whatever it is given."""

    def __init__(self, answer) -> None:
        self.answer = answer
        self.asked = 0

    def at(self, time_unix_ns):
        self.asked += 1
        return IntensityPoint(50.0, "FR", "a test") if self.asked == 1 else self.answer


@pytest.mark.parametrize("answer", [55.0, None, IntensityPoint(None, "FR", "x"), IntensityPoint(float("nan"), "FR", "x"), "55"])
def test_a_provider_that_answers_nonsense_costs_a_flag(answer):
    """The last good figure stands in; every record is made, and the totals stay finite."""
    clock, _, sink, tracker = scene(intensity=Answers(answer))
    with pytest.warns(GreenTorchWarning, match="no IntensityPoint|grid intensity can't be had"), tracker:
        for _ in range(6):
            clock.advance(0.5)
            tracker.step()
    assert len(sink.records) >= 6
    assert sink.records[4].intensity_g_per_kwh == 50.0
    assert "intensity_fallback" in sink.records[4].flags
    assert sink.summary.totals.emissions_g > 0
    assert sink.closed


def test_warnings_that_vary_are_said_once():
    """A provider whose error text changes every time warns once, and the summary keeps one."""

    class Varies:
        asked = 0

        def at(self, time_unix_ns):
            self.asked += 1
            raise OSError(f"<connection at {self.asked:#x}>")

    clock, _, sink, tracker = scene(intensity=Varies())
    with warnings.catch_warnings(record=True) as said, tracker:
        warnings.simplefilter("always")
        for k in range(50):
            clock.advance(0.5)
            tracker.step(tokens=-k, flops=-float(k))
    assert len([one for one in said if one.category is GreenTorchWarning]) == 3
    assert len(sink.summary.warnings) == 3
    assert sink.records[5].emissions_g is None


class Meter:
    """A real-time meter of 100 W."""

    domains = (Domain("gpu0", Method.COUNTER, "x", "y", power_limit_w=700.0),)
    interval_s = None

    def read(self):
        now_ns = time.monotonic_ns()
        return Reading(now_ns, now_ns, {"gpu0": now_ns / 1e7})

    def close(self) -> None:
        """Nothing to do."""


def test_a_sink_that_hangs_harms_no_other(tmp_path):
    """JSONL is whole, a slow sink still gets its summary, summary() answers, and leaving takes seconds, not the hung sink's own time."""
    release = threading.Event()

    class Hangs(MemorySink):
        def write(self, item) -> None:
            release.wait(60)

    class Slow(MemorySink):
        def write(self, item) -> None:
            super().write(item)
            time.sleep(0.07)

    slow = Slow()
    try:
        with pytest.warns(GreenTorchWarning, match="Hangs is still busy") as said:
            with green_torch.track(
                log_dir=tmp_path, meters=[Meter()], sinks=[Hangs(), slow], intensity=1, log_every_n_steps=1
            ) as tracker:
                for _ in range(40):
                    tracker.step()
                tracker.flush(0.2)
                asked = time.monotonic()
                assert tracker.summary().totals.phase("train").n_steps > 0
                assert time.monotonic() - asked < 1
                left = time.monotonic()
            assert time.monotonic() - left < 5
    finally:
        release.set()
    from green_torch.sinks.jsonl import read_jsonl

    run = read_jsonl(next((tmp_path / "green").glob("*.jsonl")))
    assert run.summary.totals.phase("train").n_steps == 40
    assert slow.summary is not None
    assert not any("Slow" in str(one.message) for one in said)
    assert "still busy" in tracker.summary().warnings[-1]


def test_a_provider_that_hangs_blocks_nobody():
    """Neither flush() nor leaving the context waits for the grid's answer beyond their time; the run is closed, and says so."""
    release = threading.Event()

    class Hangs:
        def at(self, time_unix_ns):
            release.wait(60)
            return IntensityPoint(50.0, "FR", "a test")

    sink = MemorySink()
    try:
        with pytest.warns(GreenTorchWarning, match="provider has not answered"):
            with green_torch.track(meters=[Meter()], sinks=[sink], intensity=Hangs(), log_every_n_steps=1) as tracker:
                for _ in range(3):
                    tracker.step()
                    asked = time.monotonic()
                    tracker.flush(0.1)
                    assert time.monotonic() - asked < 1.5
                left = time.monotonic()
            assert time.monotonic() - left < 5
        assert sink.summary is not None
    finally:
        release.set()


def test_a_warning_that_is_made_an_error_harms_nothing(recwarn):
    """``-W error``, or a hook of the user's that raises, also on the recorder's thread."""

    def raises(*_args, **_named):
        raise OSError("the user's hook")

    clock, _, sink, tracker = scene()
    with warnings.catch_warnings(), tracker:
        warnings.simplefilter("always")
        warnings.showwarning = raises
        for _ in range(3):
            clock.advance(0.5)
            tracker.step(tokens=-1)
    assert sink.summary.totals.phase("train").n_steps == 3
    assert "tokens=-1" in sink.summary.warnings[0]


def test_a_reading_that_makes_no_sense_is_left_out():
    """One malformed answer neither ends the meter's thread nor passes unseen."""
    clock, meter, sink, tracker = scene()
    honest = meter.read
    with tracker:
        for k in range(30):
            nonsense = Reading(clock.now_ns(), clock.now_ns(), {"gpu0": "?" if k == 10 else float("nan")})
            meter.read = (lambda nonsense=nonsense: nonsense) if k in (10, 11) else honest
            clock.advance(0.2)
            tracker.step()
    assert sink.summary.totals.energy_j == pytest.approx(600.0, rel=0.02)
    assert sink.records[25].energy_j == pytest.approx(20.0, rel=0.05)


@pytest.mark.parametrize(
    "arguments",
    [{"step": "7"}, {"step": float("nan")}, {"flops": "x"}, {"flops": 10**400}, {"tokens": object()}, {"step": 1.5}],
)
def test_wrong_values_in_a_step_end_nothing(arguments, tmp_path):
    """They are left out with one warning, and every sink goes on."""
    clock, _, sink, tracker = scene(log_dir=tmp_path)
    with pytest.warns(GreenTorchWarning, match="is no "), tracker:
        for _ in range(4):
            clock.advance(0.2)
            tracker.step(**arguments)
    assert sink.summary.totals.phase("train").n_steps == 4
    assert not [text for text in sink.summary.warnings if "switched off" in text]


def test_a_tensor_as_a_step_is_its_number(tmp_path):
    """What reads as a whole number is one, also on disk."""
    import torch

    clock, _, sink, tracker = scene(log_dir=tmp_path)
    with tracker:
        for k in range(3):
            clock.advance(0.2)
            tracker.step(step=torch.tensor(10 * k), tokens=torch.tensor(4))
    assert [record.step for record in sink.records if record.phase is Phase.TRAIN] == [0, 10, 20]
    assert sink.summary.warnings == ()


def test_many_phases_in_one_step_lose_nothing():
    """A loop that never ends a step (inference, say) keeps every joule, however many phases it opens."""
    clock, _, sink, tracker = scene()
    with tracker:
        for _ in range(300):
            clock.advance(0.5)
            with tracker.phase("eval"):
                clock.advance(0.5)
    totals = sink.summary.totals
    assert totals.energy_j == pytest.approx(30_000.0, rel=0.01)
    assert totals.phase("eval").energy_j == pytest.approx(15_000.0, rel=0.01)
    assert totals.energy_lo_j <= 30_000.0 <= totals.energy_hi_j


def test_memory_is_bounded_in_a_long_phase():
    """Readings are let go while a phase goes on, and the phase's joules are right all the same."""
    clock, _, sink, tracker = scene(poll_interval_s=0.02)
    with tracker:
        clock.advance(1.0)
        tracker.step()
        with tracker.phase("paused"):
            clock.advance(300.0)
            assert tracker._sampler.timelines["gpu0"].knots < 500
        clock.advance(1.0)
        tracker.step()
    assert sink.summary.totals.phase("paused").energy_j == pytest.approx(30_000.0, rel=0.001)
    assert sink.summary.totals.phase("train").energy_j == pytest.approx(200.0, rel=0.05)


def test_the_queue_is_bounded_when_nothing_is_resolved():
    """Steps and phases that alternate behind a resolver that is stuck are merged, and none is lost."""
    clock, _, sink, tracker = scene()
    with tracker, tracker._recorder._work:
        for _ in range(6000):
            clock.advance(0.001)
            tracker.step(tokens=1)
            with tracker.phase("eval"):
                clock.advance(0.001)
        assert tracker._recorder.pending < 5000
    assert sink.summary.totals.phase("train").tokens == 6000
    assert sink.summary.totals.energy_j == pytest.approx(1200.0, rel=0.02)


def test_projections_leave_the_counted_step_out(tmp_path):
    """A first step that took twenty times as long, since FLOPs were counted in it, changes neither projection nor baseline."""
    import torch

    def run(**options):
        model = torch.nn.Linear(8, 8)
        clock, _, sink, tracker = scene(**options)
        tracker._model = model
        with tracker:
            for k in range(10):
                model(torch.ones(2, 8)).sum().backward()
                clock.advance(20.0 if k == 0 else 1.0)
                tracker.step(tokens=100)
        return sink.summary

    base = run(log_dir=tmp_path / "base", peak_flop_per_s=1e9)
    again = run(baseline=tmp_path / "base", planned_steps=1000, peak_flop_per_s=1e9)
    assert base.n_steps_excluded == 1
    assert again.projected_savings_g == pytest.approx(0.0, abs=0.02 * 100_000 / 3.6e6 * 100)
    assert again.projected_total_g == pytest.approx((2900 + 990 * 100) / 3.6e6 * 100, rel=0.01)


def test_the_writer_always_takes_a_call(tmp_path, monkeypatch):
    """With a log_dir, tracker.writer.add_scalar works on every rank and when nothing is measured."""
    monkeypatch.setenv("RANK", "1")
    _, _, _, tracker = scene(log_dir=tmp_path / "a")
    with tracker:
        tracker.writer.add_scalar("loss", 1.0, 0)
    assert not list((tmp_path / "a").rglob("events*"))
    with green_torch.track(log_dir=tmp_path / "b", enabled=False) as off:
        off.writer.add_scalar("loss", 1.0, 0)
    assert green_torch.track(enabled=False).writer is None


def test_given_flops_say_nothing_of_the_hardware():
    """Model FLOPs from the user give MFU; HFU is not known by them."""
    clock, _, sink, tracker = scene(flops_per_step=1e6, peak_flop_per_s=1e9)
    with tracker:
        for _ in range(3):
            clock.advance(0.1)
            tracker.step()
    assert sink.records[1].mfu == pytest.approx(0.01)
    assert sink.records[1].hfu is None
    assert "HFU unknown" in str(sink.summary)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_may_track_for_itself():
    """A tracker open in the parent is none of the child's."""
    _, _, _, outer = scene()
    with outer:
        child = os.fork()
        if child == 0:
            try:
                with scene()[3]:
                    pass
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_leaves_the_run_to_its_parent(tmp_path):
    """Forked while another thread holds the journal: the child's steps and its way out of the context hang on nothing, and write nothing."""
    with green_torch.track(log_dir=tmp_path, meters=[Meter()], intensity=1, log_every_n_steps=1) as tracker:
        tracker.step()
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            with tracker._journal._reading:
                held.set()
                release.wait(60)

        threading.Thread(target=hold, daemon=True).start()
        held.wait()
        child = os.fork()
        if child == 0:
            for _ in range(2000):
                tracker.step()
            with tracker.phase("eval"):
                tracker.flush()
            code = 0 if tracker.state_dict() == {} and tracker.summary().status == "disabled" else 1
            tracker.__exit__(None, None, None)
            os._exit(code)
        release.set()
        for _ in range(500):
            ended, code = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            time.sleep(0.02)
        else:
            os.kill(child, 9)
        assert ended
        assert code == 0
    assert tracker.summary().totals.phase("train").n_steps == 1
    assert next((tmp_path / "green").glob("*.jsonl")).read_text().count('"type":"summary"') == 1


def in_tick(frame) -> bool:
    """Whether the recorder's tick is on the stack."""
    while frame is not None and not (frame.f_code.co_name == "tick" and frame.f_code.co_filename.endswith("tracker.py")):
        frame = frame.f_back
    return frame is not None


def test_an_interruption_anywhere_leaves_a_whole_run():
    """Ctrl-C at each line that step(), phase() and flush() run in our code: the run is closed, written, and counts no joule twice."""
    ours = ("green_torch/tracker.py", "green_torch/journal.py", "green_torch/steps.py", "green_torch/clock/boundaries.py")
    position = 0
    while True:
        position += 1
        clock, meter, sink, tracker = scene()
        # The scripted clock runs the recorder's tick on this thread; on a real one Ctrl-C can't strike there.
        ctrl_c = CtrlC(position, lambda frame: frame.f_code.co_filename.endswith(ours) and not in_tick(frame))
        interrupted = False
        try:
            with tracker:
                start_ns = clock.now_ns()
                for _ in range(3):
                    clock.advance(1.0)
                    tracker.step()
                clock.advance(1.0)
                with ctrl_c:
                    tracker.step()
                    with tracker.phase("eval"):
                        clock.advance(1.0)
                    tracker.flush(0.0)
        except KeyboardInterrupt:
            interrupted = True
        summary = tracker.summary()
        assert sink.closed, ctrl_c.where
        assert sink.summary is not None, ctrl_c.where
        assert summary.status == ("interrupted" if interrupted else "completed")
        truth_j = meter.truth_j("gpu0", start_ns, clock.now_ns())
        assert truth_j - 115 <= summary.totals.energy_j <= truth_j + 5, (
            ctrl_c.where
        )  # a record under way may be lost, none comes twice
        assert summary.totals.energy_j == pytest.approx(sum(phase.energy_j for phase in summary.totals.phases))
        assert 3 <= summary.totals.phase("train").n_steps <= 4, ctrl_c.where
        if not interrupted:
            break
    assert position > 60
