"""Writes the Green tab's table of regions from green_torch.intensity: ``python -m tests.make_regions``, after codecarbon or our tables change.

The page has no server of ours behind it that could import codecarbon, so the figures travel with it; a test holds the two equal.
"""

from __future__ import annotations

import json
from pathlib import Path

import green_torch
from green_torch.intensity import known_regions, pue_for, resolve

PATH = Path(green_torch.__file__).parent / "tensorboard_plugin" / "static" / "regions.json"


def table() -> dict[str, object]:
    """Every region: code, place, gCO2e/kWh, source by number, basis, year, and the provider's PUE where it publishes one."""
    sources: list[str] = []
    rows = []
    for code in (None, *known_regions()):
        point = resolve(code).at(0)
        stamp, _, rest = point.source.partition(" (")
        named, _, place = rest.removesuffix(")").rpartition("; ")
        source = f"{stamp}: {named or place}"
        if source not in sources:
            sources.append(source)
        pue, pue_source = pue_for(code)
        rows.append(
            [
                code or "world",
                place if code else "World average",
                point.g_per_kwh,
                sources.index(source),
                point.basis,
                point.year,
                pue if pue != 1.0 else None,
                pue_source if pue != 1.0 else None,
            ]
        )
    columns = ["code", "place", "g_per_kwh", "source", "basis", "year", "pue", "pue_source"]
    return {"sources": sources, "columns": columns, "rows": rows}


def text() -> str:
    """The file's content, one region a line."""
    found = table()
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in found.pop("rows"))  # type: ignore[attr-defined]
    return f'{json.dumps(found, ensure_ascii=False)[:-1]}, "rows": [\n{rows}\n]}}\n'


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
