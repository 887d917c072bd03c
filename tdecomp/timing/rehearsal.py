"""The whole model with chains of random weights, timed against the original before any fit."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from tdecomp.layers.chain import Chain
from tdecomp.model.example import Example
from tdecomp.model.surgery import copy_with
from tdecomp.timing.profile import Profile
from tdecomp.timing.speed import Speed
from tdecomp.timing.stopwatch import random_weights
from tdecomp.timing.whole_model import compare

# Rounds of timing: at first, and once more where the ratio scatters by more than is to be saved.
# A budget near 1 asks for so little that this much scatter is accepted in any case.
_ROUNDS = (9, 27)
_LEAST_SAVING = 0.05
# A layout in which the original takes up to this multiple of its best time may be its best layout
# the next time.
_NEARLY_BEST = 1.15


def rehearse(
    model: nn.Module,
    example: Example,
    profile: Profile,
    chains: Mapping[nn.Module, Chain],
    layout: str,
    budget: float | None,
) -> Speed:
    """The predicted speed of a model with these chains, which get random weights.

    Raises
    ------
    ValueError
        If the ratio scatters by more than what is to be saved.
    """
    best, compiled = profile.best_layout, profile.setting.compiled
    if not chains:
        seconds, tried = profile.fastest, profile.layouts
        return Speed(seconds, best, best, 1.0, budget=budget, compiled=compiled, tried=tried)
    for chain in chains.values():
        random_weights(chain)
    changed = copy_with(model, chains)
    slowest = _NEARLY_BEST * profile.fastest
    rivals = [name for name, time in profile.whole.items() if time.median <= slowest]
    scatter, saved = 0.0, 1.0 if budget is None else 1 - budget
    for rounds in _ROUNDS:
        speed = compare(
            model,
            changed,
            example,
            (rivals, (layout,)),
            compiled=compiled,
            rounds=rounds,
            stopwatch=profile.stopwatch,
        )
        assert speed.measured is not None
        found = replace(speed, predicted=speed.measured.median, measured=None)
        scatter = speed.measured.high - speed.measured.low
        if budget is None or scatter <= max(saved, _LEAST_SAVING):
            return replace(found, budget=budget, tried=profile.layouts)
    raise ValueError(
        f"Budget(latency={budget}): from one round to the next the times scatter by {scatter:.0%} "
        f"of the original's, more than the {saved:.0%} that is to be saved, so that a choice would "
        "be made on noise; expected a quieter machine: stop what else runs, take fewer threads "
        "(torch.set_num_threads), or use Budget(macs=...)"
    )
