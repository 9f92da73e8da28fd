"""NVIDIA GPUs: the driver's energy counter, read through NVML, or its power readings integrated where there is no counter.

``open_meters()`` returns one :class:`NvmlMeter` for each GPU that CUDA shows to this process, and the reasons for what is missing.
GPUs are told apart by UUID; their names (``gpu0``) count as CUDA counts. Nothing here initialises CUDA.
NVML: https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html (power and energy are in mW and mJ).
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pynvml

from green_torch.errors import MeterError
from green_torch.meters.gpm import MemoryTraffic
from green_torch.records import Domain, Method, Reading
from green_torch.units import J_PER_MJ, NS_PER_S, ns_to_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

GAIN_ERROR = 0.05  # against an external meter: -5.8 % (A100) to -5.3 % (RTX 4090), arXiv 2312.02741
SAMPLED_INTERVAL_S = 0.05
REOPEN_AFTER_NS = NS_PER_S
LOOK_AGAIN_NS = 30 * NS_PER_S  # for other processes
FIRST_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO of linux/proc_ns.h

_REOPEN = {  # the library's own state is the trouble, so opening it again may help
    pynvml.NVML_ERROR_UNINITIALIZED,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
}
_MEND = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "install the NVIDIA driver, or start the container with --gpus all",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "load the driver: sudo modprobe nvidia",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the driver was updated while the old one runs: sudo reboot",
    pynvml.NVML_ERROR_NOT_SUPPORTED: "this GPU or virtual machine does not tell: nvidia-smi -q -d POWER",
    pynvml.NVML_ERROR_NO_PERMISSION: "this user may not open the GPU: ls -l /dev/nvidia*",
    pynvml.NVML_ERROR_GPU_IS_LOST: "the GPU fell off the bus: sudo dmesg | grep -i xid",
    pynvml.NVML_ERROR_RESET_REQUIRED: "reset the GPU: sudo nvidia-smi --gpu-reset",
}
_THROTTLE = {  # NVML's nvmlClocksEventReasons; being idle or at clocks of the user's choice is no throttling
    pynvml.nvmlClocksThrottleReasonSwPowerCap: "power cap",
    pynvml.nvmlClocksThrottleReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksThrottleReasonSyncBoost: "sync boost",
    pynvml.nvmlClocksThrottleReasonSwThermalSlowdown: "thermal",
    pynvml.nvmlClocksThrottleReasonHwThermalSlowdown: "hardware thermal",
    pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "power brake",
}

_LACKING = (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound)
_END_OF_LIST = {"", "-1", "nodevfiles", "none", "void"}  # the usual ways to say "no GPU from here on"

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Conditions:
    """The state that a GPU was in; ``None`` where it doesn't tell."""

    temperature_c: float | None
    sm_clock_mhz: float | None
    throttle_reasons: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class _Gpu:
    """A GPU that NVML shows: ``slices`` are the UUIDs of its MIG devices."""

    uuid: str
    name: str
    bus_id: str
    mig: bool
    slices: tuple[str, ...] = ()


class _Library:
    """NVML, opened once for all meters of this process and closed with the last of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._open = False
        self.generation = 0  # handles of an earlier generation are dead

    def acquire(self) -> None:
        """Opens NVML for one more user; raises ``NVMLError``."""
        with self._lock:
            self._init()
            self._users += 1

    def release(self) -> None:
        """One user less."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._shutdown()

    def restart(self) -> None:
        """Closes and opens NVML; raises ``NVMLError``."""
        with self._lock:
            self._shutdown()
            self._init()

    def _init(self) -> None:
        if not self._open:
            pynvml.nvmlInit()
            self._open = True
            self.generation += 1

    def _shutdown(self) -> None:
        if self._open:
            self._open = False
            with suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()


_library = _Library()


class NvmlMeter:
    """Cumulative joules of one GPU, found by its UUID.

    The counter's joules are passed on as they are, backwards steps included. Without a counter, power is integrated by trapezoids
    over the readings, from 0 J at the first; an interval in which readings failed is bridged the same way.

    Args:
        uuid: NVML's UUID of the whole GPU, ``GPU-...``.
        name: the domain's name.
        shared: other work is known to run on it (a MIG slice's parent); other processes seen on it set this, too.
        now_ns: the clock of the readings, nanoseconds.

    Raises:
        MeterError: the GPU can't be opened, or tells neither energy nor power.
    """

    def __init__(
        self, uuid: str, *, name: str = "gpu0", shared: bool = False, now_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.uuid = uuid
        self._name = name
        self._device = uuid
        self._now_ns = now_ns
        self._retry_ns = 0
        self._integral_j = 0.0
        self._last: tuple[float, float] | None = None  # instant in ns, watts
        try:
            _library.acquire()
        except pynvml.NVMLError as error:
            raise MeterError(_no_driver(error)) from error
        self._closed = False
        self._looked_ns = now_ns()
        try:
            self._handle = self._find()
            self._device = pynvml.nvmlDeviceGetName(self._handle)
            self._method, self._measure, sensor = _sensor(self._handle)
            driver = pynvml.nvmlSystemGetDriverVersion()
        except pynvml.NVMLError as error:
            self.close()
            raise MeterError(self._why(error)) from error
        counted = self._method is Method.COUNTER
        self._domain = Domain(
            name=name,
            method=self._method,
            device=self._device,
            source=f"NVML {sensor}, driver {driver}",
            power_limit_w=_highest_limit_w(self._handle) if counted else None,
            quantum_j=J_PER_MJ if counted else 0.0,
            gain_error=GAIN_ERROR,
            shared=shared or self.shared_now(),
            uuid=uuid,
        )

    @property
    def domains(self) -> tuple[Domain, ...]:
        """The one domain, this GPU; ``shared`` from the moment that other processes are seen on it."""
        return (self._domain,)

    @property
    def interval_s(self) -> float | None:
        """Left to the sampler for a counter; 50 ms where power is integrated."""
        return None if self._method is Method.COUNTER else SAMPLED_INTERVAL_S

    def read(self) -> Reading:
        """Cumulative joules, with the instants just before and after the driver's answer; raises what :meth:`look` does."""
        self.look_for_others()
        begin_ns, end_ns, energy_j = self.look()
        return Reading(begin_ns, end_ns, {self._name: energy_j})

    def look(self) -> tuple[int, int, float]:
        """A reading as it is: the instants just before and after the driver's answer, and joules.

        After an error the next call simply tries again; where the driver went away, NVML is opened again, once a second at most.

        Raises:
            MeterError: the GPU does not answer, or the meter is closed.
        """
        if self._closed:
            raise MeterError(f"{self._name} is closed; open the meter again")
        begin_ns = self._now_ns()
        try:
            value = self._measure(self._handle) if self._generation == _library.generation else self._value()
        except pynvml.NVMLError as error:
            if error.value not in _REOPEN or begin_ns < self._retry_ns:
                raise MeterError(self._why(error)) from error
            self._retry_ns = begin_ns + REOPEN_AFTER_NS
            try:
                _library.restart()
                value = self._value()
            except pynvml.NVMLError as again:
                raise MeterError(self._why(again)) from again
        end_ns = self._now_ns()
        if self._method is Method.COUNTER:
            return begin_ns, end_ns, value * J_PER_MJ
        return begin_ns, end_ns, self._integrate((begin_ns + end_ns) / 2, value / 1000)

    def power_w(self) -> float:
        """Power now, in watts, for comparison with the counter; instant where the GPU tells that, else as NVML averages it.

        Raises:
            MeterError: the GPU does not answer, or does not tell.
        """
        try:
            with suppress(*_LACKING, pynvml.NVMLError_InvalidArgument):
                return _instant_power_mw(self._handle) / 1000
            return int(pynvml.nvmlDeviceGetPowerUsage(self._handle)) / 1000
        except pynvml.NVMLError as error:
            raise MeterError(self._why(error)) from error

    def look_for_others(self) -> None:
        """Looks again, every half minute, whether other processes have come; ``domains`` says so from then on."""
        now_ns = self._now_ns()
        if self._domain.shared or now_ns < self._looked_ns + LOOK_AGAIN_NS:
            return
        self._looked_ns = now_ns
        if self.shared_now():
            self._domain = replace(self._domain, shared=True)

    def shared_now(self) -> bool:
        """Whether other compute processes are on the GPU; ``False`` where the driver doesn't tell. Costs a few driver calls."""
        running = _ask(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(self._current()))
        pids = {process.pid for process in running or ()}
        if os.getpid() in pids or not _own_pid_namespace():
            return bool(pids - {os.getpid()})
        return len(pids) > int(_torch_uuids() is not None)  # in a container our own process has another number

    def conditions(self) -> Conditions:
        """Temperature, SM clock and what holds the clock back, now."""
        mask = _ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, self._handle)
        return Conditions(
            temperature_c=_ask(pynvml.nvmlDeviceGetTemperature, self._handle, pynvml.NVML_TEMPERATURE_GPU),
            sm_clock_mhz=_ask(pynvml.nvmlDeviceGetClockInfo, self._handle, pynvml.NVML_CLOCK_SM),
            throttle_reasons=None if mask is None else tuple(text for bit, text in _THROTTLE.items() if mask & bit),
        )

    def memory_traffic(self) -> MemoryTraffic:
        """Counts the bytes between the GPU and its memory, where the driver has counters for that."""
        return MemoryTraffic(self.uuid, self._now_ns)

    def close(self) -> None:
        """Lets go of NVML; safe to call twice."""
        if not self._closed:
            self._closed = True
            _library.release()

    def _find(self) -> Any:
        generation = _library.generation
        handle = pynvml.nvmlDeviceGetHandleByUUID(self.uuid)
        self._generation = generation  # only now: a handle that was not given is asked for again
        return handle

    def _current(self) -> Any:
        """The GPU's handle, asked for again where NVML was opened anew."""
        if self._generation != _library.generation:
            self._handle = self._find()
        return self._handle

    def _value(self) -> int:
        """The counter (mJ) or the power (mW)."""
        return self._measure(self._current())

    def _integrate(self, now_ns: float, power_w: float) -> float:
        if self._last is not None:
            before_ns, before_w = self._last
            self._integral_j += (power_w + before_w) / 2 * ns_to_s(now_ns - before_ns)
        self._last = (now_ns, power_w)
        return self._integral_j

    def _why(self, error: pynvml.NVMLError) -> str:
        mend = _MEND.get(error.value)
        return f"{self._name} ({self._device}) can't be read: NVML says {error}" + (f"; {mend}" if mend else "")


def open_meters(
    *,
    devices: str | Sequence[str] = "visible",
    local_rank: int | None = None,
    now_ns: Callable[[], int] = time.monotonic_ns,
) -> tuple[list[NvmlMeter], list[str]]:
    """One meter for each GPU that this process may see, and the reason for each that is missing. Raises nothing.

    Where torch has CUDA up, its devices are taken; else ``CUDA_VISIBLE_DEVICES`` (indices, ``GPU-...``, ``MIG-...``) and
    ``CUDA_DEVICE_ORDER`` are read as CUDA reads them. A MIG slice is metered by its whole GPU, flagged shared.

    Args:
        devices: "visible" for all of them, or the UUIDs (prefixes will do) of those that are wanted.
        local_rank: the CUDA index of the one GPU that is wanted. Where a single GPU is visible, it is that one.
        now_ns: the clock of the readings, nanoseconds.
    """
    try:
        _library.acquire()
    except pynvml.NVMLError as error:
        return [], [_no_driver(error)]
    try:
        gpus = _accessible()
        if not gpus:
            return [], ["the NVIDIA driver shows no GPU: nvidia-smi -L"]
        seen, reasons = _visible(gpus, os.environ, _torch_uuids(), whole=local_rank is None)
        if local_rank is not None and len(seen) > 1:
            if local_rank not in seen:
                reasons.append(f"local rank {local_rank} has no GPU of its own among the {len(seen)} that are visible")
            seen = {local_rank: seen[local_rank]} if local_rank in seen else {}
        if devices != "visible":
            wanted = [devices] if isinstance(devices, str) else list(devices)
            found = {uuid: _find(uuid, list(seen.values())) for uuid in wanted}
            reasons += [f"{uuid} is no visible GPU; {_known(seen.values())}" for uuid, gpu in found.items() if gpu is None]
            seen = {index: gpu for index, gpu in seen.items() if gpu in found.values()}
        meters: list[NvmlMeter] = []
        for index, gpu in seen.items():
            try:
                meters.append(NvmlMeter(gpu.uuid, name=f"gpu{index}", shared=gpu.mig, now_ns=now_ns))
            except MeterError as error:
                reasons.append(str(error))
    except pynvml.NVMLError as error:
        return [], [f"the NVIDIA GPUs can't be listed: NVML says {error}; nvidia-smi -L"]
    else:
        return meters, reasons
    finally:
        _library.release()


def _accessible() -> list[_Gpu]:
    """The GPUs that this process may open, in the order of the PCI bus. Those that a job scheduler keeps from it are left out."""
    gpus = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        with suppress(pynvml.NVMLError):  # not ours to open, or lost: CUDA does not see it either
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            mig = bool((_ask(pynvml.nvmlDeviceGetMigMode, handle) or [0])[0])
            gpus.append(
                _Gpu(
                    uuid=pynvml.nvmlDeviceGetUUID(handle),
                    name=pynvml.nvmlDeviceGetName(handle),
                    bus_id=_text(pynvml.nvmlDeviceGetPciInfo(handle).busId),
                    mig=mig,
                    slices=_slices(handle) if mig else (),
                )
            )
    return sorted(gpus, key=lambda gpu: gpu.bus_id.lower())


def _slices(handle: Any) -> tuple[str, ...]:
    count = _ask(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
    found = (_ask(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index) for index in range(count))
    uuids = (_ask(pynvml.nvmlDeviceGetUUID, own) for own in found if own is not None)
    return tuple(uuid for uuid in uuids if uuid is not None)


def _visible(
    gpus: Sequence[_Gpu], environ: Mapping[str, str], torch_uuids: Sequence[str] | None, *, whole: bool
) -> tuple[dict[int, _Gpu], list[str]]:
    """The GPUs by CUDA's index, each once, and the reasons for those that CUDA or NVML leaves out.

    ``whole``: all of them will be metered, so that it doesn't matter much which is which. CUDA's rules:
    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-environment-variables (an entry that names no GPU ends the list;
    "fastest first" is not documented further, so it is known only where all GPUs are of one kind).
    """
    if torch_uuids is not None:
        named = [_find(f"GPU-{uuid}", gpus) or _find(f"MIG-{uuid}", gpus) for uuid in torch_uuids]
        lost = [f"cuda:{index} is not known to NVML; {_known(gpus)}" for index, gpu in enumerate(named) if gpu is None]
        return _once({index: gpu for index, gpu in enumerate(named) if gpu is not None}), lost
    text = environ.get("CUDA_VISIBLE_DEVICES")
    tokens = [str(index) for index in range(len(gpus))] if text is None else [token.strip() for token in text.split(",")]
    seen: dict[int, _Gpu] = {}
    reasons: list[str] = []
    for index, token in enumerate(tokens):
        gpu = _named(token, gpus)
        if gpu is None:
            if token.lower() not in _END_OF_LIST:
                reasons.append(
                    f"CUDA_VISIBLE_DEVICES={text}: CUDA ends the list at {token!r}, which is no GPU here; {_known(gpus)}"
                )
            break
        seen[index] = gpu
    if len({token.lower() for token in tokens}) < len(tokens):
        return {}, [f"CUDA_VISIBLE_DEVICES={text} names a GPU twice, so CUDA shows none: name each one once"]
    if not seen and not reasons:
        reasons.append(f"CUDA_VISIBLE_DEVICES={text!r} hides every GPU from this process: unset CUDA_VISIBLE_DEVICES")
    seen = _once(seen)
    mixed = len({gpu.name for gpu in gpus}) > 1 and environ.get("CUDA_DEVICE_ORDER", "").upper() != "PCI_BUS_ID"
    if mixed and any(not token.startswith(("GPU-", "MIG-")) for token in tokens[: len(seen)]):
        why = "which of these unlike GPUs CUDA counts first is not known before CUDA is up: export CUDA_DEVICE_ORDER=PCI_BUS_ID"
        if not whole or len(seen) < len(gpus):
            return {}, [why]
        reasons.append(f"{why} (until then they are numbered by their PCI bus)")
    return seen, reasons


def _named(token: str, gpus: Sequence[_Gpu]) -> _Gpu | None:
    """The GPU behind one entry of ``CUDA_VISIBLE_DEVICES``; digits count as C's ``strtoul`` reads them."""
    if token.upper().startswith(("GPU-", "MIG-")):
        return _find(token, gpus)
    number = re.match(r"\+?(\d+)", token)
    index = int(number[1]) if number else -1
    return gpus[index] if 0 <= index < len(gpus) else None


def _find(uuid: str, gpus: Sequence[_Gpu]) -> _Gpu | None:
    """The one GPU with this UUID or prefix of it, or with such a MIG slice (``MIG-GPU-<uuid>/1/0``: drivers before 470)."""
    prefix = uuid.lower().removeprefix("mig-") if uuid.lower().startswith("mig-gpu-") else uuid.lower()
    prefix = prefix.split("/")[0]
    found = [gpu for gpu in gpus if any(own.lower().startswith(prefix) for own in (gpu.uuid, *gpu.slices))]
    return found[0] if len(found) == 1 else None


def _once(seen: Mapping[int, _Gpu]) -> dict[int, _Gpu]:
    """Each GPU under its first index: two slices of one GPU share its counter."""
    first: dict[str, int] = {}
    for index, gpu in seen.items():
        first.setdefault(gpu.uuid, index)
    return {index: seen[index] for index in first.values()}


def _torch_uuids() -> list[str] | None:
    """UUIDs, without prefix, of torch's CUDA devices in its order; ``None`` where torch has no CUDA up."""
    try:
        cuda = sys.modules["torch"].cuda
        if not cuda.is_initialized():
            return None
        return [str(cuda.get_device_properties(index).uuid) for index in range(cuda.device_count())]
    except Exception:  # half imported, built without CUDA, or too old to tell
        return None


def _sensor(handle: Any) -> tuple[Method, Callable[[Any], int], str]:
    """The best that the GPU has; raises ``NVMLError`` where it has nothing, or where its counter fails for another reason."""
    with suppress(*_LACKING):
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return Method.COUNTER, pynvml.nvmlDeviceGetTotalEnergyConsumption, "energy counter"
    with suppress(*_LACKING, pynvml.NVMLError_InvalidArgument):
        _instant_power_mw(handle)
        return Method.SAMPLED, _instant_power_mw, "instant power, integrated"
    pynvml.nvmlDeviceGetPowerUsage(handle)
    return Method.SAMPLED, pynvml.nvmlDeviceGetPowerUsage, "power, integrated"


def _highest_limit_w(handle: Any) -> float | None:
    """The highest power limit that the board allows, since the one in force can be raised at any time; that one where it tells no other."""
    bounds_mw = _ask(pynvml.nvmlDeviceGetPowerManagementLimitConstraints, handle) or (0, 0)
    highest_mw = max(bounds_mw[1], _ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle) or 0)
    return highest_mw / 1000 if highest_mw else None


def _instant_power_mw(handle: Any) -> int:
    answer = pynvml.nvmlDeviceGetFieldValues(handle, [pynvml.NVML_FI_DEV_POWER_INSTANT])[0]
    if answer.nvmlReturn != pynvml.NVML_SUCCESS:
        raise pynvml.NVMLError(answer.nvmlReturn)
    return int(answer.value.uiVal)


def _ask(question: Callable[..., Answer], *about: Any) -> Answer | None:
    """The driver's answer, or ``None`` where it has none."""
    try:
        return question(*about)
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError):
        return None


def _own_pid_namespace() -> bool:
    """Whether this process counts pids of its own (a container), so that the driver's differ from ``os.getpid()``."""
    try:
        return str(Path("/proc/self/ns/pid").readlink()) != FIRST_PID_NAMESPACE
    except OSError:
        return False


def _no_driver(error: pynvml.NVMLError) -> str:
    return f"no NVIDIA driver: NVML says {error}; {_MEND.get(error.value, 'see what nvidia-smi says')}"


def _known(gpus: Iterable[_Gpu]) -> str:
    return "here are " + ", ".join(f"{gpu.uuid} ({gpu.name})" for gpu in gpus)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
