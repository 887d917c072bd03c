"""EVB against planted ranks, and against the variational Bayes that it solves in closed form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import multivariate_normal, norm

from tdecomp.linalg.evb import EVBEstimate, _FreeEnergy, _threshold, evb_rank
from tests.geometries import case


def by_svd(matrix):
    return np.linalg.svd(matrix, compute_uv=False) ** 2


def estimate(matrix):
    return evb_rank(by_svd(matrix), matrix.shape)


def planted(rng, shape, strengths, noise=1.0):
    """Orthonormal components of singular value strength · noise · √(longer side), plus noise."""
    left = np.linalg.qr(rng.normal(size=(shape[0], len(strengths))))[0]
    right = np.linalg.qr(rng.normal(size=(shape[1], len(strengths))))[0]
    sizes = np.asarray(strengths) * noise * np.sqrt(max(shape))
    return left * sizes @ right.T + noise * rng.normal(size=shape)


# Planted ranks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, rank",
    [
        ((60, 60), 3),
        ((100, 100), 10),
        ((64, 128), 8),
        ((300, 100), 15),
        ((40, 400), 12),
        ((32, 2000), 9),
    ],
)
def test_planted_rank_is_recovered_exactly(shape, rank):
    short, long = sorted(shape)
    threshold = _threshold(short / long)
    # Sufficient in the large-scale limit (Nakajima et al., NIPS 2012), and half as much again for
    # matrices as small as these.
    assert rank / short < 1 / threshold
    sufficient = (threshold - 1) / (1 - threshold * rank / short) - short / long
    for seed in range(5):
        rng = np.random.default_rng(seed)
        found = estimate(planted(rng, shape, [np.sqrt(1.5 * sufficient)] * rank, noise=0.3))
        with case(seed):
            assert found.rank == rank
            assert found.noise_variance == pytest.approx(0.09, rel=0.05)


@pytest.mark.parametrize("shape", [(50, 50), (64, 256), (20, 1000), (400, 100)])
def test_noise_alone_has_rank_zero(shape):
    for seed in range(5):
        matrix = 5.0 * np.random.default_rng(seed).normal(size=shape)
        found = estimate(matrix)
        with case(seed):
            assert found.rank == 0
            # All of the matrix is noise then.
            assert found.noise_variance == pytest.approx(np.mean(matrix**2))


# Brute force: variational Bayes as it is defined --------------------------------------------------
# V (L × M) = B Aᵀ + noise; q(A) has mean A (M × H) and one covariance for all rows, likewise q(B);
# a prior variance for each column of A and of B.


def twice_free_energy(V, A, cov_A, B, cov_B, prior_A, prior_B, noise):
    """Minus twice the evidence lower bound: expected misfit plus two Kullback-Leibler terms."""

    def twice_kl(mean, cov, prior):
        per_row = np.trace(cov / prior) - len(prior) + np.log(prior).sum()
        return len(mean) * (per_row - np.linalg.slogdet(cov)[1]) + (mean**2 / prior).sum()

    second_A, second_B = A.T @ A + len(A) * cov_A, B.T @ B + len(B) * cov_B
    misfit = (V**2).sum() - 2 * np.trace(V.T @ B @ A.T) + np.trace(second_A @ second_B)
    expected = V.size * np.log(2 * np.pi * noise) + misfit / noise
    return expected + twice_kl(A, cov_A, prior_A) + twice_kl(B, cov_B, prior_B)


def vb_sweep(V, A, cov_A, B, cov_B, prior_A, prior_B, noise):
    """Every unknown in turn to its optimum given the others."""

    def factor(data, other, cov_other, prior):
        precision = (other.T @ other + len(other) * cov_other) / noise + np.diag(1 / prior)
        cov = np.linalg.inv(precision)
        return data @ other @ cov / noise, cov

    A, cov_A = factor(V.T, B, cov_B, prior_A)
    B, cov_B = factor(V, A, cov_A, prior_B)
    prior_A = (A**2).mean(0) + np.diag(cov_A)
    prior_B = (B**2).mean(0) + np.diag(cov_B)
    second_A, second_B = A.T @ A + len(A) * cov_A, B.T @ B + len(B) * cov_B
    misfit = (V**2).sum() - 2 * np.trace(V.T @ B @ A.T) + np.trace(second_A @ second_B)
    return A, cov_A, B, cov_B, prior_A, prior_B, misfit / V.size


def vb_start(A, B, noise):
    columns = A.shape[1]
    unit, ones = np.eye(columns), np.ones(columns)
    return A, unit, B, unit, ones, ones, noise


def vb_starts(rng, V):
    """Every number of columns, from the singular vectors and from random ones, noise low to high.

    The singular vectors are there because turning two columns against each other is slow.
    """
    U, sizes, Wt = np.linalg.svd(V, full_matrices=False)
    for columns in range(len(sizes) + 1):
        half = np.sqrt(sizes[:columns])
        for noise in (V**2).mean() * np.array([0.01, 0.3]):
            yield vb_start(Wt[:columns].T * half, U[:, :columns] * half, noise)
            A, B = (rng.normal(size=(n, columns)) for n in reversed(V.shape))
            yield vb_start(A, B, noise)


def test_free_energy_is_the_expectation_that_defines_it():
    rng = np.random.default_rng(0)
    V = rng.normal(size=(2, 3))
    A, B = rng.normal(size=(3, 2)), rng.normal(size=(2, 2))
    cov_A, cov_B = np.array([[0.5, 0.2], [0.2, 0.4]]), np.array([[0.3, -0.1], [-0.1, 0.6]])
    prior_A, prior_B, noise = np.array([0.7, 1.3]), np.array([2.0, 0.4]), 0.8
    q_A, q_B = (
        [multivariate_normal(row, cov) for row in mean] for mean, cov in ((A, cov_A), (B, cov_B))
    )
    draws_A = np.stack([q.rvs(200_000, random_state=rng) for q in q_A], axis=1)
    draws_B = np.stack([q.rvs(200_000, random_state=rng) for q in q_B], axis=1)

    log_q = sum(q.logpdf(draws_A[:, i]) for i, q in enumerate(q_A))
    log_q = log_q + sum(q.logpdf(draws_B[:, i]) for i, q in enumerate(q_B))
    log_p = norm.logpdf(V, draws_B @ draws_A.transpose(0, 2, 1), np.sqrt(noise)).sum((1, 2))
    log_p += norm.logpdf(draws_A, 0, np.sqrt(prior_A)).sum((1, 2))
    log_p += norm.logpdf(draws_B, 0, np.sqrt(prior_B)).sum((1, 2))

    sampled = 2 * (log_q - log_p)
    exact = twice_free_energy(V, A, cov_A, B, cov_B, prior_A, prior_B, noise)
    assert exact == pytest.approx(sampled.mean(), abs=4 * sampled.std() / np.sqrt(len(sampled)))


def component_gain(gamma_squared_over_noise, short, long):
    """What one component adds to twice the free energy, at best; 0 where it is better left out.

    Vectorised sweeps over one component's mean and variances, in units where the noise is 1.
    """
    gamma = np.sqrt(gamma_squared_over_noise)
    a = b = np.sqrt(gamma)
    var_a = var_b = prior_a = prior_b = np.ones_like(gamma)
    for _ in range(2000):
        var_a = 1 / (b**2 + short * var_b + 1 / prior_a)
        a = gamma * b * var_a
        var_b = 1 / (a**2 + long * var_a + 1 / prior_b)
        b = gamma * a * var_b
        prior_a, prior_b = a**2 / long + var_a, b**2 / short + var_b
    kl = long * np.log(prior_a / var_a) + short * np.log(prior_b / var_b)
    misfit = (a**2 + long * var_a) * (b**2 + short * var_b) - 2 * gamma * a * b
    return np.minimum(kl + misfit, 0.0)


def brute_objective(squared, short, long, noise):
    """Twice the free energy, minimised over all but the noise variances given; and the ranks."""
    noise = np.atleast_1d(noise)
    gains = component_gain(squared / noise[:, None], short, long)
    whole = short * long * np.log(2 * np.pi * noise) + squared.sum() / noise
    return whole + gains.sum(1), (gains < 0).sum(1)


def brute_minimum(squared, short, long):
    """Minimum over the noise variance: a grid over six decades, then ever finer ones around it."""
    centre, width = squared.mean() / long, 1e3
    for _ in range(7):
        grid = centre * np.geomspace(1 / width, width, 241)
        objective, ranks = brute_objective(squared, short, long, grid)
        best = int(objective.argmin())
        centre, width = grid[best], width ** (1 / 30)
    return objective[best], int(ranks[best]), centre


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (5, 10), (3, 30), (2, 500)])
def test_component_pays_from_the_threshold_on(shape):
    short, long = shape
    threshold = long * _threshold(short / long)
    below, above = component_gain(threshold * np.array([1 - 1e-4, 1 + 1e-4]), short, long)
    assert below == 0.0
    assert above < 0.0


SMALL = [  # shape, planted strengths, seed; the ranks found run from 0 to the largest possible
    ((3, 3), [60], 0),
    ((4, 6), [2], 1),
    ((4, 6), [5, 1.5], 2),
    ((5, 5), [12, 12], 3),
    ((6, 8), [40, 5, 2], 4),
    ((6, 8), [6, 6, 6], 5),
    ((5, 20), [3, 1.6], 6),
    ((5, 20), [60, 50, 40], 7),
    ((8, 60), [9, 7, 5, 4, 3, 2], 8),
    ((7, 9), [], 9),
    ((1, 9), [3], 10),
]


@pytest.mark.parametrize("shape, strengths, seed", SMALL)
def test_agrees_with_brute_force_component_by_component(shape, strengths, seed):
    matrix = planted(np.random.default_rng(seed), shape, strengths)
    squared = by_svd(matrix)

    objective, brute_rank, noise = brute_minimum(squared, *shape)
    found = evb_rank(squared, shape)

    assert found.rank == brute_rank
    assert found.noise_variance == pytest.approx(noise, rel=1e-4)
    assert brute_objective(squared, *shape, found.noise_variance)[0] <= objective + 1e-6


def test_free_energy_of_exact_rank_falls_or_grows_without_noise():
    # L M / (L + M) = 2.4: rank 2 is found as it is, of rank 3 a part is taken for noise.
    vanishing = np.array([1e-6, 1e-8, 1e-10])
    two, three = np.array([3.0, 2.0, 0.0, 0.0]), np.array([4.0, 3.0, 2.0, 0.0])
    assert (np.diff(brute_objective(two, 4, 6, vanishing)[0]) < -1).all()
    assert evb_rank(two, (4, 6)) == EVBEstimate(2, 0.0)
    assert (np.diff(brute_objective(three, 4, 6, vanishing)[0]) > 1).all()
    assert evb_rank(three, (4, 6)).noise_variance > 0.1


@pytest.mark.parametrize("shape, strengths, seed", SMALL)
def test_objective_is_the_free_energy_at_every_noise_variance(shape, strengths, seed):
    matrix = planted(np.random.default_rng(seed), shape, strengths)
    squared = by_svd(matrix)
    short, long = shape
    noise = squared.mean() / long * np.geomspace(1e-3, 10, 60)

    energy, unit = _FreeEnergy(squared / squared[0], long), squared[0] / long
    closed = [
        energy.at(v, int((energy.values > _threshold(short / long) * v).sum()))[0]
        for v in noise / unit
    ]

    # The closed form counts in units of M and of the largest value.
    closed = long * np.array(closed) + short * long * np.log(2 * np.pi * unit)
    np.testing.assert_allclose(closed, brute_objective(squared, *shape, noise)[0], atol=1e-6)


@pytest.mark.parametrize("shape, strengths, seed", SMALL[1:8])
def test_agrees_with_variational_bayes_run_on_the_matrix(shape, strengths, seed):
    rng = np.random.default_rng(seed)
    V = planted(rng, shape, strengths)
    ends = []
    for state in vb_starts(rng, V):
        before = np.inf
        for _ in range(10):
            for _ in range(40):
                state = vb_sweep(V, *state)
            now = twice_free_energy(V, *state)
            assert now <= before + 1e-9  # or the sweeps are not those of this free energy
            before = now
        sizes = np.linalg.norm(state[0], axis=0) * np.linalg.norm(state[2], axis=0)
        ends.append((now, int((sizes > 1e-3).sum()), state[-1]))
    lowest, rank, noise = min(ends)

    found = estimate(V)
    assert rank == found.rank
    assert noise == pytest.approx(found.noise_variance, rel=1e-4)
    assert lowest == pytest.approx(brute_objective(by_svd(V), *shape, found.noise_variance)[0][0])


# The search ---------------------------------------------------------------------------------------

spectra = st.tuples(st.integers(1, 12), st.integers(0, 30)).flatmap(
    lambda sides: st.tuples(
        arrays(
            np.float64,
            sides[0],
            # Over many decades, and with exact zeros and ties among them.
            elements=st.one_of(st.just(0.0), st.just(1.0), st.floats(-6, 3).map(lambda p: 10.0**p)),
        ),
        st.just((sides[0], sides[0] + sides[1])),
    )
)
every_spectrum = settings(max_examples=150, derandomize=True, deadline=None)


def assert_no_noise_variance_is_better(squared, shape, points):
    short, long = shape
    found = evb_rank(squared, shape)
    assert found.rank <= short * long / (short + long)
    energy = _FreeEnergy(np.sort(squared)[::-1] / squared.max(), long)
    unit = squared.max() / long

    def objective(variance):
        rank = int((energy.values > _threshold(short / long) * variance).sum())
        return energy.at(variance, rank)[0], rank

    if found.noise_variance == 0.0:
        assert found.rank == np.count_nonzero(squared)
        falling = [objective(variance)[0] for variance in (1e-20, 1e-60, 1e-120)]
        assert falling[0] > falling[1] > falling[2]
    else:
        value, rank = objective(found.noise_variance / unit)
        assert rank == found.rank
        lowest = min(objective(variance)[0] for variance in np.geomspace(1e-12, 2.0, points))
        assert value <= lowest + 1e-9 * abs(lowest)


@every_spectrum
@given(spectra)
def test_no_noise_variance_on_a_dense_grid_is_better(spectrum):
    squared, shape = spectrum
    if squared.any():
        assert_no_noise_variance_is_better(squared, shape, points=600)


@pytest.mark.parametrize("long", [200, 1800])
@pytest.mark.parametrize(
    "squared",
    [
        np.arange(1.0, 201) ** -1,
        np.arange(1.0, 201) ** -2,
        np.exp(-np.arange(200) / 10),
        np.random.default_rng(0).random(200) ** 8,
        np.random.default_rng(1).lognormal(sigma=2, size=200),
        np.r_[np.linspace(9, 5, 20), np.linspace(0.5, 1.5, 180)],
    ],
)
def test_no_noise_variance_on_a_dense_grid_is_better_for_long_spectra(squared, long):
    assert_no_noise_variance_is_better(squared, (200, long), points=3000)


@every_spectrum
@given(spectra, st.randoms(use_true_random=False), st.integers(-200, 200))
def test_depends_on_neither_order_nor_side_nor_scale(spectrum, random, power):
    squared, shape = spectrum
    found = evb_rank(squared, shape)
    shuffled = squared.copy()
    random.shuffle(shuffled)
    assert evb_rank(shuffled, shape) == found
    assert evb_rank(squared, shape[::-1]) == found
    # A power of two rounds nothing, so that equal is equal.
    scaled = evb_rank(squared * 2.0**power, shape)
    assert scaled == EVBEstimate(found.rank, found.noise_variance * 2.0**power)


@every_spectrum
@given(spectra)
def test_missing_values_are_zeros(spectrum):
    squared, shape = spectrum
    assert evb_rank(squared[squared > 0], shape) == evb_rank(squared, shape)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales(scale):
    matrix = planted(np.random.default_rng(0), (30, 50), [20, 10, 5])
    plain, scaled = estimate(matrix), estimate(scale * matrix)
    assert scaled.rank == plain.rank == 3
    assert scaled.noise_variance == pytest.approx(scale**2 * plain.noise_variance)


# Edges --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 4)])
def test_zero_matrix(shape):
    assert evb_rank(np.zeros(min(shape)), shape) == EVBEstimate(0, 0.0)
    assert evb_rank(np.array([]), shape) == EVBEstimate(0, 0.0)


@pytest.mark.parametrize("columns", [1, 2, 1000])
def test_one_row_is_all_noise(columns):
    # One component would need as many numbers as there are entries.
    found = evb_rank(np.array([7.0]), (1, columns))
    assert found == EVBEstimate(0, pytest.approx(7.0 / columns))


def test_equal_singular_values_are_all_noise():
    assert evb_rank(np.full(6, 9.0), (6, 6)) == EVBEstimate(0, pytest.approx(1.5))


def by_gram(matrix):
    return np.linalg.eigvalsh(matrix @ matrix.T)


ROUTES = {  # to the same singular values, each with its own round-off where the zeros should be
    "svd": by_svd,
    "gram": by_gram,
    "gram, clipped": lambda matrix: np.maximum(by_gram(matrix), 0.0),
    "float32 svd": lambda matrix: by_svd(matrix.astype(np.float32)),
    "float32 gram": lambda matrix: by_gram(matrix.astype(np.float32)),
}


@pytest.mark.parametrize(
    "shape, rank", [((64, 64), 4), ((30, 30), 14), ((100, 1000), 50), ((40, 400), 36)]
)
def test_exactly_low_rank_matrix_has_that_rank_and_next_to_no_noise(shape, rank):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    for route, values_of in ROUTES.items():
        squared = values_of(matrix)
        found = evb_rank(squared, shape)
        with case(route):
            assert found.rank == rank
            assert found.noise_variance <= 1e-6 * squared.max() / max(shape)


def test_noise_may_sink_into_the_round_off():
    for decades in np.arange(4, 10, 0.25):
        matrix = planted(np.random.default_rng(0), (50, 60), np.array([3, 2, 1]) * 10**decades)
        found = estimate(matrix)
        with case(decades):
            assert found.rank == 3
            assert found.noise_variance in (0.0, pytest.approx(1.0, rel=0.1))


def test_larger_exact_rank_is_partly_noise():
    # From r = L M / (L + M) the free energy grows again as the noise variance goes to zero.
    squared = np.r_[np.linspace(2, 1, 15), np.zeros(15)]
    found = evb_rank(squared, (30, 30))
    assert found.rank == 0
    assert found.noise_variance == pytest.approx(squared.sum() / 900)
    assert evb_rank(squared[:-1], (29, 30)).rank == 0
    assert evb_rank(squared[1:], (29, 30)) == EVBEstimate(14, 0.0)


@pytest.mark.parametrize(
    "squared, shape, message",
    [
        ([1.0, np.nan], (2, 3), "1 of 2 NaN"),
        ([np.inf, 1.0], (2, 3), "1 of 2 NaN or infinite"),
        ([1.0, -0.1], (2, 3), "got -0.1"),
        ([-1.0], (1, 1), "got -1"),
        ([3.0, 2.0, 1.0], (2, 3), "at most min.shape. = 2"),
        ([[1.0]], (2, 3), "one dimension"),
        ([1.0], (0, 3), "positive"),
    ],
)
def test_unusable_input_is_refused(squared, shape, message):
    with pytest.raises(ValueError, match=message):
        evb_rank(np.array(squared), shape)
