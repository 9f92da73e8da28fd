"""The check of a machine with a GPU, as far as a CPU can run it: its kernels' table, and results that survive a part that fails."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.simnvml import Fault, Gpu, simulated, square

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


def test_results_outlive_a_machine_without_git(check, monkeypatch, tmp_path):
    """Where there is no git binary the commit is unknown, and nothing is lost."""
    import report

    def good(*, dry):
        return check.Part("fine", True)

    report._commit.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(check, "PARTS", {"good": (good, 1.0)})
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry-run", "--results", str(tmp_path)])
    check.main()
    report._commit.cache_clear()
    written = json.loads(next(tmp_path.glob("*/gpu_check.json")).read_text())
    assert written["machine"]["commit"] == "unknown"
    assert written["parts"]["good"]["passed"]


def test_results_that_can_not_be_written_are_printed(check, monkeypatch, tmp_path, capsys):
    """A folder that can't be made, or a full disk, ends no part: all is printed."""

    def good(*, dry):
        return check.Part("what it found", True)

    (tmp_path / "results").write_text("a file stands in the way")
    monkeypatch.setattr(check, "PARTS", {"one": (good, 1.0), "two": (good, 1.0)})
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry-run", "--results", str(tmp_path / "results")])
    check.main()
    printed = capsys.readouterr()
    assert printed.out.count("what it found") == 2
    assert "not written" in printed.err


@pytest.mark.parametrize(("faults", "passed"), [((), True), ((Fault("stuck", 0.0),), False)])
def test_a_counter_of_which_not_all_is_known_fails(check, monkeypatch, faults, passed):
    """A counter that can be read but never moves has no period and no agreement: that is no pass."""

    @contextmanager
    def driver(*, dry):
        with simulated(Gpu(square(90, 330, period_s=0.11), period_s=0.02, faults=faults), virtual=False) as sim:
            yield sim

    monkeypatch.setattr(check, "driver", driver)
    part = check.counter(dry=True)
    assert len(part.result["gpus"]) == 1
    assert part.passed is passed


class Right:
    """Nothing is wrong."""


class Displaced:
    """Anchors are 5 ms off, so every boundary is; each bound is where the marker believes it."""

    def record(self, *, aside=None):
        return super().record(aside=bool(aside)) - 5_000_000 * bool(aside)


class Loose:
    """No anchor is to be had, as where side streams queue behind compute: boundaries are known from the host alone."""

    def record(self, *, aside=None):
        return super().record(aside=bool(aside)) + 5_000_000 * bool(aside)


class Failing:
    """After some boundaries none can be marked on the device any more, while the user's own events go on."""

    marked = 0

    def record(self, *, aside=None):
        self.marked += aside is not None
        if aside is not None and self.marked > 30:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().record(aside=bool(aside))


@pytest.mark.parametrize("fault", [Right, Displaced, Loose, Failing])
def test_boundaries_that_are_not_where_the_device_passed_them_fail(check, monkeypatch, fault):
    """The part compares with the user's own events: a clock that is off, loose, or left for the host's is no pass."""
    monkeypatch.setattr(check, "SimulatedQueue", type("Faulty", (fault, check.SimulatedQueue), {}))
    part = check.boundaries(dry=True)
    assert part.passed is (fault is Right)
    assert part.result["on_device"] is (fault is not Failing)
