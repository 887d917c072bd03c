"""Saving as the model's own library does, with the plan beside the weights.

A model whose class has `save_pretrained` gets one of its own when it is decomposed: plainly called,
it writes a folder that can be loaded again, or refuses.
"""

import inspect
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from tdecomp.checkpoint.checks import refuse_changed
from tdecomp.checkpoint.description import (
    KEY,
    describe_in_config,
    description,
    readme,
    write_readme,
)
from tdecomp.checkpoint.shards import write_buffers, write_folder
from tdecomp.checkpoint.standing import part_of, plan_of
from tdecomp.model.opened.base import has_chains
from tdecomp.plans.plan import Plan

_NAME = "save_pretrained"
_LIBRARIES = ("transformers", "diffusers", "timm")


class SavePretrained:
    """The `save_pretrained` of a decomposed model: that of its class, and the plan.

    The model holds it, so it holds the model weakly, or no memory would be freed with the model.
    """

    refusal: str | None = None  # why the model cannot be saved any more

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._model, self.plan = weakref.ref(model), plan

    @property
    def model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this save_pretrained is gone")
        return model

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the class's method, which pipelines of diffusers look at."""
        return inspect.signature(_of_class(self.model))

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
        """Write a folder as the model's library does, with the plan in `config.json`.

        Raises
        ------
        ValueError
            With the remedy, if what would be written could not be loaded again.
        """
        own = _of_class(self.model)
        adapters_only = getattr(self.model, "_hf_peft_config_loaded", False)
        if adapters_only or not has_chains(self.model) or Path(save_directory).is_file():
            return own(save_directory, *args, **options)
        if self.refusal is not None:
            raise ValueError(f"save_pretrained: {self.refusal}")
        plan = plan_of(self.model, self.plan)
        library = library_of(self.model)
        refuse_changed(self.model, plan, resized=library == "transformers")
        bound = inspect.signature(own).bind(save_directory, *args, **options)
        write = _with_transformers if library == "transformers" else _with_others
        return write(self.model, plan, Path(save_directory), own, bound)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SavePretrained":
        twin = SavePretrained(memo.get(id(self.model), self.model), self.plan)
        twin.refusal = self.refusal
        return twin

    def __reduce__(self) -> Any:
        return SavePretrained, (self.model, self.plan), {"refusal": self.refusal}


def save(
    model: nn.Module,
    plan: Plan,
    folder: str | os.PathLike[str],
    max_shard_size: int | str,
    options: Mapping[str, Any],
) -> None:
    """Write a folder by the model's own `save_pretrained`, or as that of transformers would."""
    if Path(folder).is_file():
        raise NotADirectoryError(f"{os.fspath(folder)} is a file; expected the name of a folder")
    if callable(getattr(type(model), _NAME, None)):
        held = vars(model).get(_NAME)
        saver = SavePretrained(model, plan)
        if isinstance(held, SavePretrained):
            saver.refusal = held.refusal
        saver(folder, max_shard_size=max_shard_size, **options)
        return
    if options:
        words = f"{type(model).__name__} has no save_pretrained"
        raise TypeError(f"save_pretrained: unknown options {', '.join(options)}: {words}")
    plan = plan_of(model, plan)
    refuse_changed(model, plan)
    write_folder(Path(folder), model, description(plan), library_of(model), max_shard_size)


def _of_class(model: nn.Module) -> Callable[..., Any]:
    method: Callable[..., Any] = getattr(type(model), _NAME).__get__(model)
    return method


def library_of(model: nn.Module) -> str:
    """The library that the model's class comes from; "" for others."""
    roots = (kind.__module__.partition(".")[0] for kind in type(model).__mro__)
    return next((root for root in roots if root in _LIBRARIES), "")


def _with_transformers(
    model: Any, plan: Plan, folder: Path, own: Callable[..., Any], bound: inspect.BoundArguments
) -> Any:
    """Its configuration is written by its own `save_pretrained`, which may upload the folder."""
    # In other formats the names are made from those of whole layers.
    bound.arguments["save_original_format"] = False
    with _described(model.config, description(plan)):
        if bound.arguments.get("is_main_process", True):
            folder.mkdir(parents=True, exist_ok=True)
            write_readme(folder, readme(type(model).__name__, "transformers"))
        return own(*bound.args, **bound.kwargs)


@contextmanager
def _described(config: Any, described: dict[str, Any]) -> Iterator[None]:
    """The plan is in the configuration while it is written, so that no other model gets it."""
    held = vars(config)
    before = {KEY: held[KEY]} if KEY in held else {}
    setattr(config, KEY, described)
    try:
        yield
    finally:
        held.pop(KEY, None)
        held.update(before)


def _with_others(
    model: nn.Module,
    plan: Plan,
    folder: Path,
    own: Callable[..., Any],
    bound: inspect.BoundArguments,
) -> Any:
    """The plan is put into the configuration that their `save_pretrained` wrote."""
    if bound.arguments.get("push_to_hub", False):
        raise ValueError(
            "save_pretrained: a decomposed model is written before it is uploaded; expected "
            "push_to_hub=False, and huggingface_hub.upload_folder afterwards"
        )
    described = description(plan)  # refuses methods that cannot be read back
    done = own(*bound.args, **bound.kwargs)
    if bound.arguments.get("is_main_process", True):
        describe_in_config(folder, described)
        write_buffers(folder, model)
        write_readme(folder, readme(type(model).__name__, library_of(model)))
    return done


def remember(model: nn.Module, plan: Plan) -> Callable[[], None]:
    """Let the model, and those in it, write the plan when they are saved; returns the undoing."""
    before = _savers(model)
    changed = has_chains(model) or any(row.method is not None for row in plan)
    for path, module in model.named_modules() if changed else ():
        if callable(getattr(type(module), _NAME, None)) and _is_free(module):
            setattr(module, _NAME, SavePretrained(module, part_of(plan, path)))

    def undo() -> None:
        forget(model)
        for module, saver in before.items():
            setattr(module, _NAME, saver)

    return undo


def forget(model: nn.Module) -> Callable[[], None]:
    """Let the model be saved as every other; returns what undoes it."""
    before = _savers(model)
    for module in before:
        delattr(module, _NAME)

    def undo() -> None:
        for module, saver in before.items():
            setattr(module, _NAME, saver)

    return undo


def refuse_saving(model: nn.Module, words: str) -> None:
    """Let the model refuse to be saved, in these words."""
    for saver in _savers(model).values():
        saver.refusal = words


def _savers(model: nn.Module) -> dict[nn.Module, SavePretrained]:
    held = {module: vars(module).get(_NAME) for module in model.modules()}
    return {m: saver for m, saver in held.items() if isinstance(saver, SavePretrained)}


def _is_free(module: nn.Module) -> bool:
    """Whether no other code has given it one of its own."""
    return isinstance(vars(module).get(_NAME), SavePretrained | None)
