"""What every benchmark shares: a description of the machine, and its result written as JSON and Markdown.

Imported before ``green_torch``, it makes a copy of the repository enough: nothing need be installed, in child processes neither.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def machine() -> dict[str, Any]:
    """The machine, as its results name it. No host name, no user name."""
    import torch

    from green_torch.processor import cpu_name, instructions

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or " ".join(filter(None, (cpu_name(), instructions()))),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {
            name: _version(name) for name in ("torch", "lightning", "codecarbon", "tensorboard", "zeus", "nvidia-ml-py")
        },
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, *rows]]
    lines.insert(1, "|" + "|".join("---" for _ in header) + "|")
    return "\n".join(lines)


def write(name: str, title: str, body: str, result: dict[str, Any], *, results: Path = RESULTS, quiet: bool = False) -> None:
    """Prints the Markdown, and writes it and the JSON under ``results/<device>/``."""
    where = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{where['device']} {where['cores']} cores".lower()).strip("-")
    folder = results / slug
    folder.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{key} {value}" for key, value in where["versions"].items() if value)
    text = (
        f"# {title}\n\n{where['device']}, {where['cores']} cores, {where['system']}, Python {where['python']}, {versions}; "
        f"commit {where['commit']}, {where['date']}.\n\n{body}\n"
    )
    if not quiet:
        print(text)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    (folder / f"{name}.json").write_text(
        json.dumps({"machine": where, **result}, indent=1, default=str) + "\n", encoding="utf-8"
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache
def _commit() -> str:
    """What ran: before the first result was written, which makes the tree dirty."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
        )
    except OSError:  # a borrowed machine may have no git
        return "unknown"
    return done.stdout.strip() or "unknown"
