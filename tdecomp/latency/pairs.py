"""A layer and its chain, timed by turns, to tell which of the two is faster."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from tdecomp.latency.layers import Stages, seconds_of
from tdecomp.latency.measuring import EFFORTS, device_and_dtype
from tdecomp.latency.profile import Profile
from tdecomp.latency.timing import Time
from tdecomp.layer import Call, LayerSpec

_EFFORT = EFFORTS["default"]


@dataclass(frozen=True)
class Pair:
    """Seconds of one pass of a layer, those of its chain, and their ratio.

    Attributes
    ----------
    before, after : float
    ratio : Time
        Of the chain's time to the layer's, over rounds in which both were timed.
    """

    before: float
    after: float
    ratio: Time

    @property
    def faster(self) -> bool:
        """Whether the chain was faster in at least three of four rounds."""
        return self.ratio.high < 1


@dataclass
class Pairs:
    """The pairs of one model, each timed once."""

    model: nn.Module
    profile: Profile
    _known: dict[tuple[str, Stages, Stages, tuple[Call, ...]], Pair] = field(default_factory=dict)

    def of(self, spec: LayerSpec, stages: Stages, calls: Sequence[Call], layout: str) -> Pair:
        """Time a layer against a chain, unless it was done before."""
        timed_in = self.profile.timed_in(layout)
        key = (timed_in, (spec,), stages, tuple(calls))
        if key not in self._known:
            device, dtype = device_and_dtype(self.model)
            seconds = sum(
                seconds_of(
                    [(spec,), stages],
                    call,
                    timed_in,
                    device,
                    dtype,
                    rounds=_EFFORT.rounds,
                    min_block=_EFFORT.min_block,
                )
                for call in calls
            )
            before, after = np.median(seconds, axis=0).tolist()
            ratio = Time.over(seconds[:, 1] / seconds[:, 0])  # type: ignore[index]
            self._known[key] = Pair(before, after, ratio)
        return self._known[key]
