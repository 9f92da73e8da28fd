"""Reads GPUs' energy counters in a small process of their own, where no busy training thread delays a reading.

A thread has to wait for the interpreter lock, so it sees a counter change late by as much as the training thread holds it, and takes
the lock from the training thread at each reading. The child imports no torch, opens no CUDA context, and watches closely only where
the counter is due to change, so it sees changes within about a millisecond; the parent fetches them four times a second. While the
child is silent (starting, gone, or unable to read) the parent's thread reads for itself; why a child failed is said once.
``GREEN_TORCH_SAMPLER=thread`` turns it off.

The child ends when its standard input closes or its parent changes, within a second of the parent's end however that came. (It does
without PR_SET_PDEATHSIG, which strikes when the *thread* that started the child ends.)
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from green_torch.errors import MeterError
from green_torch.meters.nvml import NvmlMeter
from green_torch.records import Method, Reading
from green_torch.timeline import Rhythm
from green_torch.units import NS_PER_S, ns_to_s, s_to_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from green_torch.protocols import Meter
    from green_torch.records import Domain

SWITCH = "GREEN_TORCH_SAMPLER"
FETCH_S = 0.25  # between two looks at what the child has read
SILENT_NS = NS_PER_S  # after so long without a word from the child its parent reads for itself
_ALIVE_NS = NS_PER_S // 4  # the child says so often at least that it still reads
_RETRY_S = 1.0
_RECORD = struct.Struct("<Bqqd")  # which GPU, begin and end in ns, joules (NaN: it can't be read)
_GIVEN_UP = -1  # the begin of a record without joules: the child does not try again
_MOST_SAID = 4096  # bytes of its standard error
_MOST_QUOTED = 300  # characters
_LEARNING_NS = NS_PER_S
_FAST = 0.9  # of ``poll_interval_s``: a counter with a shorter period is read no more often than that
_SOON = 0.3  # of the doubt about a change: so far after it is due it is looked for again


def in_child(
    meters: Sequence[Meter], poll_interval_s: float, warn: Callable[..., object] = lambda _text, **_how: None
) -> list[Meter]:
    """The same meters, with every NVML counter among them read by one child process (Linux only). ``warn`` is told why that failed."""
    counters = [meter for meter in meters if isinstance(meter, NvmlMeter) and meter.domains[0].method is Method.COUNTER]
    python = Path(sys.executable or "").name.startswith("python") and not getattr(sys, "frozen", False)
    if not counters or not python or sys.platform != "linux" or os.environ.get(SWITCH) == "thread":
        return list(meters)
    child = _Child(counters, poll_interval_s, warn)
    places = {id(meter): place for place, meter in enumerate(counters)}
    return [
        ChildMeter(meter, child, places[id(meter)]) if isinstance(meter, NvmlMeter) and id(meter) in places else meter
        for meter in meters
    ]


class ChildMeter:
    """One GPU's counter as the child reads it. Made by :func:`in_child`."""

    def __init__(self, meter: NvmlMeter, child: _Child, place: int) -> None:
        self._meter = meter
        self._child = child
        self._place = place
        self._newest: Reading | None = None
        self._heard_ns: float = -math.inf
        self._closing = threading.Event()

    @property
    def domains(self) -> tuple[Domain, ...]:
        """The one domain, this GPU."""
        return self._meter.domains

    @property
    def interval_s(self) -> float | None:
        """Left to the sampler; once the child reads, each ``read`` takes ``FETCH_S``."""
        return None

    @property
    def apart(self) -> bool:
        """Whether the child does the reading now."""
        return time.monotonic_ns() - self._heard_ns < self._child.silent_ns

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return self._child.pid

    def read(self) -> Reading:
        """What the child has read since the last call, the newest in front of the ``earlier`` ones; it waits for more to come.

        Raises:
            MeterError: neither the child nor this process can read the GPU.
        """
        if self.apart:
            self._meter.look_for_others()
            self._closing.wait(FETCH_S)
        newest = self._newest
        fresh: list[Reading] = []
        for begin_ns, end_ns, energy_j in self._child.fetch(self._place):
            self._heard_ns = -math.inf if math.isnan(energy_j) else end_ns
            if not math.isnan(energy_j) and (newest is None or begin_ns >= newest.end_ns):
                newest = Reading(begin_ns, end_ns, {self.domains[0].name: energy_j})
                fresh.append(newest)
        if fresh:
            self._newest = replace(fresh[-1], earlier=tuple(fresh[:-1]))
        elif newest is None or not self.apart:
            self._newest = self._meter.read()
        else:
            self._newest = replace(newest, earlier=())
        return self._newest

    def close(self) -> None:
        """Lets go of the GPU, and of the child with the last of its meters; safe to call twice."""
        if not self._closing.is_set():
            self._closing.set()
            self._child.release()
            self._meter.close()


class _Child:
    """The process and its pipe, shared by its meters. It is started on the first fetch, off the training thread."""

    def __init__(self, meters: Sequence[NvmlMeter], poll_interval_s: float, warn: Callable[..., object]) -> None:
        self.silent_ns = max(SILENT_NS, s_to_ns(2 * poll_interval_s + FETCH_S))
        self._warn = warn
        self._order = {
            "poll_interval_s": poll_interval_s,
            "gpus": [(meter.uuid, meter.domains[0].name) for meter in meters],
        }
        self._parent = 0
        self._read: tuple[deque[tuple[int, int, float]], ...] = tuple(deque() for _ in meters)
        self._users = len(meters)
        self._rest = self._said = b""  # of a record, and of its standard error
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._over = False

    @property
    def pid(self) -> int | None:
        """The running child's process id."""
        return self._process.pid if self._process else None

    def fetch(self, place: int) -> list[tuple[int, int, float]]:
        """What was read of one GPU since the last fetch."""
        with self._lock:
            if self._process is None and not self._over:
                self._start()
            if self._process is not None:
                self._pump(self._process)
            readings = list(self._read[place])
            self._read[place].clear()
            return readings

    def release(self) -> None:
        """One meter less; with the last of them the child ends."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._end()

    def _start(self) -> None:
        self._parent = os.getpid()
        order = json.dumps(self._order | {"parent": self._parent})
        paths = [str(Path(__file__).parents[1]), *_folder_of("pynvml")]
        code = f"import sys; sys.path += {paths!r}; from green_torch.sampler_child import main; main(sys.argv[1])"
        try:
            self._process = subprocess.Popen(  # noqa: S603  (our own interpreter and our own code)
                [sys.executable, "-I", "-S", "-c", code, order],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except OSError as error:  # no memory, no processes left: the thread reads
            self._over = True
            self._tell(str(error))
            return
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)

    def _pump(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        gone = given_up = False
        with suppress(BlockingIOError):
            while chunk := os.read(process.stdout.fileno(), 1 << 16):
                self._rest += chunk
            gone = True  # the pipe's end
        with suppress(BlockingIOError):  # read to its end, lest the child waits for room there
            while chunk := os.read(process.stderr.fileno(), 1 << 16):
                self._said = (self._said + chunk)[-_MOST_SAID:]
        whole = len(self._rest) - len(self._rest) % _RECORD.size
        for place, *reading in _RECORD.iter_unpack(self._rest[:whole]):
            self._read[place].append((reading[0], reading[1], reading[2]))
            given_up = given_up or reading[0] == _GIVEN_UP
        self._rest = self._rest[whole:]
        if gone:
            self._end()
        if gone or given_up:
            said = self._said.decode(errors="replace").strip().split("\n")[-1]  # the line of a traceback that tells
            status = f"exit status {process.returncode}" if process.returncode is not None else ""
            self._tell(", ".join(filter(None, (said[:_MOST_QUOTED], status))))

    def _tell(self, why: str) -> None:
        self._warn(
            f"the process that reads the GPUs' counters failed ({why}): a thread of this process reads them, which sees their changes less "
            f"closely and widens the bounds of short steps. To do without that process: export {SWITCH}=thread",
            key="child",
        )

    def _end(self) -> None:
        process, self._process, self._over = self._process, None, True
        if process is None or os.getpid() != self._parent:  # a forked worker's copy ends nothing
            return
        process.kill()  # it has nothing to lose
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        with suppress(subprocess.TimeoutExpired):  # a driver call may hold on to it
            process.wait(timeout=0.5)


class Pace:
    """When to read a counter next: just before and just after it is due to change, hardly in between.

    For its first second, in which it learns the counter's rhythm, readings are a tenth of ``poll_interval_s`` apart. From then on they
    are ``poll_interval_s`` apart where the counter changes more often than that, or where its rhythm can't be told: brackets are then as
    wide. Else they come in pairs around the instant at which a change is due, and ``poll_interval_s`` apart where it did not come. The
    first of a pair comes early enough to see the old value almost always; the second soon enough to see it now and then, too, so that
    a third tells how late updates have come to be.
    """

    def __init__(self, poll_interval_s: float) -> None:
        self._coarse_ns = s_to_ns(poll_interval_s)
        self._fine_ns = self._coarse_ns // 10
        self._rhythm = Rhythm()
        self._seen_ns: int | None = None  # start of the last reading
        self._wide = 0  # changes in a row that were not closely seen
        self._paired = False
        self._learned_ns = 0
        self._opens_ns = self._due_ns = self._closes_ns = 0.0  # when to look first, when to see the change, and when to give up

    def wait_ns(self, begin_ns: int, end_ns: int, *, changed: bool) -> int:
        """Nanoseconds from the end of this reading to the start of the next."""
        if self._seen_ns is None:
            self._learned_ns = begin_ns + _LEARNING_NS
        elif changed:
            self._changed(self._seen_ns, end_ns)
        self._seen_ns = begin_ns
        if not self._paired:
            return self._fine_ns if end_ns < self._learned_ns else self._coarse_ns
        if end_ns < self._opens_ns:
            return self._quiet_ns(self._opens_ns - end_ns)
        left_ns = self._due_ns - end_ns
        if 0.1 * self._fine_ns < left_ns < 1.5 * self._fine_ns:
            return int(left_ns)
        return self._fine_ns if end_ns < self._closes_ns else self._coarse_ns

    def _quiet_ns(self, left_ns: float) -> int:
        """To the first look. A slow counter can afford one ahead of it, which stands in where the next comes late."""
        period_ns = self._rhythm.period_ns or 0.0
        ahead_ns = 5 * self._fine_ns if period_ns > 5 * self._coarse_ns else 0
        return int(min(left_ns - ahead_ns if left_ns > ahead_ns else left_ns, max(2 * self._coarse_ns, period_ns / 2)))

    def _changed(self, lo_ns: int, hi_ns: int) -> None:
        self._wide = self._wide + 1 if hi_ns - lo_ns > 4 * self._fine_ns else 0
        at_ns = self._rhythm.place(lo_ns, hi_ns, (lo_ns + hi_ns) / 2)
        period_ns = self._rhythm.period_ns
        if period_ns is None:
            return
        if period_ns < _FAST * self._coarse_ns:
            self._paired = False
            return
        self._paired = self._paired or self._rhythm.telling  # what was read as rarely as it changes tells no rhythm
        if not self._paired:
            return
        due_ns, doubt_ns = at_ns + period_ns, self._fine_ns / 2 + 2.5 * self._rhythm.sigma_ns
        # Where a change was missed the reading before it perhaps came late: begin earlier.
        self._opens_ns = due_ns - doubt_ns - min(self._fine_ns * (2**self._wide - 1), period_ns / 2)
        self._due_ns = due_ns + _SOON * doubt_ns
        self._closes_ns = due_ns + doubt_ns + 5 * self._fine_ns


def _folder_of(module: str) -> list[str]:
    """Where the child finds a module that this process can import."""
    spec = find_spec(module)
    return [str(Path(spec.origin).parent)] if spec is not None and spec.origin else []


def main(order: str) -> None:
    """The child's whole life."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):  # meant for the training: we end with it
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    told = json.loads(order)
    for place, (uuid, name) in enumerate(told["gpus"]):
        watch = threading.Thread(target=_watch, args=(place, uuid, name, told["poll_interval_s"]), daemon=True)
        watch.start()
    while os.getppid() == told["parent"]:
        readable, _, _ = select.select([sys.stdin], [], [], 1.0)
        if readable:
            break
    os._exit(0)  # a thread may hang in the driver


def _watch(place: int, uuid: str, name: str, poll_interval_s: float) -> None:
    """Reads one GPU for as long as that goes; the parent is told where it does not."""
    try:
        _follow(place, NvmlMeter(uuid, name=name), Pace(poll_interval_s))
    except Exception as error:  # of the driver's binding, say: the parent reads for itself
        why = str(error) if isinstance(error, MeterError) else f"{type(error).__name__}: {error}"
        with suppress(OSError):
            os.write(2, f"{why}\n".encode())
        _write(_RECORD.pack(place, _GIVEN_UP, 0, math.nan))


def _follow(place: int, meter: NvmlMeter, pace: Pace) -> None:
    """Passes on every change of a counter, with the last reading before it."""
    last, told_ns = (0, 0, math.nan), 0
    while True:
        try:
            new = meter.look()
        except MeterError:
            _write(_RECORD.pack(place, 0, 0, math.nan))
            time.sleep(_RETRY_S)
            continue
        first = math.isnan(last[2])
        changed = not first and new[2] != last[2]
        if changed:
            _write(_RECORD.pack(place, *last) + _RECORD.pack(place, *new))
            told_ns = new[1]
        elif first or new[1] - told_ns > _ALIVE_NS:
            _write(_RECORD.pack(place, *new))
            told_ns = new[1]
        last = new
        time.sleep(ns_to_s(pace.wait_ns(new[0], new[1], changed=changed)))


def _write(records: bytes) -> None:
    """A write of so few bytes is whole, whichever thread makes it."""
    try:
        os.write(1, records)
    except OSError:  # the parent is gone
        os._exit(0)
