"""Whole models against each other: before any fit, with chains of random weights, and after it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from tdecomp.decomposers.assemble import empty_chain_like
from tdecomp.layers.chain import Chain
from tdecomp.model.example import Example, layout_of
from tdecomp.model.opened.scope import closed
from tdecomp.model.surgery import copy_with
from tdecomp.ranks.base import Choice
from tdecomp.timing.layout_times import LayoutTimes
from tdecomp.timing.speed import Speed
from tdecomp.timing.stopwatch import MODEL_ROUNDS, THIS_MACHINE, Stopwatch, random_weights, ratio

# Rounds of a rehearsal: at first, and once more where the ratio scatters by more than is to be
# saved. For a budget near 1, which saves little, scatter up to _LEAST_SAVING is accepted.
_ROUNDS = (9, 27)
_LEAST_SAVING = 0.05
# A layout in which the original takes up to this multiple of its best time may be its best layout
# the next time.
_NEARLY_BEST = 1.15


Timed = tuple[Example, Stopwatch]


def rehearse(times: LayoutTimes, choices: Sequence[Choice]) -> Speed:
    """The speed of the whole model with the chosen chains; a ValueError if it scatters too much."""
    profile, budget = times.profile, times.selector.latency
    seconds, best, compiled = profile.fastest, profile.best_layout, profile.setting.compiled
    chains: dict[nn.Module, Chain] = {}
    for offer, c in zip(times.offers, choices, strict=True):
        if c.candidate is not None and c.rank is not None:
            layer, spec, method = offer.site.module, offer.losses.spec, c.candidate.decomposer
            chains[layer] = empty_chain_like(layer, spec, method, c.rank)
            random_weights(chains[layer])
    if not chains:
        return Speed(seconds, best, best, 1.0, None, budget, compiled, profile.layouts)
    changed, saved = copy_with(times.model, chains), 1.0 if budget is None else 1 - budget
    rivals = [name for name, t in profile.whole.items() if t.median <= _NEARLY_BEST * seconds]
    for rounds in _ROUNDS:
        speed = compare(
            times.model, changed, times.example, (rivals, (times.layout,)),
            compiled=compiled, rounds=rounds, stopwatch=profile.stopwatch,
        )  # fmt: skip
        assert speed.measured is not None
        predicted, scatter = speed.measured.median, speed.measured.high - speed.measured.low
        if budget is None or scatter <= max(saved, _LEAST_SAVING):
            speed = replace(speed, predicted=predicted, measured=None)
            return replace(speed, budget=budget, tried=profile.layouts)
    raise ValueError(
        f"Budget(latency={budget}): from one round to the next the times scatter by {scatter:.0%} "
        f"of the original's, more than the {saved:.0%} that is to be saved, so that a choice would "
        "be made on noise; expected a quieter machine: stop what else runs, take fewer threads "
        "(torch.set_num_threads), or use Budget(macs=...)"
    )


def measured_speed(
    original: nn.Module,
    changed: nn.Module,
    expected: Speed | None,
    example: Example,
    stopwatch: Stopwatch = THIS_MACHINE,
) -> Speed:
    """The time of a result against the original's, in the mode that its plan was made for."""
    if expected is None:
        own = (layout_of(original),)
        return compare(original, changed, example, (own, own), stopwatch=stopwatch)
    tried, compiled = expected.tried, expected.compiled
    found = compare(
        original, changed, example, (tried, tried), compiled=compiled, stopwatch=stopwatch
    )
    return replace(found, predicted=expected.predicted, budget=expected.budget, tried=tried)


def fused_kernels_note(original: nn.Module, speed: Speed | None, timed: Timed | None) -> str:
    """That torch's fused kernels are off where chains are, and what the original loses by that."""
    words = "torch's fused transformer kernels are off where chains are"
    if speed is None or timed is None:
        return f"{words}; a profile tells what that costs"
    layout = layout_of(original)
    try:
        slow = copy_with(original, {})  # whose attention is open, as the original's is here
    except ValueError:
        return words
    example, stopwatch = timed
    with closed(original):
        seconds = stopwatch.models([(original, layout), (slow, layout)], example)
    return f"{words}: without them the original takes {ratio(seconds, 1, 0).median:.2f} of its time"


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
    with closed(original), closed(changed):
        seconds = stopwatch.models(runs, example, compiled=compiled, rounds=rounds)
    medians, split = np.median(seconds, axis=0), len(layouts[0])
    before, after = int(np.argmin(medians[:split])), split + int(np.argmin(medians[split:]))
    measured, best = ratio(seconds, after, before), (runs[before][1], runs[after][1])
    return Speed(float(medians[before]), *best, measured=measured, compiled=compiled)
