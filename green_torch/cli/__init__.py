"""The ``green-torch`` command: ``demo`` shows what it does, ``compare`` what a change is worth, ``doctor`` what this machine can measure."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from green_torch.errors import ArgumentError, GreenTorchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from green_torch.cli.compare import Found

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
    _leave(found)


@app.command("compare")
def _compare(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            help='"module:build", where build(variant) gives a Workload; or directories of runs, runs/a runs/b. Without: the built-in GPT.'
        ),
    ] = None,
    *,
    variants: Annotated[
        str | None,
        typer.Option(
            help='The first is the baseline: "fp32,bf16,bf16+flash,bf16+flash+checkpoint+compile". Without: the first three.'
        ),
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(
            help="Blocks of each variant, at most. Without it: as many as --until and --budget ask for; without these, 8."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps a block. Without it: what fits a few seconds.")] = None,
    until: Annotated[
        str | None, typer.Option(help='Go on until every interval is this narrow: "1%" for ±1 %. Alone: 200 blocks at most.')
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help='Time or energy for the blocks, with its unit: "90s", "5m", "20kJ", "0.05kWh". Set-up (loading, warming up) is not in it. '
            "What comes first of --blocks, --until and --budget ends it; without any of them, 8 blocks in 40 seconds."
        ),
    ] = None,
    largest_batch: Annotated[
        str | None,
        typer.Option(help='Also find the largest batch of each variant that fits, and measure there: "device", or in "8GiB".'),
    ] = None,
    size: Annotated[
        str, typer.Option(help='Of the built-in GPT: "1M", "10M", "124M", "350M"; "auto" goes by the device.')
    ] = "auto",
    region: Region = None,
    tokens: Annotated[float | None, typer.Option(help="Project to a planned run of so many tokens, such as 10e9.")] = None,
    samples: Annotated[float | None, typer.Option(help="Likewise, samples.")] = None,
    planned_steps: Annotated[float | None, typer.Option(help="Likewise, steps as the baseline takes them.")] = None,
    price: Annotated[float | None, typer.Option(help="Money per kWh of facility energy, for the planned run.")] = None,
    regions: Annotated[
        str | None, typer.Option(help='Other grids for the planned run: "FR,DE,aws:us-west-2,gcp:europe-west1".')
    ] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Where the variants' runs go. Without it: runs/compare.")] = None,
    seed: Annotated[int, typer.Option(help="For the weights, the data and the order of the blocks.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Compare runs on disk that are not comparable, and say so.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare variants of your training, block by block in turn, or runs on disk; project what a planned run would save.

    Exits with 1 where the baseline was not measured or a variant failed, unless it only did not fit in memory or can't run here.
    """
    from rich.console import Console

    from green_torch.cli.compare import as_json as to_json
    from green_torch.cli.compare import compare, parse_budget, parse_memory, parse_plan, parse_share, show

    asked = {
        "blocks": blocks,
        "steps_per_block": steps,
        "until": None if until is None else parse_share(until),
        "largest_batch": None if largest_batch is None else parse_memory(largest_batch),
        **({} if budget is None else parse_budget(budget)),
    }
    found = compare(
        targets or (),
        Console(stderr=True),
        variants=variants,
        size=size,
        log_dir=log_dir,
        region=region,
        seed=seed,
        force=force,
        plan=parse_plan(tokens=tokens, samples=samples, steps=planned_steps, price=price, regions=regions),
        options={key: value for key, value in asked.items() if value is not None},
    )
    if as_json:
        _print_json(to_json(found))
    else:
        show(found, Console(highlight=False))
    _leave(found)


def _leave(found: Found) -> None:
    """Exits with what a comparison came to, where that is not success."""
    if found.interrupted:
        raise typer.Exit(_INTERRUPTED)
    if found.nothing_left or found.failed:
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


@app.command("report")
def _report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Runs are looked for everywhere below.")],
    *,
    by: Annotated[str, typer.Option(help="project, model, status, month or run.")] = "project",
    since: Annotated[str | None, typer.Option(help="Runs that began on this day (2026-01-31, UTC) or later.")] = None,
    until: Annotated[str | None, typer.Option(help="Runs that began on this day or before.")] = None,
    detail: Annotated[bool, typer.Option("--detail", help="Read every record: flags, phases, each file.")] = False,
    target_failed_share: Annotated[str | None, typer.Option(help="What fewer failed runs would save: 5%.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="table, markdown, csv, json, png, model-card, codecarbon or paper.")
    ] = "table",
    training_type: Annotated[str | None, typer.Option(help="For the model card: pre-training or fine-tuning.")] = None,
    output: Annotated[Path | None, typer.Option(help="A file in place of stdout.")] = None,
) -> None:
    """Add up the runs on disk: energy, emissions, MFU, and what was wasted, in tables or for a program, a model card or a paper."""
    from green_torch.cli.report import examine, write

    report = examine(directories, by=by, since=since, until=until, detail=detail, target_failed_share=target_failed_share)
    write(report, form, output, training_type=training_type)


@app.command("hardware")
def _hardware(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help='Cards, "A100" "H100 PCIe" "4090". Without: all of them.')
    ] = None,
    *,
    dtype: Annotated[
        str | None, typer.Option(help="Sort by it: fp64, fp32, tf32, bf16, fp16, fp8. Without: half precision.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="DIR", help="A measured run: when would moving it to --to repay making that?"),
    ] = None,
    to: Annotated[str | None, typer.Option(help="The new card.")] = None,
    mfu_to: Annotated[
        float | None, typer.Option(help="Its MFU, an assumption. Without it: the one measured on the old card.")
    ] = None,
    power_to: Annotated[
        float | None, typer.Option(help="Its power as a share of TDP, an assumption. Without it: the old card's share.")
    ] = None,
    region: Annotated[
        str | None, typer.Option(help='Where it will stand: "FR", "aws:us-west-2". Without it: the run\'s own.')
    ] = None,
    intensity: Annotated[float | None, typer.Option(help="gCO2e/kWh, in place of the region's.")] = None,
    pue: Annotated[
        float | None, typer.Option(help="Facility over IT energy. Without it: the provider's published one, or the run's.")
    ] = None,
    in_use: Annotated[
        float | None,
        typer.Option("--in-use", "--utilization", help="The share of its life in which it works, 0-1. Without it: all."),
    ] = None,
    lifetime: Annotated[float | None, typer.Option(help="Years that the new card is kept. Without it: 4.")] = None,
    embodied_kg: Annotated[float | None, typer.Option(help="kgCO2e of making one, in place of the table's.")] = None,
    server: Annotated[bool, typer.Option("--server", help="Count a share of the server around the new card too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what each card computes for a watt, or when moving a measured run to a new card repays making it."""
    from rich.console import Console

    from green_torch.cli import hardware
    from green_torch.sinks.codec import plain

    console = Console(highlight=False)
    if source is None and to is None:
        report = hardware.examine(names or (), dtype)
        _print_json(plain(report)) if as_json else hardware.show(report, console)
        return
    if source is None or to is None:
        raise ArgumentError("--from and --to go together: green-torch hardware --from runs/a --to H100")
    found = hardware.refresh(
        source,
        to,
        mfu_to=mfu_to,
        power_to=power_to,
        dtype=dtype,
        region=region,
        intensity=intensity,
        pue=pue,
        in_use=in_use,
        lifetime=lifetime,
        embodied_kg=embodied_kg,
        server=server,
    )
    _print_json(plain(found)) if as_json else hardware.show_refresh(found, console)


@app.command("estimate")
def _estimate(
    *,
    gpu: Annotated[str, typer.Option(help='The accelerator: "A100", "H100 PCIe", "4090".')],
    count: Annotated[int | None, typer.Option(help="How many. Without it: one.")] = None,
    hours: Annotated[str | None, typer.Option(help='How long, or a range, "280-320".')] = None,
    flops: Annotated[float | None, typer.Option(help="The work in place of hours: model FLOPs, 3.14e23.")] = None,
    parameters: Annotated[float | None, typer.Option(help="The work as 6 × parameters × --tokens.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens of the run.")] = None,
    mfu: Annotated[str | None, typer.Option(help='The MFU to assume for the work, or a range, "0.35-0.45".')] = None,
    against_mfu: Annotated[str | None, typer.Option(help="The same work at another MFU beside it.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Whose peak the MFU is of. Without it: half precision.")] = None,
    utilization: Annotated[
        str | None, typer.Option(help='Power as a share of TDP, 0-1, or a range, "0.5-0.7". Without it: all of it.')
    ] = None,
    power: Annotated[
        str | None, typer.Option(help="Watts of one, with its share of the host, in place of --utilization.")
    ] = None,
    region: Region = None,
    intensity: Annotated[str | None, typer.Option(help="gCO2e/kWh in place of the region's, or a range.")] = None,
    pue: Annotated[
        str | None, typer.Option(help="Facility over IT energy, or a range. Without it: the provider's published one.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Money per kWh of facility energy.")] = None,
    embodied_kg: Annotated[str | None, typer.Option(help="kgCO2e of making one, in place of the table's, or a range.")] = None,
    server: Annotated[bool, typer.Option("--server", help="Count a share of the servers' making too.")] = False,
    lifetime: Annotated[float | None, typer.Option(help="Years that a card is kept. Without it: 4.")] = None,
    in_use: Annotated[
        float | None, typer.Option(help="The share of that time in which it is used, 0-1. Without it: all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate energy, emissions and cost before a run, from cards and hours, or from FLOPs and an assumed MFU."""
    from rich.console import Console

    from green_torch.cli.estimate import Asked, examine, show
    from green_torch.sinks.codec import plain

    found = examine(
        Asked(
            gpu=gpu,
            count=count,
            hours=hours,
            flops=flops,
            parameters=parameters,
            tokens=tokens,
            mfu=mfu,
            other_mfu=against_mfu,
            dtype=dtype,
            utilization=utilization,
            power=power,
            region=region,
            intensity=intensity,
            pue=pue,
            price=price,
            embodied_kg=embodied_kg,
            server=server,
            lifetime=lifetime,
            in_use=in_use,
        )
    )
    _print_json(plain(found)) if as_json else show(found, Console(highlight=False))


Hours = Annotated[float, typer.Option(help="Hours of work.")]
Within = Annotated[str, typer.Option(help="By when it must be done, from now on: 24h, 7d, 90m.")]
Home = Annotated[str | None, typer.Option(help='The grid: "DE", "GB", "US-CAL-CISO", as its provider names it.')]
Provider = Annotated[str, typer.Option(help="electricitymaps (needs a key), neso (Great Britain), watttime, or auto.")]
Traces = Annotated[
    list[Path] | None, typer.Option("--trace", help="A CSV file in place of a forecast; once for each region, in their order.")
]
Start = Annotated[str | None, typer.Option(help="The present, for a trace: 2022-06-01T00:00+00:00. Without an offset: UTC.")]
Queue = Annotated[str, typer.Option(help="How long it waits in the queue at worst, once handed over: 30m.")]
Least = Annotated[str, typer.Option(help="A smaller saving is not worth waiting for: 5%.")]
Zone = Annotated[str | None, typer.Option("--timezone", help="Of times in a trace that have no offset: Europe/Berlin.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 3 where nothing is known ahead, in place of 0.")]


@app.command("when")
def _when(
    *,
    hours: Hours,
    within: Within,
    region: Home = None,
    regions: Annotated[
        str | None, typer.Option(help="Other grids where it could run: FR,GB. The baseline is the first.")
    ] = None,
    interruptible: Annotated[
        bool, typer.Option("--interruptible", help="It can be stopped and go on from a checkpoint.")
    ] = False,
    resume_overhead: Annotated[str, typer.Option(help="What each resume takes.")] = "2m",
    queue_delay: Queue = "0s",
    power: Annotated[float | None, typer.Option(help="Mean draw in watts, to see grams.")] = None,
    min_saving: Least = "0%",
    provider: Provider = "auto",
    trace: Traces = None,
    start: Start = None,
    timezone: Zone = None,
    form: Annotated[str, typer.Option("--format", help="human, slurm (sbatch --begin=), iso or json.")] = "human",
    strict: Strict = False,
) -> None:
    """Tell when a job had best run, and what waiting saves. Where nothing is known ahead the answer is now."""
    from rich.console import Console

    from green_torch.cli import when

    if form not in when.FORMATS:
        raise ArgumentError(f"--format {form!r}: use one of {', '.join(when.FORMATS)}")
    job = when.Job(
        hours * 3600,
        when.parse_duration(within, "--within"),
        interruptible=interruptible,
        resume_overhead_s=when.parse_duration(resume_overhead, "--resume-overhead"),
        queue_delay_s=when.parse_duration(queue_delay, "--queue-delay"),
        power_w=power,
        min_saving=when.parse_fraction(min_saving),
    )
    now_unix_ns = when.present(start, traced=bool(trace))
    answer = when.ask(when.sources(region, regions, provider, trace or (), now_unix_ns, timezone=timezone), job, now_unix_ns)
    when.complain(answer)
    when.write(answer, form, Console(highlight=False))
    if strict and answer.best is None:
        raise typer.Exit(when.UNKNOWN)


@app.command("wait")
def _wait(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="What to run then: -- python train.py")],
    *,
    hours: Hours,
    within: Within,
    region: Home = None,
    queue_delay: Queue = "0s",
    min_saving: Least = "0%",
    provider: Provider = "auto",
    trace: Traces = None,
    start: Start = None,
    timezone: Zone = None,
) -> None:
    """Wait for the low-carbon window, then run a command in this process's place: its signals and exit code are its own."""
    from green_torch.cli import when

    job = when.Job(
        hours * 3600,
        when.parse_duration(within, "--within"),
        queue_delay_s=when.parse_duration(queue_delay, "--queue-delay"),
        min_saving=when.parse_fraction(min_saving),
    )
    now_unix_ns = when.present(start, traced=bool(trace))
    grids = when.sources(region, None, provider, trace or (), now_unix_ns, timezone=timezone)
    if len(grids) > 1:
        raise ArgumentError("wait is for one grid, where this machine stands: give --trace once")
    when.wait(grids, job, command, now_unix_ns)


@app.command("tensorboard")
def _tensorboard(
    log_dir: Annotated[Path, typer.Argument(metavar="DIR", help="Runs are looked for everywhere below.")] = Path("runs"),
    *,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines in.")] = "localhost",
    port: Annotated[int | None, typer.Option(help="Without it: 6006, or the next one that is free.")] = None,
    fast: Annotated[bool, typer.Option(help="Read the event files with TensorBoard's fast loader where it has one.")] = True,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the tab in the browser.")] = True,
) -> None:
    """Start TensorBoard with the flags that suit these runs, and open its Green tab. Ctrl-C ends it."""
    from green_torch.cli.tensorboard import serve

    serve(log_dir, host=host, port=port, fast=fast, show=show)


def _print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line (``None``: the process's own arguments) and exits: 0, 2 for a wrong argument, 1 for what else fails."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="green-torch")
    except GreenTorchError as error:
        print(f"green-torch: {error}", file=sys.stderr)  # noqa: T201  (a message for people)
        sys.exit(BAD_ARGUMENT if isinstance(error, ArgumentError) else 1)
