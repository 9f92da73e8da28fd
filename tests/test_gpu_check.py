"""The check of a machine with a GPU, as far as a CPU can run it: its kernels' table, and results that survive a part that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def check(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    monkeypatch.setenv("PYTHONPATH", "")  # the benchmarks add to it
    import gpu_check

    return gpu_check


def test_kernels_count_as_by_hand(check):
    """Every attention kernel that this machine has counts as its closed form."""
    part = check.kernels(dry=True)
    assert part.passed
    assert part.result["attention: flash, causal"]["model_flops"] == part.result["attention: math, causal"]["model_flops"]


def test_results_are_on_disk_after_each_part(check, monkeypatch, tmp_path):
    """A part that fails, exits or has no time left leaves the others' results, written one by one."""
    seen = []

    def good(*, dry):
        return check.Part("fine", True, {"dry": dry})

    def exits(*, dry):
        seen.append(json.loads(next(tmp_path.glob("*/gpu_check.json")).read_text())["parts"])
        sys.exit(3)

    monkeypatch.setattr(check, "PARTS", {"good": (good, 1.0), "exits": (exits, 1.0), "late": (good, check.DEADLINE_S + 1)})
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry-run", "--results", str(tmp_path)])
    check.main()
    assert list(seen[0]) == ["good"]
    written = json.loads(next(tmp_path.glob("*/gpu_check.json")).read_text())["parts"]
    assert {name: part["passed"] for name, part in written.items()} == {"good": True, "exits": False, "late": False}
    assert next(tmp_path.glob("*/gpu_check.md")).read_text().count("## ") == 3
