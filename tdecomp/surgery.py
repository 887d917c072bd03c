"""A module into every slot where the old one stood; optimizers follow; all of it or nothing."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer

from tdecomp.chain import Chain

Replacements = Mapping[nn.Module, Chain]


def copy_with(model: nn.Module, replacements: Replacements) -> nn.Module:
    """A deep copy of `model` with each replaced module's chain wherever it stood.

    The copy is told of the replacements beforehand, so that the old weights are never copied and
    no slot is missed, be it an attribute, a list, a dict or the model itself.

    Raises
    ------
    ValueError
        If the model cannot be copied.
    """
    memo: dict[int, Any] = {id(old): new for old, new in replacements.items()}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"the model cannot be deep-copied ({type(error).__name__}: {error}): use inplace=True "
            "on a model that you no longer need as it is"
        ) from error


def replace_in(
    model: nn.Module, replacements: Replacements, optimizers: Sequence[Optimizer] = ()
) -> list[str]:
    """Replace modules in `model` itself, and their parameters in `optimizers`.

    If anything fails on the way, an interrupt included, model and optimizers are as they were.

    Returns
    -------
    list of str
        The names of replaced parameters that no optimizer had, if there are optimizers.

    Raises
    ------
    ValueError
        If the model is itself one of the modules to be replaced.
    """
    if model in replacements:
        raise ValueError(
            "the model is itself the layer to be replaced, which cannot be done in place: leave "
            "inplace=False and use result.model"
        )
    names = {id(p): name for name, p in model.named_parameters()}
    with ExitStack() as undo:
        for old, put in _slots(model, replacements):
            undo.callback(put, old)
            put(replacements[old])
        homeless = {
            names[id(old)]
            for old in _old_parameters(replacements)
            if optimizers and not any(_holds(optimizer, old) for optimizer in optimizers)
        }
        for optimizer in optimizers:
            undo.callback(_restore, optimizer, _snapshot(optimizer))
            _follow(optimizer, replacements)
        undo.pop_all()
    return sorted(homeless)


def _slots(
    model: nn.Module, replacements: Replacements
) -> Iterator[tuple[nn.Module, Callable[[nn.Module], None]]]:
    """Every place that holds a module to be replaced, with the way to put another one there."""
    found: list[tuple[nn.Module, Callable[[nn.Module], None]]] = []
    seen: set[int] = set()
    for parent in model.modules():
        _search(vars(parent), replacements, found, seen)
    yield from found


def _search(
    holder: Any,
    replacements: Replacements,
    found: list[tuple[nn.Module, Callable[[nn.Module], None]]],
    seen: set[int],
) -> None:
    if id(holder) in seen:
        return
    seen.add(id(holder))
    if isinstance(holder, MutableMapping):
        items = list(holder.items())
    elif isinstance(holder, MutableSequence):
        items = list(enumerate(holder))
    else:
        return
    for key, value in items:
        if isinstance(value, nn.Module):
            if value in replacements:
                found.append((value, lambda new, h=holder, k=key: h.__setitem__(k, new)))  # type: ignore[misc]
        elif isinstance(value, tuple):
            if any(isinstance(v, nn.Module) and v in replacements for v in value):
                _search_tuple(holder, key, value, replacements, found)
        elif isinstance(value, (MutableMapping, MutableSequence)):
            _search(value, replacements, found, seen)


def _search_tuple(
    holder: Any,
    key: Any,
    value: tuple[Any, ...],
    replacements: Replacements,
    found: list[tuple[nn.Module, Callable[[nn.Module], None]]],
) -> None:
    def put(index: int, new: nn.Module) -> None:
        items = list(holder[key])
        items[index] = new
        holder[key] = tuple(items)

    for index, item in enumerate(value):
        if isinstance(item, nn.Module) and item in replacements:
            found.append((item, lambda new, i=index: put(i, new)))  # type: ignore[misc]


def _old_parameters(replacements: Replacements) -> list[nn.Parameter]:
    return [p for old in replacements for p in old.parameters(recurse=False)]


def _successors(replacements: Replacements) -> dict[int, list[nn.Parameter]]:
    """What takes each old parameter's place: all weights for the weight, the bias for the bias."""
    after: dict[int, list[nn.Parameter]] = {}
    for old, chain in replacements.items():
        for name, parameter in old.named_parameters(recurse=False):
            new = (getattr(layer, name) for layer in chain)
            after[id(parameter)] = [p for p in new if p is not None]
    return after


def _holds(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    return any(p is parameter for group in optimizer.param_groups for p in group["params"])


def _follow(optimizer: Optimizer, replacements: Replacements) -> None:
    """New parameters take the old ones' places in their groups; the old ones' state goes."""
    after = _successors(replacements)
    for group in optimizer.param_groups:
        # In place: LBFGS holds on to the very list.
        group["params"][:] = [new for p in group["params"] for new in after.get(id(p), [p])]
        if "param_names" in group:
            # torch pairs names with parameters by position; the old names no longer fit.
            del group["param_names"]
    for old in _old_parameters(replacements):
        optimizer.state.pop(old, None)
    if isinstance(optimizer, LBFGS):
        # Its one state is a history of all parameters laid end to end, which no longer fits.
        optimizer.state.clear()
        optimizer._numel_cache = None


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
