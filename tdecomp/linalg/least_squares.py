"""Nonlinear least squares in which one factor is linear, and eliminated (variable projection).

Golub and Pereyra 1973, "The differentiation of pseudo-inverses and nonlinear least squares problems
whose variables separate".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from tdecomp.linalg.cholesky import triangle_of
from tdecomp.linalg.features import Features, Metric
from tdecomp.linalg.lbfgs import minimise
from tdecomp.linalg.leading_eigenvectors import leading_eigenvectors
from tdecomp.linalg.second_moment import SecondMoment, is_wide

# On the normal equations of the eliminated factor, whose columns may be nearly dependent: a share
# of their diagonal.
_RIDGES = {torch.float32: 1e-6, torch.float64: 1e-9}
# On the metrics of the parameters: of their rows, the inputs, and of their columns.
_LEFT_RIDGE, _RIGHT_RIDGE = 1e-6, 1e-4
# A share of the power that single precision still resolves to a hundredth.
_RESOLVED = 1e-4
# A fit ends where an iteration gains less than this share of what is lost: earlier where an
# iteration takes long, and in a draft.
_GAIN, _DRAFT_GAIN = 3e-4, 1e-2


class SeparableFit:
    """``K ≈ A P(θ)ᵀ`` in the norm of a moment, as a problem in θ alone: A is the best one for it.

    The kernel K is (out, fan_in), A is (out, features) and has at most the given rank.
    """

    def __init__(
        self, kernel: Tensor, moment: SecondMoment, features: Features, rank: int | None = None
    ) -> None:
        self._kernel, self._moment, self._features, self._rank = kernel, moment, features, rank

    def minimise(
        self, start: Sequence[Tensor], *, n_iter_max: int, tol: float, draft: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """The best A and θ that L-BFGS finds from a first θ.

        It stops when the share of the output that is lost changes by less than `tol`. Wide layers
        are fitted in single precision as far as that resolves the loss.
        """
        theta = [part.detach() for part in start]
        wide = is_wide(self._kernel.shape[1])
        share = _DRAFT_GAIN if draft else _GAIN
        for dtype in (torch.float32, torch.float64) if wide else (torch.float64,):
            problem, theta = self.eliminated(dtype), [part.to(dtype) for part in theta]
            theta, lost = problem.descend(theta, n_iter_max=n_iter_max, tol=tol, share=share)
            if dtype == torch.float64 or lost > _RESOLVED:
                break
        return problem.at(theta).factor.double(), [part.double() for part in theta]

    def eliminated(self, dtype: torch.dtype) -> "Eliminated":
        """The problem in θ alone, in this precision."""
        ordered = self._features.ordered
        moment = self._moment.normalised(dtype).reordered(ordered)
        return Eliminated(ordered(self._kernel.to(dtype), 1), moment, self._features, self._rank)


@dataclass(frozen=True)
class _Best:
    """The best A for some features, and what is known there."""

    factor: Tensor  # (out, features)
    lost: float  # the share of the output's power
    seen: Tensor  # G P (fan_in, features), or of samples their features (samples, features)
    parts: Sequence[Tensor]  # of P; see `Features`

    @cached_property
    def gram(self) -> Tensor:
        return self.factor.T @ self.factor


class Eliminated:
    """What is lost at the best A, as a function of θ."""

    def __init__(
        self, kernel: Tensor, moment: SecondMoment, features: Features, rank: int | None
    ) -> None:
        self._moment, self._features, self._rank = moment, features, rank
        self._target = moment.applied(kernel)  # (out, fan_in)
        self._power = float((self._target * kernel).sum())

    def descend(
        self, theta: Sequence[Tensor], *, n_iter_max: int, tol: float, share: float
    ) -> tuple[list[Tensor], float]:
        """Better parameters, and the share of the power that is lost at the best A for them."""
        if not self._power > 0 or not n_iter_max:
            return [*theta], 0.0
        scales = self._scales(theta)
        sizes = [part.numel() for part in theta]

        def parts(vector: Tensor) -> list[Tensor]:
            pieces = vector.split(sizes)
            return [
                scale.outwards(piece.reshape(part.shape))
                for scale, piece, part in zip(scales, pieces, theta, strict=True)
            ]

        def function(vector: Tensor) -> tuple[float, Tensor]:
            given = parts(vector)
            best = self.at(given)
            slopes = zip(scales, self.slopes(best), strict=True)
            return best.lost, torch.cat([scale.slope(s).flatten() for scale, s in slopes])

        inwards = zip(scales, theta, strict=True)
        start = torch.cat([scale.inwards(part).flatten() for scale, part in inwards])
        found, lost = minimise(function, start, n_iter_max=n_iter_max, tol=tol, share=share)
        return parts(found), lost

    def _scales(self, theta: Sequence[Tensor]) -> list["_Scale"]:
        """Variables in which the loss is about as curved along each direction as along others.

        The metrics are the factors of a Gauss-Newton matrix as if it were a Kronecker product
        (Martens and Grosse 2015, who approximate that of a neural network so).
        """
        metrics = self._features.metrics(theta, self.at(theta).gram, self._moment)
        return [_Scale(metric, (self._power / 2) ** 0.5) for metric in metrics]

    def at(self, theta: Sequence[Tensor]) -> _Best:
        """The best A for these features."""
        parts, samples = self._features.parts(theta), self._moment.rows
        project = partial(self._features.project, parts=parts)
        if samples is None:
            assert self._moment.matrix is not None
            seen = project(self._moment.matrix)  # G P
            normal = project(seen.T)  # Pᵀ G P
        else:
            seen = project(samples)
            normal = seen.T @ seen
            if self._moment.added:
                itself = self._features.spread(torch.eye(len(normal)).to(normal), parts)  # P
                normal = normal + self._moment.added * project(itself.T)
        if not self._power > 0:
            return _Best(seen.new_zeros(len(self._target), seen.shape[1]), 0.0, seen, parts)
        triangle = triangle_of(normal, _RIDGES[seen.dtype])
        projected = project(self._target).T  # (features, out)
        whitened = torch.linalg.solve_triangular(triangle, projected, upper=False)
        if self._rank is not None and self._rank < min(whitened.shape):
            outputs = leading_eigenvectors(whitened.T @ whitened, self._rank)  # (out, rank)
            whitened = (whitened @ outputs) @ outputs.T
        factor = torch.linalg.solve_triangular(triangle.T, whitened, upper=True).T
        return _Best(factor, 1.0 - float(whitened.square().sum()) / self._power, seen, parts)

    def slopes(self, best: _Best) -> list[Tensor]:
        """The derivatives of the loss by θ: it is stationary in A, so only P itself counts."""
        cross = self._target.T @ best.factor  # (fan_in, features)
        left, right = best.seen, best.gram  # whose product is G P AᵀA
        if self._moment.rows is not None:
            left, right = self._moment.rows.T, best.seen @ best.gram
            if self._moment.added:
                cross = cross - self._moment.added * self._features.spread(best.gram, best.parts)
        slopes = self._features.slopes(left, right, cross, best.parts)
        return [slope * (2.0 / self._power) for slope in slopes]


class _Scale:
    """``θ = c L⁻ᵀ X R⁻¹`` for a variable X, with ``L Lᵀ`` and ``R Rᵀ`` the metric of θ."""

    def __init__(self, metric: Metric, c: float) -> None:
        self._c = c
        self._right = triangle_of(metric.right, _RIGHT_RIDGE)
        self._left = None if metric.left is None else triangle_of(metric.left, _LEFT_RIDGE)

    def inwards(self, theta: Tensor) -> Tensor:
        inside = theta @ self._right / self._c
        return inside if self._left is None else self._left.T @ inside

    def outwards(self, inside: Tensor) -> Tensor:
        theta: Tensor = torch.linalg.solve_triangular(self._right, inside, upper=False, left=False)
        if self._left is not None:
            theta = torch.linalg.solve_triangular(self._left.T, theta, upper=True)
        return theta * self._c

    def slope(self, slope: Tensor) -> Tensor:
        """The derivative by X from the one by θ."""
        found: Tensor = torch.linalg.solve_triangular(self._right.T, slope, upper=True, left=False)
        if self._left is not None:
            found = torch.linalg.solve_triangular(self._left, found, upper=False)
        return found * self._c
