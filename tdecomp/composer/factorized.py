"""Two layers in place of one, whose inner size can be reduced further on data."""

from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn

from tdecomp.composer.core import LowRankSolution, resolve_size
from tdecomp.decomposers.fit_layer import factorize
from tdecomp.decomposers.lowrank import LowRank
from tdecomp.decomposers.svd import SVD
from tdecomp.layers.chain import Chain
from tdecomp.layers.spec import LayerSpec
from tdecomp.torch_state import undisturbed


class Factorized(Chain):
    """Two layers in place of one: the base of `FactorizedLinear` and `FactorizedConv2d`."""

    module0: nn.Linear | nn.Conv2d  # to the latent size, without a bias
    module1: nn.Linear | nn.Conv2d  # from there to the output
    replaced: LayerSpec

    def _split(self, option: str, size: int | float, spec: LayerSpec, **placed: Any) -> None:
        """Make both layers on a device and in a dtype, at the end of each constructor."""
        latent, largest = latent_of(option, size, spec), max_latent(spec)
        if latent > largest:
            raise ValueError(
                f"{option}: {latent} saves no MACs on {spec}; expected at most {largest}. Choose a "
                "smaller one, or keep the layer as it is"
            )
        method = _method(spec)
        self.method, self.rank, self.replaced = method.name, latent, spec
        for i, stage in enumerate(method.stages(spec, latent)):
            self.add_module(f"module{i}", stage.build(**placed))
        self.reset_parameters()

    in_size = property(lambda self: self.replaced.in_channels, doc="Features or channels.")
    out_size = property(lambda self: self.replaced.out_channels, doc="Features or channels.")

    @property
    def latent_size(self) -> int:
        return len(self.module0.weight)

    def reset_parameters(self) -> None:
        """Give both layers new random weights, as torch initialises them."""
        self.module0.reset_parameters()
        self.module1.reset_parameters()

    def should_factorize(self, proposed_rank: int | float) -> bool:
        """Whether that latent size would take fewer MACs than the present one: if it is smaller.

        >>> from tdecomp.composer import FactorizedLinear
        >>> FactorizedLinear(64, 64, latent_features=16).should_factorize(15)
        True
        """
        return latent_of("proposed_rank", proposed_rank, self.replaced) < self.latent_size

    def set_rank(self, input: Tensor, rank: int) -> None:  # noqa: A002
        """Reduce the latent size to `rank` so that the outputs for `input` change least.

        >>> from tdecomp.composer import FactorizedLinear
        >>> layer = FactorizedLinear(64, 32, latent_features=8)
        >>> layer.set_rank(torch.randn(100, 64), 4)
        >>> layer.latent_features
        4

        The parameters stay the same objects, with another shape: an optimizer can go on with them,
        but its state for `module0.weight` and `module1.weight`, such as momenta, no longer fits:
        remove it with ``optimizer.state.pop(parameter, None)``. Their gradients are removed.

        Raises
        ------
        ValueError
            If the rank is above the present latent size.
        """
        wanted = latent_of("rank", rank, self.replaced)
        if wanted > self.latent_size:
            raise ValueError(
                f"rank: got {wanted}; expected at most {self.latent_size}, the present latent "
                "size. What was cut off is lost: factorize the original layer again for more"
            )
        if wanted < self.latent_size:
            self.apply_solution(self.solution_for_rank(input, wanted))

    @abstractmethod
    def solution_for_rank(self, input: Tensor, rank: int) -> LowRankSolution:  # noqa: A002
        """The weights of latent size `rank` that change the outputs for `input` least.

        The module is not changed: compare several ranks by their `nmse`, then `apply_solution`. A
        rank of the present latent size or more gives the present weights.
        """

    def apply_solution(self, solution: LowRankSolution) -> None:
        """Take a solution's weights, whether they save MACs or not; see `set_rank` for optimizers.

        Raises
        ------
        ValueError
            If it lacks two factors of this module's sizes, or has a bias that the module lacks.
        """
        if solution.Wa is None or solution.Wb is None:
            raise ValueError(
                "solution: got no Wa or no Wb; expected both. One matrix in place of two is a "
                "plain layer, not a factorized one"
            )
        first, second, bias = solution.Wa, solution.Wb, solution.bias
        if not self.replaced.ndim:
            first, second = first.mT, second.mT
        latent = len(first)
        at0, at1 = self.module0.weight, self.module1.weight
        if not (isinstance(at0, nn.Parameter) and isinstance(at1, nn.Parameter)):
            raise ValueError(
                "module0 or module1 computes its weight from other parameters; expected plain "
                "ones. Bake it in (remove_parametrizations, prune.remove) and repeat"
            )
        expected = [(latent, *at0.shape[1:]), (self.out_size, latent, *at1.shape[2:])]
        if [tuple(first.shape), tuple(second.shape)] != expected:
            raise ValueError(
                f"solution: got weights of shapes {tuple(first.shape)} and {tuple(second.shape)}, "
                f"which do not fit {self.replaced}; expected one of solution_for_rank's"
            )
        if bias is not None and (self.module1.bias is None or bias.shape != (self.out_size,)):
            held = "none" if self.module1.bias is None else f"one of {self.out_size}"
            raise ValueError(
                f"solution: got a bias of shape {tuple(bias.shape)} where the module has {held}; "
                "expected one of solution_for_rank's, or of factorizing without a bias"
            )
        with undisturbed(at0.device):
            _resize(at0, first)
            _resize(at1, second)
            if self.module1.bias is not None:
                self.module1.bias.copy_(torch.zeros(self.out_size) if bias is None else bias)
        self.rank = latent
        unit = "channels" if self.replaced.ndim else "features"
        setattr(self.module0, f"out_{unit}", latent)
        setattr(self.module1, f"in_{unit}", latent)

    def take(self, layer: nn.Linear | nn.Conv2d, keep_weights: bool) -> Self:
        """Move from the meta device to that of the replaced layer, with its mode and weights."""
        weight, bias, spec = layer.weight, layer.bias, self.replaced
        self.to_empty(device=weight.device)
        parts = (self.module0, self.module1)
        if keep_weights:
            factors = factorize(_method(spec), weight, spec, self.latent_size).stage_weights()
            with undisturbed(weight.device):
                for part, values in zip(parts, factors, strict=True):
                    part.weight.copy_(values)
                if bias is not None and self.module1.bias is not None:
                    self.module1.bias.copy_(bias)
        else:
            self.reset_parameters()
        for part in parts:
            part.weight.requires_grad_(weight.requires_grad)
        if bias is not None and self.module1.bias is not None:
            self.module1.bias.requires_grad_(bias.requires_grad)
        if _layout(weight) == torch.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self.train(layer.training)


def _method(spec: LayerSpec) -> SVD:
    return LowRank() if spec.ndim else SVD()


def latent_of(option: str, size: int | float, spec: LayerSpec) -> int:
    """A latent size, of which fractions are of the smaller of inputs and outputs."""
    return resolve_size(option, size, min(spec.in_channels, spec.out_channels))


def max_latent(spec: LayerSpec) -> int:
    """The largest r for which ``r · fan_in + r · out < fan_in · out``."""
    return (spec.fan_in * spec.out_channels - 1) // (spec.fan_in + spec.out_channels)


def _layout(weight: Tensor) -> torch.memory_format:
    # A kernel of size 1 is contiguous in every format; only an unambiguous answer counts.
    last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not weight.is_contiguous() else torch.contiguous_format


def _resize(parameter: nn.Parameter, values: Tensor) -> None:
    held = values.to(parameter.device, parameter.dtype, copy=True)
    parameter.grad = None
    parameter.data = held.contiguous(memory_format=_layout(parameter))
