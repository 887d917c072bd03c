"""A layer and its chain, timed by turns, to tell which of the two is faster."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from torch import nn

from tdecomp.layers.spec import Call, LayerSpec
from tdecomp.timing.layers import Stages, seconds_of
from tdecomp.timing.measure import EFFORTS
from tdecomp.timing.profile import Profile
from tdecomp.timing.setting import device_and_dtype
from tdecomp.timing.stopwatch import Time, ratio

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
            one = partial(
                seconds_of,
                [(spec,), stages],
                layout=timed_in,
                device=device,
                dtype=dtype,
                rounds=_EFFORT.rounds,
                min_block=_EFFORT.min_block,
            )
            seconds = np.sum([one(call=call) for call in calls], axis=0)
            before, after = np.median(seconds, axis=0).tolist()
            self._known[key] = Pair(before, after, ratio(seconds, 1, 0))
        return self._known[key]
