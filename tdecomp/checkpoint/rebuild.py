"""A fresh model with the chains of a plan and with the tensors of a file or a folder in them."""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tdecomp.checkpoint.tensors import is_dense
from tdecomp.decomposers.assemble import empty_chain_like
from tdecomp.decomposers.tied import tied_chains
from tdecomp.layers.chain import Chain
from tdecomp.model.fused import with_parts
from tdecomp.model.opened.base import close_unchanged
from tdecomp.model.sites import Site
from tdecomp.model.surgery import copy_with, tensors_in
from tdecomp.model.weights import spec_of
from tdecomp.plans.plan import Plan, match_sites


class Stored(NamedTuple):
    """What was read.

    Attributes
    ----------
    tensors : dict of str to Tensor
        Of the state dict, each once.
    buffers : dict of str to Tensor
        Those that are not in the state dict, for models that have them without values.
    shared : dict of str to str, or None
        The names that share the tensor of an earlier name; None if that is as in the model.
    strides : dict of str to tuple of int
        Of tensors that are not contiguous.
    """

    tensors: dict[str, Tensor]
    buffers: dict[str, Tensor]
    shared: dict[str, str] | None
    strides: dict[str, tuple[int, ...]]


def empty_chains(layers: Mapping[str, nn.Module], plan: Plan) -> dict[nn.Module, Chain]:
    """The chain, without values, for each of these layers that the plan decomposes.

    >>> from tdecomp.checkpoint.rebuild import empty_chains
    >>> plan = tdecomp.plan(nn.Sequential(nn.Linear(64, 32)), "svd", rank=8, progress=False)
    >>> layer = nn.Linear(64, 32, device="meta")
    >>> empty_chains({"0": layer}, plan)[layer][0].weight.device
    device(type='meta')

    `layers` have the names of the plan's rows; those without a row are left alone, as are rows
    without a layer. Chains have the sizes, the device and the dtype of the layers, and share
    factors where the plan says so.
    """
    chains: dict[nn.Module, Chain] = {}
    groups: dict[str, list[nn.Module]] = {}
    for row in plan:
        layer = layers.get(row.name)
        if layer is None or row.method is None or row.rank is None:
            continue
        spec = with_parts(spec_of(layer), row.names)
        if spec is None:
            raise ValueError(f"layer {row.name!r}: {type(layer).__name__} is of no known kind")
        chains[layer] = empty_chain_like(layer, spec, plan.decomposers[row.method], row.rank)
        groups.setdefault(row.tied_to or row.name, []).append(layer)
    for group in (members for members in groups.values() if len(members) > 1):
        chains |= zip(group, tied_chains([chains[layer] for layer in group]), strict=True)
    return chains


def rebuilt(plan: Plan, stored: Stored, model: nn.Module, sites: Mapping[str, Site]) -> nn.Module:
    """A copy of the model with the plan's chains and what was stored in it."""
    matched = match_sites(sites, plan)
    layers = {name: site.module for name, site in matched.items()}
    twin = copy_with(model, empty_chains(layers, plan))
    close_unchanged(twin)
    shared = _shared_in(twin, stored.tensors) if stored.shared is None else stored.shared
    stored = stored._replace(shared=shared)
    _check(stored.tensors | {key: stored.tensors[o] for key, o in shared.items()}, twin)
    same = _buffers_beside_the_same(twin)
    twin.load_state_dict(_state(stored, shared, twin), assign=True)
    for module, part, name in same:
        module._buffers[part] = twin.get_buffer(name)
    for chain in (module for module in twin.modules() if isinstance(module, Chain)):
        chain.mirror_weight()
    _fill_buffers(twin, stored.buffers)
    empty = [name for name, value in tensors_in(twin).items() if value.is_meta]
    if empty:
        raise ValueError(
            f"no values for {', '.join(empty)}, which the model has on the meta device and does "
            "not save: make it with its buffers on a real device, as in accelerate's "
            "init_empty_weights(include_buffers=False)"
        )
    return twin


def _shared_in(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of the model's tensors that are not there, with those of the same tensor."""
    held = model.state_dict(keep_vars=True)
    there = {id(value): name for name, value in held.items() if name in tensors}
    missing = {name: value for name, value in held.items() if name not in tensors}
    return {name: there[id(value)] for name, value in missing.items() if id(value) in there}


def _buffers_beside_the_same(model: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Where each buffer is that the state dict has by another name only, with that name."""
    state = model.state_dict(keep_vars=True).items()
    names = {id(value): name for name, value in state if not isinstance(value, nn.Parameter)}
    return [
        (module, part, names[id(buffer)])
        for module in model.modules() for part, buffer in module._buffers.items()
        if part in module._non_persistent_buffers_set and id(buffer) in names
    ]  # fmt: skip


def _fill_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give buffers without values, which are in no state dict, those that were stored."""
    placed: dict[int, Tensor] = {}  # one for each buffer, whatever its names
    for path, module in model.named_modules(remove_duplicate=False):
        for part, buffer in module._buffers.items():
            name = ".".join(filter(None, (path, part)))
            if buffer is not None and buffer.is_meta and name in values:
                if values[name].shape != buffer.shape:
                    shapes = f"got {tuple(values[name].shape)}, expected {tuple(buffer.shape)}"
                    raise ValueError(f"the buffer {name!r} is of another shape: {shapes}")
                module._buffers[part] = placed.setdefault(id(buffer), values[name])


def _check(tensors: Mapping[str, Tensor], rebuilt: nn.Module) -> None:
    """Raise a ValueError unless the tensors have the model's names, shapes and kinds of number."""
    expected, wrong = rebuilt.state_dict(), defaultdict[str, list[str]](list)
    for key in sorted({*expected, *tensors}):
        got, want = tensors.get(key), expected.get(key)
        if got is None or want is None:
            wrong["missing" if got is None else "unexpected"].append(key)
        elif got.shape != want.shape:
            shapes = f"got {tuple(got.shape)}, expected {tuple(want.shape)}"
            wrong["of another shape"].append(f"{key} ({shapes})")
        elif got.is_floating_point() != want.is_floating_point():
            wrong["of another kind"].append(f"{key} (got {got.dtype}, expected {want.dtype})")
    if wrong:
        found = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items())
        raise ValueError(
            "what was saved does not fit the model, expected one of the architecture it was saved "
            f"from. Tensors {found}"
        )


def _state(stored: Stored, shared: Mapping[str, str], rebuilt: nn.Module) -> dict[str, Tensor]:
    """The state dict with strides, devices and shared tensors as they were."""
    parameters = dict(rebuilt.named_parameters(remove_duplicate=False))
    current = rebuilt.state_dict()
    state: dict[str, Tensor] = {}
    for key, value in stored.tensors.items():
        device = current[key].device
        placed = value.to("cpu" if device.type == "meta" else device)
        if key in stored.strides:
            placed = _restride(key, placed, stored.strides[key])
        # One Parameter object per tensor, so that names which share it go on sharing it.
        old = parameters.get(key)
        state[key] = placed if old is None else nn.Parameter(placed, old.requires_grad)
    return state | {key: state[earlier] for key, earlier in shared.items()}


def _restride(key: str, value: Tensor, strides: tuple[int, ...]) -> Tensor:
    try:  # on no device, since strides of a damaged file may ask for any amount of memory
        fits = is_dense(torch.empty_strided(value.shape, strides, device="meta"))
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"tensor {key!r}: the file gives it strides {strides}")
    placed = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
    return placed.copy_(value)
