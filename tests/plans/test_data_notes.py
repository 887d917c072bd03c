"""What the summaries of plans and reports say of the data."""

import re

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import Plan

QUIET = {"progress": False}
WEIGHTS = "errors are of weights"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20)).eval()


def inputs(count):
    return torch.randn(count, 40, generator=torch.Generator().manual_seed(0))


def summaries(model, rank, **options):
    result = tdecomp.decompose(model, "svd", rank=rank, **QUIET, **options)
    plan = tdecomp.plan(model, "svd", rank=rank, **QUIET, **options)
    return result.report.summary(), plan.summary(), Plan.from_json(plan.to_json()).summary()


def test_fits_to_weights_are_told_where_they_lose_anything(model):
    assert all(WEIGHTS in summary for summary in summaries(model, 5))
    assert not any(WEIGHTS in summary for summary in summaries(model, 5, data=inputs(500)))
    with torch.no_grad():  # a layer that has this rank anyway
        model[0].weight[:, 4:] = 0
    assert not any(WEIGHTS in summary for summary in summaries(model, {"0": 4}))


def test_layers_of_which_next_to_nothing_is_left_are_named(model):
    words = r"[12] of 2 layers lose over 90% of their {} \('0'.*\): take larger ranks"
    for summary in summaries(model, 1):
        assert re.search(words.format("weights"), summary)
    for summary in summaries(model, 1, data=inputs(500)):
        assert re.search(words.format("output"), summary)
    assert not any("lose over" in summary for summary in summaries(model, 15))


def test_too_little_data_is_told_with_how_much_would_do(model):
    words = "too little data for 2 of 2 layers, least for '0': 40 inputs of 40 entries; 4 times"
    assert all(words in summary for summary in summaries(model, 5, data=inputs(50)))
    words = "too little data for 1 of 2 layers, least for '0': 128 inputs"
    assert all(words in summary for summary in summaries(model, 5, data=inputs(160)))
    assert not any("too little" in summary for summary in summaries(model, 5, data=inputs(200)))


def test_a_plan_keeps_them_when_it_is_edited(model):
    plan = tdecomp.plan(model, "svd", rank=5, data=inputs(50), **QUIET).edit("0", rank=3)
    assert "too little data" in plan.summary()
    assert plan.to_dict()["notes"] == list(plan.notes)
