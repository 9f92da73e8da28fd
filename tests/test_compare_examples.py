"""The examples of comparing: run as a user runs them, one after the other."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from green_torch.experiment import Comparison, VariantResult, parse_variant
from tests.test_cli_compare import BASE, FAST, compared, result

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str, folder: Path) -> str:
    """What the example prints."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def plot(monkeypatch, folder: Path, *arguments: str) -> None:
    """Runs the script that draws, in this process: a second one would load matplotlib again."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["plot_comparison.py", *arguments])
    runpy.run_path(str(EXAMPLES / "plot_comparison.py"), run_name="__main__")


def test_compare_precision_and_its_picture(tmp_path, monkeypatch):
    """The comparison says what each costs and how it knows; the picture is drawn from its JSON."""
    pytest.importorskip("matplotlib")
    printed = run("compare_precision.py", "--seconds", "1", "--blocks", "3", "--json", "found.json", folder=tmp_path)
    assert "fp32: " in printed
    assert "mJ a sample" in printed or "energy not known" in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert [len(result["blocks"]) for result in found["results"]] == [3, 3]
    plot(monkeypatch, tmp_path, "found.json", "found.png")
    picture = (tmp_path / "found.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000
    plot(monkeypatch, tmp_path, "found.json", "found.svg")
    drawn = (tmp_path / "found.svg").read_text()
    assert "95 % intervals" in drawn  # matplotlib notes each text beside its outlines


def test_losses_agree_only_where_they_were_compared():
    """A variant that failed has no loss: nothing is said to agree."""
    training = runpy.run_path(str(EXAMPLES / "compare_precision.py"))["training"]
    base = result("fp32", BASE)
    failed = VariantResult(parse_variant("bf16"), error="does not fit in memory")
    assert training(Comparison((base, failed), 10, 0.95, 0.02)) == "losses were not compared"
    assert training(compared(FAST)) == "losses agree within 2%"
    assert training(compared(FAST, loss=3.0)).startswith("not the same training")


def test_a_picture_of_nothing_is_refused(tmp_path, monkeypatch):
    """Where no variant was measured there is nothing to draw."""
    pytest.importorskip("matplotlib")
    (tmp_path / "found.json").write_text(json.dumps({"results": [{"blocks": []}]}))
    with pytest.raises(SystemExit, match="nothing was measured"):
        plot(monkeypatch, tmp_path, "found.json", "found.png")
