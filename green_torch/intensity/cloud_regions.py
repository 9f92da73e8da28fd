"""Where AWS, Azure and newer Google Cloud regions stand, and the PUE their providers publish: two sourced tables.

``data/cloud_regions.csv`` gives the country or subdivision of a region, to be looked up in codecarbon's tables (which know
Google's regions only); ``data/pue.csv`` the providers' own yearly averages. Each row has its source and when it was looked up.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class CloudRegion:
    """One row: a region's code (``aws:us-west-2``), its place, and the zone (``US-OR``) whose grid it is on."""

    code: str
    location: str
    zone: str
    source: str


@cache
def cloud_regions() -> dict[str, CloudRegion]:
    """Every row by its code, in lower case."""
    return {
        (code := f"{row['provider']}:{row['region']}"): CloudRegion(code, row["location"], row["zone"], row["source"])
        for row in _rows("cloud_regions.csv")
    }


@cache
def published_pue() -> dict[str, tuple[float, str]]:
    """Facility energy over IT energy by provider, with what it is and where it is published."""
    return {
        row["provider"]: (float(row["pue"]), f"PUE published for {row['year']}: {row['basis']} ({row['source']})")
        for row in _rows("pue.csv")
    }


def _rows(name: str) -> list[dict[str, str]]:
    text = files("green_torch").joinpath("data", name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
