"""What choosing ranks asks of a layer's values: told once, kept as plain data, and told again."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from tdecomp.calibration.moments import FitCache
from tdecomp.decomposers.base import Decomposer
from tdecomp.layers.cost import Cost, LookupCost
from tdecomp.linalg.best_ranks import BestRanks
from tdecomp.linalg.spectrum import Spectrum
from tdecomp.loss_curves.curve import LossCurve
from tdecomp.loss_curves.losses import KnownRanks
from tdecomp.ranks.base import Option

Value = TypeVar("Value")
# A method's name, and what was asked of it.
Fact = tuple[str, str]


class UnreadError(Exception):
    """Something needs the values of a layer, which are not there."""


class Collected(FitCache):
    """A cache that also notes what was asked, but for fits, which are not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.facts: dict[Fact, Any] = {}

    def get(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        value = super().get(key, compute)
        fact = _fact(key)
        if fact is not None:
            self.facts[fact] = value
        return value


class Told(FitCache):
    """A cache that has what was told of each layer, and computes nothing but costs."""

    def __init__(self, facts: Mapping[str, Mapping[Fact, Any]]) -> None:
        super().__init__()
        self._facts = facts

    def get(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        parts: Any = key
        layer, _, method, _, what = parts
        if isinstance(what, tuple) and what[0] == "cost":
            return super().get(key, compute)
        fact = _fact(key)
        facts = self._facts.get(layer, {})
        if fact is None or fact not in facts:
            raise UnreadError(f"layer {layer!r}: {what} of {method!r}")
        value: Value = facts[fact]
        return value


def _fact(key: Any) -> Fact | None:
    """The method and what of it is known, in the key of a cache; None for costs and fits."""
    _, _, method, _, what = key
    if isinstance(what, str):
        return method, what
    if what[0] == "best ranks":
        return method, " ".join(map(str, ("best ranks", *what[1])))
    return None


# As plain data -----------------------------------------------------------------------------------


def facts_to_dict(facts: Mapping[Fact, Any], curves: Mapping[str, LossCurve]) -> dict[str, Any]:
    """Plain data; numbers are as they were after a round trip through JSON."""
    return {
        "facts": [[*fact, _plain(value)] for fact, value in facts.items()],
        "curves": {name: _plain_curve(curve) for name, curve in curves.items()},
    }


def facts_from_dict(
    data: Mapping[str, Any], methods: Sequence[Decomposer]
) -> tuple[dict[Fact, Any], dict[str, LossCurve]]:
    """The inverse of `facts_to_dict`."""
    known = {method.name: method for method in methods}
    facts = {(method, what): _value(plain) for method, what, plain in data["facts"]}
    return facts, {n: _curve(known[n], plain) for n, plain in data["curves"].items()}


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
