"""Whether a plan is made with measured times, and with which profile."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from tdecomp.decomposers.base import Decomposer
from tdecomp.model.example import Example
from tdecomp.model.sites import Site
from tdecomp.ranks.base import RankSelector
from tdecomp.timing.measure import check_profile, measure
from tdecomp.timing.profile import Profile


@dataclass(frozen=True)
class TimingOptions:
    """What the user says of times: a profile, and whether each chain has to be faster."""

    profile: Profile | None = None
    only_if_faster: bool = False

    def __post_init__(self) -> None:
        check_profile("profile", self.profile)

    def check_example(self, example: Example | None, selector: RankSelector) -> None:
        """Raise a ValueError if times are asked for and there is no call of the model to time."""
        asked = {
            "only_if_faster=True": self.only_if_faster,
            "Budget(latency=...)": selector.latency is not None,
            "profile=...": self.profile is not None,
        }
        for name, wanted in asked.items():
            if wanted and example is None:
                raise ValueError(
                    f"{name}: times are those of one call of the model, got no example_inputs; "
                    "expected inputs of the batch size that is going to be used"
                )

    def profile_for(
        self,
        selector: RankSelector,
        model: nn.Module,
        example: Example | None,
        sites: Sequence[Site],
        decomposers: Sequence[Decomposer],
        progress: bool,
    ) -> Profile | None:
        """The given profile, checked; a new one if one is needed; None without measured times."""
        if example is None:
            return None
        if self.profile is not None:
            self.profile.check(model, example)
            return self.profile
        if selector.latency is None and not self.only_if_faster:
            return None
        return measure(model, example, sites, decomposers, progress=progress)
