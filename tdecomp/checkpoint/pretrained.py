"""Saving by the model's own `save_pretrained`, as models of transformers and diffusers have one.

It writes the model's configuration, which says the plan as long as the model has chains: plainly
called, it writes a folder that can be loaded again. A model whose configuration cannot say it
refuses.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from tdecomp.checkpoint.description import KEY, description, is_description
from tdecomp.checkpoint.standing import part_of, with_earlier
from tdecomp.plans.plan import Plan

_METHOD = "save_pretrained"
_CONVERSIONS = "_weight_conversions"  # to the names of tensors that transformers saves


class Refusal:
    """The `save_pretrained` of a model that could not be loaded again."""

    def __init__(self, words: str) -> None:
        self.words = words

    def __call__(self, *_: Any, **__: Any) -> None:
        raise ValueError(f"save_pretrained: {self.words}")


def remember(model: nn.Module, plan: Plan) -> Callable[[], None]:
    """Let the model, and those in it, say the plan where they are saved; returns what undoes it."""
    with ExitStack() as undo:
        changed = any(row.method is not None for row in plan)
        done: set[int] = set()
        for path, module in _savable(model) if changed else ():
            config = _config_of(module)
            if config is None:
                undo.callback(_refuse(module, _NO_CONFIGURATION))
            elif id(config) not in done:
                done.add(id(config))
                undo.callback(_describe(module, path, model, plan))
        return undo.pop_all().close


def forget(model: nn.Module) -> Callable[[], None]:
    """Let the model be saved as one that has no chains; returns what undoes it."""
    with ExitStack() as undo:
        for _, module in _savable(model):
            if is_description(_said(module)):
                undo.callback(_say(module, None))
            held = vars(module)
            ours = isinstance(held.get(_METHOD), Refusal), held.get(_CONVERSIONS) == []
            for name, mine in zip((_METHOD, _CONVERSIONS), ours, strict=True):
                if mine:
                    undo.callback(partial(setattr, module, name, held[name]))
                    delattr(module, name)
        return undo.pop_all().close


def refuse_saving(model: nn.Module, words: str) -> None:
    """Let a decomposed model of a library refuse to be saved, in these words."""
    for _, module in _savable(model):
        if is_description(_said(module)):
            _refuse(module, words)


def has_own(model: nn.Module) -> bool:
    """Whether its own `save_pretrained` writes a configuration that says the plan."""
    return callable(getattr(type(model), _METHOD, None)) and _config_of(model) is not None


def refusal_of(model: nn.Module) -> Refusal | None:
    """What refuses to save the model."""
    held = vars(model).get(_METHOD)
    return held if isinstance(held, Refusal) and held.words != _NO_CONFIGURATION else None


_NO_CONFIGURATION = (
    "this class writes no configuration that could say which layers are chains; expected the "
    "save_pretrained of what decompose() returned: result.save_pretrained(folder)"
)


def _describe(module: nn.Module, path: str, model: nn.Module, plan: Plan) -> Callable[[], None]:
    said = _said(module)
    if said is not None and not is_description(said):
        words = f"the model is quantized, too, which its {KEY} has to say: decompose first"
        return _refuse(module, words)
    try:
        entry = description(part_of(with_earlier(model, plan), path))
    except ValueError as error:  # as of methods that cannot be read back
        return _refuse(module, str(error))
    with ExitStack() as undo:
        undo.callback(_say(module, entry))
        if not isinstance(_config_of(module), Mapping):
            # Of transformers: the names of other formats are made from those of whole layers.
            undo.callback(_set(module, _CONVERSIONS, []))
        return undo.pop_all().close


def _savable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if callable(getattr(type(module), _METHOD, None)):
            yield path, module


def _refuse(module: nn.Module, words: str) -> Callable[[], None]:
    return _set(module, _METHOD, Refusal(words))


def _set(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of the module itself; returns what undoes it."""
    held = vars(module)
    undo = (
        partial(setattr, module, name, held[name])
        if name in held
        else partial(delattr, module, name)
    )
    setattr(module, name, value)
    return undo


# Configurations ----------------------------------------------------------------------------------


def _config_of(module: nn.Module) -> Any:
    """An object with `to_dict`, as of transformers, or diffusers' mapping; None for others."""
    frozen = vars(module).get("_internal_dict")
    if isinstance(frozen, Mapping):
        return frozen
    config = vars(module).get("config")
    return config if callable(getattr(config, "to_dict", None)) else None


def _said(module: nn.Module) -> Any:
    """What the configuration says already."""
    config = _config_of(module)
    return config.get(KEY) if isinstance(config, Mapping) else getattr(config, KEY, None)


def _say(module: nn.Module, entry: dict[str, Any] | None) -> Callable[[], None]:
    """Let the configuration say it, or nothing; returns what undoes it."""
    config = _config_of(module)
    if isinstance(config, Mapping):  # which cannot be changed, but for another
        others = {name: value for name, value in config.items() if name != KEY}
        made: Any = type(config)
        return _set(
            module, "_internal_dict", made(others if entry is None else {**others, KEY: entry})
        )
    before = vars(config).get(KEY)
    _put(config, entry)
    return partial(_put, config, before)


def _put(config: Any, entry: Any) -> None:
    if entry is None:
        vars(config).pop(KEY, None)
    else:
        setattr(config, KEY, entry)
