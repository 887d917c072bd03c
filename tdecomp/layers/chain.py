"""The chain of stock layers that stands where a layer stood."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from tdecomp.layers.spec import LayerSpec

Rank = int | tuple[int, ...]


class Chain(nn.Sequential):
    """An `nn.Sequential` of stock torch layers that remembers what it replaced.

    >>> chain = Chain(nn.Linear(8, 2, bias=False), nn.Linear(2, 8))
    >>> list(chain.state_dict())
    ['0.weight', '1.weight', '1.bias']

    Attributes
    ----------
    method, decomposer : str, Decomposer
        The method that made it: its name, and the method with its options.
    rank : int or tuple of int
    replaced : LayerSpec
        The layer that stood here before.
    """

    method: str | None = None
    decomposer: Any = None  # of a type that is defined in a room above this one
    rank: Rank | None = None
    replaced: LayerSpec | None = None
    # torch.jit.script knows none of these types, and scripted code needs none of these facts.
    __jit_ignored_attributes__ = ("method", "decomposer", "rank", "replaced")

    @classmethod
    def from_stages(
        cls, stages: Sequence[nn.Module], decomposer: Any, rank: Rank, replaced: LayerSpec
    ) -> "Chain":
        chain = cls(*stages)
        chain.method, chain.decomposer = decomposer.name, decomposer
        chain.rank, chain.replaced = rank, replaced
        return chain

    def extra_repr(self) -> str:
        return "" if self.method is None else f"method={self.method!r}, rank={self.rank}"
