"""``green-torch estimate``: the article's own examples with what has to be assumed to reach them, and what it says to nonsense."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from green_torch.cli import main
from green_torch.cli.estimate import Asked, examine, show
from green_torch.errors import ArgumentError, UnknownRegionError

TONNE_G = 1e6
# Patterson et al. 2021, arXiv 2104.10350, table 4 and appendix A: 10,000 V100s, 24.6 of 125 TFLOP/s, 330 W each with its system,
# PUE 1.10, 429 g/kWh, 3.14e23 FLOPs; they print 14.8 days, 1,287 MWh and 552.1 t (without embodied).
GPT3 = Asked(gpu="V100", count=10_000, flops=3.14e23, mfu="0.1968", power="330", pue="1.1", intensity="429")


def printed(asked, width=80):
    """What people see."""
    out = io.StringIO()
    show(examine(asked), Console(file=out, width=width, color_system=None))
    return out.getvalue()


def run(capsys, *arguments):
    """Exit code, stdout and stderr of the command."""
    with pytest.raises(SystemExit) as ended:
        main(["estimate", *arguments])
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err


def test_gpt3s_552_tonnes():
    """With the paper's assumptions the paper's time, energy and emissions come out; embodied emissions stand apart."""
    found = examine(GPT3).footprint
    assert found.duration_s.value / 86400 == pytest.approx(14.8, abs=0.05)
    assert found.facility_energy_j.value / 3.6e9 == pytest.approx(1287, rel=1e-3)
    assert found.operational_g.value / TONNE_G == pytest.approx(552, abs=1)
    assert found.emissions_g.value > found.operational_g.value


def test_gpt3_by_parameters_and_tokens_is_within_half_a_percent():
    """6ND gives 3.15e23 FLOPs, and the formula is named."""
    found = examine(
        Asked(gpu="V100", count=10_000, parameters=175e9, tokens=300e9, mfu="0.1968", power="330", pue="1.1", intensity="429")
    )
    assert found.footprint.operational_g.value / TONNE_G == pytest.approx(552, rel=5e-3)
    assert any("6 × parameters × tokens" in source for source in found.sources)
    assert found.sci_g["token"].value == pytest.approx(found.footprint.emissions_g.value / 300e9)


def test_512_a100s_take_51_tonnes_to_make_at_100_kg_each():
    """The article's 51 t needs 100 kg a card; the table's own sources give 65 t, up to 163 t."""
    asked = {"gpu": "A100", "count": 512, "hours": "300", "utilization": "0.6", "intensity": "50"}
    assert examine(Asked(**asked, embodied_kg="100")).footprint.manufacturing_g.value / TONNE_G == pytest.approx(51.2)
    made = examine(Asked(**asked)).footprint.manufacturing_g
    assert (made.value / TONNE_G, made.hi / TONNE_G) == pytest.approx((65.3, 163.5), abs=0.1)


def test_512_a100s_by_hand():
    """512 × 400 W × 0.6 × 300 h × 1.2 × 50 g, and 300 h of 4 years of 128 kg each."""
    found = examine(
        Asked(gpu="A100", count=512, hours="300", utilization="0.6", intensity="50", pue="1.2", price=0.2)
    ).footprint
    assert found.energy_j.value == pytest.approx(512 * 240 * 300 * 3600)
    assert found.operational_g.value == pytest.approx(512 * 0.24 * 300 * 1.2 * 50)
    assert found.embodied_g.value == pytest.approx(512 * 127_600 * 300 / (4 * 365.25 * 24))


def test_the_cost_is_that_of_facility_energy():
    """10 h of 1 kW at PUE 2 and 0.2 a kWh cost 4."""
    assert examine(Asked(gpu="A100", hours="10", power="1000", pue="2", intensity="0", price=0.2)).cost.value == pytest.approx(
        4.0
    )


def test_40_against_70_percent_mfu():
    """Time, energy and emissions fall by 1 - 40/70 = 43 %, if the power stays the same: and that is said."""
    found = examine(
        Asked(
            gpu="A100", count=512, parameters=7e9, tokens=1e12, mfu="0.4", other_mfu="0.7", utilization="0.6", intensity="400"
        )
    )
    other = found.other_mfu
    assert other.saved == pytest.approx(1 - 4 / 7)
    for name in ("duration_s", "energy_j", "operational_g", "embodied_g", "emissions_g"):
        ratio = getattr(other.footprint, name).value / getattr(found.footprint, name).value
        assert ratio == pytest.approx(4 / 7), name
    assert any("draws the same power" in line for line in found.assumed)


def test_ranges_widen_the_span():
    """A range of any input comes through to emissions; one without a range does not."""
    asked = {"gpu": "A100", "hours": "100", "intensity": "50", "embodied_kg": "100", "pue": "1.1"}
    assert examine(Asked(**asked, utilization="0.6")).footprint.emissions_g.is_exact
    for wider in (
        {"utilization": "0.5-0.7"},
        {"utilization": "0.6", "pue": "1.1-1.5"},
        {"utilization": "0.6", "embodied_kg": "50..150"},
    ):
        span = examine(Asked(**asked | wider)).footprint.emissions_g
        assert span.lo < span.value < span.hi


def test_an_hour_costs_the_same_however_long_it_takes():
    """SCI of an accelerator hour: the power's grams and an hour's share of the card; an uncertain MFU does not widen it."""
    found = examine(
        Asked(gpu="A100", count=8, flops=1e20, mfu="0.2-0.6", power="500", intensity="100", pue="1.2", embodied_kg="100")
    )
    assert found.footprint.emissions_g.lo < 0.7 * found.footprint.emissions_g.hi
    assert found.sci_g["accelerator hour"].is_exact
    assert found.sci_g["accelerator hour"].value == pytest.approx(0.5 * 1.2 * 100 + 100_000 / (4 * 365.25 * 24))


def test_every_default_is_named():
    """Whatever was not typed stands in the output: count, power, PUE, grid, lifetime, use, and which A100."""
    told = " ".join(printed(Asked(gpu="A100", hours="10")).split())
    for assumed in (
        "A100 is taken for NVIDIA A100 SXM4 40GB",
        "one accelerator",
        "full TDP (400 W)",
        "world average, no region set",
        "PUE 1: no facility overhead counted",
        "kept for 4 years",
        "in use all their life",
        "making the servers",
        "processors, memory, storage and network",
    ):
        assert assumed in told, assumed


def test_what_is_typed_is_not_called_assumed():
    """With everything typed, nothing is left but what the user assumed."""
    found = examine(
        Asked(
            gpu="NVIDIA H100 80GB HBM3",
            count=8,
            hours="1",
            power="900",
            region="FR",
            pue="1.1",
            lifetime=5,
            in_use=0.6,
            server=True,
        )
    )
    assert found.assumed == ()
    assert found.embodied.manufacturing_kg == pytest.approx(8 * (164 + 712))


def test_a_cloud_region_brings_its_providers_pue():
    """The published figure, with its source."""
    found = examine(Asked(gpu="H100", hours="1", region="aws:us-west-2"))
    assert found.pue.value == pytest.approx(1.14)
    assert "amazon" in found.pue_source.lower()


def test_a_card_without_a_published_footprint_says_so():
    """Embodied is unknown, not zero."""
    found = examine(Asked(gpu="4090", hours="1", region="FR"))
    assert found.device == "NVIDIA GeForce RTX 4090"
    assert found.embodied is None
    assert any("--embodied-kg" in line for line in found.missing)


def test_a_run_that_outlives_its_cards_says_so():
    """One card for GPT-3 would take six lives: told, with the option that shares the work, and not where enough cards are given."""
    asked = Asked(gpu="H100", flops=3.14e23, mfu="0.35-0.45")
    (told,) = (line for line in examine(asked).missing if "--count" in line)
    assert "years on one card" in told
    assert not any("--count" in line for line in examine(replace(asked, count=128)).missing)


@pytest.mark.parametrize("width", [80, 200])
def test_the_tables_fit_the_terminal(width):
    """No line is wider than the terminal, and no figure is cut."""
    told = printed(GPT3, width)
    assert max(map(len, told.splitlines())) <= width
    assert "…" not in told
    assert "1.29 GWh" in told


def test_json_is_one_object(capsys):
    """Machine-readable: spans with three ends, the sources, what was assumed."""
    code, out, _ = run(
        capsys, "--gpu", "A100", "--count", "2", "--hours", "10", "--utilization", "0.5-0.7", "--region", "FR", "--json"
    )
    found = json.loads(out)
    assert code == 0
    assert found["schema"] == "green_torch.estimate/1"
    assert found["power_w"] == {"value": pytest.approx(240), "lo": 200, "hi": pytest.approx(280)}
    assert found["footprint"]["emissions_g"]["lo"] < found["footprint"]["emissions_g"]["hi"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpu", "L40X", "--hours", "1"], "NVIDIA L40S"),
        (["--gpu", "", "--hours", "1"], "not in the table"),
        (["--gpu", "GH200", "--hours", "1"], "--power 700"),
        (["--gpu", "A100"], "Give --hours"),
        (["--gpu", "A100", "--hours", "nan"], "--hours 'nan'"),
        (["--gpu", "A100", "--hours", "0"], "above 0"),
        (["--gpu", "A100", "--hours", "5-3"], "lower end comes first"),
        (["--gpu", "A100", "--hours", "1", "--count", "0"], "at least one"),
        (["--gpu", "A100", "--hours", "1", "--utilization", "60"], "share of TDP"),
        (["--gpu", "A100", "--hours", "1", "--utilization", "0.6", "--power", "300"], "use one"),
        (["--gpu", "A100", "--hours", "1", "--pue", "0.9"], "at least 1"),
        (["--gpu", "A100", "--hours", "1", "--intensity", "-5"], "--intensity"),
        (["--gpu", "A100", "--hours", "1", "--price", "-1"], "at least 0"),
        (["--gpu", "A100", "--hours", "1", "--lifetime", "0"], "--lifetime"),
        (["--gpu", "A100", "--hours", "1", "--mfu", "0.4"], "needs the work"),
        (["--gpu", "A100", "--flops", "1e20"], "--mfu 0.4"),
        (["--gpu", "A100", "--flops", "1e20", "--mfu", "40"], "fraction of the peak"),
        (["--gpu", "A100", "--flops", "1e20", "--mfu", "0.4", "--hours", "3"], "hours follow"),
        (["--gpu", "A100", "--flops", "inf", "--mfu", "0.4"], "--flops inf"),
        (["--gpu", "A100", "--parameters", "1e9", "--mfu", "0.4"], "needs --tokens"),
        (["--gpu", "V100", "--flops", "1e20", "--mfu", "0.4", "--dtype", "bf16"], "--dtype"),
        (["--gpu", "A100", "--flops", "1e20", "--mfu", "0.4", "--dtype", "fp7"], "use one of"),
        (["--gpu", "A100", "--hours", "1", "--region", "Frnace"], '"FR" (France)'),
    ],
)
def test_nonsense_ends_with_2_and_says_what_to_type(capsys, arguments, told):
    """A wrong argument is the user's to mend: one line on stderr, nothing on stdout."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert told in err


def test_an_unknown_region_is_that_kind_of_error():
    """The same error that track() raises."""
    with pytest.raises(UnknownRegionError):
        examine(Asked(gpu="A100", hours="1", region="XX-YY"))
    with pytest.raises(ArgumentError):
        examine(Asked(gpu="Z9", hours="1"))
