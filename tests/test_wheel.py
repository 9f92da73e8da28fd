"""The wheel, built and installed without its dependencies into an empty folder, works from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is installed in."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(CHECKOUT)]
    subprocess.run(build, check=True, capture_output=True, cwd=wheels)
    (wheel,) = wheels.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check", "--target"]
    subprocess.run([*install, str(target), str(wheel)], check=True, capture_output=True, cwd=wheels)
    return target


def run(installed: Path, *command: str) -> str:
    """Runs outside the checkout, the folder first on the path (the checkout may be installed editable); its stdout."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(installed),
        "XDG_CACHE_HOME": str(installed.parent / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    ran = subprocess.run(command, capture_output=True, text=True, cwd=installed.parent, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_wheel_holds_its_data_and_its_type_marker(installed: Path) -> None:
    """Every file of the package is in the wheel, and nothing from outside of it."""
    package = CHECKOUT / "green_torch"
    expected = {
        path.relative_to(package)
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")
    }
    assert {Path("py.typed"), Path("data/peaks.csv"), Path("data/cloud_regions.csv"), Path("data/pue.csv")} <= expected
    assert expected <= {path.relative_to(installed / "green_torch") for path in (installed / "green_torch").rglob("*")}
    assert {path.name for path in installed.iterdir()} - {"bin"} == {
        "green_torch",
        *(p.name for p in installed.glob("*.dist-info")),
    }
    (licence,) = installed.glob("*.dist-info/licenses/LICENSE")
    assert "Apache License" in licence.read_text(encoding="utf-8")


def test_doctor_runs_from_the_wheel(installed: Path) -> None:
    """The console script runs the installed package, not the checkout."""
    where = run(installed, sys.executable, "-c", "import green_torch.cli; print(green_torch.cli.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    report = json.loads(run(installed, sys.executable, str(installed / "bin" / "green-torch"), "doctor", "--json"))
    assert report["schema"] == "green_torch.doctor/1"
    assert report["known_gpus"] > 0


def test_the_module_is_the_same_command(installed: Path) -> None:
    """``python -m green_torch.cli`` stands in where no script is on the path."""
    import green_torch

    assert run(installed, sys.executable, "-m", "green_torch.cli", "--version").strip() == green_torch.__version__
