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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.files.shards import same_bytes
from tdecomp.model.opened.base import Opened
from tdecomp.model.opened.scope import opened
from tdecomp.model.sites import Site, find_sites
from tdecomp.streaming.conversions import HALVES, arranged, recipes_of, stored_shape
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
    recipes = recipes_of(model, source)
    held: dict[int, Held] = {}
    for key, names in closed.items():
        held[key] = _held(tuple(alive[names[0]].shape), names, recipes, source)
    params = sum(parameter.numel() for parameter in model.parameters())
    written = arranged(model, recipes, source)
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
    return Skeleton(type(model).__name__, tuple(found), tuple(table), params, written)


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
    before = torch.get_default_dtype()
    torch.set_default_dtype(_dtype(config, source))
    try:
        with torch.device("meta"):
            model: nn.Module = kind(config)
    finally:
        torch.set_default_dtype(before)
    return model


def _dtype(config: Any, source: Source) -> torch.dtype:
    """The one that transformers loads a model in: some of its parameters have another one."""
    stored = (one.torch_dtype for one in source.tensors.values())
    first = next((dtype for dtype in stored if dtype is not None and dtype.is_floating_point), None)
    found = getattr(config, "dtype", None) or first
    return found if found in HALVES else torch.float32


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
