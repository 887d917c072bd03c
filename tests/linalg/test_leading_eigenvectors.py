"""The leading eigenvectors of large symmetric matrices, against all of them."""

import pytest
import torch

from tdecomp.linalg.leading_eigenvectors import leading_eigenvectors

SIZE = 1100  # large enough for a part of the eigenvectors to be found alone


def symmetric(spectrum, seed=0):
    """A matrix with these eigenvalues, and garbage above its diagonal."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator).double()).Q
    matrix = (basis * spectrum) @ basis.T
    matrix = (matrix + matrix.T) / 2
    return matrix, matrix.tril() + torch.full_like(matrix, 7.0).triu(1)


SPECTRA = {
    "flat": torch.linspace(1.0, 2.0, SIZE).double(),
    "steep": torch.logspace(0, -14, SIZE).double(),
    "low rank": torch.cat([torch.ones(9), torch.zeros(SIZE - 9)]).double(),
    "pairs": torch.arange(SIZE).div(2, rounding_mode="floor").double(),
}


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
def test_no_vectors_keep_more(spectrum):
    matrix, lower = symmetric(spectrum)
    rank = 200
    found = leading_eigenvectors(lower.clone(), rank)
    assert found.shape == (SIZE, rank)
    assert (found.T @ found - torch.eye(rank).double()).abs().max() < 1e-9
    best = spectrum.sort().values.flip(0)[:rank]
    kept = ((matrix @ found) * found).sum(dim=0)
    assert torch.allclose(kept, best, rtol=0, atol=1e-12 * float(best[0]))


def test_the_lower_triangle_stays():
    _, lower = symmetric(SPECTRA["flat"])
    given = lower.clone()
    leading_eigenvectors(given, 8)
    assert torch.equal(given.tril(), lower.tril())


def test_the_same_at_any_number_of_threads():
    _, lower = symmetric(SPECTRA["flat"])
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(leading_eigenvectors(lower.clone(), 8))
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-12)


def test_numbers_that_are_not_finite_are_seen_in_the_result():
    _, lower = symmetric(SPECTRA["flat"])
    lower[5, 3] = torch.nan
    assert leading_eigenvectors(lower, 8).isnan().any()
