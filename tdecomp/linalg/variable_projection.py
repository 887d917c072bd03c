"""Variable projection."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdecomp.linalg.second_moment import SecondMoment, leading_eigenvectors

# On the normal equations of the eliminated factor, whose columns may be all but dependent.
_ELIMINATION_RIDGE = 1e-9


@dataclass(frozen=True)
class Features:
    """The features ``P(θ)`` (fan_in, features) that some parameters stand for, never formed.

    Attributes
    ----------
    project : callable ``(matrix, θ) -> matrix @ P(θ)``
        Of a matrix (m, fan_in).
    pair : callable ``(weights, θ) -> (weights * P(θ)).sum()``
        Of weights (fan_in, features); differentiable by θ.
    """

    project: Callable[[Tensor, Sequence[Tensor]], Tensor]
    pair: Callable[[Tensor, Sequence[Tensor]], Tensor]


def variable_projection(
    kernel: Tensor,
    moment: SecondMoment,
    features: Features,
    start: Sequence[Tensor],
    *,
    rank: int | None = None,
    n_iter_max: int,
    tol: float,
) -> tuple[Tensor, list[Tensor]]:
    """Fit ``K ≈ A P(θ)ᵀ`` in the norm of a moment: A in closed form, θ by L-BFGS.

    Golub and Pereyra 1973, "The differentiation of pseudo-inverses and nonlinear least squares
    problems whose variables separate". The gradient with respect to θ is taken at the best A.

    Parameters
    ----------
    kernel : Tensor, shape (out, fan_in)
    moment : SecondMoment
    features : Features
    start : sequence of Tensor
        θ to begin with.
    rank : int, optional
        That of A, at most.
    n_iter_max : int
    tol : float
        Stops when the share of the output that is lost changes by less in an iteration.

    Returns
    -------
    A : Tensor, shape (out, features)
    θ : list of Tensor
    """
    project = features.project
    moment = moment.definite()
    target = moment.applied(kernel)  # (out, fan_in)
    power = float((target * kernel).sum())
    parameters = [part.detach().clone(memory_format=torch.contiguous_format) for part in start]
    if not power > 0:
        width = project(kernel, parameters).shape[1]
        return kernel.new_zeros(len(kernel), width), parameters

    def best(theta: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The best A for these features, how much it loses, and that loss's derivative by P."""
        right = moment.features(lambda matrix: project(matrix, theta))  # G P
        normal = project(right.T, theta)  # Pᵀ G P
        ridge = _ELIMINATION_RIDGE * normal.diagonal().mean()
        triangle = torch.linalg.cholesky(normal + ridge * torch.eye(len(normal)).to(normal))
        whitened = torch.linalg.solve_triangular(
            triangle, project(target, theta).T, upper=False
        )  # (features, out)
        if rank is not None and rank < min(whitened.shape):
            outputs = leading_eigenvectors(whitened.T @ whitened, rank)  # (out, rank)
            whitened = (whitened @ outputs) @ outputs.T
        factor = torch.linalg.solve_triangular(triangle.T, whitened, upper=True).T
        # At the best A its own derivative does not matter.
        slope = (right @ (factor.T @ factor) - target.T @ factor) * (2.0 / power)
        return factor, 1.0 - whitened.square().sum() / power, slope

    for part in parameters:
        part.requires_grad_()
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=n_iter_max,
        history_size=10,
        tolerance_grad=0.0,
        tolerance_change=tol,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        with torch.no_grad():
            _, lost, slope = best(parameters)
        with torch.enable_grad():
            slopes = torch.autograd.grad(features.pair(slope, parameters), parameters)
        for part, along in zip(parameters, slopes, strict=True):
            part.grad = along.contiguous()
        return lost

    optimizer.step(closure)
    theta = [part.detach() for part in parameters]
    return best(theta)[0], theta
