"""The arithmetic of grams, MFU and projections against hand-made figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from green_torch import footprint, units
from green_torch.records import Embodied


def test_a_kilowatt_hour_in_france_and_in_a_building():
    """1 kWh of IT energy at PUE 1.5 and 50 g/kWh is 75 g."""
    assert footprint.operational_g(3.6e6, 1.5, 50.0) == pytest.approx(75.0)


def test_the_sci_example():
    """1,000 kg over 4 years, used for an hour, is about 28 g (SCI specification's example)."""
    assert footprint.embodied_g(Embodied(1000.0, "example"), 3600.0) == pytest.approx(28.5, abs=0.1)


def test_idle_life_is_spread_over_use():
    """Half the expected use doubles the charge of each hour."""
    full, half = Embodied(164.0, "x"), Embodied(164.0, "x", expected_utilization=0.5)
    assert footprint.embodied_g(half, 60.0) == pytest.approx(2 * footprint.embodied_g(full, 60.0))


def test_mfu_is_a_fraction_of_the_peak():
    """500 TFLOP in 2 s on a 1 PFLOP/s device is 25 %."""
    assert footprint.utilization(500e12, 2.0, 1e15) == pytest.approx(0.25)


@pytest.mark.parametrize("arguments", [(None, 1.0, 1e12), (1e12, 1.0, None), (1e12, 0.0, 1e12)])
def test_unknown_flops_or_peak_give_no_mfu(arguments):
    """Unknown stays unknown."""
    assert footprint.utilization(*arguments) is None


@given(st.lists(st.floats(0, 1e9), max_size=20), st.floats(1, 3), st.floats(0, 2000))
def test_emissions_add_over_time_and_domains(parts, pue, intensity):
    """The emissions of a sum are the sum of the emissions."""
    whole = footprint.operational_g(sum(parts), pue, intensity)
    assert whole == pytest.approx(sum(footprint.operational_g(part, pue, intensity) for part in parts), rel=1e-9, abs=1e-9)


def test_a_projection_leaves_set_up_out_of_the_mean():
    """10 g of set-up, a first step that was counted (5 g), 19 of 1 g and 6 g of evaluation make 40 + 80 x 1.3 g for 100 steps."""
    assert footprint.projected_total(40.0, 1.0, 6.0, 20, 100) == pytest.approx(40.0 + 80 * 1.3)
    assert footprint.projected_total(40.0, 1.0, 6.0, 0, 100) is None


@given(st.floats(1e-3, 1e15))
def test_printed_numbers_read_back(value):
    """A number printed with its prefix is the number, to the digits shown."""
    text, unit = units.si(value, "J").split()
    scale = {"PJ": 1e15, "TJ": 1e12, "GJ": 1e9, "MJ": 1e6, "kJ": 1e3, "J": 1, "mJ": 1e-3}[unit]
    assert float(text) * scale == pytest.approx(value, rel=6e-3)


def test_grams_become_kilograms_and_tonnes():
    """People read kg and t, not Mg."""
    assert units.grams(552e6) == "552 tCO2e"
    assert units.grams(1500.0) == "1.50 kgCO2e"
    assert units.grams(None) == "unknown"


def test_printed_shares_keep_what_is_small():
    """A tenth of a percent, or two digits."""
    assert [units.share(value) for value in (0.4312, 0.01, 0.00033, 0.0, 1.2)] == ["43.1%", "1.0%", "0.033%", "0.0%", "120.0%"]


@given(st.floats(1e-6, 1e12))
def test_printed_numbers_have_three_digits(value):
    """Rounding up to the next power of ten adds no digit."""
    assert sum(map(str.isdigit, units.si(value, "W").split()[0])) == 3
    assert units.si(0.099995, "s") == "100 ms"
