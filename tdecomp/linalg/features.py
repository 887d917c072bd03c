"""Features ``P(θ)`` (fan_in, features) of a layer's inputs, whose weights a fit eliminates."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdecomp.linalg.cholesky import triangle_of
from tdecomp.linalg.second_moment import SecondMoment, is_wide
from tdecomp.linalg.svd import leading_vectors

# On the moment of the inputs that a fit starts from, as a share of its diagonal.
_RIDGE = 1e-6
# The most inputs whose moment is factorized, which takes the cube of their number.
_WHITENED = 4096


@dataclass(frozen=True)
class Metric:
    """How strongly a change θ (n, columns) of a part of the parameters acts: ``tr(θᵀ L θ R)``."""

    left: Tensor | None  # (n, n); None for the identity
    right: Tensor  # (columns, columns)


class Features(ABC):
    """Features as functions of parameters θ, a list of matrices; P is never formed as a whole."""

    def ordered(self, matrix: Tensor, dim: int) -> Tensor:  # noqa: ARG002
        """The matrix with the inputs along one dimension in the order that all others take."""
        return matrix

    @abstractmethod
    def parts(self, theta: Sequence[Tensor]) -> Sequence[Tensor]:
        """What P(θ) is made of, computed once for each θ."""

    @abstractmethod
    def project(self, matrix: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """``matrix @ P(θ)``, for a matrix (m, fan_in)."""

    @abstractmethod
    def spread(self, matrix: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """``P(θ) @ matrix``, for a matrix (features, m)."""

    @abstractmethod
    def slopes(
        self, left: Tensor, right: Tensor, cross: Tensor, parts: Sequence[Tensor]
    ) -> list[Tensor]:
        """The derivatives by θ of ``(W * P(θ)).sum()``, with ``W = left @ right - cross`` fixed.

        W and `cross` are (fan_in, features).
        """

    @abstractmethod
    def metrics(self, theta: Sequence[Tensor], gram: Tensor, moment: SecondMoment) -> list[Metric]:
        """About how strongly changes of θ act on outputs; `gram` is ``AᵀA`` of their weights A."""


@dataclass(frozen=True)
class SpanFeatures(Features):
    """``I ⊗ V``: the same combinations V (n, R) of n inputs at each of `volume` places.

    Only the span of the columns of V matters. Features are in the order (volume, R).
    """

    inputs: int
    volume: int

    def ordered(self, matrix: Tensor, dim: int) -> Tensor:
        # Places first, so that products with V are of two matrices.
        split: Tensor = matrix.unflatten(dim, (self.inputs, self.volume))
        return split.transpose(dim, dim + 1).flatten(dim, dim + 1)

    def parts(self, theta: Sequence[Tensor]) -> Sequence[Tensor]:
        # (n, R), (R, R); orthonormal columns are the best conditioned.
        found: Sequence[Tensor] = torch.linalg.qr(theta[0])
        return found

    def project(self, matrix: Tensor, parts: Sequence[Tensor]) -> Tensor:
        return (matrix.reshape(-1, self.inputs) @ parts[0]).reshape(len(matrix), -1)

    def spread(self, matrix: Tensor, parts: Sequence[Tensor]) -> Tensor:
        places: Tensor = parts[0] @ matrix.unflatten(0, (self.volume, -1))
        return places.flatten(0, 1)

    def slopes(
        self, left: Tensor, right: Tensor, cross: Tensor, parts: Sequence[Tensor]
    ) -> list[Tensor]:
        triangle = parts[1]
        columns = len(triangle)
        along = cross.new_zeros(self.inputs, columns)
        for place in range(self.volume):  # W at the other places meets zeros of the identity
            these = slice(place * self.inputs, (place + 1) * self.inputs)
            features = slice(place * columns, (place + 1) * columns)
            along.addmm_(left[these], right[:, features]).sub_(cross[these, features])
        # By V, of which the orthonormal basis is ``V triangle⁻¹``; within the span nothing changes.
        return [torch.linalg.solve_triangular(triangle.T, along, upper=False, left=False)]

    def metrics(self, theta: Sequence[Tensor], gram: Tensor, moment: SecondMoment) -> list[Metric]:
        columns = theta[0].shape[1]
        shared = gram.reshape(self.volume, columns, self.volume, columns)
        right = shared.diagonal(dim1=0, dim2=2).sum(dim=-1)  # (R, R)
        if self.inputs > _WHITENED:
            return [Metric(None, right * (moment.trace / self.inputs))]
        return [Metric(moment.along((self.volume, self.inputs), 1), right)]

    def start(self, kernel: Tensor, moment: SecondMoment, columns: int) -> Tensor:
        """The best V (n, columns) if inputs at different places were independent and alike.

        A singular value decomposition of the kernel (out, fan_in), in the norm of the inputs where
        there are not too many.
        """
        dtype = torch.float32 if is_wide(kernel.shape[1]) else torch.float64
        split = self.ordered(kernel.to(dtype), 1).reshape(-1, self.inputs)  # (out · volume, n)
        if self.inputs > _WHITENED:
            return leading_vectors(split.T, columns)[0].to(kernel.dtype)
        along = moment.normalised(dtype).along((self.inputs, self.volume), 0)
        triangle = triangle_of(along, _RIDGE)  # (n, n)
        leading, _ = leading_vectors((split @ triangle).T, columns)
        start: Tensor = torch.linalg.solve_triangular(triangle.T, leading, upper=True)
        return start.to(kernel.dtype)


@dataclass(frozen=True)
class ProductFeatures(Features):
    """Outer products of the columns of several matrices (size, R), scaled to norm 1."""

    def parts(self, theta: Sequence[Tensor]) -> Sequence[Tensor]:
        units = [*map(_unit, theta)]
        return khatri_rao(units), *units, *map(_lengths, theta)

    def project(self, matrix: Tensor, parts: Sequence[Tensor]) -> Tensor:
        return matrix @ parts[0]

    def spread(self, matrix: Tensor, parts: Sequence[Tensor]) -> Tensor:
        return parts[0] @ matrix

    def slopes(
        self, left: Tensor, right: Tensor, cross: Tensor, parts: Sequence[Tensor]
    ) -> list[Tensor]:
        modes = len(parts) // 2
        units, lengths = parts[1 : 1 + modes], parts[1 + modes :]
        weights = (left @ right - cross).reshape(*map(len, units), -1)  # (size, …, R)
        slopes = []
        for mode, (length, unit) in enumerate(zip(lengths, units, strict=True)):
            others = khatri_rao([one for other, one in enumerate(units) if other != mode])
            along = (weights.movedim(mode, 0).flatten(1, -2) * others).sum(dim=1)  # by the unit
            along -= unit * (unit * along).sum(dim=0)  # along itself nothing changes
            slopes.append(along / length)
        return slopes

    def metrics(self, theta: Sequence[Tensor], gram: Tensor, moment: SecondMoment) -> list[Metric]:
        sizes = tuple(len(part) for part in theta)
        power = moment.trace / math.prod(sizes)
        acting = []
        for mode, part in enumerate(theta):
            along, unit = moment.along(sizes, mode), _unit(part)
            acting.append(unit.T @ along @ unit * (len(part) / moment.trace))
        metrics = []
        for mode, part in enumerate(theta):
            others = [one for other, one in enumerate(acting) if other != mode]
            lengths = _lengths(part)  # on which the features do not depend
            right = torch.stack([gram, *others]).prod(dim=0) * power
            metrics.append(Metric(None, right / (lengths[:, None] * lengths)))
        return metrics


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Columns (fan_in, R), the last mode changing fastest as in the kernel."""
    first, *others = factors
    for factor in others:
        first = (first[:, None] * factor).flatten(0, 1)
    return first


def _unit(factor: Tensor) -> Tensor:
    return factor / _lengths(factor)


def _lengths(factor: Tensor) -> Tensor:
    """The norms of the columns, 1 for those that are zero."""
    norms = factor.norm(dim=0)
    return torch.where(norms > 0, norms, 1.0)
