"""Two layers in place of one, whose inner size can be reduced further on data."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tdecomp.composer.core import LowRankSolution, refuse_groups, resolve_size
from tdecomp.decomposers.fit_layer import factorize
from tdecomp.decomposers.svd import SVD
from tdecomp.layers.chain import Chain
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.example import LAYOUTS, in_layout, layout_of
from tdecomp.runtime.torch_state import full_precision, no_inference_mode


class Factorized(Chain):
    """Two layers in place of one: the base of `FactorizedLinear` and `FactorizedConv2d`."""

    module0: nn.Linear | nn.Conv2d  # to the latent size, without a bias
    module1: nn.Linear | nn.Conv2d  # from there to the output
    replaced: LayerSpec

    _layer: ClassVar[type[Any]]  # in whose place such a module can stand
    _arguments: ClassVar[tuple[str, ...]]  # of its constructor
    _unit: ClassVar[str]  # "features" or "channels", in the names of its sizes
    _method: ClassVar[SVD]

    def __init__(self, spec: LayerSpec, latent_size: int | float, **placed: Any) -> None:
        super().__init__()
        refuse_groups(spec.groups)
        option = f"latent_{self._unit}"
        latent = resolve_size(option, latent_size, spec.in_channels, spec.out_channels)
        largest = max_latent(spec)
        if latent > largest:
            remedy = f"at most {largest}: choose less, or keep the layer as it is"
            raise ValueError(f"{option}: {latent} saves no MACs on {spec}; expected {remedy}")
        self.method, self.rank, self.replaced = self._method.name, latent, spec
        for i, stage in enumerate(self._method.stages(spec, latent)):
            self.add_module(f"module{i}", stage.build(**placed))
        self.reset_parameters()

    @classmethod
    def of(cls, layer: Any, latent_size: int | float, keep_weights: bool = True) -> Self:
        """Two layers in place of one; see `FactorizedLinear.from_linear`."""
        if not isinstance(layer, cls._layer):
            expected = f"an nn.{cls._layer.__name__}"
            raise TypeError(f"module: expected {expected}, got {type(layer).__name__}")
        weight, bias = layer.weight, layer.bias
        options = {name: getattr(layer, name) for name in cls._arguments}
        options |= {f"latent_{cls._unit}": latent_size, "bias": bias is not None}
        with no_inference_mode():
            made = cls(**options, device="meta", dtype=weight.dtype).to_empty(device=weight.device)
        if keep_weights:
            factors = factorize(cls._method, weight, made.replaced, made.latent_size)
            made._put(factors.stage_weights(), bias)
        else:
            made.reset_parameters()
        for name, values in made.named_parameters():  # such as module1.bias
            values.requires_grad_(getattr(layer, name.split(".")[1]).requires_grad)
        in_layout(made, layout_of(layer))
        return made.train(layer.training)

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

        >>> tdecomp.composer.FactorizedLinear(64, 64, latent_features=16).should_factorize(15)
        True
        """
        proposed = resolve_size("proposed_rank", proposed_rank, self.in_size, self.out_size)
        return proposed < self.latent_size

    def set_rank(self, input: Tensor, rank: int) -> None:  # noqa: A002
        """Reduce the latent size to `rank` so that the outputs for `input` change least.

        >>> layer = tdecomp.composer.FactorizedLinear(64, 32, latent_features=8)
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
        wanted = resolve_size("rank", rank, self.in_size, self.out_size)
        if wanted > self.latent_size:
            present = f"{self.latent_size}, the present latent size"
            remedy = "what was cut off is lost: factorize the original layer again for more"
            raise ValueError(f"rank: got {wanted}; expected at most {present}; {remedy}")
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
            one = "one matrix in place of two is a plain layer, not a factorized one"
            raise ValueError(f"solution: got no Wa or no Wb; expected both: {one}")
        if not all(isinstance(part.weight, nn.Parameter) for part in self):
            bake = "bake it in (remove_parametrizations, prune.remove) and repeat"
            raise ValueError(f"module0 or module1 computes its weight; expected parameters: {bake}")
        parts = [solution.Wa, solution.Wb]
        if not self.replaced.ndim:
            parts = [part.mT for part in parts]
        stages = self._method.stages(self.replaced, len(parts[0]))
        got, expected = [tuple(part.shape) for part in parts], [s.weight_shape for s in stages]
        if solution.bias is not None:
            got.append(tuple(solution.bias.shape))
            expected += [] if self.module1.bias is None else [(self.out_size,)]
        if got != expected:
            wanted = f"{self.replaced}; expected {expected}, as from its solution_for_rank"
            raise ValueError(f"solution: got shapes {got}, which do not fit {wanted}")
        self._put(parts, solution.bias)

    def _put(self, weights: Sequence[Tensor], bias: Tensor | None) -> None:
        """Take weights (latent, in, …) and (out, latent, …); a bias of None stands for zeros."""
        with full_precision(self.module0.weight.device):
            for part, values in zip((self.module0, self.module1), weights, strict=True):
                held = values.to(part.weight.device, part.weight.dtype, copy=True)
                part.weight.grad = None
                part.weight.data = held.contiguous(memory_format=LAYOUTS[layout_of(part)])
            if self.module1.bias is not None:
                self.module1.bias.copy_(torch.zeros(self.out_size) if bias is None else bias)
        self.rank = len(weights[0])
        setattr(self.module0, f"out_{self._unit}", self.rank)
        setattr(self.module1, f"in_{self._unit}", self.rank)


def max_latent(spec: LayerSpec) -> int:
    """The largest r for which ``r · fan_in + r · out < fan_in · out``."""
    return (spec.fan_in * spec.out_channels - 1) // (spec.fan_in + spec.out_channels)
