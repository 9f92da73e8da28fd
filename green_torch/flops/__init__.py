"""FLOPs of a step: counted live, or on a copy without memory, for any model and with no formula from the user."""

from green_torch.flops.counter import COUNTS_COMPILED, LiveCounter
from green_torch.flops.once import count_flops
from green_torch.flops.watch import StepFlops, StepWork

__all__ = ["COUNTS_COMPILED", "LiveCounter", "StepFlops", "StepWork", "count_flops"]
