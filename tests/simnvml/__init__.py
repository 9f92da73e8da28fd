"""A simulated NVML for tests and benchmarks: one to eight GPUs whose power, and so whose true energy, is known at every instant.

``with simulated(Gpu(square(60, 300, period_s=0.05))) as sim:`` puts it under ``pynvml`` (torch still sees no GPU) and hands back the
:class:`Sim`: exact truth between two instants, and a virtual clock. Child processes find it through ``sim.child_env()``.
"""

from __future__ import annotations

import ctypes
import random
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.simnvml.build import library

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NS_PER_S = 1_000_000_000
FOREVER_S = 1e9
VIRTUAL_EPOCH_NS = 1_000 * NS_PER_S

KINDS = (
    "not_supported",
    "power_not_supported",
    "lost",
    "error",
    "stuck",
    "reset",
    "backwards",
    "slow",
    "cap",
    "joined",
    "no_sample",
)


@dataclass(frozen=True, slots=True)
class Wave:
    """Power over time: straight lines between (seconds, watts) points; two points at one instant make a jump."""

    points: tuple[tuple[float, float], ...]
    repeat: bool = True


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong for ``start_s <= t < end_s`` after the epoch.

    ``kind`` and what ``arg`` means for it: ``not_supported`` (the energy counter says so), ``power_not_supported``, ``lost`` (GPU
    lost), ``error`` (``arg``: NVML's code), ``stuck`` (the counter stands still), ``reset`` (it starts at zero again at ``start_s``, for
    good), ``backwards`` (it reads ``arg`` joules too little), ``slow`` (each reading takes ``arg`` seconds), ``cap`` (somebody has set the
    power limit to ``arg`` watts), ``joined`` (process ``arg`` is on the GPU, too), ``no_sample`` (GPM fills no sample).
    """

    kind: str
    start_s: float
    end_s: float = FOREVER_S
    arg: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is none of {', '.join(KINDS)}")


def constant(power_w: float) -> Wave:
    """The same power all the time."""
    return Wave(((0.0, power_w), (1.0, power_w)))


def square(low_w: float, high_w: float, *, period_s: float, duty: float = 0.5) -> Wave:
    """High for ``duty`` of each period, then low."""
    edge = period_s * duty
    return Wave(((0.0, high_w), (edge, high_w), (edge, low_w), (period_s, low_w)))


def training(step_s: float, *, low_w: float = 90.0, high_w: float = 380.0, length_s: float = 60.0, seed: int = 0) -> Wave:
    """Training steps of ``step_s``: a wait for data, forward, backward and optimizer, with ramps, noise and a slow drift.

    Step n runs from ``n * step_s``; the whole repeats after ``length_s`` (rounded to whole steps).
    """
    rng = random.Random(seed)
    parts = ((0.10, 0.05), (0.32, 0.75), (0.46, 1.0), (0.12, 0.55))  # share of the step, share of the span of power
    points: list[tuple[float, float]] = [(0.0, low_w)]
    drift, ramp_s = 0.0, 0.02 * step_s
    for n in range(max(1, round(length_s / step_s))):
        drift = 0.98 * drift + rng.gauss(0, 0.01)
        at_s = n * step_s
        for share, level in parts:
            top = low_w + (high_w - low_w) * level * max(0.1, 1 + drift + rng.gauss(0, 0.04))
            points += [(at_s + ramp_s, top), (at_s + share * step_s, top)]
            at_s += share * step_s
    points[-1] = (round(points[-1][0] / step_s) * step_s, points[-1][1])
    return Wave(tuple(points))


def from_file(path: Path | str, *, repeat: bool = False) -> Wave:
    """Points from a text file: a line of seconds and watts each, separated by a comma or blanks; ``#`` begins a comment."""
    rows = [line.split("#")[0].replace(",", " ").split() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return Wave(tuple((float(row[0]), float(row[1])) for row in rows if row), repeat)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One simulated GPU; its place among the arguments is its NVML index. ``pids``: compute processes on it, 0 is the caller.

    ``power_limit_w`` is the board's own and highest limit; the constraints that hold it are told unless ``limits_told`` is off.
    ``traffic_b_per_j > 0`` gives it GPM counters: so many bytes between it and its memory for a joule. ``window_s > 0`` makes the counter part-time. ``jitter_s``: each update comes up to that late. ``cost_s``: how long a reading takes.
    """

    wave: Wave = field(default_factory=lambda: constant(200.0))
    name: str = "NVIDIA A100-SXM4-80GB"
    uuid: str = ""
    bus: int = 0
    architecture: int = 7
    power_limit_w: float = 400.0
    limits_told: bool = True
    temperature_c: int = 45
    sm_clock_mhz: int = 1410
    throttle: int = 0
    memory_bus_bits: int = 5120
    memory_clock_mhz: int = 1593
    traffic_b_per_j: float = 0.0
    energy_supported: bool = True
    instant_supported: bool = True
    power_supported: bool = True
    period_s: float = 0.1
    phase_s: float = 0.0
    jitter_s: float = 0.0
    window_s: float = 0.0
    quantum_mj: float = 1.0
    gain: float = 1.0
    base_j: float = 1234.567
    power_period_s: float = 0.0
    instant_window_s: float = 0.0
    average_window_s: float = 1.0
    cost_s: float = 0.0
    pids: tuple[int, ...] = ()
    pids_denied: bool = False
    migs: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()

    def lines(self, index: int) -> Iterator[str]:
        """The GPU as the C side reads it."""
        for own in fields(self):
            value = getattr(self, own.name)
            if own.name not in {"wave", "pids", "migs", "faults"}:
                yield f"gpu {index} {own.name} {int(value) if isinstance(value, bool) else value}"
        yield from (f"gpu {index} pid {pid}" for pid in self.pids)
        yield from (f"gpu {index} mig {uuid}" for uuid in self.migs)
        yield f"gpu {index} mig_mode {int(bool(self.migs))}"
        yield f"gpu {index} repeat {int(self.wave.repeat)}"
        yield from (f"gpu {index} point {at_s!r} {power_w!r}" for at_s, power_w in self.wave.points)
        yield from (f"gpu {index} fault {own.kind} {own.start_s!r} {own.end_s!r} {own.arg!r}" for own in self.faults)


def uuid_of(index: int) -> str:
    """The UUID that a GPU gets where none is given."""
    return f"GPU-{index:x}{index:x}aa0000-0000-4000-8000-00000000000{index:x}"


class Sim:
    """The simulated driver of this process: its truth, its clock, and what was asked of it."""

    def __init__(
        self,
        gpus: Sequence[Gpu],
        *,
        virtual: bool = True,
        seed: int = 1,
        reloads: Sequence[tuple[float, float]] = (),
        cost_sleeps: bool = False,
        serialise: bool = False,
        driver: str = "555.00.sim",
    ) -> None:
        self.path = library()
        self.lib = ctypes.CDLL(str(self.path))
        self.lib.sim_truth_j.restype = ctypes.c_double
        self.lib.sim_truth_j.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        self.lib.sim_now_ns.restype = ctypes.c_int64
        self.lib.sim_set_time_ns.argtypes = (ctypes.c_int64,)
        self.lib.sim_last_update_ns.restype = ctypes.c_int64
        self.lib.sim_last_update_ns.argtypes = (ctypes.c_int, ctypes.c_int64)
        self.lib.sim_calls.restype = self.lib.sim_inits.restype = ctypes.c_long
        self.gpus = tuple(
            replace(gpu, uuid=gpu.uuid or uuid_of(index), bus=gpu.bus or 0x10 + index) for index, gpu in enumerate(gpus)
        )
        self.virtual = virtual
        self.epoch_ns = VIRTUAL_EPOCH_NS if virtual else time.monotonic_ns()
        head = [
            f"epoch_ns {self.epoch_ns}",
            f"seed {seed}",
            f"driver {driver}",
            f"cost_sleeps {int(cost_sleeps)}",
            f"serialise {int(serialise)}",
            *(f"reload {start_s!r} {end_s!r}" for start_s, end_s in reloads),
            *([f"virtual_ns {self.epoch_ns}"] if virtual else []),
        ]
        self.config = "\n".join([*head, *(line for index, gpu in enumerate(self.gpus) for line in gpu.lines(index))]) + "\n"
        bad = self.lib.sim_load(self.config.encode())
        if bad:
            raise ValueError(f"simnvml does not understand {self.config.splitlines()[bad - 1]!r}")

    # the clock

    def now_ns(self) -> int:
        """The simulator's time: virtual, or CLOCK_MONOTONIC."""
        return int(self.lib.sim_now_ns())

    def at(self, since_epoch_s: float) -> int:
        """That instant, in nanoseconds."""
        return self.epoch_ns + round(since_epoch_s * NS_PER_S)

    def go_to(self, since_epoch_s: float) -> None:
        """Moves virtual time there."""
        self.lib.sim_set_time_ns(self.at(since_epoch_s))

    # the truth

    def truth_j(self, gpu: int, t0_ns: int, t1_ns: int) -> float:
        """The exact energy of a GPU between two instants, faults, gain and quantum apart."""
        return float(self.lib.sim_truth_j(gpu, t0_ns, t1_ns))

    def last_update_ns(self, gpu: int, t_ns: int) -> int:
        """When the counter last changed, as seen at that instant."""
        return int(self.lib.sim_last_update_ns(gpu, t_ns))

    # what was asked of it

    @property
    def samples(self) -> int:
        """GPM samples that were allocated and not freed."""
        return int(self.lib.sim_samples())

    @property
    def references(self) -> int:
        """Calls of nvmlInit less those of nvmlShutdown."""
        return int(self.lib.sim_references())

    @property
    def inits(self) -> int:
        """How often the library went from closed to open."""
        return int(self.lib.sim_inits())

    @property
    def calls(self) -> int:
        """Readings of energy or power so far."""
        return int(self.lib.sim_calls())

    def child_env(self, folder: Path) -> dict[str, str]:
        """Environment variables with which a child process loads this driver as its own (real time only).

        The configuration is written to ``folder``. The child's ``CDLL("libnvidia-ml.so.1")`` finds the simulator: a child that
        imports torch then believes in GPUs, too.
        """
        if self.virtual:
            raise ValueError("virtual time does not reach a child process: simulated(..., virtual=False)")
        config = folder / "simnvml.txt"
        config.write_text(self.config, encoding="utf-8")
        return {"LD_LIBRARY_PATH": str(self.path.parent), "SIMNVML_CONFIG": str(config)}


@contextmanager
def simulated(*gpus: Gpu, **options: Any) -> Iterator[Sim]:
    """The simulated driver under ``pynvml`` for as long as the context lasts; options as for :class:`Sim`."""
    import pynvml

    sim = Sim(gpus, **options)
    before = pynvml.nvmlLib, pynvml._nvmlLib_refcount, dict(pynvml._nvmlGetFunctionPointer_cache)
    pynvml.nvmlLib, pynvml._nvmlLib_refcount = sim.lib, 0
    pynvml._nvmlGetFunctionPointer_cache.clear()
    try:
        yield sim
    finally:
        pynvml.nvmlLib, pynvml._nvmlLib_refcount = before[0], before[1]
        pynvml._nvmlGetFunctionPointer_cache.clear()
        pynvml._nvmlGetFunctionPointer_cache.update(before[2])
