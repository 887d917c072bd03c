"""What seconds that were measured alone come to inside a model."""

from collections.abc import Sequence
from dataclasses import dataclass

# Seconds of all layers alone, and of the model with them.
Point = tuple[float, float]


@dataclass(frozen=True)
class InModel:
    """``factor`` times the seconds of the layers alone, and the ``rest`` of the model.

    >>> InModel.alone(whole=10.0, layers=8.0)
    InModel(factor=1.0, rest=2.0)
    >>> InModel.through([(8.0, 10.0), (2.0, 4.0)], near=5.0)
    InModel(factor=1.0, rest=2.0)

    A layer's weights are no longer in the cache when a model comes back to it, so that layers take
    longer there than when they are timed by themselves, and the rest less than what is missing.
    """

    factor: float
    rest: float

    @classmethod
    def alone(cls, whole: float, layers: float) -> "InModel":
        """As long as nothing else is known: from the time of the original and of its layers."""
        return cls(min(1.0, whole / layers) if layers > 0 else 1.0, max(0.0, whole - layers))

    @classmethod
    def through(cls, points: Sequence[Point], near: float) -> "InModel | None":
        """The line through the two models whose time is nearest; None if they tell nothing."""
        first, second = sorted(points, key=lambda point: abs(point[1] - near))[:2]
        run, rise = first[0] - second[0], first[1] - second[1]
        if run * rise <= 0:
            return None
        factor = rise / run
        return cls(factor, first[1] - factor * first[0])
