"""The comparison of fits with plain ones: both solve the same problem."""

from functools import partial

import pytest

from benchmarks.support.kernel_fits import (
    Case,
    Way,
    fitted,
    kernel,
    plain_parafac,
    plain_tucker2,
    rows,
    vbmf_by_full_svd,
    vbmf_ranks,
)
from tdecomp.decomposers.cp import CPSeparable

FITS = {
    "VBMF": (vbmf_ranks, vbmf_by_full_svd),
    "tucker2": (fitted("tucker2", (5, 4)), partial(plain_tucker2, ranks=(5, 4))),
    "cp-separable": (fitted("cp-separable", 5), plain_parafac(5, joined=False)),
    "quick": (fitted(CPSeparable(effort="quick"), 5),
              plain_parafac(5, joined=False)),
    "cp": (fitted("cp", 5), plain_parafac(5, joined=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", FITS)
def test_both_ways_find_about_the_same(name):
    ours, theirs = FITS[name]
    weight = kernel(12, "falling")
    mine, plain = ours(weight), theirs(weight)
    if isinstance(mine, tuple):
        assert mine == plain
        return
    errors = [float((found - weight).norm() / weight.norm()) for found in (mine, plain)]
    assert errors[0] <= 1.05 * errors[1]


def test_a_line_has_every_bound():
    way = Way(FITS["tucker2"][0], 3, 1.001)
    case = Case("small", 12, {"": way, ", again": way}, FITS["tucker2"][1])
    first, second = rows("small", 2, [case], kernels=("falling",))
    assert first[:2] == ["small", "falling"]
    assert second[0] == "small, again"
    assert (first[5], first[9]) == ("≥ 3", "≤ 1.001")
    assert float(first[8]) == pytest.approx(1.0, abs=0.05)
    assert list(rows("large", 1, [case])) == []
