"""A layer row: plain data and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost
from tdecomp.layers.spec import Call, LayerSpec


@dataclass(frozen=True)
class Row:
    """What is to be done, or was done, with one layer.

    Attributes
    ----------
    name : str
        The first name it is reachable by; "" for the model itself.
    names : tuple of str
        All of them.
    layer : LayerSpec or None
        None where the sizes are not known (lazy and quantized layers).
    method : str or None
        None where the layer is left alone.
    rank : int, tuple of int or None
    reason : str or None
        Why it is left alone.
    note : str or None
        What else a reader should know, e.g. that a break-even went by parameters.
    params_before, params_after : int
    macs_before, macs_after : int or None
        Of one forward pass of the example inputs; None without them.
    expected_error : float or None
        Before anything is fitted: of ``output_error`` with data, of ``weight_error`` without. Exact
        for svd, lowrank and spatial, a bound for tucker2; None for CP unless a budget fitted it.
    weight_error : float or None
        ‖W − W̃‖ / ‖W‖ in the Frobenius norm, of the weights as they are stored.
    output_error : float or None
        The share of the output's variance that is lost, by the moments; None without data.
    latency_before, latency_after : float or None
        Measured seconds, of one pass of the example inputs, of the layer and of the chain alone,
        both in the layout of the result; None without a profile.
    fit_seconds : float or None
    component_norms : float or None
        For CP, the sum of the components' norms over the kernel's: far above √rank they cancel.
    calls : tuple of Call or None
        What the example inputs asked of the layer.
    """

    name: str
    names: tuple[str, ...]
    layer: LayerSpec | None
    params_before: int
    params_after: int
    macs_before: int | None = None
    macs_after: int | None = None
    method: str | None = None
    rank: Rank | None = None
    reason: str | None = None
    note: str | None = None
    expected_error: float | None = None
    weight_error: float | None = None
    output_error: float | None = None
    latency_before: float | None = None
    latency_after: float | None = None
    fit_seconds: float | None = None
    component_norms: float | None = None
    calls: tuple[Call, ...] | None = None

    @property
    def before(self) -> Cost:
        return Cost(self.params_before, self.macs_before, self.latency_before)

    @property
    def after(self) -> Cost:
        return Cost(self.params_after, self.macs_after, self.latency_after)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        rank = list(self.rank) if isinstance(self.rank, tuple) else self.rank
        return {
            "name": self.name,
            "names": list(self.names),
            "layer": None if self.layer is None else self.layer.to_dict(),
            "method": self.method,
            "rank": rank,
            "reason": self.reason,
            "note": self.note,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "macs_before": self.macs_before,
            "macs_after": self.macs_after,
            "expected_error": self.expected_error,
            "weight_error": self.weight_error,
            "output_error": self.output_error,
            "latency_before": self.latency_before,
            "latency_after": self.latency_after,
            "fit_seconds": self.fit_seconds,
            "component_norms": self.component_norms,
            "calls": None
            if self.calls is None
            else [[call.batch, list(call.size)] for call in self.calls],
        }


def cost_to_dict(cost: Cost) -> dict[str, float | None]:
    return {"params": cost.params, "macs": cost.macs, "latency": cost.latency}


def cost_from_dict(data: dict[str, Any]) -> Cost:
    """The inverse of a cost's plain data."""
    return Cost(data["params"], data["macs"], data.get("latency"))


def calls_from_list(data: Sequence[Any] | None) -> tuple[Call, ...] | None:
    """The inverse of a row's plain calls."""
    return None if data is None else tuple(Call(batch, tuple(size)) for batch, size in data)
