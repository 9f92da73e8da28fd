"""One of two ranks on CPUs that train one model in each way of sharing it out, for test_flop_watch.py; ``main([])``.

Prints a line of JSON for each way: what the manifest says of the model, the FLOPs that ``track()`` counts, and those of a step counted live.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import green_torch
from green_torch.flops import LiveCounter
from green_torch.surroundings import described, dtype_name
from green_torch.testing import MemorySink

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 2


class Block(nn.Module):
    """Of odd sizes, so that no shard holds whole rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(15, 33), nn.Linear(33, 15)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Tied(nn.Module):
    """Its embedding is its head too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(31, 15)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(15, 31, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def fsdp1(**options: Any) -> nn.Module:
    """In one flat parameter, or by blocks."""
    return FullyShardedDataParallel(Tied(), device_id=torch.device("cpu"), **options)


def checkpointed() -> nn.Module:
    """By blocks, each under a checkpoint."""
    model = fsdp1(use_orig_params=True, auto_wrap_policy=BY_BLOCKS)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    return model


def fsdp2(dtype: torch.dtype | None = None) -> nn.Module:
    """By blocks."""
    model, mesh, policy = Tied(), init_device_mesh("cpu", (2,)), MixedPrecisionPolicy(param_dtype=dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


BY_BLOCKS = ModuleWrapPolicy({Block})
WAYS: dict[str, Callable[[], nn.Module]] = {
    "alone": Tied,
    "DDP": lambda: nn.parallel.DistributedDataParallel(Tied()),
    "FSDP1": fsdp1,
    "FSDP1 by blocks": lambda: fsdp1(auto_wrap_policy=BY_BLOCKS),
    "FSDP1 original": lambda: fsdp1(use_orig_params=True),
    "FSDP1 original by blocks": lambda: fsdp1(use_orig_params=True, auto_wrap_policy=BY_BLOCKS),
    "FSDP1 bfloat16": lambda: fsdp1(
        use_orig_params=True, auto_wrap_policy=BY_BLOCKS, mixed_precision=MixedPrecision(param_dtype=torch.bfloat16)
    ),
    "FSDP1 checkpointed": checkpointed,
    "FSDP2": fsdp2,
    "FSDP2 bfloat16": lambda: fsdp2(torch.bfloat16),
}


def trained(way: str) -> dict[str, Any]:
    """What is told of a model, and counted."""
    model, sink = WAYS[way](), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        model(torch.randint(31, (3, 5))).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    with green_torch.track(model, sinks=[sink], meters=[], intensity=1.0, peak_flop_per_s=1e15, log_every_n_steps=1) as tracker:
        for _ in range(STEPS):
            step()
            tracker.step()
    with LiveCounter() as counter:
        step()
    live = counter.count()
    return {
        "model": sink.manifest.model,
        "compiled": described(torch.compile(model))["model"],
        "parameters": sink.manifest.parameters,
        "flops": [record.model_flops for record in sink.records if record.phase == "train"],
        "hardware": [record.hardware_flops for record in sink.records if record.phase == "train"],
        "peaks": sorted(peak.dtype for peak in sink.manifest.peaks),
        "live": live.model_flops,
        "live_hardware": live.hardware_flops,
        "dtypes": sorted(live.flops_by_dtype),
        "dtype": dtype_name(model),
        "warnings": [text for text in tracker.summary().warnings if "FLOP" in text],
        "inside": described(model.module)["parameters"] if way.startswith("FSDP1") else None,
    }


def main(_options: list[str]) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    for way in WAYS if hasattr(torch.Stream, "record_event") else [way for way in WAYS if "FSDP2" not in way]:
        sys.stdout.write(json.dumps({"way": way, **trained(way)}) + "\n")
    sys.stdout.flush()
    dist.destroy_process_group()
