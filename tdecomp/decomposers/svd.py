"""Truncated SVD of a matrix: two dense layers in place of one.

Denton et al. 2014, "Exploiting Linear Structure Within Convolutional Networks", section 3.2.1.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.factors import Factors, squared_norm_of_product
from tdecomp.layers.chain import Rank
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.leading_outputs import leading_outputs
from tdecomp.linalg.nested_losses import nested_losses
from tdecomp.linalg.second_moment import SecondMoment
from tdecomp.linalg.svd import svd, truncated_svd


@dataclass(frozen=True)
class LowRankFactors(Factors):
    """A kernel as ``second @ first``, seen as a matrix (out, in · kernel)."""

    first: Tensor  # (rank, in, *kernel)
    second: Tensor  # (out, rank)
    orthogonal: bool = False  # whether the rows of the first stay orthonormal

    def to_kernel(self) -> Tensor:
        return (self.second @ self.first.flatten(1)).reshape(-1, *self.first.shape[1:])

    def stage_weights(self) -> tuple[Tensor, ...]:
        pointwise = self.second.reshape(*self.second.shape, *[1] * (self.first.dim() - 2))
        return self.first, pointwise

    def squared_norm(self) -> Tensor:
        return squared_norm_of_product(self.second, self.first.flatten(1))

    def scaled(self, scale: float) -> "LowRankFactors":
        if self.orthogonal:
            return replace(self, second=self.second * scale)
        return replace(self, first=self.first * scale**0.5, second=self.second * scale**0.5)


def _orthonormal(outputs: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The product ``outputs @ rows`` of orthonormal outputs, its norms all in the first factor.

    (out, rank) with orthogonal columns, the longest first, and (rank, n) with orthonormal rows.
    """
    # Householder's reflections make orthonormal rows of rows that are zero or copies, too.
    basis, triangle = torch.linalg.qr(rows.T)  # (n, rank), (rank, rank)
    turn, s, vh = svd(triangle.T)
    return outputs @ (turn * s), vh @ basis.T


@dataclass(frozen=True)
class SVD(Decomposer):
    """Linear m→n becomes m→rank without bias and rank→n with it; 1×1 convolutions likewise.

    >>> print(*SVD().stages(LayerSpec(8, 6), 2))
    Linear(8→2, no bias) Linear(2→6)

    An Embedding becomes a narrower one and a Linear.

    Denton et al. 2014, "Exploiting Linear Structure Within Convolutional Networks for Efficient
    Evaluation", section 3.2.1. The fit to data: Zhang et al. 2016, "Accelerating Very Deep
    Convolutional Networks for Classification and Detection", equations 4 to 6.

    Parameters
    ----------
    orthogonal : bool
        Fit a first layer with orthonormal rows (in each group, to the rounding of the dtype) and a
        second with orthogonal columns, the longest first, in place of layers that share the norm.
        The product is the same. Refitting keeps it; training moves it.

    Raises
    ------
    TypeError
        If `orthogonal` is neither True nor False.
    """

    name = "svd"
    source = "Denton et al. 2014"
    takes_lookups = True
    fits_large_in_float32 = True

    orthogonal: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.orthogonal, bool):
            raise TypeError(
                f"{self.name}: expected orthogonal to be True or False, got {self.orthogonal!r}"
            )

    def refusal(self, spec: LayerSpec) -> str | None:
        return "svd takes Linear layers and 1×1 convolutions" if spec.kernel_volume > 1 else None

    def max_rank(self, spec: LayerSpec) -> int:
        return min(spec.fan_in, spec.group_out)

    def stages(self, spec: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        assert isinstance(rank, int)
        first = spec.like(out_channels=rank * spec.groups, bias=False)
        return first, spec.pointwise(first.out_channels, spec.out_channels, bias=spec.bias)

    def fit(
        self, kernel: Tensor, rank: Rank, start: Factors | None = None, *, draft: bool = False
    ) -> LowRankFactors:
        del start, draft  # the closed form (Eckart and Young 1936) needs neither
        assert isinstance(rank, int)
        u, s, vh = truncated_svd(kernel.flatten(1), rank)
        if self.orthogonal:
            return self._orthogonal(u, s[:, None] * vh, kernel)
        # Both share the singular values, so that neither layer's gradients dwarf the other's.
        root = s.sqrt()
        first = vh.mul_(root[:, None]).reshape(len(s), *kernel.shape[1:])  # (rank, in, *kernel)
        return _with_zeros_of(kernel, LowRankFactors(first, u.mul_(root)))

    def fit_to(
        self,
        kernel: Tensor,
        rank: Rank,
        moment: SecondMoment,
        start: Factors | None = None,
        *,
        draft: bool = False,
    ) -> LowRankFactors:
        del start, draft  # the closed form, Zhang et al. 2016, equations 4 to 6, needs neither
        assert isinstance(rank, int)
        outputs = leading_outputs(kernel.flatten(1), moment, rank)  # (out, rank)
        first = outputs.T @ kernel.flatten(1)  # (rank, in · kernel)
        if self.orthogonal:
            return self._orthogonal(outputs, first, kernel)
        root = first.norm(dim=1).sqrt()
        first = first / torch.where(root > 0, root, 1.0)[:, None]
        found = LowRankFactors(first.reshape(-1, *kernel.shape[1:]), outputs * root)
        return _with_zeros_of(kernel, found)

    def _orthogonal(self, outputs: Tensor, first: Tensor, kernel: Tensor) -> LowRankFactors:
        second, rows = _orthonormal(outputs, first)
        return LowRankFactors(rows.reshape(-1, *kernel.shape[1:]), second, orthogonal=True)

    def lost_at_every_rank(
        self, kernel: Tensor, moment: SecondMoment | None, importance: Tensor | None = None
    ) -> Tensor:
        plain, weighted = nested_losses(kernel.flatten(1), moment, importance)
        return plain if weighted is None else weighted

    def plain_and_weighted_losses(
        self, kernel: Tensor, moment: SecondMoment | None, importance: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        if type(self).lost_at_every_rank is not SVD.lost_at_every_rank:
            return super().plain_and_weighted_losses(kernel, moment, importance)
        return nested_losses(kernel.flatten(1), moment, importance)

    def factors_of(self, stage_weights: tuple[Tensor, ...]) -> LowRankFactors:
        first, second = stage_weights
        return LowRankFactors(first, second.flatten(1), self.orthogonal)

    def unfoldings(self, kernel: Tensor) -> tuple[Tensor, ...]:
        return (kernel.flatten(1),)


def _with_zeros_of(kernel: Tensor, factors: LowRankFactors) -> LowRankFactors:
    """The factors, exactly zero for inputs and outputs of which all weights are, as for padding."""
    nonzero = kernel != 0
    inputs, outputs = nonzero.any(dim=0), nonzero.flatten(1).any(dim=1)
    if inputs.all() and outputs.all():
        return factors
    return LowRankFactors(factors.first * inputs, factors.second * outputs[:, None])
