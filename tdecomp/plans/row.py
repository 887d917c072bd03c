"""One layer's row: plain data, and back."""

from dataclasses import dataclass, fields
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
    params_before, params_after : int
    macs_before, macs_after : int or None
        Of one pass of the example inputs; None without them.
    method : str or None
        None where the layer is left alone.
    rank : int, tuple of int or None
    reason : str or None
        Why it is left alone.
    note : str or None
        A remark, for example that a break-even counted parameters.
    expected_error : float or None
        Before the fit: of ``output_error`` with data, of ``weight_error`` without. Exact for svd,
        lowrank and spatial, a bound for tucker2; None for CP unless a budget fitted it.
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
        The calls of the layer in one pass of the example inputs.
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
        """The row as plain data; `Row.from_dict` brings it back."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["names"] = list(self.names)
        plain["layer"] = None if self.layer is None else self.layer.to_dict()
        plain["rank"] = list(self.rank) if isinstance(self.rank, tuple) else self.rank
        if self.calls is not None:
            plain["calls"] = [[call.batch, list(call.size)] for call in self.calls]
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Row":
        """The inverse of `to_dict`, also after a round trip through JSON.

        Raises
        ------
        KeyError, TypeError
            If an entry is missing, unknown or of a wrong kind.
        """
        counts = [data["params_before"], data["params_after"]]
        counts += [data["macs_before"] or 0, data["macs_after"] or 0]
        if not isinstance(data["name"], str) or not all(isinstance(n, int) for n in counts):
            raise TypeError(f"expected a name and whole counts, got {data['name']!r} and {counts}")
        layer, rank, calls = data["layer"], data["rank"], data["calls"]
        known = {
            "names": tuple(data["names"]),
            "layer": None if layer is None else LayerSpec.from_dict(layer),
            "rank": tuple(rank) if isinstance(rank, list) else rank,
            "calls": None if calls is None else tuple(Call(n, tuple(size)) for n, size in calls),
        }
        return cls(**{**data, **known})


def cost_to_dict(cost: Cost) -> dict[str, float | None]:
    """A cost as plain data."""
    return {"params": cost.params, "macs": cost.macs, "latency": cost.latency}


def cost_from_dict(data: dict[str, Any]) -> Cost:
    """The inverse of `cost_to_dict`."""
    return Cost(data["params"], data["macs"], data["latency"])
