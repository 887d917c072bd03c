"""What layers are given while a model runs."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.layers.spec import LayerSpec
from tdecomp.model.trace import is_transformed
from tdecomp.runtime.torch_state import hooks

Layers = Mapping[str, tuple[nn.Module, LayerSpec]]  # by name


def shown_inputs(show: Callable[[str, Tensor], None], layers: Layers) -> hooks:
    """Inside, `show` gets the name and the input of each layer that is about to run."""

    def before(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values())))
        if not is_transformed(x):
            with torch._C.DisableTorchFunction():  # no use of weights is to be seen in here
                show(name, x)

    return hooks(
        partial(layer.register_forward_pre_hook, partial(before, name), with_kwargs=True)
        for name, (layer, _) in layers.items()
    )
