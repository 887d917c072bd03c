"""Optimizers go on with the parameters of the chains in place of those of the layers."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer

from tdecomp.layers.chain import Chain

Replacements = Mapping[nn.Module, Chain]


def as_optimizers(optimizers: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """The optimizers as a tuple; a TypeError for anything that is none."""
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
    return sorted(
        names[id(old)]
        for old in _old_parameters(replacements)
        if optimizers and old.requires_grad and not any(_holds(o, old) for o in optimizers)
    )


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


def _holds(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    return any(p is parameter for group in optimizer.param_groups for p in group["params"])


def follow(optimizer: Optimizer, replacements: Replacements) -> None:
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


def snapshot(optimizer: Optimizer) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
    """The groups, their lists of parameters and the state, for `restore`."""
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    return groups, dict(optimizer.state)


def restore(optimizer: Optimizer, snapshot: tuple[list[dict[str, Any]], dict[Any, Any]]) -> None:
    """Put back, in the same objects, what `snapshot` found."""
    groups, state = snapshot
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        params = group["params"]
        params[:] = before["params"]
        group.clear()
        group.update({**before, "params": params})
    optimizer.state.clear()
    optimizer.state.update(state)
