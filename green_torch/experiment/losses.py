"""The losses of runs on disk, from their TensorBoard events: whether two of them are one training."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from green_torch.sinks.jsonl import run_files
from green_torch.sinks.tensorboard import read_scalars

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

# The names under which trainings log their loss, the likeliest first, as in the Green tab (static/data.js).
_NAMES = ("train_loss", "train/loss", "loss/train", "training_loss", "loss", "Loss/train", "train_loss_step")
_LOSS = re.compile("loss", re.IGNORECASE)
_EVENTS = "events.out.tfevents.*"
_FEWEST_POINTS = 5  # of each curve over the steps that are compared: the mean of fewer says little

Curve = tuple[tuple[int, float], ...]  # step and loss, in order of the steps


@dataclass(frozen=True, slots=True)
class Losses:
    """Two runs' mean losses over the later half of the steps that both logged, under one tag; ``None`` where one was not finite."""

    tag: str
    first_step: int
    last_step: int
    own: float | None
    baseline: float | None

    def departure(self, tolerance: float) -> str:
        """Why they are not the same training; empty where they are, to within the tolerance (relative)."""
        if self.own is None or self.baseline is None:
            return f"not the same training: {self.tag} is not finite"
        if abs(self.own - self.baseline) <= tolerance * abs(self.baseline):
            return ""
        return (
            f"not the same training: {self.tag} {self.own:.4g} against {self.baseline:.4g}, the mean of steps "
            f"{self.first_step:,} to {self.last_step:,}, more than {100 * tolerance:g} % apart"
        )


def read_curves(folder: Path, *, since_unix_s: float = 0.0) -> dict[str, Curve]:
    """The scalars in a run's event files that are named like a loss, by tag; none that was logged before ``since_unix_s``.

    They are those of the run's own directory; where that has none, of the newest below it that has some and is of no other run: the
    Hugging Face Trainer logs to ``runs/…`` in its ``output_dir``.
    """
    below = {file.parent for file in folder.rglob(_EVENTS)} - {folder}
    own = [place for place in below if not any(run_files(above) for above in _up_to(place, folder))]
    for place in (folder, *sorted(own, key=_newest, reverse=True)):
        scalars = read_scalars(place, since_unix_s=since_unix_s)
        curves = {tag: curve for tag, curve in scalars.items() if _LOSS.search(tag) and not tag.startswith("green")}
        if curves:
            return curves
    return {}


def _up_to(place: Path, folder: Path) -> Iterator[Path]:
    """A directory and those that it lies in, up to one of them, which is left out."""
    return takewhile(lambda above: above != folder, (place, *place.parents))


def _newest(place: Path) -> str:
    """The name of a directory's newest event file, which begins with the second of its birth."""
    return max(file.name for file in place.glob(_EVENTS))


def compared(base: Mapping[str, Curve], own: Mapping[str, Curve]) -> Losses | str:
    """The likeliest training loss of both, or why there is none to compare."""
    shared = sorted(base.keys() & own.keys(), key=_likelihood)
    if not shared:
        return (
            "the runs hold no scalar that is named like a loss"
            if not base and not own
            else "they logged no loss under one name"
        )
    tag = shared[0]
    curves = (base[tag], own[tag])
    if not all(math.isfinite(loss) for curve in curves for _, loss in curve):
        last = max(curve[-1][0] for curve in curves)
        means = [_finite_mean(curve) for curve in curves]
        return Losses(tag, min(curve[0][0] for curve in curves), last, means[1], means[0])
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    middle = (first + last + 1) // 2
    later = [[loss for step, loss in curve if middle <= step <= last] for curve in curves]
    if min(map(len, later)) < _FEWEST_POINTS:
        return f"{tag} has fewer than {_FEWEST_POINTS} points in the later half of the steps that both logged"
    means = [math.fsum(part) / len(part) for part in later]
    return Losses(tag, middle, last, means[1], means[0])


def _likelihood(tag: str) -> tuple[int, bool, int, str]:
    """Sorts tags by how likely they are the training loss."""
    known = _NAMES.index(tag) if tag in _NAMES else len(_NAMES)
    return known, bool(re.search("val|test|eval", tag, re.IGNORECASE)), len(tag), tag


def _finite_mean(curve: Sequence[tuple[int, float]]) -> float | None:
    """The mean of a curve; ``None`` where it is not finite."""
    mean = math.fsum(loss for _, loss in curve) / len(curve) if all(math.isfinite(loss) for _, loss in curve) else math.nan
    return mean if math.isfinite(mean) else None
