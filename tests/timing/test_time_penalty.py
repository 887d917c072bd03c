"""A little more loss for less time, never more than that, and never beyond the budget."""

import pytest

from tdecomp import Budget
from tdecomp.layers.cost import Cost
from tdecomp.ranks.base import NOTHING, Candidate, Option
from tdecomp.timing.choose import choose_with_time_penalty


def layer(name, options):
    """A layer of 100 MACs that takes a second, with options (macs, seconds, loss)."""
    listed = tuple(
        Option(rank, Cost(1, macs, seconds), loss, loss)
        for rank, (macs, seconds, loss) in enumerate(options, 1)
    )
    return [
        Candidate(
            name,
            "a",
            len(listed),
            Cost(100, 100, 1.0),
            lambda rank: listed[rank - 1].cost,
            lambda: None,
            lambda: listed,
            rounded=True,
        )
    ]


def ranks(choices):
    return [choice.rank for choice in choices]


def test_of_two_that_lose_about_the_same_the_faster():
    sites = [layer("a", [(50, 0.9, 1.0), (50, 0.3, 1.1)])]
    assert ranks(Budget(macs=0.5).select(sites, NOTHING)) == [1]
    (chosen,) = choose_with_time_penalty(Budget(macs=0.5), sites, NOTHING)
    assert chosen.rank == 2
    assert chosen.loss == pytest.approx(1.1)


def test_not_of_two_that_lose_much_more():
    sites = [layer("a", [(50, 0.9, 1.0), (50, 0.3, 2.0)])]
    assert ranks(choose_with_time_penalty(Budget(macs=0.5), sites, NOTHING)) == [1]


def test_the_budget_stays_met():
    sites = [layer(name, [(40, 0.8, 1.0), (60, 0.1, 1.01)]) for name in "ab"]
    choices = choose_with_time_penalty(Budget(macs=0.5), sites, NOTHING)
    spent = sum(c.candidate.cost(c.rank).macs if c.candidate else 100 for c in choices)
    assert spent <= 100
