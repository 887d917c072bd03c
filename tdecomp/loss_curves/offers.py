"""The ranks that each layer is offered, with their costs and losses."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from tdecomp.calibration.fit_cache import FitCache
from tdecomp.calibration.moments import Moments
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.fit_layer import FittedLayer
from tdecomp.layers.chain import Rank
from tdecomp.linalg.spectrum import Spectrum
from tdecomp.loss_curves.curve import LossCurve, layer_curves
from tdecomp.loss_curves.held_out import curves_on_held_out
from tdecomp.loss_curves.losses import LayerLosses, whole_loss
from tdecomp.loss_curves.query import Query, answers
from tdecomp.model.sites import Site, check_weight
from tdecomp.model.ties import leader
from tdecomp.ranks.base import Candidate, Choice
from tdecomp.ranks.grid import ANY_RANK, Rounding
from tdecomp.runtime.progress import SILENT, Progress

# A site that may be decomposed, with the methods that can.
Able = tuple[Site, Sequence[Decomposer]]


@dataclass(frozen=True)
class Offer:
    """A layer that may be decomposed, and the ranks that it is offered."""

    site: Site
    methods: Sequence[Decomposer]  # those that can take it
    losses: LayerLosses
    candidates: Sequence[Candidate]  # one for each method
    curves: dict[str, LossCurve]  # by the method's name; empty where nobody asked for them


def able_sites(
    sites: Sequence[Site],
    methods: Sequence[Decomposer],
    wants_lookup: Callable[[Sequence[str]], bool] = lambda _: True,
) -> tuple[list[Able], dict[str, Choice]]:
    """The sites that may be decomposed, with the methods that can; for the others the reason.

    Of layers that share their factors, the one that they are fitted as stands for all; lookups
    without an output layer are there if they are wanted, by their names.
    """
    able: list[Able] = []
    left_alone: dict[str, Choice] = {}
    known = {site.name: site for site in sites}
    for site in sites:
        if site.reason is not None or site.spec is None:
            left_alone[site.name] = Choice(reason=site.reason)
            continue
        group = [known[name] for name in site.tied] or [site]
        specs = [member.spec for member in group if member.spec is not None]
        refusals = ["; ".join(filter(None, map(m.refuses, specs))) for m in methods]
        taking = [method for method, why in zip(methods, refusals, strict=True) if not why]
        lookups = all(spec.lookup for spec in specs)
        if lookups and not wants_lookup([name for member in group for name in member.names]):
            left_alone[site.name] = Choice(reason=_NO_MACS)
        elif not taking:
            left_alone[site.name] = Choice(reason="; ".join(why for why in refusals if why))
        elif site is group[leader(specs)]:
            able.append((replace(site, group=tuple(group)) if site.tied else site, taking))
    return able, left_alone


def check_weights(able: Sequence[Able]) -> None:
    """Refuse weights that cannot be factorized."""
    for site, _ in able:
        check_weight(site)


_NO_MACS = (
    "a lookup has no MACs: offered for parameters, by Ratio(..., of='params') or "
    "Budget(params=...), or by its name"
)


def offer_ranks(
    able: Sequence[Able],
    moments: Moments | None,
    *,
    curves: bool,
    rounding: Rounding = ANY_RANK,
    held_out: bool = False,
    progress: Progress = SILENT,
    words: str = "",
    executor: Executor | None = None,
) -> list[Offer]:
    """For each layer its candidates; with `curves` the losses along their ranks, side by side.

    With `held_out` the errors of curves are those on samples that are held out, if there are any.
    """
    losses = layer_losses(
        [site for site, _ in able], moments, in_unit=curves and _needs_unit(able, moments)
    )
    drawn: list[dict[str, LossCurve]] = [{}] * len(able)
    if curves:
        drawing = curves_on_held_out if held_out else layer_curves
        queries = [
            Query(site.name, mine, partial(drawing, methods=methods, rounding=rounding))
            for (site, methods), mine in zip(able, losses, strict=True)
        ]
        sizes = sum(query.losses.work for query in queries)
        with progress.step("plan", len(queries), "layers", work=sizes, words=words) as step:
            drawn = answers(queries, step, executor)
    return offers_of(able, losses, drawn, rounded=rounding != ANY_RANK)


def offers_of(
    able: Sequence[Able],
    losses: Sequence[LayerLosses],
    drawn: Sequence[dict[str, LossCurve]],
    *,
    rounded: bool = False,
) -> list[Offer]:
    """For each layer its candidates, with the curves that were drawn of it."""
    offers = []
    for (site, methods), mine, found in zip(able, losses, drawn, strict=True):
        layer = OfferedLayer.of(site, rounded=rounded)
        candidates = [candidate(layer, m, mine, found) for m in methods]
        offers.append(Offer(site, methods, mine, candidates, found))
    return offers


def _needs_unit(able: Sequence[Able], moments: Moments | None) -> bool:
    """Whether some losses are weighted by gradients and others, to be compared with them, not."""
    if moments is None:
        return False
    known = [moments.layers.get(site.name) for site, _ in able]
    weighted = [seen is not None and seen.gradient is not None for seen in known]
    by_data = all(method.uses_moments for _, methods in able for method in methods)
    return any(weighted) and not (all(weighted) and by_data)


def layer_losses(
    sites: Sequence[Site], moments: Moments | None, *, in_unit: bool = True
) -> list[LayerLosses]:
    """For each site the losses of its ranks; with `in_unit` in one unit for all sites.

    A layer whose gradients are not known then counts as much as the others do on average.
    """
    cache = FitCache() if moments is None else moments.fits
    found, wholes = [], []
    for site in sites:
        weight, spec = site.module.weight, site.spec
        assert isinstance(weight, nn.Parameter)
        assert spec is not None
        seen = None if moments is None else moments.layers.get(site.name)
        known = cache.of(site.name if moments is None else (site.name, _digest(weight)))
        if seen is not None:
            seen = seen.to(weight.device)
            wholes.append(whole_loss(weight, seen) if in_unit else None)
        members = [(mine.spec, mine.calls) for mine in site.group if mine.spec is not None]
        found.append(LayerLosses(
            weight.detach(), spec, seen, site.calls, cache=known, group=tuple(members)
        ))  # fmt: skip
    weighed = [whole for whole in wholes if whole is not None]
    unit = sum(weighed) / len(weighed) if weighed else 1.0
    return [replace(losses, unit=unit) for losses in found]


def fits_before(
    site: Site, method: Decomposer, rank: Rank, moments: Moments | None
) -> tuple[FittedLayer | None, FittedLayer | None]:
    """The fit of a site, and the draft, that these moments were used for before."""
    weight, spec = site.module.weight, site.spec
    if moments is None or spec is None or not isinstance(weight, nn.Parameter):
        return None, None
    known = moments.fits.of((site.name, _digest(weight)))
    losses = LayerLosses(weight.detach(), spec, cache=known)
    found = partial(losses.known_fit, method, rank)
    return found(draft=False), found(draft=True)


def _digest(weight: nn.Parameter) -> bytes:
    """A hash of the values, so that other weights never find these fits."""
    values = weight.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.blake2b(values.numpy().data, digest_size=16).digest()


@dataclass(frozen=True)
class OfferedLayer:
    """What candidates say of a layer, besides what it loses."""

    name: str
    aliases: tuple[str, ...]
    rounded: bool  # whether ranks are multiples that the hardware runs efficiently

    @classmethod
    def of(cls, site: Site, *, rounded: bool) -> "OfferedLayer":
        others = (n for s in site.group if s.name != site.name for n in s.names)
        return cls(site.name, (*site.names[1:], *others), rounded)


def candidate(
    layer: OfferedLayer,
    method: Decomposer,
    losses: LayerLosses,
    curves: Mapping[str, LossCurve],
) -> Candidate:
    """The layer and the method as selectors see them; `curves` where a selector weighs layers."""
    return Candidate(
        layer=layer.name,
        method=method.name,
        max_rank=method.max_rank(losses.spec),
        before=losses.before,
        cost=partial(losses.cost, method),
        spectra=partial(_spectra, layer.name, method, losses),
        options=partial(tuple, curves[method.name].points if curves else ()),
        aliases=layer.aliases,
        rounded=layer.rounded,
        decomposer=method,
        errors=partial(losses.nested_errors, method),
        error_at=partial(losses.error_at, method),
        best_ranks=partial(losses.errors_of_best_ranks, method),
        expected=partial(losses.expected_error, method),
        by_outputs=losses.fits_to_data(method),
        saves_work=partial(losses.saves_work, method),
    )


def _spectra(name: str, method: Decomposer, losses: LayerLosses) -> tuple[Spectrum, ...] | None:
    try:
        return losses.spectra(method)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"layer {name!r} ({losses.spec}): its singular values cannot be computed ({error}); "
            f"give it a rank of its own, or leave it alone with exclude=[{name!r}]"
        ) from error
