"""Kernels in coordinates of their column spaces: every product of their outputs is the same."""

import pytest
import torch

from tdecomp.linalg.column_space import in_column_spaces


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("rank", [8, 3])
def test_outputs_are_as_long_as_before(rank):
    tall, wide = gaussian(20, rank) @ gaussian(rank, 8, seed=1), gaussian(5, 8)
    (triangle, same), none = in_column_spaces([tall, wide])
    assert none is None
    assert triangle.shape == (8, 8)
    assert not triangle.tril(-1).any()
    torch.testing.assert_close(triangle.T @ triangle, tall.T @ tall)
    assert same is wide


@pytest.mark.parametrize("sizes", [(20, 5), (600, 3, 600), (8, 600)])
@pytest.mark.parametrize("fan_in", [8, 700])
@pytest.mark.parametrize("read", ["whole", "below the diagonal"])
def test_the_importance_is_that_of_the_same_outputs(sizes, fan_in, read):
    kernels = [gaussian(out, fan_in, seed=out + i) for i, out in enumerate(sizes)]
    root, inputs = gaussian(sum(sizes), sum(sizes), seed=1), gaussian(fan_in, 2)
    importance = root @ root.T
    given = importance.tril() if read != "whole" and fan_in < max(sizes) else importance
    inner, seen = in_column_spaces(kernels, given)
    outputs, same = torch.cat(kernels) @ inputs, torch.cat(inner) @ inputs
    assert len(same) == sum(min(kernel.shape) for kernel in kernels)
    torch.testing.assert_close(same.T @ seen @ same, outputs.T @ importance @ outputs)
    torch.testing.assert_close(seen, seen.T)


def test_all_digits_of_an_ill_conditioned_kernel_are_kept():
    turn, basis = torch.linalg.qr(gaussian(8, 8)).Q, torch.linalg.qr(gaussian(20, 8)).Q
    lengths = torch.logspace(0, -6, 8).double()
    (triangle,), _ = in_column_spaces([(basis * lengths) @ turn.T])
    torch.testing.assert_close(torch.linalg.svdvals(triangle), lengths, rtol=1e-9, atol=0)
