import torch
from torch import nn

import tdecomp
from tdecomp.model.sites import find_sites
from tdecomp.plans.fit import LayerData


def test_moments_move_to_a_layers_device_when_it_is_fitted_and_not_before():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    moments = tdecomp.calibrate(model, [torch.randn(20, 8)], progress=False)
    here = LayerData.of(find_sites(model)["0"], moments)
    assert here.moments.mean is moments["0"].mean
    there = LayerData.of(find_sites(model.to("meta"))["0"], moments)
    assert there.moments.mean.device.type == "cpu"
    assert there.on_one_device().moments.mean.device.type == "meta"
