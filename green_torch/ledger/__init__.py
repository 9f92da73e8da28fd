"""Runs on disk: what each used, how it ended, and what of it was wasted. :func:`read` makes a :class:`Ledger` of directories."""

from __future__ import annotations

from green_torch.ledger.groups import FailedShare, Group, basis, failed_share, group, grouped, period
from green_torch.ledger.reading import Detail, detail, read
from green_torch.ledger.runs import Ledger, Run, Segment, Skipped, Status

__all__ = [
    "Detail",
    "FailedShare",
    "Group",
    "Ledger",
    "Run",
    "Segment",
    "Skipped",
    "Status",
    "basis",
    "detail",
    "failed_share",
    "group",
    "grouped",
    "period",
    "read",
]
