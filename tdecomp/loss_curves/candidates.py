"""What a rank selector is offered: for a layer and a method its ranks, costs and losses."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from tdecomp.calibration.moments import FitCache, Moments
from tdecomp.decomposers.base import Decomposer
from tdecomp.linalg.spectrum import Spectrum
from tdecomp.loss_curves.curve import LossCurve
from tdecomp.loss_curves.losses import LayerLosses, whole_loss
from tdecomp.model.sites import Site
from tdecomp.ranks.base import Candidate


def layer_losses(sites: Sequence[Site], moments: Moments | None) -> list[LayerLosses]:
    """For each site the losses of its ranks, in one unit for all sites.

    A layer whose gradients are not known counts as much as the others do on average.
    """
    cache = FitCache() if moments is None else moments.fits
    found, wholes = [], []
    for site in sites:
        weight, spec = site.module.weight, site.spec
        assert isinstance(weight, nn.Parameter)
        assert spec is not None
        seen = None if moments is None else moments.layers.get(site.name)
        key = site.name if moments is None else (site.name, _digest(weight))
        if seen is not None:
            seen = seen.to(weight.device)
            wholes.append(whole_loss(weight, seen))
        found.append(LayerLosses(weight, spec, seen, site.calls, cache=cache, key=key))
    known = [whole for whole in wholes if whole is not None]
    unit = sum(known) / len(known) if known else 1.0
    return [replace(losses, unit=unit) for losses in found]


def _digest(weight: nn.Parameter) -> bytes:
    """A hash of the values, so that other weights never find these fits."""
    values = weight.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.blake2b(values.numpy().data, digest_size=16).digest()


def candidate(
    site: Site,
    method: Decomposer,
    losses: LayerLosses,
    curves: Mapping[str, LossCurve],
    *,
    rounded: bool = False,
) -> Candidate:
    """The site and the method as selectors see them; `curves` where a selector weighs layers."""
    return Candidate(
        layer=site.name,
        method=method.name,
        max_rank=method.max_rank(losses.spec),
        before=losses.before,
        cost=partial(losses.cost, method),
        spectra=partial(_spectra, site.name, method, losses),
        options=partial(tuple, curves[method.name].points if curves else ()),
        aliases=site.names[1:],
        rounded=rounded,
        decomposer=method,
        errors=partial(losses.nested_errors, method),
        error_at=partial(losses.error_at, method),
        by_outputs=losses.fits_to_data(method),
    )


def _spectra(name: str, method: Decomposer, losses: LayerLosses) -> tuple[Spectrum, ...] | None:
    try:
        return losses.spectra(method)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"layer {name!r} ({losses.spec}): its singular values cannot be computed ({error}); "
            f"give it a rank of its own, or leave it alone with exclude=[{name!r}]"
        ) from error
