"""What kernels lose at every rank, against dense decompositions of all outputs."""

import pytest
import torch

from tdecomp.linalg.leading_outputs import leading_outputs
from tdecomp.linalg.nested_losses import nested_losses
from tdecomp.linalg.second_moment import SecondMoment
from tests.linalg.recorded import Recorded


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def importance_of(out):
    root = gaussian(out, out, seed=4)
    return root @ root.T


def moment_of(kind, fan_in=12):
    count = 5 if kind == "few rows" else 40
    rows = gaussian(count, fan_in, seed=1) * torch.linspace(2, 0.1, fan_in) / count**0.5
    if kind == "few rows":
        return SecondMoment(rows=rows)
    if kind == "diagonal":
        return SecondMoment(diagonal=rows.square().sum(dim=0))
    if kind == "rounded":  # as where inputs are copies, and their squares are summed in float32
        rows[:, fan_in // 2 :] = rows[:, : fan_in // 2]
        return SecondMoment(matrix=(rows.float().T @ rows.float()).double())
    return SecondMoment(matrix=rows.T @ rows)


def kernel_of(kind, out, fan_in=12):
    kernel = gaussian(out, fan_in)
    if kind == "low rank":
        return gaussian(out, 3) @ gaussian(3, fan_in, seed=1)
    if kind == "unused inputs":
        kernel[:, ::3] = 0
    return kernel * 0 if kind == "zero" else kernel


def dense(kernel, moment, importance):
    """By an eigendecomposition of all outputs' second moment (out, out)."""
    outputs = kernel @ kernel.T if moment is None else moment.between(kernel)
    values, vectors = torch.linalg.eigh((outputs + outputs.T) / 2)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    if importance is not None:
        values = values * ((importance @ vectors) * vectors).sum(dim=0)
    return torch.stack([values[rank:].sum() for rank in range(min(kernel.shape) + 1)])


@pytest.mark.parametrize("of_inputs", ["full", "few rows", "diagonal", "rounded", None])
@pytest.mark.parametrize("of_kernel", ["full", "low rank", "unused inputs"])
@pytest.mark.parametrize("out", [7, 12, 20, 600])
def test_losses_are_those_of_a_dense_decomposition(out, of_kernel, of_inputs):
    kernel = kernel_of(of_kernel, out)
    moment = of_inputs and moment_of(of_inputs)
    importance = importance_of(out)
    plain, none = nested_losses(kernel, moment)
    assert none is None
    both = nested_losses(kernel, moment, importance)
    pairs = [(plain, None), (both[0], None), (both[1], importance)]
    for found, weights in pairs:
        expected = dense(kernel, moment, weights)
        close = {"rtol": 1e-6, "atol": 1e-9 * float(expected[0])}
        torch.testing.assert_close(found, expected, **close)
        assert bool((found.diff() <= 0).all())


@pytest.mark.parametrize("weighted", [False, True])
def test_what_inputs_make_large_is_not_lost_in_round_off(weighted):
    """Where they vary most along inputs that the kernel hardly weighs."""
    turn, basis = torch.linalg.qr(gaussian(12, 12)).Q, torch.linalg.qr(gaussian(20, 12, seed=1)).Q
    lengths, kept = torch.logspace(0, -5, 12).double(), torch.linspace(3, 1, 12).double()
    kernel, moment = (basis * lengths) @ turn.T, SecondMoment(rows=(turn * kept / lengths).T)
    importance = importance_of(20) if weighted else torch.eye(20).double()
    counts = ((importance @ basis) * basis).sum(dim=0)
    squares = (kept.square() + moment.ridge * lengths.square()) * counts
    expected = torch.stack([squares[rank:].sum() for rank in range(13)])
    found = nested_losses(kernel, moment, importance if weighted else None)
    torch.testing.assert_close(found[int(weighted)], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("out", [7, 20])
def test_a_zero_kernel_loses_nothing(out):
    zero = kernel_of("zero", out)
    for losses in nested_losses(zero, moment_of("full"), importance_of(out)):
        assert not losses.any()
    assert not nested_losses(zero, moment_of("full"))[0].any()


@pytest.mark.parametrize("of_inputs", ["full", "few rows", "diagonal"])
@pytest.mark.parametrize("out", [7, 20])
def test_losses_are_those_of_the_fits(out, of_inputs):
    kernel, moment, importance = gaussian(out, 12), moment_of(of_inputs), importance_of(out)
    plain, weighted = nested_losses(kernel, moment, importance)
    for rank in range(min(out, 12) + 1):
        outputs = leading_outputs(kernel, moment, rank)
        gone = kernel - outputs @ outputs.T @ kernel
        least = 1e-8 * plain[0].item()
        assert plain[rank].item() == pytest.approx(moment.lost(gone), rel=1e-6, abs=least)
        # Errors along several principal components are uncorrelated, so that their losses add up.
        explicit = (importance @ moment.between(gone)).trace().item()
        least = 1e-8 * weighted[0].item()
        assert weighted[rank].item() == pytest.approx(explicit, rel=1e-6, abs=least)


@pytest.mark.parametrize("of_inputs", ["full", "few rows", "diagonal"])
def test_of_many_outputs_no_large_matrix_is_decomposed(of_inputs):
    kernel, moment = gaussian(600, 40).float(), moment_of(of_inputs, 40)
    with Recorded() as seen:
        nested_losses(kernel, moment)
        nested_losses(kernel, moment, importance_of(600))
    assert seen.decomposed == [40, 40]


@pytest.mark.parametrize(
    "shape, of_inputs",
    [((30_000, 128), kind) for kind in ("full", "few rows", "diagonal")]
    + [((128, 30_000), "diagonal")],
)
def test_of_a_large_kernel_no_copy_is_made_in_float64(shape, of_inputs):
    kernel, moment = torch.ones(shape).tril(), moment_of(of_inputs, shape[1])
    with Recorded() as seen:
        nested_losses(kernel, moment)
    assert seen.largest < kernel.numel() / 2
