"""Tests of the paired comparison: its quantiles, its arithmetic, and how often its interval holds the truth."""

from __future__ import annotations

import math
import random
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from green_torch.errors import ArgumentError
from green_torch.experiment.rounds import BLOCKS
from green_torch.statistics import (
    MIN_PAIRS_LOOKING,
    corrected_confidence,
    gain_range,
    mean_interval,
    paired_difference,
    pairs_needed,
    t_quantile,
    unpaired_difference,
)
from tests.block_noise import MACHINES, compared, compared_until, log_ratio, machine

settings.register_profile("no deadline", deadline=None)  # a loaded machine is slow now and then
settings.load_profile("no deadline")

MOST = 60  # blocks, where the width decides

positive = st.floats(1e-3, 1e6)
pairs = st.lists(st.tuples(positive, positive), min_size=2, max_size=30)


class TestQuantile:
    """Student's t, against printed tables and closed forms."""

    @pytest.mark.parametrize(
        ("dof", "q95", "q99"),
        [(1, 12.7062, 63.6567), (2, 4.30265, 9.92484), (5, 2.57058, 4.03214), (9, 2.26216, 3.24984), (30, 2.04227, 2.75000)],
    )
    def test_known_values(self, dof, q95, q99):
        """The two-sided 95 % and 99 % points of the printed tables."""
        assert t_quantile(0.975, dof) == pytest.approx(q95, rel=1e-5)
        assert t_quantile(0.995, dof) == pytest.approx(q99, rel=1e-5)

    @given(st.floats(0.5001, 0.9999))
    def test_closed_forms(self, p):
        """With 1 degree of freedom tan(pi (p - 1/2)), with 2 (2p - 1) / sqrt(2p (1 - p)), with many the normal quantile."""
        assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
        assert t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-9)
        assert t_quantile(p, 1e9) == pytest.approx(NormalDist().inv_cdf(p), rel=1e-9)

    @given(st.floats(0.001, 0.999), st.floats(0.3, 1e5))
    def test_symmetric_and_wider_than_normal(self, p, dof):
        """The lower quantile mirrors the upper one, and tails are heavier than the normal distribution's."""
        assert t_quantile(1 - p, dof) == pytest.approx(-t_quantile(p, dof), rel=1e-6, abs=1e-12)
        assert abs(t_quantile(p, dof)) >= abs(NormalDist().inv_cdf(p)) * (1 - 1e-9)

    @pytest.mark.parametrize(("p", "dof"), [(0, 5), (1, 5), (math.nan, 5), (0.9, 0), (0.9, -1), (0.9, math.nan)])
    def test_nonsense(self, p, dof):
        """Probabilities and degrees of freedom outside their range are refused."""
        with pytest.raises(ArgumentError, match="quantile"):
            t_quantile(p, dof)


class TestArithmetic:
    """What holds for any blocks."""

    def test_by_hand(self):
        """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), two degrees of freedom."""
        found = paired_difference([10, 10, 10], [11, 12, 13], relative=False)
        half = 4.30265 / math.sqrt(3)
        assert (found.estimate, found.lo, found.hi) == pytest.approx((2, 2 - half, 2 + half), rel=1e-5)
        assert not found.distinguishable
        assert "spans zero" in found.note

    @given(pairs)
    def test_interval_holds_its_estimate(self, blocks):
        """The estimate lies within its interval, and the geometric mean of the ratios is what it says."""
        a, b = zip(*blocks, strict=True)
        found = paired_difference(a, b)
        assert found.lo <= found.estimate <= found.hi
        ratio = math.exp(math.fsum(math.log(y / x) for x, y in blocks) / len(blocks))
        assert 1 + found.estimate == pytest.approx(ratio, rel=1e-9)

    @given(pairs, st.floats(1e-3, 1e3))
    def test_ratio_knows_no_unit(self, blocks, factor):
        """Both variants in another unit: the same relative difference. Swapped: its reciprocal."""
        a, b = zip(*blocks, strict=True)
        found = paired_difference(a, b)
        scaled = paired_difference([x * factor for x in a], [y * factor for y in b])
        swapped = paired_difference(b, a)
        assert 1 + scaled.estimate == pytest.approx(1 + found.estimate, rel=1e-6)
        assert (1 + swapped.estimate) * (1 + found.estimate) == pytest.approx(1, rel=1e-6)
        assert swapped.n_effective == pytest.approx(found.n_effective)

    @given(pairs)
    def test_more_confidence_is_wider(self, blocks):
        """A 99 % interval holds the 90 % one."""
        a, b = zip(*blocks, strict=True)
        narrow, wide = (paired_difference(a, b, confidence=level, relative=False) for level in (0.9, 0.99))
        assert wide.lo <= narrow.lo <= narrow.hi <= wide.hi

    @given(st.lists(st.sampled_from([-1.0, 1.0]), min_size=6, max_size=30), st.floats(-5, 5), st.floats(-5, 5))
    def test_steady_drift_is_removed(self, gaps, truth, slope):
        """A drift proportional to the gap between the two blocks leaves no trace, whatever the orders, if both occur."""
        assume(len(set(gaps)) == 2)
        a = [100.0] * len(gaps)
        found = paired_difference(a, [100 + truth + slope * gap for gap in gaps], relative=False, gaps=gaps)
        assert (found.estimate, found.lo, found.hi) == pytest.approx((truth, truth, truth), abs=1e-9)

    def test_one_order_is_not_extrapolated(self):
        """Where b always came second, no slope is fitted: the plain mean stands."""
        a, b = [1.0] * 8, [1.0, 2.0, 3.0, 4.0, 3.0, 2.0, 4.0, 1.0]
        with_gaps = paired_difference(a, b, relative=False, gaps=[1, 2, 1, 2, 1, 2, 1, 2])
        assert with_gaps == paired_difference(a, b, relative=False)

    def test_alike_neighbours_count_less(self):
        """Pairs that resemble their neighbours beyond chance count as fewer, and the interval grows."""
        smooth = [math.sin(k / 4) for k in range(24)]
        shuffled = smooth.copy()
        random.Random(3).shuffle(shuffled)
        related, unrelated = mean_interval(smooth), mean_interval(shuffled)
        assert related.n_effective < 8
        assert unrelated.n_effective == 24
        assert related.hi - related.lo > 2 * (unrelated.hi - unrelated.lo)


class TestInstrument:
    """The meter's own bounds."""

    @given(
        st.lists(st.tuples(positive, positive, st.floats(0, 0.9), st.floats(0, 0.9)), min_size=2, max_size=10), st.booleans()
    )
    def test_bounds_hold_the_estimate(self, blocks, relative):
        """Bounds around each block give bounds around the difference."""
        a, b = [x for x, *_ in blocks], [y for _, y, *_ in blocks]
        around_a = [(x * (1 - e), x * (1 + e)) for x, _, e, _ in blocks]
        around_b = [(y * (1 - e), y * (1 + e)) for _, y, _, e in blocks]
        found = paired_difference(a, b, relative=relative, a_bounds=around_a, b_bounds=around_b)
        slack = 1e-9 * (1 + abs(found.estimate))
        assert found.instrument_lo - slack <= found.estimate <= found.instrument_hi + slack

    def test_distinguishable_asks_for_both(self):
        """A difference beyond the scatter is not told from zero where the meter's bounds span it, and is where they don't."""
        a, b = [100.0, 101.0, 100.5], [90.0, 91.0, 90.5]
        around = [[(x - w, x + w) for x in a] for w in (20, 1)]
        around_b = [[(x - w, x + w) for x in b] for w in (20, 1)]
        loose, tight = (paired_difference(a, b, a_bounds=around[k], b_bounds=around_b[k]) for k in (0, 1))
        assert not loose.distinguishable
        assert "meter's own bounds" in loose.note
        assert tight.distinguishable
        assert tight.note == ""
        assert paired_difference(a, b).distinguishable
        assert paired_difference(a, b).instrument_lo is None

    def test_open_bounds(self):
        """A block that may have used nothing leaves its side of the ratio open, and nothing overflows."""
        found = paired_difference([1.0, 1.0], [2.0, 2.0], a_bounds=[(0.0, 2.0)] * 2, b_bounds=[(0.0, 4.0)] * 2)
        assert (found.instrument_lo, found.instrument_hi) == (-1.0, math.inf)
        assert not found.distinguishable


energies = st.floats(0.1, 1e6)


class TestGain:
    """Sensors that are off by a constant factor."""

    @given(energies, energies, st.one_of(st.none(), st.floats(0, 0.5)))
    def test_one_sensor_cancels(self, a, b, error):
        """One sensor's gain error is in both sums alike, stated or not; devices that used nothing don't count."""
        assert gain_range({"gpu0": a}, {"gpu0": b}, {"gpu0": error}) == (1.0, 1.0)
        assert gain_range({"gpu0": a, "cpu": 0.0}, {"gpu0": b, "cpu": 0.0}, {"gpu0": error}) == (1.0, 1.0)

    @given(st.lists(st.tuples(energies, energies, st.floats(0, 0.3), st.floats(-1, 1)), min_size=2, max_size=6))
    def test_holds_every_truth(self, sensors):
        """Whatever each sensor's own constant error within what is stated, the true ratio lies in the range around the measured one."""
        names = [f"d{k}" for k in range(len(sensors))]
        a = {name: s[0] for name, s in zip(names, sensors, strict=True)}
        b = {name: s[1] for name, s in zip(names, sensors, strict=True)}
        errors = {name: s[2] for name, s in zip(names, sensors, strict=True)}
        low, high = gain_range(a, b, errors)
        gains = {name: 1 + s[2] * s[3] for name, s in zip(names, sensors, strict=True)}
        measured = sum(b.values()) / sum(a.values())
        true = sum(b[name] * gains[name] for name in names) / sum(a[name] * gains[name] for name in names)
        assert low * (1 - 1e-9) <= true / measured <= high * (1 + 1e-9)
        assert low <= 1 + 1e-9
        assert high >= 1 - 1e-9

    def test_by_hand(self):
        """100 J + 100 J against 50 J + 100 J, each sensor off by 10 %: 150/200 may be (45 + 110)/(90 + 110) or (55 + 90)/(110 + 90)."""
        a, b = {"gpu0": 100.0, "gpu1": 100.0}, {"gpu0": 50.0, "gpu1": 100.0}
        low, high = gain_range(a, b, {"gpu0": 0.1, "gpu1": 0.1})
        assert (low * 0.75, high * 0.75) == pytest.approx((145 / 200, 155 / 200))

    @pytest.mark.parametrize(
        ("a", "b", "errors"),
        [
            ({"x": 1.0, "y": 1.0}, {"x": 1.0, "y": 1.0}, {"x": None, "y": None}),
            ({"x": 1.0}, {"y": 1.0}, {"x": 0.1}),
            ({}, {}, {}),
            ({"x": 0.0}, {"x": 1.0}, {"x": 0.1}),
        ],
    )
    def test_unknown(self, a, b, errors):
        """Where none of several states an error, or joules are missing, nothing is known."""
        assert gain_range(a, b, errors) is None

    def test_stated_by_some(self):
        """A sensor that states no error is taken as it is: 100 J + 100 J against 50 J + 100 J, the first alone off by 10 %."""
        a, b = {"gpu0": 100.0, "cpu": 100.0}, {"gpu0": 50.0, "cpu": 100.0}
        for silent in ({"cpu": None}, {}):
            low, high = gain_range(a, b, {"gpu0": 0.1, **silent})
            assert (low * 0.75, high * 0.75) == pytest.approx((155 / 210, 145 / 190))

    def test_counts_in_the_verdict(self):
        """A difference that unlike gain errors could make up is none."""
        a, b = [100.0, 100.1, 99.9], [98.0, 98.1, 97.9]
        assert paired_difference(a, b, gain=(1.0, 1.0)).distinguishable
        loose = paired_difference(a, b, gain=(0.97, 1.03))
        assert not loose.distinguishable
        assert "gain errors" in loose.note
        assert (loose.gain_lo, loose.gain_hi) == pytest.approx((0.98 * 0.97 - 1, 0.98 * 1.03 - 1), abs=1e-4)


class TestCorrections:
    """Several variants, and looking often."""

    def test_error_rates(self):
        """Bonferroni divides the error rate, looking long spends less of it, and the stated confidence stays the family's."""
        assert corrected_confidence(0.95) == 0.95
        assert corrected_confidence(0.95, n_compared=5) == pytest.approx(0.99)
        assert corrected_confidence(0.95, looking_at=6) == corrected_confidence(0.95, looking_at=10) == 0.95
        assert corrected_confidence(0.95, n_compared=4, looking_at=27) == pytest.approx(0.99, abs=1e-4)
        found = paired_difference([10, 10, 10], [11, 12, 13], relative=False, n_compared=5)
        half = 9.92484 / math.sqrt(3)
        assert (found.lo, found.hi) == pytest.approx((2 - half, 2 + half), rel=1e-5)
        assert (found.confidence, found.n_compared, found.looking) == (0.95, 5, False)
        assert found.half_width == pytest.approx(half)

    def test_five_null_variants(self):
        """Of five variants that are the baseline under other names, all intervals hold zero in at least 95 % of comparisons."""
        rng = np.random.default_rng(4)
        held = 0
        for _ in range(600):
            base = rng.normal(1, 0.01, 8)
            found = [paired_difference(list(base), list(rng.normal(1, 0.01, 8)), n_compared=5) for _ in range(5)]
            held += all(one.lo <= 0 <= one.hi for one in found)
        assert 0.93 <= held / 600 <= 0.99

    @settings(max_examples=30)
    @given(st.floats(0.001, 0.2), st.floats(0.001, 0.2), st.floats(0.5, 0.99))
    def test_pairs_needed(self, scatter, difference, power):
        """More scatter, a smaller difference, more variants or more power ask for no fewer pairs."""
        n = pairs_needed(scatter, difference, power=power)
        assert n >= 6
        assert pairs_needed(2 * scatter, difference, power=power) >= n
        assert pairs_needed(scatter, difference / 2, power=power) >= n
        assert pairs_needed(scatter, difference, power=power, n_compared=3, looking=True) >= n

    def test_blocks_needed(self):
        """Of the scatter of logarithms of single pairs; only where it is the scatter that hides a difference."""
        a, b = [1.0] * 6, [1.01, 0.99, 1.02, 0.98, 1.0, 1.001]
        found = paired_difference(a, b, n_compared=2)
        scatter = float(np.std(np.log(b), ddof=1))
        assert found.scatter == pytest.approx(scatter)
        assert found.blocks_needed(0.02) == pairs_needed(scatter, math.log(1.02), n_compared=2)
        assert found.blocks_needed(0.01) > found.blocks_needed(0.02)
        assert paired_difference(a, [2 * x for x in b]).blocks_needed(0.01) is None
        assert paired_difference(a, [2 * x for x in b], gain=(0.1, 10)).blocks_needed(0.01) is None
        assert paired_difference([1.0], [1.1]).blocks_needed(0.01) is None
        assert unpaired_difference(a, b).blocks_needed(0.01) is None

    def test_blocks_needed_of_alike_neighbours(self):
        """Where neighbours are alike beyond chance, as many more as there are fewer independent ones among them."""
        smooth = [math.exp(0.01 * math.sin(k / 4)) for k in range(26)]
        found = paired_difference([1.0] * 26, smooth)
        plain = float(np.std(np.log(smooth), ddof=1))
        assert found.n_effective < 8
        assert found.scatter == pytest.approx(plain * math.sqrt(26 / found.n_effective))

    @pytest.mark.parametrize("bad", [(0, 0.1, 0.9), (0.1, 0, 0.9), (0.1, math.inf, 0.9), (0.1, 0.1, 1.0), (math.nan, 0.1, 0.9)])
    def test_pairs_needed_nonsense(self, bad):
        """No scatter, no difference, or certainty."""
        with pytest.raises(ArgumentError, match="positive scatter"):
            pairs_needed(bad[0], bad[1], power=bad[2])


class TestBadInput:
    """Too little, or nonsense."""

    def test_one_block(self):
        """One pair gives an estimate, no interval, and the reason."""
        found = paired_difference([2.0], [1.0])
        assert (found.estimate, found.lo, found.hi, found.distinguishable) == (-0.5, None, None, False)
        assert "one block" in found.note

    @pytest.mark.parametrize(
        ("a", "b", "more"),
        [
            ([], [], {}),
            ([1.0], [1.0, 2.0], {}),
            ([1.0, math.nan], [1.0, 2.0], {}),
            ([1.0, 0.0], [1.0, 2.0], {}),
            ([1.0, 1.0], [1.0, -2.0], {}),
            ([1.0, 1.0], [1.0, 2.0], {"gaps": [1.0]}),
            ([1.0, 1.0], [1.0, 2.0], {"gaps": [1.0, math.nan]}),
            ([1.0, 1.0], [1.0, 2.0], {"confidence": 1.0}),
            ([1.0, 1.0], [1.0, 2.0], {"a_bounds": [(0.5, 1.5), (1.5, 0.5)], "b_bounds": [(0.0, 9.0)] * 2}),
            ([1.0, 1.0], [1.0, 2.0], {"a_bounds": [(0.5, 1.5)] * 2}),
            ([1.0, 1.0], [1.0, 2.0], {"n_compared": 0}),
        ],
    )
    def test_refused(self, a, b, more):
        """Lengths that differ, values that no ratio has, bounds the wrong way round or of one side only."""
        with pytest.raises(ArgumentError):
            paired_difference(a, b, **more)


def _balanced(rng: random.Random, n: int) -> list[float]:
    signs = [1.0] * (n - n // 2) + [-1.0] * (n // 2)
    rng.shuffle(signs)
    return signs


def _coverage(*, n: int, correlation: float, drift: float, repetitions: int = 2500, truth: float = 0.0, seed: int = 7) -> float:
    """How often the interval holds the truth: AR(1) noise of 1 % a block under a drift of so many % over the whole comparison."""
    rng = random.Random(seed)
    held = 0
    for _ in range(repetitions):
        gaps = _balanced(rng, n)
        a, b, noise = [], [], rng.gauss(0, 0.01)
        for k in range(2 * n):
            noise = correlation * noise + math.sqrt(1 - correlation**2) * rng.gauss(0, 0.01)
            level = 10 * math.exp(noise + 0.01 * drift * k / (2 * n))
            if (k % 2 == 0) == (gaps[k // 2] > 0):
                a.append(level)
            else:
                b.append(level * (1 + truth))
        found = paired_difference(a, b, gaps=gaps)
        held += found.lo <= truth <= found.hi
    return held / repetitions


class TestCalibration:
    """The 95 % interval holds the truth in 95 % of comparisons."""

    @pytest.mark.parametrize(
        ("n", "correlation", "drift", "truth"),
        [(4, 0, 0, 0), (8, 0, 0, -0.1), (10, 0.5, 5, 0), (10, 0.9, 5, 0), (20, 0.7, 30, 0.02)],
    )
    def test_null(self, n, correlation, drift, truth):
        """Independent noise, noise that persists over many blocks, and drift of 5 or 30 times the noise."""
        assert 0.935 <= _coverage(n=n, correlation=correlation, drift=drift, truth=truth) <= 0.965

    @pytest.mark.parametrize("kind", MACHINES)
    def test_null_on_amachine(self, kind):
        """fp32 against fp32, 2,000 comparisons of the usual number of blocks: the 95 % interval holds zero in 93.5-96.5 %."""
        found = [compared(series, BLOCKS) for series in machine(kind, BLOCKS, 2000)]
        assert 0.935 <= np.mean([one.lo <= 0 <= one.hi for one in found]) <= 0.965

    @pytest.mark.parametrize(
        ("kind", "share", "blocks"),
        [*((kind, share, blocks) for kind in MACHINES for share, blocks in ((1.2, 14), (0.7, 20))), ("shared", 0.55, 28)],
    )
    def test_null_until(self, kind, share, blocks):
        """The same, stopped by compare()'s own looks at the width: at once in most, or after about twice or thrice the fewest blocks."""
        runs = machine(kind, MOST, 2000)
        typical = np.median([compared(series, MIN_PAIRS_LOOKING).half_width for series in runs[:200]])
        found = [compared_until(series, share * typical, MOST) for series in runs]
        assert 0.935 <= np.mean([one.lo <= 0 <= one.hi for one in found]) <= 0.965
        assert np.mean([one.half_width <= share * typical * 1.1 for one in found]) > 0.95
        assert np.mean([one.n_blocks for one in found]) == pytest.approx(blocks, rel=0.1)
        assert min(one.n_blocks for one in found) == MIN_PAIRS_LOOKING + 2  # two looks, and the round that goes on meanwhile
        assert all(one.looking for one in found)

    def test_a_large_difference_is_told_though_it_wanders(self):
        """BF16 against FP32 on two cores, whose ratio drifted between 0.40 and 0.43: its interval is wide, and far from one."""
        ratios = [
            0.421,
            0.424,
            0.414,
            0.399,
            0.399,
            0.397,
            0.402,
            0.404,
            0.417,
            0.416,
            0.428,
            0.416,
            0.403,
            0.411,
            0.413,
            0.429,
        ]
        gaps = [-4, 4, 2, -2, 3, -3, -3, 3, 2, -2, 2, -2, 1, 1, -1, -1]
        found = paired_difference([1.0] * len(ratios), ratios, gaps=[float(gap) for gap in gaps], n_compared=5)
        assert found.distinguishable
        assert -0.7 < found.lo < -0.6 < found.estimate < -0.55 < found.hi < -0.45

    @pytest.mark.parametrize(
        ("correlation", "n", "least"), [(0, 10, 0.935), (0.3, 10, 0.93), (0.3, 40, 0.935), (0.6, 10, 0.85), (0.6, 40, 0.93)]
    )
    def test_a_difference_that_wanders(self, correlation, n, least):
        """An AR(1) difference: the interval holds its mean in nearly as many of 4,000 comparisons, with ten pairs and mild wandering too."""
        rng = np.random.default_rng(n)
        steps = rng.standard_normal((4000, n))
        for k in range(1, n):
            steps[:, k] = correlation * steps[:, k - 1] + math.sqrt(1 - correlation**2) * steps[:, k]
        found = [mean_interval(values) for values in steps.tolist()]
        assert least <= np.mean([one.lo <= 0 <= one.hi for one in found]) <= 0.965

    @pytest.mark.parametrize(
        ("correlation", "least", "most"), [(0, 0.95, 0.975), (0.6, 0.955, 0.98), (0.9, 0.935, 0.965), (0.95, 0.84, 0.9)]
    )
    def test_unpaired(self, correlation, least, most):
        """Two series that make no pairs, 2 % apart in AR(1) noise: how many of 2,000 intervals hold that, as the docstring tells it."""
        rng = np.random.default_rng(7)
        steps = rng.standard_normal((2, 2000, 20))
        for k in range(1, 20):
            steps[..., k] = correlation * steps[..., k - 1] + math.sqrt(1 - correlation**2) * steps[..., k]
        a, b = np.exp(0.01 * steps) * [[[1.0]], [[1.02]]]
        found = [unpaired_difference(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        assert least <= np.mean([one.lo <= 0.02 <= one.hi for one in found]) <= most

    def test_unpaired_takes_what_has_a_logarithm(self):
        """A mean of zero is refused."""
        with pytest.raises(ArgumentError, match="above zero"):
            unpaired_difference([1.0], [0.0])

    @pytest.mark.parametrize("looking", [False, True])
    def test_power(self, looking):
        """A true 2 % is found with about the power that was asked for, 90 %, by as many pairs as are said to be needed."""
        runs = machine("quiet", 60, 1000, truth=-0.02)
        scatter = np.std([log_ratio(series, k) for series in runs for k in range(8)])
        n = pairs_needed(float(scatter), 0.02, power=0.9, looking=looking)
        assert 8 <= n <= 30
        found = [compared(series, n, looking=looking) for series in runs]
        assert 0.85 <= np.mean([one.distinguishable for one in found]) <= 0.95
        assert all(one.estimate < 0 for one in found if one.distinguishable)

    @settings(max_examples=20)
    @given(st.integers(2, 5))
    def test_few_pairs_fit_no_slope(self, n):
        """With fewer than six pairs the gaps change nothing: a slope would cost more than it brings."""
        a, b = [1.0 + 0.1 * k for k in range(n)], [1.1 + 0.2 * k for k in range(n)]
        assert paired_difference(a, b, gaps=[(-1.0) ** k for k in range(n)]) == paired_difference(a, b)
