"""How many joules, and between which bounds, passed between two instants: the pure estimator behind every figure.

A cumulative counter is seen only through readings, and changes only at its own update instants. Each change is a *knot*: the
value ``E_k`` and an interval ``[lo_k, hi_k]`` that holds the update instant (the start of the last reading that still saw the
old value, the end of the first that saw the new one). With power assumed within ``[0, p_max]``, the true cumulative energy at an
instant ``t`` lies between::

    lower(t) = max over k of  E_k                          if hi_k <= t,  else  E_k - p_max (hi_k - t)
    upper(t) = min over k of  E_k + q                      if lo_k >= t,  else  E_k + q + p_max (t - lo_k)

with ``q`` the counter's quantum. Any subset of knots gives valid bounds, so only the nearest are looked at and old ones are
forgotten. The estimate is linear between knots, or follows the shape that the steps have shown (:class:`_Shape`) where they have one:
it telescopes, keeps to the counter at every knot, and is clipped to the bounds. An interval
``[a, b]`` then holds between ``lower(b) - upper(a)`` and ``upper(b) - lower(a)`` joules, clipped to ``[0, p_max (b - a)]``. Where a
boundary itself is known only to lie in an interval, each bound is taken at that end of it which makes it the wider.

A counter that goes back (a driver reload, a glitch) begins a new *epoch*, and so does one that leaps by more than ``p_max`` can have
brought (it may be on its way back). What passed unseen is taken at the last power. Bounds hold within an epoch; an interval across
two is bounded by the power alone.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from dataclasses import dataclass
from operator import mul
from statistics import median
from typing import TYPE_CHECKING

from green_torch.records import Flag, Method
from green_torch.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from green_torch.records import Domain, Instant

POWER_HEADROOM = 1.5  # p_max over the device's power limit: limits are control targets, transients pass them
_NEAR = 3  # knots looked at on either side of an instant
_KEPT = 32  # knots kept before the oldest instant still needed: the last power is the mean over as many
_STRETCHES = 32  # separate stretches of time that a sum keeps apart
_TRIM_AT = 128  # knots after which trimming is worth its cost
_GAPS = 16  # gaps between updates that a counter's noise is taken from, and its period at first
_LONG = 64  # updates that its period is taken from
_REVIEW = 8  # updates between two looks at the medians, once there are many
_FEW_GAPS = 5  # so few tell no period
_TELLING = 0.7  # brackets wider than this share of the period hide its multiples
_TIMER_NS = 3e4  # no counter keeps time better
_MARKS = 128  # step boundaries remembered
_PIECES = 8  # of a step's power profile
_LEARNING = 0.7  # how far one interval corrects the profile
_MEMORY = 0.02  # share of the newest interval in running means
_COVERED = 4  # an interval of more steps than this tells nothing of their shape


@dataclass(frozen=True, slots=True)
class Level:
    """Cumulative joules at an instant, which may have been so much earlier or later than it is taken to be.

    Levels of different ``epoch`` (a counter reset lies between) share no bounds. A ``guessed`` one was asked for before it was
    settled, or rests on such a one: its bounds hold, but its estimate may be far off.
    """

    energy_j: float
    lo_j: float
    hi_j: float
    epoch: int
    early_ns: float = 0.0
    late_ns: float = 0.0
    guessed: bool = False


@dataclass(frozen=True, slots=True)
class Amount:
    """Joules over an interval, with bounds; ``vacuous`` when the bounds are no tighter than ``[0, p_max x duration]``."""

    energy_j: float
    lo_j: float
    hi_j: float
    vacuous: bool = False


class DomainTimeline:
    """The knots of one domain. Observe readings in the order they were taken; ask for levels in order of time."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.counted = domain.method is Method.COUNTER
        limit = domain.power_limit_w
        self.p_max_w = math.inf if limit is None else POWER_HEADROOM * limit
        self._p_max_per_ns = self.p_max_w / NS_PER_S
        self._at: list[float] = []
        self._lo: list[float] = []
        self._hi: list[float] = []
        self._e: list[float] = []
        self._epochs_gone = 0  # epochs whose knots are all forgotten
        self._starts = [0]  # index of each remaining epoch's first knot
        self._period_ns = math.inf  # no two updates were seen closer together than this
        self._rhythm = Rhythm()
        self._shape = _Shape()
        self._offset_j = 0.0  # added to raw readings, so that levels go on across a reset
        self._raw_j: float | None = None
        self._seen_begin_ns = 0  # start of the last reading that saw the current value

    @property
    def knots(self) -> int:
        """Counter changes in memory."""
        return len(self._e)

    def stood_still(self, since_ns: int) -> bool:
        """Whether the counter was read after an instant and had not changed since then."""
        return self.counted and bool(self._e) and self._hi[-1] < since_ns <= self._seen_begin_ns

    def observe(self, begin_ns: int, end_ns: int, energy_j: float) -> Flag | None:
        """Takes a reading of the cumulative counter made between two instants.

        Returns :attr:`Flag.COUNTER_RESET` when the counter went back, or leapt, else ``None``.
        """
        if self._raw_j is None:
            self._raw_j, self._seen_begin_ns = energy_j, begin_ns
            self._add(-math.inf if self.counted else end_ns, end_ns, energy_j)
            return None
        event = None
        if energy_j < self._raw_j or self._leaps(end_ns, energy_j - self._raw_j):
            self._restart(end_ns, energy_j)
            event = Flag.COUNTER_RESET
        elif energy_j > self._raw_j or not self.counted:
            self._add(self._seen_begin_ns if self.counted else end_ns, end_ns, energy_j + self._offset_j)
        self._raw_j, self._seen_begin_ns = energy_j, begin_ns
        return event

    def settled(self, instant: Instant) -> bool:
        """Whether no later reading can improve the level at this instant.

        A counter asks for a knot after it; before the run's first real change the second one is awaited, since only the slope
        between two tells how much of the first belongs before it.
        """
        if not self._e:
            return False
        if not self.counted:
            return self._at[-1] >= instant.at_ns
        changes = len(self._e) - (self._lo[0] == -math.inf)
        return changes >= 2 and self._lo[-1] >= instant.hi_ns

    def level(self, instant: Instant) -> Level:
        """Cumulative joules at an instant, extrapolated with the last known power where no later knot exists.

        Raises:
            ValueError: nothing was observed yet.
        """
        if not self._e:
            raise ValueError(f"no reading of {self.domain.name} yet")
        if self.counted:
            self._shape.mark(instant.at_ns, self._at, self._e)
        estimate = self._estimate(instant.at_ns)
        epoch = self._epoch_at(instant.at_ns)
        guessed = not self.settled(instant)
        if not self.counted:
            return Level(estimate, estimate, estimate, self._epochs_gone + epoch, guessed=guessed)
        lo_j, hi_j = self._lower(instant.lo_ns, epoch), self._upper(instant.hi_ns, epoch)
        early_ns, late_ns = instant.at_ns - instant.lo_ns, instant.hi_ns - instant.at_ns
        return Level(min(max(estimate, lo_j), hi_j), lo_j, hi_j, self._epochs_gone + epoch, early_ns, late_ns, guessed)

    def forget(self, before_ns: int) -> None:
        """Drops knots that no instant from ``before_ns`` on can need."""
        if len(self._e) < _TRIM_AT:
            return
        cut = bisect_left(self._hi, before_ns) - _KEPT
        if cut > 0:
            for column in (self._at, self._lo, self._hi, self._e):
                del column[:cut]
            gone = bisect_right(self._starts, cut) - 1
            self._epochs_gone += gone
            self._starts = [max(0, start - cut) for start in self._starts[gone:]]

    def amount(self, start: Level, end: Level, duration_s: float) -> Amount:
        """Joules between two levels that lie ``duration_s`` apart; of what is no counter, without bounds (they are the joules)."""
        energy_j = max(0.0, end.energy_j - start.energy_j)
        if not self.counted:
            return Amount(energy_j, energy_j, energy_j)
        longest_s = duration_s + (start.early_ns + end.late_ns) / NS_PER_S
        most_j = self.p_max_w * longest_s if longest_s else 0.0
        if start.epoch != end.epoch:
            return Amount(energy_j, 0.0, max(most_j, energy_j), vacuous=True)
        lo_j = max(0.0, end.lo_j - start.hi_j)
        hi_j = min(end.hi_j - start.lo_j, most_j)
        vacuous = duration_s > 0 and lo_j <= 0.0 and hi_j >= self.p_max_w * duration_s
        # The estimate may leave the clipped bounds by a hair (it telescopes, they don't): bounds only ever widen to hold it.
        return Amount(energy_j, min(lo_j, energy_j), max(hi_j, energy_j), vacuous)

    def _leaps(self, end_ns: int, more_j: float) -> bool:
        """Whether no power can have brought so much since the last update."""
        return self.counted and more_j > self.domain.quantum_j + self._p_max_per_ns * (end_ns - self._lo[-1])

    def _add(self, lo_ns: float, hi_ns: float, energy_j: float) -> None:
        if self._e and self._lo[-1] != -math.inf:
            self._period_ns = min(self._period_ns, hi_ns - self._lo[-1])
        self._append(self._update_at(lo_ns, hi_ns), lo_ns, hi_ns, energy_j)

    def _restart(self, end_ns: int, energy_j: float) -> None:
        """A new epoch. Its count may begin anywhere after the last update that was seen, and is joined on at the last power.

        A first leap is believed, though: nothing says that it is wrong, and the counter's total stands.
        """
        lo_ns = self._lo[-1]
        at_ns = self._update_at(lo_ns, end_ns)
        went_back = energy_j + self._offset_j < self._e[-1] or len(self._starts) > 1 or self._epochs_gone
        level_j = self._e[-1] + self._power(at_ns) if went_back else energy_j + self._offset_j
        self._offset_j = level_j - energy_j
        self._starts.append(len(self._e))
        self._append(at_ns, lo_ns, end_ns, level_j)

    def _power(self, at_ns: float) -> float:
        """Joules from the last knot to an instant after it, at the mean power of the last knots."""
        last = len(self._e) - 1
        first = max(last - _KEPT + 1, int(self._lo[0] == -math.inf))
        if first >= last or self._at[first] == self._at[last]:
            return 0.0
        return (self._e[last] - self._e[first]) / (self._at[last] - self._at[first]) * (at_ns - self._at[last])

    def _update_at(self, lo_ns: float, hi_ns: float) -> float:
        """The likely instant of an update seen within a bracket: its middle, or the last update that fits into a wide one.

        Where the counter has a rhythm, that narrows it further.
        """
        if lo_ns in (-math.inf, hi_ns):
            return hi_ns
        at_ns = self._rhythm.place(lo_ns, hi_ns, max((lo_ns + hi_ns) / 2, hi_ns - self._period_ns / 2))
        return max(at_ns, self._at[-1]) if self._at else at_ns

    def _append(self, at_ns: float, lo_ns: float, hi_ns: float, energy_j: float) -> None:
        self._at.append(at_ns)
        self._lo.append(lo_ns)
        self._hi.append(hi_ns)
        self._e.append(energy_j)

    def _epoch_at(self, at_ns: float) -> int:
        """Which of the remaining epochs an instant falls into: the next one begins when the change was first seen."""
        epoch = len(self._starts) - 1
        while epoch and at_ns < self._hi[self._starts[epoch]]:
            epoch -= 1
        return epoch

    def _near(self, at_ns: float, epoch: int) -> range:
        """Indices of the knots near an instant, of one epoch."""
        first = self._starts[epoch]
        last = self._starts[epoch + 1] if epoch + 1 < len(self._starts) else len(self._e)
        middle = bisect_right(self._at, at_ns, first, last)
        return range(max(first, middle - _NEAR), min(last, middle + _NEAR))

    def _lower(self, t: float, epoch: int) -> float:
        best = -math.inf
        for k in self._near(t, epoch):
            late_ns = self._hi[k] - t
            best = max(best, self._e[k] if late_ns <= 0 else self._e[k] - self._p_max_per_ns * late_ns)
        return best

    def _upper(self, t: float, epoch: int) -> float:
        best = math.inf
        for k in self._near(t, epoch):
            early_ns = t - self._lo[k]
            best = min(best, self._e[k] if early_ns <= 0 else self._e[k] + self._p_max_per_ns * early_ns)
        return best + self.domain.quantum_j

    def _estimate(self, t: float) -> float:
        at, e = self._at, self._e
        after = bisect_left(at, t)
        if after == len(e):
            return e[-1] + self._power(t)
        # The run's first knot is a reading, not an update: no slope may be drawn from it if a later pair exists.
        drawn_from = int(self.counted and self._lo[0] == -math.inf and len(e) > 1)
        if after > drawn_from:
            share = self._shape.share(at[after - 1], t, at[after])
            return e[after - 1] + share * (e[after] - e[after - 1])
        if len(e) > drawn_from + 1 and at[drawn_from + 1] > at[drawn_from]:
            slope = (e[drawn_from + 1] - e[drawn_from]) / (at[drawn_from + 1] - at[drawn_from])
            return max(e[0], e[drawn_from] - slope * (at[drawn_from] - t)) if drawn_from else e[0]
        return e[0]


class Rhythm:
    """Where in its bracket an update most likely lies: a Kalman filter of the instants of a counter that updates regularly.

    The period is the mean over many updates (over few, the median of their gaps), and the gaps' spread the noise. It says nothing
    where the brackets are nearly as wide as the period (the gaps' multiples can't be told) or where the expected instant lies outside:
    then the middle stands. Only estimates follow it, never bounds.
    """

    __slots__ = ("_at_ns", "_gaps", "_noise", "_placed", "_seen", "_variance", "_widths", "period_ns", "telling")

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=_GAPS)
        self._placed: deque[tuple[int, float]] = deque(maxlen=_LONG)  # updates up to here, and the instant of the last one
        self._widths: deque[float] = deque(maxlen=_GAPS)
        self._at_ns: float | None = None
        self.period_ns: float | None = None
        self._variance = self._noise = 0.0  # of the last instant, and what a period adds to it, in ns squared
        self._seen = 0  # updates placed
        self.telling = False  # the brackets are narrow enough to tell the gaps' multiples

    @property
    def sigma_ns(self) -> float:
        """Standard error of the next update's instant, a period after the last."""
        return math.sqrt(self._variance + self._noise)

    def place(self, lo_ns: float, hi_ns: float, middle_ns: float) -> float:
        """The likely instant of the update seen in this bracket."""
        width_ns = hi_ns - lo_ns
        self._widths.append(width_ns)
        at_ns, variance, updates = middle_ns, width_ns**2 / 12, 1
        if self._at_ns is not None and self.period_ns:
            if self.telling:
                sigma_ns = self.sigma_ns
                prior = sigma_ns**2
                updates = max(1, math.floor((hi_ns + sigma_ns - self._at_ns) / self.period_ns))
                expected_ns = self._at_ns + updates * self.period_ns
                if expected_ns >= lo_ns - 3 * sigma_ns:
                    gain = prior / (prior + variance)
                    seen_ns = middle_ns if width_ns <= self.period_ns else expected_ns
                    at_ns = min(max(expected_ns + gain * (seen_ns - expected_ns), lo_ns), hi_ns)
                    variance *= gain
            else:
                updates = max(1, round((middle_ns - self._at_ns) / self.period_ns))
        if self._at_ns is not None:
            self._gaps.append((at_ns - self._at_ns) / updates)
            self._placed.append(((self._placed[-1][0] if self._placed else 0) + updates, at_ns))
            self._seen += 1
            if len(self._gaps) > _FEW_GAPS and (self._seen < _GAPS or self._seen % _REVIEW == 0):
                self._review()
        self._at_ns, self._variance = at_ns, variance
        return at_ns

    def _review(self) -> None:
        """The period and what changes with it, which take longer than all the rest and move slowly."""
        self.period_ns = median(self._gaps)
        spread_ns = 1.5 * median(abs(gap - self.period_ns) for gap in self._gaps)
        if len(self._placed) > _GAPS:
            # Gaps follow the filter, and the filter them: only a long stretch tells its drift from the counter's period.
            ends = tuple(self._placed)
            quarter = len(ends) // 4
            (first, first_ns), (last, last_ns) = (
                map(sum, zip(*part, strict=True)) for part in (ends[:quarter], ends[-quarter:])
            )
            long_ns = (last_ns - first_ns) / (last - first)
            if abs(long_ns - self.period_ns) <= 3 * spread_ns + _TIMER_NS:  # else the period has just changed
                self.period_ns = long_ns
        self._noise = spread_ns**2 + _TIMER_NS**2
        self.telling = median(self._widths) < _TELLING * self.period_ns


class _Shape:
    """How power is spread over a step, learned from what the counter shows of many steps at many phases.

    A counter's interval that a step boundary falls into must be divided. Power is modelled as a profile of ``_PIECES`` pieces over
    the span between two marks; each finished interval corrects the pieces that it covers (normalised least mean squares). The profile
    is trusted by as much as it foretells the intervals better than a constant power does: not at all where power doesn't follow the
    steps. Only estimates follow it, never bounds.
    """

    __slots__ = ("_done_ns", "_flat", "_marks", "_mean", "_profile", "_shaped", "_spans", "_typical_ns")

    def __init__(self) -> None:
        self._marks: deque[float] = deque(maxlen=_MARKS)
        self._spans: deque[float] = deque(maxlen=_GAPS)
        self._typical_ns = 0.0  # between two marks
        self._done_ns = -math.inf  # learned from every interval up to here
        self._mean: float | None = None
        self._profile = [1.0] * _PIECES  # power in each piece, relative to the mean
        self._flat = self._shaped = 0.0  # mean squared errors of foretelling an interval without and with the profile

    def mark(self, at_ns: float, knots_ns: list[float], energy_j: list[float]) -> None:
        """Takes a step boundary, and learns from the knots' intervals that end before it."""
        marks = self._marks
        if marks and at_ns <= marks[-1]:
            return
        if marks:
            self._spans.append(at_ns - marks[-1])
            self._typical_ns = median(self._spans)
        marks.append(at_ns)
        self._done_ns = max(self._done_ns, marks[0])
        k = bisect_left(knots_ns, self._done_ns)
        while k + 1 < len(knots_ns) and knots_ns[k + 1] <= at_ns:
            begin_ns, self._done_ns = knots_ns[k], knots_ns[k + 1]
            if begin_ns < self._done_ns < begin_ns + _COVERED * self._typical_ns:
                self._learn(begin_ns, self._done_ns, (energy_j[k + 1] - energy_j[k]) / (self._done_ns - begin_ns))
            k += 1

    def share(self, begin_ns: float, at_ns: float, end_ns: float) -> float:
        """The part of the joules between two knots that belongs before an instant between them."""
        trust = 1 - self._shaped / self._flat if self._flat and len(self._spans) > _FEW_GAPS else 0.0
        if trust > 0 and self._marks[0] <= begin_ns and end_ns - begin_ns < _COVERED * self._typical_ns:
            weights = [1 + trust * (power - 1) for power in self._profile]
            before, after = (
                math.fsum(weights[piece] * ns for piece, ns in self._pieces(*interval))
                for interval in ((begin_ns, at_ns), (at_ns, end_ns))
            )
            if before + after > 0:
                return before / (before + after)
        return (at_ns - begin_ns) / (end_ns - begin_ns)

    def _learn(self, begin_ns: float, end_ns: float, power: float) -> None:
        self._mean = power if self._mean is None else self._mean + _MEMORY * (power - self._mean)
        if self._mean <= 0:
            return
        cover = [0.0] * _PIECES
        for piece, ns in self._pieces(begin_ns, end_ns):
            cover[piece] += ns / (end_ns - begin_ns)
        flat = power / self._mean - 1
        error = 1 + flat - sum(map(mul, cover, self._profile))
        self._flat += _MEMORY * (flat**2 - self._flat)
        self._shaped += _MEMORY * (error**2 - self._shaped)
        gain = _LEARNING * error / sum(map(mul, cover, cover))
        self._profile = [max(0.0, own + gain * part) for own, part in zip(self._profile, cover, strict=True)]

    def _pieces(self, begin_ns: float, end_ns: float) -> Iterator[tuple[int, float]]:
        """The profile's pieces between two instants and their nanoseconds; after the last mark come typical spans."""
        marks = self._marks
        i = bisect_right(marks, begin_ns) - 1
        start_ns = marks[i]
        while start_ns < end_ns:
            i += 1
            stop_ns = marks[i] if i < len(marks) else start_ns + self._typical_ns
            width_ns = (stop_ns - start_ns) / _PIECES
            for piece in range(_PIECES):
                left_ns = start_ns + piece * width_ns
                right_ns = left_ns + width_ns
                if right_ns > begin_ns and left_ns < end_ns:
                    yield piece, min(end_ns, right_ns) - max(begin_ns, left_ns)
            start_ns = stop_ns


@dataclass(slots=True)
class _Stretch:
    """Intervals that touch, as one; ``amount`` is kept until it grows."""

    start_ns: int
    start: Level
    end_ns: int
    end: Level
    amount: Amount | None = None


class Telescope:
    """Adds up many intervals of one domain, in any order; where two touch, their boundary's uncertainty cancels.

    The sum of ``n`` touching steps has the bounds of one long step, which is why the mean of many is known so much better than
    one. Only the ends of the resulting stretches are kept; beyond ``_STRETCHES`` of them the oldest is summed for good.
    """

    __slots__ = ("_by_end", "_by_start", "_done_hi_j", "_done_lo_j", "_timeline", "energy_j")

    def __init__(self, timeline: DomainTimeline) -> None:
        self._timeline = timeline
        self.energy_j = 0.0
        self._done_lo_j = self._done_hi_j = 0.0
        self._by_start: dict[int, _Stretch] = {}
        self._by_end: dict[int, _Stretch] = {}

    def add(self, start_ns: int, start: Level, end_ns: int, end: Level, amount: Amount) -> None:
        """Takes one interval that overlaps none before, and its own amount."""
        self.energy_j += amount.energy_j
        if not self._timeline.counted:  # no bounds to keep
            return
        before, after = self._by_end.get(start_ns), self._by_start.get(end_ns)
        if before is not None and before.end.epoch != start.epoch:
            before = None
        if after is not None and after.start.epoch != end.epoch:
            after = None
        if (
            start.epoch != end.epoch
            or start_ns in self._by_start
            or (end_ns in self._by_end and self._by_end[end_ns] is not before)  # would be an overlap
        ):
            self._finish(amount)
            return
        stretch = before or _Stretch(start_ns, start, end_ns, end)
        if before is None:
            self._by_start[start_ns] = stretch
        else:
            del self._by_end[start_ns]
        stretch.end_ns, stretch.end, stretch.amount = end_ns, end, None
        if after is not None:
            del self._by_start[end_ns]
            stretch.end_ns, stretch.end = after.end_ns, after.end
        self._by_end[stretch.end_ns] = stretch
        if len(self._by_start) > _STRETCHES:
            oldest = self._by_start.pop(min(self._by_start))
            del self._by_end[oldest.end_ns]
            self._finish(self._amount(oldest))

    @property
    def bounds_j(self) -> tuple[float, float]:
        """Lower and upper bound of the sum, of a counter; of anything else the sum itself."""
        if not self._timeline.counted:
            return self.energy_j, self.energy_j
        amounts = [stretch.amount or self._amount(stretch) for stretch in self._by_start.values()]
        lo_j = self._done_lo_j + math.fsum(amount.lo_j for amount in amounts)
        hi_j = self._done_hi_j + math.fsum(amount.hi_j for amount in amounts)
        return min(lo_j, self.energy_j), max(hi_j, self.energy_j)

    def _amount(self, stretch: _Stretch) -> Amount:
        duration_s = (stretch.end_ns - stretch.start_ns) / NS_PER_S
        stretch.amount = self._timeline.amount(stretch.start, stretch.end, duration_s)
        return stretch.amount

    def _finish(self, amount: Amount) -> None:
        self._done_lo_j += amount.lo_j
        self._done_hi_j += amount.hi_j
