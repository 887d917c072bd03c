"""Nonlinear least squares in which one factor is linear, and eliminated (variable projection).

Golub and Pereyra 1973, "The differentiation of pseudo-inverses and nonlinear least squares problems
whose variables separate".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdecomp.linalg.second_moment import SecondMoment, leading_eigenvectors

# On the normal equations of the eliminated factor, whose columns may be nearly dependent.
_RIDGE = 1e-9


@dataclass(frozen=True)
class Features:
    """The features ``P(θ)`` (fan_in, features) as functions of parameters θ; P is never formed."""

    # ``(matrix, θ) -> matrix @ P(θ)``, for a matrix (m, fan_in).
    project: Callable[[Tensor, Sequence[Tensor]], Tensor]
    # ``(weights, θ) -> (weights * P(θ)).sum()``, for weights (fan_in, features); differentiable.
    inner: Callable[[Tensor, Sequence[Tensor]], Tensor]


class SeparableFit:
    """``K ≈ A P(θ)ᵀ`` in the norm of a moment, as a problem in θ alone: A is the best one for it.

    The kernel K is (out, fan_in), A is (out, features) and has at most the given rank.
    """

    def __init__(
        self, kernel: Tensor, moment: SecondMoment, features: Features, rank: int | None = None
    ) -> None:
        self._kernel, self._features, self._rank = kernel, features, rank
        self._moment = moment.definite()
        self._target = self._moment.applied(kernel)  # (out, fan_in)
        self._power = float((self._target * kernel).sum())

    def factor(self, theta: Sequence[Tensor]) -> Tensor:
        """The best A (out, features) for these parameters."""
        return self._eliminated(theta)[0]

    def loss(self, theta: Sequence[Tensor]) -> Tensor:
        """The share of the outputs' power that is lost at the best A; sets the gradient by θ."""
        with torch.no_grad():
            _, lost, slope = self._eliminated(theta)
        with torch.enable_grad():
            slopes = torch.autograd.grad(self._features.inner(slope, theta), list(theta))
        for part, along in zip(theta, slopes, strict=True):
            part.grad = along.contiguous()
        return lost

    def minimise(
        self, start: Sequence[Tensor], *, n_iter_max: int, tol: float
    ) -> tuple[Tensor, list[Tensor]]:
        """The best A and θ that L-BFGS finds from a first θ.

        It stops when the share of the output that is lost changes by less than `tol`.
        """
        theta = [part.detach().clone(memory_format=torch.contiguous_format) for part in start]
        if not self._power > 0:
            width = self._features.project(self._kernel, theta).shape[1]
            return self._kernel.new_zeros(len(self._kernel), width), theta
        for part in theta:
            part.requires_grad_()
        optimizer = torch.optim.LBFGS(
            theta,
            max_iter=n_iter_max,
            history_size=10,
            tolerance_grad=0.0,
            tolerance_change=tol,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(lambda: self.loss(theta))
        theta = [part.detach() for part in theta]
        return self.factor(theta), theta

    def _eliminated(self, theta: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The best A for these features, its loss, and the derivative of that loss by P."""
        project, target = self._features.project, self._target
        right = self._moment.features(lambda matrix: project(matrix, theta))  # G P
        normal = project(right.T, theta)  # Pᵀ G P
        ridge = _RIDGE * normal.diagonal().mean()
        triangle = torch.linalg.cholesky(normal + ridge * torch.eye(len(normal)).to(normal))
        projected = project(target, theta).T  # (features, out)
        whitened = torch.linalg.solve_triangular(triangle, projected, upper=False)
        if self._rank is not None and self._rank < min(whitened.shape):
            outputs = leading_eigenvectors(whitened.T @ whitened, self._rank)  # (out, rank)
            whitened = (whitened @ outputs) @ outputs.T
        factor = torch.linalg.solve_triangular(triangle.T, whitened, upper=True).T
        # The loss is stationary in A, so only its dependence on P itself counts.
        slope = (right @ (factor.T @ factor) - target.T @ factor) * (2.0 / self._power)
        return factor, 1.0 - whitened.square().sum() / self._power, slope
