"""What is worth remembering between runs on this machine: small JSON files in the user's cache directory."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def cache_file(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """A file in ``cache_dir``, else in ``$XDG_CACHE_HOME/green_torch`` or ``~/.cache/green_torch``."""
    if cache_dir is not None:
        return Path(cache_dir) / name
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    with suppress(RuntimeError):  # a user without a home
        base = base.expanduser()
    return base / "green_torch" / name


def entries(path: Path) -> dict[str, dict[str, Any]]:
    """The file's entries, whatever of it can be read."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return {key: entry for key, entry in content.items() if isinstance(entry, dict)}
    return {}


def keep(path: Path, key: str, entry: dict[str, Any]) -> None:
    """Writes one more entry, whole or not at all; a cache that can't be written is done without."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**entries(path), key: entry}, indent=1), encoding="utf-8")
        temporary.replace(path)
