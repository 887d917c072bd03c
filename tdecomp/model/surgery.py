"""A module into every slot where the old one stood; optimizers follow; all of it or nothing."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import ExitStack
from functools import partial
from types import FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from tdecomp.layers.chain import Chain
from tdecomp.model.batches import in_slots, tuple_like
from tdecomp.model.declared_ties import redeclare, redeclared
from tdecomp.model.example import images_in_layout
from tdecomp.model.fast_path import switch_off
from tdecomp.model.optimizers import Closed, Replacements, follow, restorer
from tdecomp.model.weights import is_plain
from tdecomp.runtime.scope import interrupts_deferred
from tdecomp.runtime.torch_state import no_inference_mode

Put = Callable[[Any], None]  # puts a module or another object into a certain place


def copy_with(model: nn.Module, replacements: Replacements, *, share: bool = False) -> nn.Module:
    """A deep copy of `model` with each replaced module's chain wherever it stood.

    With `share` it has the model's own parameters and buffers instead of copies.
    """
    # With the replacements in the memo, old weights are not copied, and no slot is missed.
    memo: dict[int, Any] = {id(old): new for old, new in replacements.items()}
    memo |= {id(old): new for old, new in _biases(replacements)}
    for module in model.modules():
        # The weight that pruning or weight_norm computes: torch refuses to copy such tensors.
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        for parameter in module.parameters(recurse=False) if not share else ():
            if not parameter.requires_grad and not _can_be_copied(parameter):
                memo[id(parameter)] = parameter  # it is frozen: both models may have it
        for buffer in module.buffers(recurse=False) if not share else ():
            if buffer.layout is not torch.strided:  # `deepcopy` cannot copy all of these
                memo[id(buffer)] = buffer.detach().clone()
    if share:
        memo |= {id(t): t for t in tensors_in(model).values() if not is_lazy(t)}
    try:
        with no_inference_mode():  # the copies made in it could not be trained
            twin = copy.deepcopy(model, memo)
        if not isinstance(twin, nn.Module):  # as where __getattr__ answers for __deepcopy__
            raise TypeError(f"its copy is {twin!r}")
        switch_off(twin, ExitStack())
        redeclare(twin)
        return twin
    except Exception as error:
        remedy = "use inplace=True, without recovery, on a model that you no longer need as it is"
        raise ValueError(f"the model cannot be deep-copied ({error!r}): {remedy}") from error


def _can_be_copied(parameter: nn.Parameter) -> bool:
    """Whether it is a plain tensor, or one of a class (as of quantizers) that can be copied."""
    if is_plain(parameter) and parameter.layout is torch.strided:
        return True
    try:
        copy.deepcopy(parameter)
    except Exception:
        return False
    return True


def swap(
    model: nn.Module,
    chains: Replacements,
    optimizers: Sequence[Optimizer] = (),
    values: Mapping[str, Tensor] | None = None,
    layout: str | None = None,
    closed: Closed | None = None,
) -> None:
    """Replace modules in `model` itself, and their parameters in `optimizers`.

    `values` are copied into the changed model's parameters and buffers of these names, except where
    they are equal; a `layout` is given to its kernels. `closed` is what optimizers know of modules
    that are open. On an error, such as a ValueError for a name
    that it lacks, all is as it was; an interrupt (Ctrl-C) is raised afterwards.
    """
    if model in chains:
        remedy = "leave inplace=False and use result.model"
        raise ValueError(f"the model itself cannot be replaced in place: {remedy}")
    slots = _slots(model, chains)
    with interrupts_deferred(), ExitStack() as undo:
        for old, put in slots:
            undo.callback(put, old)
            put(chains[old])
        switch_off(model, undo)
        biases = {id(old): new for old, new in _biases(chains)}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if id(parameter) in biases:
                    undo.callback(module._parameters.__setitem__, name, parameter)
                    module._parameters[name] = biases[id(parameter)]
        for module, attribute, names in list(redeclared(model)):
            undo.callback(_put_back, module, attribute, vars(module).get(attribute))
            setattr(module, attribute, names)
        for mine, value in _changed(model, values or {}):
            undo.callback(_copy, mine, mine.detach().clone())
            _copy(mine, value)
        if layout is not None:
            for kernel in tensors_in(model).values():
                undo.callback(setattr, kernel, "data", kernel.data)
                with no_inference_mode():
                    kernel.data = images_in_layout(kernel.data, layout)
        for optimizer in optimizers:
            undo.callback(restorer(optimizer))
            follow(optimizer, chains, closed)
        undo.pop_all()


def _biases(replacements: Replacements) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Each replaced layer's bias, which another module may hold, too, and the new one."""
    for old, new in replacements.items():
        mine, its = _bias(old), _bias(new)
        if mine is not None and its is not None:
            yield mine, its


def _bias(module: nn.Module) -> nn.Parameter | None:
    holder = module[-1] if isinstance(module, Chain) and len(module) else module
    return holder._parameters.get("bias")


def _put_back(module: nn.Module, attribute: str, value: Any) -> None:
    """An attribute of the module itself, or of its class where it had none of its own."""
    if value is None:
        delattr(module, attribute)
    else:
        setattr(module, attribute, value)


def adopt(model: nn.Module, other: nn.Module) -> nn.Module:
    """The model with the parameters and buffers of another one of the same structure."""
    swap(model, {}, values=tensors_in(other))
    return model


def tensors_in(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a model by its name, or names where it is used twice."""
    parameters = model.named_parameters(remove_duplicate=False)
    return dict([*parameters, *model.named_buffers(remove_duplicate=False)])


def _changed(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor of the model that is to have another value, with that value."""
    held = tensors_in(model)
    for name, value in values.items():
        mine = held.get(name)
        if mine is None or mine.shape != value.shape:
            found = "no such tensor" if mine is None else f"one of shape {tuple(mine.shape)}"
            wanted = f"{name!r} of shape {tuple(value.shape)} is to be copied"
            raise ValueError(f"the model has {found} where {wanted}; expected the same structure")
        if mine is not value and _differ(mine, value):
            yield mine, value


def _differ(mine: Tensor, value: Tensor) -> bool:
    try:
        return not torch.equal(mine, value.to(mine))
    except (AttributeError, NotImplementedError):
        return False  # sparse, nested, on the meta device: nothing here changes such tensors


def _copy(tensor: Tensor, value: Tensor) -> None:
    # Inference tensors are changed in inference mode only.
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        tensor.copy_(value)


def _slots(model: nn.Module, replacements: Replacements) -> list[tuple[nn.Module, Put]]:
    """Every place that holds a module to be replaced, with the way to put another one there."""
    found: list[tuple[nn.Module, Put]] = []
    seen: set[int] = set()
    # Modules, containers, namespaces and what they hold; each `put` replaces its `value`.
    queue: list[tuple[Any, Put]] = [(m, lambda _: None) for m in model.modules()]
    for value, put in queue:  # which grows meanwhile
        if type(value) in weakref.ProxyTypes:
            continue  # it passes for what it stands for, and does not say what that is
        if isinstance(value, nn.Module) and value in replacements:
            found.append((value, put))
        elif isinstance(value, (tuple, frozenset)):
            # Its items cannot be replaced one by one: each put makes a new one of current items.
            current = list(value)
            puts = (partial(_put_in_frozen, value, current, at, put) for at in range(len(value)))
            queue += zip(current, puts, strict=True)
        elif id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, MappingProxyType):
                queue += [(mapping, put) for mapping in gc.get_referents(value)]
            elif isinstance(value, MutableMapping):
                queue += _items(value)
            elif isinstance(value, MutableSequence):
                queue += [(item, partial(value.__setitem__, at)) for at, item in enumerate(value)]
            elif isinstance(value, set):
                queue += [(item, partial(_put_in_set, value, [item])) for item in value]
            elif type(value) is weakref.ref:
                queue.append((value(), partial(_put_weakly, put)))
            elif not isinstance(value, _OPAQUE):
                if isinstance(getattr(value, "__dict__", None), dict):
                    queue.append((vars(value), put))
                queue += in_slots(value)
    return found


# Objects whose attributes are not looked through.
_OPAQUE = (type, ModuleType, FunctionType, MethodType, Tensor)


def _items(mapping: MutableMapping[Any, Any]) -> Iterator[tuple[Any, Put]]:
    """The values of a mapping, and the keys that may be, or hold, modules."""
    for key, value in mapping.items():
        current = [key]
        yield value, partial(_put_value, mapping, current)
        if isinstance(key, (nn.Module, tuple, frozenset)):
            yield key, partial(_put_key, mapping, current)


def _put_value(mapping: MutableMapping[Any, Any], current: list[Any], new: Any) -> None:
    mapping[current[0]] = new


def _put_key(mapping: MutableMapping[Any, Any], current: list[Any], new: Any) -> None:
    items = [(new if key is current[0] else key, value) for key, value in mapping.items()]
    current[0] = new
    mapping.clear()
    mapping.update(items)  # in the same order


def _put_weakly(put: Put, new: Any) -> None:
    put(weakref.ref(new))


def _put_in_frozen(old: Any, items: list[Any], at: int, put: Put, new: Any) -> None:
    items[at] = new
    put(tuple_like(old, items) if isinstance(old, tuple) else type(old)(items))


def _put_in_set(holder: set[Any], current: list[Any], new: Any) -> None:
    holder.discard(current[0])
    holder.add(new)
    current[0] = new
