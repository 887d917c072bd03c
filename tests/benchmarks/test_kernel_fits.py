"""The comparison of fits with plain ones: both solve the same problem."""

import pytest

from benchmarks import kernel_fits
from benchmarks.kernel_fits import CASES, KERNELS, kernel


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_both_ways_find_about_the_same(case):
    """On a kernel small enough for a test, at the ranks that it then has."""
    small = {"ranks": (5, 5), "rank": 5}
    fits = {
        "tucker2": (kernel_fits._fitted("tucker2", small["ranks"]),
                    kernel_fits._partial_tucker(small["ranks"])),
        "cp-separable": (kernel_fits._fitted("cp-separable", small["rank"]),
                         kernel_fits._parafac(small["rank"], joined=False)),
        "cp": (kernel_fits._fitted("cp", small["rank"]),
               kernel_fits._parafac(small["rank"], joined=True)),
        "VBMF ranks": (case.ours, case.theirs),
    }  # fmt: skip
    ours, theirs = fits[case.title.split(",")[0]]
    weight = kernel(12, "falling")
    mine, plain = ours(weight), theirs(weight)
    if isinstance(mine, tuple):
        assert mine == plain
        return
    errors = [float((found - weight).norm() / weight.norm()) for found in (mine, plain)]
    assert errors[0] <= 1.05 * errors[1]


def test_the_table(capsys):
    kernel_fits.main(["--only", "VBMF", "--repeat", "1", "--kernels", KERNELS[1]])
    out = capsys.readouterr().out
    assert "VBMF ranks, 512" in out
    assert "times faster" in out
