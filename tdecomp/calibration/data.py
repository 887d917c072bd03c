"""Unlabelled data as a user hands it over: batches, or moments already taken from them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tdecomp.calibration.augment import Augment
from tdecomp.calibration.calibrate import calibrate_layers, watchable
from tdecomp.calibration.moments import Moments
from tdecomp.model.batches import Batches, Forward
from tdecomp.model.sites import Site


@dataclass(frozen=True)
class Source:
    """Unlabelled data as a user hands it over: batches, or moments already taken from them."""

    data: Any = None
    forward: Forward | None = None
    max_batches: int | None = None
    max_memory: int | None = None
    progress: bool = True
    augment: Augment | None = None

    def batches(self, wanted_by: str) -> Batches:
        """The batches, for steps that moments are not enough for."""
        if self.data is None or isinstance(self.data, Moments):
            got = "none" if self.data is None else "moments"
            raise ValueError(
                f"{wanted_by} runs the model on batches, got {got}; expected data= to be a "
                "DataLoader or a list of batches"
            )
        return Batches(self.data, wanted_by, self.forward, self.max_batches)

    def moments(
        self, model: nn.Module, sites: Sequence[Site], wanted: Collection[str], *, gradients: bool
    ) -> Moments | None:
        """Moments of the wanted sites, taken now unless they were handed over; None without data.

        Raises
        ------
        ValueError
            For moments of another model or of inputs of another size, and as `calibrate`.
        """
        if self.data is None:
            return None
        if isinstance(self.data, Moments):
            _check_fit(self.data, sites)
            return self.data
        layers = {s.name: s.module for s in sites if s.name in wanted and watchable(s.spec)}
        return calibrate_layers(
            model,
            layers,
            self.batches("data"),
            max_memory=self.max_memory,
            gradients=gradients,
            augment=self.augment,
            progress=self.progress,
        )


def _check_fit(moments: Moments, sites: Sequence[Site]) -> None:
    known = {name: site for site in sites for name in site.names}
    for name, layer in moments.items():
        site = known.get(name)
        if site is None or site.spec != layer.spec:
            found = "no such layer" if site is None else str(site.spec)
            raise ValueError(
                f"layer {name!r}: the moments are of {layer.spec}, the model has {found}; expected "
                "moments of this very model: calibrate(model, batches) takes them"
            )
        for call in site.calls or ():
            if layer.sizes and call.size not in layer.sizes:
                seen = ", ".join("×".join(map(str, size)) for size in layer.sizes[:3])
                asked = "×".join(map(str, call.size))
                raise ValueError(
                    f"layer {name!r}: the moments are of inputs of size {seen}, the example inputs "
                    f"give it {asked}; expected both to be of one size: calibrate with images as "
                    "large as example_inputs"
                )
