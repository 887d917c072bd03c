"""Spatial SVD: a K×1 layer, then a 1×K one, both dense.

Jaderberg et al. 2014, "Speeding up Convolutional Neural Networks with Low Rank Expansions",
section 2.1, scheme 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tdecomp.decomposers.base import Iterative
from tdecomp.decomposers.factors import Factors, squared_norm_of_product
from tdecomp.layers.chain import Rank
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.features import SpanFeatures
from tdecomp.linalg.least_squares import SeparableFit
from tdecomp.linalg.second_moment import SecondMoment
from tdecomp.linalg.spectrum import tails
from tdecomp.linalg.svd import truncated_svd


@dataclass(frozen=True)
class SpatialFactors(Factors):
    """A kernel (out, in, kh, kw) as ``sum_r vertical[r, in, kh] · horizontal[out, r, kw]``."""

    vertical: Tensor  # (rank, in, kh, 1)
    horizontal: Tensor  # (out, rank, 1, kw)

    def to_kernel(self) -> Tensor:
        _, into, height, _ = self.vertical.shape
        out, width = self.horizontal.shape[0], self.horizontal.shape[3]
        rows, columns = self._matrices()
        matrix = rows @ columns  # (out · kw, in · kh)
        return matrix.reshape(out, width, into, height).permute(0, 2, 3, 1)

    def stage_weights(self) -> tuple[Tensor, ...]:
        return self.vertical, self.horizontal

    def squared_norm(self) -> Tensor:
        return squared_norm_of_product(*self._matrices())

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """(out · kw, rank) and (rank, in · kh): the horizontal and the vertical factor."""
        rank = len(self.vertical)
        return self.horizontal.permute(0, 3, 1, 2).reshape(-1, rank), self.vertical.flatten(1)

    def scaled(self, scale: float) -> "SpatialFactors":
        return SpatialFactors(self.vertical * scale**0.5, self.horizontal * scale**0.5)


def _matrix(kernel: Tensor) -> Tensor:
    out, into, height, width = kernel.shape
    return kernel.permute(0, 3, 1, 2).reshape(out * width, into * height)


@dataclass(frozen=True)
class Spatial(Iterative):
    """Conv2d S→T becomes kh×1 S→rank without bias and 1×kw rank→T with it.

    >>> Spatial().max_rank(LayerSpec(16, 32, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0)))
    48

    Jaderberg et al. 2014, "Speeding up Convolutional Neural Networks with Low Rank Expansions",
    section 2.1, scheme 2.

    Parameters
    ----------
    n_iter_max : int
        Iterations of a fit to data at most; a fit to the weights is an SVD and needs none.
    tol : float
        Such a fit stops when the share of the output that is lost changes by less.

    Raises
    ------
    ValueError
        If `n_iter_max` is below 1 or `tol` below 0.
    """

    name = "spatial"
    source = "Jaderberg et al. 2014"

    draft_iterations = 3  # from a start that is in the norm of the data already

    n_iter_max: int = 50
    tol: float = 1e-7

    def refusal(self, spec: LayerSpec) -> str | None:
        return None if spec.ndim == 2 else "spatial takes two-dimensional convolutions"

    def contained_in(self, spec: LayerSpec) -> tuple[str, ...]:
        return ("svd", "lowrank") if spec.kernel_size[-1] == 1 else ()

    def max_rank(self, spec: LayerSpec) -> int:
        height, width = spec.kernel_size
        return min(spec.group_in * height, spec.group_out * width)

    def stages(self, spec: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        assert isinstance(rank, int)
        middle = rank * spec.groups
        last = spec.along([1], middle, spec.out_channels).like(bias=spec.bias)
        return spec.along([0], spec.in_channels, middle), last

    def fit(
        self, kernel: Tensor, rank: Rank, start: Factors | None = None, *, draft: bool = False
    ) -> SpatialFactors:
        del start, draft  # a truncated SVD needs neither
        assert isinstance(rank, int)
        out, into, height, width = kernel.shape
        u, s, vh = truncated_svd(_matrix(kernel), rank)
        root = s.sqrt()
        vertical = (root[:, None] * vh).reshape(-1, into, height, 1)
        horizontal = (u * root).reshape(out, width, -1, 1).permute(0, 2, 3, 1)
        return SpatialFactors(vertical, horizontal)

    def fitted(
        self,
        kernel: Tensor,
        rank: Rank,
        moment: SecondMoment,
        start: SpatialFactors | None,
        *,
        draft: bool,
    ) -> SpatialFactors:
        # The horizontal step follows from the vertical one.
        assert isinstance(rank, int)
        out, into, height, width = kernel.shape
        features, matrix = SpanFeatures(into * height, width), kernel.flatten(1)
        if start is None:
            begin = features.start(matrix, moment, rank)  # (in · kh, rank)
        else:
            begin = start.vertical.flatten(1).T
        fit, most = SeparableFit(matrix, moment, features), self.n_iter_max
        factor, (found,) = fit.minimise([begin], n_iter_max=most, tol=self.tol, draft=draft)
        horizontal = factor.reshape(out, width, -1, 1).permute(0, 2, 3, 1)  # (out, rank, 1, kw)
        root = horizontal.square().sum(dim=(0, 2, 3)).sqrt().sqrt()  # (rank,)
        vertical = (torch.linalg.qr(found).Q * root).T.reshape(-1, into, height, 1)
        scale = torch.where(root > 0, root, 1.0)
        return SpatialFactors(vertical, horizontal / scale[:, None, None])

    def lost_at_every_rank(
        self, kernel: Tensor, moment: SecondMoment | None, importance: Tensor | None = None
    ) -> Tensor | None:
        # Only in the norm of the weights are the best fits nested.
        return tails(_matrix(kernel)) if moment is None and importance is None else None

    def factors_of(self, stage_weights: tuple[Tensor, ...]) -> SpatialFactors:
        return SpatialFactors(*stage_weights)

    def unfoldings(self, kernel: Tensor) -> tuple[Tensor, ...]:
        return (_matrix(kernel),)
