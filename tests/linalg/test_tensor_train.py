"""Tensor trains of matrices: what changes their cores and not their product, and fits."""

import pytest
import torch

from tdecomp.linalg.second_moment import SecondMoment
from tdecomp.linalg.tensor_train import balanced, in_product_norm, padded, swept
from tdecomp.linalg.tensorly_backend import tt_matrix, tt_svd
from tests.decomposers.oracle import distance

OUT, IN = (3, 2, 4), (2, 3, 2)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def train(ranks=(4, 5), seed=0):
    sizes = zip((1, *ranks), OUT, IN, (*ranks, 1), strict=True)
    return [drawn(*size, seed=seed + k) for k, size in enumerate(sizes)]


@pytest.mark.parametrize("ranks", [(1, 1), (4, 5), (9, 12)])
def test_balanced_cores_have_the_same_matrix_and_equal_norms(ranks):
    cores = train(ranks)
    cores[0] = 1e3 * cores[0]
    found = balanced(cores)
    assert [core.shape for core in found] == [core.shape for core in cores]
    assert distance(tt_matrix(found), tt_matrix(cores)) < 1e-12
    norms = [core.norm().item() for core in found]
    assert norms == pytest.approx([norms[0]] * 3)


def test_padded_cores_have_the_same_matrix():
    found = padded(train((2, 3)), (4, 6))
    assert [len(core) for core in found] == [1, 4, 6]
    assert distance(tt_matrix(found), tt_matrix(train((2, 3)))) < 1e-15


def test_in_the_norm_of_a_kronecker_product_two_cores_are_the_optimum():
    out, into, rank = (3, 4), (5, 2), 3
    kernel = drawn(12, 10)
    roots = [drawn(size, size, seed=size) for size in into]
    root = torch.kron(*roots)  # of the whole moment
    moment = SecondMoment(matrix=root @ root.T)
    cores = in_product_norm(kernel.reshape(*out, *into), moment, (rank,))
    white = (kernel @ root).reshape(*out, *into).permute(0, 2, 1, 3).reshape(15, 8)
    least = torch.linalg.svdvals(white)[rank:].square().sum().item()
    assert moment.lost(kernel - tt_matrix(cores)) == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("data", [False, True])
def test_each_sweep_loses_no_more(data):
    kernel, moment = drawn(24, 12), None
    if data:
        rows = drawn(40, 12, seed=1) @ drawn(12, 12, seed=2)
        moment = SecondMoment(matrix=rows.T @ rows)
    start = tt_svd(kernel.reshape(*OUT, *IN), (2, 3))

    def lost(cores):
        gone = kernel - tt_matrix(cores)
        return gone.square().sum().item() if moment is None else moment.lost(gone)

    losses = [lost(start), *(lost(swept(kernel, start, moment, n)) for n in (1, 2, 3, 5))]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 1.001 * losses[-1]


def test_samples_and_their_matrix_give_the_same_sweeps():
    kernel, rows = drawn(24, 12), drawn(30, 12, seed=1)
    start = tt_svd(kernel.reshape(*OUT, *IN), (2, 3))
    moments = SecondMoment(rows=rows), SecondMoment(matrix=rows.T @ rows)
    one, other = (tt_matrix(swept(kernel, start, moment, 3)) for moment in moments)
    assert distance(one, other) < 1e-6


def test_cores_that_would_take_too_long_stay_as_they_are():
    cores = [drawn(1, 2, 2, 4200), drawn(4200, 2, 2, 1)]
    kernel, moment = drawn(4, 4), SecondMoment(matrix=torch.eye(4).double())
    found = swept(kernel, cores, moment, 1)
    assert all(one is other for one, other in zip(found, cores, strict=True))
