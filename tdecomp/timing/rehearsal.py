"""The whole model with chains of random weights, timed against the original before any fit."""

from collections.abc import Sequence
from dataclasses import replace

from tdecomp.decomposers.assemble import empty_chain_like
from tdecomp.model.surgery import copy_with
from tdecomp.ranks.base import Choice
from tdecomp.timing.layout_times import LayoutTimes, spec_of
from tdecomp.timing.speed import Speed
from tdecomp.timing.stopwatch import random_weights
from tdecomp.timing.whole_model import compare

# Rounds of timing: at first, and once more where the ratio scatters by more than is to be saved.
# For a budget near 1, which saves little, scatter up to _LEAST_SAVING is accepted.
_ROUNDS = (9, 27)
_LEAST_SAVING = 0.05
# A layout in which the original takes up to this multiple of its best time may be its best layout
# the next time.
_NEARLY_BEST = 1.15


def rehearse(times: LayoutTimes, choices: Sequence[Choice]) -> Speed:
    """The speed of the whole model with the chosen chains; a ValueError if it scatters too much."""
    profile = times.profile
    budget, compiled, tried = times.selector.latency, profile.setting.compiled, profile.layouts
    chains = {
        s.module: empty_chain_like(s.module, spec_of(s), choice.candidate.decomposer, choice.rank)
        for s, choice in zip(times.sites, choices, strict=True)
        if choice.candidate is not None and choice.rank is not None
    }
    if not chains:
        seconds, best = profile.fastest, profile.best_layout
        return Speed(seconds, best, best, 1.0, budget=budget, compiled=compiled, tried=tried)
    for chain in chains.values():
        random_weights(chain)
    changed = copy_with(times.model, chains)
    slowest = _NEARLY_BEST * profile.fastest
    rivals = [name for name, time in profile.whole.items() if time.median <= slowest]
    scatter, saved = 0.0, 1.0 if budget is None else 1 - budget
    for rounds in _ROUNDS:
        speed = compare(
            times.model, changed, times.example, (rivals, (times.layout,)),
            compiled=compiled, rounds=rounds, stopwatch=profile.stopwatch,
        )  # fmt: skip
        ratio = speed.measured
        assert ratio is not None
        scatter = ratio.high - ratio.low
        if budget is None or scatter <= max(saved, _LEAST_SAVING):
            return replace(speed, predicted=ratio.median, measured=None, budget=budget, tried=tried)
    raise ValueError(
        f"Budget(latency={budget}): from one round to the next the times scatter by {scatter:.0%} "
        f"of the original's, more than the {saved:.0%} that is to be saved, so that a choice would "
        "be made on noise; expected a quieter machine: stop what else runs, take fewer threads "
        "(torch.set_num_threads), or use Budget(macs=...)"
    )
