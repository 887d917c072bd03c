"""The quality that a smaller model has to keep, by a metric of the user's, which may be noisy."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from statistics import fmean, variance
from typing import Any

from scipy.special import stdtrit
from torch import Tensor, nn

from tdecomp.model.surgery import copy_with

# A value counts as kept, or lost, where it is beyond the limit by one standard error. Student's
# quantile at this probability makes it more while few repeated values tell of the noise.
_ONE_ERROR = 0.8413
_REPEATS = 3  # evaluations of one model at most, where the noise leaves open whether it will do
_FEWEST = 4  # two of the original, two of the first smaller model
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Quality:
    """What a smaller model has to keep.

    >>> Quality(lambda model: 92.4, drop=0.5).evaluations
    10

    Parameters
    ----------
    metric : callable ``(model) -> float``
        The higher the better. It gets a copy of the model in evaluation mode, so that nothing that
        it does to it lasts.
    drop : float, optional
        How much may be lost of the original's value, in the metric's own unit.
    at_least : float, optional
        The lowest value that will do. One of `drop` and `at_least` is needed.
    evaluations : int
        How often the metric is evaluated at most. The original and one smaller model are evaluated
        twice, as this tells whether the metric is noisy.

    Raises
    ------
    TypeError
        If `metric` cannot be called.
    ValueError
        If none or both of `drop` and `at_least` are given, or one is no finite number or out of
        range.
    """

    metric: Callable[[nn.Module], float]
    drop: float | None = None
    at_least: float | None = None
    evaluations: int = 10

    def __post_init__(self) -> None:
        if not callable(self.metric):
            raise TypeError(
                f"Quality: expected metric to be a callable (model) -> float, got {self.metric!r}"
            )
        limits = {name: getattr(self, name) for name in ("drop", "at_least")}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        if len(given) != 1:
            got = " and ".join(f"{name}={limit!r}" for name, limit in given.items()) or "neither"
            raise ValueError(f"Quality: expected either drop= or at_least=, got {got}")
        if not all(map(_is_finite, given.values())) or (self.drop or 0) < 0:
            raise ValueError(
                "Quality: expected drop to be a finite number of at least 0, or at_least a finite "
                f"number, got {given}"
            )
        if not (type(self.evaluations) is int and self.evaluations >= _FEWEST):
            raise ValueError(
                f"Quality: expected evaluations of at least {_FEWEST}, got {self.evaluations!r}"
            )


@dataclass(frozen=True)
class Verdict:
    """What the evaluations of one model say."""

    values: tuple[float, ...]
    lost: float  # of the original's value
    margin: float  # the noise of what is lost: one standard error, with few repeated values more
    allowed: float  # that may be lost

    @property
    def value(self) -> float:
        """The mean."""
        return fmean(self.values)

    @property
    def kept(self) -> bool:
        """Whether the quality is kept, the noise on top."""
        return self.lost + self.margin <= self.allowed + _ROUNDING * abs(self.value)

    @property
    def used(self) -> float:
        """How much of what may be lost is lost, the noise on top; above 1 it is too much."""
        if self.allowed > 0:
            return (self.lost + self.margin) / self.allowed
        return 1.0 if self.kept else math.inf


class Judge:
    """Evaluates models, and says whether they keep the quality.

    How much the metric scatters is told by models that were evaluated more than once. Each model is
    judged by its own values alone: the noise of one does not decide about another.
    """

    def __init__(self, quality: Quality, original: nn.Module) -> None:
        self.quality, self.left = quality, quality.evaluations
        started = time.perf_counter()
        self.original = tuple(self._evaluate(original, "the original model") for _ in range(2))
        self.seconds = (time.perf_counter() - started) / len(self.original)
        self._repeated = [self.original]
        if self.allowed < 0:
            raise ValueError(
                f"Quality: expected at_least to be no more than what the metric gives the original "
                f"model, {fmean(self.original):.6g}, got {quality.at_least:.6g}"
            )

    @property
    def allowed(self) -> float:
        """What may be lost of the original's mean value."""
        before, limit = fmean(self.original), self.quality.at_least
        return before - limit if limit is not None else self.quality.drop or 0.0

    def judge(self, model: nn.Module, words: str) -> Verdict:
        """Evaluate a model, again where this may tell of noise or decide whether it will do."""
        values: tuple[float, ...] = ()
        while True:
            values = (*values, self._evaluate(model, words))
            verdict = self._verdict(values)
            # Values at a ceiling scatter less: the first value below it is checked for noise, too.
            unchecked = len(self._repeated) == 1 and verdict.lost != 0 and len(values) == 1
            undecided = abs(verdict.allowed - verdict.lost) < verdict.margin
            if not (unchecked or undecided) or len(values) == _REPEATS or not self.left:
                break
        if len(values) > 1:
            self._repeated.append(values)
        return verdict

    def _verdict(self, values: tuple[float, ...]) -> Verdict:
        several = [*self._repeated, *([values] if len(values) > 1 else [])]
        freedom = sum(len(known) - 1 for known in several)
        squares = sum(variance(known) * (len(known) - 1) for known in several)
        means = 1 / len(values)
        if self.quality.at_least is None:  # the limit has the noise of the original's value
            means += 1 / len(self.original)
        margin = float(stdtrit(freedom, _ONE_ERROR)) * math.sqrt(squares / freedom * means)
        return Verdict(values, fmean(self.original) - fmean(values), margin, self.allowed)

    def _evaluate(self, model: nn.Module, words: str) -> float:
        self.left -= 1
        try:
            value: Any = self.quality.metric(copy_with(model, {}).eval())
        except Exception as error:
            raise ValueError(
                f"Quality: the metric failed on {words} with {type(error).__name__}: {error}"
            ) from error
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if not _is_finite(value):
            raise ValueError(
                f"Quality: the metric returned {value!r} for {words}; expected a finite number, "
                "the higher the better"
            )
        return float(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
