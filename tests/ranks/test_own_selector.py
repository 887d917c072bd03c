"""A rank selector from outside the library: a class of the user's, given as `rank`, and no more."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import Choice, LocalSelector
from tests.recovery.networks import QUIET, mlp, vectors, whole


@dataclass(frozen=True)
class LeastError(LocalSelector):
    """The smallest rank whose weight or output error is at most this."""

    error: float

    def choose(self, candidate):
        for rank, error in enumerate(candidate.errors()):
            if rank and error <= self.error:
                return Choice(candidate, rank, error=error)
        return Choice(reason=f"no rank of {candidate.method} is within {self.error}")


@dataclass(frozen=True)
class OnlyTheLargest(tdecomp.RankSelector):
    """Looks at all layers at once: half of the ranks for the one with most parameters."""

    def select(self, sites, rest=None):  # noqa: ARG002
        largest = max(sites, key=lambda candidates: candidates[0].before.params)
        return [
            Choice(offered[0], offered[0].max_rank // 2)
            if offered is largest
            else Choice(reason="not the largest")
            for offered in sites
        ]


@pytest.mark.parametrize("data", [None, vectors()], ids=["weights", "data"])
def test_it_sees_the_errors_of_every_rank(data):
    result = tdecomp.decompose(
        mlp(), "svd", rank=LeastError(0.5), data=data and whole(data), allow_expansion=True, **QUIET
    )
    for row in result.report:
        error = row.weight_error if data is None else row.output_error
        assert row.method is None or error <= 0.5 + 1e-4
    assert any(row.method for row in result.report)


def test_it_may_weigh_layers_and_be_used_everywhere():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 8))
    plan = tdecomp.plan(model, "svd", rank=OnlyTheLargest(), **QUIET)
    assert [row.reason for row in plan] == ["not the largest", plan["2"].reason, "not the largest"]
    result = tdecomp.apply(model, plan, **QUIET)
    assert result.report["2"].method is None or result.report["2"].rank == 32
    named = tdecomp.plan(model, "svd", rank={"2": LeastError(0.9)}, **QUIET)
    assert named["2"].method == "svd"
    assert torch.is_tensor(result.model(torch.zeros(1, 32)))


@pytest.mark.parametrize(
    "answer, error, words",
    [
        (None, TypeError, "expected a list of 3 Choice objects"),
        ([], TypeError, "expected a list of 3 Choice objects"),
        ([1, 2, 3], TypeError, "expected a list of 3 Choice objects"),
        ("x", ValueError, "layer '0': Answers chose rank 'x' of svd"),
        ((2, 2), ValueError, r"layer '0': Answers chose rank \(2, 2\) of svd"),
        (2.5, ValueError, "layer '0': Answers chose rank 2.5 of svd"),
        (0, ValueError, "layer '0': Answers chose rank 0 of svd; expected at least 1 and at most"),
    ],
)
def test_an_answer_that_cannot_be_used_is_refused_in_words(answer, error, words):
    class Answers(tdecomp.RankSelector):
        def select(self, sites, rest=None):  # noqa: ARG002
            if answer is None or isinstance(answer, list):
                return answer
            return [Choice(offered[0], answer) for offered in sites]

    with pytest.raises(error, match=words):
        tdecomp.plan(mlp(), "svd", rank=Answers(), **QUIET)


def test_reducing_never_raises_a_rank():
    class Larger(tdecomp.RankSelector):
        def select(self, sites, rest=None):  # noqa: ARG002
            return [Choice(offered[0], 12) for offered in sites]

    result = tdecomp.decompose(mlp(), "svd", rank=4, **QUIET)
    with pytest.raises(ValueError, match="chose rank 12 of svd; expected at least 1 and at most 4"):
        tdecomp.reduce_ranks(result, rank=Larger(), **QUIET)
