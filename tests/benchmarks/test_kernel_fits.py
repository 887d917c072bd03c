"""The comparison of fits with plain ones: both solve the same problem."""

from functools import partial

import pytest

from benchmarks.support import kernel_fits
from benchmarks.support.kernel_fits import kernel, plain_tucker2, vbmf_by_full_svd
from tdecomp.decomposers.cp import CPSeparable

FITS = {
    "VBMF": (kernel_fits._vbmf, vbmf_by_full_svd),
    "tucker2": (kernel_fits._fitted("tucker2", (5, 4)), partial(plain_tucker2, ranks=(5, 4))),
    "cp-separable": (kernel_fits._fitted("cp-separable", 5), kernel_fits._parafac(5, joined=False)),
    "quick": (kernel_fits._fitted(CPSeparable(effort="quick"), 5),
              kernel_fits._parafac(5, joined=False)),
    "cp": (kernel_fits._fitted("cp", 5), kernel_fits._parafac(5, joined=True)),
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


def test_a_line_has_every_bound(monkeypatch):
    way = kernel_fits.Way(FITS["tucker2"][0], 3, 1.001)
    case = kernel_fits.Case("small", 12, {"": way, ", again": way}, FITS["tucker2"][1])
    monkeypatch.setattr(kernel_fits, "CASES", (case,))
    first, second = kernel_fits.rows("small", 2, kernels=("falling",))
    assert first[:2] == ["small", "falling"]
    assert second[0] == "small, again"
    assert (first[5], first[9]) == ("≥ 3", "≤ 1.001")
    assert float(first[8]) == pytest.approx(1.0, abs=0.05)
    assert list(kernel_fits.rows("large", 1)) == []
