"""How near a chain's outputs come to the original layer's, and the factors that come nearest."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tdecomp.calibration.accumulator import Accumulator
from tdecomp.calibration.layer_moments import LayerMoments
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.factors import Factorization
from tdecomp.layers.chain import Rank

# Towards the original kernel, as a share of the inputs' mean power, for as many samples as inputs
# to each output; with more samples it goes down in proportion.
_RIDGE = 1e-2


class Match:
    """The chain's inputs x and the original's outputs y, by the moments of both.

    Outputs matter as the model's own outputs feel them: with gradients of second moment G, an
    error e counts ``eᵀ (G / mean(diag G) + λI) e``. The share λ of all outputs alike is larger
    where few samples have shown G.

    Parameters
    ----------
    sums : Accumulator
        Of inputs and outputs.
    moments : LayerMoments
        What the sums come to; without G all outputs matter alike.
    weight : Tensor
        The original layer's.
    samples : int
        That G was taken of.
    """

    def __init__(
        self,
        sums: Accumulator,
        moments: LayerMoments,
        weight: Tensor,
        samples: int,
    ) -> None:
        self._moments, self._spec = moments, moments.spec
        self._cross, self._mean_output, self._power = sums.mean_cross()
        uncentred = replace(moments, spec=replace(moments.spec, bias=False))
        self._about_zero = uncentred.second_moments()
        self._about_mean = moments.second_moments() if moments.spec.bias else self._about_zero
        self._target = self._free(weight)
        self._roots = self._inverses = None
        gradients = moments.gradient_blocks()
        if gradients is not None:
            pairs = [_roots(gradient, samples) for gradient in gradients]
            self._roots, self._inverses = [r for r, _ in pairs], [i for _, i in pairs]

    def _free(self, weight: Tensor) -> list[Tensor]:
        """Each group's kernel that, without any restriction, comes nearest to the outputs.

        Where the samples say little it stays with the original kernel.
        """
        targets = []
        kernels = self._moments.kernels(weight)
        groups = zip(
            kernels, self._about_mean, self._cross, self._mean_output, self._moments.mean,
            strict=True,
        )  # fmt: skip
        for kernel, second, together, output, mean in groups:
            if self._spec.bias:
                together = together - output[:, None] * mean[None]
            missing = together - second.applied(kernel)  # (out, fan_in)
            power = second.trace / self._spec.fan_in
            ridge = _RIDGE * power * self._spec.fan_in / max(self._moments.count, 1)
            targets.append(kernel + second.solved(missing, ridge))
        return targets

    def fit(self, decomposer: Decomposer, rank: Rank, start: Factorization) -> Factorization:
        """The factors whose outputs come nearest, from those that the chain has."""
        targets, roots, inverses = self._target, self._roots, self._inverses
        if roots is None or inverses is None:
            return self._fit(decomposer, rank, targets, start)
        weighed = [root @ target for root, target in zip(roots, targets, strict=True)]
        fitted = self._fit(decomposer, rank, weighed, _mixed(start, roots, decomposer))
        return _mixed(fitted, inverses, decomposer)

    def _fit(
        self, decomposer: Decomposer, rank: Rank, kernels: Sequence[Tensor], start: Factorization
    ) -> Factorization:
        spec = self._spec
        kernel = torch.cat(list(kernels))
        kernel = kernel.reshape(spec.out_channels, spec.group_in, *spec.kernel_size)
        stored = spec.from_forward_layout(kernel)
        return decomposer.factorize(stored, spec, rank, self._about_mean, start)

    def best_bias(self, fitted: Factorization) -> Tensor:
        return self._mean_output.flatten() - self._moments.mean_output(fitted.to_kernel())

    def lost(self, fitted: Factorization, bias: Tensor | None) -> float:
        """``E‖y − K̃ x − b̃‖²`` as a share of the variance of y, both as they matter."""
        kernel = fitted.to_kernel()
        shift = self._moments.mean_output(kernel).reshape(self._mean_output.shape)
        shift -= self._mean_output
        biases = torch.zeros_like(shift) if bias is None else bias.double().reshape(shift.shape)
        lost = variance = 0.0
        for i, (mine, second, cross) in enumerate(
            zip(self._moments.kernels(kernel), self._about_zero, self._cross, strict=True)
        ):
            b, gap, mean, power = biases[i], shift[i], self._mean_output[i], self._power[i]
            if self._roots is not None:
                root = self._roots[i]
                mine, cross, b, gap, mean = (root @ part for part in (mine, cross, b, gap, mean))
                power = root @ power @ root.T
            total = float(power.trace())
            variance += total - float(mean.square().sum())
            lost += total + second.lost(mine) - 2.0 * float((mine * cross).sum())
            lost += float((b * (b + 2.0 * gap)).sum())
        return max(lost, 0.0) / variance if variance > 0 else 0.0


def _roots(gradient: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """The square root of what errors count, and its inverse."""
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
    """The factors of the kernel whose outputs are mixed by these matrices, one for each group."""
    groups = []
    for factors, matrix in zip(factorization.groups, matrices, strict=True):
        *first, last = factors.stage_weights()
        mixed = decomposer.factors_of((*first, (matrix @ last.flatten(1)).reshape(last.shape)))
        assert mixed is not None  # that of the chain's own stages was not
        groups.append(mixed)
    return replace(factorization, groups=tuple(groups))
