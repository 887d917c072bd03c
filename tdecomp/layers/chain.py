"""The chain of stock layers that stands where a layer stood."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tdecomp.layers.spec import LayerSpec

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
        Of each group; a pair (R3, R4) for Tucker-2.
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

    def mirror_weight(self) -> None:
        """Let `weight` and `bias` have the dtype and `requires_grad` that the weights have now."""
        first, spec = next(self.parameters(), None), self.replaced
        if first is not None and spec is not None:
            shapes = {"weight": spec.weight_shape, "bias": (spec.out_channels,)}
            for name, shape in shapes.items():
                empty = torch.empty(shape, dtype=first.dtype, device="meta")
                described = empty.as_subclass(_Described)
                described.requires_grad_(first.requires_grad and first.is_floating_point())
                vars(self)[name] = described if spec.bias or name == "weight" else None

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


class _Described(Tensor):
    """The weight of a replaced layer without its values, on the meta device.

    Torch multiplies ordinary tensors by those on the meta device without an error, and returns
    whatever is in memory: here that is refused.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        if not all(isinstance(tensor, cls) for tensor in tensors):
            raise ValueError(
                "something needs the values of a decomposed layer's weight, which are gone: leave "
                "that layer alone (exclude=[...]); with example_inputs those of the model's own "
                "forward are found"
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
