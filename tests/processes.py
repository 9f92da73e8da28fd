"""Real processes, as tests start and end them: the command line, a terminal's Ctrl-C, two ranks, and Ctrl-C at a chosen line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import FrameType

GREEN_TORCH = [sys.executable, "-m", "green_torch.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def interrupted(command: list[str], cwd: Path, ready: Callable[[], bool], timeout_s: float) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that gets Ctrl-C, as a terminal sends it to the whole group, once it is ready."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=ENVIRONMENT,
        start_new_session=True,
    ) as process:
        try:
            deadline_s = time.monotonic() + timeout_s
            while not ready() and time.monotonic() < deadline_s:
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, out, err


class CtrlC:
    """Raises KeyboardInterrupt at the ``position``-th line that is run, within the block, of the frames that ``ours`` picks.

    ``where`` is that line, "" where the block has fewer.
    """

    def __init__(self, position: int, ours: Callable[[FrameType], bool]) -> None:
        self.where = ""
        self._left = position
        self._ours = ours

    def __enter__(self) -> Self:
        self._previous = sys.gettrace()
        sys.settrace(self._at_call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._previous)

    def _at_call(self, frame: FrameType, _event: str, _argument: object) -> Any:
        return self._at_line if self._ours(frame) else None

    def _at_line(self, frame: FrameType, event: str, _argument: object) -> Any:
        if event == "line":
            self._left -= 1
            if self._left == 0:
                self.where = f"{frame.f_code.co_name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._at_line
