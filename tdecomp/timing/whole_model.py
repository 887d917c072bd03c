"""Whole models against each other, in the mode that they are going to run in."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from tdecomp.model.example import Example, layout_of
from tdecomp.timing.speed import Speed
from tdecomp.timing.stopwatch import MODEL_ROUNDS, THIS_MACHINE, Stopwatch, ratio


def compare(
    original: nn.Module,
    changed: nn.Module,
    example: Example,
    layouts: tuple[Sequence[str], Sequence[str]],
    *,
    compiled: bool = False,
    rounds: int = MODEL_ROUNDS,
    stopwatch: Stopwatch = THIS_MACHINE,
) -> Speed:
    """Time two models, interleaved, and compare the first in its best layout with the second's.

    `layouts` are those to try of either. Neither model is changed.
    """
    runs = [(original, layout) for layout in layouts[0]]
    runs += [(changed, layout) for layout in layouts[1]]
    seconds = stopwatch.models(runs, example, compiled=compiled, rounds=rounds)
    medians = np.median(seconds, axis=0)
    before = int(np.argmin(medians[: len(layouts[0])]))
    after = len(layouts[0]) + int(np.argmin(medians[len(layouts[0]) :]))
    measured, best = ratio(seconds, after, before), (runs[before][1], runs[after][1])
    return Speed(float(medians[before]), *best, measured=measured, compiled=compiled)


def measured_speed(
    original: nn.Module,
    changed: nn.Module,
    expected: Speed | None,
    example: Example,
    stopwatch: Stopwatch = THIS_MACHINE,
) -> Speed:
    """The time of a result against the original's, in the mode that its plan was made for."""
    tried = (layout_of(original),) if expected is None else expected.tried
    compiled = expected is not None and expected.compiled
    found = compare(
        original, changed, example, (tried, tried), compiled=compiled, stopwatch=stopwatch
    )
    if expected is None:
        return found
    return replace(found, predicted=expected.predicted, budget=expected.budget, tried=tried)
