"""The shape of the package: its floors, its optional packages, its public names."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import green_torch

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(green_torch.__file__).parent

# The floors, from the ground up: a module imports only from lower ones. Files within one sub-package may import each other.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"units", "errors", "cache", "processor"}),
    frozenset({"records"}),
    frozenset({"protocols"}),  # they speak of records
    frozenset({"meters", "clock", "flops", "peaks", "intensity", "embodied", "sinks"}),
    frozenset(
        {"timeline", "footprint"}
    ),  # the former's types speak sampler, steps and recorder; the latter's arithmetic is in the totals
    frozenset(
        {
            "sampler",
            "sampler_child",
            "statistics",
            "steps",
            "calibration",
            "totals",
            "outlet",
            "surroundings",
            "warned",
            "batch",
            "baseline",
            "schedule",  # below the tracker, which pauses by it
        }
    ),
    frozenset({"recorder", "journal", "segments", "job", "estimate"}),
    frozenset({"ranks", "arguments"}),
    frozenset({"tracker"}),
    frozenset({"adapter"}),
    frozenset({"lightning", "transformers", "experiment", "ledger", "testing"}),
    frozenset({"gpt"}),  # a Workload of experiment's
    frozenset({"cli", "tensorboard_plugin"}),
)
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}

# Who alone may import what, by path from the package; a folder stands for all in it.
IMPORTERS = {
    "typer": {"cli"},
    "rich": {"cli"},
    "pynvml": {"meters/nvml.py", "meters/gpm.py"},
    "codecarbon": {"meters/codecarbon.py", "intensity/codecarbon_tables.py", "cli/report_codecarbon.py"},
    "pycountry": {"intensity/codecarbon_tables.py", "cli/report_codecarbon.py"},
    "matplotlib": {"cli/report_plot.py"},
    "requests": {"intensity/http.py"},
    "urllib3": {"intensity/http.py"},
    "lightning": {"lightning"},
    "pytorch_lightning": {"lightning"},
    "transformers": {"transformers.py"},
    "tensorboard": {"sinks/tensorboard.py", "tensorboard_plugin", "cli/tensorboard.py"},
    "werkzeug": {"tensorboard_plugin"},
    "zeus": set(),
}
PURE = {"units.py", "errors.py", "records.py", "timeline.py", "footprint.py", "statistics.py", "estimate.py"}
IMPURE = {
    "torch",
    "numpy",
    "os",
    "io",
    "pathlib",
    "time",
    "datetime",
    "threading",
    "socket",
    "subprocess",
    "urllib",
    "requests",
    "tempfile",
}


@cache
def sources() -> dict[str, ast.Module]:
    """The syntax tree of every module, by its path from the package."""
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))
    }


def part_of(path: str) -> str:
    """The module or sub-package on a floor that a file belongs to: "meters/nvml.py" -> "meters"; "" for the lazy face."""
    part = path.partition("/")[0].removesuffix(".py")
    return "" if part == "__init__" else part


def imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every absolute name imported anywhere in a module, under TYPE_CHECKING and inside functions too: line and dotted name."""
    package = ["green_torch", *Path(path).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], node.module or ""]).strip(".")
                if node.level
                else node.module
            )
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "green_torch":
            yield node.lineno, f"green_torch.{node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in {"import_module", "__import__"} and node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def own_part(name: str) -> str | None:
    """The part of our package that a dotted name lies in; ``None`` for another package, the face itself and its dunders."""
    parts = name.split(".")
    if parts[0] != "green_torch" or len(parts) == 1 or parts[1].startswith("__"):
        return None
    return green_torch._HOME.get(parts[1], parts[1])


def complaints(files: dict[str, ast.Module]) -> list[str]:
    """Every import that goes up, or sideways to a sibling."""
    found = []
    for path, tree in files.items():
        part = part_of(path)
        for line, name in imports(path, tree) if part else ():
            target = own_part(name)
            if target is None or target == part:
                continue
            if target not in FLOOR_OF:
                found.append(f"{path}:{line} imports {name}, which stands on no floor")
            elif FLOOR_OF[target] >= FLOOR_OF.get(part, -1):
                found.append(f"{path}:{line} ({part}) imports {name}, which stands no lower")
    return found


def test_every_module_stands_on_a_floor() -> None:
    """A new module must be given its floor in the table above."""
    assert {part_of(path) for path in sources()} - {""} <= set(FLOOR_OF)


def test_imports_go_down_only() -> None:
    """No module imports upwards or from a sibling, lazily or not."""
    found = complaints(sources())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("timeline.py", "from green_torch.tracker import Tracker"),
        ("steps.py", "def f():\n    from green_torch import recorder"),
        ("steps.py", "def f():\n    from . import recorder"),
        ("meters/nvml.py", "from ..sinks import jsonl"),
        ("clock.py", "import green_torch.peaks"),
        ("units.py", "import green_torch\ngreen_torch.track()"),
        ("recorder.py", "import importlib\nimportlib.import_module('green_torch.tracker')"),
        ("units.py", "from green_torch import StepRecord"),
    ],
)
def test_the_floors_test_can_fail(path: str, line: str) -> None:
    """Upward and sideways imports are found however they are written."""
    assert len(complaints({path: ast.parse(line)})) == 1


def test_optional_packages_stay_where_they_belong() -> None:
    """Each outside package with an adapter of its own is imported by that adapter alone."""
    found = [
        f"{path}:{line} imports {name}"
        for path, tree in sources().items()
        for line, name in imports(path, tree)
        if (allowed := IMPORTERS.get(name.partition(".")[0])) is not None and not {path, path.partition("/")[0]} & allowed
    ]
    assert not found, "\n".join(found)


def test_the_pure_floor_is_pure() -> None:
    """Arithmetic modules touch no clock, file, network or torch."""
    found = [
        f"{path}:{line} imports {name}"
        for path in PURE
        for line, name in imports(path, sources()[path])
        if name.partition(".")[0] in IMPURE
    ]
    assert not found, "\n".join(found)


def test_the_plugin_needs_no_torch() -> None:
    """TensorBoard loads the plugin into its own process: it imports nothing heavy, nor any of our modules that do."""
    found = [
        name
        for path, tree in sources().items()
        if path.startswith("tensorboard_plugin")
        for _, name in imports(path, tree)
        if name.partition(".")[0] in {"torch", "codecarbon", "lightning", "pynvml"}
    ]
    assert not found, "\n".join(found)


def test_all_lists_what_is_exported_and_it_resolves() -> None:
    """``__all__``, the lazy table and the names that type checkers see are one list, and each name loads from its home."""
    assert sorted(green_torch._HOME) == sorted(green_torch.__all__)
    checked = {
        alias.name
        for node in ast.walk(sources()["__init__.py"])
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("green_torch.")
        for alias in node.names
    }
    assert checked == set(green_torch.__all__)
    for name in green_torch.__all__:
        assert getattr(green_torch, name) is getattr(importlib.import_module(f"green_torch.{green_torch._HOME[name]}"), name)
    assert set(green_torch.__all__) <= set(dir(green_torch))
    with pytest.raises(AttributeError, match="tracked"):
        _ = green_torch.tracked


def test_every_listed_name_is_defined() -> None:
    """Each module's own ``__all__`` names things that its source defines or imports."""
    for path, tree in sources().items():
        listed = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)
        ]
        defined = {name for node in ast.walk(tree) for name in _bound(node)}
        for name in (name for names in listed for name in names):
            assert name in defined, f"{path}: __all__ lists {name}"


def _bound(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.Assign):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id


def test_every_public_name_has_a_docstring() -> None:
    """Modules, public classes and their public methods, and public functions say what they are."""
    found = []
    for path, tree in sources().items():
        nodes: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]] = [(path, tree)]
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                nodes.append((f"{path}:{node.name}", node))
                nodes += [
                    (f"{path}:{node.name}.{inner.name}", inner)
                    for inner in node.body
                    if isinstance(node, ast.ClassDef) and isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_")
                ]
        found += [name for name, node in nodes if not ast.get_docstring(node)]
    assert not found, "\n".join(found)


def test_importing_the_package_loads_nothing_heavy() -> None:
    """``import green_torch`` loads none of torch, its companions and the terminal's libraries; nor do the arithmetic modules."""
    heavy = {"torch", "numpy", "pandas", "psutil", "requests", *IMPORTERS}
    script = (
        "import sys, green_torch, green_torch.records, green_torch.timeline, green_torch.footprint, green_torch.statistics\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert heavy & set(ran.stdout.split()) == set()


def test_the_changelog_tells_of_this_version() -> None:
    """The newest release in CHANGELOG.md is this version, or an older one with the changes since under [Unreleased]; newest first."""
    text = (ROOT.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", text, flags=re.MULTILINE)
    unreleased, releases = (
        headings[:1] == ["Unreleased"],
        [tuple(map(int, h.split("."))) for h in headings if h != "Unreleased"],
    )
    version = tuple(map(int, re.findall(r"\d+", green_torch.__version__)))
    assert releases == sorted(set(releases), reverse=True)
    assert releases[:1] == [version] or (unreleased and all(release < version for release in releases))


def test_the_installed_version_is_the_one_in_the_code() -> None:
    """The distribution's metadata takes its version from the package."""
    assert metadata.version("green-torch") == green_torch.__version__
