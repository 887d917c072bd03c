"""Tensors and a JSON header in one safetensors file, covered by a SHA-256."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tdecomp.files.typed import parsed
from tdecomp.files.whole_file import whole_file
from tdecomp.runtime.scope import interrupts_deferred

_HASH = "sha256"


def write_tensors(
    file: str | os.PathLike[str], key: str, header: dict[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write contiguous tensors, with the header as JSON under this key of the metadata."""
    # Under one key: safetensors writes several in any order, and files would not be the same.
    with whole_file(file) as draft:
        save_file(dict(tensors), draft, metadata={key: sealed(header, tensors)})


def read_tensors(
    file: str | os.PathLike[str], key: str, kind: str, form: int, *, oldest: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors that `write_tensors` wrote with this key.

    A ValueError for any other file, for one whose `format` is not `form` (nor between that and the
    `oldest`), and for one that is not as it was written.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {}
            for name in opened.keys():  # noqa: SIM118
                with interrupts_deferred():  # which safetensors may take for damage
                    # A copy, since the file is mapped and may change later.
                    tensors[name] = opened.get_tensor(name).clone()
    except SafetensorError as error:
        raise ValueError(f"damaged or no safetensors file: {error}") from error
    if key not in metadata:
        raise ValueError(f"its metadata has no {kind}; expected a file that tdecomp saved")
    header = parsed(metadata[key], kind, form, oldest=oldest)
    if header.get(_HASH) != _content_hash(header, tensors):
        raise ValueError(
            "damaged: its SHA-256 is not the one that was written with it; save or copy it anew"
        )
    del header[_HASH]
    return header, tensors


def sealed(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The header as JSON, with the hash of itself and of the tensors."""
    return json.dumps({**header, _HASH: _content_hash(header, tensors)})


def _content_hash(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Of the header without a hash, and of each tensor's name, dtype, shape and bytes."""
    text = json.dumps({name: entry for name, entry in header.items() if name != _HASH})
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # Contiguous tensors with one element may have any stride.
        flat = tensor.cpu().as_strided((tensor.numel(),), (1,))
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
