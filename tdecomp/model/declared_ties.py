"""The ties that a model of transformers declares by name, after chains took layers' places.

transformers ties again what `_tied_weights_keys` names, {target: source}, when a vocabulary is
resized or weights are saved and loaded. It need not be installed: these are plain attributes.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from tdecomp.layers.chain import Chain
from tdecomp.layers.lookup_chain import EmbeddingChain

_DECLARED = ("_tied_weights_keys", "all_tied_weights_keys")

Declared = tuple[nn.Module, str, dict[str, str]]


def redeclared(model: nn.Module) -> Iterator[Declared]:
    """The modules, attributes and new values of declarations that name layers now in chains."""
    for module in model.modules():
        for attribute in _DECLARED:
            names = getattr(module, attribute, None)
            if isinstance(names, dict):
                new = _renamed(module, names)
                if new != names:
                    yield module, attribute, new


def redeclare(model: nn.Module) -> None:
    """Let a model declare the ties of its chains' factors in place of those of layers."""
    for module, attribute, names in list(redeclared(model)):
        setattr(module, attribute, names)


def restorer(model: nn.Module) -> Callable[[], None]:
    """What puts back all declarations as they are now."""
    kept = [(m, a, vars(m)[a]) for m in model.modules() for a in _DECLARED if a in vars(m)]

    def restore() -> None:
        for module, attribute, names in kept:
            setattr(module, attribute, names)

    return restore


def _renamed(module: nn.Module, names: dict[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for target, source in names.items():
        ends = [dict(_in_chain(module, name)) for name in (target, source)]
        by_parameter = {id(parameter): name for name, parameter in ends[1].items()}
        shared = {n: by_parameter[id(p)] for n, p in ends[0].items() if id(p) in by_parameter}
        renamed = {target, source} - {*ends[0], *ends[1]}
        if shared and renamed:
            found |= shared
        elif not _is_gone(module, target, ends[0]) and not _is_gone(module, source, ends[1]):
            found[target] = source
    return found


def _is_gone(module: nn.Module, name: Any, found: dict[str, nn.Parameter]) -> bool:
    """Whether it names a stage of a chain whose layer is back in its place."""
    path = str(name).rpartition(".")[0]
    return bool(found) and not any(path == known for known, _ in module.named_modules())


def _in_chain(module: nn.Module, name: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that stand for one that is named, with their names."""
    path, _, part = str(name).rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:  # a pattern, or of a chain whose layer is back in its place
        path = path.rpartition(".")[0]
        try:
            parameter = module.get_submodule(path)._parameters.get(part)
        except AttributeError:
            return
        if parameter is not None:
            yield f"{path}.{part}", parameter
        return
    if not isinstance(owner, Chain):
        own = owner._parameters.get(part)
        if own is not None:
            yield str(name), own
        return
    if part == "weight":
        stages = range(len(owner))
        order = stages if isinstance(owner, EmbeddingChain) else reversed(stages)
        for at in order:
            for name, parameter in owner[at].named_parameters():  # a train has several
                if name != "bias":
                    yield f"{path}.{at}.{name}", parameter
    elif part == "bias" and isinstance(owner[-1].bias, nn.Parameter):
        yield f"{path}.{len(owner) - 1}.bias", owner[-1].bias
