"""A model of the zoo: tiny, at random weights, called as its library's users call it."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tests.models import Case


def _nothing(_: nn.Module) -> None:
    pass


@dataclass(frozen=True)
class ZooCase(Case):
    """A model, its example inputs, and the double of which torch counts everything.

    Attributes
    ----------
    write_out : callable
        Makes a copy of the model compute attention and experts by plain products.
    methods : str or tuple of str
        What a budget may choose from.
    """

    write_out: Callable[[nn.Module], Any] = _nothing
    methods: str | tuple[str, ...] = "auto"

    def build(self):
        """The model in eval mode, without layers that start at zero: no gradient passes those."""
        model = super().build().eval()
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return model

    def double(self, model):
        """A copy for torch's counter, whose tracker fails on views of parameters that learn."""
        twin = copy.deepcopy(model).requires_grad_(False)
        self.write_out(twin)
        return twin

    def arguments(self):
        """Positional and keyword arguments as `torch.export` takes them, without caches."""
        inputs = self.inputs()
        cached = "use_cache" in inspect.signature(self.build().forward).parameters
        options = {"use_cache": False} if cached else {}
        named = isinstance(inputs, Mapping)
        return ((), {**inputs, **options}) if named else ((inputs,), options)
