"""A module into every slot where the old one stood; optimizers follow; all of it or nothing."""

import copy
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import ExitStack
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from tdecomp.layers.chain import Chain
from tdecomp.scope import interrupts_deferred

Replacements = Mapping[nn.Module, Chain]
# A module, and the way to put another one in its place.
Slot = tuple[nn.Module, Callable[[Any], None]]


def copy_with(model: nn.Module, replacements: Replacements) -> nn.Module:
    """A deep copy of `model` with each replaced module's chain wherever it stood."""
    # With the replacements in the memo, old weights are not copied, and no slot is missed.
    memo: dict[int, Any] = {id(old): new for old, new in replacements.items()}
    for module in model.modules():
        # The weight that pruning or weight_norm computes: torch refuses to copy such tensors.
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"the model cannot be deep-copied ({type(error).__name__}: {error}): use inplace=True "
            "on a model that you no longer need as it is"
        ) from error


def swap(
    model: nn.Module,
    chains: Replacements,
    optimizers: Sequence[Optimizer] = (),
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Replace modules in `model` itself, and their parameters in `optimizers`.

    On an error, model and optimizers are as they were; an interrupt (Ctrl-C) is raised afterwards.
    `values` are copied into the changed model's parameters and buffers of these names, see
    `tensors_in`; those that are equal already are left out. A ValueError is raised if the model
    lacks one of these names and shapes, or is itself to be replaced.
    """
    if model in chains:
        raise ValueError(
            "the model is itself the layer to be replaced, which cannot be done in place: leave "
            "inplace=False and use result.model"
        )
    slots = _slots(model, chains)
    with interrupts_deferred(), ExitStack() as undo:
        for old, put in slots:
            undo.callback(put, old)
            put(chains[old])
        for mine, value in _changed(model, values or {}):
            undo.callback(_copy, mine, mine.detach().clone())
            _copy(mine, value)
        for optimizer in optimizers:
            undo.callback(_restore, optimizer, _snapshot(optimizer))
            _follow(optimizer, chains)
        undo.pop_all()


def adopt(model: nn.Module, other: nn.Module) -> nn.Module:
    """The model with the parameters and buffers of another one of the same structure."""
    swap(model, {}, values=tensors_in(other))
    return model


def tensors_in(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a model by its name, or names where it is used twice."""
    parameters = model.named_parameters(remove_duplicate=False)
    return dict([*parameters, *model.named_buffers(remove_duplicate=False)])


def as_optimizers(optimizers: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """The optimizers as a tuple; a TypeError for anything that is not an optimizer."""
    listed = (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers or ())
    for optimizer in listed:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "optimizers: expected a torch.optim.Optimizer or a sequence of them, got "
                f"{type(optimizer).__name__}"
            )
    return listed


def unoptimized(
    model: nn.Module, replacements: Replacements, optimizers: Sequence[Optimizer]
) -> list[str]:
    """The names of trained parameters to be replaced that none of the optimizers has."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = {id(p) for group in groups for p in group["params"]}
    trained = (p for p in _old_parameters(replacements) if p.requires_grad)
    return sorted(names[id(p)] for p in trained if optimizers and id(p) not in held)


def _changed(model: nn.Module, values: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of the model that is to have another value, with that value."""
    held = tensors_in(model)
    changed = []
    for name, value in values.items():
        mine = held.get(name)
        if mine is None or mine.shape != value.shape:
            found = "no such tensor" if mine is None else f"one of shape {tuple(mine.shape)}"
            raise ValueError(
                f"the model has {found} where {name!r} of shape {tuple(value.shape)} is to be "
                "copied; expected a model of the same structure"
            )
        if mine is not value and not torch.equal(mine, value.to(mine)):
            changed.append((mine, value))
    return changed


def _copy(tensor: Tensor, value: Tensor) -> None:
    # Inference tensors are changed in inference mode only.
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        tensor.copy_(value)


def _slots(model: nn.Module, replacements: Replacements) -> list[Slot]:
    """Every place that holds a module to be replaced, with the way to put another one there."""
    found: list[Slot] = []
    seen: set[int] = set()
    # Modules, containers, namespaces and what they hold; each `put` replaces its `value`.
    queue: list[tuple[Any, Callable[[Any], None]]] = [(m, lambda _: None) for m in model.modules()]
    for value, put in queue:  # which grows meanwhile
        if isinstance(value, nn.Module) and value in replacements:
            found.append((value, put))
        elif isinstance(value, tuple):
            # Its items cannot be replaced one by one: each put makes a new tuple of current ones.
            current = list(value)
            for index, item in enumerate(value):
                queue.append((item, _tuple_setter(type(value), current, index, put)))
        elif id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, nn.Module) or _plain_object(value):
                queue.append((vars(value), put))
            elif isinstance(value, (MutableMapping, MutableSequence)):
                pairs = value.items() if isinstance(value, MutableMapping) else enumerate(value)
                for key, item in pairs:
                    queue.append((item, partial(value.__setitem__, key)))
            elif isinstance(value, set):
                for item in value:
                    queue.append((item, _set_setter(value, item)))
    return found


def _plain_object(value: Any) -> bool:
    """Whether it is an object of somebody's own, with attributes to look through."""
    foreign = (type, ModuleType, FunctionType, MethodType, Tensor, MutableMapping, MutableSequence)
    return isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, foreign)


def _tuple_setter(
    kind: type[tuple[Any, ...]], current: list[Any], index: int, put: Callable[[Any], None]
) -> Callable[[Any], None]:
    make = getattr(kind, "_make", kind)  # a namedtuple takes its items one by one

    def set_item(new: Any) -> None:
        current[index] = new
        put(make(current))

    return set_item


def _set_setter(holder: set[Any], item: Any) -> Callable[[Any], None]:
    current = [item]

    def set_item(new: Any) -> None:
        holder.discard(current[0])
        holder.add(new)
        current[0] = new

    return set_item


def _old_parameters(replacements: Replacements) -> list[nn.Parameter]:
    return [p for old in replacements for p in old.parameters()]


def _successors(replacements: Replacements) -> dict[int, dict[str, nn.Parameter]]:
    """What takes each old parameter's place: all weights for the weight, the bias for the bias."""
    after: dict[int, dict[str, nn.Parameter]] = {}
    for old, chain in replacements.items():
        left = dict(chain.named_parameters())
        for name, parameter in old.named_parameters():
            # Of the weights of an earlier chain the first stands for all the new ones.
            kind = name.rpartition(".")[2]
            mine = [key for key in left if key.endswith(f".{kind}")]
            after[id(parameter)] = {key: left.pop(key) for key in mine}
    return after


def _follow(optimizer: Optimizer, replacements: Replacements) -> None:
    """New parameters take the old ones' places in their groups; the old ones' state goes."""
    after = _successors(replacements)
    local = {id(p): name for old in replacements for name, p in old.named_parameters()}
    for group in optimizer.param_groups:
        if "param_names" in group:  # by position
            group["param_names"] = [
                new
                for name, p in zip(group["param_names"], group["params"], strict=True)
                for new in _renamed(name, local.get(id(p), ""), after.get(id(p)))
            ]
        # In place: LBFGS holds on to the very list.
        group["params"][:] = [
            new for p in group["params"] for new in after.get(id(p), {"": p}).values()
        ]
    for old in _old_parameters(replacements):
        optimizer.state.pop(old, None)
    if isinstance(optimizer, LBFGS):
        # Its one state is a history of all parameters laid end to end, which no longer fits.
        optimizer.state.clear()
        optimizer._numel_cache = None


def _renamed(name: str, local: str, after: Mapping[str, nn.Parameter] | None) -> list[str]:
    layer = name.removesuffix(local)
    return [name] if after is None else [f"{layer}{key}" for key in after]


def _snapshot(optimizer: Optimizer) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    return groups, dict(optimizer.state)


def _restore(optimizer: Optimizer, snapshot: tuple[list[dict[str, Any]], dict[Any, Any]]) -> None:
    groups, state = snapshot
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        params = group["params"]
        params[:] = before["params"]
        group.clear()
        group.update({**before, "params": params})
    optimizer.state.clear()
    optimizer.state.update(state)
