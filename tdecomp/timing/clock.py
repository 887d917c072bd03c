"""The times that a plan is made with: given, taken when they are needed, or none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tdecomp.decomposers.base import Decomposer
from tdecomp.ranks.base import RankSelector
from tdecomp.timing.measure import profile
from tdecomp.timing.profile import Profile, check_profile


@dataclass(frozen=True)
class Clock:
    """The times that a plan is to be made with, if any."""

    profile: Profile | None = None
    only_if_faster: bool = False

    def __post_init__(self) -> None:
        check_profile("profile", self.profile)

    def refuse_without(self, example_inputs: Any, selector: RankSelector) -> None:
        """Times are those of a call: refuse to look for them without inputs."""
        asked = {
            "only_if_faster=True": self.only_if_faster,
            "Budget(latency=...)": selector.latency is not None,
            "profile=...": self.profile is not None,
        }
        for name, wanted in asked.items():
            if wanted and example_inputs is None:
                raise ValueError(
                    f"{name}: times are those of one call of the model, got no example_inputs; "
                    "expected inputs of the batch size that is going to be used"
                )

    def profile_for(
        self,
        selector: RankSelector,
        model: nn.Module,
        example_inputs: Any,
        methods: Sequence[Decomposer],
        progress: bool,
    ) -> Profile | None:
        """The profile that was given, checked, a new one where one is needed, or None."""
        if self.profile is not None:
            self.profile.check(model, example_inputs)
            return self.profile
        if selector.latency is None and not self.only_if_faster:
            return None
        return profile(model, example_inputs, list(methods), progress=progress)
