"""A snapshot is whole, small and exact, whatever the run holds."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from green_torch.records import Domain, DomainEnergy, Flag, Method, Phase, PhaseTotals, RunTotals
from green_torch.sinks.snapshot import MAX_BLOCKS, MAX_BYTES, SnapshotBuilder
from tests.test_sinks_codec import MANIFEST, make_record, make_summary

SUMS = ("n_steps", "duration_s", "samples", "tokens", "energy_j", "model_flops", "hardware_flops", "emissions_g")


def no_constant(name):
    raise AssertionError(f"{name} in JSON")


def parse(builder):
    """The snapshot as JSON, with each block as a dictionary."""
    built = builder.build()
    assert len(built) <= MAX_BYTES
    snapshot = json.loads(built, parse_constant=no_constant)
    snapshot["blocks"] = [dict(zip(snapshot["columns"], row, strict=True)) for row in snapshot["blocks"]]
    return snapshot


def after(records, manifest=MANIFEST):
    builder = SnapshotBuilder(manifest)
    for record in records:
        builder.add(record)
    return builder


def test_a_short_run_reads_back_record_by_record():
    """Up to 200 records each has its own block, with its steps, seconds, energy and bounds."""
    snapshot = parse(after([make_record(step) for step in (1, 2, 3)]))
    assert snapshot["schema"] == 1
    assert snapshot["status"] == "running"
    assert snapshot["manifest"]["run_name"] == "bf16"
    assert snapshot["last_step"] == 3
    assert [phase["phase"] for phase in snapshot["phases"]] == ["train", "other"]
    assert snapshot["totals"]["energy_j"] == 90.0
    assert snapshot["blocks"][1] == {
        "first_step": 2,
        "last_step": 2,
        "n_steps": 1,
        "start_s": 0.1,
        "end_s": 0.2,
        "duration_s": 0.1,
        "samples": 8,
        "tokens": 8192,
        "energy_j": 30.0,
        "energy_lo_j": 29.0,
        "energy_hi_j": 31.0,
        "model_flops": 7e12,
        "hardware_flops": 8e12,
        "emissions_g": 1e-3,
        "unmetered_steps": 0,
        "uncounted_steps": 0,
        "excluded_steps": 0,
        "capacity_flops": pytest.approx(98.9e12),
    }


def test_the_device_capacity_is_summed_where_flops_are_known():
    """MFU of a block is its model FLOPs over its capacity, which covers the same records."""
    records = [make_record(step, model_flops=None) if step % 2 else make_record(step) for step in range(1, 402)]
    block = parse(after(records))["blocks"][0]
    assert block["n_steps"] == 4
    assert block["uncounted_steps"] == 2
    assert block["model_flops"] / block["capacity_flops"] == pytest.approx(7e12 / 98.9e12)
    assert parse(after([make_record(peak_flop_per_s=None)]))["blocks"][0]["capacity_flops"] is None


def test_other_phases_are_told_with_their_times():
    """An evaluation stands under spans, at its seconds since the first record's start; the start itself is a Unix time."""
    builder = after([make_record(1), make_record(2), make_record(3, phase=Phase.EVAL, peak_memory_bytes=2**31)])
    snapshot = parse(builder)
    span = dict(zip(snapshot["span_columns"], snapshot["spans"][0], strict=True))
    assert span == {"phase": "eval", "step": 3, "start_s": 0.2, "end_s": 0.3, "energy_j": 30.0, "emissions_g": 1e-3}
    assert snapshot["n_spans"] == 1
    assert snapshot["origin_unix_s"] == pytest.approx(1_700_000_000.0)
    assert snapshot["peak_memory_bytes"] == 2**31


def test_a_phase_is_shown_without_what_was_suspended():
    """A record that was suspended for most of its time spans what it took, up to its end."""
    records = [make_record(1), make_record(2, phase=Phase.OTHER, start_ns=10**9, end_ns=11 * 10**9, duration_s=0.5)]
    snapshot = parse(after(records))
    span = dict(zip(snapshot["span_columns"], snapshot["spans"][0], strict=True))
    assert span["end_s"] - span["start_s"] == pytest.approx(0.5)
    assert span["end_s"] == pytest.approx(11 - records[0].start_ns / 1e9)


def test_of_many_phases_the_longest_are_kept_in_order():
    """However many short saves there are, there are at most 64 spans, in order, and the one long evaluation is among them."""
    records = [make_record(step, phase=Phase.SAVE) for step in range(1, 1000)]
    records[500] = make_record(501, phase=Phase.EVAL, start_ns=50_000_000_000, end_ns=50_100_000_001, duration_s=0.100000001)
    snapshot = parse(after(records))
    starts = [row[2] for row in snapshot["spans"]]
    assert 32 <= len(starts) <= 64
    assert starts == sorted(starts)
    assert snapshot["n_spans"] == 999
    assert "eval" in {row[0] for row in snapshot["spans"]}
    assert max(starts) > 90


@pytest.mark.parametrize("records", [200, 201, 400, 401, 5000])
def test_blocks_stay_few_even_and_in_order(records):
    """However long the run, there are at most 200 blocks, they follow each other, and all but the last are of one width."""
    blocks = parse(after([make_record(step) for step in range(1, records + 1)]))["blocks"]
    assert MAX_BLOCKS / 2 < len(blocks) <= MAX_BLOCKS
    assert all(before["last_step"] + 1 == block["first_step"] for before, block in pairwise(blocks))
    assert blocks[0]["first_step"] == 1
    assert blocks[-1]["last_step"] == records
    assert len({block["n_steps"] for block in blocks[:-1]}) == 1
    assert blocks[-1]["n_steps"] <= blocks[0]["n_steps"]


unknown = st.none() | st.sampled_from([math.nan, math.inf])
known = st.floats(0, 1e6)
changes = st.fixed_dictionaries(
    {
        "n_steps": st.integers(1, 50),
        "duration_s": known,
        "samples": st.none() | st.integers(1, 1000),
        "tokens": st.none() | st.integers(1, 10**9),
        "energy_j": known | unknown,
        "bounded": st.booleans(),
        "model_flops": known | unknown,
        "hardware_flops": known | unknown,
        "emissions_g": known | unknown,
        "phase": st.sampled_from([Phase.TRAIN, Phase.TRAIN, Phase.TRAIN, Phase.EVAL]),
        "flags": st.sampled_from([(), (), (), (Flag.COUNTED,), (Flag.LATE, "meter_failed:gpu0")]),
    }
)


def drawn(all_changes):
    """Records of steps that follow each other, with the drawn fields; bounds at 0.9 and 1.2 of the energy where there are any."""
    step = 0
    for change in all_changes:
        values = dict(change)
        step += values["n_steps"]
        bounded, energy_j = values.pop("bounded"), values["energy_j"]
        bounds = (0.9 * energy_j, 1.2 * energy_j) if bounded and energy_j is not None else (None, None)
        yield replace(make_record(step), **values, energy_lo_j=bounds[0], energy_hi_j=bounds[1])


def total(values):
    """The sum of what is known and finite; ``None`` where nothing is."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(finite) if finite else None


def same(a, b):
    """Equal to nine digits, or both unknown."""
    return (a is None) == (b is None) and (a is None or math.isclose(a, b, rel_tol=1e-9))


@settings(max_examples=30, deadline=None)
@given(st.lists(changes, max_size=12), st.integers(1, 40))
def test_sums_are_conserved(all_changes, repeats):
    """Merged or not, the blocks and the excluded part add up to what the records hold, each record in exactly one of them."""
    records = list(drawn(all_changes * repeats))
    snapshot = parse(after(records))
    train = [record for record in records if record.phase is Phase.TRAIN]
    typical = [record for record in train if not record.flagged(Flag.COUNTED)]
    counted = [record for record in train if record.flagged(Flag.COUNTED)]
    blocks, excluded = snapshot["blocks"], snapshot["excluded"]
    for name in SUMS:
        assert same(total(block[name] for block in blocks), total(getattr(record, name) for record in typical))
        if counted:
            assert same(excluded[name], total(getattr(record, name) for record in counted))
    assert (excluded is None) == (not counted)
    if typical:
        assert sum(block["excluded_steps"] for block in blocks) == sum(record.n_steps for record in counted)
    unmetered = sum(record.n_steps for record in typical if record.energy_j is None or not math.isfinite(record.energy_j))
    assert sum(block["unmetered_steps"] for block in blocks) == unmetered
    for block in blocks:
        if block["energy_lo_j"] is not None:
            assert block["energy_lo_j"] <= block["energy_j"] * (1 + 1e-9)
            assert block["energy_j"] <= block["energy_hi_j"] * (1 + 1e-9)
    assert snapshot["flags"].get("meter_failed:gpu0", 0) == sum("meter_failed:gpu0" in record.flags for record in records)


def test_a_record_without_bounds_stands_at_face_value():
    """In one block with bounded records, an unbounded one adds its energy to both bounds; alone it has none."""
    records = [make_record(step) for step in range(1, 402)]
    records[0] = replace(records[0], energy_lo_j=None, energy_hi_j=None)
    assert parse(after(records[:1]))["blocks"][0]["energy_lo_j"] is None
    first = parse(after(records))["blocks"][0]
    assert (first["n_steps"], first["energy_lo_j"], first["energy_hi_j"]) == (4, 30 + 3 * 29, 30 + 3 * 31)


def test_the_summary_ends_it():
    """With the summary come its status, its totals and its means, once each."""
    record = make_record(5)
    builder = after([record])
    totals = replace(record.totals, energy_j=151.0)
    builder.summary(make_summary(record, status="failed", totals=totals, mfu=0.4, warnings=("no NVML",)))
    snapshot = parse(builder)
    assert snapshot["status"] == "failed"
    assert snapshot["totals"]["energy_j"] == 151.0
    assert snapshot["summary"]["mfu"] == 0.4
    assert snapshot["summary"]["warnings"] == ["no NVML"]
    assert "manifest" not in snapshot["summary"]


def test_a_newer_manifest_replaces_the_first():
    """A manifest written again is the one that counts."""
    builder = after([])
    builder.manifest(replace(MANIFEST, parameters=124_000_000))
    assert parse(builder)["manifest"]["parameters"] == 124_000_000


@pytest.mark.parametrize("letter", ["x", "\0", "😀", "\ud800", '"'])
def test_hostile_names_never_burst_it(letter):
    """10,000-character names in every string, thousands of list items and keys: at most 64 kB, and still JSON with all its keys."""
    long = letter * 10_000
    domains = tuple(Domain(f"{long}{number}", Method.COUNTER, long, long) for number in range(300))
    manifest = replace(
        MANIFEST,
        run_id=long,
        run_name=long,
        domains=domains,
        missing=(long,) * 1000,
        model=long,
        label=long,
        versions={f"{number}{long}": long for number in range(300)} | {"flags": "1", "versions": "2"},
        peaks=MANIFEST.peaks * 300,
    )
    energies = tuple(DomainEnergy(domain.name, 1 / 3, 1 / 3, 1 / 3, Method.COUNTER) for domain in domains)
    totals = RunTotals((PhaseTotals(Phase.TRAIN, energy_j=1 / 3),) * 300, energies)
    flags = tuple(f"{long}{number}" for number in range(300))
    numbers = {
        "energy_j": 1.2345678901234e-300,
        "duration_s": 1.2345678901234e-300,
        "tokens": 2**62,
        "samples": 2**62,
        "model_flops": 1e307 / 3,
    }
    builder = after([], manifest)
    for step in range(1, 500):
        builder.add(make_record(step, flags=flags if step == 7 else (), totals=totals, **numbers))
    builder.summary(make_summary(make_record(), manifest=manifest, totals=totals, warnings=(long,) * 1000))
    snapshot = parse(builder)
    assert set(snapshot["manifest"]) == set(parse(after([]))["manifest"])
    assert snapshot["blocks"]
    assert sum(block["n_steps"] for block in snapshot["blocks"]) == 499


def test_a_full_ordinary_snapshot_keeps_every_name():
    """200 blocks of real-looking numbers and an 8-GPU manifest fit without cutting anything."""
    domains = tuple(
        Domain(f"gpu{number}", Method.COUNTER, "NVIDIA H100 80GB HBM3", "NVML energy counter") for number in range(8)
    )
    manifest = replace(MANIFEST, domains=domains, model="GPT " * 20)
    records = [make_record(step, energy_j=30 + 1 / step, duration_s=0.1 + 1 / (7 * step)) for step in range(1, 201)]
    snapshot = parse(after(records, manifest))
    assert len(snapshot["blocks"]) == 200
    assert snapshot["manifest"]["model"] == "GPT " * 20
    assert len(snapshot["manifest"]["domains"]) == 8


def test_sums_that_overflow_are_unknown():
    """A sum past what a float can hold reads null, not Infinity."""
    snapshot = parse(
        after([make_record(step, model_flops=1.5e308, flags=(Flag.COUNTED,) * (step % 2)) for step in range(1, 500)])
    )
    assert snapshot["blocks"][0]["model_flops"] is None
    assert snapshot["excluded"]["model_flops"] is None
