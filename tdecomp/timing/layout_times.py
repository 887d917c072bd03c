"""Times of one model in one memory layout: of its layers, of chains, and of the whole predicted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.example import Example
from tdecomp.model.sites import Site
from tdecomp.ranks.base import Candidate, Choice, RankSelector
from tdecomp.timing.profile import Profile
from tdecomp.timing.setting import device_and_dtype
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
    """What is to be chosen, and times in one layout.

    Times are read from the profile; only `compare` measures.
    """

    sites: Sequence[Site]
    candidates: Sequence[Sequence[Candidate]]  # of each site
    selector: RankSelector
    rest: Cost  # of the model outside these sites
    profile: Profile
    example: Example
    model: nn.Module
    only_if_faster: bool  # leaves alone each layer whose chain is not measurably faster
    # Replaces a choice that must not be made by one that says why.
    guard: Callable[[Choice], Choice]
    layout: str = ""
    # Those measured so far, in any layout.
    comparisons: dict[Any, LayerComparison] = field(default_factory=dict)

    @property
    def original(self) -> float:
        """Seconds of one pass of the original."""
        return self.profile.whole[self.layout].median

    def layer(self, site: Site) -> float:
        """Seconds of a site's layer in one pass."""
        return self.profile.layer(spec_of(site), site.calls or (), self.layout)

    def layers(self) -> list[float]:
        """Seconds of each site's layer in one pass."""
        return [self.layer(site) for site in self.sites]

    def chain(self, site: Site, candidate: Candidate, rank: Rank) -> float:
        """Seconds of a chain in the layer's place."""
        method, calls = candidate.decomposer, site.calls or ()
        return self.profile.chain(method, spec_of(site), rank, calls, self.layout)

    def chosen(self, choices: Sequence[Choice]) -> float:
        """The sum over all sites of the chosen chain's seconds, or the layer's where it is kept."""
        return sum(
            self.layer(site)
            if choice.candidate is None or choice.rank is None
            else self.chain(site, choice.candidate, choice.rank)
            for site, choice in zip(self.sites, choices, strict=True)
        )

    def compare(self, site: Site, choice: Choice) -> LayerComparison | None:
        """The layer timed against the chosen chain, once; None for a layer that is kept."""
        if choice.candidate is None or choice.rank is None or not site.calls:
            return None
        spec, profile = spec_of(site), self.profile
        chains = [(spec,), tuple(choice.candidate.decomposer.stages(spec, choice.rank))]
        layout, where = profile.timed_in(self.layout), device_and_dtype(self.model)
        key = (layout, *chains, site.calls)
        if key not in self.comparisons:
            tables = [
                profile.stopwatch.layers(chains, call, layout, *where, EFFORTS["default"])
                for call in site.calls
            ]
            seconds = np.sum(tables, axis=0)
            before, after = np.median(seconds, axis=0).tolist()
            self.comparisons[key] = LayerComparison(before, after, ratio(seconds, 1, 0))
        return self.comparisons[key]


def spec_of(site: Site) -> LayerSpec:
    """The spec of a site with candidates, which always has one."""
    assert site.spec is not None
    return site.spec


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
