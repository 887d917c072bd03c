"""A saved decomposition, back into a fresh model."""

import os
from pathlib import Path
from typing import Any

from torch import nn

from tdecomp.calibration.opening import opened_for
from tdecomp.checkpoint import file as single_file
from tdecomp.checkpoint.description import KEY, plan_in, read_config
from tdecomp.checkpoint.folder import BUFFERS, names_in, read_weights, weight_files
from tdecomp.checkpoint.pretrained import remember
from tdecomp.checkpoint.rebuild import Stored, rebuilt
from tdecomp.checkpoint.save import library_of
from tdecomp.checkpoint.standing import decomposed_part
from tdecomp.files.typed import typed
from tdecomp.files.whole_file import named_in_errors
from tdecomp.integrations.saving import teach_imported
from tdecomp.model.sites import Site, find_sites
from tdecomp.plans.plan import Plan
from tdecomp.runtime.torch_state import no_inference_mode, restoring


def load(source: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Bring a saved decomposition back into a copy of a fresh, undecomposed model.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    >>> tdecomp.decompose(model, "svd", rank=8, progress=False).save("small.safetensors")
    >>> small = load("small.safetensors", nn.Sequential(nn.Linear(64, 64), nn.ReLU()))
    >>> small[0].rank
    8

    Parameters
    ----------
    source : path
        A file that `Decomposition.save` wrote, or a folder that `Decomposition.save_pretrained`,
        or a decomposed model's own `save_pretrained`, did.
    model : nn.Module
        Of the architecture that was decomposed, with any weights or on the meta device. It is left
        as it is.

    Returns
    -------
    nn.Module
        A copy with the chains in place and the weights loaded, in the dtype that they were saved
        in; nothing is fitted. Where a folder is of transformers, its `from_pretrained` makes the
        model, with the folder's configuration.

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder, or files that the folder's index names are missing.
    ValueError
        If a file is damaged, of a newer format, or of another architecture; names the tensors.
    """
    teach_imported()  # `model` may be a part of another one
    with restoring(model), no_inference_mode():
        folder = Path(source)
        if folder.is_dir() and library_of(model) == "transformers":
            from tdecomp.integrations.transformers import load_pretrained

            loaded: nn.Module = load_pretrained(folder, model)
            return loaded
        find_sites(model)  # refuses what is no model to load into before the files are looked at
        with named_in_errors(source):
            plan, stored = (_folder if folder.is_dir() else single_file.read)(folder)
            names = {name for row in plan for name in row.names}
            with opened_for(model, names=names):
                sites: dict[str, Site] = find_sites(model)
                if {row.name for row in plan} != {*sites}:  # it may be silent about other layers
                    plan = decomposed_part(plan)
                    sites = {row.name: sites[row.name] for row in plan if row.name in sites}
                twin = rebuilt(plan, stored, model, sites)
            remember(twin, plan)
            return twin


def _folder(folder: Path) -> tuple[Plan, Stored]:
    described: Any = read_config(folder).get(KEY)
    plan = plan_in(described)
    strides = typed(dict[str, tuple[int, ...]], described.get("strides", {}), "strides")
    tensors = read_weights(weight_files(folder))
    file = folder / BUFFERS
    buffers: dict[str, Any] = {}
    if file.is_file():
        buffers = read_weights(dict.fromkeys(names_in(file), file))
    return plan, Stored(tensors, buffers, None, strides)
