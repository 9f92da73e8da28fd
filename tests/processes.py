"""Real processes, as tests start and end them: the command line, a terminal's Ctrl-C, two ranks, and Ctrl-C at a chosen line."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

GREEN_TORCH = [sys.executable, "-m", "green_torch.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

_FORKS = multiprocessing.get_context("forkserver")
_preloaded: list[str] = []


def preload(*modules: str) -> None:
    """Modules that take long to load: :func:`forked_ranks` forks its processes off a server that has loaded them."""
    _preloaded.extend(modules)
    _FORKS.set_forkserver_preload(_preloaded)


def environment(**more: str) -> dict[str, str]:
    """This process's variables without those of a job that it may itself be in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **more}


def forked_ranks(module: str, options: list[str], folder: Path, **variables: str) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of two ranks that run ``main(options)`` of a module, with the variables of a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ends = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ends.append(forked(module, options, folder / f"rank{rank}", **place, **variables))
    return [end() for end in ends]


def forked(module: str, options: list[str], output: Path, **variables: str) -> Callable[[], tuple[int, str, str]]:
    """A process that runs ``main(options)`` of a module: what waits for it, and gives its exit code, stdout and stderr."""
    process = _FORKS.Process(target=_in_fork, args=(module, options, variables, str(output)))
    process.start()

    def end() -> tuple[int, str, str]:
        process.join(timeout=120)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode, Path(f"{output}.out").read_text(), Path(f"{output}.err").read_text()

    return end


def _in_fork(module: str, options: list[str], variables: dict[str, str], output: str) -> None:
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        with open(f"{output}.{name}", "wb") as file:  # noqa: PTH123
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment(**variables))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    importlib.import_module(module).main(options)


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
