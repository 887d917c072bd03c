"""The search for one choice for each layer, against every way there is to choose."""

import itertools

import numpy as np
import pytest

from tdecomp.ranks.knapsack import Choices, least_cost, least_costs, least_loss, spend_rest, spent


def layers(count=4, options=5, budgets=2, seed=0):
    """Layers whose choices cost more the less they lose."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        costs = np.sort(rng.integers(1, 10_000, (options, budgets)), axis=0)
        losses = np.sort(rng.uniform(0, 10, options))[::-1].copy()
        found.append(Choices(costs, losses))
    return found


def every_way(given, limits):
    """The losses and costs of all choices within the limits."""
    for picks in itertools.product(*(range(len(layer.losses)) for layer in given)):
        costs = spent(given, picks)[: len(limits)]
        if np.all(costs <= limits):
            yield sum(layer.losses[p] for layer, p in zip(given, picks, strict=True)), costs


def lost(given, picks):
    return sum(layer.losses[pick] for layer, pick in zip(given, picks, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_one_budget_is_exact_up_to_its_levels(seed):
    given = layers(seed=seed)
    least = least_costs(given, np.zeros(1, np.int64))[0]
    for limit in (least, int(1.3 * least), 2 * least, 10 * least):
        limits = np.array([limit])
        picks = least_loss(given, limits)
        assert spent(given, picks)[0] <= limit
        # Rounding up to one of 8,192 levels may waste one level for each layer.
        nearly = np.array([limit - len(given) * max(limit - least, 0) // 8192 - 1])
        ways = [loss for loss, _ in every_way(given, nearly)]
        assert lost(given, picks) <= min(ways, default=np.inf)


def test_other_losses_may_be_minimised():
    given = layers()
    reversed_losses = [-layer.losses for layer in given]
    picks = least_loss(given, np.array([100_000]), reversed_losses)
    assert picks == [int(np.argmax(layer.losses)) for layer in given]


def test_two_budgets_are_both_met():
    for seed in range(5):
        given = layers(seed=seed)
        least = least_costs(given, np.zeros(2, np.int64))
        limits = 2 * least
        picks = least_loss(given, limits)
        assert np.all(spent(given, picks) <= limits)
        best = min(loss for loss, _ in every_way(given, limits))
        assert lost(given, picks) <= 1.5 * best + 1e-9
        cheapest = spent(given, least_cost(given, 1, limits))
        assert cheapest[0] <= limits[0]
        assert cheapest[1] == min(costs[1] for _, costs in every_way(given, limits))


def test_none_where_the_least_is_too_much():
    given = layers()
    limits = least_costs(given, np.zeros(2, np.int64))
    assert least_loss(given, limits - np.array([1, 0])) is None
    assert least_loss(given, limits - np.array([0, 1])) is None


def test_the_rest_is_spent_where_it_saves_most():
    costs = np.array([[1], [5], [9]])
    given = [Choices(costs, np.array([3.0, 2.0, 0.0])), Choices(costs, np.array([9.0, 1.0, 0.5]))]
    picks = [0, 0]
    spend_rest(given, picks, np.array([6]))
    assert picks == [0, 1]
    spend_rest(given, picks, np.array([14]))
    assert picks == [2, 1]
    spend_rest(given, picks, np.array([18]))
    assert picks == [2, 2]
