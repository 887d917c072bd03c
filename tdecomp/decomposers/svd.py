"""Truncated SVD of a matrix: two dense layers in place of one.

Denton et al. 2014, "Exploiting Linear Structure Within Convolutional Networks", section 3.2.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from tdecomp.chain import Rank
from tdecomp.decomposers.base import Decomposer, Factors
from tdecomp.layer import LayerSpec
from tdecomp.linalg import truncated_svd


@dataclass(frozen=True)
class LowRankFactors(Factors):
    """A kernel as ``second @ first``, seen as a matrix (out, in · kernel).

    Attributes
    ----------
    first : Tensor, shape (rank, in, *kernel)
    second : Tensor, shape (out, rank)
    """

    first: Tensor
    second: Tensor

    def to_kernel(self) -> Tensor:
        matrix = self.second @ self.first.flatten(1)
        return matrix.reshape(len(self.second), *self.first.shape[1:])

    def stage_weights(self) -> tuple[Tensor, ...]:
        pointwise = self.second.reshape(*self.second.shape, *[1] * (self.first.dim() - 2))
        return self.first, pointwise

    def scaled(self, scale: float) -> "LowRankFactors":
        return LowRankFactors(self.first * scale**0.5, self.second * scale**0.5)


def fit_low_rank(kernel: Tensor, rank: int) -> LowRankFactors:
    """The best approximation of a given rank in the Frobenius norm (Eckart and Young 1936).

    >>> factors = fit_low_rank(torch.eye(4), 4)
    >>> torch.allclose(factors.to_kernel(), torch.eye(4), atol=1e-6)
    True

    Parameters
    ----------
    kernel : Tensor, shape (out, in, *kernel)
    rank : int
    """
    u, s, vh = truncated_svd(kernel.flatten(1), rank)
    # Both share the singular values, so that neither layer's gradients dwarf the other's.
    root = s.sqrt()
    first = (root[:, None] * vh).reshape(len(s), *kernel.shape[1:])  # (rank, in, *kernel)
    return LowRankFactors(first, u * root)


@dataclass(frozen=True)
class SVD(Decomposer):
    """Linear m→n becomes m→rank without bias and rank→n with it; 1×1 convolutions likewise.

    >>> SVD().stages(LayerSpec(8, 6), 2)[0]
    LayerSpec(in_channels=8, out_channels=2, kernel_size=(), stride=(), padding=(), dilation=(), \
output_padding=(), groups=1, padding_mode='zeros', bias=False, transposed=False)
    """

    name: ClassVar[str] = "svd"
    source: ClassVar[str] = "Denton et al. 2014"

    def refusal(self, spec: LayerSpec) -> str | None:
        if spec.kernel_volume > 1:
            return "svd takes Linear layers and 1×1 convolutions"
        return None

    def max_rank(self, spec: LayerSpec) -> int:
        return min(spec.fan_in, spec.group_out)

    def stages(self, spec: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        assert isinstance(rank, int)
        middle = rank * spec.groups
        first = replace(spec, out_channels=middle, bias=False)
        return first, spec.pointwise(middle, spec.out_channels, bias=spec.bias)

    def fit(self, kernel: Tensor, rank: Rank) -> LowRankFactors:
        assert isinstance(rank, int)
        return fit_low_rank(kernel, rank)

    def unfoldings(self, kernel: Tensor) -> tuple[Tensor, ...]:
        return (kernel.flatten(1),)
