"""The errors of a curve on samples that are held out."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tdecomp.decomposers.base import Decomposer
from tdecomp.loss_curves.curve import LossCurve, layer_curves
from tdecomp.loss_curves.losses import LayerLosses
from tdecomp.ranks.grid import Rounding

_PLACES = 7  # at which a curve that needs no fits is fitted
_TINY = 1e-12


def curves_on_held_out(
    losses: LayerLosses, methods: Sequence[Decomposer], rounding: Rounding
) -> dict[str, LossCurve]:
    """`layer_curves`, with errors on samples that are held out where there are some."""
    curves = layer_curves(losses, methods, rounding)
    return {name: on_held_out(curve, losses) for name, curve in curves.items()}


def on_held_out(curve: LossCurve, losses: LayerLosses) -> LossCurve:
    """The curve with the errors of its fits on held-out samples, interpolated between them.

    It is the curve itself where none are held out or the method fits to the weights.
    """
    seen, points = losses.moments, curve.points
    if seen is None or seen.held is None or not points or not losses.fits_to_data(curve.method):
        return curve
    spaced = np.linspace(0, len(points) - 1, _PLACES).round().astype(int).tolist()
    ranks = curve.fitted or [points[place].rank for place in spaced]
    known = {
        point.cost.amount: losses.expected_error(curve.method, point.rank)
        for point in points
        if point.rank in ranks
    }
    costs, errors = np.array([*known]), np.array([*known.values()], dtype=float)
    logs = np.interp(
        np.log([point.cost.amount for point in points]),
        np.log(costs),
        np.log(np.maximum(errors, _TINY)),
    )
    told = [
        replace(point, error=error)
        for point, error in zip(points, np.exp(logs).tolist(), strict=True)
    ]
    return replace(curve, points=tuple(told), fitted=tuple(ranks))
