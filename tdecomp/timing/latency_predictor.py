"""The time of a whole model, predicted from the times of its layers measured one by one."""

from collections.abc import Sequence
from dataclasses import dataclass

# The summed seconds of all layers measured one by one, and the seconds of the model with them.
Point = tuple[float, float]


@dataclass(frozen=True)
class LatencyPredictor:
    """A line: ``factor`` times the seconds of the layers, plus the ``rest`` of the model.

    The factor need not be 1: when a model comes back to a layer, its weights are no longer in the
    cache, so that the layer takes longer than it does when it is timed by itself.
    """

    factor: float
    rest: float

    @classmethod
    def from_original(cls, layers: float, model: float) -> "LatencyPredictor":
        """The predictor while the original is the only model that was timed."""
        return cls(min(1.0, model / layers) if layers > 0 else 1.0, max(0.0, model - layers))

    @classmethod
    def through(cls, points: Sequence[Point], near: float) -> "LatencyPredictor | None":
        """The line through the two points nearest in model time; None if it does not rise."""
        first, second = sorted(points, key=lambda point: abs(point[1] - near))[:2]
        run, rise = first[0] - second[0], first[1] - second[1]
        if run * rise <= 0:
            return None
        factor = rise / run
        return cls(factor, first[1] - factor * first[0])
