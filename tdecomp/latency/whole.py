"""Whole models against each other, in the mode that they are going to run in."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tdecomp.latency.setting import in_layout, layout_of
from tdecomp.latency.timing import Time, by_turns, ratio
from tdecomp.surgery import copy_with
from tdecomp.tracing import as_call, untouched

_ROUNDS = 9
_MIN_BLOCK = 0.02


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


def whole_times(
    model: nn.Module,
    example_inputs: Any,
    layouts: Sequence[str],
    *,
    compiled: bool = False,
    rounds: int = _ROUNDS,
) -> dict[str, Time]:
    """Seconds of one pass of a model in each layout; the model stays as it is."""
    seconds = _timed([(model, layout) for layout in layouts], example_inputs, compiled, rounds)
    return {layout: Time.over(column) for layout, column in zip(layouts, seconds.T, strict=True)}


def compare(
    original: nn.Module,
    changed: nn.Module,
    example_inputs: Any,
    layouts: tuple[Sequence[str], Sequence[str]],
    *,
    compiled: bool = False,
    rounds: int = _ROUNDS,
) -> Speed:
    """Time both by turns, each in its layouts, and compare the best of one with that of the other.

    Neither is changed.
    """
    runs = [(original, layout) for layout in layouts[0]]
    runs += [(changed, layout) for layout in layouts[1]]
    seconds = _timed(runs, example_inputs, compiled, rounds)
    medians = np.median(seconds, axis=0)
    before = int(np.argmin(medians[: len(layouts[0])]))
    after = len(layouts[0]) + int(np.argmin(medians[len(layouts[0]) :]))
    return Speed(
        float(medians[before]),
        runs[before][1],
        runs[after][1],
        measured=ratio(seconds, after, before),
        compiled=compiled,
    )


def measured_speed(
    original: nn.Module, changed: nn.Module, expected: Speed | None, example_inputs: Any
) -> Speed:
    """The time of a result against the original's, in the mode that its plan was made for."""
    if expected is None:
        layouts: tuple[str, ...] = (layout_of(original),)
        return compare(original, changed, example_inputs, (layouts, layouts))
    tried = expected.tried
    found = compare(original, changed, example_inputs, (tried, tried), compiled=expected.compiled)
    return replace(found, predicted=expected.predicted, budget=expected.budget, tried=tried)


def _timed(
    runs: Sequence[tuple[nn.Module, str]], example_inputs: Any, compiled: bool, rounds: int
) -> NDArray[np.float64]:
    with ExitStack() as stack:
        for model in {id(model): model for model, _ in runs}.values():
            stack.enter_context(untouched(model))
        if compiled:
            # Else torch counts these models against its limit for one piece of code, beyond which
            # it silently runs them uncompiled.
            torch.compiler.reset()
        calls = [_call(model, layout, example_inputs, compiled) for model, layout in runs]
        stack.enter_context(torch.inference_mode())
        return by_turns(calls, rounds=rounds, min_block=_MIN_BLOCK)


def _call(model: nn.Module, layout: str, example_inputs: Any, compiled: bool) -> Callable[[], Any]:
    ready = model if layout == layout_of(model) else in_layout(copy_with(model, {}), layout)
    run = torch.compile(ready) if compiled else ready
    args, kwargs = as_call(in_layout(example_inputs, layout))
    return partial(run, *args, **kwargs)
