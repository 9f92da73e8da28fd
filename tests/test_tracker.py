"""track(): a scripted clock and meters of known joules, so that every figure is exact."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import green_torch
from green_torch.errors import ArgumentError, GreenTorchWarning, UnknownRegionError, UsageError
from green_torch.records import Embodied, Flag, IntensityPoint, JobTotals, Method, Phase, RunTotals, TrainSums
from green_torch.testing import MemorySink, ScriptedClock, ScriptedMeter
from green_torch.units import grams, kwh, si
from tests.test_sinks_codec import MANIFEST, make_record, make_summary


class Run:
    """A tracker on a scripted clock, with a GPU of known power; keywords go to track()."""

    def __init__(self, power_w=300.0, *, period_s=0.02, method=Method.COUNTER, model=None, **options) -> None:
        self.clock = ScriptedClock()
        self.meter = ScriptedMeter(self.clock, {"gpu0": power_w}, period_s=period_s, method=method)
        self.sink = MemorySink()
        options = {"meters": [self.meter], "intensity": 100.0, "log_every_n_steps": 1, **options}
        self.tracker = green_torch.track(model, clock=self.clock, sinks=[self.sink], **options)

    def steps(self, n: int, seconds: float, **counts) -> None:
        for _ in range(n):
            self.clock.advance(seconds)
            self.tracker.step(**counts)

    @property
    def train(self):
        return [record for record in self.sink.records if record.phase is Phase.TRAIN]


class SIGTERMException(SystemExit):
    """As Lightning raises it: an exit without a code."""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (SystemExit(), "completed"),
        (SystemExit(0), "completed"),
        (SystemExit(75), "requeued"),
        (SystemExit(1), "failed"),
        (SystemExit("no data"), "failed"),
        (SystemExit(143), "interrupted"),
        (SystemExit(130), "interrupted"),
        (SIGTERMException(), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (ValueError(), "failed"),
    ],
)
def test_what_ends_a_run_is_told(error, status):
    """An exit is a completion without a code alone, and never where SIGTERM is behind it."""
    run = Run()
    with pytest.raises(type(error)), run.tracker:
        run.steps(2, 0.2)
        raise error
    assert run.sink.summary.status == status
    assert run.sink.summary.n_steps == 2


def test_energy_of_a_step_is_the_joules_that_passed():
    """300 W for 200 ms is 60 J, and the truth lies within the bounds."""
    run = Run()
    with run.tracker:
        run.clock.advance(0.1)
        run.steps(20, 0.2, tokens=64)
    for record in run.train[1:]:
        assert record.energy_j == pytest.approx(60.0, rel=0.02)
        assert record.energy_lo_j <= 60.0 <= record.energy_hi_j
        assert record.power_w == pytest.approx(300.0, rel=0.02)
        assert record.emissions_g == pytest.approx(record.energy_j / 3.6e6 * 100.0)
    assert [record.step for record in run.train] == list(range(20))
    assert run.sink.summary.energy_per_token_j == pytest.approx(
        (20 * 60.0 + 30.0) / (20 * 64), rel=0.02
    )  # the first began 0.1 s early
    assert run.sink.summary.status == "completed"
    assert run.sink.summary.resolved_through == 19


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["step", "eval", "save", "suspend", "wait"]), st.floats(0.001, 0.4)), max_size=40),
    st.sampled_from([0.001, 0.02, 0.1]),
    st.sampled_from([1, 4, "auto"]),
)
def test_phases_sum_to_the_total(events, period_s, every):
    """Whatever happens in a run, no joule, second or gram is lost between the phases, and the truth is within the total's bounds."""
    run = Run(lambda t: 300.0 + 200.0 * math.copysign(1.0, math.sin(9 * t)), period_s=period_s, log_every_n_steps=every)
    suspended_j = 0.0
    with run.tracker as tracker:
        start_ns = run.clock.now_ns()
        for kind, seconds in events:
            if kind == "step":
                run.steps(1, seconds)
            elif kind == "wait":
                run.clock.advance(seconds)
            elif kind == "suspend":
                a_ns = run.clock.now_ns()
                with tracker.suspend():
                    run.clock.advance(seconds)
                suspended_j += run.meter.truth_j("gpu0", a_ns, run.clock.now_ns())
            else:
                with tracker.phase(kind):
                    run.clock.advance(seconds)
        run.clock.advance(0.01)
        end_ns = run.clock.now_ns()
    totals = run.sink.summary.totals
    truth_j = run.meter.truth_j("gpu0", start_ns, end_ns) - suspended_j
    assert sum(phase.energy_j for phase in totals.phases) == pytest.approx(totals.energy_j)
    assert sum(phase.duration_s for phase in totals.phases) == pytest.approx(totals.duration_s)
    assert sum(phase.emissions_g for phase in totals.phases) == pytest.approx(totals.emissions_g)
    assert sum(record.energy_j for record in run.sink.records) == pytest.approx(totals.energy_j)
    assert totals.energy_lo_j - 0.2 <= truth_j <= totals.energy_hi_j + 0.2  # truth_j is itself a 0.1 ms midpoint sum
    assert all(record.energy_j >= 0 for record in run.sink.records)


def test_the_run_total_is_the_counters_own():
    """Many steps shorter than the counter's period still sum to what the counter counted."""
    run = Run(lambda t: 500.0 if int(t * 43) % 2 else 150.0, period_s=0.1)
    with run.tracker:
        start_ns = run.clock.now_ns()
        run.steps(400, 0.023)
        end_ns = run.clock.now_ns()
    truth_j = run.meter.truth_j("gpu0", start_ns, end_ns)
    assert run.sink.summary.totals.energy_j == pytest.approx(truth_j, abs=2 * 0.1 * 500)
    assert not [record for record in run.train if record.energy_j == 0 and not record.flagged(Flag.UNRESOLVED)]


def test_a_short_step_that_cannot_be_resolved_says_so():
    """A 5 ms step on a 100 ms counter is flagged; the mean of all is not vacuous."""
    run = Run(period_s=0.1)
    with run.tracker:
        run.steps(200, 0.005)
    assert run.sink.summary.flags["unresolved:gpu0"] > 100
    assert run.sink.summary.energy_per_step_lo_j > 0.5 * 1.5
    assert run.sink.summary.energy_per_step_hi_j < 1.5 * 1.5


def test_phases_and_embodied_and_pue():
    """Evaluation is booked apart; facility energy and embodied grams follow their factors."""
    run = Run(pue=1.5, embodied=Embodied(164.0, "test"), price=0.5)
    with run.tracker as tracker:
        run.steps(5, 0.2)
        with tracker.phase("eval"):
            run.clock.advance(1.0)
        run.steps(5, 0.2)
    totals = run.sink.summary.totals
    assert totals.phase("eval").energy_j == pytest.approx(300.0, rel=0.03)
    assert totals.phase("train").energy_j == pytest.approx(600.0, rel=0.03)
    assert totals.facility_energy_j == pytest.approx(1.5 * totals.energy_j)
    assert totals.embodied_g == pytest.approx(164_000 * totals.duration_s / (4 * 365.25 * 86400))
    assert totals.emissions_g == pytest.approx(totals.operational_g + totals.embodied_g)
    assert run.sink.summary.cost == pytest.approx(totals.facility_energy_j / 3.6e6 * 0.5)


def test_estimated_energy_has_no_bounds():
    """A modelled domain stands at face value and nothing claims to bound it."""
    run = Run(method=Method.ESTIMATED)
    with run.tracker:
        run.steps(10, 0.2)
    assert run.train[3].energy_lo_j is None
    assert run.train[3].energy_j == pytest.approx(60.0, rel=0.02)
    assert run.sink.summary.totals.share(Method.ESTIMATED) == 1.0


def test_mixed_methods_add_and_keep_the_counters_bounds():
    """Counted and estimated domains sum, bounds from the counted one alone."""
    clock = ScriptedClock()
    gpu = ScriptedMeter(clock, {"gpu0": 300.0}, period_s=0.02)
    cpu = ScriptedMeter(clock, {"cpu": 50.0}, method=Method.ESTIMATED, interval_s=1.0)
    sink = MemorySink()
    with green_torch.track(meters=[gpu, cpu], clock=clock, sinks=[sink], intensity=1, log_every_n_steps=1) as tracker:
        for _ in range(30):
            clock.advance(0.2)
            tracker.step()
    record = sink.records[10]
    assert record.energy_j == pytest.approx(70.0, rel=0.02)
    assert record.energy_lo_j > 10.0
    assert [domain.name for domain in record.domains] == ["gpu0", "cpu"]
    assert sink.summary.totals.share(Method.COUNTER) == pytest.approx(6 / 7, rel=0.01)


def test_a_meter_that_fails_midway_is_left_out_and_flagged():
    """Training goes on, the other device's joules stay right, and the summary says what is missing."""
    clock = ScriptedClock()
    good = ScriptedMeter(clock, {"gpu0": 300.0}, period_s=0.02)
    bad = ScriptedMeter(clock, {"gpu1": 200.0}, period_s=0.02)
    sink = MemorySink()
    tracker = green_torch.track(meters=[good, bad], clock=clock, sinks=[sink], intensity=1, log_every_n_steps=1)
    with pytest.warns(GreenTorchWarning, match="gpu1 could not be read"), tracker:
        for k in range(40):
            if k == 20:
                bad.fail()
            clock.advance(0.2)
            tracker.step()
    early, late = sink.records[5], sink.records[35]
    assert early.energy_j == pytest.approx(100.0, rel=0.02)
    assert late.energy_j == pytest.approx(60.0, rel=0.02)
    assert late.flagged(Flag.METER_FAILED)
    assert "meter_failed:gpu1" in late.flags
    assert sink.summary.last_step == 39


def test_a_meter_that_comes_back_loses_nothing():
    """A failure shorter than the patience of a record costs no joule."""
    run = Run()
    with run.tracker:
        start_ns = run.clock.now_ns()
        run.steps(10, 0.1)
        run.meter.fail()
        run.steps(5, 0.1)
        run.meter.recover()
        run.steps(30, 0.1)
        end_ns = run.clock.now_ns()
    assert run.sink.summary.totals.energy_j == pytest.approx(run.meter.truth_j("gpu0", start_ns, end_ns), rel=0.01)
    assert set(run.sink.summary.flags) == {"unresolved:gpu0"}  # nobody saw how the gap's joules were spread


def test_a_counter_that_goes_back_makes_no_negative_step():
    """The record across the reset is flagged and bounded by the limit; those after are right."""
    run = Run()
    with run.tracker:
        run.steps(10, 0.2)
        run.meter.reset("gpu0")
        run.steps(10, 0.2)
    assert min(record.energy_j for record in run.train) >= 0
    assert run.sink.summary.flags["counter_reset:gpu0"] == 1
    assert run.train[15].energy_j == pytest.approx(60.0, rel=0.02)


def test_a_stuck_counter_is_flagged():
    """Steps under a counter that stands still are extrapolated and say so."""
    run = Run()
    with run.tracker:
        run.steps(10, 0.2)
        run.meter.stick("gpu0")
        run.steps(20, 0.2)
    assert run.sink.summary.flags["counter_stuck:gpu0"] > 5
    assert min(record.energy_j for record in run.train) >= 0


def test_records_come_late_and_in_order():
    """A record is not resolved before the counter's next change, and never overtaken."""
    run = Run(period_s=0.1)
    with run.tracker:
        run.clock.advance(0.35)
        run.tracker.step()
        assert not run.sink.records
        run.steps(10, 0.1)
        assert 0 < len(run.sink.records) < 11
    ends = [record.end_ns for record in run.train]
    assert ends == sorted(ends)


def test_leaving_the_context_waits_at_most_two_seconds():
    """A counter that never changes again delays the end by no more than the patience."""
    run = Run()
    with run.tracker:
        run.steps(10, 0.2)
        run.meter.stick("gpu0")
        run.steps(1, 0.2)
        left_ns = run.clock.now_ns()
    assert run.clock.now_ns() - left_ns <= 2.1e9
    assert run.sink.summary.resolved_through == 10


def test_a_million_steps_take_bounded_memory_and_records():
    """Spans, levels and knots are dropped as they are used (the benchmark measures the bytes)."""
    run = Run(period_s=0.1, log_every_n_steps="auto", poll_interval_s=0.1)
    with run.tracker:
        for _ in range(20_000):
            run.clock.advance(0.005)
            run.tracker.step()
        recorder = run.tracker._recorder
        assert recorder.pending < 200
        assert max(len(levels) for levels in recorder._levels.values()) <= 257
        assert run.tracker._sampler.timelines["gpu0"].knots < 200
    assert run.sink.summary.totals.phase("train").n_steps == 20_000
    assert len(run.sink.records) < 200


@pytest.mark.parametrize("bad", [float("nan"), -3, 0, 2.5, "many", float("inf")])
def test_a_bad_count_is_left_out_with_one_warning(bad):
    """NaN, negative, zero or broken counts flag the record and do not stop training."""
    run = Run()
    with run.tracker:
        run.steps(2, 0.1, tokens=8)
        with pytest.warns(GreenTorchWarning, match="no positive whole number"):
            run.steps(1, 0.1, tokens=bad)
            run.tracker.flush(0.0)  # what was given is looked at off the training thread
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run.steps(1, 0.1, tokens=bad)  # said once
        run.steps(2, 0.1, tokens=8)
    assert [record.tokens for record in run.train] == [8, 8, None, None, 8, 8]
    assert run.sink.summary.flags["bad_count"] == 2
    assert run.sink.summary.energy_per_token_j == pytest.approx(30.0 / 8, rel=0.1)


def test_warnings_as_errors_do_not_end_training():
    """Under -W error a warning of ours is logged instead."""
    run = Run()
    with warnings.catch_warnings(), run.tracker:
        warnings.simplefilter("error")
        run.steps(3, 0.1, tokens=-1)
    assert run.sink.summary.status == "completed"


def test_a_model_that_cannot_be_counted_does_not_end_training_either():
    """The warning about FLOPs, too, is only logged under -W error, and stands in the summary."""

    class Asks(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * float(x.sum())  # what a meta tensor can't tell

    model = Asks(4, 4)
    run = Run(model=model)
    with warnings.catch_warnings(), run.tracker:
        warnings.simplefilter("error")
        model(torch.ones(2, 4)).sum().backward()
        run.steps(2, 0.1)
    assert run.train[0].model_flops is None
    assert "can't be counted" in run.sink.summary.warnings[0]


def test_step_outside_the_context_is_refused():
    """Before training a wrong place raises; after the run it is ignored with a warning."""
    run = Run()
    with pytest.raises(UsageError, match=r"with green_torch.track"):
        run.tracker.step()
    with run.tracker:
        run.steps(1, 0.1)
    with pytest.warns(GreenTorchWarning, match="after the run has ended"):
        run.tracker.step()


def test_a_nested_tracker_is_refused_before_training():
    """Two trackers would count the same joules; the outer one is unharmed."""
    outer, inner = Run(), Run()
    with outer.tracker:
        outer.steps(2, 0.1)
        with pytest.raises(UsageError, match="another tracker is open"), inner.tracker:
            pass
        outer.steps(2, 0.1)
    assert outer.sink.summary.totals.phase("train").n_steps == 4
    with Run().tracker:
        pass


@pytest.mark.parametrize(
    "options",
    [
        {"pue": 0.9},
        {"pue": math.nan},
        {"intensity": -1.0},
        {"intensity": math.inf},
        {"price": -1.0},
        {"planned_steps": 0},
        {"log_every_n_steps": 0},
        {"log_every_n_steps": "often"},
        {"poll_interval_s": 0.0},
        {"flops_per_step": math.nan},
        {"peak_flop_per_s": -1.0},
        {"attention_flops": "half"},
        {"embodied": -5.0},
        {"baseline": "/nowhere"},
    ],
)
def test_wrong_arguments_raise_at_construction(options):
    """Every argument is checked before training."""
    with pytest.raises(ArgumentError):
        Run(**options)


def test_an_unknown_region_names_the_nearest():
    """A typing error is met with what was probably meant."""
    with pytest.raises(UnknownRegionError, match="US-CA"):
        Run(intensity=None, region="US-CAA")


def test_no_region_is_the_world_average_by_name():
    """The default is named in every output."""
    run = Run(intensity=None)
    with run.tracker:
        run.steps(2, 0.1)
    assert run.sink.manifest.intensity.region == "world average, no region set"
    assert "world average, no region set" in str(run.sink.summary)


def test_an_address_is_no_log_directory(tmp_path, monkeypatch):
    """A bucket's address doesn't become a folder of that name here."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=r"no directory of this machine.*writer=SummaryWriter"):
        green_torch.track(log_dir="s3://bucket/run")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_raises(tmp_path):
    """An unwritable log directory is found before training."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ArgumentError, match="can't be written"):
        Run(log_dir=blocked / "runs")


def test_an_empty_list_of_meters_is_named():
    """A run that was given no meter says so."""
    with pytest.warns(GreenTorchWarning, match="nothing here measures energy: meters= is empty. See"):
        green_torch.track(meters=[], intensity=1.0)


def test_one_meter_per_domain():
    """Two meters that read the same domain would count it twice."""
    clock = ScriptedClock()
    meters = [ScriptedMeter(clock, {"cpu": 1.0}), ScriptedMeter(clock, {"cpu": 1.0})]
    with pytest.raises(ArgumentError, match="counted twice"):
        green_torch.track(meters=meters, clock=clock)


def test_a_step_that_raises_leaves_everything_on_disk_and_closed():
    """The user's error comes through, the status is failed, and what was measured is there."""
    run = Run()
    with pytest.raises(ZeroDivisionError), run.tracker, run.tracker.phase("eval"):
        run.clock.advance(0.5)
        raise ZeroDivisionError
    assert run.sink.summary.status == "failed"
    assert "ended by ZeroDivisionError" in run.sink.summary.warnings
    assert run.sink.summary.totals.phase("eval").energy_j == pytest.approx(150.0, rel=0.1)
    assert run.sink.closed
    assert not run.meter.closed  # a meter that was given is its giver's


def test_ctrl_c_closes_the_run():
    """KeyboardInterrupt is not swallowed, and the summary is written: the run was interrupted, and has not failed."""
    run = Run()
    with pytest.raises(KeyboardInterrupt), run.tracker:
        run.steps(3, 0.1)
        raise KeyboardInterrupt
    assert run.sink.summary.status == "interrupted"
    assert not any("ended by" in said for said in run.sink.summary.warnings)
    assert run.sink.summary.totals.phase("train").n_steps == 3


class _Breaking(MemorySink):
    def write(self, item) -> None:
        super().write(item)
        if len(self.records) == 3:
            raise OSError(28, "No space left on device")


def test_a_sink_that_fails_is_switched_off_and_the_rest_go_on():
    """A full disk costs that sink, one warning, and nothing else."""
    clock, broken, whole = ScriptedClock(), _Breaking(), MemorySink()
    meter = ScriptedMeter(clock, {"gpu0": 100.0}, period_s=0.02)
    tracker = green_torch.track(meters=[meter], clock=clock, sinks=[broken, whole], intensity=1, log_every_n_steps=1)
    with pytest.warns(GreenTorchWarning, match=r"_Breaking is switched off.*No space left"), tracker:
        for _ in range(20):
            clock.advance(0.1)
            tracker.step()
    assert len(broken.records) == 3
    assert whole.summary.totals.phase("train").n_steps == 20


class _Flaky:
    def __init__(self) -> None:
        self.calls = 0

    def at(self, time_unix_ns: int) -> IntensityPoint:
        self.calls += 1
        if self.calls > 5:
            raise TimeoutError("no answer")
        return IntensityPoint(50.0, "FR", "a test", time_unix_ns=time_unix_ns)


def test_a_grid_provider_that_fails_falls_back_visibly():
    """The last known value stands in, and every record it touches says so."""
    run = Run(intensity=_Flaky())
    with pytest.warns(GreenTorchWarning, match="last known value"), run.tracker:
        run.steps(12, 0.1)
    assert run.train[2].flags == ()
    assert run.train[9].flags == ("intensity_fallback",)
    assert run.train[9].intensity_g_per_kwh == 50.0


def test_projection_and_saving_against_a_baseline(tmp_path):
    """A cheaper run on the same grid projects its saving from the baseline's joules per token."""
    base = Run(400.0, log_dir=tmp_path / "base")
    with base.tracker:
        base.steps(20, 0.1, tokens=10)
    run = Run(300.0, baseline=tmp_path / "base", planned_steps=1000)
    with run.tracker:
        run.steps(20, 0.1, tokens=10)
    saved_g = (40.0 - 30.0) / 10 * (10 * 1000) / 3.6e6 * 100.0
    summary = run.sink.summary
    assert summary.projected_savings_g == pytest.approx(saved_g, rel=0.1)
    assert summary.projected_savings_lo_g <= saved_g <= summary.projected_savings_hi_g
    assert summary.projected_savings_lo_g <= summary.projected_savings_g <= summary.projected_savings_hi_g
    assert "by the meters' bounds on both runs" in str(summary)
    assert run.sink.summary.projected_total_g == pytest.approx(30.0 * 1000 / 3.6e6 * 100.0, rel=0.1)


def test_mfu_of_a_counted_model():
    """A plain loop's model is counted once per shape, on a meta copy; MFU divides by the given peak; that step is excluded."""
    model = torch.nn.Linear(64, 32, bias=False)
    run = Run(model=model, peak_flop_per_s=1e9)
    with run.tracker:
        for _ in range(5):
            model(torch.ones(8, 64, requires_grad=True)).sum().backward()
            run.steps(1, 0.1)
    flops = 3 * 2 * 8 * 64 * 32
    assert [record.model_flops for record in run.train] == [flops] * 5
    assert run.train[3].mfu == pytest.approx(flops / 0.1 / 1e9)
    assert run.train[0].flagged(Flag.COUNTED)
    assert run.sink.summary.n_steps_excluded == 1
    assert run.sink.manifest.peaks[0].basis == "user"


def test_more_than_the_peak_warns_and_is_not_clamped():
    """MFU above 1 names its likely cause and stands as it came out."""
    run = Run(flops_per_step=1e9, peak_flop_per_s=1e9)
    with pytest.warns(GreenTorchWarning, match="the peak is too low"), run.tracker:
        run.steps(4, 0.5)
    assert run.train[2].mfu == pytest.approx(2.0)


def test_given_flops_win():
    """flops_per_step, or a step's own flops, need no model."""
    run = Run(flops_per_step=5e6, peak_flop_per_s=1e9)
    with run.tracker as tracker:
        run.steps(3, 0.1)
        run.clock.advance(0.1)
        tracker.step(flops=1e7)
    assert [record.model_flops for record in run.train] == [5e6, 5e6, 5e6, 1e7]
    assert run.train[3].mfu == pytest.approx(0.1)


def test_disabled_does_nothing(tmp_path):
    """enabled=False touches neither disk nor meters and answers every call."""
    with green_torch.track(log_dir=tmp_path / "none", enabled=False) as tracker:
        tracker.step(tokens=-1)
        with tracker.phase("eval"), tracker.count():
            pass
    assert tracker.summary().status == "disabled"
    assert not (tmp_path / "none").exists()


def test_the_summary_begins_with_what_it_cost():
    """Energy, grams and their kind, time, and how the joules are known stand in the first line, as in the run's records."""
    run = Run(method=Method.ESTIMATED, power_w=100.0, planned_steps=1000, price=0.25)
    with run.tracker:
        run.clock.advance(0.1)
        run.steps(5, 0.2)
        assert "projected" in dict(run.tracker.summary().lines())
    first, *rest = str(run.tracker.summary()).splitlines()
    totals = run.sink.summary.totals
    assert first == (
        f"cost         {kwh(totals.energy_j)}, {grams(totals.emissions_g)} (operational, location-based; embodied not counted) "
        f"in {si(totals.duration_s, 's')}; modelled, not measured: gpu0"
    )
    assert {"projected", "not metered"}.isdisjoint(dict(run.tracker.summary().lines()))
    assert "steps        5 measured" in rest


def test_a_mixed_run_says_what_is_counted_and_what_modelled():
    """Embodied, marginal, the job's sums and a long run's clock have words of their own in the first line."""
    record = make_record(1)
    grid = replace(MANIFEST.intensity, average=False)
    domains = (*MANIFEST.domains, replace(MANIFEST.domains[0], name="cpu", method=Method.ESTIMATED))
    told = make_summary(record, totals=replace(record.totals, duration_s=3723.4))
    told = replace(told, manifest=replace(MANIFEST, domains=domains, intensity=grid))
    assert told.headline().endswith(
        "(operational, marginal, and embodied) in 1:02:03 h; counted: gpu0; modelled, not measured: cpu"
    )
    job = JobTotals(energy_j=7200.0, emissions_g=3.0, world_size=4, reporting=3, ended=0)
    said = replace(told, job=job).headline()
    assert said.startswith("2.00 Wh, 3.00 gCO2e (")
    assert "in 1:02:03 h on 3 of 4 ranks; counted" in said
    assert replace(told, manifest=replace(MANIFEST, domains=())).headline().endswith("; nothing measures energy here")


def test_the_first_line_of_a_resumed_run_is_the_whole_runs():
    """What earlier segments used is in the cost, with this one's part beside it; grams are unknown where theirs are."""
    told = make_summary(make_record(1), totals=RunTotals(duration_s=10.0, energy_j=3600.0, emissions_g=2.0))
    resumed = replace(told, manifest=replace(MANIFEST, carried_energy_j=7200.0, carried_emissions_g=1.0))
    assert resumed.headline().startswith("3.00 Wh, 3.00 gCO2e (")
    assert ", of which 1.00 Wh in 10.0 s since it was resumed" in resumed.headline()
    untold = replace(told, manifest=replace(MANIFEST, carried_energy_j=7200.0))
    assert untold.headline().startswith("3.00 Wh, unknown (")


def test_what_a_token_takes_in_a_job_is_of_all_ranks():
    """One rank may meter for all: its joules are not held against its own tokens."""
    told = make_summary(make_record(1), energy_per_token_j=0.2, energy_per_step_j=20.0)
    job = JobTotals(world_size=2, reporting=2, ended=0, train=TrainSums(n_steps=10, energy_j=200.0, tokens=2000.0))
    assert [value for name, value in told.lines() if name == "  per token"] == ["200 mJ"]
    assert [value for name, value in replace(told, job=job).lines() if name == "  per token"] == ["100 mJ"]
    assert [value for name, value in replace(told, job=job).lines() if name == "  per step"] == ["20.0 J"]


@pytest.mark.parametrize(
    ("reason", "short"),
    [
        ("no NVIDIA driver: NVML says NVML Shared Library Not Found; install the NVIDIA driver", "no NVIDIA driver"),
        (
            "cpu, dram: no RAPL counters ([Errno 2] No such file or directory: '/sys/class/powercap'): Linux has them",
            "cpu, dram: no RAPL counters, so modelled",
        ),
        ("gpu0 (NVIDIA A100 (80 GB)) can't be read: NVML says GPU is lost; type sudo dmesg", "gpu0 can't be read"),
        ("gpu1: its counter can't be read (OSError(5))", "gpu1: its counter can't be read"),
    ],
)
def test_what_is_not_metered_is_told_in_words(reason, short):
    """No error number and no line to type: doctor has those."""
    domains = tuple(replace(MANIFEST.domains[0], name=name, method=Method.ESTIMATED) for name in ("cpu", "dram"))
    summary = make_summary(make_record(1), manifest=replace(MANIFEST, domains=domains, missing=(reason,)), flags={})
    assert summary.not_metered() == [short]


def test_an_unknown_phase_lists_the_known():
    """A typing error in a phase's name is an error with the names."""
    run = Run()
    with run.tracker, pytest.raises(ArgumentError, match="'eval', 'save'"), run.tracker.phase("evaluation"):
        pass


def test_track_alone_works_on_this_machine(tmp_path):
    """track() with nothing but a directory measures a real loop on whatever machine this is, in a process of its own."""
    script = f"""
import green_torch, torch
model = torch.nn.Linear(256, 256)
with green_torch.track(model, log_dir={str(tmp_path / "run")!r}) as tracker:
    for _ in range(30):
        model(torch.randn(64, 256)).sum().backward()
        tracker.step(samples=64)
        tracker.writer.add_scalar("loss", 1.0, _)
print(tracker.summary())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "emissions" in done.stdout
    assert list((tmp_path / "run" / "green").glob("rank-00000.segment-0001.jsonl"))
    assert len(list((tmp_path / "run").glob("events.out.tfevents.*"))) == 1
