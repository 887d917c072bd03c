"""What a model has to keep, and the noise of a metric."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from tdecomp.quality.bracket import Bracket
from tdecomp.quality.quality import Judge, Quality


class Sized(nn.Module):
    """It knows what share of the original it is."""

    def __init__(self, share):
        super().__init__()
        self.share = share


def metric(truth, noise=0.0, seed=0):
    draw = random.Random(seed)
    return lambda model: 92 - truth(model.share) + draw.gauss(0, noise)


def power(share):
    return 0.05 * (share**-3 - 1)


def search(quality, floor=0.02):
    """The smallest share that is kept, and how often the metric was evaluated."""
    judge, bracket, best = Judge(quality, Sized(1.0)), Bracket(), 1.0
    while judge.left and (share := bracket.next_share()) is not None:
        if share < floor:
            bracket.raise_floor(floor)
            continue
        verdict = judge.judge(Sized(share), "a model")
        bracket.add(share, verdict.used)
        if verdict.kept:
            best = min(best, share)
    return best, quality.evaluations - judge.left


@pytest.mark.parametrize(
    "truth, ideal",
    [
        (power, 0.4503),
        (lambda share: 6 * power(share), 0.7211),
        (lambda share: 60.0 * (share < 0.37), 0.37),
        (lambda _: 0.0, 0.02),
        (lambda share: share - 1, 0.02),
        (lambda share: 5.0 * (share < 1), 1.0),
    ],
    ids=["gentle", "steep", "cliff", "flat", "better", "hopeless"],
)
def test_the_smallest_share_is_found_in_ten_evaluations(truth, ideal):
    best, evaluations = search(Quality(metric(truth), drop=0.5))
    assert ideal <= best <= 1.03 * ideal
    assert evaluations <= 10
    assert search(Quality(metric(truth), at_least=91.5)) == (best, evaluations)


def test_with_a_noisy_metric_too_much_is_seldom_lost():
    found = [search(Quality(metric(power, 0.1, seed), drop=0.5)) for seed in range(100)]
    lost = sorted(power(share) for share, _ in found)
    assert lost[85] <= 0.5
    assert lost[-1] < 0.7
    assert lost[50] > 0.35
    assert all(evaluations <= 10 for _, evaluations in found)


def test_noise_that_a_ceiling_hides_in_the_original_is_seen_below_it():
    draw = random.Random(0)
    quality = Quality(lambda m: min(100, 100 * m.share + draw.gauss(0, 1) + 10), drop=20)
    judge = Judge(quality, Sized(1.0))
    assert judge.original == (100, 100)
    assert judge.judge(Sized(0.95), "a model").margin == 0
    verdict = judge.judge(Sized(0.75), "a model")
    assert len(verdict.values) == 2
    assert verdict.margin > 0


def test_a_metric_without_noise_is_asked_once_for_most_models():
    judge = Judge(Quality(metric(power), drop=0.5), Sized(1.0))
    counts = [len(judge.judge(Sized(share), "a model").values) for share in (0.5, 0.4, 0.3)]
    assert counts == [2, 1, 1]


def test_what_is_lost_exactly_up_to_rounding_is_kept():
    judge = Judge(Quality(lambda m: 0.9 if m.share == 1 else 0.895, drop=0.005), Sized(1.0))
    assert judge.judge(Sized(0.5), "a model").kept


@pytest.mark.parametrize("value", [np.float32(2), np.int64(2), torch.tensor([2.0]), 2], ids=repr)
def test_any_number_is_a_value(value):
    assert Judge(Quality(lambda _: value, drop=0), Sized(1.0)).original == (2.0, 2.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "92", True, [92.0]], ids=repr)
def test_a_metric_that_returns_no_finite_number_is_refused(value):
    with pytest.raises(ValueError, match=r"returned .* for the original model; expected a finite"):
        Judge(Quality(lambda _: value, drop=1), Sized(1.0))


def test_a_limit_above_the_original_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"gives the original model, 92, got 92\.5"):
        Judge(Quality(lambda _: 92.0, at_least=92.5), Sized(1.0))


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "either drop= or at_least=, got neither"),
        ({"drop": 1, "at_least": 2}, r"got drop=1 and at_least=2"),
        ({"drop": -1}, "drop to be a finite number of at least 0"),
        ({"drop": "1"}, "drop to be a finite number of at least 0"),
        ({"at_least": float("nan")}, "at_least a finite number"),
        ({"drop": 1, "evaluations": 3}, "evaluations of at least 4, got 3"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Quality(len, **options)


def test_a_metric_has_to_be_callable():
    with pytest.raises(TypeError, match=r"callable \(model\) -> float, got 92"):
        Quality(92, drop=1)
