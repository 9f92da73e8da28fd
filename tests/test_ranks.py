"""Many processes: real ones over gloo, with meters of known joules; nobody hangs, whatever becomes of the others."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401 - registers the backend "fake"
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import green_torch
from green_torch import ledger
from green_torch.arguments import baseline_of
from green_torch.errors import ArgumentError, GreenTorchWarning
from green_torch.records import Flag, PerStep, Phase, RankTotals
from green_torch.sinks.codec import plain
from green_torch.sinks.jsonl import read_jsonl, read_last, run_file
from green_torch.sinks.tensorboard import scalars
from green_torch.testing import MemorySink, ScriptedClock, ScriptedMeter
from tests import rank_worker
from tests.processes import TWO_RANKS, environment, forked_ranks, preload

if TYPE_CHECKING:
    from pathlib import Path

preload("tests.rank_worker")

STEP_J = (12.0, 20.0)  # rank 0: 10 J on its GPU, 1 J for CPU and memory each; rank 1: 20 J on its GPU alone


class Rank(NamedTuple):
    """What a rank left behind."""

    code: int
    line: dict[str, Any] | None
    errors: str


def two(log_dir: Path, *options: str) -> list[Rank]:
    """Two ranks started by hand, so that rank 0 serves the store and each may end as it likes."""
    ended = forked_ranks("tests.rank_worker", ["--log-dir", str(log_dir), *options], log_dir)
    return [Rank(code, json.loads(out) if out else None, errors) for code, out, errors in ended]


def test_totals_under_torchrun_are_the_truth_to_the_joule(tmp_path):
    """Rank zero sums all ranks, a node's CPU once; each has a file of its own, under one run id; TensorBoard speaks for the job."""
    done = subprocess.run(
        [*TWO_RANKS, rank_worker.__file__, "--log-dir", str(tmp_path), "--steps", "20"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    zero, one = sorted(
        (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")), key=lambda line: line["rank"]
    )
    job = zero["job"]
    assert job["energy_j"] == pytest.approx(20 * sum(STEP_J), abs=0.5)
    assert job["energy_lo_j"] <= job["energy_j"] <= job["energy_hi_j"]
    assert (zero["own_j"], one["own_j"]) == pytest.approx((20 * STEP_J[0], 20 * STEP_J[1]), abs=0.5)
    assert job["emissions_g"] == pytest.approx(job["energy_j"])  # at 3.6e6 g/kWh a joule is a gram
    assert job["tokens"] == 20 * (100 + 101)
    assert job["model_flops"] == 2 * 20 * 1e6
    assert job["peak_flop_per_s"] == pytest.approx(2e9)
    assert (job["world_size"], job["reporting"], job["ended"]) == (2, 2, 2)
    assert (job["rank_energy_j"]["min_rank"], job["rank_energy_j"]["max_rank"]) == (0, 1)
    assert one["job"] is None
    assert not zero["missing"]
    assert "once for the node" in one["missing"][0]
    assert not zero["warnings"] + one["warnings"]
    assert "all ranks    2 of 2 report" in zero["text"]
    assert "step time" in zero["text"].split("all ranks")[1]

    files = [read_jsonl(run_file(tmp_path, rank, 1)) for rank in (0, 1)]
    assert {file.manifest.run_id for file in files} == {zero["run_id"]}
    assert [file.manifest.rank for file in files] == [0, 1]
    assert files[1].manifest.job["elastic_restart_count"] == "0"
    assert files[0].summary.job.energy_j == job["energy_j"]

    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    total = events.Scalars("green/energy_total_kWh")[-1]
    assert (total.step, total.value * 3.6e6) == (19, pytest.approx(job["energy_j"], rel=1e-5))
    last = [record for record in files[0].records if record.phase is Phase.TRAIN][-1]
    assert events.Scalars("green/energy_per_step_J")[-1].value == pytest.approx(last.job.per_step.energy_j, rel=1e-5)
    assert events.Scalars("green/energy_per_step_J")[-1].value > last.energy_j
    assert events.Scalars("green/mfu")[-1].value == pytest.approx(last.job.per_step.mfu, rel=1e-5)
    assert events.Scalars("green_detail/ranks_reporting")[-1].value == 2
    assert events.Scalars("green_detail/rank_energy_max_kWh")[-1].value * 3.6e6 == pytest.approx(400, abs=0.5)


class OtherRank:
    """Rank 1 of a job whose rank 0 is this process, as far as its store shows it."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def tell(self, **totals: Any) -> None:
        session = json.loads(self._store.get("green_torch/lead"))["session"]
        self._key = f"green_torch/{session}/1"
        self.put(json.dumps(plain(RankTotals(rank=1, **totals))))

    def put(self, word: str) -> None:
        self._store.set(self._key, word)

    def take_back(self) -> None:
        self._store.delete_key(self._key)


@pytest.fixture
def other_rank():
    """A process group of two that this process alone is in."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    dist.init_process_group("fake", store=store, rank=0, world_size=2)
    yield OtherRank(dist.distributed_c10d._get_default_store())
    dist.destroy_process_group()


def test_first_steps_wait_for_ranks_that_have_yet_to_tell(other_rank):
    """Rank zero's first train records wait, two seconds at most, for the other ranks' steps; later ones take what is there."""
    clock, sink = ScriptedClock(), MemorySink()
    meter = ScriptedMeter(clock, {"gpu0": 100.0})
    with green_torch.track(clock=clock, meters=[meter], sinks=[sink], intensity=1.0, log_every_n_steps=1) as tracker:
        for _ in range(10):
            clock.advance(0.1)
            tracker.step()
        assert not sink.records
        other_rank.tell(energy_j=7.0)  # its totals so far, and no step yet
        clock.advance(0.3)
        assert not sink.records
        other_rank.tell(energy_j=7.0, per_step=PerStep(energy_j=5.0))
        clock.advance(0.4)
        assert [record.step for record in sink.records] == list(range(10))
        assert [record.job.per_step.energy_j for record in sink.records] == pytest.approx([15.0] * 10, rel=1e-3)
        clock.advance(0.5)
        tracker.step()
        clock.advance(0.3)
        assert sink.records[-1].step == 10
        other_rank.tell(energy_j=9.0, status="completed")
    assert sink.summary.job.energy_j == pytest.approx(tracker.summary().totals.energy_j + 9.0)


def test_a_rank_that_never_tells_holds_nothing_up(other_rank):
    """Two seconds after a step its record goes without the others, and what a step takes of all ranks is unknown."""
    clock, sink = ScriptedClock(), MemorySink()
    meter = ScriptedMeter(clock, {"gpu0": 100.0})
    with (
        pytest.warns(GreenTorchWarning, match="nothing was heard"),
        green_torch.track(clock=clock, meters=[meter], sinks=[sink], intensity=1.0, log_every_n_steps=1) as tracker,
    ):
        clock.advance(0.1)
        tracker.step()
        clock.advance(1.9)
        assert not sink.records
        clock.advance(0.3)
        assert [(record.step, record.job.per_step) for record in sink.records] == [(0, None)]


def test_a_rank_that_hangs_grows_old(other_rank):
    """A rank that tells the same again and again, as its thread goes on while its loop stands, is as old as its last record."""
    clock, sink = ScriptedClock(), MemorySink()
    meter = ScriptedMeter(clock, {"gpu0": 100.0})
    with green_torch.track(clock=clock, meters=[meter], sinks=[sink], intensity=1.0, log_every_n_steps=1) as tracker:
        for second in range(60):
            other_rank.tell(energy_j=7.0 + min(second, 9), last_step=min(second, 9), per_step=PerStep(energy_j=5.0))
            clock.advance(1.0)
            tracker.step()
        job = tracker.summary().job
        assert (job.oldest_rank, job.oldest_age_s) == (1, pytest.approx(50.0, abs=1.5))
        assert "rank 1 last told anything new 5" in str(tracker.summary())
        assert dict(scalars(sink.records[-1]))["green_detail/rank_oldest_age_s"] == pytest.approx(49.0, abs=2.0)
        other_rank.tell(energy_j=17.0, last_step=10, status="completed")


def test_a_word_that_cannot_be_read_is_left_out(other_rank):
    """What rank 1 told before stands, rank zero says so once, and takes the next word that it can read."""
    clock = ScriptedClock()
    meter = ScriptedMeter(clock, {"gpu0": 100.0})
    with green_torch.track(clock=clock, meters=[meter], intensity=1.0) as tracker:
        other_rank.tell(energy_j=7.0)
        clock.advance(1.0)
        other_rank.put("{torn")
        with pytest.warns(GreenTorchWarning, match="what rank 1 tells can't be read"):
            clock.advance(1.0)
        assert tracker.summary().job.energy_j == 7.0  # this rank has no record yet
        other_rank.tell(energy_j=9.0, status="completed")
    assert tracker.summary().job.ended == 2
    assert len(tracker.summary().warnings) == 1


def test_a_store_that_fails_is_asked_again(other_rank):
    """A call that fails is made again a second later, and nothing is missing; where it fails to the end, rank zero says of whom."""
    clock = ScriptedClock()
    meter = ScriptedMeter(clock, {"gpu0": 100.0})
    tracker = green_torch.track(clock=clock, meters=[meter], intensity=1.0)
    with pytest.warns(GreenTorchWarning), tracker:
        other_rank.tell(energy_j=7.0, last_step=1)
        clock.advance(1.0)
        other_rank.take_back()  # asked for, it is waited for in vain
        clock.advance(0.3)
        other_rank.tell(energy_j=8.0, last_step=2)
        clock.advance(0.6)
        assert tracker.summary().job.oldest_age_s > 0.8
        clock.advance(0.6)
        assert tracker.summary().job.oldest_age_s < 0.5
        assert not tracker.summary().warnings
        other_rank.take_back()
    exchange, rank = tracker.summary().warnings
    assert "rank zero's are without what the other ranks have done since" in exchange
    assert "rank 1 had not ended when rank zero did" in rank


def test_a_group_may_come_at_the_very_end(monkeypatch):
    """One that forms less than an exchange before the run ends is a group: rank zero says whom it has not heard of."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    clock = ScriptedClock()
    meter = ScriptedMeter(clock, {"gpu0": 100.0})
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    tracker = green_torch.track(clock=clock, meters=[meter], intensity=1.0)
    with pytest.warns(GreenTorchWarning, match="nothing was heard of 1 of 2 ranks"), tracker:
        clock.advance(1.0)
        dist.init_process_group("fake", store=store, rank=0, world_size=2)
    dist.destroy_process_group()
    assert not any("no process group" in warning for warning in tracker.summary().warnings)


def one_rank_alone(log_dir, monkeypatch, rank, power_w, tokens):
    """What a rank of two leaves behind: 40 steps of 0.1 s."""
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "n1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    clock = ScriptedClock()
    meter = ScriptedMeter(clock, power_w)
    with green_torch.track(clock=clock, meters=[meter], intensity=1.0, log_dir=log_dir, run_name="base") as tracker:
        for _ in range(40):
            clock.advance(0.1)
            tracker.step(tokens=tokens)


@pytest.mark.filterwarnings("ignore:WORLD_SIZE is 2")
def test_a_baseline_on_cpus_is_all_ranks_work(tmp_path, monkeypatch):
    """Where rank zero alone meters the node, its joules stand against the tokens of both ranks."""
    for rank in (0, 1):
        one_rank_alone(tmp_path, monkeypatch, rank, {"cpu": 100.0}, 100)
    assert baseline_of(tmp_path).energy_per_unit_j == pytest.approx(10.0 / 200)


@pytest.mark.filterwarnings("ignore:WORLD_SIZE is 2")
def test_a_meter_of_a_gpu_and_the_node_counts_the_node_once(tmp_path, monkeypatch):
    """One meter that reads both: rank 1 takes its GPU's 100 W alone, and the CPU's 50 W are rank zero's."""
    for rank in (0, 1):
        one_rank_alone(tmp_path, monkeypatch, rank, {f"gpu{rank}": 100.0, "cpu": 50.0}, 1)
    (run,) = ledger.read(tmp_path).runs
    assert run.totals.phase("train").energy_j == pytest.approx(40 * 0.1 * 250.0, rel=1e-5)
    assert [[domain.name for domain in part.manifest.domains] for part in run.segments] == [["gpu0", "cpu"], ["gpu1"]]


@pytest.mark.filterwarnings("ignore:WORLD_SIZE is 2")
def test_a_job_saves_against_a_job(tmp_path, monkeypatch):
    """All ranks' joules per token against all of the baseline's: the same job saves nothing, one of half the joules half of them."""
    one_rank_alone(tmp_path / "base", monkeypatch, 0, {"gpu0": 100.0, "cpu": 10.0, "dram": 10.0}, 100)
    with pytest.raises(ArgumentError, match="that run had 2 ranks, and there are files of 1 of them"):
        baseline_of(tmp_path / "base")
    one_rank_alone(tmp_path / "base", monkeypatch, 1, {"gpu1": 200.0}, 101)
    whole_g = 1000 * sum(STEP_J)  # of a thousand planned steps; at 3.6e6 g/kWh a joule is a gram
    slack_g = 0.08 * whole_g  # on a busy machine the joules of the last steps are read after them: of 40, say three
    compared = ["--baseline", str(tmp_path / "base"), "--planned", "1000"]
    for share, saved_g in ((1.0, 0.0), (0.5, whole_g / 2)):
        (tmp_path / str(share)).mkdir()
        zero, one = two(tmp_path / str(share), "--steps", "40", *compared, "--share", str(share))
        assert (zero.code, one.code) == (0, 0), zero.errors + one.errors
        job = zero.line["job"]
        assert job["projected_savings_g"] == pytest.approx(saved_g, abs=slack_g)
        assert job["projected_savings_lo_g"] <= job["projected_savings_g"] <= job["projected_savings_hi_g"]
        assert job["projected_energy_j"] == pytest.approx(share * whole_g, abs=slack_g)
        saving = next(line for line in zero.line["text"].splitlines() if "saving" in line)
        assert "over 1000 steps, against base (0.1592 J/token)" in saving
        assert "saving" not in one.line["text"]
        events = EventAccumulator(str(tmp_path / str(share)), size_guidance={"scalars": 0}).Reload()
        told = events.Scalars("green/projected_savings_gCO2e")[-1].value
        assert told == pytest.approx(saved_g, abs=slack_g)


def test_a_rank_with_fewer_batches_ends_first(tmp_path):
    """Rank 1 ends early and loses nothing: its last word waits in the store."""
    zero, one = two(tmp_path, "--steps", "40", "10")
    assert (zero.code, one.code) == (0, 0)
    assert zero.line["job"]["energy_j"] == pytest.approx(40 * STEP_J[0] + 10 * STEP_J[1], abs=0.5)
    assert zero.line["job"]["ended"] == 2


def test_rank_zero_waits_two_seconds_and_no_longer(tmp_path):
    """Where rank zero ends first, the others' totals are those they told last, with their age; they go on unharmed."""
    zero, one = two(tmp_path, "--steps", "10", "100")
    assert (zero.code, one.code) == (0, 0)
    assert zero.line["close_s"] < 4.0  # two, and what a busy machine adds
    job = zero.line["job"]
    assert (job["ended"], job["oldest_rank"]) == (1, 1)
    assert 10 * STEP_J[0] < job["energy_j"] < 10 * STEP_J[0] + 100 * STEP_J[1]
    assert any("rank 1 had not ended" in warning for warning in zero.line["warnings"])
    assert one.line["own_j"] == pytest.approx(100 * STEP_J[1], abs=0.5)


def test_a_killed_rank_is_shown_as_it_last_was(tmp_path):
    """SIGKILL on rank 1: rank zero neither hangs nor raises; what rank 1 had told is in the sums, with its age; its file can be read."""
    zero, one = two(tmp_path, "--steps", "80", "30", "--kill", "1")
    assert (zero.code, one.code) == (0, -9)
    job = zero.line["job"]
    assert job["oldest_rank"] == 1
    assert job["oldest_age_s"] > 1.0
    whole_j = 80 * STEP_J[0] + 30 * STEP_J[1]
    assert whole_j - STEP_J[1] < job["energy_j"] < whole_j + 0.5  # joules read after its last step died with it
    assert f"rank 1 last told anything new {job['oldest_age_s']:.2f}"[:-1] in zero.line["text"]
    died = read_last(run_file(tmp_path, 1, 1))
    assert died.summary is None
    assert died.records[-1].step > 0  # what it had not flushed is lost, a second's worth


def test_the_store_may_die_with_rank_zero(tmp_path):
    """SIGKILL on rank 0, whose process serves the store: rank 1 trains to its end, says so once, and closes at once."""
    zero, one = two(tmp_path, "--steps", "10", "80", "--kill", "0")
    assert (zero.code, one.code) == (-9, 0)
    assert one.line["own_j"] == pytest.approx(80 * STEP_J[1], abs=0.5)
    assert sum("exchanged no more" in warning for warning in one.line["warnings"]) == 1
    assert one.line["close_s"] < 1.5
    assert one.line["run_id"] == read_last(run_file(tmp_path, 0, 1)).manifest.run_id


def test_a_rank_that_raises_is_counted(tmp_path):
    """Its own error comes through, and its totals are in the job's."""
    zero, one = two(tmp_path, "--steps", "20", "--fail", "1")
    assert (zero.code, one.code) == (0, 1)
    assert "RuntimeError: this rank fails" in one.errors
    assert zero.line["job"]["energy_j"] == pytest.approx(20 * sum(STEP_J), abs=0.5)
    assert read_last(run_file(tmp_path, 1, 1)).summary.status == "failed"


def test_the_group_may_come_late_and_go_early(tmp_path):
    """init_process_group after the tracker opened, destroy_process_group before it closes: the totals are whole all the same."""
    zero, one = two(tmp_path, "--steps", "20", "--late-group", "--early-end")
    assert (zero.code, one.code) == (0, 0)
    assert zero.line["job"]["energy_j"] == pytest.approx(20 * sum(STEP_J), abs=0.5)
    assert not zero.line["warnings"] + one.line["warnings"]


def test_one_run_after_another_are_two(tmp_path):
    """Rank 0 is in its second run while rank 1 is still in the first: each run has its own id and sums on both."""
    zero, one = two(tmp_path, "--steps", "60", "10", "--again")
    assert (zero.code, one.code) == (0, 0)
    assert zero.line["earlier_run_id"] == one.line["earlier_run_id"] != zero.line["run_id"] == one.line["run_id"]
    assert zero.line["job"]["energy_j"] == pytest.approx(60 * STEP_J[0] + 10 * STEP_J[1], abs=0.5)


@pytest.mark.parametrize("loads", [("0", "1"), ("0",)])
def test_a_resumed_job_carries_what_every_rank_used(tmp_path, loads):
    """The checkpoint is loaded on both ranks, or on rank zero alone, whose run rank 1 follows: the sums hold both ranks' first starts."""
    options = ["--steps", "20", "--planned", "40", "--checkpoint", str(tmp_path / "state"), "--loads", *loads]
    (first, _), (zero, one) = two(tmp_path, *options), two(tmp_path, *options)
    assert (zero.code, one.code) == (0, 0), zero.errors + one.errors
    assert zero.line["run_id"] == one.line["run_id"] == first.line["run_id"]
    job = zero.line["job"]
    assert (job["energy_j"], job["carried_energy_j"]) == pytest.approx((20 * sum(STEP_J), 20 * sum(STEP_J)), abs=0.5)
    assert job["projected_energy_j"] == pytest.approx(job["energy_j"] + job["carried_energy_j"])  # all that was planned is done
    assert job["carried_emissions_g"] == pytest.approx(job["carried_energy_j"])  # at 3.6e6 g/kWh a joule is a gram
    (run,) = ledger.read(tmp_path).runs
    assert run.totals.energy_j == pytest.approx(job["energy_j"] + job["carried_energy_j"])
    assert not zero.line["warnings"] + one.line["warnings"]


def test_rank_zero_alone_asks_the_grid(tmp_path):
    """A provider on the network is asked by rank zero, once; the others take its figure, and till then the table's, flagged."""
    grid = tmp_path / "grid"
    grid.mkdir()
    zero, one = two(tmp_path, "--steps", "80", "--grid", str(grid))
    assert (zero.code, one.code) == (0, 0)
    assert (grid / "0").read_text() == "asked\n"
    assert not (grid / "1").exists()
    records = read_jsonl(run_file(tmp_path, 1, 1)).records
    assert records[-1].intensity_g_per_kwh == 42.0
    assert all(record.flagged(Flag.INTENSITY_FALLBACK) == (record.intensity_g_per_kwh != 42.0) for record in records)


def test_without_a_group_there_is_no_exchange(tmp_path):
    """WORLD_SIZE alone: each rank has its own totals, and rank zero says once that there are no others; the files are one run's."""
    zero, one = two(tmp_path, "--steps", "5", "--no-group")
    assert (zero.code, one.code) == (0, 0)
    assert zero.line["job"] is None
    assert ["no process group" in warning for warning in zero.line["warnings"]] == [True]
    assert not one.line["warnings"]
    (run,) = ledger.read(tmp_path).runs
    assert run.totals.energy_j == pytest.approx(5 * sum(STEP_J), abs=0.5)
    assert (run.manifest.world_size, len(run.segments)) == (2, 2)


def test_a_process_alone_loads_nothing_of_it(tmp_path):
    """world_size 1 costs nothing: not even the import."""
    script = (
        "import sys, green_torch\n"
        "from green_torch.testing import ScriptedClock, ScriptedMeter\n"
        "clock = ScriptedClock()\n"
        "with green_torch.track(clock=clock, meters=[ScriptedMeter(clock, {'gpu0': 1.0})], intensity=1.0) as tracker:\n"
        "    clock.advance(1.0); tracker.step()\n"
        "print([name for name in ('green_torch.ranks', 'green_torch.job', 'torch') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "[]"
