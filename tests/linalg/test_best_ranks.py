"""Ranks that lose least together: their order by gain and cost, and their losses by pairs."""

import itertools

import pytest
import torch

from tdecomp.linalg.best_ranks import best_ranks, diagonal_blocks
from tdecomp.linalg.second_moment import SecondMoment


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def diagonal(*values):
    """A square matrix with these singular values."""
    return torch.diag(torch.tensor(values).double())


def test_the_largest_singular_value_of_all_comes_next():
    parts = diagonal(9.0, 4.0, 1.0), diagonal(8.0, 5.0, 2.0)
    best = best_ranks(parts, None, None, (1, 1))
    assert best.ranks == ((1, 1), (1, 2), (2, 2), (2, 3), (3, 3))
    lost = [best.lost(ranks) for ranks in best.ranks]
    assert lost == pytest.approx([16 + 1 + 25 + 4, 16 + 1 + 4, 1 + 4, 1, 0])


def test_a_rank_of_more_outputs_costs_more():
    parts = torch.cat([diagonal(9.0, 4.0), torch.zeros(8, 2).double()]), diagonal(8.0, 3.0)
    best = best_ranks(parts, None, None, (1, 1))  # 16 / (2 + 10) is less than 9 / (2 + 2)
    assert best.ranks == ((1, 1), (1, 2), (2, 2))


def test_ranks_are_multiples_of_steps():
    best = best_ranks((diagonal(9.0, 4.0, 3.0, 3.0, 1.0), diagonal(5.0, 5.0)), None, None, (2, 1))
    assert best.ranks == ((2, 1), (2, 2), (4, 2))
    assert best_ranks((diagonal(9.0, 4.0), diagonal(5.0)), None, None, (2, 1)).ranks == ((2, 1),)


@pytest.mark.parametrize("by_data", [False, True])
@pytest.mark.parametrize("steps", [(1, 1, 1), (2, 1, 3)])
def test_weighted_losses_are_those_of_the_whole_difference(by_data, steps):
    parts = [gaussian(out, 5, seed=out) for out in (4, 7, 3)]
    moment = SecondMoment(rows=gaussian(20, 5)) if by_data else None
    seen = gaussian(20, 5).T @ gaussian(20, 5) if by_data else torch.eye(5).double()
    root = gaussian(14, 14, seed=9)
    importance = root @ root.T
    best = best_ranks(parts, moment, importance, steps)
    assert best.ranks[0] == steps
    for ranks, weighted in zip(best.ranks, best.weighted.tolist(), strict=True):
        gone = []
        for part, rank in zip(parts, ranks, strict=True):
            vectors = torch.linalg.eigh(part @ seen @ part.T).eigenvectors.flip(1)[:, :rank]
            gone.append(part - vectors @ vectors.T @ part)
        lost = torch.cat(gone) @ seen @ torch.cat(gone).T
        assert weighted == pytest.approx((importance * lost).sum().item(), rel=1e-8, abs=1e-7)
        assert best.lost(ranks) == pytest.approx(lost.trace().item(), rel=1e-8, abs=1e-7)


def test_what_matters_is_reached_through_what_does_not():
    # The second direction of the first part matters most, but only comes with the ones before it.
    parts = diagonal(4.0, 3.9, 3.8), diagonal(3.0, 2.9, 2.8)
    importance = torch.eye(6).double()
    importance[1, 1], importance[2, 2] = 0.0, 100.0
    best = best_ranks(parts, None, importance, (1, 1))
    assert best.ranks[:3] == ((1, 1), (2, 1), (3, 1))
    falling = best.weighted.tolist()
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(falling))


def test_outputs_that_hardly_count_come_last():
    parts = diagonal(4.0, 3.0, 2.0), diagonal(4.0, 3.0, 2.0)
    importance = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.01, 0.01, 0.01])).double()
    assert best_ranks(parts, None, importance, (1, 1)).ranks[2] == (3, 1)


def test_blocks_on_the_diagonal():
    matrix = gaussian(6, 6)
    first, second = diagonal_blocks(matrix, (2, 4))
    assert torch.equal(first, matrix[:2, :2])
    assert torch.equal(second, matrix[2:, 2:])
