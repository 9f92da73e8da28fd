"""One sink with a queue and a tick of its own, so that a slow, hung or broken one touches no other and nobody waits for it."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

from green_torch.records import StepRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from green_torch.protocols import Clock, Sink
    from green_torch.records import Item

TICK_S = 0.1
_QUEUE = 4096  # items; beyond it the oldest records go, since each later one carries the run's totals


class Outlet:
    """Hands items to its sink in order, off the caller's thread. An error switches the sink off, with one warning."""

    def __init__(self, sink: Sink, clock: Clock, warn: Callable[[str], None]) -> None:
        self._sink = sink
        self._name = type(sink).__name__
        self._warn = warn
        self._queue: deque[Item] = deque()
        self._busy = threading.Lock()
        self._closing = False
        self.done = False  # nothing more will come: closed, or switched off
        self.moved_ns = clock.now_ns()  # when it last had nothing to do, or got something done
        self._now_ns = clock.now_ns
        self._halt = clock.every(TICK_S, self.tick, f"sink {self._name}")

    def put(self, item: Item) -> None:
        """Enqueues an item."""
        if self.done:
            return
        if len(self._queue) >= _QUEUE and isinstance(self._queue[0], StepRecord):
            self._queue.popleft()
            self._warn(f"{self._name} is too slow: some records were not written to it (the run's totals are whole)")
        if self.idle:
            self.moved_ns = self._now_ns()
        self._queue.append(item)

    def close(self) -> None:
        """What is enqueued is still written, then the sink is closed; :attr:`done` tells when."""
        self._closing = True

    def tick(self) -> None:
        """Writes what is there."""
        if self.done or not self._busy.acquire(blocking=False):
            return
        try:
            while self._queue:
                self._sink.write(self._queue.popleft())
                self.moved_ns = self._now_ns()
            if self._closing:
                self._sink.close()
                self.done = True
        except Exception as error:  # a full disk must not end training: rule 9
            self.done = True
            self._warn(f"{self._name} is switched off: {type(error).__name__}: {error}")
            with suppress(Exception):
                self._sink.close()
        finally:
            self._busy.release()
        if self.done:
            self._halt()

    @property
    def idle(self) -> bool:
        """Whether all that was put has been written."""
        return self.done or not (self._queue or self._busy.locked())

    @property
    def name(self) -> str:
        """The sink's class."""
        return self._name
