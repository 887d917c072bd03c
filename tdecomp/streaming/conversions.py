"""How transformers converts the tensors of a checkpoint into those of its model."""

import importlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from tdecomp.files.shards import Stored
from tdecomp.streaming.skeleton import Recipe
from tdecomp.streaming.source import Source

HALVES = (torch.float16, torch.bfloat16)
Target = Callable[[str], tuple[str, str | None]]


def recipes_of(model: Any, source: Source) -> dict[str, Recipe | str]:
    """By the name of a parameter in the model how it is read, or why it is not known how."""
    loading: Any = importlib.import_module("transformers.core_model_loading")
    target_of, converters = _conversion(model)
    is_wide = _wide_names(model)
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    found: dict[str, Recipe | str] = {}
    collected: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(source.tensors, key=loading.dot_natural_key):
        target, pattern = target_of(name)
        if pattern is None:
            if target in found:
                found[target] = f"the checkpoint has it twice, once as {name!r}"
            else:
                found[target] = Recipe(((name,),))
        else:
            collected[target][pattern].append(name)
    for target, parts in collected.items():
        converter = by_pattern[next(iter(parts))]
        found |= _converted(target, converter, parts)
    for name, recipe in found.items():
        if isinstance(recipe, Recipe) and is_wide(name, source.tensors[recipe.names[0]]):
            found[name] = replace(recipe, wide=True)
    return found


def _conversion(model: Any) -> tuple[Target, list[Any]]:
    """What tells for a stored name the model's and the pattern of a converter; the converters."""
    loading: Any = importlib.import_module("transformers.core_model_loading")
    mapping: Any = importlib.import_module("transformers.conversion_mapping")
    weights = mapping.get_model_conversion_mapping(model)
    renamings = [entry for entry in weights if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in weights if isinstance(entry, loading.WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()

    def target_of(name: str) -> tuple[str, str | None]:
        rename: Callable[..., tuple[str, str | None]] = loading.rename_source_key
        found = rename(name, renamings, converters, prefix, state)
        if found[0] not in state and name in state:
            return rename(name, [], [], prefix, state)
        return found

    return target_of, converters


def _converted(
    target: str, converter: Any, parts: Mapping[str, list[str]]
) -> dict[str, Recipe | str]:
    """The recipe of what transformers puts together from several tensors; the reason if unknown."""
    steps = [type(step).__name__ for step in converter.operations]
    names = [[*parts.get(pattern, ())] for pattern in converter.source_patterns]
    single = len(converter.target_patterns) == 1
    merged = steps[:1] == ["MergeModulelist"] and converter.operations[0].dim == 0
    joined = steps[1:] == ["Concatenate"] and converter.operations[1].dim == 1
    alike = len({len(part) for part in names}) == 1 and all(names)
    if single and merged and alike and (joined or (len(steps) == 1 and len(names) == 1)):
        return {target: Recipe(tuple(tuple(part) for part in names), stacked=True)}
    words = f"the checkpoint stores it in another form ({', '.join(steps)}): decompose it in memory"
    targets = [target.replace(converter.target_patterns[0], t) for t in converter.target_patterns]
    return dict.fromkeys(targets, words)


def stored_shape(recipe: Recipe, tensors: Mapping[str, Stored]) -> tuple[int, ...] | None:
    """The shape of what a recipe reads; None if its parts do not fit together."""
    shapes = [[tensors[name].shape for name in part] for part in recipe.parts]
    if not recipe.stacked:
        shape = shapes[0][0]
    else:
        if any(a != b for part in shapes for a, b in pairwise(part)):
            return None
        inner = [part[0] for part in shapes]
        if len({(len(part), size[1:]) for part, size in zip(shapes, inner, strict=True)}) > 1:
            return None
        shape = (len(shapes[0]), sum(size[0] for size in inner), *inner[0][1:])
    return (*shape[:-2], shape[-1], shape[-2]) if recipe.transposed else shape


def arranged(
    model: Any, recipes: Mapping[str, Recipe | str], source: Source
) -> dict[str, Recipe]:  # fmt: skip
    """What is read for the tensors of a model that are stored under other names, or in parts.

    A model in memory that was decomposed is saved with its own names: so it is streamed.
    """
    target_of, _ = _conversion(model)
    state = model.state_dict()
    found = {}
    for name, recipe in recipes.items():
        if isinstance(recipe, str) or recipe.names == (name,) or name not in state:
            continue
        fits = stored_shape(recipe, source.tensors) == tuple(state[name].shape)
        alike = len({source.tensors[part].dtype for part in recipe.names}) == 1
        if fits and alike and target_of(name) == (name, None):  # else it is loaded as another
            found[name] = recipe
    return found


def _wide_names(model: Any) -> Callable[[str, Stored], bool]:
    """What tells whether the model has a tensor in float32 that is stored in fewer bits."""
    loading: Any = importlib.import_module("transformers.core_model_loading")
    state = model.state_dict()
    patterns = {dtype: [*model._get_dtype_plan(dtype)] for dtype in HALVES}
    kept = {d: loading.build_glob_alternation(p)[0] for d, p in patterns.items() if p}

    def is_wide(name: str, stored: Stored) -> bool:
        if stored.torch_dtype not in HALVES or name not in state:
            return False
        pattern = kept.get(stored.torch_dtype)
        if pattern is not None and pattern.search(name):
            return True
        return bool(state[name].dtype == torch.float32 and model.dtype in HALVES)

    return is_wide
