"""Runs variants of one training side by side and compares them: ``compare(build, ["fp32", "bf16"])``.

One worker process a variant, alive through the comparison, one of them running at a time. Blocks of steps alternate in random order;
what is compared is pairs of neighbouring blocks (:mod:`green_torch.statistics`). Each worker is one ``green_torch.track()`` run whose
clock stands still while another has its turn. Torch is loaded in the workers only.

``variants`` what is asked, ``results`` what is found, ``rounds`` the parent process, ``worker`` the child.
"""

from green_torch.experiment.results import Block, Comparison, Projection, Range, Saving, VariantResult, project
from green_torch.experiment.rounds import Progress, compare
from green_torch.experiment.variants import Build, Variant, Workload, parse_variant

__all__ = [
    "Block", "Build", "Comparison", "Progress", "Projection", "Range", "Saving", "Variant", "VariantResult", "Workload", "compare",
    "parse_variant", "project",
]  # fmt: skip
