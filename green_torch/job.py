"""One job out of what its ranks tell of themselves: sums, utilisation of all devices together, and who lags. Pure."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import reduce
from statistics import median
from typing import TYPE_CHECKING, Any

from green_torch.records import JobTotals, PerStep, Spread, Sums
from green_torch.totals import known_sum, of_all_ranks, of_node, whole_sum

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from green_torch.records import Manifest, RankTotals

_SUMS = tuple(field.name for field in fields(Sums))
_OF_DEVICES = tuple(name for name in _SUMS if name not in {"samples", "tokens", "model_flops", "hardware_flops"})
_OF_ALL = ("projected_total_g", "projected_energy_j")  # known where every rank knows its own


def combined(
    ranks: Sequence[RankTotals], age_s: Mapping[int, float], world_size: int, *, ended: bool, complete: bool
) -> JobTotals:
    """The job as far as its ranks have told; at least one must have.

    Args:
        ranks: each rank's last word.
        age_s: how long ago it last told anything new, in seconds, by rank.
        world_size: ranks of the job.
        ended: means over the run are wanted, not what a step takes just now.
        complete: whether the ranks that are missing must be waited for no longer.
    """
    sharing = sharers({one.rank: one.devices for one in ranks})
    accelerators = {one.rank: one.accelerator_j for one in ranks}
    others = {*sharing}  # whose joules another one tells
    if not any(accelerators.values()):
        others |= spared({one.rank: (one.node, one.energy_j is not None) for one in ranks})
    counted = [_work_alone(one) if one.rank in others else one for one in ranks]
    running = {one.rank: age_s.get(one.rank, 0.0) for one in ranks if one.status == "running"}
    oldest = max(running, key=lambda rank: running[rank], default=None)
    heard = {one.rank for one in ranks}
    alone = None not in accelerators.values()  # a node's CPU, which one rank meters for all, makes no straggler of that one
    energy = accelerators if alone else {one.rank: one.energy_j for one in ranks}
    whole = len(ranks) == world_size
    times = {one.rank: one.step_time_s if ended or one.per_step is None else one.per_step.duration_s for one in ranks}
    peak, mfu, hfu = _utilization([(one.peak_flop_per_s, one.mfu, one.hfu) for one in ranks])
    return JobTotals(
        world_size=world_size,
        reporting=len(ranks),
        ended=len(ranks) - len(running),
        silent=tuple(rank for rank in range(world_size) if rank not in heard),
        oldest_rank=oldest,
        oldest_age_s=running[oldest] if oldest is not None else 0.0,
        peak_flop_per_s=peak,
        mfu=mfu,
        hfu=hfu,
        rank_energy_j=_spread(energy),
        accelerators_alone=alone,
        rank_step_time_s=_spread(times),
        sharing=sharing,
        unmetered=tuple(
            one.rank for one in ranks if one.rank not in others and one.last_step is not None and one.energy_j is None
        ),
        per_step=_per_step(counted, others) if complete or all_at_it(ranks, world_size) else None,
        train=of_all_ranks([one.train for one in counted]) if whole else None,
        **_summed(counted),
        **_projected([one for one in counted if one.rank not in others] if whole else []),
    )


def sharers(devices: Mapping[int, Collection[str]]) -> tuple[int, ...]:
    """The ranks, in order, that meter nothing but what lower ones do; by the UUIDs of what each meters."""
    seen: set[str] = set()
    found = []
    for rank in sorted(devices):
        if devices[rank] and seen.issuperset(devices[rank]):
            found.append(rank)
        seen.update(devices[rank])
    return tuple(found)


def spared(metered: Mapping[int, tuple[str, bool]]) -> set[int]:
    """The ranks of a job without accelerators that meter nothing, for another one meters their node; by node, and whether it has joules."""
    nodes = {node for node, known in metered.values() if known}
    return {rank for rank, (node, known) in metered.items() if not known and node in nodes}


def told_by_another(manifests: Sequence[Manifest]) -> set[int]:
    """The ranks whose joules another one tells, by their manifests: they share its device, or it alone meters their node."""
    others = {*sharers({one.rank: one.devices for one in manifests})}
    if all(of_node(domain.name) for one in manifests for domain in one.domains):
        others |= spared({one.rank: (one.job.get("node", ""), bool(one.domains)) for one in manifests})
    return others


def _work_alone(one: RankTotals) -> RankTotals:
    step = one.per_step and replace(one.per_step, energy_j=None, emissions_g=None, power_w=None)
    train = one.train and one.train.work_alone
    nothing: dict[str, Any] = dict.fromkeys(_OF_DEVICES)
    return replace(one, per_step=step, train=train, **nothing)


def all_at_it(ranks: Sequence[RankTotals], world_size: int) -> bool:
    """Whether every rank has told what its steps take, or that it has ended: till then a step's sum would be without some."""
    return len(ranks) == world_size and all(one.per_step is not None or one.status != "running" for one in ranks)


def _summed(ranks: Sequence[RankTotals]) -> dict[str, Any]:
    """The sums; ranks without bounds stand at face value beside bounded ones."""
    sums = {name: _known([getattr(one, name) for one in ranks]) for name in _SUMS if name not in _OF_ALL}
    if sums["energy_lo_j"] is not None:
        sums["energy_lo_j"] = _known([one.energy_j if one.energy_lo_j is None else one.energy_lo_j for one in ranks])
        sums["energy_hi_j"] = _known([one.energy_j if one.energy_hi_j is None else one.energy_hi_j for one in ranks])
    return sums


def _projected(ranks: Sequence[RankTotals]) -> dict[str, Any]:
    """What the planned steps come to: unknown where one rank's share of it is."""
    return {name: whole_sum(getattr(one, name) for one in ranks) for name in _OF_ALL}


def _per_step(ranks: Sequence[RankTotals], others: Collection[int]) -> PerStep | None:
    """Sums over the ranks that are still at it: one that ended with fewer steps adds nothing to those that follow.

    Joules, grams and watts are ``None`` where one of these ranks doesn't know its own, unless it is of ``others``, whose joules another
    one tells: part of them beside everybody's tokens would make the tokens cheap.
    """
    last_step = max((one.last_step for one in ranks if one.last_step is not None), default=0)
    steps = [
        (one.rank, one.per_step)
        for one in ranks
        if one.per_step is not None and (one.status == "running" or one.last_step is None or one.last_step >= last_step)
    ]
    if not steps:
        return None
    peak, mfu, hfu = _utilization([(one.peak_flop_per_s, one.mfu, one.hfu) for _, one in steps])
    metered = [one for rank, one in steps if rank not in others]
    return PerStep(
        energy_j=whole_sum(one.energy_j for one in metered),
        emissions_g=whole_sum(one.emissions_g for one in metered),
        power_w=whole_sum(one.power_w for one in metered),
        samples=whole_sum(one.samples for _, one in steps),
        tokens=whole_sum(one.tokens for _, one in steps),
        peak_flop_per_s=peak,
        mfu=mfu,
        hfu=hfu,
    )


def _utilization(
    parts: Sequence[tuple[float | None, float | None, float | None]],
) -> tuple[float | None, float | None, float | None]:
    """The sum of the peaks, and MFU and HFU of all devices together; ``None`` where one of them is not known."""
    peaks = [peak for peak, _, _ in parts if peak is not None]
    if len(peaks) < len(parts) or not peaks:
        return None, None, None
    total = sum(peaks)

    def of_all(used: list[float | None]) -> float | None:
        known = [value * peak for value, peak in zip(used, peaks, strict=True) if value is not None]
        return sum(known) / total if len(known) == len(peaks) else None

    return total, of_all([mfu for _, mfu, _ in parts]), of_all([hfu for _, _, hfu in parts])


def _known(values: Sequence[float | None]) -> float | None:
    return reduce(known_sum, values, None)


def _spread(values: Mapping[int, float | None]) -> Spread | None:
    known = {rank: value for rank, value in values.items() if value is not None}
    if len(known) < 2:
        return None
    low, high = min(known, key=lambda rank: known[rank]), max(known, key=lambda rank: known[rank])
    return Spread(known[low], median(known.values()), known[high], low, high)
