"""Runs variants of one training side by side and compares them: ``compare(build, ["fp32", "bf16"])``.

One worker process a variant, alive through the comparison, one of them running at a time. Blocks of steps alternate in random order;
what is compared is pairs of neighbouring blocks (:mod:`green_torch.statistics`). Each worker is one ``green_torch.track()`` run whose
clock stands still while another has its turn. Torch is loaded in the workers only.

``variants`` what is asked, ``results`` what is found, ``rounds`` the parent process, ``worker`` the child: it applies a variant
(``applied``), sees what ran (``kernels``) and how hot it was (``conditions``). ``memory`` finds the largest batch that fits;
``lightning_step`` makes a workload of a ``LightningModule``.
"""

from green_torch.experiment.memory import largest_batch
from green_torch.experiment.results import (
    Block,
    Comparison,
    LargestBatch,
    Projection,
    Range,
    Saving,
    Trial,
    VariantResult,
    project,
)
from green_torch.experiment.rounds import Progress, compare
from green_torch.experiment.variants import Build, UserStep, Variant, Workload, parse_variant

__all__ = [
    "Block", "Build", "Comparison", "LargestBatch", "Progress", "Projection", "Range", "Saving", "Trial", "UserStep", "Variant",
    "VariantResult", "Workload", "compare", "largest_batch", "parse_variant", "project",
]  # fmt: skip
