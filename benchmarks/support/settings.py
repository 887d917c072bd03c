"""One line of a comparison: a method, a share of the cost, and how both become ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

import tdecomp
from benchmarks.support.today import TODAY, takes
from tdecomp import RankSelector
from tdecomp.decomposers.registry import listed_methods
from tdecomp.model.example import Example
from tdecomp.model.filters import Filters
from tdecomp.plans.make import Request, make_plan

LINEAR_METHOD = "svd"
GROUPS = ("auto", "dense")  # several methods each, Linear layers' included: one budget only
COSTS = ("macs", "params", "time")
UNIFORM, BUDGET = "uniform", "budget"
_STEPS = tuple(1.25**-k for k in range(-2, 12))  # of a layer's share, of the model's
_HALVINGS = 6


@dataclass(frozen=True)
class Setting:
    """A method at a share of the cost, and whether its factors are fitted to weights or data."""

    method: str
    share: float
    fitted: str = "weights"
    ranks: str = UNIFORM
    equal: str = "macs"

    @property
    def label(self) -> str:
        return f"{self.method} at {self.share} of the {self.equal}, fitted to {self.fitted}"

    @property
    def methods(self) -> str | list[str]:
        """What to pass to tdecomp: the method for convolutions, then the one for Linear layers."""
        method = TODAY[self.method].like if self.method in TODAY else self.method
        return method if method in (LINEAR_METHOD, *GROUPS) else [method, LINEAR_METHOD]


def known_methods() -> tuple[str, ...]:
    """Every method of tdecomp, the groups of them, and the ways of today."""
    return (*tdecomp.registered(), *GROUPS, *TODAY)


def settings_of(
    methods: Sequence[str],
    shares: Sequence[float],
    fitted: Sequence[str],
    ranks: Sequence[str],
    equal: str,
) -> list[Setting]:
    """Every method at every share.

    The ways of today know only weights, and the same share for every layer; groups of methods, and
    shares of time, need a budget.
    """
    for method in methods:
        if method not in known_methods():
            raise ValueError(f"unknown method {method!r}; there are {', '.join(known_methods())}")
    for share in shares:
        if not 0 < share < 1:
            raise ValueError(f"--shares: expected numbers between 0 and 1, got {share}")
    found = []
    for method in methods:
        today = method in TODAY
        if method in GROUPS or equal == "time":
            choices: Sequence[str] = (BUDGET,)
        else:
            choices = (UNIFORM,) if today else ranks
        found += [
            Setting(method, share, fit, choice, equal)
            for choice in choices
            for fit in (("weights",) if today else fitted)
            for share in shares
        ]
    return list(dict.fromkeys(found))


def plan_of(
    model: nn.Module, setting: Setting, example: Any, *, min_channels: int,
    profile: tdecomp.Profile | None = None, data: tdecomp.Moments | None = None,
) -> tdecomp.Plan:  # fmt: skip
    """The ranks with which the whole model is at the setting's share.

    One budget finds them, or every layer gets the same share of its own cost, as large as the
    whole model's allows.
    """
    large = tdecomp.at_least(channels=min_channels, features=min_channels)
    of_today = setting.method in TODAY

    def where(module: nn.Module, name: str) -> bool:
        return large(module, name) and (takes(module) or not of_today)

    methods, filters = listed_methods(setting.methods), Filters(where=where)

    def plan(rank: RankSelector) -> tdecomp.Plan:
        request = Request(methods, rank, filters, Example.of(example, None), profile=profile)
        # Without the errors to expect, which nobody reads here and which take most of the time.
        return make_plan(model, request, data, expect=False).plan

    if setting.ranks == BUDGET:
        name = "latency" if setting.equal == "time" else setting.equal
        limit: dict[str, Any] = {name: setting.share}
        return plan(tdecomp.Budget(**limit))
    return _uniform(lambda ratio, of: plan(tdecomp.Ratio(ratio, of=of)), setting)


def _uniform(plan: Callable[[float, Any], tdecomp.Plan], setting: Setting) -> tdecomp.Plan:
    """The largest share for every layer with which the whole model has its share.

    From above, as layers have no rank for a share that is too small, and are then left alone.
    """
    of = setting.equal

    def fits(trial: tdecomp.Plan) -> bool:
        return bool(getattr(trial.after, of) <= setting.share * getattr(trial.before, of))

    above = low = 1.0
    for step in _STEPS:
        low = min(1.0, setting.share * step)
        found = plan(low, of)
        if fits(found):
            break
        above = low
    else:
        raise ValueError(
            f"{setting.label}: the layers that it takes cannot be made so small that the whole "
            "model is; expected a larger share, or fewer layers left alone (--min-channels)"
        )
    for _ in range(_HALVINGS):
        middle = (low + above) / 2
        trial = plan(middle, of)
        if fits(trial):
            found, low = trial, middle
        else:
            above = middle
    return found
