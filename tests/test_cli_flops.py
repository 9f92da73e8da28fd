"""``green-torch flops``: the table of a model that a factory makes, and what it says to a wrong factory."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

from green_torch.cli import flops, main
from green_torch.errors import ArgumentError, CountingError
from green_torch.flops import count_flops
from green_torch.records import FlopCount

FACTORIES = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 2))

    def forward(self, x, scale=1.0):
        return scale * self.body(self.stem(x).mean((2, 3)))


def net():
    return Net()


def with_args():
    return Net(), (torch.randn(2, 3, 8, 8),)


def with_kwargs():
    return Net(), torch.randn(2, 3, 8, 8), {"scale": 2.0}


def nothing():
    return 3


def needs(what):
    return Net()


def broken():
    raise RuntimeError("no weights")


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.linalg.matrix_exp(self.weight) @ x


model = Net()
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """The name of a module that can be imported."""
    folder = tmp_path_factory.mktemp("factories")
    (folder / "green_factories.py").write_text(FACTORIES)
    sys.path.insert(0, str(folder))
    yield "green_factories"
    sys.path.remove(str(folder))
    sys.modules.pop("green_factories", None)


def shown(report, **options):
    out = io.StringIO()
    flops.show(report, Console(file=out, width=120), **options)
    return out.getvalue()


@pytest.mark.parametrize("factory", ["net", "with_args", "with_kwargs", "model", "Net"])
def test_a_factory_may_give_inputs_or_leave_them_to_the_command(module, factory):
    """A model, (model, args), (model, args, kwargs), a class or a model itself: the total is count_flops's own."""
    batch = () if factory.startswith("with") else ("2x3x8x8",)
    report = flops.examine(f"{module}:{factory}", batch)
    expected = count_flops(sys.modules[module].Net(), torch.randn(2, 3, 8, 8))
    assert report.total == expected
    assert report.inputs[0] == "2x3x8x8:float32"
    assert report.parameters == sum(p.numel() for p in sys.modules[module].model.parameters())


def test_modules_hold_what_is_inside_them(module):
    """Each module's FLOPs are its own and its children's; the model's and the operations' are the total; names nest."""
    report = flops.examine(f"{module}:with_args")
    by_name = {one.name: one for one in report.modules}
    assert list(by_name) == ["", "stem", "body", "body.0", "body.0.0", "body.1"]  # the ReLU computes nothing that counts
    assert by_name[""].hardware_flops == report.total.hardware_flops == sum(one.hardware_flops for one in report.ops)
    assert by_name[""].model_flops == by_name["stem"].model_flops + by_name["body"].model_flops
    assert by_name["body"].model_flops == by_name["body.0.0"].model_flops + by_name["body.1"].model_flops
    assert by_name["body.1"].model_flops == 3 * 2 * 2 * 8 * 2
    assert by_name["stem"].dtypes == ("conv/float32",)
    assert by_name[""].dtypes == ("conv/float32", "mm/float32")
    assert sum(row.hardware_flops for row in report.rows) == report.total.hardware_flops


def test_the_table(module):
    """The table lists modules as deep as asked, the operations, the total to the last FLOP."""
    report = flops.examine(f"{module}:with_args")
    text = shown(report)
    for word in (
        "Net",
        "stem",
        "Conv2d",
        "body",
        "convolution_backward",
        "addmm",
        "conv/float32",
        f"{report.total.model_flops:,.0f}",
    ):
        assert word in text
    shallow = shown(report, depth=1)
    assert "body" in shallow
    assert "3 modules lie deeper: --depth 3" in shallow


def test_what_has_no_formula_is_named(module):
    """An operation without a formula is listed with the line that registers one."""
    report = flops.examine(f"{module}:Odd", ("4x2",))
    assert "register_flop_formula" in shown(report)
    assert report.total.uncounted_ops


def test_the_command_prints_json(module, capsys):
    """--json gives one object, whose total is that of the table."""
    with pytest.raises(SystemExit) as left:
        main(["flops", f"{module}:net", "--batch", "2x3x8x8", "--json"])
    assert left.value.code == 0
    content = json.loads(capsys.readouterr().out)
    assert content["schema"] == flops.SCHEMA
    assert (
        content["total"]["model_flops"]
        == content["modules"][0]["model_flops"]
        == sum(row["model_flops"] for row in content["rows"])
    )


@pytest.mark.parametrize(
    ("target", "batch", "words"),
    [
        ("{}", (), "names no factory"),
        ("fl.py:f", (), "green-torch flops fl:f"),
        ("./models/fl.py:f", (), "green-torch flops models.fl:f"),
        ("no_such_module_of_ours:net", (), "No module named"),
        ("{}:nowhere", (), "no function 'nowhere'"),
        ("{}:nothing", (), "no model"),
        ("{}:needs", (), "called without arguments"),
        ("{}:broken", (), "no weights"),
        ("{}:net", ("8,3",), "is no shape"),
        ("{}:net", ("8x3:int65",), "is no shape"),
    ],
)
def test_a_wrong_target_says_what_to_type(module, target, batch, words):
    """Whatever is wrong with the factory or a shape is an argument error that names it."""
    with pytest.raises(ArgumentError, match=words):
        flops.examine(target.format(module), batch)


def test_a_model_without_inputs_says_what_to_type(module):
    """The shapes as --batch takes them, those of an Embedding's ids too, or a factory that gives them."""
    with pytest.raises(CountingError, match=r"--batch 8x64:int64 .*\(model, args\)"):
        flops.examine(f"{module}:net")


def test_a_long_operation_is_broken_between_words():
    """In 80 columns no line ends within a word of its name."""
    total = FlopCount(1e12, 1e12, 0.0, {}, ())
    op = flops.Sum(
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward", "backward", 0, 1, 1e12, 1e12, 0.0, ("sdpa/float32",)
    )
    console = Console(file=io.StringIO(), width=80)
    flops.show(flops.Report(flops.SCHEMA, "Net", (), 1, total, (), (op,), ()), console)
    assert re.search(r"\n_scaled_dot_product_ .*\nflash_attention_for_ .*\ncpu_backward backward", console.file.getvalue())


def test_the_command_fails_in_one_line(module, capsys):
    """A model that can't run on the inputs leaves with 1, a wrong word with 2, both without a traceback."""
    for arguments, code in ((["--batch", "2x5"], 1), (["--batch", "2x3x8x8", "--attention", "half"], 2)):
        with pytest.raises(SystemExit) as left:
            main(["flops", f"{module}:net", *arguments])
        assert left.value.code == code
        error = capsys.readouterr().err
        assert error.startswith("green-torch: ")
        assert "Traceback" not in error


def test_a_meta_model_needs_no_memory():
    """A model that the factory makes on meta is counted there, and its inputs are made there too."""
    module = type(sys)("green_meta")
    module.large = lambda: nn.Linear(1 << 20, 1 << 20, device="meta")
    sys.modules["green_meta"] = module
    try:
        report = flops.examine("green_meta:large", ("4x1048576",))
    finally:
        del sys.modules["green_meta"]
    assert report.total.model_flops == 2 * 2 * 4 * (1 << 40)
