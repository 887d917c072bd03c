"""Tucker-2: a small core convolution between two pointwise ones.

Kim et al. 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
Applications", section 3.1.
"""

import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

from tensorly.decomposition import partial_tucker
from torch import Tensor

from tdecomp.chain import Rank
from tdecomp.decomposers.base import Decomposer, Factors, check_iteration
from tdecomp.layer import LayerSpec
from tdecomp.linalg import left_singular_vectors, mode_products, torch_backend, unfold


@dataclass(frozen=True)
class Tucker2Factors(Factors):
    """A kernel as a core multiplied by a factor on each channel mode.

    Attributes
    ----------
    core : Tensor, shape (R4, R3, *kernel)
    into : Tensor, shape (in, R3)
    out : Tensor, shape (out, R4)
    """

    core: Tensor
    into: Tensor
    out: Tensor

    def to_kernel(self) -> Tensor:
        return mode_products(self.core, [self.out, self.into], modes=[0, 1])

    def stage_weights(self) -> tuple[Tensor, ...]:
        ones = [1] * (self.core.dim() - 2)
        first = self.into.T.reshape(*self.into.T.shape, *ones)  # (R3, in, 1, 1)
        last = self.out.reshape(*self.out.shape, *ones)  # (out, R4, 1, 1)
        return first, self.core, last

    def scaled(self, scale: float) -> "Tucker2Factors":
        share = scale ** (1 / 3)
        return Tucker2Factors(self.core * share, self.into * share, self.out * share)


def fit_tucker2(
    kernel: Tensor, ranks: tuple[int, int], n_iter_max: int, tol: float
) -> Tucker2Factors:
    """Higher-order orthogonal iteration on the two channel modes (TensorLy's `partial_tucker`).

    Parameters
    ----------
    kernel : Tensor, shape (out, in, *kernel)
    ranks : tuple of int
        (R3, R4): of the input and of the output channels, in the order of the chain.
    """
    rank_in, rank_out = ranks
    # TensorLy would take the SVD of both whole unfoldings for a start that is iterated on anyway.
    start = [
        left_singular_vectors(unfold(kernel, 0), rank_out),
        left_singular_vectors(unfold(kernel, 1), rank_in),
    ]
    core = mode_products(kernel, [factor.T for factor in start], modes=[0, 1])
    with torch_backend(), warnings.catch_warnings():
        # Where one rank is above what the other leaves (1 and 10 of a 3×3 kernel, say) TensorLy
        # completes the factor with columns that carry nothing, and warns.
        warnings.filterwarnings("ignore", message="Trying to compute SVD with n_eigenvecs")
        (core, (out, into)), _ = partial_tucker(
            kernel,
            rank=[rank_out, rank_in],
            modes=[0, 1],
            init=(core, start),
            n_iter_max=n_iter_max,
            tol=tol,
            random_state=0,
        )
    return Tucker2Factors(core, into, out)


@dataclass(frozen=True)
class Tucker2(Decomposer):
    """Conv S→T becomes pointwise S→R3, K×K R3→R4 and pointwise R4→T with the bias.

    >>> Tucker2().max_rank(LayerSpec(16, 32, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0)))
    (16, 32)

    Parameters
    ----------
    n_iter_max : int
        Sweeps at most.
    tol : float
        Stops when the relative reconstruction error changes by less from one sweep to the next.
    """

    name: ClassVar[str] = "tucker2"
    source: ClassVar[str] = "Kim et al. 2016"

    n_iter_max: int = 100
    tol: float = 1e-4

    def __post_init__(self) -> None:
        check_iteration(self.name, self.n_iter_max, self.tol)

    def refusal(self, spec: LayerSpec) -> str | None:
        return None if spec.ndim else "tucker2 takes convolutions; svd takes Linear layers"

    def max_rank(self, spec: LayerSpec) -> tuple[int, int]:
        into, out, volume = spec.group_in, spec.group_out, spec.kernel_volume
        return min(into, out * volume), min(out, into * volume)

    def stages(self, spec: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        assert isinstance(rank, tuple)
        middle_in, middle_out = (r * spec.groups for r in rank)
        return (
            spec.pointwise(spec.in_channels, middle_in),
            replace(spec, in_channels=middle_in, out_channels=middle_out, bias=False),
            spec.pointwise(middle_out, spec.out_channels, bias=spec.bias),
        )

    def fit(self, kernel: Tensor, rank: Rank) -> Tucker2Factors:
        assert isinstance(rank, tuple)
        return fit_tucker2(kernel, (rank[0], rank[1]), self.n_iter_max, self.tol)

    def unfoldings(self, kernel: Tensor) -> tuple[Tensor, ...]:
        return unfold(kernel, 1), unfold(kernel, 0)
