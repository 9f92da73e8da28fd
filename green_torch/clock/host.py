"""The run's time: the host's monotonic clock, and the threads that tick by it."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from green_torch.units import NS_PER_S, s_to_ns

if TYPE_CHECKING:
    from collections.abc import Callable


class HostClock:
    """``time.monotonic_ns`` and daemon threads. The Unix time of instant 0 is taken once, so a run's times never jump."""

    def __init__(self) -> None:
        self.epoch_unix_ns = time.time_ns() - time.monotonic_ns()

    now_ns = staticmethod(time.monotonic_ns)  # asked at every step, so without a call of our own around it

    def sleep(self, duration_s: float) -> None:
        """Blocks the calling thread."""
        time.sleep(duration_s)

    def every(self, interval_s: float, tick: Callable[[], None], name: str) -> Callable[[], None]:
        """Calls ``tick`` at once and then about every ``interval_s`` seconds, on a daemon thread of its own.

        A tick that takes longer than the interval delays the next one and none is made up for. The returned function ends the
        thread, after a first tick in any case; it waits at most 0.2 s for a tick under way (a driver call may hang) and may be called twice.
        """
        stop = threading.Event()
        step_ns = s_to_ns(interval_s)

        def loop() -> None:
            due_ns = time.monotonic_ns()
            while True:
                try:
                    tick()
                except Exception:
                    logging.getLogger("green_torch").exception("%s failed, and goes on", name)
                due_ns = max(due_ns + step_ns, time.monotonic_ns())
                if stop.wait((due_ns - time.monotonic_ns()) / NS_PER_S):
                    return

        thread = threading.Thread(target=loop, name=f"green_torch {name}", daemon=True)
        thread.start()

        def halt() -> None:
            stop.set()
            if thread is not threading.current_thread():
                thread.join(timeout=0.2)

        return halt
