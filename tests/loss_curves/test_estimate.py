"""What is said of the time that a plan takes."""

import torch
from torch import nn

import tdecomp
from tdecomp.decomposers.registry import listed_methods
from tdecomp.loss_curves.estimate import expected_time, products_of_drafts
from tdecomp.loss_curves.offers import able_sites
from tdecomp.model.sites import find_sites


def offered(width):
    model = nn.Sequential(nn.Conv2d(4, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3))
    moments = tdecomp.calibrate(model, [torch.ones(4, 4, 9, 9)], progress=False)
    able, _ = able_sites(list(find_sites(model).values()), listed_methods("auto"))
    return able, moments


def test_work_grows_with_the_cube_of_the_width():
    narrow, wide = (products_of_drafts(*offered(width)) for width in (8, 16))
    assert 3 < wide / narrow < 9  # the first layer only with its square
    able, _ = offered(8)
    assert products_of_drafts(able, None) == 0


def test_only_of_long_plans_the_time_is_told():
    able, moments = offered(8)
    assert expected_time(able, moments) == ""
    assert expected_time(able * 10**6, moments).startswith("about ")
