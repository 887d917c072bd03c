"""Outputs from inside a network, for one model to be taught by another.

Romero et al. 2015, "FitNets: Hints for Thin Deep Nets".
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from tdecomp.layers.chain import Chain
from tdecomp.model.batches import Batches, tensors_of

_HINTS = 4


def hinted(model: nn.Module) -> list[str]:
    """A few modules whose outputs are worth comparing: blocks that hold chains, evenly spread.

    A chain alone is none: what it gives before norm and activation is not what the next one sees.
    """

    def blocks(name: str) -> list[str]:
        prefix = f"{name}." if name else ""
        return [
            prefix + child
            for child, module in model.get_submodule(name).named_children()
            if not isinstance(module, Chain) and any(isinstance(m, Chain) for m in module.modules())
        ]

    names = blocks("")
    while len(names) == 1 and blocks(names[0]):
        names = blocks(names[0])
    if len(names) <= _HINTS:
        return names
    return [names[round(i * (len(names) - 1) / (_HINTS - 1))] for i in range(_HINTS)]


class Outputs:
    """The outputs of a model and, as hints, of some modules in it."""

    def __init__(self, model: nn.Module, hints: Sequence[str]) -> None:
        known = dict(model.named_modules())
        self._hinted = {name: known[name] for name in hints if name in known}
        self._found: dict[str | int, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Outputs":
        for name, module in self._hinted.items():

            def take(_: Any, __: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor) and output.is_floating_point():
                    # What follows may change it in place.
                    self._found[name] = output.clone()

            self._stack.callback(module.register_forward_hook(take).remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def of(self, model: nn.Module, batches: Batches, batch: Any) -> dict[str | int, Tensor]:
        """The outputs of one call by their positions, the hints by their modules' names."""
        self._found = {}
        outputs = tensors_of(batches.run(model, batch))
        return {**self._found, **dict(enumerate(outputs))}
