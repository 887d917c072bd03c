"""The rank that empirical variational Bayes gives a matrix, from its singular values alone.

The model is V = B Aᵀ + noise. The variances of the noise and of the columns' Gaussian priors are
learnt, so that columns which do not pay are switched off. The global minimum is known in closed
form up to the noise variance. Names follow the papers: V has L rows and M ≥ L columns, α = L/M, and
γ₁ ≥ γ₂ ≥ … are its singular values.

.. [1] S. Nakajima, M. Sugiyama, S. D. Babacan, R. Tomioka, "Global analytic solution of
   fully-observed variational Bayesian matrix factorization", JMLR 14 (2013).
.. [2] S. Nakajima, R. Tomioka, M. Sugiyama, S. D. Babacan, "Perfect dimensionality recovery by
   variational Bayesian PCA", NIPS 25 (2012), and "Condition for perfect dimensionality recovery by
   variational Bayesian PCA", JMLR 16 (2015): threshold τ̲, shrinkage τ(x; α), objective Ω, bounds.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

Values = NDArray[np.float64]

# Squares computed in float64 are accurate to a few epsilons of the largest one (1 to 2 were seen in
# eigenvalues of Gram matrices of exact low rank, 64 × 64 to 512 × 4608).
_ROUND_OFF = 16 * float(np.finfo(np.float64).eps)
# Eigenvalues of float32 Gram matrices are not more negative than this, relative to the largest.
_NEGATIVE_TOLERANCE = 1e-5
# Newton's steps halve the error even at a double root, so these reach the last digit.
_MAX_STEPS = 60


@dataclass(frozen=True)
class EVBEstimate:
    """The empirical variational Bayes estimate for a matrix."""

    rank: int  # number of singular values above the threshold; may be 0
    noise_variance: float  # of one entry; 0.0 if only round-off is left beside the components


def evb_rank(squared_singular_values: np.ndarray, shape: tuple[int, int]) -> EVBEstimate:
    """Rank and noise variance of a matrix at the global minimum of the free energy [1, 2].

    Exact; O(L) memory, O(L²) operations at worst. The rank is less than L M / (L + M). A matrix of
    such an exact rank r gives (r, 0.0): without noise its free energy falls without bound. Drop
    dead (nearly zero) rows first: they would be taken for the noise, and all else for signal.

    The values γ² and the two sizes are in any order; missing values count as zero. Eigenvalues of
    the Gram matrix can be given; slightly negative ones show how large the round-off is.
    """
    short, long = sorted(shape)
    if short < 1:
        raise ValueError(f"shape: got {shape}, expected positive numbers of rows and columns")
    values = _checked_values(squared_singular_values, short)
    largest = float(values.max(initial=0.0))
    if largest == 0.0:
        return EVBEstimate(rank=0, noise_variance=0.0)
    # Everything below is relative to the largest value, so that nothing over- or underflows.
    relative = values / largest
    # Zero eigenvalues come out as ± round-off: the most negative one shows its size.
    round_off = max(_ROUND_OFF, -2.0 * float(relative.min()))
    spectrum = np.zeros(short)
    spectrum[: len(values)] = np.sort(np.maximum(relative, 0.0))[::-1]
    rank, variance = _minimise(_FreeEnergy(spectrum, long), round_off)
    return EVBEstimate(rank=rank, noise_variance=variance * (largest / long))


def _checked_values(given: np.ndarray, short: int) -> Values:
    values = np.asarray(given, dtype=np.float64)
    if values.ndim != 1 or len(values) > short:
        raise ValueError(
            f"squared singular values: got an array of shape {values.shape}, "
            f"expected one dimension with at most min(shape) = {short} values"
        )
    unusable = int(np.count_nonzero(~np.isfinite(values)))
    if unusable:
        raise ValueError(
            f"squared singular values: got {unusable} of {len(values)} NaN or infinite, "
            "expected finite numbers; look for NaN in the matrix itself"
        )
    lowest, highest = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    if lowest < -_NEGATIVE_TOLERANCE * highest:
        raise ValueError(
            f"squared singular values: got {lowest:.3g} beside a largest of {highest:.3g}, "
            "expected none below zero by more than round-off; are they squares?"
        )
    return values


@lru_cache(maxsize=1024)
def _threshold(alpha: float) -> float:
    """Smallest x = γ²/(Mσ²) whose component pays: (1 + τ̲)(1 + α/τ̲), with Φ(τ̲) + Φ(τ̲/α) = 0 [2]."""

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    # Φ falls, is positive at 2 and negative at 3, so for α ≤ 1 the sum is > 0 at 2α and < 0 at 3.
    tau = brentq(lambda t: phi(t) + phi(t / alpha), 2.0 * alpha, 3.0, xtol=1e-300, rtol=1e-15)
    return (1.0 + tau) * (1.0 + alpha / tau)


class _FreeEnergy:
    """Ω of [2], the free energy minimised over all but the noise variance v, as a function of v.

    Ω(v) = Σ ψ(u/v), with ψ(x) = x − log x + [x above the threshold] ψ₁(x),
    ψ₁(x) = log(1 + τ) + α log(1 + τ/α) − τ and x = (1 + τ)(1 + α/τ), τ ≥ √α.

    Here u = γ² in units of the largest and v = Mσ² in the same units. ``− log u`` is left out of
    each term: it is constant in v, and infinite for the zeros of a rank-deficient matrix.
    """

    def __init__(self, values: Values, long: int) -> None:
        self.values, self.long, self.alpha = values, long, len(values) / long  # (L,), descending
        # (L + 1,): sums of all but the first k, smallest added first so that none is lost.
        self.tails = np.append(np.cumsum(values[::-1])[::-1], 0.0)

    def at(self, variance: float, rank: int) -> tuple[float, float, float]:
        """Ω, dΩ/d(log v) and d²Ω/d(log v)² at v, with `rank` values above the threshold there.

        The slope is minus the sum of x ψ′(x): x − 1 below the threshold, and above it x − 1 − τ =
        α + α/τ, because ψ₁′ = −τ/x. The curvature uses dτ/dx = τ²/(τ² − α). Where a value crosses
        the threshold Ω is continuous and its slope jumps.
        """
        alpha, short = self.alpha, len(self.values)
        x, rest = self.values[:rank] / variance, float(self.tails[rank]) / variance
        excess = x - (1.0 + alpha)
        tau = 0.5 * (excess + np.sqrt(excess * excess - 4.0 * alpha))
        # x − τ written as 1 + α + α/τ: at small v both are huge and their difference is not.
        above = np.log1p(tau) + alpha * (np.log1p(tau / alpha) + 1.0 / tau)
        objective = short * math.log(variance) + rest + rank * (1.0 + alpha) + float(above.sum())
        slope = short - rank - rest - alpha * (rank + float((1.0 / tau).sum()))
        return objective, slope, rest - alpha * float((x / (tau * tau - alpha)).sum())


def _minimise(energy: _FreeEnergy, round_off: float) -> tuple[int, float]:
    """Rank and variance at the global minimum of Ω over the bounds of [2].

    Ω may have many local minima. None is where a value crosses the threshold: as v grows, the slope
    drops there (by τ̲). Between two such points there is at most one, which `_descend` finds.
    """
    values, long = energy.values, energy.long
    short = len(values)
    threshold = _threshold(energy.alpha)
    # A zero slope needs k + αk < L above the threshold: k ≤ ⌈L/(1 + α)⌉ − 1, in whole numbers.
    max_rank = (short * long - 1) // (short + long)
    highest = float(energy.tails[0]) / short
    mean_of_rest = float(energy.tails[max_rank]) / (short - max_rank)
    lowest = max(float(values[max_rank]) / threshold, mean_of_rest, round_off)
    rank = int(np.count_nonzero(values > threshold * lowest))
    if lowest == round_off and energy.at(lowest, rank)[1] > 0.0:
        # Still falling as v sinks into the round-off, where the other values cannot be told from
        # zeros; with zeros it falls as (L − k − αk) log v does, without bound.
        return rank, 0.0

    # One interval for each rank k: from where the next value would join to where the last one did.
    joins = values[: max_rank + 1] / threshold
    lows = np.maximum(joins, lowest).tolist()
    highs = np.minimum(np.append(math.inf, joins[:-1]), highest).tolist()
    candidates: list[tuple[float, int]] = []
    for k, (low, high) in enumerate(zip(lows, highs, strict=True)):
        if low < high:
            objective, slope, _ = energy.at(low, k)
            if slope < 0.0:
                # The slope only grows on the way to a minimum: Ω cannot fall faster than from here.
                candidates.append((objective + slope * math.log(high / low), k))

    best_rank, best_variance = int(np.count_nonzero(values > threshold * highest)), highest
    best = energy.at(highest, best_rank)[0]
    for bound, k in sorted(candidates):
        if bound > best:
            break
        variance = _descend(energy, k, lows[k], highs[k])
        if variance is not None and (objective := energy.at(variance, k)[0]) < best:
            best, best_rank, best_variance = objective, k, variance
    return best_rank, best_variance


def _descend(energy: _FreeEnergy, rank: int, low: float, high: float) -> float | None:
    """Variance of the local minimum of Ω between low and high, or None if there is none.

    Both terms of the curvature fall as v grows, so the slope is concave in log v: from a negative
    one, Newton's method climbs to the first zero and never jumps over it.
    """
    variance = low
    for _ in range(_MAX_STEPS):
        _, slope, curvature = energy.at(variance, rank)
        if slope >= 0.0:
            return variance
        # Turned down or out of the interval before the first zero: there is none inside.
        if curvature <= 0.0 or -slope / curvature >= math.log(high / variance):
            return None
        variance *= math.exp(-slope / curvature)
    return variance
