"""One call of a model, as the user gives it, and the memory layouts of images and kernels."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tdecomp.model.batches import Forward, call_with, copied, describe, each_tensor

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Example:
    """Example inputs of a model and the way to call it."""

    inputs: Any  # as `forward` takes them, or without one `call_with`
    forward: Forward | None = None

    @classmethod
    def of(cls, inputs: Any, forward: Forward | None = None) -> "Example":
        """An example of these inputs; inputs that already are one are returned as they are."""
        return inputs if isinstance(inputs, Example) else cls(inputs, forward)

    def run(self, model: nn.Module) -> Any:
        """The model's output."""
        return (self.forward or call_with)(model, self.inputs)

    def describe(self) -> str:
        """A short description, for messages and to tell one example from another."""
        return describe(self.inputs) + (", called by forward" if self.forward else "")

    def copied(self) -> "Example":
        """The same call with copies of all tensors, for a model that changes its inputs."""
        return replace(self, inputs=copied(self.inputs))

    def in_layout(self, layout: str) -> "Example":
        """The same call with all images in this memory layout."""
        return replace(self, inputs=images_in_layout(self.inputs, layout))


def layout_of(model: nn.Module) -> str:
    """The layout that most of the model's kernels are stored in."""
    kernels = [p for p in model.parameters() if p.dim() == 4]
    # For each, whether it is stored in each of LAYOUTS; kernels of 1×1 are in both.
    stored = [tuple(p.is_contiguous(memory_format=f) for f in LAYOUTS.values()) for p in kernels]
    last = stored.count((False, True)) > stored.count((True, False))
    return "channels_last" if last else "contiguous"


def in_layout(module: nn.Module, layout: str) -> nn.Module:
    """The module itself, its kernels now stored in this layout."""
    return module.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload,no-any-return]


def images_in_layout(inputs: Any, layout: str) -> Any:
    """The inputs with batches of images in this layout, copied only if needed."""
    form = LAYOUTS[layout]
    return each_tensor(inputs, lambda x: x.contiguous(memory_format=form) if x.dim() == 4 else x)
