"""One layer's row: plain data, and back."""

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, ClassVar

from tdecomp.files.typed import typed
from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost
from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerSpec


@dataclass(frozen=True)
class Row:
    """What is to be done, or was done, with one layer.

    >>> row = tdecomp.plan(nn.Linear(64, 32), "svd", rank=8, progress=False)[""]
    >>> row.method, row.rank, row.params_before, row.params_after
    ('svd', 8, 2080, 800)

    Attributes
    ----------
    name : str
        The first of its names; "" for the model itself.
    names : tuple of str
        All names under which the model holds the layer; several where it is shared.
    layer : LayerSpec or None
        None where the sizes are not known (lazy and quantized layers).
    params_before, params_after : int
        Parameters, the bias included.
    macs_before, macs_after : int or None
        Of one pass of the example inputs; None without them.
    method, rank : str and int or tuple of int; or None
        None where the layer is left alone.
    reason : str or None
        Why it is left alone.
    note : str or None
        A remark, for example that a break-even counted parameters.
    expected_error : float or None
        Known before the fit, of `output_error` with data and of `weight_error` without: exact for
        svd, lowrank and spatial, a bound for tucker2, None for CP unless a budget fitted it.
    weight_error : float or None
        ‖W − W̃‖ / ‖W‖, of the weights as they are stored.
    output_error, output_error_se, output_error_margin : float or None
        With data, the lost share of the output's variance, on samples that are held out; its
        standard error and the half-width of its 95% interval are None where it is of what was
        fitted to.
    latency_before, latency_after : float or None
        Measured seconds of the layer and of the chain alone, in one pass of the example inputs,
        both in the layout of the result; None without a profile.
    fit_seconds : float or None
        Seconds that the fit took; None where nothing was fitted, as in a plan.
    component_norms : float or None
        Of CP, over the kernel's norm: far above √rank the components cancel.
    calls : tuple of Call or None
        The sizes of the layer's calls in one pass of the example inputs.
    tied_to : str or None
        The first row that has the same weight, where this is another one: they share its factors.
    shares_all : bool
        Whether an earlier row with this weight is of the same kind, too: then both factors are one
        parameter each in the two; else only the larger one is.
    """

    # Fields that files of earlier versions lack.
    later: ClassVar[tuple[str, ...]] = ("tied_to", "shares_all")

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
    output_error_se: float | None = None
    output_error_margin: float | None = None
    latency_before: float | None = None
    latency_after: float | None = None
    fit_seconds: float | None = None
    component_norms: float | None = None
    calls: tuple[Call, ...] | None = None
    tied_to: str | None = None
    shares_all: bool = False

    def __post_init__(self) -> None:
        problem = f"its names are {self.names}" if self.names[:1] != (self.name,) else None
        for name, value in vars(self).items():
            large = isinstance(value, int) and value >= 2**63  # it could not be read back
            if large or (isinstance(value, (int, float)) and value < 0):
                problem = f"{name} is {value}"
        if (self.method is None) != (self.rank is None):
            problem = f"its method is {self.method!r}, its rank {self.rank}"
        for call in self.calls or ():
            if self.layer is not None and not self.layer.takes(call):
                problem = f"{self.layer} cannot have been called with {call}"
        if problem:
            raise ValueError(f"layer {self.name!r}: {problem}; expected the row of a real layer")

    @property
    def before(self) -> Cost:
        return Cost(self.params_before, self.macs_before, self.latency_before)

    @property
    def after(self) -> Cost:
        return Cost(self.params_after, self.macs_after, self.latency_after)

    @property
    def remarks(self) -> str:
        """All that there is to say of it: reason or note, how CP's components are, other names."""
        said = [self.reason or self.note or ""]
        if self.tied_to and self.method is not None:
            said.append(f"shares its factors with {self.tied_to!r}")
        if self.component_norms is not None:
            said.append(f"component norms {self.component_norms:.1f} times the kernel's")
        if len(self.names) > 1:
            said.append(f"also {', '.join(self.names[1:])}")
        return "; ".join(words for words in said if words)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data, without NaN and infinities; `Row.from_dict` brings it back."""
        plain = asdict(self).items()
        return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in plain}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Row":
        """The inverse of `to_dict`, also after a round trip through JSON.

        An entry that is missing, unknown or of a wrong type raises a TypeError.
        """
        row: Row = typed(cls, data, "row")
        return row
