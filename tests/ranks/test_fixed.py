"""Ranks named by the user: numbers, pairs and dicts, and every number that cannot be one."""

import numpy as np
import pytest
from torch import nn

import tdecomp
from tdecomp.ranks.energy import Energy
from tdecomp.ranks.fixed import ByLayer, Fixed
from tdecomp.ranks.ratio import Ratio
from tdecomp.ranks.short_forms import get_selector
from tests.models import MODELS
from tests.unchanged import unchanged


def convs():
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3))


def ranks(model, methods, rank):
    return [row.rank for row in tdecomp.plan(model, methods, rank=rank)]


def test_an_int_is_a_rank_and_for_tucker_the_same_rank_twice():
    assert ranks(convs(), "lowrank", 4) == [4, 4, 4]
    assert ranks(convs(), "tucker2", 4) == [(4, 4)] * 3
    assert ranks(convs(), "cp", np.int64(4)) == [4, 4, 4]
    assert type(tdecomp.plan(convs(), "cp", rank=np.int64(4))["0"].rank) is int


@pytest.mark.parametrize("pair", [(3, 5), [3, 5]])
def test_a_pair_is_taken_as_it_is(pair):
    assert ranks(convs(), "tucker2", pair) == [(3, 5)] * 3


def test_a_rank_too_large_for_some_layers_leaves_those_alone():
    plan = tdecomp.plan(convs(), "tucker2", rank=(16, 16))
    assert plan["0"].method is None
    assert plan["0"].reason == "rank (16, 16) is above its largest useful one, (8, 16)"
    assert plan["2"].rank == (16, 16)


def test_the_largest_useful_rank_is_still_one():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 20))
    plan = tdecomp.plan(model, "svd", rank=6, allow_expansion=True)
    assert [row.rank for row in plan] == [6, 6]


@pytest.mark.parametrize(
    "methods, rank, limits",
    [
        ("svd", 17, "'0' (svd): 16"),
        ("lowrank", 33, "'1' (lowrank): 32"),
        ("tucker2", 33, "'1' (tucker2): (16, 32)"),
        ("cp", 145, "'1' (cp): 144"),
        ("cp-separable", 145, "'1' (cp-separable): 144"),
        (["lowrank", "svd"], 40, "'0' (svd): 16, '1' (lowrank): 32"),
        (["lowrank", "svd"], {"0": 17}, "'0' (svd): 16"),
        (["lowrank", "svd"], {"1": 33, "*": 2}, "'1' (lowrank): 32"),
    ],
)
def test_a_rank_too_large_for_all_of_its_layers_is_an_error(methods, rank, limits):
    model = nn.Sequential(nn.Linear(16, 16), nn.Conv2d(16, 32, 3))
    with unchanged(model), pytest.raises(ValueError, match="above the largest useful") as caught:
        tdecomp.decompose(model, methods, rank=rank, inplace=True, progress=False)
    assert limits in str(caught.value)


@pytest.mark.parametrize(
    "rank",
    [0, -3, True, False, (), (0, 2), (2, -1), (2.5, 3), (float("nan"), 3), [0, 0]],
    ids=str,
)
def test_what_is_no_positive_int(rank):
    model = convs()
    with unchanged(model), pytest.raises(ValueError, match="rank: expected a positive int") as e:
        tdecomp.decompose(model, "tucker2", rank=rank, inplace=True)
    assert f"got {tuple(rank) if isinstance(rank, list) else rank!r}" in str(e.value)


def test_a_pair_with_a_bool():
    with pytest.raises(ValueError, match="rank: expected a positive int"):
        tdecomp.plan(convs(), "tucker2", rank=(2, True))


@pytest.mark.parametrize(
    "rank",
    [float("nan"), float("inf"), 0.0, -0.5, 2.0, 1.5, None, "nope", "VBMF", "1", {3}],
    ids=repr,
)
def test_what_is_no_rank_at_all(rank):
    with pytest.raises(ValueError, match="rank") as caught:
        tdecomp.plan(convs(), "tucker2", rank=rank)
    message = str(caught.value)
    for expected in ("a positive int", "'vbmf', 'breakeven'", "Ratio(0.5, of='macs')", "a dict of"):
        assert expected in message
    assert repr(rank) in message


def test_one_point_zero_is_refused_with_a_hint():
    with pytest.raises(ValueError, match=r"tdecomp.Ratio\(1.0, of='rank'\)"):
        tdecomp.plan(convs(), "lowrank", rank=1.0)


@pytest.mark.parametrize("rank", [(3,), (3, 4, 5)])
def test_the_wrong_number_of_ranks_for_tucker(rank):
    with pytest.raises(ValueError, match=r"layer '0': tucker2 takes 2 ranks \(or one int"):
        tdecomp.plan(convs(), "tucker2", rank=rank)


@pytest.mark.parametrize("method", ["lowrank", "cp", "cp-separable"])
def test_a_pair_for_a_method_of_one_rank(method):
    with pytest.raises(ValueError, match=f"layer '0': {method} takes one rank, got") as caught:
        tdecomp.plan(convs(), method, rank=(3, 4))
    assert "a dict of layer names" in str(caught.value)


# Each layer its own ------------------------------------------------------------------------------


def test_exact_names_come_before_globs_and_globs_in_their_order():
    rank = {"*": 2, "1": (3, 4), "[12]": 5}
    assert ranks(convs(), "tucker2", rank) == [(2, 2), (3, 4), (2, 2)]
    rank = {"[12]": 5, "*": 2, "1": (3, 4)}
    assert ranks(convs(), "tucker2", rank) == [(2, 2), (3, 4), (5, 5)]


def test_a_container_stands_for_what_it_holds():
    model = MODELS["nested"].build()
    plan = tdecomp.plan(model, ("lowrank", "svd"), rank={"stem": 2, "heads": 3})
    assert [row.rank for row in plan] == [2, 2, 3, 3]


def test_layers_without_an_entry_are_left_alone():
    plan = tdecomp.plan(convs(), "lowrank", rank={"1": 3})
    assert [row.rank for row in plan] == [None, 3, None]
    assert plan["0"].reason == "no rank was given for it"


def test_entries_may_be_selectors_and_short_forms():
    plan = tdecomp.plan(
        convs(), "lowrank", rank={"0": 0.25, "1": Ratio(0.5, of="params"), "2": "vbmf"}
    )
    assert plan["0"].rank == 4
    assert plan["1"].params_after <= 0.5 * plan["1"].params_before
    assert plan["2"].rank == 1


def test_an_entry_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="rank: 'fc1' matches no Linear or convolution"):
        tdecomp.plan(convs(), "lowrank", rank={"0": 2, "fc1": 3})


@pytest.mark.parametrize("rank", [0, 1.0, "nope", None])
def test_a_bad_entry_names_its_layer(rank):
    with pytest.raises(ValueError, match="'1'"):
        tdecomp.plan(convs(), "lowrank", rank={"0": 2, "1": rank})


def test_an_entry_may_use_any_name_of_a_shared_module():
    plan = tdecomp.plan(MODELS["twice"].build(), "svd", rank={"again": 3})
    assert plan["first"].rank == 3


def test_an_entry_for_a_layer_that_is_left_alone_says_so():
    model = nn.Sequential(nn.Linear(16, 16), nn.Conv2d(16, 16, 3))
    with pytest.raises(ValueError, match="lowrank takes convolutions"):
        tdecomp.plan(model, "lowrank", rank={"0": 2, "1": 2})


def test_short_forms():
    assert get_selector(4) == Fixed(4)
    assert get_selector([4, 5]) == Fixed((4, 5))
    assert get_selector(0.25) == Ratio(0.25, of="rank")
    assert get_selector("vbmf") == tdecomp.VBMF()
    assert get_selector("breakeven") == tdecomp.BreakEven()
    assert get_selector(Energy(0.9)) == Energy(0.9)
    assert get_selector({"a": 3}) == ByLayer({"a": Fixed(3)})
