"""Routers and gates of mixtures: the weight that their forward multiplies with, as a layer."""

import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tdecomp.layers.spec import kind_of
from tdecomp.model.opened.base import Opened, own_weights

_NAMED = re.compile(r"(Router|Gate)$", re.IGNORECASE)
_LAYER = "projection"


class OpenRouter(Opened):
    """A module that runs its own forward, in which ``linear(x, self.weight)`` calls a layer."""

    names: ClassVar[tuple[str, ...]] = (_LAYER,)

    @classmethod
    def opens(cls, module: nn.Module) -> bool:
        if not _NAMED.search(type(module).__name__) or kind_of(module) or "forward" in vars(module):
            return False
        if isinstance(module, Opened) or hasattr(module, _LAYER):
            return False
        held = own_weights(module, ("weight", "bias"))
        others = {name for name, p in module._parameters.items() if p is not None}
        others -= {"weight", "bias"}
        return not others and "weight" in held and held["weight"].dim() == 2

    def open_up(self) -> None:
        weight, bias = self._parameters.pop("weight"), self._parameters.pop("bias", None)
        assert weight is not None
        layer = nn.Linear(1, 1, bias=False, device="meta")  # which draws no random numbers
        layer.out_features, layer.in_features = weight.shape
        layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
        self.had_bias = bias is not None
        self.add_module(_LAYER, layer.train(self.training))

    def close_up(self) -> None:
        layer: Any = self._modules.pop(_LAYER)
        self.register_parameter("weight", layer.weight)
        if vars(self).pop("had_bias"):
            self.register_parameter("bias", layer.bias)

    def __getattr__(self, name: str) -> Any:
        # What its class has, such as methods that its forward calls.
        if name in ("weight", "bias") and _LAYER in self._modules:
            return _seen(self._modules[_LAYER], name)
        found = getattr(vars(self).get("closed_class"), name, None)
        if found is not None:
            return found.__get__(self) if callable(found) else found
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.closed_class.forward(self, *args, **kwargs)


def _seen(layer: Any, name: str) -> Any:
    """What the forward pass may take for the layer's weight or bias."""
    value = getattr(layer, name)
    if value is None:
        return None
    seen = torch.empty(value.shape, dtype=value.dtype, device="meta").as_subclass(_Operand)
    seen.layer = layer
    return seen


class _Operand(Tensor):
    """A weight or a bias without values: products with it are those of its layer."""

    layer: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            operands: list[Any] = [*args, *kwargs.values()]
            x, weight = operands[:2]
            if isinstance(weight, cls):
                return weight.layer(x.to(weight.dtype)).to(x.dtype)
        if func in _CASTS:
            return args[0]  # the layer computes in the precision of its weights
        if func in _DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        raise ValueError(
            "the values of a decomposed router's weight are read, which are gone: leave it alone "
            "with exclude=[...]"
        )


_CASTS = {Tensor.to, Tensor.float, Tensor.type, Tensor.type_as, Tensor.contiguous}
_DESCRIBING = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "shape", "ndim", "requires_grad")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
}
