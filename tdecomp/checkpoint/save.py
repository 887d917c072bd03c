"""Writing a folder, by the model's own library or without one."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tdecomp.checkpoint.checks import refuse_changed
from tdecomp.checkpoint.description import (
    KEY,
    describe_in_config,
    description,
    is_description,
    read_config,
    readme,
    write_readme,
)
from tdecomp.checkpoint.pretrained import has_own, refusal_of, remember
from tdecomp.checkpoint.shards import replacing_weights, write_buffers, write_weights
from tdecomp.checkpoint.standing import plan_of
from tdecomp.checkpoint.tensors import refuse_odd, strides_of
from tdecomp.plans.plan import Plan

_LIBRARIES = ("transformers", "diffusers", "timm")


def save_pretrained(
    model: nn.Module,
    plan: Plan,
    folder: str | os.PathLike[str],
    max_shard_size: int | str,
    options: Mapping[str, Any],
) -> None:
    """Write a folder that the model's library or `tdecomp.load` reads."""
    place, library, own = Path(folder), library_of(model), has_own(model)
    if place.is_file():
        raise NotADirectoryError(f"{place} is a file; expected the name of a folder")
    if options.get("push_to_hub"):
        raise ValueError(
            "push_to_hub: a card of the library's own would take the place of the README.md that "
            "says how the folder is loaded; save the folder, then push it with "
            "huggingface_hub.upload_folder(repo_id=..., folder_path=...)"
        )
    if (refusal := refusal_of(model)) is not None:
        refusal()
    plan = plan_of(model, plan)
    refuse_changed(model, plan, resized=library == "transformers")
    described = description(plan)  # refuses methods that cannot be read back
    if own:
        # Offloaded weights, which have no values here, are for the library.
        held = model.state_dict().items()
        refuse_odd({name: value for name, value in held if not getattr(value, "is_meta", False)})
        remember(model, plan)
        place.mkdir(parents=True, exist_ok=True)
        write_readme(place, readme(type(model).__name__, library))
        save: Any = model.save_pretrained
        if "max_shard_size" in inspect.signature(save).parameters:
            options = {"max_shard_size": max_shard_size, **options}
        with replacing_weights(place):
            save(folder, **options)
        # Some classes write another configuration than the one that they have.
        if not is_description(read_config(place).get(KEY)):
            describe_in_config(place, described)
    else:
        if options:
            words = f"{type(model).__name__} has no save_pretrained that takes them"
            raise TypeError(f"save_pretrained: unknown options {', '.join(options)}: {words}")
        refuse_odd(state := model.state_dict())
        write_weights(place, model, max_shard_size)
        described = description(plan, strides_of(state))
        describe_in_config(place, {"architectures": [type(model).__name__]}, described)
        write_readme(place, readme(type(model).__name__, library))
    if library != "transformers":  # which makes them anew
        write_buffers(place, model)


def library_of(model: nn.Module) -> str:
    """The library that the model's class comes from; "" for others."""
    roots = (kind.__module__.partition(".")[0] for kind in type(model).__mro__)
    return next((root for root in roots if root in _LIBRARIES), "")
