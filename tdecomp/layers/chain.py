"""The chain of stock layers that stands where a layer stood."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tdecomp.layers.layout import channels_last_of
from tdecomp.layers.spec import LayerSpec
from tdecomp.runtime.torch_state import full_precision

Rank = int | tuple[int, ...]


class Chain(nn.Sequential):
    """An `nn.Sequential` of stock torch layers that remembers what it replaced.

    >>> chain = Chain(nn.Linear(8, 2, bias=False), nn.Linear(2, 8))
    >>> list(chain.state_dict())
    ['0.weight', '1.weight', '1.bias']

    Code around the layer may go on reading its attributes (`in_features`, `stride`, …) and the
    shape, dtype and `requires_grad` of its `weight` and `bias`. These two are tensors without
    values, on the meta device: no parameters, and in no state dict.

    Training a chain: its factors multiply, so that a step in all of them changes their product
    more than the same step changes a weight. Begin between a tenth and a third of the rate of the
    original's training and let it rise over some steps (`OneCycleLR`). Of a ResNet-20 at a quarter
    of its MACs, 200 steps of plain Adam at a constant 1e-3 let no method diverge, but cost good
    networks points: the original 4, `cp` fitted to data 12, as its components cancel each other
    (`component norms` in the report); one cycle up to 1e-3 cost that 3, one up to 1e-4 gained 1.6.
    Leave `weight_decay` of the optimizer at 0 for factors, which it draws to lower ranks:
    `tdecomp.factor_decay` is that of their product. In 600 steps neither gained anything.

    Attributes
    ----------
    method, decomposer : str, Decomposer
        The method that made it: its name, and the method with its options.
    rank : int or tuple of int
        Of each group; a tuple for methods of several ranks, such as (R3, R4) of Tucker-2.
    replaced : LayerSpec
        The layer that stood here before.
    """

    method: str | None = None
    decomposer: Any = None  # of a type that is defined in a room above this one
    rank: Rank | None = None
    replaced: LayerSpec | None = None
    # torch.jit.script knows none of these types, and scripted code needs none of these facts.
    __jit_ignored_attributes__ = ("method", "decomposer", "rank", "replaced", "weight", "bias")

    @classmethod
    def from_stages(
        cls, stages: Sequence[nn.Module], decomposer: Any, rank: Rank, replaced: LayerSpec
    ) -> "Chain":
        chain = cls(*stages)
        chain.method, chain.decomposer = decomposer.name, decomposer
        chain.rank, chain.replaced = rank, replaced
        vars(chain).update(replaced.attributes, _parameters=_NoParameters())
        chain.mirror_weight()
        # Loading may assign tensors of another type.
        chain.register_load_state_dict_post_hook(_mirror)  # type: ignore[no-untyped-call]
        return chain

    def add_bias(self) -> None:
        """Note that the last stage has a bias now, where the layer had none."""
        assert self.replaced is not None
        self.replaced = replace(self.replaced, bias=True)
        self.mirror_weight()

    def mirror_weight(self) -> None:
        """Let `weight` and `bias` have the dtype and `requires_grad` that the weights have now."""
        first, spec = next(self.parameters(), None), self.replaced
        if first is not None and spec is not None:
            for name, shape in self.shapes().items():
                described = Described.like(first, shape)
                vars(self)[name] = described if spec.bias or name == "weight" else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of the weight and of the bias that the layer had."""
        assert self.replaced is not None
        return {"weight": self.replaced.weight_shape, "bias": (self.replaced.out_channels,)}

    def to_layer(self) -> nn.Module:
        """The layer that stood here, its weight the product of the factors; the chain stays.

        >>> model = nn.Sequential(nn.Linear(8, 6))
        >>> result = tdecomp.decompose(model, "svd", rank=2, progress=False)
        >>> layer = result.model[0].to_layer()
        >>> layer, int(torch.linalg.matrix_rank(layer.weight))
        (Linear(in_features=8, out_features=6, bias=True), 2)

        Multiplied in float64 and rounded once to the dtype of the factors. It has their device,
        memory layout, training mode, and `requires_grad` where any of them has it.
        `tdecomp.recompose` does this for a whole model.

        Raises
        ------
        ValueError
            If the chain replaced no layer, if its method does not define `factors_of`, or if its
            stages are no longer those of the method (adapted, quantized).
        """
        spec, method = self.replaced, self.decomposer
        if spec is None or method is None:
            raise ValueError(
                "to_layer: the chain stands for no layer; expected one that decompose() or load() "
                "put into a model, its method registered"
            )
        self._check_stages()
        weights = dict(self.named_parameters())
        first, bias = next(iter(weights.values())), self[-1].bias if spec.bias else None
        with full_precision(first.device):
            factors = method.factors_in(self)
            if factors is None:
                raise ValueError(
                    f"{method.name} cannot tell the factors of its chain; expected a method that "
                    "defines factors_of"
                )
            kernel = spec.to_forward_layout(factors.to_kernel())
            # The table of an Embedding, and an output layer with it, may have been resized since.
            into, out = kernel.shape[1] * spec.groups, len(kernel)
            spec = replace(spec, in_channels=into, out_channels=out)
            layer: nn.Module = spec.build(first.device, first.dtype)
            spec.put(layer, kernel)
            if isinstance(bias, Tensor):
                layer.get_parameter("bias").copy_(bias).requires_grad_(bias.requires_grad)
            if last := channels_last_of(weights.values()):
                layer.to(memory_format=last)  # type: ignore[call-overload]
        trained = any(p.requires_grad for p in weights.values() if p is not bias)
        layer.get_parameter("weight").requires_grad_(trained)
        return layer.train(self.training)

    def _check_stages(self) -> None:
        """Raise a ValueError unless the stages are modules as the method builds them."""
        built = [
            s.build(torch.device("meta")) for s in self.decomposer.stages(self.replaced, self.rank)
        ]
        if len(built) != len(self):
            raise ValueError(f"it has {len(self)} stages, {self.method} made {len(built)}")
        for at, (stage, made) in enumerate(zip(self, built, strict=True)):
            odd = [p for p in stage.parameters() if type(p.data) not in (Tensor, nn.Parameter)]
            if not isinstance(stage, type(made)) or odd:
                kind = type(odd[0].data) if odd else type(stage)
                raise ValueError(
                    f"its stage {at} is a {kind.__module__}.{kind.__qualname__} now, {self.method} "
                    f"made a {type(made).__name__}: merge adapters first (merge_and_unload), and "
                    "multiply back before quantizing"
                )

    def _apply(self, fn: Any, recurse: bool = True) -> "Chain":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if "weight" in vars(self):
            self.mirror_weight()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        # As `functional_call` does with values that the stages would not see.
        if name in ("weight", "bias") and isinstance(value, torch.Tensor):
            raise _no_parameter(name)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name.partition("_")[0] in ("weight", "bias"):
            raise _no_parameter(name)
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        return "" if self.method is None else f"method={self.method!r}, rank={self.rank}"


def _mirror(chain: Chain, _: Any) -> None:
    chain.mirror_weight()


class Described(Tensor):
    """The weight of a replaced layer without its values, on the meta device.

    Torch multiplies ordinary tensors by those on the meta device without an error, and returns
    whatever is in memory: here that is refused.
    """

    _is_hf_initialized = True  # transformers then gives it no values when it loads a model

    @classmethod
    def like(cls, weight: Tensor, shape: tuple[int, ...]) -> Self:
        """One of this shape, in all else like a weight that is there."""
        empty = torch.empty(shape, dtype=weight.dtype, device="meta").as_subclass(cls)
        empty.requires_grad_(weight.requires_grad and weight.is_floating_point())
        return empty

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        weights = [x for x in tensors if isinstance(x, cls)]
        if len(weights) < len(tensors):
            shapes = ", ".join(str(tuple(weight.shape)) for weight in weights)
            raise ValueError(
                f"something needs the values of a decomposed layer's weight (of shape {shapes}), "
                "which are gone: leave that layer alone (exclude=[...]); with example_inputs those "
                "of the model's own forward are found"
            )
        described: Any = super().__torch_function__
        if not torch.jit.is_tracing():
            return described(func, types, args, kwargs)
        # The tracer would copy the values, for a shape that is the same in every call.
        tracer: Any = torch._C
        state = tracer._get_tracing_state()
        tracer._set_tracing_state(None)
        try:
            return described(func, types, args, kwargs)
        finally:
            tracer._set_tracing_state(state)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.detach().clone().requires_grad_(self.requires_grad)


_Described = Described  # as models name it that version 0.2 pickled


class _NoParameters(dict[str, nn.Parameter | None]):
    """A chain's own parameters: there are none, as torch's old weight and spectral norms learn."""

    def __missing__(self, name: str) -> nn.Parameter | None:
        raise _no_parameter(name)

    def __delitem__(self, name: str) -> None:
        raise _no_parameter(name)


def _no_parameter(name: str) -> ValueError:
    return ValueError(
        f"a chain has no parameter {name!r}: prune or reparametrize the layers in it (chain[0], "
        "chain[-1]) instead"
    )
