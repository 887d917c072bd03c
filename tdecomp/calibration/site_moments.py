"""The moments of a model's layers, from moments or batches that the user gave as data."""

from collections.abc import Collection, Sequence

from torch import nn

from tdecomp.calibration.calibrate import GRADIENT_SAMPLES, calibrate_layers, watchable
from tdecomp.calibration.data import Batches
from tdecomp.calibration.moments import Moments
from tdecomp.model.sites import Site


def site_moments(
    model: nn.Module,
    sites: Sequence[Site],
    wanted: Collection[str],
    data: Batches | Moments | None,
    *,
    gradients: bool,
    variants: bool = False,
) -> Moments | None:
    """The moments of the wanted sites, taken now unless `data` are moments; None without data.

    With `gradients`, also those of the gradients at the layers' outputs. With `variants`, layers
    that see few patches also see variants of the batches.
    """
    if data is None:
        return None
    if isinstance(data, Moments):
        _check_fit(data, sites)
        return data
    layers = {s.name: s.module for s in sites if s.name in wanted and watchable(s.spec)}
    samples = GRADIENT_SAMPLES if gradients else 0
    return calibrate_layers(model, layers, data, gradient_samples=samples, variants=variants)


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
