"""How much errors in the outputs of a layer count, by the gradients at them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.factors import Factorization
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.best_ranks import diagonal_blocks


class Weights:
    """How errors in a layer's outputs count, by the second moment G of the gradients at them.

    An error e counts ``eᵀ (G / mean(diag G) + λI) e``: λ, the weight that all outputs share, is
    larger where G comes from few samples. Without gradients all outputs count alike. `blocks` are
    the runs of a group's outputs that the method mixes: others are taken as independent.
    """

    def __init__(
        self, spec: LayerSpec, gradient: Tensor | None, samples: int, blocks: Sequence[int]
    ) -> None:
        size = spec.group_out
        pairs = []
        if gradient is not None:
            for at in range(0, spec.out_channels, size):
                group = gradient[at : at + size, at : at + size]
                pairs.append(_roots(_on_diagonal(group, blocks), samples))
        self.roots = [root for root, _ in pairs]
        self._inverses = [inverse for _, inverse in pairs]

    def of(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """Each group's kernel or output, so that errors of the outputs count alike."""
        if not self.roots:
            return [*parts]
        return [root @ part for root, part in zip(self.roots, parts, strict=True)]

    def of_factors(self, factors: Factorization, method: Decomposer) -> Factorization:
        """The factors of what `of` makes of the kernels."""
        return _mixed(factors, self.roots, method) if self.roots else factors

    def undone(self, factors: Factorization, method: Decomposer) -> Factorization:
        """The factors of the kernels of which `of` makes these ones'."""
        return _mixed(factors, self._inverses, method) if self.roots else factors


def _on_diagonal(gradient: Tensor, blocks: Sequence[int]) -> Tensor:
    if len(blocks) == 1:
        return gradient
    independent: Tensor = torch.block_diag(*diagonal_blocks(gradient, blocks))
    return independent


def _roots(gradient: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """R with ``Rᵀ R`` the weights of errors, and its inverse."""
    count = len(gradient)
    scale = float(gradient.diagonal().mean())
    if not scale > 0:
        identity = torch.eye(count, dtype=torch.float64, device=gradient.device)
        return identity, identity
    counts = gradient.double() / scale
    counts.diagonal().add_(1.0 + count / max(samples, 1))
    root = torch.linalg.cholesky(counts).T
    identity = torch.eye(count).to(root)
    return root, torch.linalg.solve_triangular(root, identity, upper=True)


def _mixed(
    factorization: Factorization, matrices: Sequence[Tensor], decomposer: Decomposer
) -> Factorization:
    """The factors with each group's outputs multiplied by its matrix."""
    groups = []
    for factors, matrix in zip(factorization.groups, matrices, strict=True):
        *first, last = factors.stage_weights()
        mixed = decomposer.factors_of((*first, (matrix @ last.flatten(1)).reshape(last.shape)))
        assert mixed is not None  # the method knew the factors of the chain's own stages
        groups.append(mixed)
    return replace(factorization, groups=tuple(groups))
