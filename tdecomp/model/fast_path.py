"""torch's fused transformer layers, which read weights themselves: off where a chain is inside.

A `TransformerEncoderLayer` finds out by itself that a weight without values is not for its kernel.
A `TransformerEncoder` looks at its first layer alone, and hands all of them nested tensors, which
only the kernel takes.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from torch import nn

from tdecomp.layers.chain import Chain
from tdecomp.model.opened.base import Opened


def switch_off(model: nn.Module, undo: ExitStack) -> None:
    """Let encoders that hold chains or open modules make no nested tensors, until `undo` is run."""
    for module in _nesting(model):
        if any(isinstance(part, (Chain, Opened)) for part in module.modules()):
            undo.callback(setattr, module, "use_nested_tensor", True)
            module.use_nested_tensor = False


def switched_on_again(model: nn.Module) -> Callable[[], None]:
    """A function that lets encoders make nested tensors that do now, unless they hold chains."""
    return partial(_switch_on, _nesting(model))


def _switch_on(encoders: list[nn.TransformerEncoder]) -> None:
    for module in encoders:
        if not any(isinstance(part, Chain) for part in module.modules()):
            module.use_nested_tensor = True


def _nesting(model: nn.Module) -> list[nn.TransformerEncoder]:
    encoders = (m for m in model.modules() if isinstance(m, nn.TransformerEncoder))
    return [encoder for encoder in encoders if getattr(encoder, "use_nested_tensor", False)]


def has_fused_layers(model: nn.Module) -> bool:
    """Whether chains are in modules for which torch has a fused kernel."""
    fused = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
    chains = (m for part in model.modules() if isinstance(part, fused) for m in part.modules())
    return any(isinstance(module, Chain) for module in chains)
