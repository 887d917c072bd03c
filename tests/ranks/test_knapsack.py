"""The search for one choice for each layer, against every way there is to choose."""

import itertools

import numpy as np
import pytest

from tdecomp.ranks.knapsack import least_cost, least_loss, spent
from tdecomp.ranks.relaxation import Choices, least_costs, relax


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


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_what_is_found_is_the_best_of_every_way(seed, budgets):
    given = layers(budgets=budgets, seed=seed)
    least = least_costs(given, np.zeros(budgets, np.int64))
    for limits in (least, (1.3 * least).astype(int), 2 * least, 10 * least):
        best = min((loss for loss, _ in every_way(given, limits)), default=None)
        picks = least_loss(given, limits)
        if best is None:
            assert picks is None
            continue
        assert np.all(spent(given, picks) <= limits)
        assert lost(given, picks) <= 1.0001 * best + 1e-12


@pytest.mark.parametrize("count", [6, 12, 60])
@pytest.mark.parametrize("budgets", [1, 2])
def test_models_of_many_layers_come_close_to_the_lower_bound(count, budgets):
    """Also of many layers that are alike, where as many choices are equally good."""
    rng = np.random.default_rng(0)
    shares = np.linspace(0.02, 1, 50)[:, None]
    for alike in (False, True):
        given = []
        for _ in range(count):
            drawn = np.ones(3) if alike else rng.uniform([0.1, 0.1, 2], [1, 1, 6])
            costs = (10**6 * shares * drawn[:budgets]).astype(np.int64)
            given.append(Choices(costs, np.exp(-4 * drawn[2] * shares[:, 0])))
        limits = (0.4 * sum(layer.costs[-1] for layer in given)).astype(np.int64)
        picks, bound = least_loss(given, limits), relax(given, limits).bound
        assert np.all(spent(given, picks) <= limits)
        assert bound * (1 - 1e-9) <= lost(given, picks) <= 1.03 * bound


@pytest.mark.parametrize("seed", range(20))
def test_no_way_within_the_limits_loses_less_than_the_bound(seed):
    given = layers(budgets=2, seed=seed)
    least = least_costs(given, np.zeros(2, np.int64))
    for factor in (1.0, 1.2, 1.7, 3.0):
        limits = (factor * least).astype(np.int64)
        relaxed = relax(given, limits)
        losses = [loss for loss, _ in every_way(given, limits)]
        assert relaxed.bound <= min(losses, default=np.inf) + 1e-9
        assert all(regrets.min() == 0 for regrets in relaxed.regrets)


def test_other_losses_may_be_minimised():
    given = layers()
    reversed_losses = [-layer.losses for layer in given]
    picks = least_loss(given, np.array([100_000]), reversed_losses)
    assert picks == [int(np.argmax(layer.losses)) for layer in given]


def test_the_least_of_one_cost_within_the_limit_of_another():
    for seed in range(5):
        given = layers(seed=seed)
        least = least_costs(given, np.zeros(2, np.int64))
        limits = 2 * least
        cheapest = spent(given, least_cost(given, 1, limits))
        assert cheapest[0] <= limits[0]
        assert cheapest[1] == min(costs[1] for _, costs in every_way(given, limits))


def test_none_where_the_least_is_too_much():
    given = layers()
    limits = least_costs(given, np.zeros(2, np.int64))
    assert least_loss(given, limits - np.array([1, 0])) is None
    assert least_loss(given, limits - np.array([0, 1])) is None
