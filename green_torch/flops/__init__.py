"""FLOPs of a step: counted live, or on a copy without memory, for any model and with no formula from the user."""

from green_torch.flops.by_module import FlopTable, ModuleFlops, count_by_module
from green_torch.flops.counter import COUNTS_COMPILED, LiveCounter
from green_torch.flops.once import count_flops
from green_torch.flops.watch import StepFlops, StepWork

__all__ = [
    "COUNTS_COMPILED",
    "FlopTable",
    "LiveCounter",
    "ModuleFlops",
    "StepFlops",
    "StepWork",
    "count_by_module",
    "count_flops",
]
