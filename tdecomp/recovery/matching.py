"""The factors of a chain whose outputs come nearest to the original layer's outputs."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tdecomp.calibration.accumulator import Accumulator
from tdecomp.calibration.moments import LayerMoments
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.factors import Factorization
from tdecomp.decomposers.fit_layer import factorize
from tdecomp.layers.chain import Rank

# The ridge towards the original kernel, as a share of the inputs' mean square, where there are
# fan_in samples; it falls in proportion to the number of samples.
_RIDGE = 1e-2


class Match:
    """The fit of factors to the chain's inputs x and the original layer's outputs y.

    `sums` holds the moments of both, `moments` those of x and the gradients, taken of `samples`
    samples. With gradients of second moment G, an error e counts
    ``eᵀ (G / mean(diag G) + λI) e``: λ, the weight that all outputs share, is larger where G comes
    from few samples. Without gradients all outputs count alike.
    """

    def __init__(
        self, sums: Accumulator, moments: LayerMoments, weight: Tensor, samples: int
    ) -> None:
        self._moments, self._spec = moments, moments.spec
        self._cross, self._mean_output, self._power = sums.mean_cross()
        uncentred = replace(moments, spec=replace(moments.spec, bias=False))
        self._about_zero = uncentred.second_moments()
        self._about_mean = moments.second_moments() if moments.spec.bias else self._about_zero
        self._targets = self._full_rank(weight)
        self._roots = [_roots(g, samples) for g in moments.gradient_blocks() or ()]

    def _full_rank(self, weight: Tensor) -> list[Tensor]:
        """Each group's kernel of full rank whose outputs come nearest.

        In directions with few samples it stays near the original kernel.
        """
        targets = []
        groups = zip(
            self._moments.kernels(weight), self._about_mean, self._cross, self._mean_output,
            self._moments.mean, strict=True,
        )  # fmt: skip
        for kernel, second, cross, output, mean in groups:
            if self._spec.bias:
                cross = cross - output[:, None] * mean[None]
            missing = cross - second.applied(kernel)  # (out, fan_in)
            ridge = _RIDGE * second.trace / max(self._moments.count, 1)
            targets.append(kernel + second.solved(missing, ridge))
        return targets

    def fit(self, decomposer: Decomposer, rank: Rank, start: Factorization) -> Factorization:
        """The factors whose outputs come nearest, by a fit that starts from the chain's factors."""
        if not self._roots:
            return self._fit(decomposer, rank, self._targets, start)
        roots, inverses = zip(*self._roots, strict=True)
        weighted = [root @ target for root, target in zip(roots, self._targets, strict=True)]
        fitted = self._fit(decomposer, rank, weighted, _mixed(start, roots, decomposer))
        return _mixed(fitted, inverses, decomposer)

    def _fit(
        self, decomposer: Decomposer, rank: Rank, kernels: list[Tensor], start: Factorization
    ) -> Factorization:
        spec = self._spec
        kernel = torch.cat(kernels).reshape(spec.out_channels, spec.group_in, *spec.kernel_size)
        weight = spec.from_forward_layout(kernel)
        return factorize(decomposer, weight, spec, rank, self._about_mean, start)

    def best_bias(self, fitted: Factorization) -> Tensor:
        """The bias with which the factors' mean output is that of the original layer."""
        return self._mean_output.flatten() - self._moments.mean_output(fitted.to_kernel())

    def lost(self, fitted: Factorization, bias: Tensor | None) -> float:
        """``E‖y − K̃ x − b̃‖²`` as a share of the variance of y, both weighted."""
        kernel = fitted.to_kernel()
        means = self._mean_output
        gaps = self._moments.mean_output(kernel).reshape(means.shape) - means
        biases = torch.zeros_like(gaps) if bias is None else bias.double().reshape(gaps.shape)
        lost = variance = 0.0
        for i, (mine, second, cross) in enumerate(
            zip(self._moments.kernels(kernel), self._about_zero, self._cross, strict=True)
        ):
            b, gap, mean, power = biases[i], gaps[i], means[i], self._power[i]
            if self._roots:
                root, _ = self._roots[i]
                mine, cross, b, gap, mean = (root @ part for part in (mine, cross, b, gap, mean))
                power = root @ power @ root.T
            total = float(power.trace())
            variance += total - float(mean.square().sum())
            lost += total + second.lost(mine) - 2.0 * float((mine * cross).sum())
            lost += float((b * (b + 2.0 * gap)).sum())
        return max(lost, 0.0) / variance if variance > 0 else 0.0


def _roots(gradient: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """The square root of the weights of errors, and its inverse."""
    count = len(gradient)
    scale = float(gradient.diagonal().mean())
    if not scale > 0:
        identity = torch.eye(count, dtype=torch.float64, device=gradient.device)
        return identity, identity
    values, vectors = torch.linalg.eigh(gradient.double() / scale)
    sizes = (values.clamp_min(0.0) + 1.0 + count / max(samples, 1)).sqrt()
    return (vectors * sizes) @ vectors.T, (vectors / sizes) @ vectors.T


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
