"""The blocks of a model: a few chains, with all that runs between them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tdecomp.recovery.replaced import ReplacedLayer

# The most chains of a block: a residual block has two to four, an attention layer four.
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
        """Those to be trained, each once."""
        held = {id(p): p for module in self.modules for p in module.parameters()}
        return [p for p in held.values() if p.requires_grad]


def blocks_of(
    model: nn.Module, original: nn.Module, chains: Sequence[ReplacedLayer]
) -> list[Block]:
    """Blocks that together hold all chains, each of them once, in the order of the modules.

    A module that holds few chains is a block; of an `nn.Sequential` with many, the children that
    follow one another are joined.
    """
    places = {layer.name: layer for layer in chains}

    def inside(name: str) -> list[ReplacedLayer]:
        return [
            layer for at, layer in places.items() if f"{at}.".startswith(f"{name}." if name else "")
        ]

    def block(names: Sequence[str]) -> Block:
        mine, theirs = (tuple(map(whole.get_submodule, names)) for whole in (model, original))
        held = [layer for name in names for layer in inside(name)]
        return Block(names[0], mine, theirs, tuple(held))

    def split(name: str) -> Iterator[Block]:
        module = model.get_submodule(name)
        children = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        if name in places or (name and len(inside(name)) <= _MOST and _runs(module)):
            yield block([name])
            return
        joined: list[str] = []
        for child in children:
            held = len(inside(child))
            together = sum(len(inside(one)) for one in joined) + held
            if joined and (together > _MOST or not type(module) is nn.Sequential):
                yield block(joined)
                joined = []
            if held > _MOST or (held and type(module) is not nn.Sequential):
                yield from split(child)
            elif held or joined:
                joined.append(child)
        if joined:
            yield block(joined)

    return list(split(""))


def _runs(module: nn.Module) -> bool:
    """Whether it has a forward pass of its own, which lists of modules have not."""
    return type(module).forward is not nn.Module.forward
