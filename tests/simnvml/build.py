"""Compiles the simulated NVML with the system's C compiler, once per version of its source."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("simnvml.c")
FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-shared", "-fPIC")


def library() -> Path:
    """The compiled library, named ``libnvidia-ml.so.1`` so that a child process finds it through ``LD_LIBRARY_PATH``.

    Raises:
        RuntimeError: there is no C compiler, or it does not accept the source.
    """
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"simnvml-{os.getuid()}-{key}"
    target = folder / "libnvidia-ml.so.1"
    if target.exists():
        return target
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise RuntimeError("no C compiler to build the simulated NVML with: apt-get install gcc")
    folder.mkdir(mode=0o700, exist_ok=True)
    scratch = folder / f"build-{os.getpid()}.so"
    done = subprocess.run(
        [compiler, *FLAGS, "-o", str(scratch), str(SOURCE), "-lm", "-lpthread"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the simulated NVML does not compile:\n{done.stderr}")
    scratch.replace(target)  # atomic: others may be building it too
    return target
