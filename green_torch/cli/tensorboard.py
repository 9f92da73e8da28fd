"""``green-torch tensorboard DIR``: TensorBoard with the flags that suit a run of ours, opened at the Green tab."""

from __future__ import annotations

import threading
import webbrowser
from typing import TYPE_CHECKING

import typer

from green_torch.errors import ArgumentError

if TYPE_CHECKING:
    from pathlib import Path

FRAGMENT = "#green"


def flags(log_dir: Path, *, host: str, port: int | None, fast: bool) -> list[str]:
    """TensorBoard's arguments.

    ``reload_multifile``: a resumed run has an event file for each start. ``reload_interval``: a page that updates while a run goes
    on should not lag behind by more than its own clock.
    """
    return [
        "--logdir", str(log_dir),
        "--host", host,
        *(() if port is None else ("--port", str(port))),
        f"--load_fast={'auto' if fast else 'false'}",
        "--reload_multifile=true",
        "--reload_interval=5",
    ]  # fmt: skip


def serve(log_dir: Path, *, host: str, port: int | None, fast: bool, show: bool, stop: threading.Event | None = None) -> None:
    """Runs TensorBoard until Ctrl-C (or ``stop``).

    Raises:
        ArgumentError: ``log_dir`` is a file, or the address can't be listened on.
    """
    from tensorboard import program  # type: ignore[import-untyped]  # tensorboard ships no types

    if log_dir.is_file():
        raise ArgumentError(f"{log_dir} is a file: give the directory that holds the runs (log_dir, or one above)")
    if not log_dir.exists():
        typer.echo(f"{log_dir} does not exist yet: the tab fills when a run writes there", err=True)
    board = program.TensorBoard()
    board.configure(argv=["tensorboard", *flags(log_dir, host=host, port=port, fast=fast)])
    try:
        address = board.launch()
    except program.TensorBoardServerException as error:
        raise ArgumentError(f"TensorBoard can't listen: {error}; give another --port or --host") from error
    typer.echo(f"The Green tab: {address}{FRAGMENT} (Ctrl-C ends it)")
    if show and not webbrowser.open(f"{address}{FRAGMENT}"):
        typer.echo("No browser was found here: open the address yourself", err=True)
    try:
        (stop or threading.Event()).wait()
    except KeyboardInterrupt:
        typer.echo("")
