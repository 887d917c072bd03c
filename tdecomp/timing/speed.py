"""How the time of a decomposed model compares with the original's: plain data."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdecomp.files.typed import typed
from tdecomp.model.example import LAYOUTS


@dataclass(frozen=True)
class Quartiles:
    """The median and the quartiles of repeated measurements: of seconds, or of a ratio of them."""

    median: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.median <= self.high:
            raise ValueError(f"expected quartiles above 0 in their order, got {self}")

    @classmethod
    def over(cls, values: NDArray[np.float64]) -> "Quartiles":
        low, median, high = np.percentile(values, [25, 50, 75]).tolist()
        return cls(median, low, high)

    @property
    def spread(self) -> float:
        """The distance between the quartiles, as a share of the median."""
        return (self.high - self.low) / self.median


@dataclass(frozen=True)
class Speed:
    """The time of a decomposed model as a share of the original's, best layout against best."""

    seconds_before: float  # of one pass of the original
    layout_before: str  # the memory layout in which the original runs fastest, of those tried
    layout: str  # the one in which the decomposed model runs fastest
    predicted: float | None = None  # the ratio that the plan expects
    measured: Quartiles | None = None  # the ratio, over rounds in which both models were timed
    budget: float | None = None  # the ratio that was asked for
    compiled: bool = False  # whether both models ran compiled
    tried: tuple[str, ...] = ()  # the layouts that were tried

    def __post_init__(self) -> None:
        unknown = {self.layout_before, self.layout, *self.tried} - LAYOUTS.keys()
        if unknown or (self.budget is not None and self.budget <= 0):
            raise ValueError(f"expected layouts of {[*LAYOUTS]}, a budget above 0, got {self!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Speed":
        """The inverse of `to_dict`, also after a round trip through JSON."""
        speed: Speed = typed(cls, data, "speed")
        return speed

    def __str__(self) -> str:
        measured, budget, parts = self.measured, self.budget, []
        if measured:
            quartiles = f"quartiles {measured.low:.3f} to {measured.high:.3f}"
            parts.append(f"measured time {measured.median:.3f} of the original's ({quartiles})")
        if self.predicted is not None:
            of = "" if measured else " of the original's time"
            parts.append(f"predicted {self.predicted:.3f}{of}")
        if budget is not None:
            parts.append(f"asked for {budget:g}")
        layouts = f"{self.layout_before} before, {self.layout} after"
        parts.append(self.layout if self.layout == self.layout_before else layouts)
        if self.compiled:
            parts.append("compiled")
        return ", ".join(parts)

    @property
    def shortfalls(self) -> tuple[str, ...]:
        """In words, where the measured time is not what it was to become."""
        measured, budget, found = self.measured, self.budget, []
        if measured and measured.high > 1:
            how = "SLOWER" if measured.low > 1 else "not measurably faster"
            found.append(f"{how} than the original: {measured.median:.3f} of its time")
        if measured and budget is not None and measured.median > budget:
            found.append(
                f"the time that was asked for, {budget:g} of the original's, is missed by "
                f"{measured.median / budget - 1:.1%}"
            )
        return tuple(found)
