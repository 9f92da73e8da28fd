"""Is BF16 worth it here, in joules? Two variants of your own training, block by block in turn, with intervals.

Seconds on a CPU, no download. The model knows nothing of the variants: the library applies them::

    python examples/compare_precision.py --json comparison.json
    python examples/plot_comparison.py comparison.json comparison.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from green_torch.experiment import Comparison, Variant, Workload, compare

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

WIDTH, BATCH, CLASSES = 256, 128, 10


def build(variant: Variant) -> Workload:
    """What is trained, made anew in each variant's own process: model, optimizer, loss, data, and what a batch holds."""
    del (
        variant
    )  # the library applies precision, attention kernel, checkpointing and compile; use it for what only you can change
    teacher = torch.randn(WIDTH, CLASSES, generator=torch.Generator().manual_seed(0))

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-3)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        inputs, targets = batch
        return functional.cross_entropy(model(inputs).float(), targets)

    def batches(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            inputs = torch.randn(BATCH, WIDTH, generator=generator)
            yield inputs, (inputs @ teacher).argmax(dim=1)

    model = nn.Sequential(nn.Linear(WIDTH, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, CLASSES))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return Workload(model, optimizer, loss, batches, lambda batch: {"samples": len(batch[0])})


def training(found: Comparison) -> str:
    """Whether both were the same training, as far as their losses tell."""
    if not found.losses_compared("bf16"):
        return found.departure("bf16") or "losses were not compared"
    return found.departure("bf16") or f"losses agree within {found.loss_tolerance:.0%}"


def main() -> None:
    """Compares, and says what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="for all blocks together")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--json", type=Path, help="where everything that was found goes")
    args = parser.parse_args()

    found = compare(build, ["fp32", "bf16"], blocks=args.blocks, budget_s=args.seconds, region="FR")

    for result in found.results:
        if result.error or result.step_time_s is None:
            print(f"{result.name}: {result.error or 'nothing was measured'}")
            continue
        energy = (
            "energy not known" if result.energy_per_sample_j is None else f"{1e3 * result.energy_per_sample_j:.3f} mJ a sample"
        )
        known = ", ".join(f"{name} {method}" for name, method in result.methods.items()) or "no meter"
        print(f"{result.name}: {1e3 * result.step_time_s:.2f} ms a step, {energy} ({known}), loss {result.final_loss:.3f}")
    for what, difference in (("time", found.time("bf16")), ("energy", found.energy("bf16"))):
        if what == "energy" and found.headline == "time":
            print("energy follows from time: power was modelled")
        elif difference is None or difference.lo is None or difference.hi is None:
            print(f"{what}: no interval")
        elif not difference.distinguishable:
            print(f"{what}: {difference.note} ({difference.lo:+.1%} to {difference.hi:+.1%})")
        else:
            print(f"{what}: {difference.estimate:+.1%} ({difference.lo:+.1%} to {difference.hi:+.1%})")
    print(training(found))
    if args.json:
        args.json.write_text(json.dumps(found.to_dict(), indent=1))


if __name__ == "__main__":  # the workers import this file: without this line each would start a comparison of its own
    main()
