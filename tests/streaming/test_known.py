"""What is known of layers comes back from plain data as it was."""

import json
from dataclasses import astuple

import pytest
from torch import nn

from tdecomp.calibration.fit_cache import KnownFits
from tdecomp.decomposers.registry import listed_methods
from tdecomp.loss_curves.curve import layer_curves
from tdecomp.loss_curves.offers import layer_losses
from tdecomp.model.sites import find_sites
from tdecomp.ranks.base import Option
from tdecomp.streaming.known import facts_from_dict, facts_to_dict


@pytest.mark.parametrize("layer", [nn.Linear(24, 36), nn.Embedding(40, 12)])
def test_facts_and_curves_come_back(layer):
    methods = listed_methods(["svd", "split-svd", "tt"] if hasattr(layer, "bias") else "svd")
    model = nn.ModuleDict({"qkv": layer})
    (losses,) = layer_losses(list(find_sites(model).values()), None)
    curves = layer_curves(losses, methods)
    for method in methods:
        losses.nested(method)
        losses.errors_of_best_ranks(method)
    losses.spectra(methods[0])
    plain = json.loads(json.dumps(facts_to_dict(losses.cache.since(0), curves)))
    fits, drawn = facts_from_dict(plain, methods)
    told = KnownFits(fits)
    for key, value in losses.cache.since(0).items():
        what = key[-1]
        if what == "spectra":
            (mine,), (its,) = told.get(key, None), value
            assert (mine.squares == its.squares).all()
            assert mine.shape == its.shape
        elif what == "nested":
            assert told.get(key, None) == value
        elif what[0] == "best ranks" and value is not None:
            mine = told.get(key, None)
            assert mine.measured == value.measured
            assert mine.share(mine.best.ranks[1]) == value.share(mine.best.ranks[1])
    for name, curve in curves.items():
        assert (drawn[name].fitted, drawn[name].note) == (curve.fitted, curve.note)
        for mine, its in zip(drawn[name].points, curve.points, strict=True):
            assert isinstance(mine, Option)
            assert astuple(mine) == astuple(its)
            assert type(mine.cost) is type(its.cost)
