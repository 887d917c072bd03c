"""One watched forward pass: the calls of the layers, the MACs of each row, odd uses of weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.example import Example
from tdecomp.model.macs import MacCounter
from tdecomp.model.operators import OperatorMode
from tdecomp.model.weights import Weights, weights_of
from tdecomp.runtime.scope import Scope
from tdecomp.runtime.torch_state import evaluating, hooks, no_fast_path

Owner = TypeVar("Owner")

READ_OUTSIDE = "its weight is read outside its own forward"


@dataclass(frozen=True)
class Trace:
    """What one forward pass of the example inputs showed, by the names of the rows."""

    calls: Mapping[str, list[Call]]  # of each watched layer; empty if it never ran
    total_macs: int  # of the whole pass
    macs: Mapping[str, int]  # of each row; what belongs to none is left out
    oddities: Mapping[str, str]  # how a layer is used, if not by a call with its input alone
    uncounted: str  # the operators whose MACs are not known


def trace(model: nn.Module, specs: Mapping[str, LayerSpec], example_inputs: Any) -> Trace:
    """Run `model` once in eval mode, its state restored; ValueError if it rejects the inputs."""
    example = Example.of(example_inputs)
    layers = {m: name for name, m in model.named_modules() if name in specs}
    calls: dict[str, list[Call]] = {name: [] for name in specs}
    oddities: dict[str, str] = {}

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = layers[layer]
        value = next(iter((*args, *kwargs.values())), None)
        if isinstance(value, Tensor) and value.is_nested:
            oddities[name] = "it is called with a nested tensor"
        elif isinstance(value, Tensor):  # if not, the layer itself is about to complain
            call = specs[name].called_with(*args, **kwargs)
            calls[name].append(call or specs[name].call(value.shape))
            if call is None:
                oddities[name] = "it is called with more than its input"

    starts = [partial(m.register_forward_pre_hook, before, with_kwargs=True) for m in layers]
    uses = OddUses({name: layer for layer, name in layers.items()})
    counter = MacCounter()
    constants = (*model.parameters(), *model.buffers())
    shares = _Shares(counter, uses.running, weights_of(model), constants)
    with evaluating(model), hooks(starts):
        try:
            with torch.no_grad(), no_fast_path(), uses, counter, shares:
                example.copied().run(model)
        except Exception as error:
            raise ValueError(
                f"the model rejected example_inputs ({example.describe()}): "
                f"{type(error).__name__}: {error}. Expected a tensor, a tuple of positional or a "
                "dict of keyword arguments of the model, or what forward(model, inputs) takes: "
                "forward=lambda model, inputs: ... says how else to call it, as with gradients "
                "(torch.enable_grad()), which are off here"
            ) from error
    oddities = {**uses.found, **oddities}
    return Trace(calls, counter.macs, shares.macs, oddities, ", ".join(sorted(counter.uncounted)))


# Reads of these need no values of a weight, and a chain answers them as the layer does.
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "shape", "ndim", "requires_grad")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex),
    *(Tensor.nelement, Tensor.ndimension, Tensor.element_size, Tensor.__len__),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
# These, too, but only where they are not of the weight by which a chain describes its layer's.
_PLACE = {*(getattr(Tensor, name).__get__ for name in ("device", "is_cuda")), Tensor.get_device}


class Reads(TorchFunctionMode, Generic[Owner]):
    """Calls `read` with the owner of each tensor that a torch function is given for its values.

    Tensors that only describe others have no device to ask for, either.
    """

    def __init__(
        self,
        tensors: Mapping[Owner, Sequence[Tensor]],
        read: Callable[[Owner], None],
        *,
        describe: bool = False,
    ) -> None:
        super().__init__()
        self._read = read
        self._harmless = _METADATA if describe else _METADATA | _PLACE
        self._owners = {id(tensor): owner for owner, own in tensors.items() for tensor in own}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._harmless:
            self.look_at(_flat((args, kwargs or {})))
        return func(*args, **(kwargs or {}))

    def add(self, owner: Owner, tensor: Tensor) -> None:
        """Watch another tensor, which has to live as long as this does."""
        self._owners[id(tensor)] = owner

    def look_at(self, values: Iterable[Any]) -> None:
        """Call `read` for those that are among the tensors."""
        for value in values:
            if id(value) in self._owners:
                self._read(self._owners[id(value)])


class OddUses(Scope):
    """Inside, notes the layers that a model uses in a way that no chain could follow.

    Attributes
    ----------
    found : dict of str to str
        How, by the layers' names.
    running : list of str
        The layers that are running now, the innermost last.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.running: list[str] = []
        self._layers = layers
        self._tied: dict[str, set[str]] = {}  # the layers that have the same parameters

    def change(self) -> None:
        for name, layer in self._layers.items():
            begin = partial(self._begin, name, layer._parameters.get("weight"))
            start = partial(layer.register_forward_pre_hook, begin, with_kwargs=True)
            end = partial(layer.register_forward_hook, partial(self._end, name), always_call=True)
            self.undo.enter_context(hooks([start, end]))
        weights = {name: tuple(m.parameters(recurse=False)) for name, m in self._layers.items()}
        owners: dict[int, set[str]] = {}
        for name, own in weights.items():
            for parameter in own:
                owners.setdefault(id(parameter), set()).add(name)
        self._tied = {n: set().union(*(owners[id(p)] for p in own)) for n, own in weights.items()}
        self.undo.enter_context(Reads(weights, self._read))

    def _begin(
        self, name: str, own: Any, layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        self.running.append(name)
        if layer._parameters.get("weight") is not own:  # as by functional_call
            self.found.setdefault(name, "it is called with another weight than its own")
        if any(map(is_transformed, (*args, *kwargs.values()))):
            self.found.setdefault(name, "it is called inside torch.func's vmap or gradients")

    def _end(self, name: str, *_: Any) -> None:
        if self.running[-1:] == [name]:  # not where a hook failed before it was noted
            self.running.pop()

    def _read(self, name: str) -> None:
        if self._tied[name].isdisjoint(self.running):
            self.found.setdefault(name, READ_OUTSIDE)


def is_transformed(value: Any) -> bool:
    """Whether it stands for a part of a tensor, which torch.func's transforms hide."""
    wrapped: bool = isinstance(value, Tensor) and is_functorch_wrapped_tensor(value)
    return wrapped


_Entry = tuple[StorageWeakRef, str | None]


class _Shares(OperatorMode):
    """Gives the MACs of each operator to a row.

    That is the layer that is running, or else the row whose parameter the operator is given: as it
    is, or as a copy made of it and of other constants alone (cast, transposed, masked, scaled).
    """

    def __init__(
        self,
        counter: MacCounter,
        running: Sequence[str],
        rows: Sequence[Weights],
        constants: Iterable[Tensor],
    ) -> None:
        super().__init__()
        self.macs = {row.names[0]: 0 for row in rows}
        self._counter, self._running = counter, running
        # By the number of a storage, which is not given away again while a weak reference lives.
        # A constant that belongs to no row has no name.
        self._weights: dict[int, _Entry] = {}
        self._copies: dict[int, _Entry] = {}
        for row in rows:
            for parameter in filter(_is_plain, row.parameters):
                self._weights.setdefault(*_entry(parameter, row.names[0]))
        for constant in filter(_is_plain, constants):
            self._weights.setdefault(*_entry(constant, None))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._counter.macs
        out = func(*args, **(kwargs or {}))
        macs = self._counter.macs - before
        if self._running:
            self.macs[self._running[-1]] += macs
            return out
        given = [value for value in _flat((args, kwargs or {})) if _is_plain(value)]
        weights = [self._weights.get(storage_number(tensor)) for tensor in given]
        found = [
            w or self._copies.get(storage_number(t)) for w, t in zip(weights, given, strict=True)
        ]
        # Those after three, such as a mask, are only added.
        named = [entry[1] for entry in (*weights[:3], *found[:3]) if entry and entry[1] is not None]
        owners = {entry[1] for entry in found if entry} - {None}
        if macs and named:
            self.macs[named[0]] += macs
        elif not macs and found and all(found) and len(owners) < 2 and func not in _LOOK_UPS:
            for made in filter(_is_plain, _flat(out)):
                if storage_number(made) not in self._weights:
                    self._copies.setdefault(*_entry(made, next(iter(owners), None)))
        return out


_LOOK_UPS = {torch.ops.aten.embedding.default, torch.ops.aten.embedding_bag.default}


def _is_plain(value: Any) -> bool:
    plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
    return plain and (value.is_floating_point() or value.is_complex()) and not value.is_meta


def storage_number(tensor: Tensor) -> int:
    """The number of the memory that the tensor is in."""
    number: int = tensor.untyped_storage()._cdata
    return number


def _entry(tensor: Tensor, name: str | None) -> tuple[int, _Entry]:
    return storage_number(tensor), (StorageWeakRef(tensor.untyped_storage()), name)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, tuple, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _flat(item)
    else:
        yield value
