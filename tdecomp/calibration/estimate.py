"""An error on samples that nothing was fitted to, and how far it may be off."""

import math
from dataclasses import dataclass

from scipy.special import stdtrit
from torch import Tensor

# The share of times that an error is meant to lie within its margin.
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """An error with its standard error and the half-width of its 95% confidence interval.

    Both are None where the samples cannot tell: for a single one, or where none were held out.
    """

    value: float
    se: float | None = None
    margin: float | None = None


def lost_share(lost: Tensor, power: Tensor) -> Estimate:
    """``Σ lost / Σ power``, over samples (samples,) that are independent of each other.

    The standard error is the jackknife's. Its degrees of freedom are those of the effective number
    of samples (Kish 1965, "Survey Sampling"): a few samples may hold most of the power.
    """
    total, count = float(power.sum()), len(lost)
    if not total > 0:
        return Estimate(float(lost.sum() > 0))
    value = float(lost.sum()) / total
    weights = power / total
    left_out = (lost - value * power) / (1 - weights).clamp_min(1 / (count + 1))
    effective = float(1 / weights.square().sum())
    if count < 2 or effective - 1 < 1e-6:
        return Estimate(value)
    se = math.sqrt(float(left_out.square().sum()) * (count - 1) / count) / total
    return Estimate(value, se, se * float(stdtrit(effective - 1, (1 + _CONFIDENCE) / 2)))


def paired_gain(before: Tensor, after: Tensor) -> tuple[float, float]:
    """The sum over samples (samples,) of ``before − after``, and its standard error."""
    gains = before - after
    count = len(gains)
    se = math.sqrt(count * float(gains.var())) if count > 1 else math.inf
    return float(gains.sum()), se


def helps(before: Tensor, after: Tensor, *, held_out: bool) -> bool:
    """Whether a change is kept for what the samples (samples,) lose before and after it.

    Samples that are held out have to lose less by more than chance explains; those that the change
    was fitted to only have to lose less.
    """
    gain, se = paired_gain(before, after)
    return gain > (se if held_out else 0.0)
