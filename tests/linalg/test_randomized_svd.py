from functools import partial

import pytest
import torch

from tdecomp.linalg.randomized_svd import randomized_vectors
from tdecomp.linalg.svd import truncated_svd
from tests.geometries import case

# With sides from which on a sketch is made that are small enough for a test.
sketched = partial(randomized_vectors, smallest_side=200)


def matrix(rows, columns, slope, seed=0):
    """Singular values 1, 2^-slope, 3^-slope …, in float32."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(columns, rows, generator=generator)).Q
    return (u * torch.arange(1.0, rows + 1) ** -slope) @ v.T


def lost(given, u):
    return (given.double() - u.double() @ (u.double().T @ given.double())).norm().item()


@pytest.mark.parametrize("slope", [0.1, 0.5, 1.0, 1.5])
def test_as_good_as_an_svd(slope):
    for shape in ((200, 300), (200, 200)):
        given = matrix(*shape, slope)
        values = torch.linalg.svdvals(given.double())
        for rank in (1, 10, 25):
            with case(shape, rank):
                u = sketched(given, rank)
                assert u.shape == (shape[0], rank)
                torch.testing.assert_close(u.T @ u, torch.eye(rank), atol=1e-5, rtol=0)
                assert lost(given, u) <= 1.002 * values[rank:].norm().item()


@pytest.mark.parametrize("rank", [1, 20])
def test_a_planted_rank_is_found(rank):
    given = matrix(200, 300, 0.5)
    u, s, vh = torch.linalg.svd(given)
    given = (u[:, :rank] * s[:rank]) @ vh[:rank]
    found = truncated_svd(given, rank, randomized=sketched)
    assert ((found[0] * found[1]) @ found[2] - given).norm() <= 1e-5 * given.norm()


def test_left_to_others():
    given = matrix(200, 300, 0.5)
    assert sketched(given, 26) is None
    assert sketched(given[:199], 10) is None
    assert sketched(given.double(), 10) is None
    # Losses of which float32 tells too little to check them.
    assert sketched(given[:, :1] @ torch.ones(1, 300), 20) is None
    assert sketched(matrix(200, 300, 3.0), 25) is None
    assert sketched(torch.zeros(200, 300), 3) is None


def test_without_convergence_it_is_computed_exactly():
    given = matrix(200, 300, 0.1)
    hasty = partial(sketched, max_passes=2)
    assert hasty(given, 20) is None
    u, s, vh = truncated_svd(given, 20, randomized=hasty)
    best = torch.linalg.svdvals(given.double())[20:].norm().item()
    assert ((u * s) @ vh - given).double().norm().item() == pytest.approx(best, rel=1e-6)


def test_small_matrices_are_left_to_others_by_default():
    assert randomized_vectors(matrix(200, 300, 0.5), 10) is None
    assert randomized_vectors(torch.ones(1024, 1023), 10) is None


def test_the_same_each_time_and_whatever_the_global_seed():
    given = matrix(200, 300, 0.5)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = sketched(given, 10)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        assert torch.equal(sketched(given, 10), first)
        assert torch.equal(torch.get_rng_state(), state)


def test_tall_matrices_are_sketched_too():
    shapes = []

    def seen(matrix, rank):
        shapes.append(tuple(matrix.shape))
        return sketched(matrix, rank)

    given = matrix(200, 300, 0.5)
    u, s, vh = truncated_svd(given.T, 10, randomized=seen)
    assert shapes == [(200, 300)]
    assert (u.shape, s.shape, vh.shape) == ((300, 10), (10,), (10, 200))
    assert ((u * s) @ vh - given.T).norm() <= 1.002 * torch.linalg.svdvals(given)[10:].norm()
