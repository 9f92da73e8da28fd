"""Paired comparison of two variants measured in alternating blocks: a difference, its interval, and whether it can be told from zero.

Pure arithmetic. A block is a run of consecutive steps of one variant; a round holds one block of each, in an order that changes
at random from round to round; a pair is the two blocks of one round. What both blocks of a pair share (temperature, a busy
neighbour) cancels in their difference, and the random order makes what is left of slow drift and of autocorrelated noise average
out. Two corrections remain: a steady drift is fitted through ``gaps`` and removed, and the interval goes by how much neighbouring
pairs still resemble each other. What no order of blocks cures is a difference that itself wanders, since a few pairs don't tell how
much it does: with a lag-1 autocorrelation of 0.3 *of the difference*, a 95 % interval holds its mean in about 91 % at 8 pairs, 93-94 %
at 10 and 94-95 % from 20 on; with 0.6, in 87-89 % at 10, 92 % at 20 and 94 % at 40. The interval of a difference that does not
wander pays for this: at 10 pairs it is some 18 % wider than if that were known, at 20 pairs 10 %, at 40 pairs 5 %. Shares like
these: ``benchmarks/intervals.py``.

Two things make an interval wider than one look at one pair of variants would need; both change the error rate alpha = 1 - confidence:

- Several variants against one baseline: alpha is divided by their number (Bonferroni, for simultaneous intervals: Dunn 1961, J. Am.
  Stat. Assoc. 56:52), so that all intervals together hold the truth with the stated confidence, however they depend on each other.
- Stopping when the interval is narrow enough: the rule looks at the width alone, never at the difference. With normal noise the mean
  of n pairs is independent of all their variances up to n (Helmert; Basu 1955, Sankhya 15:377), so that stopping can't favour a
  sign; what it favours is a scatter that came out low, the more so the more often it has looked, which makes 95 % into 93 % (Starr
  1966, Ann. Math. Stat. 37:36). Looks at n and n + 1 pairs see almost the same, so that what they cost grows with the logarithm of
  n: spending alpha / (1 + ln(n / 10) / 4) at n pairs brings it to 94-96 %, looking after every pair from the tenth on until two
  looks in a row find it narrow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING

from green_torch.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Bounds = tuple[float, float]

_MIN_PAIRS = 2
_MIN_PAIRS_DRIFT = 6  # a slope costs a degree of freedom: with fewer pairs it costs more than the drift that it removes
_FEWEST_EFFECTIVE = (
    2.0  # any series counts as so many independent values: a trend over few blocks looks like perfect correlation
)
_FEWEST_DOF = 2.0  # where neighbours are alike: at one, t is 64 at 99 %, and no difference, however large, could be told
_MIN_PAIRS_CORRELATION = 8  # with fewer, a lag-1 autocorrelation is noise
_PAIRS_IN_FULL = 10  # from here on what is not known of it is allowed for in full; at once at 8, 8 pairs would give less than 7
_UNCERTAIN = 2.0  # over n: what is added to a lag-1 autocorrelation since it is not known better
_ONE_SIDED_5_PERCENT = 1.645
MIN_PAIRS_LOOKING = 10  # before that, the scatter is too uncertain to stop by
_LOOKING_COSTS = 0.25  # of alpha, for each e-fold of pairs since the first look
_MIN_CORRELATION = -0.3  # neighbours that are less alike than chance narrow an interval no further
_MAX_CORRELATION = 0.95
POWER = 0.9  # how often a true difference is found by so many pairs as are said to be needed
_NORMAL_DOF = 1e7  # beyond, t is the normal distribution to nine digits
_PRECISION = 1e-14
_LARGEST_LOG = 700.0  # exp() overflows beyond
_MAX_TERMS = 500  # fewer than 100 are needed


@dataclass(frozen=True, slots=True)
class Difference:
    """How much more ``b`` is than ``a``: ``b/a - 1`` where ``relative`` (-0.12 = 12 % less), else ``b - a`` in their own unit.

    ``lo``/``hi`` is the confidence interval from the scatter between pairs, ``None`` where there are fewer than two.
    ``instrument_lo``/``instrument_hi`` is where the difference of exactly these blocks lies by the meter's own bounds (infinite where
    one is open), ``None`` where joules have none. ``gain_lo``/``gain_hi`` is where the estimate lies if each sensor is off by its stated
    gain error, the same for both variants: one sensor's cancels. ``distinguishable`` asks every interval there is to exclude zero, on
    one side. ``note`` says why not. ``n_compared`` variants share the error rate of 1 - ``confidence``; ``looking`` tells that the number
    of blocks was chosen by the width of the interval, and that this is allowed for. ``scatter`` is the standard deviation of single pairs
    around what they tell (of logarithms where ``relative``), enlarged where neighbours are alike beyond chance; ``None`` where there are
    fewer than two, or no pairs.
    """

    estimate: float
    lo: float | None
    hi: float | None
    n_blocks: int
    relative: bool
    confidence: float
    distinguishable: bool
    instrument_lo: float | None = None
    instrument_hi: float | None = None
    n_effective: float | None = None
    note: str = ""
    gain_lo: float | None = None
    gain_hi: float | None = None
    n_compared: int = 1
    looking: bool = False
    scatter: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half the interval, in the difference's own terms; ``None`` where there is no interval."""
        return None if self.lo is None or self.hi is None else (self.hi - self.lo) / 2

    def blocks_needed(self, difference: float) -> int | None:
        """How many blocks of each, scattering as these do, find a true difference of so much (0.02: 2 %) in 9 of 10 comparisons.

        ``None`` where it isn't the scatter that hides a difference (more blocks would be no help), or no scatter is known.
        """
        if not self.scatter or self.lo is None or self.hi is None or not self.lo <= 0 <= self.hi:
            return None
        size = math.log1p(difference) if self.relative else difference
        return pairs_needed(
            self.scatter, size, confidence=self.confidence, power=POWER, n_compared=self.n_compared, looking=self.looking
        )


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its two-sided confidence interval; ``lo``, ``hi`` and ``scatter`` are ``None`` where there are too few values.

    ``scatter`` is the standard deviation of the values around the mean, or around the line that was fitted.
    """

    mean: float
    lo: float | None
    hi: float | None
    n: int
    n_effective: float | None
    scatter: float | None = None


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    *,
    confidence: float = 0.95,
    relative: bool = True,
    gaps: Sequence[float] | None = None,
    a_bounds: Sequence[Bounds] | None = None,
    b_bounds: Sequence[Bounds] | None = None,
    gain: Bounds | None = None,
    n_compared: int = 1,
    looking: bool = False,
) -> Difference:
    """Compares block means of two variants, pair by pair; ``a[k]`` and ``b[k]`` were measured next to each other.

    Args:
        a: Block means of the first variant (the baseline), any unit; above zero where ``relative``.
        b: Block means of the second, same unit and number.
        confidence: Two-sided coverage of the interval, between 0 and 1.
        relative: Compare by ratio (mean of log-ratios, given back as ``b/a - 1``) rather than by difference.
        gaps: How much later ``b[k]`` was measured than ``a[k]`` (negative: earlier), in any unit of time or place. Where both
            orders occur, a drift that is steady over a pair is removed.
        a_bounds: What the meter warrants of each ``a[k]``: (lowest, highest).
        b_bounds: The same of each ``b[k]``.
        gain: The lowest and highest factor by which the sensors' gain errors may have changed the ratio ``b/a`` (1 and 1 where they
            cancel); taken only where ``relative``.
        n_compared: How many variants are compared with the baseline; each interval is widened so that all hold together.
        looking: The number of pairs was chosen by the width of the interval.

    Raises:
        ArgumentError: for unequal lengths, no pair at all, values that are not finite (or not above zero where ``relative``),
            bounds the wrong way round, or a confidence outside (0, 1).
    """
    _check(a, b, gaps, relative=relative, others=(a_bounds, b_bounds))
    _check_bounds(a_bounds, b_bounds)
    differences = [_difference(x, y, relative=relative) for x, y in zip(a, b, strict=True)]
    each = corrected_confidence(confidence, n_compared=n_compared, looking_at=len(a) if looking else None)
    mean = mean_interval(differences, confidence=each, covariate=gaps)
    scatter = None if mean.lo is None or mean.hi is None else (mean.lo, mean.hi)
    instrument = _instrument(a_bounds, b_bounds, relative=relative)
    gained = None if gain is None or not relative else (mean.mean + math.log(gain[0]), mean.mean + math.log(gain[1]))
    alike = 1.0 if mean.n_effective is None else math.sqrt(mean.n / mean.n_effective)
    return _told(
        mean.mean,
        scatter,
        instrument,
        gained,
        len(a),
        n_effective=mean.n_effective,
        pair_scatter=None if mean.scatter is None else mean.scatter * alike,
        relative=relative,
        confidence=confidence,
        n_compared=n_compared,
        looking=looking,
    )


def unpaired_difference(
    a: Sequence[float],
    b: Sequence[float],
    *,
    confidence: float = 0.95,
    a_bounds: Bounds | None = None,
    b_bounds: Bounds | None = None,
    gain: Bounds | None = None,
    n_compared: int = 1,
) -> Difference:
    """Compares by ratio two series of block means that make no pairs, each in order of time and above zero.

    Welch's interval (1947, Biometrika 34:28) on the means of the logarithms; each mean's spread allows for autocorrelation, and the
    number of independent values that it leaves gives the degrees of freedom. No pair cancels slow noise here, so that more of it is left
    than in pairs: where n values count as m < n independent ones, they follow it, and scatter about their own mean by (n - n/m) / (n - 1)
    of their variance (expected; Bayley and Hammersley 1946, as of :func:`mean_interval`), which is put right too.

    With noise of a lag-1 autocorrelation r (AR(1), 6,000 repetitions), a 95 % interval on 20 blocks each, as runs on disk are cut into,
    holds the truth in 96-97 % up to r = 0.8, in 95 % at 0.9 and in 87 % at 0.95; on 40 blocks in 95-98 % up to 0.95; on 10 in 96-98 %
    up to 0.3, 94 % at 0.6, 88 % at 0.8 and 81 % at 0.9. Noise that wanders for longer than a series lasts shows in no series how far
    it goes: only more runs of each tell that.

    ``a_bounds`` and ``b_bounds`` are what the meter warrants of each series as a whole; the rest is as of :func:`paired_difference`.

    Raises:
        ArgumentError: an empty series, or a value that is not finite or not above zero; bounds and confidence as there.
    """
    bounds = [None if one is None else [one] for one in (a_bounds, b_bounds)]
    for side in (a, b):
        _check(side, side, None, relative=True, others=())
    _check_bounds(*bounds)
    each = corrected_confidence(confidence, n_compared=n_compared)
    means = [mean_interval([math.log(value) for value in side], confidence=each) for side in (a, b)]
    estimate = means[1].mean - means[0].mean
    spreads, dofs = [], []
    for mean in means:
        if mean.lo is not None and mean.hi is not None and mean.n_effective is not None:
            dofs.append(_dof(mean.n, mean.n_effective, 1))
            followed = (mean.n - 1) / (mean.n - mean.n / mean.n_effective)
            spreads.append((mean.hi - mean.lo) / 2 / t_quantile(0.5 + each / 2, dofs[-1]) * math.sqrt(followed))
    scatter: Bounds | None = None
    if len(spreads) == len(means):
        variance = math.fsum(spread**2 for spread in spreads)
        parts = math.fsum(spread**4 / dof for spread, dof in zip(spreads, dofs, strict=True))
        half = math.sqrt(variance) * t_quantile(0.5 + each / 2, variance**2 / parts if parts else math.inf)
        scatter = estimate - half, estimate + half
    instrument = _instrument(*bounds, relative=True)
    gained = None if gain is None else (estimate + math.log(gain[0]), estimate + math.log(gain[1]))
    n_effective = min((mean.n_effective for mean in means if mean.n_effective is not None), default=None)
    return _told(
        estimate,
        scatter,
        instrument,
        gained,
        min(len(a), len(b)),
        n_effective=n_effective,
        pair_scatter=None,
        relative=True,
        confidence=confidence,
        n_compared=n_compared,
        looking=False,
    )


def corrected_confidence(confidence: float, *, n_compared: int = 1, looking_at: int | None = None) -> float:
    """The confidence of each single interval so that ``n_compared`` of them hold together.

    ``looking_at``: of how many pairs it is, where these were so many because of its width.

    Raises:
        ArgumentError: unless 0 < confidence < 1 and ``n_compared`` is 1 or more.
    """
    _check_confidence(confidence)
    if n_compared < 1:
        raise ArgumentError(f"n_compared={n_compared!r} must be 1 or more.")
    looked = 0.0 if looking_at is None else math.log(max(looking_at, MIN_PAIRS_LOOKING) / MIN_PAIRS_LOOKING)
    return 1 - (1 - confidence) / (1 + _LOOKING_COSTS * looked) / n_compared


def pairs_needed(
    scatter: float,
    difference: float,
    *,
    confidence: float = 0.95,
    power: float = POWER,
    n_compared: int = 1,
    looking: bool = False,
) -> int:
    """How many pairs find a true ``difference`` with probability ``power``, where single pairs scatter by ``scatter`` (standard deviation).

    Both in the same terms, such as 0.02 for 2 %. The smallest n with n >= ((t(1 - alpha/2, n - 2) + t(power, n - 2)) scatter /
    difference)², the usual approximation to the noncentral t (Cohen 1988, ch. 2); n - 2 since a drift is fitted; at least 6 pairs.
    The first quantile grows by as much as :func:`mean_interval` widens on average where neighbours are no more alike than chance, and is
    of as many degrees of freedom as that leaves.

    Raises:
        ArgumentError: unless both are positive and finite and 0.5 <= power < 1.
    """
    if not (0 < scatter < math.inf and 0 < difference < math.inf and 0.5 <= power < 1):
        raise ArgumentError(
            f"Needed are a positive scatter and difference and 0.5 <= power < 1, not {scatter!r}, {difference!r}, {power!r}."
        )

    def enough(n: int) -> bool:
        each = corrected_confidence(confidence, n_compared=n_compared, looking_at=n if looking else None)
        added = _uncertain(n)
        widened = (
            1 + added + (added**2 + 1 / n) / 2 if added else 1.0
        )  # the mean of sqrt((1 + r) / (1 - r)), r scattering by 1 / n
        dof = max(_FEWEST_DOF, n / widened**2 - 2)
        return n * difference**2 >= ((widened * t_quantile(0.5 + each / 2, dof) + t_quantile(power, n - 2)) * scatter) ** 2

    low, high = _MIN_PAIRS_DRIFT - 1, _MIN_PAIRS_DRIFT
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def gain_range(a: Mapping[str, float], b: Mapping[str, float], gain_errors: Mapping[str, float | None]) -> Bounds | None:
    """By which factors the ratio of two sums over sensors may be off, each sensor being off by its own constant gain error.

    A sensor that reads (1 + g) times the truth does so for both sums: of one sensor alone, g cancels, whatever it is. Of several the ratio
    is a weighted mean of the sensors' own ratios, and the errors shift the weights; it is largest where the sensors above some ratio
    read highest and the others lowest. A sensor that states no gain error stands at face value, as joules without bounds do in a sum: the
    range is what the stated errors allow. Assumes a gain that doesn't depend on the load: where a sensor's error changes with the power,
    that change stays in the ratio, and nobody states it.

    Args:
        a: joules by sensor.
        b: joules by sensor, the same sensors.
        gain_errors: the largest relative gain error of each (0.05 = 5 %); ``None`` where it is not stated.

    Returns:
        The lowest and highest factor; ``None`` where there are several sensors and none states a gain error, or joules are missing.
    """
    if a.keys() != b.keys() or not a or min(*a.values(), *b.values()) < 0 or not (sum(a.values()) > 0 and sum(b.values()) > 0):
        return None
    used = [name for name in a if a[name] or b[name]]
    if len(used) == 1:
        return 1.0, 1.0
    errors = {name: error for name in used if (error := gain_errors.get(name)) is not None}
    if not errors or not all(0 <= error < 1 for error in errors.values()):
        return None
    used.sort(key=lambda name: b[name] / a[name] if a[name] else math.inf)
    plain = math.fsum(b[name] for name in used) / math.fsum(a[name] for name in used)
    ratios = []
    for split in range(len(used) + 1):
        for sign in (1, -1):
            gains = {name: 1 + errors.get(name, 0.0) * (sign if place >= split else -sign) for place, name in enumerate(used)}
            ratios.append(
                math.fsum(gains[name] * b[name] for name in used) / math.fsum(gains[name] * a[name] for name in used) / plain
            )
    return min(ratios), max(ratios)


def mean_interval(values: Sequence[float], *, confidence: float = 0.95, covariate: Sequence[float] | None = None) -> Interval:
    """The mean of values in order of time, with a t-interval that allows for lag-1 autocorrelation.

    With a ``covariate`` (and enough values), the value where it is zero: the intercept of a least-squares line. Where the
    residuals' lag-1 autocorrelation is r, n values tell as much of their mean as n (1 - r) / (1 + r) independent ones (Bayley and
    Hammersley 1946, J. R. Stat. Soc. Suppl. 8:184; in t-tests: Zwiers and von Storch 1995, J. Climate 8:336). r is corrected for its
    bias of -(1 + 3 r) / n (Marriott and Pope 1954, Biometrika 41:390), and 2 / n is added, since a few values don't tell r; r below
    zero narrows the interval as r above zero widens it, which is why 95 % stays 95-96 % where there is no autocorrelation. Where r is
    positive beyond chance (one-sided 5 %), the degrees of freedom are those of the independent values too, ``n_effective``, but no fewer
    than two.

    Raises:
        ArgumentError: where there is no value, one is not finite, or the confidence is not between 0 and 1.
    """
    _check_confidence(confidence)
    n = len(values)
    if not n or not all(math.isfinite(value) for value in values):
        raise ArgumentError(f"An interval needs one finite value or more; these are {list(values)}.")
    line = _line(covariate, values) if covariate is not None and n >= _MIN_PAIRS_DRIFT else None
    mean, residuals, leverage, fitted = line or _flat(values)
    if n < _MIN_PAIRS:
        return Interval(mean, None, None, n, None)
    inflation, n_effective = _alike(residuals)
    variance = math.fsum(residual**2 for residual in residuals) / (n - fitted)
    spread = math.sqrt(variance * leverage * inflation)
    half = spread * t_quantile(0.5 + confidence / 2, _dof(n, n_effective, fitted))
    return Interval(mean, mean - half, mean + half, n, n_effective, math.sqrt(variance))


@lru_cache(maxsize=256)
def t_quantile(probability: float, dof: float) -> float:
    """Quantile of Student's t with ``dof`` > 0 degrees of freedom, not necessarily whole; ``probability`` in (0, 1).

    Raises:
        ArgumentError: outside these ranges.
    """
    if not (0 < probability < 1 and dof > 0):
        raise ArgumentError(f"A t quantile needs 0 < probability < 1 and dof > 0, not {probability!r} and {dof!r}.")
    if probability <= 0.5:
        return -t_quantile(1 - probability, dof) if probability < 0.5 else 0.0
    if dof > _NORMAL_DOF:
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, 1.0
    while _t_tail(high, dof) > 1 - probability:
        low, high = high, 2 * high
    t = (low + high) / 2
    while high - low > _PRECISION * high:  # Newton's method, between bounds that close in
        beyond = _t_tail(t, dof) - (1 - probability)
        low, high = (t, high) if beyond > 0 else (low, t)
        better = t + beyond / _t_density(t, dof)
        if abs(better - t) <= _PRECISION * t:
            return better
        t = better if low < better < high else (low + high) / 2
    return t


def _t_density(t: float, dof: float) -> float:
    scale = math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) / math.sqrt(dof * math.pi)
    return float(scale * (1 + t * t / dof) ** (-(dof + 1) / 2))


def _t_tail(t: float, dof: float) -> float:
    """P(T > t) for t >= 0, half the regularised incomplete beta I_x(dof/2, 1/2) at x = dof / (dof + t²) (DLMF 8.17)."""
    total = dof + t * t
    return _incomplete_beta(dof / 2, 0.5, dof / total, t * t / total) / 2


def _incomplete_beta(a: float, b: float, x: float, one_minus_x: float) -> float:
    """I_x(a, b) by its continued fraction (DLMF 8.17.22), on the side where that converges fast."""
    if x <= 0 or one_minus_x <= 0:
        return float(one_minus_x <= 0)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, one_minus_x, x)
    logarithm = a * math.log(x) + b * math.log(one_minus_x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))  # Lentz's method; no denominator vanishes for 0 < x < (a + 1) / (a + b + 2)
    fraction = d
    for m in range(1, _MAX_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            c, d = 1 + term / c, 1 / (1 + term * d)
            fraction *= c * d
        if abs(c * d - 1) < _PRECISION / 10:
            break
    return math.exp(logarithm) * fraction / a


_Fit = tuple[float, list[float], float, int]  # value at zero, residuals, its variance over the residual variance, parameters


def _flat(values: Sequence[float]) -> _Fit:
    mean = math.fsum(values) / len(values)
    return mean, [value - mean for value in values], 1 / len(values), 1


def _line(xs: Sequence[float], ys: Sequence[float]) -> _Fit | None:
    """Least squares with a slope, seen at x = 0; ``None`` where zero lies outside the x (that would be extrapolation)."""
    if not min(xs) < 0 < max(xs):
        return None
    n = len(xs)
    x_mean, y_mean = math.fsum(xs) / n, math.fsum(ys) / n
    x_spread = math.fsum((x - x_mean) ** 2 for x in xs)
    slope = math.fsum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / x_spread
    intercept = y_mean - slope * x_mean
    residuals = [y - intercept - slope * x for x, y in zip(xs, ys, strict=True)]
    return intercept, residuals, 1 / n + x_mean**2 / x_spread, 2


def _alike(residuals: Sequence[float]) -> tuple[float, float]:
    """By how much likeness of neighbours raises the variance of the mean, and as how many independent values it lets them count."""
    n = len(residuals)
    power = math.fsum(residual**2 for residual in residuals)
    if n < _MIN_PAIRS_CORRELATION or not power:
        return 1.0, float(n)
    raw = math.fsum(x * y for x, y in pairwise(residuals)) / power
    correlation = min(max(raw + (1 + 3 * raw) / n + _uncertain(n), _MIN_CORRELATION), _MAX_CORRELATION)
    inflation = min((1 + correlation) / (1 - correlation), n / _FEWEST_EFFECTIVE)
    beyond_chance = raw + 1 / n > _ONE_SIDED_5_PERCENT / math.sqrt(n)
    return inflation, n / inflation if beyond_chance else float(n)


def _dof(n: int, n_effective: float, fitted: int) -> float:
    """Degrees of freedom of the spread of so many values, of which neighbours may be alike."""
    return min(n - fitted, max(_FEWEST_DOF, n_effective - fitted))


def _uncertain(n: int) -> float:
    """What is added to the lag-1 autocorrelation of ``n`` residuals, since it is not known better."""
    if n < _MIN_PAIRS_CORRELATION:
        return 0.0
    return _UNCERTAIN / n * min(1.0, (n - 4) / (_PAIRS_IN_FULL - 4))


def _difference(a: float, b: float, *, relative: bool) -> float:
    """``b`` over ``a`` as a logarithm, or ``b - a``. A bound of zero gives an infinite logarithm."""
    if not relative:
        return b - a
    if a <= 0:
        return math.inf
    return -math.inf if b <= 0 else math.log(b / a)


def _instrument(
    a_bounds: Sequence[Bounds] | None, b_bounds: Sequence[Bounds] | None, *, relative: bool
) -> tuple[float, float] | None:
    """Mean of the lowest and of the highest difference that each pair's bounds allow. Not in quadrature: errors are correlated."""
    if a_bounds is None or b_bounds is None:
        return None
    lows = [_difference(a_hi, b_lo, relative=relative) for (_, a_hi), (b_lo, _) in zip(a_bounds, b_bounds, strict=True)]
    highs = [_difference(a_lo, b_hi, relative=relative) for (a_lo, _), (_, b_hi) in zip(a_bounds, b_bounds, strict=True)]
    return sum(lows) / len(lows), sum(highs) / len(highs)


def _told(
    estimate: float,
    scatter: Bounds | None,
    instrument: Bounds | None,
    gained: Bounds | None,
    n_blocks: int,
    *,
    n_effective: float | None,
    pair_scatter: float | None,
    relative: bool,
    confidence: float,
    n_compared: int,
    looking: bool,
) -> Difference:
    """The difference of an estimate and intervals that are logarithms where ``relative``."""
    out = _ratio_less_one if relative else float
    ends = [(None, None) if one is None else (out(one[0]), out(one[1])) for one in (scatter, instrument, gained)]
    (lo, hi), (instrument_lo, instrument_hi), (gain_lo, gain_hi) = ends
    note = _note(scatter, instrument, gained)
    return Difference(
        estimate=out(estimate),
        lo=lo,
        hi=hi,
        n_blocks=n_blocks,
        relative=relative,
        confidence=confidence,
        distinguishable=not note,
        instrument_lo=instrument_lo,
        instrument_hi=instrument_hi,
        n_effective=n_effective,
        note=note,
        gain_lo=gain_lo,
        gain_hi=gain_hi,
        n_compared=n_compared,
        looking=looking,
        scatter=pair_scatter,
    )


def _note(scatter: Bounds | None, instrument: Bounds | None, gained: Bounds | None) -> str:
    """Why the two can't be told apart; empty where they can."""
    if scatter is None:
        return "can't be told apart: one block of each has no scatter to judge by"
    if scatter[0] <= 0 <= scatter[1]:
        return "can't be told apart: the interval spans zero"
    if instrument is not None and (instrument[0] <= 0 <= instrument[1] or instrument[0] * scatter[0] < 0):
        return "can't be told apart: the meter's own bounds span zero"
    if gained is not None and gained[0] <= 0 <= gained[1]:
        return "can't be told apart: the sensors' gain errors, unlike each other, could make up the difference"
    return ""


def _ratio_less_one(logarithm: float) -> float:
    return math.expm1(logarithm) if logarithm < _LARGEST_LOG else math.inf


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence is {confidence!r}; give a number between 0 and 1, such as 0.95.")


def _check(
    a: Sequence[float],
    b: Sequence[float],
    gaps: Sequence[float] | None,
    *,
    relative: bool,
    others: tuple[Sequence[Bounds] | None, ...],
) -> None:
    if not a or any(len(other) != len(a) for other in (b, gaps, *others) if other is not None):
        raise ArgumentError(
            f"Blocks are compared in pairs, one pair or more: a has {len(a)}, b has {len(b)}, gaps and bounds have "
            f"{[None if other is None else len(other) for other in (gaps, *others)]}."
        )
    if not all(math.isfinite(gap) for gap in gaps or ()):
        raise ArgumentError(f"Gaps must be finite: {gaps}.")
    if not all(math.isfinite(value) and (value > 0 or not relative) for value in (*a, *b)):
        raise ArgumentError(
            f"Block means must be finite{' and above zero to be compared by ratio' if relative else ''}: {list(a)}, {list(b)}."
        )


def _check_bounds(a_bounds: Sequence[Bounds] | None, b_bounds: Sequence[Bounds] | None) -> None:
    if (a_bounds is None) != (b_bounds is None):
        raise ArgumentError("Bounds of one variant alone bound no difference; give a_bounds and b_bounds, or neither.")
    for lo, hi in (*(a_bounds or ()), *(b_bounds or ())):
        if not lo <= hi:
            raise ArgumentError(f"Bounds go from the lowest to the highest, not ({lo!r}, {hi!r}).")
