"""The arithmetic of estimates and paybacks, against hand-made figures and its own laws."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from green_torch.estimate import Span, duration_s, embodied_share_g, footprint, payback, training_flops
from green_torch.records import Embodied

positive = st.floats(1e-3, 1e6)
spans = st.tuples(positive, positive, positive).map(sorted).map(lambda three: Span(three[1], three[0], three[2]))


@given(spans, spans)
def test_a_result_lies_between_its_ends(a, b):
    """Sums, products and ratios of spans keep the order of their ends."""
    for one in (a + b, a * b, a / b, a * 3.0):
        assert one.lo <= one.value <= one.hi


@given(positive, positive, positive, st.floats(1, 3), st.floats(0, 2000))
def test_exact_inputs_give_exact_results(power, seconds, kg, pue, intensity):
    """Without a spread anywhere there is none in the result, and the parts add up."""
    found = footprint(*map(Span.exact, (power, seconds, pue, intensity)), Embodied(kg, "x"))
    assert found.emissions_g.is_exact
    assert found.emissions_g.value == pytest.approx(found.operational_g.value + found.embodied_g.value)
    assert found.facility_energy_j.value == pytest.approx(power * seconds * pue)


def test_without_a_figure_for_the_card_emissions_are_operational_alone():
    """Unknown is None, and no zero is added for it."""
    found = footprint(Span.exact(1000.0), Span.exact(3600.0), Span.exact(1.5), Span(100.0, 50.0, 150.0))
    assert found.embodied_g is None
    assert found.emissions_g == Span(150.0, 75.0, 225.0)


def test_the_sci_specifications_example():
    """1,000 kg over 4 years, reserved for an hour: about 28 g (GSF SCI specification, embodied emissions)."""
    share = embodied_share_g(Embodied(1000.0, "the specification"), Span.exact(3600.0))
    assert share.value == pytest.approx(28.5, abs=0.1)
    assert share.is_exact


def test_gpt3_by_six_n_d():
    """175 billion parameters and 300 billion tokens are 3.15e23 FLOPs (the paper counts 3.14e23)."""
    assert training_flops(175e9, 300e9) == pytest.approx(3.15e23)


def test_a_better_mfu_takes_less_time():
    """The ends of the MFU are the other ends of the time."""
    taken = duration_s(1e15, 1, 1e12, Span(0.5, 0.4, 0.8))
    assert (taken.value, taken.lo, taken.hi) == pytest.approx((2000, 1250, 2500))


def pay(**changed):
    """A payback whose month saves 100 kg: 1e-12 J/FLOP saved at 1e15 FLOP/s, 730.5 h of 1 kW, at 136.9 g/kWh."""
    given_ = {
        "energy_old_j_per_flop": 2e-12,
        "flop_per_s_old": 2e14,
        "power_new_w": 1000.0,
        "flop_per_s_new": 1e15,
        "facility_g_per_kwh": 100_000 / 730.5,
        "in_use": 1.0,
        "lifetime_years": 4.0,
        "made_g": Span(200_000.0, 100_000.0, 6_000_000.0),
    }
    return payback(**given_ | changed)


def test_payback_by_hand():
    """200 kg at 100 kg a month are 2 months, 1 to 60; over four years 4,800 kg less the making."""
    found = pay()
    assert found.saving_g_per_month == pytest.approx(100_000)
    assert (found.months, found.months_lo, found.months_hi) == pytest.approx((2, 1, 60))
    assert (found.saved_g, found.saved_lo_g, found.saved_hi_g) == pytest.approx((4.6e6, -1.2e6, 4.7e6))
    assert found.work_ratio == pytest.approx(5)
    assert found.within(4.0) is None
    assert found.within(5.0) is True
    assert found.within(0.05) is False


def test_idle_cards_pay_back_later():
    """In use a quarter of the time, it takes four times as long."""
    assert pay(in_use=0.25).months == pytest.approx(4 * pay().months)


@pytest.mark.parametrize("changed", [{"power_new_w": 2000.0}, {"power_new_w": 3000.0}, {"facility_g_per_kwh": 0.0}])
def test_never_is_an_answer(changed):
    """No saving, or one that is negative, or a grid without emissions: never, and not within any life."""
    found = pay(**changed)
    assert (found.months, found.months_lo, found.months_hi) == (None, None, None)
    assert found.within(1000.0) is False
    assert found.saved_g < 0
