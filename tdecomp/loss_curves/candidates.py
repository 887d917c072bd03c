"""What a rank selector is offered: for a layer and a method, its ranks, costs and losses."""

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from tdecomp.calibration.moments import Moments
from tdecomp.decomposers.base import Decomposer
from tdecomp.linalg.spectrum import Spectrum
from tdecomp.loss_curves.curves import RankOptions
from tdecomp.loss_curves.layer_losses import LayerLosses, whole_loss
from tdecomp.model.sites import Site
from tdecomp.ranks.base import LARGEST_SHARE, Candidate, Option
from tdecomp.ranks.grid import ANY_RANK, Rounding
from tdecomp.torch_state import undisturbed


def rank_options(
    sites: Sequence[Site],
    methods: Sequence[Sequence[Decomposer]],
    moments: Moments | None,
    largest_share: float = LARGEST_SHARE,
    rounding: Rounding = ANY_RANK,
) -> list[RankOptions]:
    """For each site its ranks and what they lose, in one unit for all of them.

    A layer whose gradients are not known counts as much as the others do on average.
    """
    found = []
    for site in sites:
        weight, spec = site.module.weight, site.spec
        assert isinstance(weight, nn.Parameter)
        assert spec is not None
        mine = None if moments is None else moments.layers.get(site.name)
        fits: dict[Any, Any] = {}
        if moments is not None:
            fits = moments.fits.setdefault((site.name, _digest(weight)), {})
        if mine is not None:
            mine = mine.to(weight.device)
        found.append(LayerLosses(weight, spec, mine, site.calls, cache=fits))
    if any(lost.moments is not None and lost.moments.gradient is not None for lost in found):
        wholes = []
        for lost in found:
            if lost.moments is not None and lost.moments.gradient is not None:
                with undisturbed(lost.weight.device):
                    wholes.append(whole_loss(lost.weight, lost.moments) or 0.0)
        for lost in found:
            lost.unit = sum(wholes) / len(wholes)
    return [
        RankOptions(losses, able, largest_share, rounding)
        for losses, able in zip(found, methods, strict=True)
    ]


def _digest(weight: nn.Parameter) -> bytes:
    """Of the values, so that other weights never find these fits, however they came to be."""
    values = weight.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.blake2b(values.numpy().data, digest_size=16).digest()


def candidate(site: Site, decomposer: Decomposer, offers: RankOptions) -> Candidate:
    """The site and the method as a selector sees them."""
    losses, spec = offers.losses, offers.losses.spec

    def spectra() -> tuple[Spectrum, ...] | None:
        try:
            return losses.spectra(decomposer)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"layer {site.name!r} ({spec}): its singular values cannot be computed ({error}); "
                f"give it a rank of its own, or leave it alone with exclude=[{site.name!r}]"
            ) from error

    @cache
    def options() -> Sequence[Option]:
        return offers.options(decomposer)

    return Candidate(
        layer=site.name,
        method=decomposer.name,
        max_rank=decomposer.max_rank(spec),
        before=losses.before,
        cost=losses.cost(decomposer),
        spectra=spectra,
        options=options,
        aliases=site.names[1:],
        rounded=offers.rounding != ANY_RANK,
    )
