"""The skeleton of a model that transformers knows, from its config and the names of its tensors.

Importing transformers takes some hundred megabytes for good: where nobody has done so before, a
process of its own does it, and ends.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.files.shards import Stored, same_bytes
from tdecomp.model.opened.base import Opened
from tdecomp.model.opened.scope import opened
from tdecomp.model.sites import Site, find_sites
from tdecomp.streaming.skeleton import Held, Recipe, Skeleton, SkeletonSite, of_names, quantized
from tdecomp.streaming.source import Source, open_source

_CODE = "from tdecomp.streaming.of_transformers import answer; answer()"


def skeleton_of(source: Source) -> Skeleton:
    """What the model of a folder is: as transformers knows it, or by the names of its tensors."""
    if not _may_know(source.config.get("model_type")):
        return of_names(source.tensors)
    if "transformers" in sys.modules:  # with whatever the user has registered there
        return looked_at(source)
    return asked_elsewhere(source)


def asked_elsewhere(source: Source) -> Skeleton:
    """The skeleton, by a process that ends afterwards."""
    path = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
    done = subprocess.run(
        [sys.executable, "-P", "-c", _CODE], input=json.dumps(str(source.folder.resolve())),
        capture_output=True, encoding="utf-8", errors="replace", check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ValueError(
            f"{source.folder}: transformers cannot look at it, in a process of its own: {lines[-1]}"
        )
    return Skeleton.from_dict(json.loads(done.stdout.rpartition("\n")[2]))


def answer() -> None:
    """Of the process that imports transformers: the skeleton of a folder that it is told."""
    source = open_source(json.load(sys.stdin))
    _leave_out_torchvision_if_broken()
    print("\n" + json.dumps(looked_at(source).to_dict()), end="")


def _leave_out_torchvision_if_broken() -> None:
    """Make a torchvision that was built for another torch look absent, for all of this process.

    transformers imports it where it is installed, also for models that need nothing of it.
    """
    try:
        importlib.import_module("torchvision")
    except Exception:  # a RuntimeError, an OSError or an ImportError, as the two do not fit
        for name in [name for name in sys.modules if name.startswith("torchvision.")]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # to Python: not there


def _may_know(kind: Any) -> bool:
    """Whether it is worth asking transformers for a model type: it names it, or was told of it."""
    if not isinstance(kind, str):
        return False
    if "transformers" in sys.modules:
        return True
    spec = importlib.util.find_spec("transformers")
    for folder in (spec and spec.submodule_search_locations) or ():
        listed = Path(folder, "models", "auto").glob("*.py")
        if any(f'"{kind}"' in path.read_text("utf-8") for path in listed):
            return True
    return False


def looked_at(source: Source) -> Skeleton:
    """The skeleton, in this process."""
    model = _on_meta(source)
    if model is None:
        return of_names(source.tensors)
    closed: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        closed[id(parameter)].append(name)
    alive = dict(model.named_parameters(remove_duplicate=False))  # ids stay theirs
    recipes = _recipes(model, source)
    held: dict[int, Held] = {}
    for key, names in closed.items():
        held[key] = _held(tuple(alive[names[0]].shape), names, recipes, source)
    params = sum(parameter.numel() for parameter in model.parameters())
    with opened(model):
        sites = find_sites(model)
        layers = {name for site in sites.values() if site.spec for name in site.names}
        inner = {m: path for path, m in model.named_modules()}
        places: dict[int, int] = {}
        table: list[Held] = []
        found = []
        for site in sites.values():
            own = {}
            for part, parameter in _named(site).items():
                if id(parameter) not in places:
                    places[id(parameter)] = len(table)
                    mine = held.get(id(parameter))
                    owners = {name.rpartition(".")[0] for name in closed.get(id(parameter), ())}
                    if mine is not None and len(owners) > 1 and owners - layers:
                        mine = replace(mine, kept=True)
                    table.append(mine or _of_opened(site, part, parameter, inner, recipes, source))
                own[part] = places[id(parameter)]
            found.append(
                SkeletonSite(
                    site.names, site.spec, site.reason, site.tied, own, _opened(site, inner)
                )
            )  # fmt: skip
    return Skeleton(type(model).__name__, tuple(found), tuple(table), params)


def _named(site: Site) -> dict[str, nn.Parameter]:
    """The parameters of a row by their names in its module, be a weight computed from them."""
    wanted = {id(parameter) for parameter in site.parameters}
    return {name: p for name, p in site.module.named_parameters() if id(p) in wanted}


def _opened(site: Site, inner: Mapping[nn.Module, str]) -> str | None:
    """The name of the opened module that the layer is in."""
    paths = [name for module, name in inner.items() if isinstance(module, Opened)]
    around = [path for path in paths if not path or site.name.startswith(f"{path}.")]
    return max(around, key=len, default=None)


def _on_meta(source: Source) -> nn.Module | None:
    """The model without values; None if transformers does not know it."""
    transformers: Any = importlib.import_module("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError):  # a model type that it does not have code of its own for
        return None
    kinds = [getattr(transformers, name, None) for name in config.architectures or ()]
    kind = next((kind for kind in kinds if kind is not None), None)
    if kind is None:
        return None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model: nn.Module = kind(config)
    return model


def _recipes(model: Any, source: Source) -> dict[str, Recipe | str]:
    """By the name of a parameter in the model how it is read, or why it is not known how."""
    loading: Any = importlib.import_module("transformers.core_model_loading")
    mapping: Any = importlib.import_module("transformers.conversion_mapping")
    weights = mapping.get_model_conversion_mapping(model)
    renamings = [entry for entry in weights if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in weights if isinstance(entry, loading.WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    state = model.state_dict()
    found: dict[str, Recipe | str] = {}
    collected: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(source.tensors, key=loading.dot_natural_key):
        rename = loading.rename_source_key
        target, pattern = rename(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = rename(name, [], [], model.base_model_prefix, state)
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
    return found


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


def _held(
    shape: tuple[int, ...], names: list[str], recipes: Mapping[str, Recipe | str], source: Source
) -> Held:
    """A parameter that the model has under these names."""
    known = [recipes[name] for name in names if name in recipes]
    readable = [recipe for recipe in known if isinstance(recipe, Recipe)]
    if not known:
        return Held(shape, None, "the checkpoint has no values for it")
    if len(readable) < len(known):
        return Held(shape, None, next(words for words in known if isinstance(words, str)))
    first, *others = readable
    if others and any(len(recipe.names) > 1 for recipe in readable):
        return Held(shape, None, "tied, and stored in several parts")
    copies = tuple(recipe.names[0] for recipe in others)
    for name in copies:
        if not same_bytes(source.folder, source.tensors[first.names[0]], source.tensors[name]):
            words = f"tied by the config, but {first.names[0]!r} and {name!r} have other values"
            return Held(shape, None, f"{words}: say tie_word_embeddings=false in config.json")
    return _checked(Held(shape, first, copies=copies), source)


def _checked(held: Held, source: Source) -> Held:
    """The same one, or why it cannot be read."""
    recipe = held.recipe
    assert recipe is not None
    if reason := quantized(source.tensors, recipe.names):
        return replace(held, recipe=None, reason=reason)
    shape = stored_shape(recipe, source.tensors)
    if shape != held.shape:
        words = f"its weight is stored with the shape {shape}, the model has {held.shape}"
        return replace(held, recipe=None, reason=words)
    if len({source.tensors[name].dtype for name in recipe.names}) > 1:
        return replace(held, recipe=None, reason="its parts are stored in several dtypes")
    return held


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


def _of_opened(
    site: Site, part: str, parameter: Tensor, inner: Mapping[nn.Module, str],
    recipes: Mapping[str, Recipe | str], source: Source,
) -> Held:  # fmt: skip
    """A parameter that is only there while its module is open: a view of one that is stored."""
    path, _, layer = site.name.rpartition(".")
    holder = next((m for m, name in inner.items() if name == path and isinstance(m, Opened)), None)
    shape = tuple(parameter.shape)
    unknown = Held(shape, None, "a part of a stored tensor: decompose it in memory")
    if holder is None or part != "weight" or not getattr(holder, "is_transposed", False):
        return unknown
    known = recipes.get(f"{path}.{holder.closed_name(layer, bias=False)}")
    if not isinstance(known, Recipe):
        return replace(unknown, reason=known or "the checkpoint has no values for it")
    return _checked(Held(shape, replace(known, transposed=True)), source)
