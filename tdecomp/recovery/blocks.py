"""The blocks of a model: a few layers, chains among them, with all that runs between them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tdecomp.layers.spec import kind_of
from tdecomp.recovery.replaced import ReplacedLayer

# The most layers of a block, chains and others: a residual block has two to four, attention four.
_MOST = 4


@dataclass(frozen=True)
class Block:
    """Modules that run one after the other, and those in their places in the original."""

    name: str
    modules: tuple[nn.Module, ...]
    originals: tuple[nn.Module, ...]
    chains: tuple[ReplacedLayer, ...]

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first, *others = self.modules
        output = first(*args, **kwargs)
        for module in others:
            output = module(output)
        return output

    def parameters(self) -> list[nn.Parameter]:
        """Those that require gradients, each once."""
        held = {id(p): p for module in self.modules for p in module.parameters()}
        return [p for p in held.values() if p.requires_grad]


def blocks_of(
    model: nn.Module, original: nn.Module, chains: Sequence[ReplacedLayer]
) -> list[Block]:
    """Blocks that together hold all chains, each of them once, in the order in which they run.

    `chains` are in that order. A module that holds few layers is a block; of an `nn.Sequential`
    with many, children that follow one another are joined.
    """
    places = {layer.name: number for number, layer in enumerate(chains)}

    def inside(name: str) -> list[ReplacedLayer]:
        return [layer for layer in chains if not name or f"{layer.name}.".startswith(f"{name}.")]

    def size(name: str) -> int:
        return sum(kind_of(module) is not None for module in original.get_submodule(name).modules())

    def block(names: Sequence[str]) -> Block:
        mine, theirs = (tuple(map(whole.get_submodule, names)) for whole in (model, original))
        held = tuple(layer for name in names for layer in inside(name))
        return Block(names[0], mine, theirs, held)

    def split(name: str) -> Iterator[Block]:
        module = model.get_submodule(name)
        if name in places or (name and size(name) <= _MOST and _runs(module)):
            yield block([name])
            return
        in_turn = type(module) is nn.Sequential
        joined: list[str] = []
        for child, _ in module.named_children():
            path = f"{name}.{child}" if name else child
            few = in_turn and size(path) <= _MOST and bool(inside(path) or _between(model, path))
            if joined and not (few and size(path) + sum(map(size, joined)) <= _MOST):
                yield block(joined)
                joined = []
            if few and (joined or inside(path)):
                joined.append(path)
            elif inside(path):
                yield from split(path)
        if joined:
            yield block(joined)

    return sorted(split(""), key=lambda block: min(places[layer.name] for layer in block.chains))


def _between(model: nn.Module, path: str) -> bool:
    """Whether it is one of torch's own modules between layers, which have gradients."""
    parts = model.get_submodule(path).modules()
    return all(type(m).__module__.startswith("torch.nn.modules.") and not kind_of(m) for m in parts)


def _runs(module: nn.Module) -> bool:
    """Whether it has a forward pass of its own, which lists of modules have not."""
    return type(module).forward is not nn.Module.forward
