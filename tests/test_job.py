"""The sums over ranks: what is known adds up, bounds hold, utilisation is weighed by the peaks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from green_torch.job import combined, sharers
from green_torch.records import PerStep, RankTotals, TrainSums


def job(*ranks, age_s=None, world_size=None, ended=False, complete=False):
    return combined(ranks, age_s or {}, world_size or len(ranks), ended=ended, complete=complete)


def test_work_energy_and_grams_add_up():
    """Sums over ranks; a rank that knows nothing of something adds nothing to it."""
    both = job(
        RankTotals(rank=0, energy_j=10.0, emissions_g=1.0, tokens=5, model_flops=100.0, carried_energy_j=3.0),
        RankTotals(rank=1, energy_j=20.0, emissions_g=2.0, tokens=6, model_flops=100.0),
        RankTotals(rank=2),
    )
    assert (both.energy_j, both.emissions_g, both.tokens, both.model_flops, both.carried_energy_j) == (
        30.0,
        3.0,
        11,
        200.0,
        3.0,
    )


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 1e3), st.booleans()), min_size=1, max_size=9))
def test_the_sum_lies_within_its_bounds(ranks):
    """Ranks without bounds stand at face value; where none has any, the sum has none."""
    summed = job(
        *(
            RankTotals(
                rank=rank,
                energy_j=energy_j,
                energy_lo_j=energy_j - slack if bounded else None,
                energy_hi_j=energy_j + slack if bounded else None,
            )
            for rank, (energy_j, slack, bounded) in enumerate(ranks)
        )
    )
    assert summed.energy_j == pytest.approx(sum(energy_j for energy_j, _, _ in ranks))
    if not any(bounded for _, _, bounded in ranks):
        assert summed.energy_lo_j is None
    else:
        slack_j = sum(slack for _, slack, bounded in ranks if bounded)
        assert summed.energy_hi_j - summed.energy_lo_j == pytest.approx(2 * slack_j, abs=1e-3, rel=1e-6)
        assert summed.energy_lo_j <= summed.energy_j + 1e-3


def test_mfu_divides_by_the_sum_of_the_peaks():
    """A fast device weighs more; where one rank's is not known, the job's is not."""
    fast = RankTotals(rank=0, peak_flop_per_s=3e12, mfu=0.4, hfu=0.5)
    slow = RankTotals(rank=1, peak_flop_per_s=1e12, mfu=0.8)
    assert job(fast, slow).mfu == pytest.approx((3 * 0.4 + 0.8) / 4)
    assert job(fast, slow).peak_flop_per_s == 4e12
    assert job(fast, slow).hfu is None
    assert job(fast, RankTotals(rank=1)).mfu is None


def test_the_straggler_is_named():
    """Energy and step time per rank, with the ranks at both ends."""
    times = {0: 0.2, 1: 0.5, 2: 0.3}
    spread = job(*(RankTotals(rank=rank, step_time_s=time_s) for rank, time_s in times.items()), ended=True).rank_step_time_s
    assert (spread.min, spread.median, spread.max, spread.min_rank, spread.max_rank) == (0.2, 0.3, 0.5, 0, 1)


def test_missing_and_late_ranks_are_told():
    """Who was never heard of; the oldest word among those that still run."""
    late = job(
        RankTotals(rank=0), RankTotals(rank=2), RankTotals(rank=3, status="completed"), age_s={2: 7.0, 3: 99.0}, world_size=5
    )
    assert (late.reporting, late.ended, late.silent) == (3, 1, (1, 4))
    assert (late.oldest_rank, late.oldest_age_s) == (2, 7.0)


def test_a_gpu_of_two_ranks_is_counted_once():
    """A rank that meters nothing but what lower ones do adds its work, and no joule or gram."""
    step = PerStep(energy_j=10.0, tokens=2.0, power_w=100.0)
    zero = RankTotals(rank=0, energy_j=100.0, emissions_g=1.0, tokens=5, per_step=step, devices=("GPU-a",))
    one = RankTotals(rank=1, energy_j=99.0, emissions_g=1.0, tokens=5, per_step=step, devices=("GPU-a",))
    both = job(zero, one)
    assert (both.energy_j, both.emissions_g, both.tokens, both.sharing) == (100.0, 1.0, 10, (1,))
    assert (both.per_step.energy_j, both.per_step.tokens, both.per_step.power_w) == (10.0, 4.0, 100.0)
    apart = job(zero, replace(one, devices=("GPU-b",)))
    assert (apart.energy_j, apart.sharing) == (199.0, ())
    assert sharers({0: (), 1: ("a",), 2: ("a",), 3: ("b", "a"), 4: ("b",), 5: ()}) == (2, 4)


def test_a_step_of_the_job_waits_for_all_ranks():
    """Per-step sums would leap where ranks come in one by one: none till all are there, or till they are waited for no longer."""
    zero = RankTotals(rank=0, last_step=4, per_step=PerStep(energy_j=10.0, tokens=2.0, power_w=100.0))
    one = RankTotals(rank=1, last_step=4, per_step=PerStep(energy_j=30.0, tokens=2.0, power_w=300.0))
    assert job(zero, world_size=2).per_step is None
    assert job(zero, world_size=2, complete=True).per_step.energy_j == 10.0
    step = job(zero, one).per_step
    assert (step.energy_j, step.tokens, step.power_w) == (40.0, 4.0, 400.0)
    ended = RankTotals(rank=1, last_step=2, status="completed", per_step=one.per_step)
    assert job(zero, ended).per_step.energy_j == 10.0
    unit = RankTotals(rank=1, last_step=4, per_step=PerStep(energy_j=30.0))
    assert job(zero, unit).per_step.tokens is None
    silent = RankTotals(rank=1, last_step=4)  # it has told its totals, and no step yet
    assert job(zero, silent).per_step is None
    assert job(zero, silent, complete=True).per_step.energy_j == 10.0
    assert job(zero, RankTotals(rank=1, status="failed")).per_step.energy_j == 10.0


def test_a_rank_without_joules_makes_no_step_cheap():
    """Where one rank's device can't be read, a step's joules and grams are not known, nor is who pays for its tokens; its name is told."""
    step = PerStep(energy_j=10.0, emissions_g=1.0, tokens=100.0, power_w=100.0)
    zero = RankTotals(rank=0, last_step=4, energy_j=100.0, tokens=400, per_step=step, devices=("GPU-a",), accelerator_j=100.0)
    one = RankTotals(rank=1, last_step=4, tokens=400, per_step=PerStep(tokens=100.0))
    both = job(zero, one)
    assert (both.energy_j, both.tokens, both.unmetered) == (100.0, 800, (1,))
    assert (both.per_step.energy_j, both.per_step.emissions_g, both.per_step.power_w) == (None, None, None)
    assert both.per_step.tokens == 200.0
    spared = job(replace(zero, devices=(), accelerator_j=0.0, node="n"), replace(one, node="n"))  # rank zero meters the node
    assert (spared.per_step.energy_j, spared.unmetered) == (10.0, ())
    assert job(zero, replace(one, last_step=None, per_step=None)).unmetered == ()


def test_a_nodes_cpu_makes_no_straggler():
    """Ranks are compared by their accelerators alone where each meters some; where one has none, by all that each meters."""
    zero = RankTotals(rank=0, energy_j=150.0, accelerator_j=100.0)
    one = RankTotals(rank=1, energy_j=110.0, accelerator_j=110.0)
    spread = job(zero, one)
    assert (spread.rank_energy_j.max, spread.rank_energy_j.max_rank, spread.accelerators_alone) == (110.0, 1, True)
    spread = job(zero, replace(one, accelerator_j=None))
    assert (spread.rank_energy_j.max, spread.rank_energy_j.max_rank, spread.accelerators_alone) == (150.0, 0, False)


def test_a_job_is_projected_where_every_rank_is():
    """Grams and joules of the planned steps: unknown while a rank is silent or does not know its own; sharers add none."""
    zero = RankTotals(rank=0, projected_total_g=10.0, projected_energy_j=100.0, devices=("GPU-a",))
    one = RankTotals(rank=1, projected_total_g=20.0, projected_energy_j=200.0, devices=("GPU-b",))
    both = job(zero, one)
    assert (both.projected_total_g, both.projected_energy_j) == (30.0, 300.0)
    assert job(zero, world_size=2, complete=True).projected_total_g is None
    part = job(zero, replace(one, projected_energy_j=None))
    assert (part.projected_total_g, part.projected_energy_j) == (30.0, None)
    assert job(zero, replace(one, devices=("GPU-a",))).projected_energy_j == 100.0


def test_ranks_of_a_job_on_cpus_need_no_joules_of_their_own():
    """Without accelerators one rank meters each node: the others' work counts, and nothing is unknown by them."""
    zero = RankTotals(
        rank=0, node="a", energy_j=9.0, projected_energy_j=90.0, train=TrainSums(n_steps=4, energy_j=8.0, tokens=4.0)
    )
    one = RankTotals(rank=1, node="a", train=TrainSums(n_steps=4, tokens=4.0))
    both = job(zero, one)
    assert (both.projected_energy_j, both.train.energy_j, both.train.tokens) == (90.0, 8.0, 8.0)
    for unknown in (job(zero, replace(one, node="b")), job(replace(zero, accelerator_j=5.0), one)):
        assert (unknown.projected_energy_j, unknown.train.energy_j) == (None, None)


def test_a_jobs_train_steps_are_all_ranks_together():
    """Joules and units add up, steps don't; joules without bounds stand at face value; unknown where a rank's are."""
    zero = RankTotals(rank=0, train=TrainSums(n_steps=4, energy_j=40.0, energy_lo_j=30.0, energy_hi_j=50.0, tokens=8.0))
    one = RankTotals(rank=1, train=TrainSums(n_steps=4, energy_j=20.0, tokens=8.0, samples=4.0))
    assert job(zero, one).train == TrainSums(n_steps=4, energy_j=60.0, energy_lo_j=50.0, energy_hi_j=70.0, tokens=16.0)
    assert job(zero, RankTotals(rank=1)).train is None
    assert job(zero, world_size=2, complete=True).train is None
    shared = job(replace(zero, devices=("GPU-a",)), replace(one, devices=("GPU-a",))).train
    assert (shared.energy_j, shared.energy_hi_j, shared.tokens) == (40.0, 50.0, 16.0)
