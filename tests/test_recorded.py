"""Comparing runs on disk: what they are compared by, what is refused, and whether intervals and bounds hold the truth."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import green_torch
from green_torch.cli.comparison import Plan, comparison_parts
from green_torch.errors import ArgumentError, GreenTorchWarning, LedgerError, UnknownRegionError
from green_torch.experiment.recorded import _Kept, _read, _stretch_bounds, compare_runs
from green_torch.meters.rapl import open_meters
from green_torch.processor import cpu_name
from green_torch.records import Method
from green_torch.sinks.jsonl import read_jsonl, run_files
from green_torch.testing import ScriptedClock, ScriptedMeter
from tests.test_cli_compare import printed

TOKENS = 100


def run(
    folder,
    watts=300.0,
    step_s=0.5,
    *,
    steps=60,
    method=Method.COUNTER,
    tokens=TOKENS,
    seed=0,
    noise=0.02,
    losses=(),
    start_s=1_700_000_000.0,
    domain="gpu0",
    sensor=None,
    resumed=None,
    fails_at=None,
    **options,
):
    """A run on a scripted clock, written by the real tracker; returns its directory, true joules a token, and true seconds a step.

    ``losses``: tags, each with what gives its value at a step. ``sensor``: what else is known of the domain. ``resumed``: a checkpoint's
    state. ``fails_at``: the step after which the meter is read no more, while another one of 100 W goes on.
    """
    clock, rng = ScriptedClock(epoch_unix_ns=int(start_s * 1e9)), random.Random(f"{folder} {seed}")
    meter = ScriptedMeter(clock, {domain: watts}, method=method, period_s=0.1 if method is Method.COUNTER else 0.0)
    meter.domains = tuple(replace(one, **(sensor or {})) for one in meter.domains)
    meters = [meter] if fails_at is None else [meter, ScriptedMeter(clock, {"cpu": 100.0}, period_s=0.1)]
    track = {"intensity": 100.0, "pue": 1.2, "log_every_n_steps": 1, "poll_interval_s": 0.02} | options
    seconds = 0.0
    tracker = green_torch.track(log_dir=folder, clock=clock, meters=meters, **track)
    if resumed:
        tracker.load_state_dict(resumed)
    with tracker:
        for step in range(steps):
            if step == fails_at:
                meter.fail()
            clock.advance(duration := step_s * rng.gauss(1, noise))
            tracker.step(tokens=tokens)
            for tag, loss in losses:
                tracker.writer.add_scalar(tag, loss(step), step)
            seconds += duration if step >= 3 else 0.0
            if step == steps // 2:
                with tracker.phase("eval"):
                    clock.advance(3.0)
    measured = max(1, steps - 3)
    return folder, watts * seconds / measured / (tokens or math.nan), seconds / measured


def ranks(monkeypatch, folder, watts=(300.0, 300.0), **options):
    """A job of so many ranks that are at work at the same time; returns its directory. ``watts``: ``None`` where a rank meters nothing."""
    with monkeypatch.context() as launched:
        for name, value in {"WORLD_SIZE": len(watts), "MASTER_ADDR": "n1", "MASTER_PORT": 1}.items():
            launched.setenv(name, str(value))
        for rank, power in enumerate(watts):
            launched.setenv("RANK", str(rank))
            launched.setenv("LOCAL_RANK", str(rank))
            run(folder, power or 0.0, **({"domain": f"gpu{rank}"} | options))
    return folder


def lines_of(folder):
    (file,) = sorted((Path(folder) / "green").glob("*.jsonl"))
    return file, [json.loads(line) for line in file.read_text().splitlines()]


def edited(folder, **fields):
    """The run with other facts in its manifest."""
    file, lines = lines_of(folder)
    for line in lines:
        if line["type"] == "manifest":
            line.update(fields)
        line.get("manifest", {}).update(fields)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of 300 W."""
    return run(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def copy(base, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(base[0], tmp_path / "copy"))


def test_interval_and_bounds_hold_the_truth(base, tmp_path):
    """A run of 250 W against one of 300 W: energy per token, its bounds and time are where they truly are."""
    other = run(tmp_path / "other", watts=250.0, step_s=0.55)
    found = compare_runs([base[0], other[0]])
    energy, time = found.energy("other"), found.time("other")
    truth, slower = other[1] / base[1] - 1, other[2] / base[2] - 1
    assert energy.lo <= truth <= energy.hi
    assert energy.instrument_lo <= truth <= energy.instrument_hi
    assert time.lo <= slower <= time.hi
    assert energy.distinguishable
    assert energy.hi < 0 < time.lo
    assert energy.n_blocks == 20
    assert found.headline == "energy"
    assert found.departure("other") == ""
    assert found.result("other").step_time_s == pytest.approx(other[2], rel=0.01)


def test_a_run_cant_be_told_apart_from_its_like(base, tmp_path):
    """Another run of the same is no finding."""
    other, *_ = run(tmp_path / "other", seed=1)
    assert compare_runs([base[0], other]).energy("other").note.startswith("can't be told apart")


def test_bounds_of_neighbours_share_their_boundaries(base):
    """A stretch of records is known better than the sum of its records, and the truth lies within."""
    kept = _read(Path(base[0])).starts[0][0].kept[5:25]
    lo, hi = _stretch_bounds(kept)
    truth = 300.0 * sum(one.record.duration_s for one in kept)
    apart = sum(one.record.energy_hi_j - one.record.energy_lo_j for one in kept)
    assert lo <= truth <= hi
    assert hi - lo < apart / 5
    assert isinstance(kept[0], _Kept)


def test_grams_are_by_one_intensity(base, tmp_path):
    """Both runs' grams are by the first run's grid, or by the region asked for, whatever they were measured on."""
    other, *_ = run(tmp_path / "other", intensity=900.0, pue=1.0)
    found = compare_runs([base[0], other])
    for result in found.results:
        assert result.emissions_per_step_g == pytest.approx(result.energy_per_step_j * 1.2 / 3.6e6 * 100.0)
    france = compare_runs([base[0], other], region="FR")
    assert {result.manifest.intensity.region for result in france.results} == {"FR"}
    ratio = france.result("other").emissions_per_step_g / france.baseline.emissions_per_step_g
    assert ratio == pytest.approx(france.result("other").energy_per_step_j / france.baseline.energy_per_step_j)
    with pytest.raises(UnknownRegionError):
        compare_runs([base[0], other], region="Frnace")


def falling(to):
    """A loss that falls to so much."""
    return lambda step: to + 2.0 * 0.9**step


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (falling(1.01), ""),
        (falling(1.2), "not the same training: train_loss 1.2"),
        (lambda step: math.nan if step == 40 else 1.0, "not the same training: train_loss is not finite"),
        (lambda step: 2.0 + step, "more than 2 % apart"),
    ],
)
def test_losses_are_compared(tmp_path, loss, told):
    """The training loss of the event files, over the later half: one that departs, turns NaN or diverges takes the saving away."""
    first, *_ = run(tmp_path / "first", losses=[("train_loss", falling(1.0)), ("val_loss", falling(9.0))])
    second, *_ = run(tmp_path / "second", watts=200.0, losses=[("val_loss", falling(1.0)), ("train_loss", loss)])
    found = compare_runs([first, second])
    assert told in found.departure("second")
    assert bool(found.departure("second")) == bool(told)
    assert (found.saving("second", planned_tokens=1e6) is None) == bool(told)
    assert found.losses["second"].tag == "train_loss"
    assert not any("losses not compared" in warning for warning in found.warnings)
    assert (found.losses["second"].first_step, found.losses["second"].last_step) in {(30, 59), (0, 59)}
    json.dumps(found.to_dict(), allow_nan=False)
    page = printed(160, lambda out: [out.print(part) for part in comparison_parts(found, Plan(tokens=1e6))])
    assert ("no saving is claimed" in page) == bool(told)
    assert ("loss within 2 %" in page) != bool(told)


def test_losses_are_found_below_the_runs_directory(tmp_path):
    """Where the Hugging Face Trainer logs them, in ``runs/…`` of its output_dir; the newest, and not those of a run that lies within."""
    from torch.utils.tensorboard import SummaryWriter

    def logged(folder, loss, newest=True):
        with SummaryWriter(folder) as writer:
            for step in range(40):
                writer.add_scalar("train/loss", loss, step)
        if not newest:
            (file,) = Path(folder).glob("events.out.tfevents.*")
            file.rename(file.with_name(f"events.out.tfevents.1000000000{file.name[len('events.out.tfevents.') + 10 :]}"))

    for name, loss in (("a", 1.0), ("b", 50.0)):
        run(tmp_path / name)
        logged(tmp_path / name / "runs" / "Nov25_12-00-00_vm", loss)
        logged(tmp_path / name / "runs" / "Nov26_09-00-00_vm", 7.0, newest=False)
        run(tmp_path / name / "within", losses=[("train/loss", lambda _: 3.0)])
    found = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert (found.losses["b"].baseline, found.losses["b"].own) == (1.0, 50.0)
    assert found.departure("b").startswith("not the same training: train/loss 50 against 1")


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ((), (), "the runs hold no scalar that is named like a loss"),
        ([("loss", falling(1.0))], [("train_loss", falling(1.0))], "no loss under one name"),
        ([("loss", falling(1.0))], [], "no loss under one name"),
        ([("loss", lambda step: 1.0)], [("loss", lambda step: 1.0)], "fewer than 5 points"),
    ],
)
def test_losses_that_are_not_compared(tmp_path, first, second, told):
    """It is said, with the reason; energy is compared all the same."""
    runs = [run(tmp_path / name, losses=losses, steps=8)[0] for name, losses in (("a", first), ("b", second))]
    found = compare_runs(runs)
    assert any("losses not compared" in warning and told in warning for warning in found.warnings)
    assert found.losses == {}
    assert found.departure("b") == ""
    assert "losses not compared" in printed(160, lambda out: [out.print(part) for part in comparison_parts(found, None)])


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model": "ResNet"}, "the model is ResNet against GPT"),
        ({"parameters": 7}, "parameters are 7 against 1,000"),
        ({"device": "NVIDIA L4"}, "the device is NVIDIA L4"),
        ({"world_size": 8}, "processes are 8 against 1"),
    ],
)
def test_other_models_and_devices_are_refused(base, copy, tmp_path, fields, told):
    """The reason is named, and --force compares all the same, says so and claims no saving."""
    known = {"model": "GPT", "parameters": 1000, "device": "NVIDIA A100", "world_size": 1}
    first = edited(Path(shutil.copytree(base[0], tmp_path / "first")), label="first", **known)
    edited(copy, label="second", **(known | fields))
    with pytest.raises(ArgumentError, match="--force") as raised:
        compare_runs([first, copy])
    assert told in str(raised.value)
    forced = compare_runs([first, copy], force=True)
    assert told in forced.departure("second")
    assert forced.to_dict()["differences"]["second"]["departure"].startswith("not comparable")
    assert compare_runs([first, edited(copy, **known)]).departure("second") == ""


def by_rapl(folder, joules_a_step):
    """A run by the real RAPL meter over counters in files, its model on this machine's CPU."""
    zone = folder.parent / f"{folder.name} powercap" / "intel-rapl:0"
    zone.mkdir(parents=True)
    for name, text in (("name", "package-0"), ("energy_uj", "0"), ("max_energy_range_uj", "262143328850")):
        (zone / name).write_text(f"{text}\n")
    clock, model = ScriptedClock(), torch.nn.Linear(4, 4)
    ((meter,), _) = open_meters(zone.parent, now_ns=clock.now_ns)
    with green_torch.track(model, log_dir=folder, clock=clock, meters=[meter], intensity=100.0, peak_flop_per_s=1e9) as tracker:
        for step in range(30):
            clock.advance(0.25)
            (zone / "energy_uj").write_text(f"{int(joules_a_step * (step + 0.5) * 1e6)}\n")
            clock.advance(0.25)
            (zone / "energy_uj").write_text(f"{int(joules_a_step * (step + 1) * 1e6)}\n")
            tracker.step(tokens=TOKENS)
    return folder


def on(folder, cpu, zone=None):
    """The run as of a machine with another CPU; ``zone``: what its meter calls it, as older versions did by RAPL's own name."""
    _, lines = lines_of(folder)
    return edited(folder, device=cpu, domains=[domain | {"device": zone or cpu} for domain in lines[0]["domains"]])


def test_another_cpu_is_refused(tmp_path):
    """Under RAPL too: a Xeon's joules are not an EPYC's. Files that don't name the CPU are compared, and that is told."""
    base, other = by_rapl(tmp_path / "base", 100.0), by_rapl(tmp_path / "other", 80.0)
    assert lines_of(base)[1][0]["domains"][0]["device"] == lines_of(base)[1][0]["device"] == cpu_name()
    assert compare_runs([base, other]).energy("other").estimate == pytest.approx(-0.2, abs=0.02)
    assert not any("not checked" in warning for warning in compare_runs([base, other]).warnings)
    on(base, "AMD EPYC 9654 96-Core Processor")
    with pytest.raises(
        ArgumentError, match=r"the device is Intel Xeon against AMD EPYC.*metered are Intel Xeon against AMD EPYC"
    ):
        compare_runs([base, on(other, "Intel Xeon")])
    found = compare_runs([base, on(other, "x86_64", "package-0")])
    assert found.departure("other") == ""
    for what in ("device", "cpu's name"):
        assert f"not checked, since not recorded: {what} of {other}" in found.warnings


def test_another_batch_is_refused(base, tmp_path):
    """Twice the tokens a step is another training."""
    other, *_ = run(tmp_path / "other", tokens=2 * TOKENS)
    with pytest.raises(ArgumentError, match="200 tokens a step against 100"):
        compare_runs([base[0], other])


def test_another_kind_of_meter_is_refused(base, tmp_path):
    """Counted joules are not compared with modelled ones."""
    other, *_ = run(tmp_path / "other", method=Method.ESTIMATED)
    with pytest.raises(ArgumentError, match="joules are known by gpu by estimated against gpu by counter"):
        compare_runs([base[0], other])


def test_another_basis_needs_one_region(tmp_path):
    """A lifecycle and a direct figure make no comparison of grams, unless one region is given for both."""
    runs = [run(tmp_path / code, intensity=None, region=code, steps=20)[0] for code in ("FR", "US-CA")]
    with pytest.raises(ArgumentError, match="direct, average against lifecycle, average"):
        compare_runs(runs)
    assert compare_runs(runs, region="DE").baseline.manifest.intensity.region == "DE"


def test_what_is_not_recorded_is_said(base, tmp_path):
    """Without a model in track() nobody can check it: the result says so, and is given."""
    other, *_ = run(tmp_path / "other")
    assert any("model" in warning for warning in compare_runs([base[0], other]).warnings)


def test_modelled_joules_follow_from_time(tmp_path):
    """Where every joule is estimated the headline is time."""
    runs = [run(tmp_path / name, method=Method.ESTIMATED)[0] for name in ("a", "b")]
    found = compare_runs(runs)
    assert found.headline == "time"
    assert found.energy("b").instrument_lo is None


def test_warm_up_and_counted_steps_are_left_out(copy):
    """The first three steps, and those in which FLOPs were counted, are in no block."""
    file, lines = lines_of(copy)
    for line in lines:
        if line["type"] == "record" and line["step"] in {0, 8}:
            line["flags"] = ["counted"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ((rank,),) = _read(copy).starts
    assert [one.record.step for one in rank.kept] == [*range(3, 8), *range(9, 60)]


def test_ranks_are_one_run(base, copy):
    """Two ranks: joules and tokens add up, seconds and steps don't."""
    file, lines = lines_of(copy)
    for line in lines:
        for item in (line, line.get("manifest", {})):
            if "rank" in item:
                item["rank"] = 1
    file.with_name(file.name.replace("rank-00000", "rank-00001")).write_text("".join(json.dumps(line) + "\n" for line in lines))
    one, two = compare_runs([base[0], copy], force=True).baseline, compare_runs([copy, base[0]], force=True).baseline
    assert two.step_time_s == pytest.approx(one.step_time_s)
    assert two.energy_per_step_j == pytest.approx(2 * one.energy_per_step_j)
    assert two.energy_per_token_j == pytest.approx(one.energy_per_token_j)
    assert two.n_steps == one.n_steps


def test_records_without_joules_are_left_out_and_told(base, copy):
    """A meter that missed a few records does not take the run's joules away."""
    file, lines = lines_of(copy)
    for line in [line for line in lines if line["type"] == "record"][20:24]:
        line["energy_j"] = line["energy_lo_j"] = line["energy_hi_j"] = None
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare_runs([base[0], edited(copy, label="other")])
    assert found.energy("other").estimate == pytest.approx(0.0, abs=0.02)
    assert found.result("other").n_steps == 57
    assert any("a meter failed in 2 of 20 stretches of its records" in warning for warning in found.warnings)


def test_a_meter_that_fails_on_the_way_saves_nothing(tmp_path):
    """What a second meter went on reading is not the run's energy: the rest of the run is compared, with its own bounds, and it is said."""
    base, other = (run(tmp_path / name, fails_at=at, noise=0.0)[0] for name, at in (("base", 1000), ("other", 30)))
    found = compare_runs([base, other])
    energy, result = found.energy("other"), found.result("other")
    assert energy.estimate == pytest.approx(0.0, abs=0.02)
    assert energy.instrument_lo < energy.estimate < energy.instrument_hi
    assert energy.instrument_hi - energy.instrument_lo < 0.1
    assert result.power_w == pytest.approx(400.0, rel=0.02)
    assert found.time("other").n_blocks == 20
    assert result.n_steps == 57
    (told,) = [one for one in found.warnings if "a meter failed (gpu0) in 11 of 20 stretches of its records" in one]
    assert told.startswith(str(other))
    assert told in " ".join(printed(400, lambda out: [out.print(part) for part in comparison_parts(found)]).split())


def test_a_meter_that_fails_at_once_leaves_no_energy(tmp_path):
    """No joules are told, and no saving of them; time is."""
    base, other = (run(tmp_path / name, fails_at=at)[0] for name, at in (("base", 1000), ("other", 1)))
    found = compare_runs([base, other])
    assert found.energy("other") is None
    assert found.result("other").energy_per_token_j is None
    assert found.saving("other", planned_tokens=1e6).energy_kwh is None
    assert found.time("other") is not None
    assert any("in 20 of 20 stretches" in warning for warning in found.warnings)
    page = printed(200, lambda out: [out.print(part) for part in comparison_parts(found)])
    assert "other and base: no energy to compare." in page


def test_the_newest_of_several_runs_is_compared(base, tmp_path):
    """A directory that was used again holds two runs, and their mean is neither: the newest is compared, by its own losses, and it is said."""
    reused = tmp_path / "reused"
    run(reused, watts=600.0, start_s=time.time() - 1000.0, losses=[("loss", lambda _: 9.0)])
    run(reused, watts=200.0, start_s=time.time() - 1.0, losses=[("loss", lambda _: 1.0)])  # its clock begins a second on
    run(tmp_path / "base", losses=[("loss", lambda _: 1.0)])
    found = compare_runs([tmp_path / "base", reused])
    assert found.result("reused").power_w == pytest.approx(200.0, rel=0.02)
    assert found.result("reused").n_steps == 57
    assert found.losses["reused"].own == 1.0
    ids = [read_jsonl(file).manifest.run_id for file, *_ in run_files(reused)]
    (told,) = [one for one in found.warnings if "holds 2 runs" in one]
    assert f"the newest, {ids[1]}, is compared, and not {ids[0]}" in told
    run(reused, steps=2, start_s=time.time())  # one that came to nothing
    assert compare_runs([base[0], reused]).result("reused").power_w == pytest.approx(200.0, rel=0.02)


def test_a_resumed_run_is_one(base, tmp_path):
    """Its starts bear one run id, and count together."""
    folder = tmp_path / "resumed"
    run(folder)
    manifest = read_jsonl(lines_of(folder)[0]).manifest
    state = {"run_id": manifest.run_id, "segment": 1, "step": 59, "log_dir": str(folder), "steps_done": 60}
    run(folder, start_s=1_700_001_000.0, resumed=state)
    found = compare_runs([base[0], folder])
    assert found.result("resumed").n_steps == 2 * 57
    assert not any("runs: the newest" in warning for warning in found.warnings)


def test_one_rank_meters_a_node_for_all(monkeypatch, tmp_path):
    """The other ranks of a CPU job know no joules: those of the node are the job's."""
    folders = [ranks(monkeypatch, tmp_path / f"{watts:g}", (watts, watts), domain="cpu", noise=0.0) for watts in (100.0, 80.0)]
    found = compare_runs(folders)
    assert found.energy("80").estimate == pytest.approx(-0.2, abs=0.01)
    assert found.energy("80").instrument_lo < -0.2 < found.energy("80").instrument_hi
    assert found.baseline.power_w == pytest.approx(100.0, rel=0.02)
    assert found.baseline.energy_per_token_j == pytest.approx(100.0 * 0.5 / (2 * TOKENS), rel=0.02)


def test_a_gpu_of_several_ranks_counts_once(monkeypatch, tmp_path):
    """Two ranks on one GPU meter the same joules, by its UUID."""
    shared = {"domain": "gpu0", "sensor": {"uuid": "GPU-1"}}
    folders = [ranks(monkeypatch, tmp_path / f"{watts:g}", (watts, watts), noise=0.0, **shared) for watts in (100.0, 80.0)]
    found = compare_runs(folders)
    assert found.baseline.power_w == pytest.approx(100.0, rel=0.02)
    assert found.energy("80").estimate == pytest.approx(-0.2, abs=0.01)


def test_ranks_that_are_missing_are_told(monkeypatch, tmp_path):
    """What half of a job did on another node's disk is in no figure."""
    folders = [ranks(monkeypatch, tmp_path / name) for name in ("a", "b")]
    for folder in folders:
        run_files(folder)[1][0].unlink()
    assert any("b: 1 of 2 ranks left no train step that counts" in warning for warning in compare_runs(folders).warnings)


def test_more_ranks_per_step(monkeypatch, tmp_path):
    """Where no units are counted, joules and their bounds are of a step of all ranks: two take twice what one does."""
    one, *_ = run(tmp_path / "one", tokens=None, noise=0.0)
    found = compare_runs([one, ranks(monkeypatch, tmp_path / "two", tokens=None, noise=0.0)], force=True)
    energy = found.energy("two")
    assert energy.estimate == pytest.approx(1.0, abs=0.01)
    assert energy.instrument_lo <= energy.estimate <= energy.instrument_hi
    assert energy.instrument_hi - energy.instrument_lo < 0.1


def test_ranks_that_came_and_went(monkeypatch, tmp_path):
    """Two ranks at first, then one: seconds are the sum of both starts', and watts the mean of 600 and 300."""
    folder = ranks(monkeypatch, tmp_path / "elastic", noise=0.0)
    manifest = read_jsonl(run_files(folder)[0][0]).manifest
    state = {"run_id": manifest.run_id, "segment": 1, "step": 59, "log_dir": str(folder), "steps_done": 60}
    run(folder, start_s=1_700_001_000.0, resumed=state, noise=0.0)
    alone, *_ = run(tmp_path / "alone", noise=0.0)
    elastic = compare_runs([alone, folder], force=True).result("elastic")
    assert elastic.n_steps == 2 * 57
    assert elastic.duration_s == pytest.approx(2 * 57 * 0.5)
    assert elastic.power_w == pytest.approx((600.0 + 300.0) / 2, rel=0.01)
    assert elastic.step_time_s == pytest.approx(0.5)
    assert elastic.energy_per_token_j == pytest.approx(300.0 * 0.5 / TOKENS, rel=0.01)


def test_other_nodes_have_other_sensors(base, copy, tmp_path):
    """A gain error cancels on one machine; on two it counts in full, and a small difference is none."""

    def with_gain(folder, node, label):
        _, lines = lines_of(folder)
        domains = [domain | {"gain_error": 0.05} for domain in lines[0]["domains"]]
        return edited(folder, domains=domains, job={"node": node}, label=label)

    first = with_gain(Path(shutil.copytree(base[0], tmp_path / "first")), "n1", "first")
    other = run(tmp_path / "other", watts=288.0, noise=0.0)[0]
    same = compare_runs([first, with_gain(other, "n1", "other")]).energy("other")
    apart = compare_runs([first, with_gain(other, "n2", "other")]).energy("other")
    assert same.gain_lo == pytest.approx(same.gain_hi)
    assert apart.gain_lo < 0 < apart.gain_hi
    assert same.distinguishable
    assert not apart.distinguishable


def test_a_gain_error_counts_beside_a_sensor_that_states_none(base, copy, tmp_path):
    """On one node, and on two: what is stated counts, and the other sensor is taken at face value."""

    def with_host(folder, share, node, label):
        file, lines = lines_of(folder)
        for line in lines:
            for domain in line.get("domains", []):
                if line["type"] == "record":
                    host = domain | {
                        "name": "cpu",
                        **{key: domain[key] * (1 - share) for key in domain if key.startswith("energy")},
                    }
                    line["domains"] = [domain | {key: domain[key] * share for key in domain if key.startswith("energy")}, host]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (gpu,) = lines[0]["domains"]
        domains = [gpu | {"gain_error": 0.05}, gpu | {"name": "cpu", "gain_error": None}]
        return edited(folder, domains=domains, job={"node": node}, label=label)

    first = with_host(Path(shutil.copytree(base[0], tmp_path / "first")), 0.9, "n1", "first")
    same = compare_runs([first, with_host(copy, 0.5, "n1", "other")]).energy("other")
    shifts = [(0.5 * gain + 0.5) / (0.9 * gain + 0.1) for gain in (1.05, 0.95)]
    assert (same.gain_lo, same.gain_hi) == pytest.approx([(1 + same.estimate) * shift - 1 for shift in shifts])
    apart = compare_runs([first, edited(copy, job={"node": "n2"})]).energy("other")
    shifts = [(0.5 * gain + 0.5) / (0.9 * (2 - gain) + 0.1) for gain in (0.95, 1.05)]
    assert (apart.gain_lo, apart.gain_hi) == pytest.approx([(1 + apart.estimate) * shift - 1 for shift in shifts])


@pytest.mark.parametrize(
    ("uuids", "nodes", "cancels"),
    [
        (("GPU-1", "GPU-1"), ("", ""), True),
        (("GPU-1", "GPU-2"), ("", ""), False),
        (("GPU-1", "GPU-2"), ("n1", "n1"), False),
        (("GPU-1", "GPU-1"), ("n1", "n2"), True),
        (("", ""), ("n1", "n1"), True),
        (("", ""), ("", ""), False),
        (("GPU-1", ""), ("n1", "n1"), False),
    ],
)
def test_a_gain_error_cancels_of_one_sensor_alone(tmp_path, uuids, nodes, cancels):
    """That is known by the device's UUID, else by its name on one node; of two cards, or what may be two, each has its own."""
    folders = []
    for name, watts, uuid, node in zip(("a", "b"), (300.0, 291.0), uuids, nodes, strict=True):
        folder, *_ = run(tmp_path / name, watts, noise=0.001, sensor={"uuid": uuid, "gain_error": 0.05})
        folders.append(edited(folder, job={"node": node} if node else {}))
    energy = compare_runs(folders).energy("b")
    assert energy.distinguishable == cancels
    shifts = (1.0, 1.0) if cancels else (0.95 / 1.05, 1.05 / 0.95)
    assert (energy.gain_lo, energy.gain_hi) == pytest.approx([(1 + energy.estimate) * shift - 1 for shift in shifts])


def test_runs_of_one_name_are_told_apart(base, copy):
    """By their folders."""
    names = [result.name for result in compare_runs([base[0], copy]).results]
    assert len(set(names)) == 2
    assert names[1].endswith("copy")


def test_several_runs_share_the_error_rate(base, tmp_path):
    """Each of two intervals is wider than one alone would be."""
    others = [run(tmp_path / name, watts=250.0)[0] for name in ("a", "b")]
    alone, both = compare_runs([base[0], others[0]]).energy("a"), compare_runs([base[0], *others]).energy("a")
    assert both.n_compared == 2
    assert both.hi - both.lo > alone.hi - alone.lo


def test_a_saving_is_the_first_runs_projection_times_the_difference(base, tmp_path):
    """With low and high, in kWh at the device and at the meter, hours and grams."""
    other, *_ = run(tmp_path / "other", watts=250.0)
    found = compare_runs([base[0], other])
    saving = found.saving("other", planned_tokens=3.6e9)
    base_kwh = found.baseline.energy_per_token_j * 3.6e9 / 3.6e6
    assert saving.energy_kwh.value == pytest.approx(-found.energy("other").estimate * base_kwh)
    assert saving.facility_energy_kwh.value == pytest.approx(1.2 * saving.energy_kwh.value)
    assert saving.emissions_g.value == pytest.approx(1.2 * saving.energy_kwh.value * 100.0)
    assert saving.energy_kwh.lo < saving.energy_kwh.value < saving.energy_kwh.hi


def test_json_is_complete_and_finite(base, tmp_path):
    """Everything found goes into JSON, with the runs' directories."""
    other, *_ = run(tmp_path / "other", watts=250.0)
    read = json.loads(json.dumps(compare_runs([base[0], other]).to_dict(), allow_nan=False))
    assert [one["path"] for one in read["results"]] == [str(base[0]), str(other)]
    assert read["results"][0]["final_loss"] is None
    assert "variant" not in read["results"][0]


def test_what_is_no_run_is_told(base, tmp_path):
    """An empty directory, one that holds runs one level down, a run too short, a file that is not ours, one run alone."""
    with pytest.raises(ArgumentError, match="holds no run"):
        compare_runs([tmp_path, base[0]])
    with pytest.raises(ArgumentError, match=r"runs within: .*base"):
        compare_runs([Path(base[0]).parent, base[0]])
    short, *_ = run(tmp_path / "short", steps=3)
    with pytest.raises(ArgumentError, match="no train step beyond its first 3"):
        compare_runs([base[0], short])
    with pytest.raises(ArgumentError, match="two runs or more"):
        compare_runs([base[0]])
    (tmp_path / "other" / "green").mkdir(parents=True)
    (tmp_path / "other" / "green" / "rank-00000.segment-0001.jsonl").write_text("{}\n")
    with pytest.raises(LedgerError):
        compare_runs([base[0], tmp_path / "other"])


def test_one_block_gives_no_finding(base, tmp_path):
    """A run with a single record that counts has no scatter."""
    short, *_ = run(tmp_path / "short", steps=4)
    found = compare_runs([base[0], short]).time("short")
    assert found.lo is None
    assert "one block" in found.note


def test_the_live_saving_is_the_hand_computed_one(tmp_path):
    """In training against a baseline on disk: (4 - 3 J/token) x 10 tokens x 1,000 steps x PUE x intensity, on every record and in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    base, *_ = run(tmp_path / "base", watts=400.0, step_s=0.1, tokens=10, noise=0.0, region="FR", intensity=None)
    own, *_ = run(
        tmp_path / "own",
        watts=300.0,
        step_s=0.1,
        tokens=10,
        noise=0.0,
        region="FR",
        intensity=None,
        baseline=base,
        planned_steps=1000,
    )
    _, lines = lines_of(own)
    g_per_kwh = lines[0]["intensity"]["g_per_kwh"]
    saved_g = (4.0 - 3.0) * 10 * 1000 / 3.6e6 * 1.2 * g_per_kwh
    assert lines[-1]["projected_savings_g"] == pytest.approx(saved_g, rel=0.03)
    lo_g, hi_g = lines[-1]["projected_savings_lo_g"], lines[-1]["projected_savings_hi_g"]
    assert lo_g <= saved_g <= hi_g
    assert 0 < lo_g < hi_g < 1.5 * saved_g
    events = EventAccumulator(str(own)).Reload()
    assert events.Scalars("green/projected_savings_gCO2e")[-1].value == pytest.approx(saved_g, rel=0.03)
    manifest = [line for line in lines if line["type"] == "manifest"][-1]
    assert manifest["baseline"].startswith("base (")
    assert manifest["intensity"]["region"] == "FR"
    after = compare_runs([base, own]).saving("own", planned_tokens=10_000)
    assert after.emissions_g.value == pytest.approx(saved_g, rel=0.03)
    assert after.emissions_g.lo <= saved_g <= after.emissions_g.hi


@pytest.mark.parametrize("estimated", ["base", "own"])
def test_a_live_saving_of_modelled_joules_has_no_bounds(tmp_path, estimated):
    """Where either run's joules are modelled, nothing bounds the saving, and the summary says so."""
    methods = {name: Method.ESTIMATED if name == estimated else Method.COUNTER for name in ("base", "own")}
    base, *_ = run(tmp_path / "base", watts=400.0, method=methods["base"])
    with pytest.warns(GreenTorchWarning, match="none of like with like: joules are known by"):
        own, *_ = run(tmp_path / "own", baseline=base, planned_steps=1000, method=methods["own"])
    summary = read_jsonl(lines_of(own)[0]).summary
    assert summary.projected_savings_g > 0
    assert (summary.projected_savings_lo_g, summary.projected_savings_hi_g) == (None, None)
    assert "bounds unknown" in str(summary)


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({}, ["the length of the run is not known: give planned_steps="]),
        (
            {"planned_steps": 100, "tokens": None},
            ["joules are per token, and this run counts none: say tracker.step(tokens=n)"],
        ),
        ({"tokens": None}, ["planned_steps=", "tracker.step(tokens=n)"]),
        ({"planned_steps": 100}, []),
    ],
)
def test_a_live_saving_that_can_not_be_told_is_said(base, tmp_path, own, told):
    """Once, with the line that mends it; where nothing is missing nothing is said, and there is a saving."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        folder, *_ = run(tmp_path / "own", baseline=base[0], steps=10, **own)
    found = [str(one.message) for one in said if "baseline" in str(one.message)]
    assert len(found) == bool(told)
    summary = read_jsonl(lines_of(folder)[0]).summary
    assert [one for one in summary.warnings if "baseline" in one] == found
    assert all(part in found[0] for part in told)
    assert (summary.projected_savings_g is None) == bool(told)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model": "ResNet"}, "the model is Linear against ResNet"),
        ({"parameters": 7}, "parameters are 20 against 7"),
        ({"device": "NVIDIA L4"}, "against NVIDIA L4"),
        ({"world_size": 2}, "processes are 1 against 2"),
        ({"device": "x86_64", "model": ""}, ""),
        ({}, ""),
    ],
)
def test_a_baseline_of_another_kind_is_told(base, copy, tmp_path, fields, told):
    """A run of another model, device or number of processes is held against all the same, with one warning and the reason."""
    edited(copy, **({"model": "Linear", "parameters": 20, "device": cpu_name()} | fields))
    if "world_size" in fields:
        first, _ = lines_of(copy)
        second = first.read_text().replace('"rank": 0', '"rank": 1')
        first.with_name(first.name.replace("rank-00000", "rank-00001")).write_text(second)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        folder, *_ = run(
            tmp_path / "own", model=torch.nn.Linear(4, 4), flops_per_step=1.0, baseline=copy, planned_steps=100, steps=10
        )
    found = [str(one.message) for one in said if "like with like" in str(one.message)]
    assert len(found) == bool(told)
    assert all(told in one and "Give baseline=" in one for one in found)
    summary = read_jsonl(lines_of(folder)[0]).summary
    assert summary.projected_savings_g is not None
    assert set(found) <= set(summary.warnings)


def test_a_baseline_by_another_kind_of_meter_is_told(tmp_path):
    """Modelled joules against counted ones make no saving of like with like."""
    base, *_ = run(tmp_path / "base", method=Method.ESTIMATED)
    with pytest.warns(GreenTorchWarning, match="joules are known by gpu by counter against gpu by estimated"):
        run(tmp_path / "own", baseline=base, planned_steps=100, steps=10)
