"""When to run so much work for the least carbon: exact minima over a piecewise constant intensity. Pure; needs numpy.

In one piece, the cost of starting at s is piecewise linear in s, so a best start lies where the window's start or end meets a knot.

In several pieces, time is cut into slots and a dynamic programme runs backwards over them. Its state is how many slots of work are left
and whether the work is under way. Useful work is done in whole slots; a resume's overhead is spent just before the first slot of its
piece, in the gap, so it needs no slots of its own and any length is exact. The programme is vectorised over the work that is left and
over grids: slots × work × grids elementary steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from green_torch.schedule.series import Series

    Floats = NDArray[np.float64]

_CELLS = 15_000_000  # slots × work × grids of one programme: half a second and 30 MB
_SLOTS_S = (60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0)
_EPSILON_S = 1e-6


def one_piece(grid: Series, duration_s: float, earliest_s: float, latest_s: float, *, idle: float = 0.0) -> float:
    """The start between two instants of the window with the least carbon; of several, the first.

    ``idle`` is the draw before it, from 0 s on, as a share of that at work.
    """
    ends = grid.knots_s - duration_s
    starts = np.concatenate([[earliest_s, latest_s], grid.knots_s, ends])
    starts = np.unique(starts[(starts >= earliest_s) & (starts <= latest_s)])
    costs = grid.upto(starts + duration_s) - (1 - idle) * grid.upto(starts)
    return float(starts[_first_least(costs)])


def _first_least(costs: Floats) -> int:
    least = costs.min()
    return int(np.argmax(costs <= least + 1e-9 * max(abs(float(least)), 1e-9)))


def slot_s(duration_s: float, span_s: float, n_grids: int, most_s: float | None = None) -> float:
    """The length of a slot: the work is a whole number of them, each as long as told or else as short as the programme can afford."""
    for about_s in _SLOTS_S if most_s is None else (most_s,):
        n_work = math.ceil(duration_s / about_s - _EPSILON_S)
        length_s = duration_s / n_work
        if span_s / length_s * (n_work + 1) * n_grids <= _CELLS:
            break
    return length_s


def pieces(
    grids: Sequence[Series],
    duration_s: float,
    ends_s: Sequence[float],
    *,
    slot_s: float,
    overhead_s: float = 0.0,
    apart_s: float = 0.0,
    idle: float = 0.0,
    running: bool = False,
) -> list[tuple[tuple[int, int], ...]]:
    """The cheapest slots to work in, for each grid: runs of slots, as (first, last + 1), slot 0 beginning at 0 s.

    Args:
        grids: intensity, known up to ``ends_s`` at least.
        duration_s: useful work, in seconds; a whole number of slots.
        ends_s: by when the work must be done, for each grid.
        slot_s: length of a slot.
        overhead_s: extra work of each resume, spent before its first slot.
        apart_s: the least time between the end of a piece and the beginning of the next one's overhead.
        idle: draw in the gaps between pieces, as a share of that at work.
        running: the work is under way at 0 s, so a first slot later than 0 is a resume.
    """
    n_work = round(duration_s / slot_s)
    counts = [int((end_s + _EPSILON_S) / slot_s) for end_s in ends_s]
    n_slots, n_grids = max(counts), len(grids)
    gap = max(1, math.ceil((overhead_s + apart_s) / slot_s - _EPSILON_S))
    edges = np.arange(n_slots + gap + 1) * slot_s
    sums = np.stack([grid.upto(edges) for grid in grids])
    cost = np.diff(sums, axis=1)  # of a slot at work
    before = np.stack([grid.upto(edges) - grid.upto(np.maximum(edges - overhead_s, 0.0)) for grid in grids])
    resume = before * (1 - idle)  # beyond the gap's idling, which goes on in it
    beyond = np.array(counts)
    # up[g, w]: least cost to do w more slots of work from here, if it is under way; down[g, w]: if it may be resumed here at the earliest.
    up = np.full((n_grids, n_work + 1), np.inf)
    up[:, 0] = 0.0
    downs = np.full((gap + 1, n_grids, n_work + 1), np.inf)  # a ring: slot i at i % (gap + 1)
    stops = np.zeros((n_slots, n_grids, n_work + 1), dtype=bool)
    waits = np.zeros((n_slots, n_grids, n_work + 1), dtype=bool)
    starts = np.full((n_slots, n_grids), np.inf)  # all the work, first begun in this slot
    work, wait, stop = (np.full((n_grids, n_work + 1), np.inf) for _ in range(3))
    tie = 1e-12 * float(sums.max())  # more than sums round: of equals, working on
    gap_cost = idle * (sums[:, gap:] - sums[:, : sums.shape[1] - gap])
    for at in range(n_slots - 1, -1, -1):
        work[:, 1:] = up[:, :-1] + cost[:, at, None]
        work[at >= beyond] = np.inf
        down, later = downs[at % (gap + 1)], downs[(at + 1) % (gap + 1)]
        np.add(downs[(at + gap) % (gap + 1)], gap_cost[:, at, None], out=stop)
        np.add(later, idle * cost[:, at, None], out=wait)
        np.add(work, resume[:, at, None], out=down)
        np.less(wait + tie, down, out=waits[at])
        np.minimum(wait, down, out=down)
        np.less(stop + tie, work, out=stops[at])
        np.minimum(stop, work, out=up)
        up[:, 0] = 0.0
        starts[at] = work[:, n_work]
    return [
        _path(
            n_work,
            gap,
            stops[:, grid],
            waits[:, grid],
            first=0 if running else _first_least(starts[:, grid]),
            running=running,
        )
        for grid in range(n_grids)
    ]


def _path(
    n_work: int, gap: int, stops: NDArray[np.bool_], waits: NDArray[np.bool_], *, first: int, running: bool
) -> tuple[tuple[int, int], ...]:
    """Follows the programme's choices forward, from the slot of the first work."""
    found: list[tuple[int, int]] = []
    at, left, chosen = first, n_work, not running  # chosen: this slot is worked in
    while left:
        if chosen or not stops[at, left]:
            at, left, chosen = at + 1, left - 1, False
            continue
        if at > first:
            found.append((first, at))
        at += gap
        while waits[at, left]:
            at += 1
        first, chosen = at, True
    return (*found, (first, at))
