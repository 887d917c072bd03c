"""Routers and gates of mixtures: the weight that their forward multiplies with, as a layer."""

import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tdecomp.layers.spec import kind_of
from tdecomp.model.opened.base import Opened, linear_of, own_weights

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
        self.had_bias = bias is not None
        self.add_module(_LAYER, linear_of(weight, bias).train(self.training))

    def close_up(self) -> None:
        layer: Any = self._modules.pop(_LAYER)
        self.register_parameter("weight", layer.weight)
        if vars(self).pop("had_bias"):
            self.register_parameter("bias", layer.bias)

    def closed_name(self, layer: str, *, bias: bool) -> str:
        del layer  # there is one
        return "bias" if bias else "weight"

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
    return None if value is None else _Operand(layer, value)


class _Operand:
    """A weight or a bias without values, in products with which the layer is called instead.

    torch asks what is given to its functions for `__torch_function__`, of tensors or not.
    """

    _is_hf_initialized = True  # transformers then gives it no values when it loads a model

    def __init__(self, layer: nn.Module, value: Tensor) -> None:
        self.layer = layer
        self.shape, self.dtype, self.ndim = value.shape, value.dtype, value.ndim
        self.requires_grad = value.requires_grad

    @property
    def device(self) -> torch.device:
        return next(self.layer.parameters()).device

    def to(self, *_: Any, **__: Any) -> "_Operand":
        """Itself: the layer computes in the precision of its weights."""
        return self

    float = type = type_as = contiguous = to

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands: list[Any] = [*args, *(kwargs or {}).values()]
        if func is functional.linear and isinstance(operands[1], cls):
            x, weight = operands[:2]
            return weight.layer(x.to(weight.dtype)).to(x.dtype)
        raise ValueError(
            "the values of a decomposed router's weight are read, which are gone: leave it alone "
            "with exclude=[...]"
        )
