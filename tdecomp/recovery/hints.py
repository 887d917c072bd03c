"""Outputs of modules inside a network, for training one model to give those of another.

Romero et al. 2015, "FitNets: Hints for Thin Deep Nets".
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from tdecomp.calibration.data import Batches
from tdecomp.layers.chain import Chain
from tdecomp.model.batches import tensors_of
from tdecomp.torch_state import hooks

# The largest number of hinted modules.
_HINTS = 4


def hinted(model: nn.Module) -> list[str]:
    """The names of a few blocks that hold chains, evenly spread, whose outputs are compared.

    A chain itself is not compared: norm and activation come between its output and the input of
    the next layer.
    """

    def blocks(name: str) -> list[str]:
        return [
            f"{name}.{child}" if name else child
            for child, module in model.get_submodule(name).named_children()
            if not isinstance(module, Chain) and any(isinstance(m, Chain) for m in module.modules())
        ]

    names = blocks("")
    while len(names) == 1 and blocks(names[0]):
        names = blocks(names[0])
    if len(names) <= _HINTS:
        return names
    return [names[round(i * (len(names) - 1) / (_HINTS - 1))] for i in range(_HINTS)]


class Outputs(hooks):
    """Inside: the outputs of a model and, as hints, of some modules in it."""

    def __init__(self, model: nn.Module, hints: Sequence[str]) -> None:
        self._found: dict[str | int, Tensor] = {}
        super().__init__(
            partial(module.register_forward_hook, partial(self._take, name))
            for name, module in model.named_modules()
            if name in hints
        )

    def of(self, model: nn.Module, batches: Batches, batch: Any) -> dict[str | int, Tensor]:
        """The outputs of one call by position, and those of the hinted modules by name."""
        self._found = {}
        outputs = tensors_of(batches.run(model, batch))
        return {**self._found, **dict(enumerate(outputs))}

    def _take(self, name: str, _: Any, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            self._found[name] = output.clone()  # the next module may change it in place
