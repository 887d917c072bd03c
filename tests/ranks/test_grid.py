"""The ranks that are looked at: few, affordable, and multiples where that is asked for."""

import pytest

from tdecomp.layers.cost import Cost
from tdecomp.ranks.grid import Rounding, last, rank_steps


def test_last_is_the_end_of_those_that_fit():
    for low, high in ((0, 9), (3, 9), (5, 5)):
        for most in range(-1, 12):
            assert last(low, high, lambda n, most=most: n <= most) == min(max(low, most), high)


@pytest.mark.parametrize("largest", [100, (24, 60)])
@pytest.mark.parametrize("rounding", [Rounding(), Rounding(8), Rounding(8, forced=True)])
def test_steps_are_affordable_ascending_and_rounded(largest, rounding):
    def cost(rank):
        return Cost(sum(rank) if isinstance(rank, tuple) else rank)

    whole = cost(largest).params
    steps = rank_steps(largest, cost, 0.8 * whole, 0.1, 12, rounding)
    costs = [cost(rank).params for rank in steps]
    assert 3 <= len(steps) <= 12
    assert costs == sorted(costs)
    assert 0.6 * whole < costs[-1] <= 0.8 * whole
    assert len(set(steps)) == len(steps)
    for rank in steps:
        assert rounding.nearest(rank, largest) == rank
        if isinstance(rank, tuple):
            assert all(r % rounding.of(most) == 0 for r, most in zip(rank, largest, strict=True))


def test_nothing_is_affordable():
    assert rank_steps(100, Cost, 0.5, 0.0, 12) == []
    assert rank_steps((4, 4), lambda rank: Cost(sum(rank)), 1.0, 0.0, 12) == []


def test_a_multiple_is_halved_where_it_leaves_few_ranks_unless_it_is_forced():
    assert [Rounding(16).of(n) for n in (3, 10, 40, 64)] == [1, 2, 8, 16]
    assert [Rounding(16, forced=True).of(n) for n in (3, 10, 40)] == [3, 10, 16]
    assert Rounding(16, forced=True).nearest(40, 100) in (32, 48)
    assert Rounding(16, forced=True).nearest((1, 70), (8, 64)) == (8, 64)
