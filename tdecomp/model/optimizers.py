"""Optimizers go on with the parameters of the chains in place of those of the layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.optim import LBFGS, SGD, Optimizer

from tdecomp.model.opened.base import Opened, has_chains

Replacements = Mapping[nn.Module, nn.Module]
# Modules that are open now, with the parameters that they had when they were not.
Closed = Mapping[Opened, Mapping[str, nn.Parameter]]


def as_optimizers(optimizers: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """The optimizers as a tuple; a TypeError for anything that is none."""
    listed = (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers or ())
    for optimizer in listed:
        if not isinstance(optimizer, Optimizer):
            expected = "a torch.optim.Optimizer or a sequence of them"
            raise TypeError(f"optimizers: expected {expected}, got {type(optimizer).__name__}")
    return listed


def unoptimized(
    model: nn.Module,
    replacements: Replacements,
    optimizers: Sequence[Optimizer],
    closed: Closed | None = None,
) -> list[str]:
    """The names of trained parameters to be replaced that none of the optimizers has."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    held = {id(p) for group in groups for p in group["params"]}
    for module, had in (closed or {}).items():
        held |= {id(p) for before, _, p in _parts(module) if id(had[before]) in held}
    names = {id(p): name for name, p in model.named_parameters()}
    old = (p for module in replacements for p in module.parameters() if p.requires_grad)
    return sorted(names[id(p)] for p in old if optimizers and id(p) not in held)


def follow(optimizer: Optimizer, replacements: Replacements, closed: Closed | None = None) -> None:
    """New parameters take the old ones' places in their groups; the old ones' state goes.

    So do the parts of a parameter that are parameters of their own in a module that stays open.
    """
    stay_open = {module: had for module, had in (closed or {}).items() if has_chains(module)}
    after = _successors(replacements, stay_open)
    for group in optimizer.param_groups:
        params = group["params"]
        names = group.get("param_names", [""] * len(params))  # by position
        new: list[tuple[str, nn.Parameter]] = []
        for name, p in zip(names, params, strict=True):
            old, successors = after.get(id(p), ("", {"": p}))  # most stay as they are
            new += [(name.removesuffix(old) + key, q) for key, q in successors.items()]
        if "param_names" in group:
            group["param_names"] = [name for name, _ in new]
        params[:] = [p for _, p in new]  # in place: LBFGS holds on to the very list
        state = optimizer.state
        if isinstance(optimizer, SGD) and group["fused"] and any(p in state for p in params):
            # Its kernel wants momenta of all parameters of a group, or of none.
            for p in (p for _, p in new if p not in state):
                state[p]["momentum_buffer"] = torch.zeros_like(p)
    there = {id(p) for module in stay_open for p in module.parameters()}
    gone = [p for module in replacements for p in module.parameters()]
    gone += [p for had in stay_open.values() for p in had.values()]
    for p in (p for p in gone if id(p) not in there):
        optimizer.state.pop(p, None)
    if isinstance(optimizer, LBFGS):
        # Its one state is a history of all parameters laid end to end, which no longer fits.
        optimizer.state.clear()
        optimizer._numel_cache = None


def _successors(
    replacements: Replacements, opened: Closed
) -> dict[int, tuple[str, dict[str, nn.Parameter]]]:
    """Each old parameter's name in its layer, and what takes its place: weights or the bias."""
    after: dict[int, tuple[str, dict[str, nn.Parameter]]] = {}
    for old, chain in replacements.items():
        left = dict(chain.named_parameters())
        for name, parameter in old.named_parameters():
            # Of the weights of an earlier chain the first stands for all the new ones.
            mine = [key for key in left if _is_bias(key) is _is_bias(name)]
            known, successors = after.get(id(parameter), (name, {}))
            there = {id(p) for p in successors.values()}
            new = {key: left.pop(key) for key in mine}
            # Layers that have one weight share a factor, which has one place.
            new = {f"tied.{k}" if k in successors else k: p for k, p in new.items()
                   if id(p) not in there}  # fmt: skip
            after[id(parameter)] = known, successors | new
    for module, had in opened.items():
        parts: dict[str, dict[str, nn.Parameter]] = {}
        for before, name, p in _parts(module):
            parts.setdefault(before, {})[name] = p
        after |= {id(had[before]): (before, new) for before, new in parts.items()}
    return after


def _parts(module: Opened) -> Iterator[tuple[str, str, nn.Parameter]]:
    """What parameters of an open module were, or were parts of; their names now; themselves."""
    for name, parameter in module.named_parameters():
        layer = name.partition(".")[0]
        if layer in module.names:
            yield module.closed_name(layer, bias=_is_bias(name)), name, parameter


def _is_bias(name: str) -> bool:
    """Whether a parameter is a bias; all others, such as the cores of a train, are weights."""
    return name.rpartition(".")[2] == "bias"


def restorer(optimizer: Optimizer) -> Callable[[], None]:
    """A function that puts the groups, their lists and the state back as they are now."""
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    state = dict(optimizer.state)

    def restore() -> None:
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            params = group["params"]
            params[:] = before["params"]
            group.clear()
            group.update({**before, "params": params})
        optimizer.state.clear()
        optimizer.state.update(state)

    return restore
