"""A decomposed model in one safetensors file.

The file holds the state dict, and the buffers that are not in it; its metadata, as JSON under the
key ``tdecomp``, holds the plan and what safetensors does not: the strides of tensors that are not
contiguous, and which names share one tensor. Nothing is unpickled and no code from the file is run.
"""

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tdecomp._distribution import VERSION
from tdecomp.checkpoint.checks import refuse_changed
from tdecomp.checkpoint.rebuild import Stored
from tdecomp.checkpoint.standing import plan_of
from tdecomp.checkpoint.tensors import alone, buffers_beside, refuse_odd, strides_of
from tdecomp.files.tensors import read_tensors, write_tensors
from tdecomp.files.typed import typed
from tdecomp.plans.plan import Plan
from tdecomp.plans.table import FORMAT

_KEY = "tdecomp"


def save(file: str | os.PathLike[str], model: nn.Module, plan: Plan) -> None:
    """Write a decomposed model's weights and its plan; a crash leaves an older file as it was."""
    plan = plan_of(model, plan)
    refuse_changed(model, plan)
    state = model.state_dict()
    refuse_odd(state)
    shared = _shared(state)
    strides = strides_of(state)
    buffers = buffers_beside(model, state)
    header = {"format": FORMAT, "version": VERSION, "plan": plan.to_dict()}
    header |= {"shared": shared, "strides": strides, "buffers": [*buffers]}
    stored = {key: value for key, value in state.items() if key not in shared}
    write_tensors(file, _KEY, header, alone(stored | buffers))


def read(file: str | os.PathLike[str]) -> tuple[Plan, Stored]:
    """What `save` wrote; a ValueError for any other file."""
    header, tensors = read_tensors(file, _KEY, "decomposition", FORMAT)
    names = typed(tuple[str, ...], header.get("buffers", ()), "buffers")  # files of 0.2 have none
    if lost := [name for name in names if name not in tensors]:
        raise ValueError(f"damaged: these buffers are missing: {', '.join(lost)}")
    buffers = {name: tensors.pop(name) for name in names}
    shared = typed(dict[str, str], header.get("shared"), "shared")
    # No tensor is stored twice, and none shares what is not stored.
    alien = {k: other for k, other in shared.items() if k in tensors or other not in tensors}
    if alien:
        raise ValueError(f"damaged: these tensors cannot share those: {alien}")
    strides = typed(dict[str, tuple[int, ...]], header.get("strides"), "strides")
    plan = Plan.from_dict(typed(dict[str, Any], header.get("plan"), "plan"))
    return plan, Stored(tensors, buffers, shared, strides)


def _shared(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of tensors that an earlier name holds as well, each with that name."""
    first: dict[Any, str] = {}
    earlier: dict[str, str] = {}
    for key, value in state.items():
        place = (value.data_ptr(), value.device, value.dtype, value.shape, value.stride())
        earlier[key] = first.setdefault(place, key) if value.numel() else key
    return {key: name for key, name in earlier.items() if name != key}
