"""What a row plans, carried out: the fit, the row with its errors, and the chain."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from tdecomp.calibration.calibrate import unwatched
from tdecomp.calibration.moments import LayerMoments, Moments
from tdecomp.decomposers.assemble import assemble
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.fit_layer import FittedLayer, fit_layer, measured
from tdecomp.decomposers.tied import factors_as, tied_chains
from tdecomp.layers.chain import Chain
from tdecomp.model.sites import Site
from tdecomp.plans.row import Row


def fit_rows(
    sites: Sequence[Site],
    rows: Sequence[Row],
    method: Decomposer,
    moments: Moments | None,
    known: FittedLayer | None = None,
    draft: FittedLayer | None = None,
) -> list[tuple[Row, Chain]]:
    """`fit_row` for layers that share their factors: the first is fitted, the others follow."""
    fitted = known or _fit(sites[0], rows[0], method, moments, draft)
    found = [fit_row(sites[0], rows[0], method, moments, fitted)]
    for site, row in zip(sites[1:], rows[1:], strict=True):
        weight, spec = site.module.weight, site.spec
        assert isinstance(weight, nn.Parameter)
        assert spec is not None
        seen = _seen(site, moments)
        factors = factors_as(fitted.factors, weight, spec, method, seen)
        follows = measured(weight, spec, method, factors, seen)
        found.append(fit_row(site, row, method, moments, follows))
    if len(found) == 1:
        return found
    words = f"fitted as {rows[0].name!r}, which has the same weight"
    noted = [row if row.tied_to or row is found[0][0] else _noted(row, words) for row, _ in found]
    return list(zip(noted, tied_chains([chain for _, chain in found]), strict=True))


def _noted(row: Row, words: str) -> Row:
    return replace(row, note="; ".join(filter(None, (row.note, words))))


def _seen(site: Site, moments: Moments | None) -> LayerMoments | None:
    """What is known of the layer's inputs, on its device."""
    seen = None if moments is None else moments.layers.get(site.name)
    weight = site.module.get_parameter("weight")
    return None if seen is None else seen.to(weight.device)


def fit_row(
    site: Site,
    row: Row,
    method: Decomposer,
    moments: Moments | None,
    known: FittedLayer | None = None,
    draft: FittedLayer | None = None,
) -> tuple[Row, Chain]:
    """The row with its errors and the time the fit took, and the chain for the layer."""
    weight, spec, rank = site.module.weight, site.spec, row.rank
    assert isinstance(weight, nn.Parameter)
    assert spec is not None
    assert rank is not None
    seen = _seen(site, moments)
    fitted = known or _fit(site, row, method, moments, draft)
    notes = [row.note, *fitted.notes]
    if moments is not None and seen is None:
        notes.append(f"fitted by its weights: {unwatched(spec) or 'no batch reached it'}")
    row = replace(
        row,
        weight_error=fitted.weight_error,
        note="; ".join(note for note in notes if note) or None,
        fit_seconds=fitted.seconds,
        component_norms=fitted.component_norms,
    )
    if estimate := fitted.held_out_error(weight, seen):
        row = replace(
            row,
            output_error=estimate.value,
            output_error_se=estimate.se,
            output_error_margin=estimate.margin,
        )
    return row, assemble(site.module, method, rank, fitted.factors, fitted.shift)


def _fit(
    site: Site, row: Row, method: Decomposer, moments: Moments | None, draft: FittedLayer | None
) -> FittedLayer:
    weight, spec, rank = site.module.weight, site.spec, row.rank
    assert isinstance(weight, nn.Parameter)
    assert spec is not None
    assert rank is not None
    start = None if draft is None else draft.factors
    try:
        return fit_layer(weight, spec, method, rank, _seen(site, moments), start)
    except Exception as error:
        raise ValueError(
            f"layer {row.name!r} ({spec}): {row.method} at rank {rank} failed with "
            f"{type(error).__name__}: {error}. Leave the layer alone with "
            f"exclude=[{row.name!r}], or choose another method or rank for it"
        ) from error
