"""The CPU's and the memory's energy where no counter can be read: codecarbon's power models, integrated here.

The CPU's model is ``TDP x (0.1 + 0.9 x load^3)`` over the load of the *whole machine* (codecarbon 3.3.2,
``external.hardware.CPU``, mode ``cpu_load``); the memory's is a constant for each DIMM that it guesses (``external.ram.RAM``). Since the cube
of a mean is not the mean of cubes, the watts depend on how often the load is sampled (0.21 to 0.55 x TDP for one load): the
meter asks for a fixed interval, and a reading out of turn that comes too soon after the last sample carries its watts on.

Everything here is ``estimated``. codecarbon is imported in :func:`open_meters` only, with its logger muted; no network.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from green_torch.errors import MeterError
from green_torch.records import Domain, Method, Reading
from green_torch.units import NS_PER_S, ns_to_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from green_torch.protocols import Meter

_SHORTEST_NS = NS_PER_S // 5  # load over less than this is mostly the kernel's 10 ms ticks
_MEND = "type pip install --force-reinstall 'codecarbon>=3.3.2,<4'"


class EstimatedMeter:
    """Integrates modelled watts to cumulative joules, step-wise: the watts of a sample cover the time just passed.

    The first reading is the zero. ``models`` pairs each domain with a function that gives the mean watts since its last call.
    """

    def __init__(
        self,
        models: Sequence[tuple[Domain, Callable[[], float]]],
        interval_s: float = 1.0,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.domains = tuple(domain for domain, _ in models)
        self.interval_s: float | None = interval_s
        self._integrals = {domain.name: _Integral(watts) for domain, watts in models}
        self._now_ns = now_ns

    def read(self) -> Reading:
        """Joules since the first reading.

        Raises:
            MeterError: no model answers.
        """
        begin_ns = self._now_ns()
        energy_j: dict[str, float] = {}
        reasons = []
        for name, integral in self._integrals.items():
            try:
                energy_j[name] = integral.advance(self._now_ns())
            except Exception as error:  # codecarbon and psutil may raise anything; the other domain is not lost with it
                reasons.append(f"{name}: {type(error).__name__}: {error}")
        if not energy_j:
            raise MeterError("codecarbon's power model doesn't answer: " + "; ".join(reasons))
        return Reading(begin_ns, self._now_ns(), energy_j)

    def close(self) -> None:
        """Nothing is held."""


class _Integral:
    """Cumulative joules of one model."""

    __slots__ = ("_energy_j", "_model", "_read_ns", "_sampled_ns", "_watts")

    def __init__(self, model: Callable[[], float]) -> None:
        self._model = model
        self._energy_j = 0.0
        self._watts: float | None = None
        self._read_ns: int | None = None
        self._sampled_ns = 0

    def advance(self, now_ns: int) -> float:
        """Joules up to now. A model that fails leaves the time open: its next watts cover it."""
        if self._read_ns is None:
            self._model()  # only sets where the load counts from
            self._read_ns = self._sampled_ns = now_ns
            return 0.0
        if self._watts is None or now_ns - self._sampled_ns >= _SHORTEST_NS:
            watts = self._model()
            if not math.isfinite(watts) or watts < 0:
                raise MeterError(f"{watts} W is no power")
            self._watts, self._sampled_ns = watts, now_ns
        self._energy_j += self._watts * ns_to_s(max(0, now_ns - self._read_ns))
        self._read_ns = now_ns
        return self._energy_j


def open_meters(
    *, cpu: bool = True, ram: bool = True, interval_s: float = 1.0, now_ns: Callable[[], int] = time.monotonic_ns
) -> tuple[list[Meter], list[str]]:
    """One meter for the domains asked for (``cpu``, ``dram``), and a reason for each that can't be modelled. Never raises.

    Takes 0.5-2 s: codecarbon's import, and its search for the CPU's model and TDP.
    """
    models, missing = [], []
    for name, wanted, model in (("cpu", cpu, _cpu_model), ("dram", ram, _ram_model)):
        if not wanted:
            continue
        try:
            with _muted():
                models.append(model())
        except ImportError as error:
            missing.append(f"{name}: codecarbon can't be imported ({error}): {_MEND}")
        except Exception as error:  # scontrol missing in a Slurm container, an unreadable /proc, ...
            missing.append(f"{name}: codecarbon can't model it ({type(error).__name__}: {error})")
    return ([EstimatedMeter(models, interval_s, now_ns)] if models else []), missing


def _cpu_model() -> tuple[Domain, Callable[[], float]]:
    from codecarbon.core.cpu import DEFAULT_POWER_PER_CORE, TDP
    from codecarbon.core.util import count_cpus, count_physical_cpus
    from codecarbon.external.hardware import CPU, MODE_CPU_LOAD, POWER_CONSTANT

    found = TDP()  # type: ignore[no-untyped-call]  # codecarbon annotates in part
    name = found.model or "unknown CPU"
    threads, sockets = count_cpus(), int(count_physical_cpus())  # type: ignore[no-untyped-call]  # as above
    if found.tdp is None:
        tdp_w, known_as = float(POWER_CONSTANT), f"{POWER_CONSTANT} W that it takes for any CPU it doesn't know (a guess)"
    elif found.tdp == DEFAULT_POWER_PER_CORE * threads:
        tdp_w = float(found.tdp)
        known_as = (
            f"{tdp_w:g} W, {DEFAULT_POWER_PER_CORE} W for each of {threads} threads since it doesn't know the model (a guess)"
        )
    else:
        sockets = sockets if sockets < threads else 1  # a socket for each thread is a virtual machine's fiction
        tdp_w, known_as = found.tdp * float(sockets), f"TDP of {sockets} x {found.tdp:g} W"
    cpu = CPU.from_utils(output_dir="", mode=MODE_CPU_LOAD, model=name, tdp=tdp_w, tracking_mode="machine")  # type: ignore[arg-type]  # any number does
    cpu.start()  # type: ignore[no-untyped-call]  # sets where the load counts from: without it the first sample sleeps
    source = f"codecarbon {version('codecarbon')}: {name}, {known_as}, by the load of the whole machine"
    return Domain("cpu", Method.ESTIMATED, device=name, source=source), lambda: float(cpu.total_power().W)


def _ram_model() -> tuple[Domain, Callable[[], float]]:
    from codecarbon.external.ram import RAM

    ram = RAM(tracking_mode="machine")
    watts = float(ram.total_power().W)  # constant; asked for once, since under Slurm every call may start scontrol
    if watts <= 0:  # codecarbon's way of saying that it failed
        raise MeterError("its model gave 0 W")
    device = f"{ram.machine_memory_GB:.0f} GiB of memory"
    source = f"codecarbon {version('codecarbon')}: {watts:g} W constant, guessed from {device}, whole machine"
    return Domain("dram", Method.ESTIMATED, device=device, source=source), lambda: watts


@contextmanager
def _muted() -> Iterator[None]:
    """Silences codecarbon's logger while we use it (importing it sets level and handler), and leaves it as it was."""
    logger = logging.getLogger("codecarbon")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
