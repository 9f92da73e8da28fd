"""What a GPU's energy counter is like: how often it moves, what a reading costs, and whether it sees all of the power.

:func:`calibrate` measures it in a few seconds, with the device idle, busy, and busy in bursts whose period is close to the counter's
own, so that their phase sweeps slowly. A counter that looks at the power only part of the time (25 of every 100 ms were reported,
arXiv 2312.02741) then beats: its joules rise and fall with the phase while the true mean stays. Where steps recur near a small ratio
of such a counter's period (:func:`near_commensurate`) the beat is so slow that means over many steps are wrong, too.

Results are kept per device model and driver in the user's cache directory: :func:`save`, :func:`load`.
"""

# torch is imported where a burst is made: the rest works without it.

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect_left
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from green_torch.cache import cache_file, entries, keep
from green_torch.errors import MeterError
from green_torch.records import Method
from green_torch.units import NS_PER_S, ns_to_s, s_to_ns

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence

    from green_torch.meters.nvml import NvmlMeter
    from green_torch.records import Domain

    Burst = Callable[[float], None]

TOLERANCE = 0.03  # relative; a beat that is slower than 1 / 0.03 counter periods counts as near-commensurate
_RATIOS = tuple(sorted({p / q for p in (1, 2, 3) for q in (1, 2, 3)}))  # of the counter's period to the step's
_POLL_S = 0.001
_SHARES = (0.3, 0.2, 0.5)  # of the duration: idle, busy, bursts
_SETTLING = 0.4  # of the idle and the busy stretch, left out of the agreement: power sensors lag
_SWEEPS = 2  # times that the bursts' phase goes round
_PIECES = 8  # readings of the counter per period while the device is busy
_FEWEST_UPDATES = 5
_FEWEST_BEATS = 10
_PART_TIME_BEAT = 0.3  # of the beat of a single glance per period; a counter that sees 74 % of the time beats so much
_LEAST_RISE_W = 5.0
_GLANCE = 2 / math.pi  # first harmonic of a square wave of height 1, as a single glance per period sees it
_FILE = "calibration.json"


@dataclass(frozen=True, slots=True)
class Calibration:
    """A counter's character. What could not be measured is ``None``, and ``reasons`` say why.

    ``period_*_s``: between updates. ``read_*_us``: what a reading costs. ``shared``: other processes were on the device.
    ``agreement``: the counter's joules over integrated power, with its standard error. ``beat``: how much of the device's rise in power
    shows up in the counter's mean as the bursts' phase goes round, from 0 (sees everything) to 1 (one glance a period).
    """

    device: str
    driver: str
    period_median_s: float | None
    period_p5_s: float | None
    period_p95_s: float | None
    read_median_us: float
    read_p99_us: float
    shared: bool
    agreement: float | None
    agreement_error: float | None
    part_time: bool | None
    beat: float | None
    beat_error: float | None
    reasons: tuple[str, ...] = ()

    def lines(self) -> list[tuple[str, str]]:
        """Name and text of each finding, for whatever prints it."""
        found = [("device", f"{self.device}, driver {self.driver}{', shared with other processes' if self.shared else ''}")]
        if self.period_median_s and self.period_p5_s and self.period_p95_s:
            spread = f"{self.period_p5_s * 1e3:.1f} to {self.period_p95_s * 1e3:.1f} ms"
            found.append(("update period", f"{self.period_median_s * 1e3:.1f} ms ({spread} in 90 % of updates)"))
        found.append(("a reading takes", f"{self.read_median_us:.1f} µs (99 % within {self.read_p99_us:.1f} µs)"))
        if self.agreement is not None:
            found.append(("counter / integrated power", f"{self.agreement:.3f} ± {self.agreement_error:.3f}"))
        if self.part_time is not None:
            answer = "sees only part of the power" if self.part_time else "sees all of the power"
            found.append(("the counter", f"{answer} (beat {self.beat:.2f} ± {self.beat_error:.2f} of 1)"))
        return found + [("not known", reason) for reason in self.reasons]


# --- measuring


@dataclass(frozen=True, slots=True)
class _Knot:
    """A change of the counter: seen between two instants."""

    lo_ns: int
    hi_ns: int
    energy_j: float

    @property
    def at_ns(self) -> float:
        return (self.lo_ns + self.hi_ns) / 2


@dataclass(frozen=True, slots=True)
class _Agreement:
    counted_j: float
    integrated_j: float
    error_j: float


class _Watch:
    """Reads one meter again and again, and remembers what it saw and when the device was kept busy."""

    def __init__(self, meter: NvmlMeter, now_ns: Callable[[], int], sleep: Callable[[float], None]) -> None:
        self.knots: list[_Knot] = []
        self.costs_ns: list[int] = []
        self.powers: list[tuple[int, float]] = []
        self.bursts: list[tuple[int, int]] = []
        self.no_power = ""
        self._meter = meter
        self._now_ns = now_ns
        self._sleep = sleep
        self._name = meter.domains[0].name
        self._last: tuple[int, float] | None = None

    def idle(self, until_ns: int) -> None:
        """Leaves the device alone and reads every millisecond."""
        while self._now_ns() < until_ns:
            self.read()
            self._sleep(min(_POLL_S, max(0.0, ns_to_s(until_ns - self._now_ns()))))

    def busy(self, until_ns: int, burst: Burst, piece_s: float) -> None:
        """Keeps the device busy, and reads between pieces of that."""
        while (now_ns := self._now_ns()) < until_ns:
            self.read()
            burst(min(piece_s, ns_to_s(until_ns - now_ns)))
            self.bursts.append((now_ns, self._now_ns()))

    def read(self) -> None:
        reading = self._meter.read()
        energy_j = reading.energy_j[self._name]
        self.costs_ns.append(reading.end_ns - reading.begin_ns)
        if self._last is not None and energy_j != self._last[1]:
            self.knots.append(_Knot(self._last[0], reading.end_ns, energy_j))
        self._last = (reading.begin_ns, energy_j)
        if not self.no_power:
            try:
                self.powers.append((reading.end_ns, self._meter.power_w()))
            except MeterError as error:
                self.no_power = str(error)


def calibrate(
    meter: NvmlMeter,
    *,
    now_ns: Callable[[], int],
    sleep: Callable[[float], None],
    burst: Burst | None = None,
    duration_s: float = 5.0,
) -> Calibration:
    """Measures a GPU's counter for about ``duration_s`` seconds, on a device that is otherwise idle.

    Args:
        meter: of one GPU; ``now_ns`` is the clock of its readings.
        now_ns: nanoseconds of a monotonic clock.
        sleep: waits so many seconds.
        burst: keeps that GPU busy for so many seconds, and returns when it is idle again (:func:`cuda_burst`). Without it, whether
            the counter is part-time is not found out.
        duration_s: 5 s give some 25 bursts on a counter of 100 ms.

    Raises:
        MeterError: the GPU can't be read.
    """
    domain, watch, reasons = meter.domains[0], _Watch(meter, now_ns, sleep), []
    counted = domain.method is Method.COUNTER
    begin_ns = now_ns()
    lengths_ns = [s_to_ns(share * duration_s) for share in _SHARES]
    watch.idle(begin_ns + (lengths_ns[0] if burst is not None and counted else sum(lengths_ns)))
    periods = _periods(watch.knots, len(watch.costs_ns)) if counted else []
    stretches = [(begin_ns, now_ns())]
    part_time = beat = beat_error = None
    if not counted:
        reasons.append("update period, agreement, part-time: the driver has no energy counter here, its power is integrated")
    elif not periods:
        reasons.append(
            f"update period, part-time: the counter changed {len(watch.knots)} times in {len(watch.costs_ns)} readings"
        )
    elif burst is None:
        reasons.append("part-time: nothing here can keep the GPU busy in bursts (torch with CUDA is needed)")
    else:
        period_s = statistics.median(periods)
        busy_ns = now_ns()
        watch.busy(busy_ns + lengths_ns[1], burst, period_s / _PIECES)
        stretches.append((busy_ns, now_ns()))
        sweep_ns = now_ns()
        beat_s = _sweep(watch, burst, now_ns, period_s, lengths_ns[2])
        beat, beat_error, why = _beat(watch, stretches, sweep_ns, period_s, beat_s)
        if beat is not None and beat_error is not None:
            part_time, why = _verdict(beat, beat_error)
        reasons += [f"part-time: {why}"] if why else []
    agreement, agreement_error = _agreement(watch, stretches) if counted else (None, None)
    if counted and agreement is None:
        reasons.append(f"agreement: {watch.no_power or 'too few updates, or no power to compare with'}")
    costs_us = sorted(cost_ns / 1e3 for cost_ns in watch.costs_ns)
    return Calibration(
        device=domain.device,
        driver=_driver(domain),
        period_median_s=statistics.median(periods) if periods else None,
        period_p5_s=_quantile(periods, 0.05) if periods else None,
        period_p95_s=_quantile(periods, 0.95) if periods else None,
        read_median_us=statistics.median(costs_us),
        read_p99_us=_quantile(costs_us, 0.99),
        shared=meter.shared_now(),
        agreement=agreement,
        agreement_error=agreement_error,
        part_time=part_time,
        beat=beat,
        beat_error=beat_error,
        reasons=tuple(reasons),
    )


def _periods(knots: Sequence[_Knot], n_readings: int) -> list[float]:
    """Seconds between updates; none where there were too few, or where nearly every reading saw another value."""
    if len(knots) <= _FEWEST_UPDATES or len(knots) > 0.5 * n_readings:
        return []
    return [ns_to_s(after.at_ns - before.at_ns) for before, after in pairwise(knots)]


def _sweep(watch: _Watch, burst: Burst, now_ns: Callable[[], int], period_s: float, length_ns: int) -> float:
    """Bursts whose phase against the counter goes round ``_SWEEPS`` times; returns their period in seconds."""
    n_bursts = max(1, math.floor(length_ns / NS_PER_S / period_s))
    beat_s = period_s * (1 + _SWEEPS / n_bursts)
    begin_ns = now_ns()
    for number in range(n_bursts):
        start_ns = begin_ns + s_to_ns(number * beat_s)
        watch.busy(start_ns + s_to_ns(beat_s / 2), burst, period_s / _PIECES)
        watch.idle(start_ns + s_to_ns(beat_s))
    return beat_s


# --- judging: pure


def _beat(
    watch: _Watch, stretches: Sequence[tuple[int, int]], sweep_ns: int, period_s: float, beat_s: float
) -> tuple[float | None, float | None, str]:
    """How far the counter's mean power swings with the bursts' phase, of what a single glance a period would; its standard error.

    What each update has counted is compared with what the bursts, as they were, must have brought since the one before. The rest is
    fitted with a first harmonic of the phase.
    """
    idle_w, busy_w = (_mean_power(_within(watch.knots, *stretch)) for stretch in stretches)
    if idle_w is None or busy_w is None or busy_w - idle_w < _LEAST_RISE_W:
        return None, None, "the bursts did not raise the GPU's power (is it busy with other work?)"
    rise_w = busy_w - idle_w
    rows = []
    for before, after in pairwise(_within(watch.knots, sweep_ns, math.inf)):
        if abs(ns_to_s(after.at_ns - before.at_ns) - period_s) > period_s / 2:  # an update went unseen
            continue
        busy_s = sum(max(0.0, min(end, after.at_ns) - max(start, before.at_ns)) for start, end in watch.bursts) / NS_PER_S
        phase = 2 * math.pi * ns_to_s(after.at_ns - sweep_ns) / beat_s
        counted_w = (after.energy_j - before.energy_j) / period_s
        rows.append((phase, (counted_w - idle_w) / rise_w - busy_s / period_s))
    if len(rows) < _FEWEST_BEATS:
        return None, None, f"only {len(rows)} updates of the counter were seen during the bursts: calibrate for longer"
    mean = statistics.fmean(rest for _, rest in rows)
    cosine, sine = (2 * statistics.fmean((rest - mean) * wave(phase) for phase, rest in rows) for wave in (math.cos, math.sin))
    noise = [rest - mean - cosine * math.cos(phase) - sine * math.sin(phase) for phase, rest in rows]
    error = statistics.pstdev(noise) * math.sqrt(2 / (len(rows) - 3))
    return math.hypot(cosine, sine) / _GLANCE, error / _GLANCE, ""


def _verdict(beat: float, error: float) -> tuple[bool | None, str]:
    """Whether the counter is part-time, or why that can't be said."""
    if beat > max(_PART_TIME_BEAT, 4 * error):
        return True, ""
    if beat + 2 * error < _PART_TIME_BEAT:
        return False, ""
    return None, f"the beat of {beat:.2f} ± {error:.2f} tells neither way: calibrate for longer, on an idle GPU"


def _agreement(watch: _Watch, stretches: Sequence[tuple[int, int]]) -> tuple[float | None, float | None]:
    """The counter's joules over integrated power while the load was steady, and the standard error of that ratio."""
    parts = []
    for begin_ns, end_ns in stretches:
        settled_ns = begin_ns + _SETTLING * (end_ns - begin_ns)
        part = _compared(_within(watch.knots, settled_ns, end_ns), watch.powers)
        if part is None:
            return None, None
        parts.append(part)
    counted_j, integrated_j = sum(part.counted_j for part in parts), sum(part.integrated_j for part in parts)
    if integrated_j <= 0:
        return None, None
    return counted_j / integrated_j, math.hypot(*(part.error_j for part in parts)) / integrated_j


def _compared(knots: Sequence[_Knot], powers: Sequence[tuple[int, float]]) -> _Agreement | None:
    """Joules between the first and the last of these knots, counted and integrated.

    The error is that of the two instants, and of the power's mean over as many samples as its sensor gave values.
    """
    if len(knots) < _FEWEST_UPDATES or len(powers) < 2:
        return None
    first, last = knots[0], knots[-1]
    begin_ns, end_ns = first.at_ns, last.at_ns
    inside = [
        (begin_ns, _interpolated(powers, begin_ns)),
        *(sample for sample in powers if begin_ns < sample[0] < end_ns),
        (end_ns, _interpolated(powers, end_ns)),
    ]
    integrated_j = sum((a_w + b_w) / 2 * ns_to_s(b_ns - a_ns) for (a_ns, a_w), (b_ns, b_w) in pairwise(inside))
    watts = [power_w for _, power_w in inside]
    n_values = 1 + sum(a != b for a, b in pairwise(watts))
    mean_w = statistics.fmean(watts)
    instants_j = mean_w * ns_to_s(math.hypot(first.hi_ns - first.lo_ns, last.hi_ns - last.lo_ns)) / math.sqrt(12)
    power_j = statistics.pstdev(watts) / math.sqrt(n_values) * ns_to_s(end_ns - begin_ns)
    return _Agreement(last.energy_j - first.energy_j, integrated_j, math.hypot(instants_j, power_j))


def _interpolated(samples: Sequence[tuple[int, float]], at_ns: float) -> float:
    after = min(max(bisect_left(samples, (at_ns,)), 1), len(samples) - 1)
    (a_ns, a_w), (b_ns, b_w) = samples[after - 1], samples[after]
    share = min(max((at_ns - a_ns) / (b_ns - a_ns), 0.0), 1.0) if b_ns > a_ns else 0.0
    return a_w + share * (b_w - a_w)


def _within(knots: Sequence[_Knot], begin_ns: float, end_ns: float) -> list[_Knot]:
    return [knot for knot in knots if begin_ns <= knot.lo_ns and knot.hi_ns <= end_ns]


def _mean_power(knots: Sequence[_Knot]) -> float | None:
    if len(knots) < 2:
        return None
    first, last = knots[0], knots[-1]
    return (last.energy_j - first.energy_j) / ns_to_s(last.at_ns - first.at_ns)


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def near_commensurate(step_s: float, period_s: float) -> bool:
    """Whether steps of this length recur so close to a small ratio of a part-time counter's period that its errors don't average out.

    The ratios are ``p/q`` with ``p, q <= 3``, within ``TOLERANCE`` (3 %): the counter's glances then take more than 33 of its periods
    to go once through a step.
    """
    if not (step_s > 0 and period_s > 0):
        return False
    return any(abs(period_s / step_s - ratio) <= TOLERANCE * ratio for ratio in _RATIOS)


# --- the GPUs at hand


def calibrate_gpus(duration_s: float = 5.0, *, keep: bool = True) -> tuple[list[Calibration], list[str]]:
    """Calibrates every GPU that this process sees, one after the other; the second list says what is missing.

    Raises nothing. Uses torch for the bursts where it has CUDA. ``keep`` the results for later runs.
    """
    from green_torch.meters.nvml import open_meters

    meters, missing = open_meters()
    found: list[Calibration] = []
    for meter in meters:
        try:
            burst = cuda_burst(meter.uuid)
            found.append(calibrate(meter, now_ns=time.monotonic_ns, sleep=time.sleep, burst=burst, duration_s=duration_s))
            if keep:
                save(found[-1])
        except Exception as error:  # a driver or its binding may fail in any way
            missing.append(f"{meter.domains[0].name}: the calibration failed: {type(error).__name__}: {error}")
        finally:
            meter.close()
    return found, missing


def cuda_burst(uuid: str) -> Burst | None:
    """Keeps the CUDA device with this UUID (NVML's, ``GPU-...``) busy with matrix products; ``None`` where torch has no such device."""
    try:
        import torch
    except Exception:  # a broken build raises OSError and others
        return None
    if not torch.cuda.is_available():
        return None
    devices = range(torch.cuda.device_count())
    wanted = uuid.removeprefix("GPU-")
    index = next((i for i in devices if str(torch.cuda.get_device_properties(i).uuid) == wanted), None)
    if index is None:
        return None
    device = torch.device("cuda", index)
    a = torch.randn(2048, 2048, device=device, dtype=torch.float16)
    out = torch.empty_like(a)

    def burst(duration_s: float) -> None:
        end_ns = time.monotonic_ns() + s_to_ns(duration_s)
        while time.monotonic_ns() < end_ns:
            for _ in range(4):
                torch.mm(a, a, out=out)
            torch.cuda.synchronize(device)

    burst(0.2)  # the first product loads libraries
    return burst


# --- what is kept


def part_time_periods(domains: Iterable[Domain], *, cache_dir: str | os.PathLike[str] | None = None) -> dict[str, float]:
    """The update period, in seconds, of each counter that a calibration kept here found to be part-time, by the domain's name."""
    periods = {}
    for domain in domains:
        if domain.method is not Method.COUNTER or not domain.source.startswith("NVML"):
            continue
        kept = load(domain.device, _driver(domain), cache_dir=cache_dir)
        if kept is not None and kept.part_time and kept.period_median_s:
            periods[domain.name] = kept.period_median_s
    return periods


def load(device: str, driver: str, *, cache_dir: str | os.PathLike[str] | None = None) -> Calibration | None:
    """The calibration kept for this device model and driver; ``None`` where there is none that can be read."""
    entry = entries(cache_file(_FILE, cache_dir)).get(_key(device, driver))
    try:
        return None if entry is None else _restored(entry)
    except (TypeError, ValueError):
        return None


def save(calibration: Calibration, *, cache_dir: str | os.PathLike[str] | None = None) -> None:
    """Keeps a calibration, whole or not at all; a cache that can't be written is done without."""
    keep(cache_file(_FILE, cache_dir), _key(calibration.device, calibration.driver), asdict(calibration))


def _key(device: str, driver: str) -> str:
    return f"{device} | {driver}"


def _driver(domain: Domain) -> str:
    """The driver's version, which stands at the end of an NVML domain's source."""
    return domain.source.rpartition("driver ")[2]


def _restored(entry: dict[str, Any]) -> Calibration:
    """From JSON; raises ``TypeError`` or ``ValueError`` for what is not one of ours."""
    known = {field.name: entry[field.name] for field in fields(Calibration) if field.name in entry}
    restored = Calibration(**{**known, "reasons": tuple(map(str, known.get("reasons", ())))})
    period_s = restored.period_median_s
    if not (period_s is None or (math.isfinite(period_s) and period_s > 0)) or restored.part_time not in {True, False, None}:
        raise ValueError("not a calibration")
    return restored
