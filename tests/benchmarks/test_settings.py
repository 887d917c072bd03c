import pytest

import tdecomp
from benchmarks.support.settings import Setting, parse_rank


@pytest.mark.parametrize(
    "text, rank",
    [
        ("0.5", tdecomp.Ratio(0.5, of="macs")),
        ("1.0", tdecomp.Ratio(1.0, of="macs")),
        ("32", 32),
        ("32,48", (32, 48)),
        ("vbmf", "vbmf"),
        ("vbmf:0.25", tdecomp.VBMF(weaken=0.25)),
        ("breakeven", "breakeven"),
        ("energy:0.9", tdecomp.Energy(0.9)),
        ("budget:0.5", tdecomp.Budget(macs=0.5)),
    ],
)
def test_ranks_as_written(text, rank):
    assert parse_rank(text) == rank


@pytest.mark.parametrize(
    "text", ["", "half", "energy", "energy:2", "budget", "budget:0", "vbmf:x", "1,x", "nan", "2.5"]
)
def test_bad_ranks_say_the_syntax(text):
    with pytest.raises(ValueError, match=r"expected a float for a share of the MACs"):
        parse_rank(text)


def test_linear_layers_are_left_to_svd():
    assert Setting("cp", "0.5").methods == ["cp", "svd"]
    assert Setting("svd", "0.5").methods == "svd"
    assert Setting("auto", "0.5").methods == "auto"
