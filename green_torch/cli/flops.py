"""``green-torch flops module:factory``: a table of a training step's FLOPs, by module and by operation.

:func:`examine` builds the model and counts; :func:`show` prints. Nothing is computed where the model can be counted on ``meta``.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import nn

from green_torch.errors import ArgumentError, CountingError
from green_torch.flops import FlopTable, ModuleFlops, count_by_module
from green_torch.flops.once import device_of
from green_torch.flops.replica import unwrap
from green_torch.records import FlopCount
from green_torch.units import si

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

SCHEMA = "green_torch.flops/1"
_OP_CHARS = 22  # of an operation's name on a line


@dataclass(frozen=True, slots=True)
class Sum:
    """FLOPs of one module with all that is inside it, or of one operation. ``dtypes`` as ``mm/bfloat16``, by hardware FLOPs."""

    name: str
    kind: str
    parameters: int
    calls: int
    model_flops: float
    hardware_flops: float
    recompute_flops: float
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """A step's FLOPs: in all, by module (each with what is inside it) and by operation; ``rows`` are the parts of all three."""

    schema: str
    model: str
    inputs: tuple[str, ...]
    parameters: int
    total: FlopCount
    modules: tuple[Sum, ...]
    ops: tuple[Sum, ...]
    rows: tuple[ModuleFlops, ...]


def examine(target: str, batch: Sequence[str] = (), attention: Literal["full", "causal"] = "full") -> Report:
    """Counts one training step of what ``target`` ("module:factory") makes: a model, (model, args) or (model, args, kwargs).

    ``batch`` gives the inputs by shape and dtype, in place of the factory's: "8x3x224x224", "8x1024:int64".

    Raises:
        ArgumentError: there is no such factory, it makes something else, or a shape can't be read.
        CountingError: the model can't run on these inputs.
    """
    model, args, kwargs = _made(target)
    if batch:
        args, kwargs = tuple(_input(text, model) for text in batch), {}
    try:
        table = count_by_module(model, *args, attention=attention, **kwargs)
    except CountingError as error:
        if args or kwargs:
            raise
        raise CountingError(
            f"{error} {target} gives no inputs: type their shapes, --batch 8x3x224x224, or --batch 8x64:int64 for the ids that an Embedding "
            "takes; or let it return (model, args)"
        ) from error
    inner = unwrap(model)
    return Report(
        SCHEMA,
        type(inner).__name__,
        tuple(_described(value) for value in (*args, *kwargs.values())),
        _parameters(inner),
        table.total,
        tuple(_by_module(inner, table)),
        tuple(_by_op(table)),
        table.rows,
    )


def _made(target: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    module_name, _, name = target.partition(":")
    usage = "say green-torch flops module:factory, where factory() gives a model, (model, args) or (model, args, kwargs)"
    if not module_name or not name:
        raise ArgumentError(f"{target!r} names no factory: {usage}")
    if module_name.endswith(".py"):
        dotted = re.sub(r"[/\\\\]+", ".", module_name.removesuffix(".py").removeprefix("./"))
        raise ArgumentError(f"{target!r} names a file: say the module, green-torch flops {dotted}:{name}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as python -m does: modules of the current folder
    try:
        factory: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        raise ArgumentError(f"{target!r}: {error}: run it where `python -c 'import {module_name}'` works") from error
    for part in name.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        raise ArgumentError(f"{module_name} has no function {name!r}: {usage}")
    try:
        made = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:
        raise ArgumentError(f"{target} failed: {type(error).__name__}: {error}; it is called without arguments") from error
    parts = made if isinstance(made, tuple) else (made,)
    model, args, kwargs = (*parts, (), {})[:3] if len(parts) < 2 else (*parts, {})[:3]
    args = tuple(args) if isinstance(args, tuple | list) else (args,)
    if not isinstance(model, nn.Module) or not isinstance(kwargs, dict):
        raise ArgumentError(f"{target} gives {type(made).__name__}, no model: {usage}")
    return model, args, kwargs


def _input(text: str, model: nn.Module) -> torch.Tensor:
    """Zeros of a shape and dtype, on the model's device: "8x1024:int64"; without a dtype, in the parameters'."""
    shape, _, name = text.partition(":")
    dtype = getattr(torch, name, None) if name else next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if not re.fullmatch(r"\d+(x\d+)*", shape) or (name and not isinstance(dtype, torch.dtype)):
        raise ArgumentError(f"--batch {text!r} is no shape: say 8x3x224x224, or 8x1024:int64 with a torch dtype")
    return torch.zeros([int(size) for size in shape.split("x")], dtype=dtype, device=device_of(model))


def _described(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{'x'.join(str(size) for size in value.shape)}:{str(value.dtype).removeprefix('torch.')}"


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _by_module(model: nn.Module, table: FlopTable) -> list[Sum]:
    """Every module that computes or holds one that does, outermost first."""
    groups: dict[str, list[ModuleFlops]] = {}
    for row in table.rows:
        parts = row.module.split(".") if row.module else []
        for depth in range(len(parts) + 1):
            groups.setdefault(".".join(parts[:depth]), []).append(row)
    return [
        _sum(name, type(module).__name__, _parameters(module), groups[name])
        for name, module in model.named_modules()
        if name in groups
    ]


def _by_op(table: FlopTable) -> list[Sum]:
    """Every operation, the costliest first."""
    groups: dict[tuple[str, str], list[ModuleFlops]] = {}
    for row in table.rows:
        groups.setdefault((row.op, "backward" if row.backward else "forward"), []).append(row)
    sums = [_sum(op, when, 0, rows) for (op, when), rows in groups.items()]
    return sorted(sums, key=lambda one: -one.hardware_flops)


def _sum(name: str, kind: str, parameters: int, rows: list[ModuleFlops]) -> Sum:
    dtypes: dict[str, float] = {}
    for row in rows:
        dtypes[row.dtype] = dtypes.get(row.dtype, 0.0) + row.hardware_flops
    return Sum(
        name,
        kind,
        parameters,
        sum(row.calls for row in rows),
        sum(row.model_flops for row in rows),
        sum(row.hardware_flops for row in rows),
        sum(row.recompute_flops for row in rows),
        tuple(sorted(dtypes, key=lambda dtype: -dtypes[dtype])),
    )


def show(report: Report, console: Console, *, depth: int | None = None) -> None:
    """Prints the report; ``depth``: how many dots deep modules are listed (``None``: all)."""
    total = report.total
    inputs = ", ".join(report.inputs) or "no input"
    console.print(
        f"[bold]{escape(report.model)}[/] on {escape(inputs)}: a training step, {si(report.parameters, '', 4)} parameters, 2 FLOPs a multiply-add",
        soft_wrap=True,
    )
    listed = [one for one in report.modules if depth is None or not one.name or one.name.count(".") < depth]
    _print(console, ("module, with what is inside it", "parameters"), listed, total, _module_cells)
    hidden = len(report.modules) - len(listed)
    if hidden:
        deepest = 1 + max(one.name.count(".") for one in report.modules)
        console.print(Text(f"{hidden} modules lie deeper: --depth {deepest} lists them", style="dim"))
    _print(console, ("operation", "calls"), report.ops, total, _op_cells)
    notes = [
        f"Model FLOPs {total.model_flops:,.0f}; hardware FLOPs {total.hardware_flops:,.0f}, {total.recompute_flops:,.0f} of them recomputed."
    ]
    if total.estimated:
        notes.append("Hardware FLOPs are estimated: attention is taken to run fused, where torch's settings allow that.")
    if total.uncounted_ops:
        notes.append(
            f"Not counted, for want of a formula: {', '.join(total.uncounted_ops)}. Register one with "
            "torch.utils.flop_counter.register_flop_formula(torch.ops.<namespace>.<op>)."
        )
    console.print()
    for note in notes:
        console.print(Text(note), soft_wrap=True)


def _module_cells(one: Sum) -> tuple[Text, str]:
    depth = one.name.count(".") + 1 if one.name else 0
    name = one.name.rpartition(".")[2]
    return Text.assemble("  " * depth, name, " " * bool(name), (one.kind, "dim")), si(one.parameters, "")


def _op_cells(one: Sum) -> tuple[Text, str]:
    parts = one.name.removeprefix("aten::").split("_")
    lines = [""]
    for part in parts:  # a long name is broken after a "_", as a table of 80 columns would do in the middle of a word
        if len(lines[-1]) + len(part) >= _OP_CHARS and lines[-1]:
            lines.append("")
        lines[-1] += part + "_"
    return Text.assemble("\n".join(lines)[:-1], " ", (one.kind, "dim")), f"{one.calls:,}"


def _print(
    console: Console,
    head: tuple[str, str],
    sums: Sequence[Sum],
    total: FlopCount,
    cells: Callable[[Sum], tuple[Text, str]],
) -> None:
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(head[0], overflow="fold")
    for heading in (head[1], "model", "hardware", "recompute", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("dtype", overflow="fold")
    for one in sums:
        share = one.hardware_flops / total.hardware_flops if total.hardware_flops else 0.0
        recompute = si(one.recompute_flops, "") if one.recompute_flops else "–"
        numbers = (si(one.model_flops, ""), si(one.hardware_flops, ""), recompute, f"{share:.1%}")
        table.add_row(*cells(one), *numbers, ", ".join(one.dtypes))
    console.print(table if sums else Text("  nothing that counts"))
