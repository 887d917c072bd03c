"""Large kernels in float32 against the optimum in float64."""

import pytest
import torch

from tdecomp.linalg.leading_outputs import leading_outputs
from tdecomp.linalg.second_moment import SecondMoment

SMALL, LARGE, RANK = 1024, 1100, 300


def kernel_of(out, fan_in, seed=0):
    return torch.randn(out, fan_in, generator=torch.Generator().manual_seed(seed)) * 0.02


def moment_of(kind, fan_in):
    generator = torch.Generator().manual_seed(1)
    if kind == "diagonal":
        return SecondMoment(diagonal=torch.rand(fan_in, generator=generator).double())
    count = 400 if kind == "few rows" else 2 * fan_in
    rows = torch.randn(count, fan_in, generator=generator) * torch.linspace(0.01, 3.0, fan_in)
    rows = rows.double() / count**0.5
    if kind == "few rows":
        return SecondMoment(rows=rows).shrunk(1e-3)
    return SecondMoment(matrix=rows.T @ rows)


@pytest.mark.parametrize("kind", ["matrix", "few rows", "diagonal"])
@pytest.mark.parametrize("out, fan_in", [(SMALL, LARGE), (LARGE, SMALL)])
def test_no_directions_lose_less(kind, out, fan_in):
    kernel, moment = kernel_of(out, fan_in), moment_of(kind, fan_in)
    found = leading_outputs(kernel, moment, RANK)
    assert (found.dtype, found.shape) == (torch.float32, (out, RANK))
    precise, basis = kernel.double(), found.double()
    gone = precise - basis @ (basis.T @ precise)
    values = torch.linalg.eigvalsh(moment.between(precise))
    best = float(values[:-RANK].sum())
    assert moment.lost(gone) == pytest.approx(best, rel=1e-6)


def test_a_kernel_of_low_rank_is_met():
    left, right = kernel_of(LARGE, 40), kernel_of(40, SMALL, seed=1)
    kernel = left @ right
    found = leading_outputs(kernel, moment_of("matrix", SMALL), 64)
    assert (kernel - found @ (found.T @ kernel)).norm() < 1e-5 * kernel.norm()


@pytest.mark.parametrize("kind", ["matrix", "few rows"])
def test_what_a_float32_difference_loses(kind):
    gone, moment = kernel_of(LARGE, SMALL), moment_of(kind, SMALL)
    assert moment.lost(gone) == pytest.approx(moment.lost(gone.double()), rel=1e-6)
