"""One call of a model, as the user gives it: inputs, and how the model is called with them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from tdecomp.model.layout import image_in_layout


@dataclass(frozen=True)
class Example:
    """Example inputs of a model and the way to call it."""

    # A tuple of positional arguments, a mapping of keyword arguments, or the only argument; with
    # `forward`, whatever that takes.
    inputs: Any
    forward: Callable[[nn.Module, Any], Any] | None = None  # (model, inputs) -> output

    @classmethod
    def of(cls, inputs: Any, forward: Callable[[nn.Module, Any], Any] | None = None) -> "Example":
        """An example of these inputs; inputs that already are one are returned as they are."""
        return inputs if isinstance(inputs, Example) else cls(inputs, forward)

    def run(self, model: nn.Module) -> Any:
        """The model's output."""
        if self.forward is not None:
            return self.forward(model, self.inputs)
        args, kwargs = as_call(self.inputs)
        return model(*args, **kwargs)

    def describe(self) -> str:
        """A short description, for messages and to tell one example from another."""
        return describe(self.inputs) + (", called by forward" if self.forward else "")

    def in_layout(self, layout: str) -> "Example":
        """The same call with all images in this memory layout."""
        change = partial(image_in_layout, layout=layout)
        return replace(self, inputs=each_tensor(self.inputs, change))


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a tuple's items, a mapping's, or the one object itself."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple):
        return inputs, {}
    return (inputs,), {}


def describe(value: Any) -> str:
    """A short description of inputs, for messages."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(describe, value)) + ")"
    return type(value).__name__


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same containers with every tensor in them changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: each_tensor(item, change) for key, item in value.items()}
    if isinstance(value, tuple):
        make = getattr(type(value), "_make", type(value))  # a namedtuple takes items one by one
        return make([each_tensor(item, change) for item in value])
    return [each_tensor(item, change) for item in value] if isinstance(value, list) else value
