"""The ``green-torch`` command: ``demo`` shows what it does, ``doctor`` what this machine can measure."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from green_torch.errors import ArgumentError, GreenTorchError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

BAD_ARGUMENT = 2
_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Energy, efficiency and carbon of PyTorch training, measured step by step.",
)

Region = Annotated[
    str | None,
    typer.Option(help='Where the electricity comes from: "FR", "US-CA", "aws:us-west-2". Without it: the world average.'),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")]


@app.callback(invoke_without_command=True)
def _about(*, version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        import green_torch

        typer.echo(green_torch.__version__)
        raise typer.Exit


@app.command("demo")
def _demo(
    *,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of each variant. Without it: what fits in 40 seconds.")
    ] = None,
    log_dir: Annotated[Path, typer.Option(help="Where the two runs go.")] = Path("runs/demo"),
    region: Region = None,
    seed: Annotated[int, typer.Option(help="For the weights, the data and the order of the blocks.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train a small GPT in FP32 and in BF16, and show the joules, MFU and gCO2e of a step. No download, no GPU needed."""
    from rich.console import Console

    from green_torch.cli.demo import as_json as to_json
    from green_torch.cli.demo import demonstrate, show

    out, err = Console(highlight=False), Console(stderr=True)
    found = demonstrate(log_dir, steps=steps, region=region, seed=seed, console=err)
    if as_json:
        _print_json(to_json(found))
    else:
        show(found, out)
    if found.comparison.interrupted:
        raise typer.Exit(_INTERRUPTED)
    if not any(result.blocks for result in found.comparison.results):
        raise typer.Exit(1)


@app.command("doctor")
def _doctor(
    *,
    region: Region = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure each GPU's energy counter, a few seconds each, and keep what is found.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show which devices, meters, peaks and grid data are here, how each joule will be known, and what mends what is missing."""
    from rich.console import Console

    from green_torch.cli.doctor import examine, show
    from green_torch.sinks.codec import plain

    report = examine(region, calibrate=calibrate)
    if as_json:
        _print_json(plain(report))
    else:
        show(report, Console(highlight=False))


@app.command("flops")
def _flops(
    target: Annotated[
        str, typer.Argument(help='"module:factory"; factory() gives a model, (model, args) or (model, args, kwargs).')
    ],
    *,
    batch: Annotated[
        list[str] | None,
        typer.Option(help="An input's shape and dtype, \"8x1024:int64\", in place of the factory's. May be repeated."),
    ] = None,
    attention: Annotated[str, typer.Option(help='"causal" halves attention that is called with is_causal.')] = "full",
    depth: Annotated[int, typer.Option(help="How many levels of modules are listed.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Count a training step's FLOPs, forward and backward, by module and by operation. Computes nothing; no GPU needed."""
    from rich.console import Console

    from green_torch.cli.flops import examine, show
    from green_torch.sinks.codec import plain

    report = examine(target, batch or (), attention)  # type: ignore[arg-type]  # a wrong word raises, and says the right ones
    if as_json:
        _print_json(plain(report))
    else:
        show(report, Console(highlight=False), depth=depth)


def _print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line (``None``: the process's own arguments) and exits: 0, 2 for a wrong argument, 1 for what else fails."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="green-torch")
    except GreenTorchError as error:
        print(f"green-torch: {error}", file=sys.stderr)  # noqa: T201  (a message for people)
        sys.exit(BAD_ARGUMENT if isinstance(error, ArgumentError) else 1)
