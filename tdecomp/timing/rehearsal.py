"""The whole model with chains that nothing was fitted to yet, timed against the original."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tdecomp.layers.chain import Chain
from tdecomp.model.surgery import copy_with
from tdecomp.timing.layers import random_weights
from tdecomp.timing.profile import Profile
from tdecomp.timing.speed import Speed
from tdecomp.timing.whole_model import compare

# Rounds of timing: first, and again where that scatters by more than is to be saved, for which
# even a budget near 1 counts as so much.
_ROUNDS = (9, 27)
_LEAST_SAVING = 0.05
# A layout in which the original takes so many times its best may be its best the next time.
_RIVAL = 1.15


@dataclass(frozen=True)
class Rehearsal:
    """Times the model with chains in some layers' place.

    Attributes
    ----------
    model : nn.Module
    example_inputs : Tensor, tuple or dict
    profile : Profile
    wanted : float or None
        The share of the original's time that is asked for.
    """

    model: nn.Module
    example_inputs: Any
    profile: Profile
    wanted: float | None

    def speed(self, chains: Mapping[nn.Module, Chain], layout: str) -> Speed:
        """The measured ratio, as what is predicted of a model with such chains.

        Raises
        ------
        ValueError
            If the ratio scatters by more than what is to be saved.
        """
        before, tried = self.profile.best_layout, self.profile.layouts
        if not chains:
            return Speed(
                self.profile.fastest,
                before,
                before,
                1.0,
                budget=self.wanted,
                compiled=self.profile.setting.compiled,
                tried=tried,
            )
        for chain in chains.values():
            random_weights(chain)
        found = self._told_from_noise(copy_with(self.model, chains), layout)
        assert found.measured is not None
        return replace(found, predicted=found.measured.median, budget=self.wanted, tried=tried)

    def _told_from_noise(self, changed: nn.Module, layout: str) -> Speed:
        scatter = 0.0
        slowest = _RIVAL * self.profile.fastest
        rivals = [name for name, time in self.profile.whole.items() if time.median <= slowest]
        for rounds in _ROUNDS:
            found = compare(
                self.model,
                changed,
                self.example_inputs,
                (rivals, (layout,)),
                compiled=self.profile.setting.compiled,
                rounds=rounds,
            )
            assert found.measured is not None
            scatter = found.measured.high - found.measured.low
            if self.wanted is None or scatter <= max(1 - self.wanted, _LEAST_SAVING):
                return found
        assert self.wanted is not None
        raise ValueError(
            f"Budget(latency={self.wanted}): from one round to the next the times scatter by "
            f"{scatter:.0%} of the original's, more than the {1 - self.wanted:.0%} that is to be "
            "saved, so that a choice would be made on noise; expected a quieter machine: stop what "
            "else runs, take fewer threads (torch.set_num_threads), or use Budget(macs=...)"
        )
