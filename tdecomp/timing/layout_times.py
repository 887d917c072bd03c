"""Times of one model in one memory layout: of its layers, of chains, and of the whole predicted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost
from tdecomp.loss_curves.losses import LayerLosses
from tdecomp.loss_curves.offers import Offer
from tdecomp.model.example import Example
from tdecomp.ranks.base import Candidate, Choice, RankSelector
from tdecomp.timing.profile import Profile
from tdecomp.timing.speed import Quartiles
from tdecomp.timing.stopwatch import EFFORTS, ratio

# The summed seconds of all layers measured one by one, and the seconds of the model with them.
Point = tuple[float, float]


@dataclass(frozen=True)
class LayerComparison:
    """Seconds of one pass of a layer and of its chain, timed in the same rounds."""

    before: float
    after: float
    ratio: Quartiles  # of chain to layer, taken within each round


@dataclass(frozen=True)
class LayoutTimes:
    """What is to be chosen, and times in one layout; only `compare` measures."""

    offers: Sequence[Offer]
    selector: RankSelector
    rest: Cost  # of the model outside these layers
    profile: Profile
    example: Example
    model: nn.Module
    only_if_faster: bool  # leaves alone each layer whose chain is not measurably faster
    guard: Callable[[Choice], Choice]  # puts a reason in the place of what must not be chosen
    layout: str = ""
    comparisons: dict[Any, LayerComparison] = field(default_factory=dict)  # made in any layout

    @property
    def original(self) -> float:
        """Seconds of one pass of the original."""
        return self.profile.whole[self.layout].median

    @cached_property
    def layers(self) -> list[float]:
        """Seconds of each layer in one pass."""
        layer, layout = self.profile.layer, self.layout
        return [layer(o.losses.spec, o.losses.calls or (), layout) for o in self.offers]

    def chain(self, losses: LayerLosses, candidate: Candidate, rank: Rank) -> float:
        """Seconds of a chain in the layer's place."""
        method, calls = candidate.decomposer, losses.calls or ()
        return self.profile.chain(method, losses.spec, rank, calls, self.layout)

    def chosen(self, choices: Sequence[Choice]) -> float:
        """The seconds of all layers in one pass, each with its chain, if one is chosen for it."""
        return sum(
            layer
            if c.candidate is None or c.rank is None
            else self.chain(offer.losses, c.candidate, c.rank)
            for offer, layer, c in zip(self.offers, self.layers, choices, strict=True)
        )

    def compare(self, offer: Offer, choice: Choice) -> LayerComparison | None:
        """The layer timed against the chosen chain, once; None for a layer that is kept."""
        spec, calls, profile = offer.losses.spec, offer.losses.calls, self.profile
        if choice.candidate is None or choice.rank is None or not calls:
            return None
        chains = [(spec,), tuple(choice.candidate.decomposer.stages(spec, choice.rank))]
        layout = profile.timed_in(self.layout)
        key = (layout, *chains, calls)
        if key not in self.comparisons:
            seconds_of = profile.stopwatch.layers_in(self.model, EFFORTS["default"])
            seconds = np.sum([seconds_of(chains, call, layout) for call in calls], axis=0)
            before, after = np.median(seconds, axis=0).tolist()
            self.comparisons[key] = LayerComparison(before, after, ratio(seconds, 1, 0))
        return self.comparisons[key]


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
