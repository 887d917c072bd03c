"""What each layer loses at each rank, as a table, as plain data and as a picture."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from tdecomp.calibration.calibrate import site_moments
from tdecomp.calibration.moments import Moments
from tdecomp.calibration.passes import Batches
from tdecomp.decomposers.base import Decomposer
from tdecomp.layers.cost import Cost
from tdecomp.layers.spec import LayerSpec
from tdecomp.loss_curves.columns import filled_columns
from tdecomp.loss_curves.curve import LossCurve
from tdecomp.loss_curves.offers import Offer, able_sites, check_weights, offer_ranks
from tdecomp.model.example import Example
from tdecomp.model.filters import Filters
from tdecomp.model.sites import Site, find_sites
from tdecomp.pictures.style import largest, needs_matplotlib
from tdecomp.ranks.base import Choice, Option
from tdecomp.runtime.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The shares of a layer's cost at which the table shows what is lost.
_SHOWN = (0.75, 0.5, 0.25, 0.1)
_DRAWN = 24  # layers


@dataclass(frozen=True)
class LayerSensitivity(Mapping[str, LossCurve]):
    """What one layer loses: the curve of each method, by the method's name."""

    name: str
    layer: LayerSpec | None
    before: Cost
    curves: dict[str, LossCurve]
    of_outputs: bool = False  # errors are shares of the output's variance, not of the weight
    reason: str | None = None  # why there are no curves

    def __getitem__(self, method: str) -> LossCurve:
        if method not in self.curves:
            known = ", ".join(map(repr, self.curves)) or "none"
            raise KeyError(f"layer {self.name!r} has no curve of {method!r}; it has {known}")
        return self.curves[method]

    def __iter__(self) -> Iterator[str]:
        return iter(self.curves)

    def __len__(self) -> int:
        return len(self.curves)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the points of every method."""
        return {
            "layer": None if self.layer is None else self.layer.to_dict(),
            "before": {"params": self.before.params, "macs": self.before.macs},
            "error_of": "output" if self.of_outputs else "weight",
            "reason": self.reason,
            "methods": {
                name: {"note": curve.note, "points": [_plain(curve, p) for p in curve.points]}
                for name, curve in self.curves.items()
            },
        }


class Sensitivity(Mapping[str, LayerSensitivity]):
    """What each layer loses at each rank, by each method; `tdecomp.sensitivity` makes it.

    >>> model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    >>> table = tdecomp.sensitivity(model, "dense", progress=False)
    >>> point = table["2"]["lowrank"].points[-1]
    >>> point.rank, point.cost.params, 0 < point.error < 1
    (14, 2256, True)

    Attributes
    ----------
    layers : tuple of LayerSensitivity
        Each a mapping from a method's name to its `LossCurve`.
    """

    def __init__(self, layers: Sequence[LayerSensitivity]) -> None:
        self.layers = tuple(layers)
        self._by_name = {layer.name: layer for layer in layers}

    def __getitem__(self, name: str) -> LayerSensitivity:
        if name not in self._by_name:
            raise KeyError(f"no layer is named {name!r}")
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, by the layers' names: ranks, costs, losses and errors."""
        return {layer.name: layer.to_dict() for layer in self.layers}

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        return f"{self._render('simple')}\n{self._legend()}"

    def _repr_html_(self) -> str:
        return f"{self._render('html')}<p>{self._legend()}</p>"

    def __repr__(self) -> str:
        return f"<Sensitivity: {sum(map(bool, self.layers))} of {len(self)} layers have curves>"

    def _render(self, style: str) -> str:
        body = [line for layer in self.layers for line in _lines(layer)]
        shares = [f"at {share:.0%}" for share in _SHOWN]
        headers = ["layer", "", "method", *shares, "notes"]
        return filled_columns(headers, body, right=shares, style=style)

    def _legend(self) -> str:
        outputs = any(layer.of_outputs for layer in self.layers)
        error = "share of the output's variance" if outputs else "relative error of the weight"
        units = dict.fromkeys(layer.before.unit for layer in self.layers if layer)
        unit = ", or of a lookup's ".join(units) or "parameters"
        return f"{error} lost at that share of the layer's {unit} (rank in brackets)"

    def plot(self) -> "Figure":
        """One panel for each layer: the error of each method against its share of the cost.

        Of many layers, those of the largest cost have one. Markers stand where it was computed.

        Returns
        -------
        matplotlib.figure.Figure
            One panel for each layer that is drawn.

        Raises
        ------
        ImportError
            Without matplotlib, which the extra ``plot`` installs.
        """
        with needs_matplotlib("plot()"):
            from tdecomp.pictures.curves import small_multiples
        able = [layer for layer in self.layers if any(c.points for c in layer.values())]
        drawn = largest(able, lambda layer: layer.before.amount, _DRAWN)
        panels = {
            layer.name or "(model)": {
                method: _series(layer.before, curve)
                for method, curve in layer.items()
                if curve.points
            }
            for layer in drawn
        }
        unit = drawn[0].before.unit if drawn else "cost"
        errors = "output error" if any(layer.of_outputs for layer in drawn) else "weight error"
        share = f"share of the layer's {unit}"
        if len(drawn) < len(able):
            share += f" (the {len(drawn)} largest of {len(able)} layers)"
        return small_multiples(panels, x_label=share, y_label=errors)


def measure_sensitivity(
    model: nn.Module,
    methods: Sequence[Decomposer],
    filters: Filters,
    example: Example | None,
    data: Batches | Moments | None,
    *,
    progress: Progress,
    executor: Executor | None = None,
) -> Sensitivity:
    """Find the layers and draw the curve of every method."""
    sites = list(find_sites(model, filters, example).values())
    able, left_alone = able_sites(sites, methods)
    check_weights(able)
    wanted = {site.name for site, _ in able}
    moments = site_moments(model, sites, wanted, data, gradients=True)
    offers = offer_ranks(
        able, moments, curves=True, held_out=True, progress=progress, executor=executor
    )
    return sensitivity_of(sites, offers, left_alone)


def sensitivity_of(
    sites: Sequence[Site], offers: Sequence[Offer], left_alone: Mapping[str, Choice]
) -> Sensitivity:
    """The table of all layers, from what is offered to those that may be decomposed."""
    by_name = {offer.site.name: offer for offer in offers}
    layers = []
    for site in sites:
        offer = by_name.get(site.name)
        if offer is None:
            others = [name for name in site.tied if name in by_name]
            known = left_alone.get(site.name)
            reason = known.reason if known else f"shares its factors with {others[0]!r}"
            layers.append(LayerSensitivity(site.name, site.spec, Cost(0), {}, reason=reason))
        else:
            before, of_outputs = offer.losses.before, offer.losses.moments is not None
            layers.append(LayerSensitivity(site.name, site.spec, before, offer.curves, of_outputs))
    return Sensitivity(layers)


def _series(before: Cost, curve: LossCurve) -> tuple[list[float], list[float], list[bool]]:
    shares = [point.cost.amount / before.amount for point in curve.points]
    computed = [not curve.fitted or point.rank in curve.fitted for point in curve.points]
    return shares, [point.error for point in curve.points], computed


def _plain(curve: LossCurve, point: Option) -> dict[str, Any]:
    return {
        "rank": list(point.rank) if isinstance(point.rank, tuple) else point.rank,
        "params": point.cost.params,
        "macs": point.cost.macs,
        "loss": point.loss,
        "error": point.error,
        "interpolated": bool(curve.fitted) and point.rank not in curve.fitted,
    }


def _lines(layer: LayerSensitivity) -> list[list[str]]:
    title = [layer.name or "(model)", "" if layer.layer is None else str(layer.layer)]
    if not layer:
        return [[*title, "—", *[""] * len(_SHOWN), layer.reason or ""]]
    lines = []
    for name, curve in layer.items():
        cells = []
        for share in _SHOWN:
            limit = share * layer.before.amount
            within = [point for point in curve.points if point.cost.amount <= limit]
            cells.append(f"{within[-1].error:.4f} ({within[-1].rank})" if within else "")
        lines.append([*title, name, *cells, curve.note or ""])
        title = ["", ""]
    return lines
