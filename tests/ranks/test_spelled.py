"""Ranks as one word: what each form stands for, and what is refused."""

import pytest

from tdecomp.ranks.breakeven import BreakEven
from tdecomp.ranks.budget import Budget
from tdecomp.ranks.energy import Energy
from tdecomp.ranks.fixed import Fixed
from tdecomp.ranks.ratio import Ratio
from tdecomp.ranks.spelled import FORMS, spelled_rank
from tdecomp.ranks.vbmf import VBMF


@pytest.mark.parametrize(
    "text, selector",
    [
        ("64", Fixed(64)),
        ("16,8", Fixed((16, 8))),
        ("0.25", Ratio(0.25, of="rank")),
        (".25", Ratio(0.25, of="rank")),
        ("breakeven", BreakEven()),
        ("vbmf", VBMF()),
        ("vbmf:0.5", VBMF(weaken=0.5)),
        ("vbmf:weaken=0.5", VBMF(weaken=0.5)),
        ("energy:0.9", Energy(0.9)),
        ("energy:share=1", Energy(1)),
        ("ratio:0.5,of=params", Ratio(0.5, of="params")),
        ("ratio:0.5,params", Ratio(0.5, of="params")),
        ("ratio:of=rank,ratio=1.0", Ratio(1.0, of="rank")),
        ("budget:params=0.6", Budget(params=0.6)),
        ("budget:params=0.6,round_to=64", Budget(params=0.6, round_to=64)),
    ],
)
def test_what_is_spelled(text, selector):
    assert spelled_rank(text) == selector


def test_every_form_that_is_listed_can_be_written():
    assert all(spelled_rank(form) for form in FORMS)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "neither a number nor the name"),
        ("0", "positive int"),
        ("-4", "neither a number"),
        ("1.0", "above 0 and below 1"),
        ("1.5", "above 0 and below 1"),
        ("nan", "neither a number"),
        ("1_000", "neither a number"),
        ("٣", "neither a number"),
        ("9" * 5000, "neither a number"),
        ("8,", "neither a number"),
        ("VBMF", "neither a number"),
        ("svd:4", "no selector 'svd'"),
        ("energy", "energy takes share"),
        ("energy:", "above 0 and at most 1, got ''"),
        ("energy:2", "above 0 and at most 1, got 2"),
        ("energy:0.9,0.8", "'0.8' cannot stand there, energy takes share"),
        ("energy:0.9,share=0.8", "'share=0.8' cannot stand there"),
        ("ratio:0.5", "ratio takes ratio and of"),
        ("ratio:0.5,of=all", "got 'all'"),
        ("ratio:of=params,0.5", "'0.5' cannot stand there"),
        ("breakeven:1", "breakeven takes nothing"),
        ("budget:macs=0.5", "'macs=0.5' cannot stand there, budget takes params and round_to"),
        ("budget:round_to=8", "got none"),
    ],
)
def test_what_is_refused(text, words):
    with pytest.raises(ValueError, match=r"expected one of these forms: 64, 0\.25,") as caught:
        spelled_rank(text)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"rank {text!r}: ")
