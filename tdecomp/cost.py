"""Parameters and MACs of layers and of the chains that may replace them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tdecomp.layer import Call, LayerSpec


@dataclass(frozen=True)
class Cost:
    """Parameters, and MACs over the observed calls (None where nothing was observed)."""

    params: int
    macs: int | None = None

    def __add__(self, other: "Cost") -> "Cost":
        known = self.macs is not None and other.macs is not None
        return Cost(self.params + other.params, self.macs + other.macs if known else None)  # type: ignore[operator]

    def __sub__(self, other: "Cost") -> "Cost":
        known = self.macs is not None and other.macs is not None
        return Cost(self.params - other.params, self.macs - other.macs if known else None)  # type: ignore[operator]

    @property
    def deciding(self) -> int:
        """What a break-even compares: MACs where calls were observed, parameters elsewhere.

        A layer that the example inputs never reached has 0 MACs, which says nothing of its cost.
        """
        return self.macs if self.macs else self.params

    @property
    def unit(self) -> str:
        """What `deciding` counts."""
        return "MACs" if self.macs else "parameters"


def total(costs: Iterable[Cost]) -> Cost:
    """The sum; a layer whose MACs are not known by itself adds none, they are part of the rest."""
    listed = list(costs)
    return Cost(sum(cost.params for cost in listed), sum(cost.macs or 0 for cost in listed))


def chain_cost(stages: Sequence[LayerSpec], calls: Sequence[Call] | None) -> Cost:
    """Cost of running `stages` one after the other, each at its own input and output size.

    >>> conv = LayerSpec(64, 64, (3, 3), (2, 2), (1, 1), (1, 1), (0, 0))
    >>> chain_cost([conv], [Call(1, (8, 8))])
    Cost(params=36928, macs=589824)
    """
    params = sum(stage.params for stage in stages)
    if calls is None:
        return Cost(params)
    macs = 0
    for call in calls:
        size = call.size
        for stage in stages:
            macs += stage.macs(Call(call.batch, size))
            size = stage.output_size(size)
    return Cost(params, macs)
