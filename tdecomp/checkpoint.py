"""A decomposed model in one safetensors file, and back into a fresh model.

The file holds the state dict; its metadata, as JSON under the key ``tdecomp``, holds the plan and
what safetensors does not: the strides of tensors that are not contiguous, and which names share
one tensor. Nothing is unpickled and no code from the file is run.
"""

import json
import os
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tdecomp.plans import Plan, match_sites
from tdecomp.surgery import copy_with

_KEY = "tdecomp"
_FORMAT = 1


def save(file: str | os.PathLike[str], model: nn.Module, plan: Plan) -> None:
    """Write a decomposed model's weights and its plan; a crash leaves an older file as it was.

    Raises
    ------
    ValueError
        If the state dict holds something that is not a tensor.
    """
    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{key!r} of the state dict is a {type(value).__name__}; only tensors can be saved"
            )
    shared = _shared(state)
    header = {
        "format": _FORMAT,
        "version": version("tdecomp"),
        "plan": json.loads(plan.to_json()),
        "shared": shared,
        "strides": {
            key: list(value.stride())
            for key, value in state.items()
            if _dense(value) and value.stride() != torch.empty(value.shape, device="meta").stride()
        },
    }
    tensors = {key: value.contiguous() for key, value in state.items() if key not in shared}
    target = Path(file)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        save_file(tensors, draft, metadata={_KEY: json.dumps(header)})
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def load(file: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Bring a saved decomposition back into a copy of a fresh, undecomposed model.

    >>> result = tdecomp.decompose(model, "svd", rank=8)       # doctest: +SKIP
    >>> result.save("small.safetensors")                       # doctest: +SKIP
    >>> small = tdecomp.load("small.safetensors", Net())       # doctest: +SKIP

    Parameters
    ----------
    file : path
        As `Decomposition.save` wrote it.
    model : nn.Module
        Of the same architecture as the one that was decomposed; its weights do not matter. It
        is left as it is.

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
    header, tensors = _read(Path(file))
    plan = Plan.from_json(json.dumps(header["plan"]))
    sites = match_sites(model, plan)
    chains = {}
    for row in plan:
        if row.method is None or row.rank is None or row.layer is None:
            continue
        layer = sites[row.name].module
        weight = layer.get_parameter("weight")
        chain = plan.decomposers[row.method].build(row.layer, row.rank, weight.device)
        chains[layer] = chain.requires_grad_(weight.requires_grad).train(layer.training)
    rebuilt = copy_with(model, chains)
    _check(tensors.keys() | header["shared"].keys(), tensors, rebuilt, file)
    rebuilt.load_state_dict(_state(header, tensors, rebuilt), assign=True)
    return rebuilt


def _shared(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Which names hold the very tensor that an earlier name holds."""
    first: dict[Any, str] = {}
    shared = {}
    for key, value in state.items():
        if value.numel() == 0:
            continue
        place = (value.data_ptr(), value.device, value.dtype, value.shape, value.stride())
        earlier = first.setdefault(place, key)
        if earlier != key:
            shared[key] = earlier
    return shared


def _dense(tensor: Tensor) -> bool:
    """Whether the strides are those of a permuted contiguous tensor, which empty_like keeps."""
    return torch.empty_like(tensor).stride() == tensor.stride()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if _KEY not in metadata:
        raise ValueError(
            f"{path} has no decomposition in its metadata; expected a file that result.save wrote"
        )
    header = json.loads(metadata[_KEY])
    if header["format"] > _FORMAT:
        raise ValueError(
            f"{path} has format {header['format']}, written by tdecomp {header['version']}; this "
            f"version reads up to {_FORMAT}: update tdecomp"
        )
    return header, tensors


def _check(
    keys: set[str],
    tensors: Mapping[str, Tensor],
    rebuilt: nn.Module,
    file: str | os.PathLike[str],
) -> None:
    """Refuse a file whose tensors are not those of the rebuilt model, by name and by shape."""
    expected = rebuilt.state_dict()
    wrong = {
        "missing": sorted(expected.keys() - keys),
        "unexpected": sorted(keys - expected.keys()),
        "of another shape": [
            f"{key} (got {tuple(value.shape)}, expected {tuple(expected[key].shape)})"
            for key, value in tensors.items()
            if key in expected and value.shape != expected[key].shape
        ],
    }
    found = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names)
    if found:
        raise ValueError(
            f"{file} does not fit the model, expected one of the architecture it was saved from. "
            f"Tensors {found}"
        )


def _state(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], rebuilt: nn.Module
) -> dict[str, Tensor]:
    """The state dict with strides, devices and shared tensors as they were."""
    parameters = dict(rebuilt.named_parameters(remove_duplicate=False))
    current = rebuilt.state_dict()
    state: dict[str, Tensor] = {}
    for key, value in tensors.items():
        device = current[key].device
        strides = header["strides"].get(key)
        placed = value.to("cpu" if device.type == "meta" else device)
        if strides is not None:
            placed = torch.empty_strided(
                value.shape, strides, dtype=value.dtype, device=placed.device
            ).copy_(placed)
        # One Parameter object per tensor, so that names which share it go on sharing it.
        old = parameters.get(key)
        state[key] = placed if old is None else nn.Parameter(placed, old.requires_grad)
    for key, earlier in header["shared"].items():
        state[key] = state[earlier]
    return state
