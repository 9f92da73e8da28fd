"""Carbon-aware scheduling: when a job had best run, in one piece or several, and what waiting is worth against starting now.

::

    from green_torch.schedule import outlook, plan
    ahead = outlook(UKNeso(), now_ns, now_ns + 24 * 3600 * 10**9)
    plan(ahead.points, duration=8 * 3600, deadline=24 * 3600, method=ahead.method)
"""

from __future__ import annotations

from green_torch.schedule.outlook import LAST_WEEK, THRESHOLD, YESTERDAY, Outlook, Threshold, outlook, repeated, threshold
from green_torch.schedule.planning import FORECAST, RESUME_OVERHEAD_S, Interval, Plan, plan, plan_regions

__all__ = [
    "FORECAST",
    "LAST_WEEK",
    "RESUME_OVERHEAD_S",
    "THRESHOLD",
    "YESTERDAY",
    "Interval",
    "Outlook",
    "Plan",
    "Threshold",
    "outlook",
    "plan",
    "plan_regions",
    "repeated",
    "threshold",
]
