"""What choosing ranks asks of a layer's values: told once, kept as plain data, and told again."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tdecomp.calibration.fit_cache import LayerFits
from tdecomp.decomposers.base import Decomposer
from tdecomp.layers.cost import Cost, LookupCost
from tdecomp.linalg.best_ranks import BestRanks
from tdecomp.linalg.spectrum import Spectrum
from tdecomp.loss_curves.curve import LossCurve
from tdecomp.loss_curves.losses import key_of
from tdecomp.loss_curves.measured import KnownRanks
from tdecomp.ranks.base import Option

_SPECTRA, _NESTED, _BEST = "spectra", "nested", "best ranks"


def facts_to_dict(
    values: Mapping[Hashable, Any], curves: Mapping[str, LossCurve]
) -> dict[str, Any]:
    """Plain data; numbers are as they were after a round trip through JSON.

    `values` are those of `LayerFits`; costs and fits are left out.
    """
    facts = []
    for key, value in values.items():
        _, method, _, what = _parts(key)
        if what in (_SPECTRA, _NESTED):
            facts.append([method, what, [], _plain(value)])
        elif what[0] == _BEST:
            facts.append([method, _BEST, list(what[1]), _plain(value)])
    return {
        "facts": facts,
        "curves": {name: _plain_curve(curve) for name, curve in curves.items()},
    }


def facts_from_dict(
    data: Mapping[str, Any], methods: Sequence[Decomposer]
) -> tuple[LayerFits, dict[str, LossCurve]]:
    """The inverse of `facts_to_dict`."""
    known = {method.name: method for method in methods}
    fits = LayerFits()
    for name, what, steps, plain in data["facts"]:
        asked = (what, tuple(steps)) if what == _BEST else what
        fits.learn({key_of(known[name], asked): _value(plain)})
    return fits, {n: _curve(known[n], plain) for n, plain in data["curves"].items()}


def _parts(key: Any) -> tuple[Any, str, str, Any]:
    kind, name, options, what = key
    return kind, name, options, what


def _plain(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, KnownRanks):
        best = value.best
        weighted = None if best.weighted is None else best.weighted.tolist()
        alone = [lost.tolist() for lost in best.alone]
        return {
            "ranks": best.ranks, "alone": alone, "weighted": weighted, "variance": value.variance
        }  # fmt: skip
    if isinstance(value, tuple):
        return {"spectra": [[s.squares.tolist(), s.shape] for s in value]}
    return {"lost": value}


def _value(plain: Any) -> Any:
    if plain is None:
        return None
    if "spectra" in plain:
        arrays = ((np.array(squares), tuple(shape)) for squares, shape in plain["spectra"])
        return tuple(Spectrum(squares, shape) for squares, shape in arrays)
    if "lost" in plain:
        return [tuple(pair) for pair in plain["lost"]]
    weighted = plain["weighted"]
    best = BestRanks(
        tuple(map(tuple, plain["ranks"])),
        tuple(torch.tensor(lost, dtype=torch.float64) for lost in plain["alone"]),
        None if weighted is None else torch.tensor(weighted, dtype=torch.float64),
    )
    return KnownRanks(best, plain["variance"])


def _plain_curve(curve: LossCurve) -> dict[str, Any]:
    return {
        "points": [
            [p.rank, p.cost.params, isinstance(p.cost, LookupCost), p.loss, p.error]
            for p in curve.points
        ],
        "fitted": curve.fitted,
        "note": curve.note,
    }


def _curve(method: Decomposer, plain: Mapping[str, Any]) -> LossCurve:
    points = []
    for rank, params, lookup, loss, error in plain["points"]:
        cost = LookupCost(params) if lookup else Cost(params)
        points.append(Option(_rank(rank), cost, loss, error))
    return LossCurve(method, tuple(points), tuple(map(_rank, plain["fitted"])), plain["note"])


def _rank(plain: Any) -> Any:
    return tuple(plain) if isinstance(plain, list) else plain
