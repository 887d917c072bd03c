"""How the time of a decomposed model compares with the original: plain data."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from tdecomp.timing.stopwatch import Time


@dataclass(frozen=True)
class Speed:
    """The time of a decomposed model as a share of the original's, best layout against best.

    Attributes
    ----------
    seconds_before : float
        Of one pass of the original.
    layout_before, layout : str
        In which the original, and the result, run fastest of those that were tried.
    predicted : float or None
        The ratio that the plan expects.
    measured : Time or None
        The ratio, median and quartiles over rounds in which both were timed by turns.
    budget : float or None
        What was asked for.
    compiled : bool
    tried : tuple of str
        The layouts.
    """

    seconds_before: float
    layout_before: str
    layout: str
    predicted: float | None = None
    measured: Time | None = None
    budget: float | None = None
    compiled: bool = False
    tried: tuple[str, ...] = ()

    @property
    def expected(self) -> "Speed":
        """As a plan has it: what was measured of its rehearsal is what it predicts."""
        return replace(self, measured=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `Speed.from_dict` brings it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Speed":
        """The inverse of `to_dict`, also after a round trip through JSON."""
        measured = None if data["measured"] is None else Time(**data["measured"])
        return cls(**{**data, "measured": measured, "tried": tuple(data["tried"])})

    def __str__(self) -> str:
        parts = []
        if self.measured is not None:
            low, high = self.measured.low, self.measured.high
            parts.append(
                f"measured time {self.measured.median:.3f} of the original's "
                f"(quartiles {low:.3f} to {high:.3f})"
            )
        if self.predicted is not None:
            of = "" if self.measured is not None else " of the original's time"
            parts.append(f"predicted {self.predicted:.3f}{of}")
        if self.budget is not None:
            parts.append(f"asked for {self.budget:g}")
            if self.measured is not None and self.measured.median > self.budget:
                parts.append(f"missed by {self.measured.median / self.budget - 1:.1%}")
        layouts = f"{self.layout_before} before, {self.layout} after"
        parts.append(self.layout if self.layout == self.layout_before else layouts)
        if self.compiled:
            parts.append("compiled")
        if self.measured is not None and self.measured.low > 1:
            parts.append("SLOWER than the original")
        elif self.measured is not None and self.measured.high > 1:
            parts.append("no faster that could be told from the scatter")
        return ", ".join(parts)
