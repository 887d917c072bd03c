"""The factors of a chain whose outputs come nearest to the original layer's outputs."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from tdecomp.calibration.accumulator import Accumulator, enough
from tdecomp.calibration.counted_rows import CountedRows
from tdecomp.calibration.estimate import is_sure
from tdecomp.calibration.moments import LayerMoments
from tdecomp.decomposers.assemble import factors_of_chain, write_factors
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.factors import Factorization
from tdecomp.decomposers.fit_layer import factorize
from tdecomp.layers.patches import dense
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.second_moment import SecondMoment, leading_outputs
from tdecomp.recovery.checks import Checks
from tdecomp.recovery.replaced import ReplacedLayer
from tdecomp.recovery.walk import Item

# The ridges towards the original kernel that are tried, as shares of the inputs' mean square; with
# the last one nothing is left but the original kernel.
_RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, math.inf)
_USUAL_RIDGE = 1.0  # where there are too few samples to choose by
_NEGLIGIBLE = 1e-9  # the share of the largest squared singular value that counts as none
_FOLDS = 4  # one of so many parts of the samples chooses the ridge
_ITERATIONS = 25  # of a fit, which starts from the chain's own factors


@dataclass(frozen=True)
class Joint:
    """The moments of a chain's inputs x together with the original layer's outputs y."""

    moments: LayerMoments  # of x
    cross: Tensor  # E[y xᵀ] (groups, out / groups, fan_in)
    output: Tensor  # E[y] (groups, out / groups)

    @classmethod
    def of(cls, sums: Accumulator) -> "Joint | None":
        """None if nothing was summed up."""
        if not sums.count:
            return None
        cross, output = sums.mean_cross()
        moments = sums.finish()
        assert moments is not None
        return cls(moments, cross, output)

    def merged(self, other: "Joint | None") -> "Joint":
        """Those of the samples of both."""
        if other is None:
            return self
        mine = self.moments.count / (self.moments.count + other.moments.count)
        return Joint(
            self.moments.merged(other.moments, mine),
            mine * self.cross + (1 - mine) * other.cross,
            mine * self.output + (1 - mine) * other.output,
        )

    @property
    def spec(self) -> LayerSpec:
        return self.moments.spec

    def is_finite(self) -> bool:
        parts = (*self.moments.tensors().values(), self.cross, self.output)
        return all(bool(part.isfinite().all()) for part in parts)

    def missing(self, kernels: Sequence[Tensor], seconds: Sequence[SecondMoment]) -> list[Tensor]:
        """``E[(y − K x) xᵀ]`` of each group's kernel, about the means where there is a bias."""
        parts = zip(kernels, seconds, self.cross, self.output, self.moments.mean, strict=True)
        return [
            (cross - output[:, None] * mean[None] if self.spec.bias else cross)
            - second.applied(kernel)
            for kernel, second, cross, output, mean in parts
        ]

    def best_bias(self, kernels: Sequence[Tensor]) -> list[Tensor]:
        """The bias of each group with which the mean output is the wanted one."""
        parts = zip(self.output, kernels, self.moments.mean, strict=True)
        return [output - kernel @ mean.to(kernel) for output, kernel, mean in parts]


class Weights:
    """How errors in a layer's outputs count, by the second moment G of the gradients at them.

    An error e counts ``eᵀ (G / mean(diag G) + λI) e``: λ, the weight that all outputs share, is
    larger where G comes from few samples. Without gradients all outputs count alike.
    """

    def __init__(self, spec: LayerSpec, gradient: Tensor | None, samples: int) -> None:
        size = spec.group_out
        pairs = []
        if gradient is not None:
            for at in range(0, spec.out_channels, size):
                pairs.append(_roots(gradient[at : at + size, at : at + size], samples))
        self.roots = [root for root, _ in pairs]
        self._inverses = [inverse for _, inverse in pairs]

    def of(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """Each group's kernel or output, so that errors of the outputs count alike."""
        if not self.roots:
            return [*parts]
        return [root @ part for root, part in zip(self.roots, parts, strict=True)]

    def of_factors(self, factors: Factorization, method: Decomposer) -> Factorization:
        return _mixed(factors, self.roots, method) if self.roots else factors

    def undone(self, factors: Factorization, method: Decomposer) -> Factorization:
        return _mixed(factors, self._inverses, method) if self.roots else factors


class Match:
    """What is known at one chain, and the fit to it.

    Inputs and wanted outputs are summed up, a fold of the samples apart from the others; some that
    are held out, which no sum includes, say whether a fit is better than the chain as it is.
    """

    def __init__(
        self, layer: ReplacedLayer, items: Sequence[Item], patches: int, seed: int
    ) -> None:
        spec, held = layer.spec, sum(item.held for item in items)
        self._layer, self._several = layer, len({i.number for i in items if not i.held}) >= _FOLDS
        self._held_out = held > 0
        self._sums = [
            Accumulator(spec, share * enough(spec), int(share * patches), seed)
            for share in (1 - 1 / _FOLDS, 1 / _FOLDS)
        ]
        generator = torch.Generator("cpu").manual_seed(seed)
        fit = len(items) - held
        self._fold = Checks(spec, fit // _FOLDS if self._several else fit, generator)
        self._judge = Checks(spec, held or fit, generator)

    def add(self, item: Item, x: Tensor, y: Tensor, rows: CountedRows) -> None:
        """Add one call: a chain's input and the original layer's output."""
        spec, x, y = self._layer.spec, dense(x), dense(y)
        if x.dim() == (spec.ndim or 0) + 1:  # a sample alone
            x, y = x[None], y[None]
        (x, owners), y = rows.of_samples(x, spec, range(item.samples)), rows.of_layer(y, spec)
        if item.held or not self._held_out:
            self._judge.add(x, y, owners, item.samples)
        if item.held:
            return
        cut = len(x) - len(x) // _FOLDS
        if self._several:
            cut = 0 if item.number % _FOLDS == _FOLDS - 1 else len(x)
        self._sums[0].add(x[:cut], y[:cut])
        self._sums[1].add(x[cut:], y[cut:])
        self._fold.add(x[cut:], y[cut:], owners[cut:], item.samples)

    def refit(self, gradient: Tensor | None, samples: int) -> tuple[float, float, bool]:
        """Fit the chain; the lost shares of the outputs before and after, and whether it is kept.

        `gradient` is the second moment of the gradients at the outputs, of so many samples.
        """
        layer, spec = self._layer, self._layer.spec
        chain, method = layer.chain, layer.chain.decomposer
        assert method is not None
        assert chain.rank is not None
        before = factors_of_chain(chain, method)
        assert before is not None
        weight = layer.layer.get_parameter("weight")
        weights = Weights(spec, gradient, samples)
        fit, fold = (Joint.of(sums) for sums in self._sums)
        joint = fit.merged(fold) if fit is not None else fold
        if joint is None:
            raise ValueError(f"refit: {layer}: the batches hold no samples that count")
        if not joint.is_finite():
            raise ValueError(
                f"refit: {layer}: its inputs or the original's outputs hold NaN or infinities, or "
                "numbers too large to be squared; expected finite activations. Look at the batches "
                "and at the layers before it"
            )
        kernels = joint.moments.kernels(weight)
        ridge = _USUAL_RIDGE
        self._judge.weigh(weights.roots)
        if fit is not None and fold is not None:
            self._fold.weigh(weights.roots)
            ranks = map(torch.linalg.matrix_rank, fit.moments.kernels(before.to_kernel()))
            weighed = Joint(
                fit.moments, *map(torch.stack, map(weights.of, (fit.cross, fit.output)))
            )
            ridge = self._best_ridge(weighed, weights.of(kernels), int(max(ranks)))
            ridge *= fit.moments.count / joint.moments.count
        seconds = joint.moments.second_moments()
        missing = joint.missing(kernels, seconds)
        targets = [_target(*parts, ridge) for parts in zip(kernels, missing, seconds, strict=True)]
        fitted = weights.undone(
            factorize(
                method.limited(_ITERATIONS), _weight_of(weights.of(targets), spec), spec,
                chain.rank, seconds, weights.of_factors(before, method),
            ),
            method,
        )  # fmt: skip
        dtype, old = next(chain.parameters()).dtype, chain[-1].bias
        fitted = fitted.to(dtype).to(torch.float64)  # rounded as the chain is going to hold them
        found = joint.moments.kernels(fitted.to_kernel())
        bias = [b.to(dtype).double() for b in joint.best_bias(found)]
        none = torch.zeros_like(joint.output)
        held = old.detach().double().reshape(none.shape) if isinstance(old, Tensor) else none
        lost = [
            self._judge.errors(weights.of(some), weights.of(shift))
            for some, shift in (
                (joint.moments.kernels(before.to_kernel()), held),
                (found, bias if spec.bias else none),
            )
        ]
        before_fit, after_fit = (float(each.sum()) for each in lost)
        better = is_sure(*lost) if self._held_out else after_fit < before_fit
        if better:
            write_factors(chain, method, fitted)
            if spec.bias:
                chain[-1].get_parameter("bias").copy_(torch.cat(bias))
        silent = [torch.zeros_like(kernel) for kernel in kernels]
        variance = float(self._judge.errors(silent, weights.of(joint.output)).sum())
        share = 1.0 / variance if variance > 0 else 0.0
        return share * before_fit, share * (after_fit if better else before_fit), better

    def _best_ridge(self, fit: Joint, kernels: Sequence[Tensor], rank: int) -> float:
        """The ridge with which kernels of a rank, fitted to most samples, suit the fold best."""
        # The choice is one of a few, for which the precision of the layer is enough.
        dtype = torch.promote_types(self._layer.layer.get_parameter("weight").dtype, torch.float32)
        seconds = fit.moments.second_moments(dtype)
        kernels = [kernel.to(dtype) for kernel in kernels]
        missing = [part.to(dtype) for part in fit.missing(kernels, seconds)]

        @cache
        def lost(place: int) -> float:
            if not 0 <= place < len(_RIDGES):
                return math.inf
            found = [
                _truncated(_target(*parts, _RIDGES[place]), parts[2], rank)
                for parts in zip(kernels, missing, seconds, strict=True)
            ]
            bias = fit.best_bias(found) if fit.spec.bias else torch.zeros_like(fit.output)
            error = float(self._fold.errors(found, [*bias]).sum())
            return error if math.isfinite(error) else math.inf

        place = _RIDGES.index(_USUAL_RIDGE)
        while (near := min((place, place - 1, place + 1), key=lost)) != place:
            place = near
        return _RIDGES[place]


def _target(kernel: Tensor, missing: Tensor, second: SecondMoment, ridge: float) -> Tensor:
    """The kernel of full rank whose outputs come nearest, with a ridge towards this kernel."""
    if math.isinf(ridge):
        return kernel
    return kernel + second.solved(missing, ridge * second.trace / second.fan_in)


def _weight_of(kernels: Sequence[Tensor], spec: LayerSpec) -> Tensor:
    """The groups' kernels as a weight in the layer's own layout."""
    kernel = torch.cat([*kernels])
    return spec.from_forward_layout(
        kernel.reshape(spec.out_channels, spec.group_in, *spec.kernel_size)
    )


def _rank_of(kernel: Tensor) -> int:
    """The number of directions that its outputs have."""
    small = kernel if len(kernel) <= kernel.shape[1] else kernel.T
    values = torch.linalg.eigvalsh(small @ small.T)
    return int((values > _NEGLIGIBLE * values[-1]).sum())


def _truncated(kernel: Tensor, second: SecondMoment, rank: int) -> Tensor:
    """The kernel of this rank whose outputs are nearest."""
    if rank >= min(kernel.shape):
        return kernel
    outputs = leading_outputs(kernel, second, rank)  # (out, rank)
    return outputs @ (outputs.T @ kernel)


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
