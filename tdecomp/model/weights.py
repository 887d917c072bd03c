"""Checks of a layer's weights before they are factorized."""

import math

import torch
from torch import nn

from tdecomp.model.sites import Site


def check_weight(site: Site) -> None:
    """Refuse weights that cannot be factorized."""
    for name, parameter in site.module.named_parameters(recurse=False):
        if parameter.is_meta:
            raise ValueError(
                f"layer {site.name!r} ({site.spec}): its {name} is on the meta device and has no "
                "values; load the weights first (model.to_empty(device=...), load_state_dict)"
            )
        if math.isfinite(float(parameter.detach().sum())):
            continue  # one NaN or infinity would make the sum so, too, and a sum is fast
        bad = int((~torch.isfinite(parameter)).sum())
        if bad:
            raise ValueError(
                f"layer {site.name!r} ({site.spec}): {bad} of {parameter.numel()} entries of its "
                f"{name} are NaN or infinite; expected finite values. Mend the weights or leave "
                f"the layer alone with exclude=[{site.name!r}]"
            )


def is_uninitialized(parameter: nn.Parameter) -> bool:
    """Whether its size is not known yet."""
    return isinstance(parameter, nn.parameter.UninitializedParameter)
