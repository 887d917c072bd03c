"""torch's fused transformer layers, which read weights themselves: off where a chain is inside.

A `TransformerEncoderLayer` finds out by itself that a weight without values is not for its kernel.
A `TransformerEncoder` looks at its first layer alone, and hands all of them nested tensors, which
only the kernel takes.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from tdecomp.layers.chain import Chain
from tdecomp.model.opened.attention import SeparateAttention
from tdecomp.model.opened.base import Opened, has_chains


def switch_off(model: nn.Module, undo: ExitStack) -> None:
    """Let encoders that hold chains or open modules make no nested tensors, until `undo` is run."""
    for module in _nesting(model):
        if any(isinstance(part, (Chain, Opened)) for part in module.modules()):
            undo.callback(_set, module, True)
            _set(module, False)


def switched_on_again(model: nn.Module) -> Callable[[], None]:
    """A function that lets encoders make nested tensors that do now, unless they hold chains."""
    return partial(_switch_on, _nesting(model))


def switch_on(model: nn.Module, undo: ExitStack) -> None:
    """Let encoders make nested tensors again that did before they held chains."""
    for module in (m for m in model.modules() if _OFF in vars(m)):
        undo.callback(_set, module, False)
        _switch_on([module])


def _switch_on(encoders: Sequence[nn.Module]) -> None:
    for module in encoders:
        if not has_chains(module):
            _set(module, True)


# What tells that an encoder made nested tensors before, also in a copy of it.
_OFF = "_nested_before_chains"


def _set(module: Any, nested: bool) -> None:
    module.use_nested_tensor = nested
    if nested:
        vars(module).pop(_OFF, None)
    else:
        vars(module)[_OFF] = True


def _nesting(model: nn.Module) -> list[nn.TransformerEncoder]:
    encoders = (m for m in model.modules() if isinstance(m, nn.TransformerEncoder))
    return [encoder for encoder in encoders if getattr(encoder, "use_nested_tensor", False)]


def has_fused_layers(model: nn.Module, layers: Collection[nn.Module]) -> bool:
    """Whether one of these layers is in a module for which torch has a fused kernel."""
    inside = (m for part in model.modules() if _has_kernel(part) for m in part.modules())
    return any(module in layers for module in inside)


def _has_kernel(module: nn.Module) -> bool:
    if isinstance(module, nn.TransformerEncoderLayer):
        return bool(module.activation_relu_or_gelu) and _has_kernel(module.self_attn)
    if not isinstance(module, nn.MultiheadAttention) or isinstance(module, SeparateAttention):
        return False
    usual = module.batch_first and module.num_heads % 2 == 0 and module._qkv_same_embed_dim
    added = module.bias_k is not None or module.add_zero_attn
    return usual and not added and module.out_proj.bias is not None
