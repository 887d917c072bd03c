"""The factors of a chain whose outputs come nearest to the original layer's outputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from tdecomp.calibration.accumulator import Accumulator, enough
from tdecomp.calibration.counted_rows import CountedRows
from tdecomp.calibration.estimate import helps
from tdecomp.calibration.layer_moments import LayerMoments, is_widest
from tdecomp.decomposers.assemble import write_factors
from tdecomp.decomposers.factors import Factorization
from tdecomp.decomposers.fit_layer import factorize
from tdecomp.layers.patches import channels_last, dense
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.leading_outputs import leading_outputs
from tdecomp.linalg.least_of import least_of
from tdecomp.linalg.second_moment import SecondMoment
from tdecomp.recovery.checks import Checks
from tdecomp.recovery.replaced import ReplacedLayer
from tdecomp.recovery.walk import Item
from tdecomp.recovery.weights import Weights

# The ridges towards the original kernel that are tried, as shares of the inputs' mean square; with
# the last one nothing is left but the original kernel.
_RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, math.inf)
# The weights of inputs that vary alike in all directions that are tried, in samples.
_ALIKE = (1 / 64, 1 / 16, 1 / 4, 1.0, 4.0, 16.0)
_USUAL_RIDGE, _USUAL_ALIKE = 1.0, 1.0  # where there are too few samples to choose by
_FOLDS = 4  # one of so many parts of the samples chooses the ridge
_ITERATIONS = 25  # of a fit, which starts from the chain's own factors


@dataclass(frozen=True)
class Joint:
    """The moments of a chain's inputs x together with the original layer's outputs y."""

    moments: LayerMoments  # of x; without the rows of a sample, which stand below
    sample: Sequence[SecondMoment]
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
        sample: Sequence[SecondMoment] = ()
        if is_widest(sums.spec):  # whose rows are too large to be held twice
            sample = moments.second_moments()
            moments = replace(moments, rows=None)
        return cls(moments, sample, cross, output)

    def merged(self, other: "Joint | None") -> "Joint":
        """Those of the samples of both; of the first alone where its sample of x and y is all."""
        if other is None or is_widest(self.spec):
            return self
        mine = self.moments.count / (self.moments.count + other.moments.count)
        return Joint(
            self.moments.merged(other.moments, mine),
            (),
            mine * self.cross + (1 - mine) * other.cross,
            mine * self.output + (1 - mine) * other.output,
        )

    @property
    def spec(self) -> LayerSpec:
        return self.moments.spec

    def weighed(self, weights: Weights) -> "Joint":
        """With outputs whose errors count alike."""
        cross, output = (torch.stack(weights.of(part)) for part in (self.cross, self.output))
        return replace(self, cross=cross, output=output)

    def is_finite(self) -> bool:
        parts = (*self.moments.tensors().values(), self.cross, self.output)
        sums = [*(float(part.sum()) for part in parts), *(one.trace for one in self.sample)]
        return all(map(math.isfinite, sums))

    def second_moments(self, dtype: torch.dtype | None = None) -> Sequence[SecondMoment]:
        """Of x; see `LayerMoments.second_moments`."""
        return self.sample or self.moments.second_moments(dtype)

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
        self._samples = max(sum(item.samples for item in items if not item.held), 1)
        self._sums = [
            # The patches that are held of the widest layers shall be those of the other sums.
            Accumulator(
                spec,
                share * enough(spec),
                patches if is_widest(spec) else int(share * patches),
                seed,
            )
            for share in (1 - 1 / _FOLDS, 1 / _FOLDS)
        ]
        generator = np.random.default_rng(seed)
        fit = len(items) - held
        self._fold = Checks(spec, fit // _FOLDS if self._several else fit, generator)
        self._judge = Checks(spec, held or fit, generator)

    def add(self, item: Item, x: Tensor, y: Tensor, rows: CountedRows) -> None:
        """Add one call: a chain's input and the original layer's output."""
        spec, x, y = self._layer.spec, dense(x), dense(y)
        if x.dim() == (spec.ndim or 0) + 1:  # a sample alone
            x, y = x[None], y[None]
        x, y = channels_last(x, spec), channels_last(y, spec)
        (x, owners), y = rows.of_samples(x, spec, range(item.samples)), rows.of_layer(y, spec)
        if item.held or not self._held_out:
            self._judge.add(x, y, owners, item.samples)
        if item.held:
            return
        cut = len(x) - len(x) // _FOLDS
        if self._several:
            cut = 0 if item.number % _FOLDS == _FOLDS - 1 else len(x)
        fit, fold = self._sums
        fit.add(x[:cut], y[:cut])
        if not (is_widest(spec) and fit.count):  # whose sample is all that is fitted to
            fold.add(x[cut:], y[cut:])
        self._fold.add(x[cut:], y[cut:], owners[cut:], item.samples)

    def refit(self, gradient: Tensor | None, samples: int) -> tuple[float, float, bool]:
        """Fit the chain; the lost shares of the outputs before and after, and whether it changed.

        `gradient` is the second moment of the gradients at the outputs, of so many samples.
        """
        chain, method = self._layer.chain, self._layer.chain.decomposer
        assert method is not None
        before = method.factors_in(chain)
        assert before is not None
        blocks = method.output_blocks(self._layer.spec)
        # Factors that no matrix can be multiplied into are fitted to the outputs as they are.
        importance = gradient if method.last_mixes_outputs else None
        weights = Weights(self._layer.spec, importance, samples, blocks)
        fit, fold = (Joint.of(sums) for sums in self._sums)
        self._sums.clear()
        joint = self._all(fit, fold)
        kernels = joint.moments.kernels(self._layer.layer.get_parameter("weight"))
        ridge, alike = _USUAL_RIDGE, _USUAL_ALIKE
        if fit is not None and self._fold.parts:
            self._fold.weigh(weights.roots)
            rank = self._directions(before)
            ridge, alike = self._best(fit.weighed(weights), weights.of(kernels), rank)
            ridge *= fit.moments.count / joint.moments.count
        del fit, fold  # of wide layers they are large
        fitted = self._fitted(joint, kernels, ridge, alike, before, weights)
        found = joint.moments.kernels(fitted.to_kernel())
        held = chain[-1].bias
        bias = torch.zeros_like(joint.output)
        if isinstance(held, Tensor):
            bias = torch.stack(joint.best_bias(found)).to(held.dtype).double()
        own = held.detach().double().reshape(bias.shape) if isinstance(held, Tensor) else bias
        self._judge.weigh(weights.roots)
        lost = self._judge.errors(
            weights.of(joint.moments.kernels(before.to_kernel())), weights.of(own)
        )
        left = self._judge.errors(weights.of(found), weights.of(bias))
        better = helps(lost, left, held_out=self._held_out)
        if better:
            write_factors(chain, method, fitted)
            if isinstance(held, Tensor):
                held.copy_(bias.flatten())
        variance = self._judge.variance(weights.of(joint.output))
        share = 1.0 / variance if variance > 0 else 0.0
        errors = [share * float(each.sum()) for each in (lost, left if better else lost)]
        return errors[0], errors[1], better

    def _directions(self, factors: Factorization) -> int:
        """The rank of kernels that stand for those of the chain where a ridge is chosen."""
        chain, spec = self._layer.chain, self._layer.spec
        if chain.decomposer is not None and chain.decomposer.last_mixes_outputs:
            # No kernel of it has more directions of outputs than its last layer has inputs.
            return int(factors.groups[0].stage_weights()[-1][0].numel())
        # Else as many as a kernel with as many numbers has.
        numbers = sum(parameter.numel() for parameter in chain.parameters())
        return max(1, numbers // (spec.groups * (spec.fan_in + spec.group_out)))

    def _all(self, fit: Joint | None, fold: Joint | None) -> Joint:
        """The moments of all samples; ValueError if there are none, or none that can be used."""
        joint = fit.merged(fold) if fit is not None else fold
        if joint is None:
            raise ValueError(f"refit: {self._layer}: the batches hold no samples that count")
        if not joint.is_finite():
            raise ValueError(
                f"refit: {self._layer}: its inputs or the original's outputs hold NaN or "
                "infinities, or numbers too large to be squared; expected finite activations. Look "
                "at the batches and at the layers before it"
            )
        return joint

    def _fitted(
        self,
        joint: Joint,
        kernels: Sequence[Tensor],
        ridge: float,
        alike: float,
        start: Factorization,
        weights: Weights,
    ) -> Factorization:
        """Factors for the wanted outputs, rounded as the chain is going to hold them."""
        chain, spec = self._layer.chain, self._layer.spec
        method, seconds = chain.decomposer, joint.second_moments()
        assert method is not None
        assert chain.rank is not None
        parts = zip(kernels, joint.missing(kernels, seconds), seconds, strict=True)
        kernel = torch.cat(weights.of([_target(*part, ridge) for part in parts]))
        kernel = kernel.reshape(spec.out_channels, spec.group_in, *spec.kernel_size)
        weight, begin = spec.from_forward_layout(kernel), weights.of_factors(start, method)
        limited = method.limited(_ITERATIONS)
        leant_on = [second.shrunk(alike / self._samples) for second in seconds]
        fitted = factorize(limited, weight, spec, chain.rank, leant_on, begin)
        dtype = next(chain.parameters()).dtype
        return weights.undone(fitted, method).to(dtype).to(torch.float64)

    def _best(self, fit: Joint, kernels: Sequence[Tensor], rank: int) -> tuple[float, float]:
        """The ridge and the weight of inputs that vary alike, both for most samples.

        With these, kernels of a rank that are fitted to most samples suit the fold best.
        """
        # The choice is one of a few, for which the precision of the layer is enough.
        dtype = torch.promote_types(self._layer.layer.get_parameter("weight").dtype, torch.float32)
        seconds = fit.second_moments(dtype)
        kernels = [kernel.to(dtype) for kernel in kernels]
        missing = [part.to(dtype) for part in fit.missing(kernels, seconds)]

        @cache
        def targets(ridge: float) -> list[Tensor]:
            return [_target(*p, ridge) for p in zip(kernels, missing, seconds, strict=True)]

        def lost(ridge: float, alike: float) -> float:
            share = alike / (self._samples * (1 - 1 / _FOLDS))
            try:
                found = [
                    _truncated(target, second.shrunk(share), rank)
                    for target, second in zip(targets(ridge), seconds, strict=True)
                ]
            except torch.linalg.LinAlgError:  # too little for the precision
                return math.inf
            bias = fit.best_bias(found) if fit.spec.bias else torch.zeros_like(fit.output)
            error = float(self._fold.errors(found, [*bias]).sum())
            return error if math.isfinite(error) else math.inf

        ridge = least_of(_RIDGES, partial(lost, alike=_USUAL_ALIKE), _USUAL_RIDGE)
        return ridge, least_of(_ALIKE, partial(lost, ridge), _USUAL_ALIKE)


def _target(kernel: Tensor, missing: Tensor, second: SecondMoment, ridge: float) -> Tensor:
    """The kernel of full rank whose outputs come nearest, with a ridge towards this kernel."""
    if math.isinf(ridge):
        return kernel
    return kernel + second.solved(missing, ridge * second.trace / second.fan_in)


def _truncated(kernel: Tensor, second: SecondMoment, rank: int) -> Tensor:
    """The kernel of this rank whose outputs are nearest."""
    if rank >= min(kernel.shape):
        return kernel
    outputs = leading_outputs(kernel, second, rank)  # (out, rank)
    return outputs @ (outputs.T @ kernel)
