"""A decomposed model in one safetensors file, and back into a fresh model.

The file holds the state dict; its metadata, as JSON under the key ``tdecomp``, holds the plan and
what safetensors does not: the strides of tensors that are not contiguous, and which names share
one tensor. Nothing is unpickled and no code from the file is run.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdecomp._distribution import VERSION
from tdecomp.calibration.opening import opened_for
from tdecomp.decomposers.assemble import empty_chain_like
from tdecomp.decomposers.tied import tied_chains
from tdecomp.files.tensors import read_tensors, write_tensors
from tdecomp.files.typed import typed
from tdecomp.files.whole_file import named_in_errors
from tdecomp.layers.chain import Chain
from tdecomp.model.opened.base import close_unchanged
from tdecomp.model.sites import Site, find_sites
from tdecomp.model.surgery import copy_with, tensors_in
from tdecomp.model.weights import is_plain, refuse_lazy
from tdecomp.plans.plan import Plan, match_sites
from tdecomp.plans.table import FORMAT
from tdecomp.runtime.torch_state import no_inference_mode, restoring

_KEY = "tdecomp"


def save(file: str | os.PathLike[str], model: nn.Module, plan: Plan) -> None:
    """Write a decomposed model's weights and its plan; a crash leaves an older file as it was."""
    chains = sum(isinstance(module, Chain) for module in model.modules())
    if chains != sum(row.method is not None for row in plan):
        raise ValueError(
            f"the model has {chains} chains and the plan another number, so it was decomposed in "
            "several steps; a file holds one plan: decompose the original in one step to save it"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    for row in plan:
        chain = modules.get(row.name)
        if isinstance(chain, Chain) and chain.replaced != row.layer:
            raise ValueError(
                f"layer {row.name!r} stands for {chain.replaced}, in the plan for {row.layer}, as "
                "after fuse_batchnorm; a file is loaded into the architecture that was decomposed: "
                "save first, and fuse what tdecomp.load returns"
            )
        if isinstance(chain, Chain) and _resized(chain):
            raise ValueError(
                f"layer {row.name!r}: its stages have other sizes than those of {row.layer}, as "
                "after resize_token_embeddings; save first, and resize what tdecomp.load returns"
            )
    refuse_lazy(model, "save")
    state = model.state_dict()
    for key, value in state.items():
        if found := _unsaved(value):
            words = "only tensors can be saved, plain and dense and with values"
            raise ValueError(f"{key!r} of the state dict is a {found}; {words}")
    shared = _shared(state)
    strides = {
        key: list(value.stride())
        for key, value in state.items()
        if _dense(value) and value.stride() != torch.empty(value.shape, device="meta").stride()
    }
    header = {"format": FORMAT, "version": VERSION, "plan": plan.to_dict()}
    header |= {"shared": shared, "strides": strides}
    tensors = _alone({key: value for key, value in state.items() if key not in shared})
    write_tensors(file, _KEY, header, tensors)


def _resized(chain: Chain) -> bool:
    """Whether a parameter of it has another shape than its method gives it."""
    stages = chain.decomposer.stages(chain.replaced, chain.rank)
    built = [p for stage in stages for p in stage.build(torch.device("meta")).parameters()]
    shapes = [[p.shape for p in parameters] for parameters in (built, chain.parameters())]
    # Of what was quantized some are no parameters any more: that is refused in other words.
    return len(shapes[0]) == len(shapes[1]) and shapes[0] != shapes[1]


def load(file: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Bring a saved decomposition back into a copy of a fresh, undecomposed model.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    >>> tdecomp.decompose(model, "svd", rank=8, progress=False).save("small.safetensors")
    >>> small = load("small.safetensors", nn.Sequential(nn.Linear(64, 64), nn.ReLU()))
    >>> small[0].rank
    8

    Parameters
    ----------
    file : path
        Written by `Decomposition.save`.
    model : nn.Module
        Of the architecture that was decomposed, with any weights. It is left as it is.

    Returns
    -------
    nn.Module
        A copy with the chains in place and the weights loaded; nothing is fitted.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, of a newer format, or of another architecture; names the tensors.
    """
    with restoring(model), no_inference_mode():
        find_sites(model)  # refuses what is no model to load into before the file is looked at
        with named_in_errors(file):
            saved = _read(file)
            names = {name for row in saved.plan for name in row.names}
            with opened_for(model, names=names):
                return _rebuilt(saved, model, find_sites(model))


class _Saved(NamedTuple):
    plan: Plan
    shared: dict[str, str]  # the names that share the tensor of an earlier name
    strides: dict[str, tuple[int, ...]]  # of tensors that are not contiguous
    tensors: dict[str, Tensor]


def _unsaved(value: Any) -> str | None:
    """What it is, if safetensors cannot hold it; else None."""
    if not isinstance(value, Tensor) or not is_plain(value):
        return type(value).__name__
    dense = value.layout is torch.strided and not value.is_quantized and not value.is_meta
    if dense and value.dtype not in (torch.complex32, torch.complex128):
        return None
    return f"{value.dtype} tensor ({value.layout}, on {value.device})"


def _shared(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of tensors that an earlier name holds as well, each with that name."""
    first: dict[Any, str] = {}
    earlier: dict[str, str] = {}
    for key, value in state.items():
        place = (value.data_ptr(), value.device, value.dtype, value.shape, value.stride())
        earlier[key] = first.setdefault(place, key) if value.numel() else key
    return {key: name for key, name in earlier.items() if name != key}


def _alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous and each in memory of its own, as safetensors wants them."""
    # torch negates and conjugates only when values are read, which safetensors does not.
    whole = {k: v.resolve_conj().resolve_neg().contiguous() for k, v in tensors.items()}
    places = Counter(value.untyped_storage().data_ptr() for value in whole.values())
    return {
        key: value.clone() if places[value.untyped_storage().data_ptr()] > 1 else value
        for key, value in whole.items()
    }


def _dense(tensor: Tensor) -> bool:
    """Whether the strides are those of a permuted contiguous tensor."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _read(file: str | os.PathLike[str]) -> _Saved:
    header, tensors = read_tensors(file, _KEY, "decomposition", FORMAT)
    shared = typed(dict[str, str], header.get("shared"), "shared")
    # No tensor is stored twice, and none shares what is not stored.
    lost = {k: other for k, other in shared.items() if k in tensors or other not in tensors}
    if lost:
        raise ValueError(f"damaged: these tensors cannot share those: {lost}")
    strides = typed(dict[str, tuple[int, ...]], header.get("strides"), "strides")
    plan = Plan.from_dict(typed(dict[str, Any], header.get("plan"), "plan"))
    return _Saved(plan, shared, strides, tensors)


def _rebuilt(saved: _Saved, model: nn.Module, sites: Mapping[str, Site]) -> nn.Module:
    matched = match_sites(sites, saved.plan)
    chains: dict[nn.Module, Chain] = {}
    groups: dict[str, list[nn.Module]] = {}
    for row in saved.plan:
        if row.method is not None and row.rank is not None and row.layer is not None:
            layer, method = matched[row.name].module, saved.plan.decomposers[row.method]
            chains[layer] = empty_chain_like(layer, row.layer, method, row.rank)
            groups.setdefault(row.tied_to or row.name, []).append(layer)
    for group in (layers for layers in groups.values() if len(layers) > 1):
        chains |= zip(group, tied_chains([chains[layer] for layer in group]), strict=True)
    rebuilt = copy_with(model, chains)
    close_unchanged(rebuilt)
    _check(saved.tensors | {key: saved.tensors[o] for key, o in saved.shared.items()}, rebuilt)
    rebuilt.load_state_dict(_state(saved, rebuilt), assign=True)
    for chain in (module for module in rebuilt.modules() if isinstance(module, Chain)):
        chain.mirror_weight()
    empty = [name for name, value in tensors_in(rebuilt).items() if value.is_meta]
    if empty:
        raise ValueError(
            f"no values for {', '.join(empty)}, which the model has on the meta device and does "
            "not save; expected a model that has them"
        )
    return rebuilt


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
            "the file does not fit the model, expected one of the architecture it was saved from. "
            f"Tensors {found}"
        )


def _state(saved: _Saved, rebuilt: nn.Module) -> dict[str, Tensor]:
    """The state dict with strides, devices and shared tensors as they were."""
    parameters = dict(rebuilt.named_parameters(remove_duplicate=False))
    current = rebuilt.state_dict()
    state: dict[str, Tensor] = {}
    for key, value in saved.tensors.items():
        device = current[key].device
        placed = value.to("cpu" if device.type == "meta" else device)
        if key in saved.strides:
            placed = _restride(key, placed, saved.strides[key])
        # One Parameter object per tensor, so that names which share it go on sharing it.
        old = parameters.get(key)
        state[key] = placed if old is None else nn.Parameter(placed, old.requires_grad)
    return state | {key: state[earlier] for key, earlier in saved.shared.items()}


def _restride(key: str, value: Tensor, strides: tuple[int, ...]) -> Tensor:
    try:  # on no device, since strides of a damaged file may ask for any amount of memory
        fits = _dense(torch.empty_strided(value.shape, strides, device="meta"))
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"tensor {key!r}: the file gives it strides {strides}")
    placed = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
    return placed.copy_(value)
