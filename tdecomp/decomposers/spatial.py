"""Spatial SVD: a K×1 layer, then a 1×K one, both dense.

Jaderberg et al. 2014, "Speeding up Convolutional Neural Networks with Low Rank Expansions",
section 2.1, scheme 2.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from tdecomp.chain import Rank
from tdecomp.decomposers.base import Decomposer, Factors
from tdecomp.layer import LayerSpec
from tdecomp.linalg import truncated_svd


@dataclass(frozen=True)
class SpatialFactors(Factors):
    """A kernel (out, in, kh, kw) as ``sum_r vertical[r, in, kh] · horizontal[out, r, kw]``.

    Attributes
    ----------
    vertical : Tensor, shape (rank, in, kh, 1)
    horizontal : Tensor, shape (out, rank, 1, kw)
    """

    vertical: Tensor
    horizontal: Tensor

    def to_kernel(self) -> Tensor:
        rank, into, height, _ = self.vertical.shape
        out, width = self.horizontal.shape[0], self.horizontal.shape[3]
        rows = self.horizontal.permute(0, 3, 1, 2).reshape(out * width, rank)
        matrix = rows @ self.vertical.reshape(rank, into * height)  # (out · kw, in · kh)
        return matrix.reshape(out, width, into, height).permute(0, 2, 3, 1)

    def stage_weights(self) -> tuple[Tensor, ...]:
        return self.vertical, self.horizontal

    def scaled(self, scale: float) -> "SpatialFactors":
        return SpatialFactors(self.vertical * scale**0.5, self.horizontal * scale**0.5)


def fit_spatial(kernel: Tensor, rank: int) -> SpatialFactors:
    """The best approximation of a given rank of the matrix (out · kw, in · kh).

    Parameters
    ----------
    kernel : Tensor, shape (out, in, kh, kw)
    rank : int
    """
    out, into, height, width = kernel.shape
    u, s, vh = truncated_svd(_matrix(kernel), rank)
    root = s.sqrt()
    vertical = (root[:, None] * vh).reshape(-1, into, height, 1)
    horizontal = (u * root).reshape(out, width, -1, 1).permute(0, 2, 3, 1)  # (out, rank, 1, kw)
    return SpatialFactors(vertical, horizontal)


def _matrix(kernel: Tensor) -> Tensor:
    out, into, height, width = kernel.shape
    return kernel.permute(0, 3, 1, 2).reshape(out * width, into * height)


@dataclass(frozen=True)
class Spatial(Decomposer):
    """Conv2d S→T becomes kh×1 S→rank without bias and 1×kw rank→T with it.

    >>> Spatial().max_rank(LayerSpec(16, 32, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0)))
    48
    """

    name: ClassVar[str] = "spatial"
    source: ClassVar[str] = "Jaderberg et al. 2014"

    def refusal(self, spec: LayerSpec) -> str | None:
        if spec.ndim != 2:
            return "spatial takes two-dimensional convolutions"
        return None

    def max_rank(self, spec: LayerSpec) -> int:
        height, width = spec.kernel_size
        return min(spec.group_in * height, spec.group_out * width)

    def stages(self, spec: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        assert isinstance(rank, int)
        middle = rank * spec.groups
        return (
            spec.along([0], spec.in_channels, middle),
            replace(spec.along([1], middle, spec.out_channels), bias=spec.bias),
        )

    def fit(self, kernel: Tensor, rank: Rank) -> SpatialFactors:
        assert isinstance(rank, int)
        return fit_spatial(kernel, rank)

    def unfoldings(self, kernel: Tensor) -> tuple[Tensor, ...]:
        return (_matrix(kernel),)
