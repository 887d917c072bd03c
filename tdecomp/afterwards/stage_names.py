"""The names of the layers in chains, for tools that want to know which layers to adapt."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from tdecomp.layers.chain import Chain
from tdecomp.layers.grouped_linear import GroupedLinear
from tdecomp.layers.spec import kind_of
from tdecomp.model.filters import matches, no_match


def stage_names(model: nn.Module, names: str | Sequence[str] | None = None) -> list[str]:
    """The full names of the layers to adapt: the stages of chains, and layers left whole.

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(64, 64), "head": nn.Linear(64, 2)})
    >>> small = tdecomp.decompose(model, "svd", rank=8, include="q_proj", progress=False).model
    >>> stage_names(small, ["q_proj"])
    ['q_proj.0', 'q_proj.1']
    >>> stage_names(small)
    ['q_proj.0', 'q_proj.1', 'head']

    PEFT's ``target_modules`` wants the names of Linear layers or convolutions; where a chain stands
    these are its stages.

    Parameters
    ----------
    model : nn.Module
        Decomposed or not.
    names : str or sequence of str, optional
        As for the original: the full name of a layer, its end as PEFT takes it ("q_proj"), a glob,
        or the full name of a container. By default all chains and layers.

    Returns
    -------
    list of str
        In the order of the model, each once. A layer with several names has its first. Modules of
        a method's own, such as a tensor train's, and those of experts are left out: no adapter
        takes them.

    Raises
    ------
    TypeError
        If `model` is no module, or `names` are no strings.
    ValueError
        If a name matches no layer, or only chains without any layer in them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"stage_names: expected an nn.Module, got {type(model).__name__}")
    stages = _stages(model)
    known = {name: first for first, (aliases, _) in stages.items() for name in aliases}
    if names is None:
        return [stage for _, found in stages.values() for stage in found]
    patterns = [names] if isinstance(names, str) else names
    if not isinstance(patterns, Iterable) or not all(isinstance(name, str) for name in patterns):
        raise TypeError(f"stage_names: expected names of layers, got {names!r}")
    wanted: set[str] = set()
    for pattern in patterns:
        found = {first for name, first in known.items() if _is_meant(name, pattern)}
        if not found:
            ends = dict.fromkeys(name.rpartition(".")[2] for name in known)
            raise no_match("stage_names", pattern, [*ends, *known])
        if not any(stages[first][1] for first in found):
            raise ValueError(
                f"stage_names: {pattern!r} names only chains of modules of their own "
                f"({', '.join(map(repr, sorted(found)))}), in which there is no Linear or "
                "convolution to adapt"
            )
        wanted |= found
    return [stage for first, (_, found) in stages.items() if first in wanted for stage in found]


def _stages(model: nn.Module) -> Mapping[str, tuple[list[str], list[str]]]:
    """By the first name of each chain and whole layer all its names, and those of its layers."""
    aliases: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(module, []).append(name)
    chains = [module for module in aliases if isinstance(module, Chain)]
    inside = {part for chain in chains for part in chain.modules() if part is not chain}
    found = {}
    for module, mine in aliases.items():
        if isinstance(module, Chain):
            parts = ((name, part) for name, part in module.named_modules() if _is_layer(part))
            found[mine[0]] = mine, [".".join(filter(None, (mine[0], name))) for name, _ in parts]
        elif _is_layer(module) and module not in inside and not isinstance(module, nn.Embedding):
            found[mine[0]] = mine, [mine[0]]
    return found


def _is_layer(part: nn.Module) -> bool:
    """Whether it is a layer that is called with its input alone."""
    return kind_of(part) is not None and not isinstance(part, (GroupedLinear, nn.EmbeddingBag))


def _is_meant(name: str, pattern: str) -> bool:
    return matches(name, pattern) or name.endswith(f".{pattern}")
