"""Parameters and MACs of layers and of the chains that may replace them."""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tdecomp.layers.geometry import Call
from tdecomp.layers.stage import Stage


@dataclass(frozen=True)
class Cost:
    """What a layer, a chain or a model costs; costs can be added and subtracted.

    >>> plan = tdecomp.plan(
    ...     nn.Linear(64, 32), "svd", rank=8, example_inputs=torch.ones(2, 64), progress=False
    ... )
    >>> plan.before.params, plan.before.macs, plan.after.macs
    (2080, 4096, 1536)

    Attributes
    ----------
    params : int
        Parameters, the biases included.
    macs : int or None
        Multiply-accumulates of one pass of the example inputs; None without them.
    latency : float or None
        Measured seconds of one pass; None where no time was measured.
    uncounted : str
        The operators whose work `macs` leaves out, in words.
    """

    params: int
    macs: int | None = None
    latency: float | None = None
    uncounted: str = ""

    def __add__(self, other: "Cost") -> "Cost":
        return self._with(other, operator.add)

    def __sub__(self, other: "Cost") -> "Cost":
        return self._with(other, operator.sub)

    def _with(self, other: "Cost", act: Callable[[Any, Any], Any]) -> "Cost":
        pairs = ((self.macs, other.macs), (self.latency, other.latency))
        macs, latency = (None if a is None or b is None else act(a, b) for a, b in pairs)
        uncounted = self.uncounted or other.uncounted
        return Cost(act(self.params, other.params), macs, latency, uncounted)

    def by_params(self) -> "Cost":
        """The same one, of which parameters are compared, as those of lookups are."""
        return LookupCost(self.params, self.macs, self.latency, self.uncounted)

    @property
    def amount(self) -> int:
        """MACs, or parameters where MACs are unknown or 0; break-even ranks compare these."""
        return self.macs or self.params

    @property
    def unit(self) -> str:
        """The unit of `amount`, in words."""
        return "MACs" if self.macs else "parameters"


@dataclass(frozen=True)
class LookupCost(Cost):
    """Of a lookup, which has no MACs, or of a chain in its place: parameters are compared."""

    @property
    def amount(self) -> int:
        return self.params

    @property
    def unit(self) -> str:
        return "parameters"


def total(costs: Iterable[Cost]) -> Cost:
    """The sum, with seconds if any of the costs has them.

    A layer with unknown MACs adds none: they count as MACs of the rest of the model.
    """
    listed = list(costs)
    timed = [cost.latency for cost in listed if cost.latency is not None]
    params, macs = sum(cost.params for cost in listed), sum(cost.macs or 0 for cost in listed)
    return Cost(params, macs, sum(timed) if timed else None)


def chain_cost(stages: Sequence[Stage], calls: Sequence[Call] | None) -> Cost:
    """Cost of running `stages` one after the other, each at its own input and output size."""
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


def count_in_words(value: float) -> str:
    """Three significant digits and a metric prefix."""
    amount, prefix = float(value), ""
    for larger in ("k", "M", "G", "T"):
        if abs(amount) < 999.5:
            break
        amount, prefix = amount / 1000, larger
    digits = max(0, 3 - len(str(int(abs(amount))))) if prefix else 0
    return f"{amount:.{digits}f}{prefix}"
