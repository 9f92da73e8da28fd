"""Records survive the way to plain JSON and back; what is not ours is refused with the field's name."""

import json
import math
from dataclasses import fields, replace
from typing import get_type_hints

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from green_torch.errors import LedgerError
from green_torch.records import (
    SCHEMA_VERSION,
    DevicePeak,
    Domain,
    DomainEnergy,
    Embodied,
    IntensityPoint,
    Manifest,
    Method,
    Phase,
    PhaseTotals,
    RunSummary,
    RunTotals,
    StepRecord,
)
from green_torch.sinks.codec import from_dict, to_dict

MANIFEST = Manifest(
    run_id="5f1c",
    run_name="bf16",
    segment=1,
    rank=0,
    world_size=1,
    started_unix_ns=1_700_000_000_000_000_000,
    domains=(Domain("gpu0", Method.COUNTER, "NVIDIA H100 80GB HBM3", "NVML energy counter", 700.0, 1e-3, 0.1, 0.05),),
    missing=("dram: /sys/class/powercap is not readable",),
    intensity=IntensityPoint(56.0, "FR", "codecarbon 3.3.2", "lifecycle", year=2024),
    pue=1.2,
    pue_source="user",
    embodied=Embodied(164.0, "NVIDIA PCF"),
    peaks=(DevicePeak(989e12, "NVIDIA H100 80GB HBM3", "bfloat16", "datasheet", "NVIDIA"),),
    versions={"torch": "2.13.0"},
)


def make_record(step: int = 1, n_steps: int = 1, phase: Phase = Phase.TRAIN, **changes) -> StepRecord:
    """A record of 100 ms steps at 300 W, all it says derived from ``step`` and ``n_steps``."""
    energy_j = 30.0 * n_steps
    totals = PhaseTotals(phase, step, 0.1 * step, 8 * step, 8192 * step, 30.0 * step, 29.0 * step, 31.0 * step, 36.0 * step)
    domains = (DomainEnergy("gpu0", energy_j, energy_j - 1, energy_j + 1, Method.COUNTER),)
    run = RunTotals(
        (totals, PhaseTotals(Phase.OTHER)),
        domains,
        0.1 * step,
        30.0 * step,
        emissions_g=1e-3 * step,
        facility_energy_j=36.0 * step,
    )
    record = StepRecord(
        step=step,
        n_steps=n_steps,
        phase=phase,
        rank=0,
        segment=1,
        start_ns=(step - n_steps) * 100_000_000,
        end_ns=step * 100_000_000,
        time_unix_ns=1_700_000_000_000_000_000 + step * 100_000_000,
        duration_s=0.1 * n_steps,
        samples=8 * n_steps,
        tokens=8192 * n_steps,
        energy_j=energy_j,
        energy_lo_j=energy_j - 1,
        energy_hi_j=energy_j + 1,
        facility_energy_j=energy_j * 1.2,
        domains=domains,
        power_w=300.0,
        model_flops=7e12 * n_steps,
        hardware_flops=8e12 * n_steps,
        peak_flop_per_s=989e12,
        mfu=0.4,
        hfu=0.5,
        intensity_g_per_kwh=56.0,
        operational_g=9e-4 * n_steps,
        embodied_g=1e-4 * n_steps,
        emissions_g=1e-3 * n_steps,
        peak_memory_bytes=2**30,
        flags=(),
        totals=run,
    )
    return replace(record, **changes)


def make_summary(record: StepRecord, **changes) -> RunSummary:
    """The end of a run whose last record this is."""
    summary = RunSummary(MANIFEST, "completed", record.step, record.step, record.totals, n_steps=record.step, flags={"late": 1})
    return replace(summary, **changes)


def items(numbers):
    """Manifests, records and summaries with every field drawn by its type."""
    texts, optional = st.text(max_size=8), lambda strategy: st.none() | strategy
    counts = st.integers(0, 2**40)
    parts = {float: numbers, str: texts, int: counts, float | None: optional(numbers), int | None: optional(counts)}

    def build(cls, **known):
        """The class with its fields drawn from ``known`` by name, else from ``parts`` by type, else by Hypothesis."""
        hints = get_type_hints(cls)
        strategies = {field.name: parts[hints[field.name]] for field in fields(cls) if hints[field.name] in parts}
        return st.builds(cls, **strategies | known)

    domain, energy, phase = build(Domain), build(DomainEnergy), build(PhaseTotals)
    short = lambda strategy: st.lists(strategy, max_size=2).map(tuple)  # noqa: E731
    totals = build(RunTotals, phases=short(phase), domains=short(energy))
    manifest = build(
        Manifest,
        domains=short(domain),
        missing=short(texts),
        intensity=optional(build(IntensityPoint)),
        embodied=optional(build(Embodied)),
        peaks=short(build(DevicePeak)),
        versions=st.dictionaries(texts, texts, max_size=2),
        schema_version=st.just(SCHEMA_VERSION),
    )
    record = build(StepRecord, domains=short(energy), flags=short(texts), totals=totals)
    summary = build(
        RunSummary, manifest=manifest, totals=totals, flags=st.dictionaries(texts, counts, max_size=2), warnings=short(texts)
    )
    return manifest | record | summary


FINITE = items(st.floats(allow_nan=False, allow_infinity=False))
ANY = items(st.floats())
QUICK = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@QUICK
@given(FINITE)
def test_every_record_comes_back_as_it_went(item):
    """JSON text and back gives an equal record, whatever its fields hold."""
    assert from_dict(json.loads(json.dumps(to_dict(item), allow_nan=False))) == item


@QUICK
@given(ANY)
def test_what_is_not_finite_becomes_null(item):
    """NaN and infinities are written as null, and a second passage changes nothing."""
    plain = to_dict(item)
    assert to_dict(from_dict(json.loads(json.dumps(plain, allow_nan=False)))) == plain


def test_null_reads_as_unknown_or_nan():
    """A null is ``None`` where a field may be unknown, and NaN where it must be a number."""
    plain = to_dict(replace(MANIFEST, pue=math.nan, price_per_kwh=math.inf))
    assert plain["pue"] is None
    read = from_dict(plain)
    assert isinstance(read, Manifest)
    assert math.isnan(read.pue)
    assert read.price_per_kwh is None


@pytest.mark.parametrize(
    ("item", "name"), [(MANIFEST, "manifest"), (make_record(), "record"), (make_summary(make_record()), "summary")]
)
def test_type_comes_first(item, name):
    """Each dictionary names its type under its first key."""
    assert next(iter(to_dict(item).items())) == ("type", name)


def test_numpy_numbers_are_plain_numbers():
    """A NumPy count or value is written as the number it is."""
    numpy = pytest.importorskip("numpy")
    plain = to_dict(make_record(tokens=numpy.int64(5), energy_j=numpy.float32(2.5), mfu=numpy.float64("nan")))
    assert (type(plain["tokens"]), plain["tokens"]) == (int, 5)
    assert (type(plain["energy_j"]), plain["energy_j"]) == (float, 2.5)
    assert plain["mfu"] is None


def test_foreign_object_is_refused():
    """What JSON can't carry raises, naming its type."""
    with pytest.raises(TypeError, match="object"):
        to_dict(make_record(tokens=object()))


def test_unknown_keys_are_ignored_at_every_level():
    """A newer minor version's extra keys don't disturb."""
    plain = json.loads(json.dumps(to_dict(make_record())))
    plain["colour"] = "green"
    plain["totals"]["phases"][0]["colour"] = "green"
    assert from_dict(plain) == make_record()


def test_absent_optional_keys_read_as_their_defaults():
    """A key that may be unknown, or has a default, may be missing."""
    plain = to_dict(make_record())
    del plain["mfu"], plain["projected_total_g"]
    assert from_dict(plain) == make_record(mfu=None)


@pytest.mark.parametrize(
    "wrap", [lambda manifest: manifest, lambda manifest: to_dict(make_summary(make_record())) | {"manifest": manifest}]
)
def test_newer_schema_is_refused(wrap):
    """A newer schema version raises and says what to type, also inside a summary and before any other complaint."""
    manifest = {"type": "manifest", "schema_version": 2}
    with pytest.raises(LedgerError, match="pip install --upgrade"):
        from_dict(wrap(manifest))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("step", "one", "step: expected a whole number"),
        ("step", True, "step: expected a whole number"),
        ("step", None, "step: expected a whole number"),
        ("duration_s", "long", "duration_s: expected a number"),
        ("duration_s", 10**400, "duration_s: expected a number"),
        ("phase", "lunch", "phase: 'lunch' is not one of train"),
        ("phase", [], "phase: "),
        ("flags", "late", "flags: expected a list"),
        ("flags", [1], "flags: expected a string"),
        ("totals", [], "totals: expected an object"),
        ("totals", {"phases": [{"phase": 3}]}, "totals: phases: phase: 3 is not one of"),
    ],
)
def test_wrong_fields_are_named(key, value, message):
    """A field of the wrong type raises with its path."""
    with pytest.raises(LedgerError, match=message):
        from_dict(to_dict(make_record()) | {key: value})


def test_missing_field_is_named():
    """A field that must be there and is not raises with its name."""
    plain = to_dict(make_record())
    del plain["step"]
    with pytest.raises(LedgerError, match="step: missing"):
        from_dict(plain)


@pytest.mark.parametrize("data", [{}, {"type": "banana"}, {"type": ["record"]}])
def test_unknown_type_is_refused(data):
    """An object that is none of ours raises."""
    with pytest.raises(LedgerError, match="unknown type"):
        from_dict(data)
