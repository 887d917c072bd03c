"""Whole models against each other, in the mode that they are going to run in."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tdecomp.model.surgery import copy_with
from tdecomp.model.trace import as_call
from tdecomp.timing.setting import in_layout, layout_of
from tdecomp.timing.speed import Speed
from tdecomp.timing.stopwatch import Time, by_turns, ratio
from tdecomp.torch_state import untouched

_ROUNDS = 9
_MIN_BLOCK = 0.02


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
