"""Parameters that a forward pass changes, as moving averages do in training, are put back."""

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tdecomp.model.operators import OperatorMode
from tdecomp.model.trace import storage_number
from tdecomp.model.weights import is_plain
from tdecomp.runtime.scope import Scope


class KeptParameters(Scope):
    """After the block the model's parameters have the values that they had before it.

    Only those that are written to are copied.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def change(self) -> None:
        values = []
        for parameter in self._model.parameters():
            if is_plain(parameter) and not parameter.is_meta and not parameter.is_inference():
                values.append(parameter.data)
                self.undo.callback(setattr, parameter, "data", parameter.data)
        self.undo.enter_context(_Writes(values, self.undo))


class _Writes(OperatorMode):
    """Notes in `undo` how to put tensors back before anything is written to their memory."""

    def __init__(self, values: list[Tensor], undo: ExitStack) -> None:
        super().__init__()
        self._undo = undo
        self._values: dict[int, list[Tensor]] = {}  # that share a storage, by its number
        for value in values:
            self._values.setdefault(storage_number(value), []).append(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            named = {a.name: value for a, value in zip(schema.arguments, args, strict=False)}
            named |= kwargs
            written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
            for tensor in tree_leaves([named.get(name) for name in written]):
                if type(tensor) in (Tensor, nn.Parameter):
                    for value in self._values.pop(storage_number(tensor), ()):
                        self._undo.callback(value.copy_, value.clone())
        return func(*args, **kwargs)
