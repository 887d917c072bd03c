"""Saving by the model's own `save_pretrained`, as models of transformers and diffusers have one.

It writes the model's configuration, which says the plan as long as the model has chains: plainly
called, it writes a folder that can be loaded again. A model whose configuration cannot say it
refuses.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from tdecomp.checkpoint.checks import refuse_other_sizes
from tdecomp.checkpoint.description import KEY, description, is_description, plan_in
from tdecomp.checkpoint.standing import (
    chains_in,
    part_of,
    plan_of,
    plan_of_chains,
    tells_of,
    with_earlier,
)
from tdecomp.layers.chain import Chain
from tdecomp.plans.plan import Plan

_METHOD = "save_pretrained"
_CONVERSIONS = "_weight_conversions"  # to the names of tensors that transformers saves
# Modules of torch around others, whose names no state dict has.
_WRAPPED = {"_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
# torch.compile(layer) gives one whose names its state dict has, and no fresh model.
_COMPILED = "_orig_mod"
# What a configuration says for so long must not change while another thread writes it.
_ONE_AT_A_TIME = threading.RLock()


class Refusal:
    """The `save_pretrained` of a model that could not be loaded again.

    One that is `lasting` is of what cannot be mended, such as batch norm that was folded in.
    """

    def __init__(self, words: str, lasting: bool = False) -> None:
        self.words, self.lasting = words, lasting

    def __call__(self, *_: Any, **__: Any) -> None:
        raise ValueError(f"save_pretrained: {self.words}")


def remember(model: nn.Module, plan: Plan) -> Callable[[], None]:
    """Let the model, and those in it, say the plan where they are saved; returns what undoes it."""
    with ExitStack() as undo:
        changed = any(row.method is not None for row in plan)
        known: dict[int, str | None] = {}  # by configurations that models share: why they refuse
        for path, module in _savable(model) if changed else ():
            config = _config_of(module)
            if config is None:
                words: str | None = _NO_CONFIGURATION
            elif id(config) in known:
                words = known[id(config)]
            else:
                entry, words = _entry(module, path, model, plan)
                if entry is not None:
                    undo.callback(_say(module, entry))
                known[id(_config_of(module))] = words
            if words is not None:
                undo.callback(_refuse(module, words))
            else:
                undo.callback(_let(module))
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


@contextmanager
def saying_chains(model: nn.Module, state: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Let the model's configuration say, for so long, the chains that the model has by now.

    A part of it may have been decomposed by itself, and said so to its own configuration only, or
    to that of the whole by the names in the part. A model without chains says nothing of those of
    another one that has the same configuration. A ValueError is raised if what is saved could not
    be loaded again; `state` is that where it is not the model's own state dict.
    """
    with ExitStack() as undo:
        found = chains_in(model)
        if found or is_description(_said(model)):
            undo.enter_context(_ONE_AT_A_TIME)
        if not found:
            for _, module in _savable(model):
                if is_description(_said(module)):
                    undo.callback(_say(module, None))
        plan = _unsaid_plan(model, found, state)
        if plan is not None:
            undo.callback(remember(model, plan))
            refused = vars(model).get(_METHOD)
            if isinstance(refused, Refusal):
                refused()
        yield


def _unsaid_plan(
    model: nn.Module, found: Mapping[str, tuple[list[str], Chain]], state: Mapping[str, Any] | None
) -> Plan | None:
    """The plan of the chains, unless the configuration says it; checked as `saying_chains` says."""
    own_names = {_stored_name(name): name for name in found}
    chains = {stored: found[name][1] for stored, name in own_names.items()}
    compiled = [name for name in found if _COMPILED in name.split(".")]
    if compiled:
        raise ValueError(
            f"save_pretrained: layer {compiled[0]!r} would be stored by this name, which a fresh "
            "model does not have; expected layers compiled in place, layer.compile() instead of "
            "torch.compile(layer)"
        )
    if state is not None:  # without the layers that it names otherwise, or lacks
        chains = {
            name: chain for name, chain in chains.items()
            if all(f"{name}.{part}" in state for part, _ in chain.named_parameters())
        }  # fmt: skip
    if not chains or getattr(model, "_hf_peft_config_loaded", False):  # then it saves adapters only
        return None
    for name, chain in chains.items():
        refuse_other_sizes(name, chain, resized=True, state=state)
    for refusal in (refusal_of(module) for _, module in _savable(model)):
        if refusal is not None:
            refusal()
    entry = _said(model)
    said = plan_in(entry) if isinstance(entry, Mapping) and is_description(entry) else None
    told = said is not None and all(tells_of(said, name, chain) for name, chain in chains.items())
    wrapped = [own_names[name] for name in chains if own_names[name] != name]
    if wrapped:
        if told:
            return None
        raise ValueError(
            f"save_pretrained: layer {wrapped[0]!r} is inside of a wrapper, and the model's "
            "configuration does not say its chain; expected the model without wrappers"
        )
    if said is None or not told:
        return plan_of_chains(model)
    plan = plan_of(model, said)
    return None if plan is said else plan


def _stored_name(name: str) -> str:
    """The name that a module has in the state dict."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def refuse_saving(model: nn.Module, changed: Collection[nn.Module], words: str) -> None:
    """Let models that have these layers refuse for good to be saved, in these words."""
    for _, module in _savable(model):
        if not {*changed}.isdisjoint(module.modules()):
            _refuse(module, words, lasting=True)


def has_own(model: nn.Module) -> bool:
    """Whether its own `save_pretrained` writes a configuration that says the plan."""
    return callable(getattr(type(model), _METHOD, None)) and _config_of(model) is not None


def refusal_of(model: nn.Module) -> Refusal | None:
    """What refuses for good to save the model."""
    held = vars(model).get(_METHOD)
    return held if isinstance(held, Refusal) and held.lasting else None


_NO_CONFIGURATION = (
    "this class writes no configuration that could say which layers are chains; expected the "
    "save_pretrained of what decompose() returned: result.save_pretrained(folder)"
)


def _entry(
    module: nn.Module, path: str, model: nn.Module, plan: Plan
) -> tuple[dict[str, Any] | None, str | None]:
    """What the configuration of a model at this path is to say; or why it cannot."""
    said = _said(module)
    if said is not None and not is_description(said):
        return None, f"the model is quantized, too, which its {KEY} has to say: decompose first"
    try:
        return description(part_of(with_earlier(model, plan), path)), None
    except ValueError as error:  # as of methods that cannot be read back
        return None, str(error)


def _let(module: nn.Module) -> Callable[[], None]:
    """Let its own `save_pretrained` write it, with the names that tensors have in it."""
    with ExitStack() as undo:
        held = vars(module).get(_METHOD)
        if isinstance(held, Refusal) and not held.lasting:
            undo.callback(partial(setattr, module, _METHOD, held))
            delattr(module, _METHOD)
        if not isinstance(_config_of(module), Mapping):
            # Of transformers: the names of other formats are made from those of whole layers.
            undo.callback(_set(module, _CONVERSIONS, []))
        return undo.pop_all().close


def _savable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if callable(getattr(type(module), _METHOD, None)):
            yield path, module


def _refuse(module: nn.Module, words: str, lasting: bool = False) -> Callable[[], None]:
    if refusal_of(module) is not None:
        return lambda: None
    return _set(module, _METHOD, Refusal(words, lasting))


def _set(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of the module itself; returns what undoes it."""
    held = vars(module)
    before = [held[name]] if name in held else []
    setattr(module, name, value)
    return partial(setattr, module, name, *before) if before else partial(delattr, module, name)


# Configurations ----------------------------------------------------------------------------------


def _config_of(module: nn.Module) -> Any:
    """An object with `to_dict`, as of transformers, or diffusers' mapping; None for others."""
    roots = {kind.__module__.partition(".")[0] for kind in type(module).__mro__}
    if "huggingface_hub" in roots:  # its mixin writes the arguments of the class
        return None
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
