import pytest
import torch

from tdecomp.linalg.spectrum import spectra, tails
from tdecomp.linalg.svd import frobenius_norm, leading_vectors
from tests.geometries import case


def matrix(rows, columns, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(300, 400), (40, 300), (300, 40), (7, 7), (1, 5), (5, 1)])
def test_leading_vectors_span_what_an_svd_finds(shape):
    for dtype, atol in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        for share in (0.01, 0.5, 1.0):
            with case(dtype, share):
                check_leading_vectors(shape, share, dtype, atol)


def check_leading_vectors(shape, share, dtype, atol):
    given = matrix(*shape, dtype)
    rank = max(1, int(share * min(shape)))
    vectors, outside = leading_vectors(given, rank)
    assert vectors.dtype == dtype
    s = torch.linalg.svdvals(given.double())
    # Orthonormal, and the power that they leave outside is the least.
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(rank, dtype=dtype), atol=atol, rtol=0)
    rest = given.double() - vectors.double() @ (vectors.double().T @ given.double())
    share = float((s[rank:] ** 2).sum() / (s**2).sum())
    assert float(rest.square().sum() / (s**2).sum()) == pytest.approx(share, abs=atol)
    assert outside == pytest.approx(share, abs=1e-7)


@pytest.mark.parametrize("rank", [3, 5, 8, 20])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_leading_vectors_of_a_low_rank_are_orthonormal_and_exact(shape, rank):
    given = (
        matrix(shape[0], 5) @ torch.diag(10.0 ** -torch.arange(5).double()) @ matrix(5, shape[1])
    )
    given /= given.norm()
    vectors, outside = leading_vectors(given, rank)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(rank).double(), atol=1e-12, rtol=0)
    lost = (given - vectors @ (vectors.T @ given)).norm()
    least = torch.linalg.svdvals(given)[rank:].norm()
    assert lost <= least + 1e-14
    assert outside == pytest.approx(float(least) ** 2, abs=1e-14)


@pytest.mark.parametrize("size", [5, 128, 129, 300])
def test_spectra_use_the_whole_matrix(size):
    given = matrix(size, size + 9, torch.float32)
    (found,) = spectra([[given]])
    expected = torch.linalg.svdvals(given.double() / float(given.abs().max())) ** 2
    torch.testing.assert_close(torch.from_numpy(found.squares[0]), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "dtype, scale", [(torch.float32, 1e-38), (torch.float32, 1e37), (torch.float64, 1e-200)]
)
def test_spectra_do_not_depend_on_the_scale(dtype, scale):
    given = matrix(6, 9, dtype)
    (plain,), (scaled,) = spectra([[given]]), spectra([[given * scale]])
    torch.testing.assert_close(
        torch.from_numpy(scaled.squares), torch.from_numpy(plain.squares), rtol=1e-4, atol=1e-6
    )


def test_spectra_are_by_unfolding_and_group():
    groups = [matrix(4, 6, seed=s) for s in range(3)]
    first, second = spectra([groups, [m.T for m in groups]])
    assert first.shape == (4, 6)
    assert second.shape == (6, 4)
    assert first.squares.shape == second.squares.shape == (3, 4)
    torch.testing.assert_close(torch.from_numpy(first.squares), torch.from_numpy(second.squares))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 4)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_tails_are_what_truncated_svds_lose(shape, scale):
    given = matrix(*shape) * scale
    squares = torch.linalg.svdvals(given) ** 2
    expected = torch.stack([squares[r:].sum() for r in range(min(shape) + 1)])
    torch.testing.assert_close(tails(given) / scale**2, expected / scale**2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e3])
def test_norms_at_usual_scales(dtype, scale):
    given = (matrix(4, 3) * scale).to(dtype)
    expected = given.double().norm().item()
    assert frobenius_norm(given) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "dtype, scale",
    [(torch.float32, 1e-40), (torch.float32, 1e-20), (torch.float32, 1e38),
     (torch.float64, 1e-300), (torch.float64, 1e300)],
)  # fmt: skip
def test_norms_whose_squares_leave_the_range(dtype, scale):
    given = torch.full((3, 3), scale, dtype=dtype)
    assert frobenius_norm(given) == pytest.approx(3 * float(given[0, 0]), rel=1e-6)


def test_norms_of_many_entries_keep_their_digits():
    given = matrix(512, 4608, torch.float32)
    assert frobenius_norm(given) == pytest.approx(given.double().norm().item(), rel=1e-6)


def test_a_norm_tells_what_is_not_finite():
    assert frobenius_norm(torch.tensor([1.0, float("nan")])) != frobenius_norm(torch.ones(2))
    assert not frobenius_norm(torch.tensor([1.0, float("inf")])) < float("inf")
