"""Ratios of the full rank, of parameters and of MACs."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import Ratio
from tdecomp.layers.cost import Cost
from tdecomp.ranks.base import Candidate
from tdecomp.ranks.grid import largest_rank, rank_at, rank_ladder
from tests.geometries import case

LAYERS = {
    "linear": (nn.Linear(24, 20), (2, 24)),
    "conv": (nn.Conv2d(12, 20, 3, padding=1), (2, 12, 6, 6)),
    "strided": (nn.Conv2d(12, 20, (3, 2), stride=2, bias=False), (2, 12, 9, 8)),
    "pointwise": (nn.Conv2d(24, 16, 1), (1, 24, 4, 4)),
    "transposed": (nn.ConvTranspose2d(12, 10, 4, stride=2, padding=1), (1, 12, 5, 5)),
    "grouped": (nn.Conv2d(12, 16, 3, groups=2), (1, 12, 6, 6)),
}
METHODS = ("svd", "lowrank", "tucker2", "cp", "cp-separable")
TAKEN = [
    (name, method)
    for name, (layer, _) in LAYERS.items()
    for method in METHODS
    if tdecomp.plan(layer, method, rank=1, allow_expansion=True)[""].method
]


def layers_of(method):
    return [name for name, other in TAKEN if other == method]


def planned(name, method, rank, **options):
    layer, shape = LAYERS[name]
    options.setdefault("example_inputs", torch.zeros(shape))
    return tdecomp.plan(layer, method, rank=rank, allow_expansion=True, **options)[""]


def full_rank(name, method):
    return planned(name, method, Ratio(1.0, of="rank")).rank


@pytest.mark.parametrize("method", METHODS)
def test_a_fraction_of_the_full_rank_floored_and_at_least_one(method):
    for name in layers_of(method):
        full = full_rank(name, method)
        for ratio in (0.01, 0.25, 0.5, 0.9):
            expected = (
                tuple(max(1, math.floor(ratio * r)) for r in full)
                if isinstance(full, tuple)
                else max(1, math.floor(ratio * full))
            )
            with case(name, ratio):
                assert planned(name, method, ratio).rank == expected
                assert planned(name, method, Ratio(ratio, of="rank")).rank == expected


def test_the_full_rank_of_each_method():
    s, t, kh, kw = 12, 20, 3, 3
    assert full_rank("linear", "svd") == 20
    assert full_rank("conv", "lowrank") == min(s * kh * kw, t)
    assert full_rank("conv", "tucker2") == (min(s, t * kh * kw), min(t, s * kh * kw))
    assert full_rank("conv", "cp") == s * t * kh * kw // t
    assert full_rank("conv", "cp-separable") == s * t * kh * kw // t
    assert full_rank("pointwise", "tucker2") == (16, 16)
    thin = nn.Conv2d(2, 64, 3)
    plan = tdecomp.plan(thin, "tucker2", rank=Ratio(1.0, of="rank"), allow_expansion=True)
    assert plan[""].rank == (2, 18)


def steps(full):
    """Every rank there is to choose from, ascending; for Tucker-2 by brute force."""
    if isinstance(full, int):
        return [(r,) for r in range(1, full + 1)]
    common = {Fraction(k, limit) for limit in full for k in range(1, limit + 1)}
    return sorted({tuple(max(1, math.floor(f * limit)) for limit in full) for f in common})


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_rank_within_a_share(method):
    for name in layers_of(method):
        rows = [
            planned(name, method, rank[0] if len(rank) == 1 else rank)
            for rank in steps(full_rank(name, method))
        ]
        for of in ("params", "macs"):
            for ratio in (0.3, 0.75, 1.0):
                with case(name, of, ratio):
                    check_share(planned(name, method, Ratio(ratio, of=of)), rows, of, ratio)


def check_share(row, rows, of, ratio):
    limit = ratio * getattr(row, f"{of}_before")
    fitting = [other.rank for other in rows if getattr(other, f"{of}_after") <= limit]
    if not fitting:
        assert row.method is None
        assert "no rank is small enough: rank 1 needs" in row.reason
        return
    assert row.rank == fitting[-1]
    assert getattr(row, f"{of}_after") <= limit


def test_a_share_no_rank_fits_leaves_the_layer_alone_with_the_numbers():
    plan = tdecomp.plan(nn.Linear(4, 4), "svd", rank=Ratio(0.1, of="params"))
    assert plan[""].method is None
    assert plan[""].reason == (
        "no rank is small enough: rank 1 needs 12 parameters, 0.1 of the layer's 20 is 2"
    )


def test_macs_without_example_inputs_go_by_parameters_and_say_so():
    row = planned("linear", "svd", Ratio(0.5, of="macs"), example_inputs=None)
    assert row.rank == planned("linear", "svd", Ratio(0.5, of="params")).rank
    assert "share of parameters: no MACs observed" in row.note
    assert planned("linear", "svd", Ratio(0.5, of="macs")).note is None


def test_of_params_ignores_macs():
    strided = planned("strided", "tucker2", Ratio(0.5, of="params"))
    assert strided.rank == planned("strided", "tucker2", Ratio(0.5, of="params")).rank
    assert strided.rank != planned("strided", "tucker2", Ratio(0.5, of="macs")).rank


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan"), True, math.inf])
def test_a_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match="expected a ratio above 0 and at most 1, got"):
        Ratio(ratio, of="rank")


@pytest.mark.parametrize("of", ["flops", None, "MACs"])
def test_a_ratio_of_nothing_known(of):
    with pytest.raises(ValueError, match="one of 'rank', 'params', 'macs', got"):
        Ratio(0.5, of=of)


def test_a_ratio_must_say_of_what():
    with pytest.raises(TypeError, match="of"):
        Ratio(0.5)


# The walk along the ranks ------------------------------------------------------------------------


def test_the_ladder_holds_every_common_fraction():
    assert list(rank_ladder(3)) == [1, 2, 3]
    assert rank_ladder((2, 4)) == [(1, 1), (1, 2), (1, 3), (2, 4)]
    for full in [(5, 7), (12, 20), (1, 9)]:
        ladder = rank_ladder(full)
        assert ladder == steps(full)
        assert ladder[-1] == full
        assert rank_at(full, Fraction(1, 10**6)) == ladder[0] == (1, 1)


@pytest.mark.parametrize("full", [9, (4, 6)])
def test_the_search_finds_what_a_scan_finds(full):
    ladder = list(rank_ladder(full))
    for size in range(len(ladder) + 1):
        candidate = Candidate(
            "", "", full, Cost(0), lambda rank: Cost(ladder.index(rank)), lambda: None
        )
        expected = ladder[size - 1] if size else None
        assert largest_rank(candidate, lambda cost, size=size: cost.params < size) == expected
