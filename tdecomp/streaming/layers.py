"""The layers of a folder without their values: sites to plan for, and what reads one of them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tdecomp.files.shards import Stored, read_tensor
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.filters import Filters
from tdecomp.model.sites import Site, Sites
from tdecomp.model.ties import settle
from tdecomp.streaming.skeleton import Recipe, Skeleton, quantized
from tdecomp.streaming.source import Source


class StoredLayer(nn.Module):
    """What stands for a layer whose module is not there: its weight and its bias, if it has one."""

    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.eval()


@dataclass(frozen=True)
class Values:
    """What reads a parameter; see `Recipe`."""

    parts: tuple[tuple[Stored, ...], ...]
    stacked: bool = False
    transposed: bool = False
    wide: bool = False

    @classmethod
    def of(cls, recipe: Recipe, tensors: Mapping[str, Stored]) -> "Values":
        """Those of a recipe for these tensors."""
        parts = tuple(tuple(tensors[name] for name in part) for part in recipe.parts)
        return cls(parts, recipe.stacked, recipe.transposed, recipe.wide)

    @property
    def nbytes(self) -> int:
        """That are read."""
        return sum(stored.nbytes for part in self.parts for stored in part)

    @property
    def numel(self) -> int:
        """The number of entries."""
        return sum(stored.numel for part in self.parts for stored in part)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all of them together."""
        first = self.parts[0][0].shape
        if self.stacked:
            rows = sum(part[0].shape[0] for part in self.parts)
            first = (len(self.parts[0]), rows, *first[1:])
        return (*first[:-2], first[-1], first[-2]) if self.transposed else first

    @property
    def pieces(self) -> list[Stored]:
        """The stored tensors in the order of the values' bytes, unless these are transposed."""
        return [stored for pieces in zip(*self.parts, strict=True) for stored in pieces]

    @property
    def dtype(self) -> torch.dtype:
        """Of all of them."""
        if self.wide:
            return torch.float32
        found = self.parts[0][0].torch_dtype
        assert found is not None
        return found

    def read(self, folder: str | os.PathLike[str]) -> Tensor:
        """The values."""
        if not self.stacked:
            values = read_tensor(folder, self.parts[0][0])
        else:
            parts = [torch.stack([read_tensor(folder, s) for s in part]) for part in self.parts]
            values = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return (values.transpose(-1, -2) if self.transposed else values).to(self.dtype)


@dataclass(frozen=True)
class FileLayer:
    """A layer of a folder: plain data, from which any process can read it."""

    names: tuple[str, ...]
    spec: LayerSpec
    weight: Values
    bias: Values | None

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    def site(self, weight: nn.Parameter, bias: Tensor | None) -> Site:
        """The site with these values."""
        own = None if bias is None else nn.Parameter(bias)
        return Site(self.names, StoredLayer(weight, own), self.spec)


def read_group(
    folder: str | os.PathLike[str], layers: Sequence[FileLayer], device: torch.device
) -> list[Site]:
    """The sites of layers that share one weight, with their values on a device."""
    weight = nn.Parameter(layers[0].weight.read(folder).to(device))
    sites = []
    for layer in layers:
        bias = None if layer.bias is None else layer.bias.read(folder).to(device)
        sites.append(layer.site(weight, bias))
    if len(sites) == 1:
        return sites
    tied = tuple(site.name for site in sites)
    sites = [replace(site, tied=tied) for site in sites]
    return [replace(site, group=tuple(sites)) for site in sites]


@dataclass(frozen=True)
class FolderLayers:
    """The rows of a folder, and what reads those that are layers."""

    sites: Sites  # on the meta device
    layers: Mapping[str, FileLayer]  # those that can be read
    consumed: Mapping[str, tuple[str, ...]]  # by a layer's name the stored tensors that are its own
    opened: Mapping[str, str]  # by a layer's name the module whose own weight it was, if it was one
    params: int  # of the whole model
    architecture: str | None  # the class of transformers, if it knows the model
    arranged: Mapping[str, Recipe]  # by their names in the model what is stored in another way
    shared_biases: frozenset[str]  # the layers with a bias that something that is no layer has, too

    def group(self, name: str) -> list[FileLayer]:
        """The layer of this name, and those that share its weight, in the order of the model."""
        return [self.layers[member] for member in self.sites[name].tied or (name,)]


def layers_of(source: Source, skeleton: Skeleton, filters: Filters) -> FolderLayers:
    """The rows of a folder with their reasons; a ValueError for filters that match none of them."""
    tensors = source.tensors
    if skeleton.architecture is None and not filters.include:
        raise _unknown(source, [s.names[0] for s in skeleton.sites if s.spec is not None])
    filters.check([name for site in skeleton.sites for name in site.names])
    dtypes = [
        torch.float32 if held.recipe is None else Values.of(held.recipe, tensors).dtype
        for held in skeleton.parameters
    ]
    parameters = [
        nn.Parameter(torch.empty(held.shape, dtype=dtype, device="meta"), dtype.is_floating_point)
        for held, dtype in zip(skeleton.parameters, dtypes, strict=True)
    ]
    sites, layers, consumed = Sites(), dict[str, FileLayer](), dict[str, tuple[str, ...]]()
    shared = []
    for row in skeleton.sites:
        held = {part: skeleton.parameters[place] for part, place in row.parameters.items()}
        name, spec, reason = row.names[0], row.spec, row.reason
        unread = next((h.reason for h in held.values() if h.recipe is None), None)
        if spec is not None:
            reason = reason or _quantized(source) or unread
            stored = [n for h in held.values() if h.recipe is not None for n in h.recipe.names]
            reason = reason or quantized(tensors, stored)
            reason = reason or filters.reason(_NO_MODULE, row.names, spec)
        own = {part: parameters[place] for part, place in row.parameters.items()}
        module: nn.Module = _NO_MODULE
        if "weight" in own:
            module = StoredLayer(own["weight"], own.get("bias"))
        sites[name] = Site(
            row.names, module, spec, reason, None, None, tuple(own.values()), row.tied
        )
        if spec is None or unread is not None or "weight" not in held:  # computed from others
            continue
        values = {p: Values.of(h.recipe, tensors) for p, h in held.items() if h.recipe is not None}
        layers[name] = FileLayer(row.names, spec, values["weight"], values.get("bias"))
        consumed[name] = tuple(
            stored for h in held.values() if h.recipe is not None and not h.kept
            for stored in (*h.recipe.names, *h.copies)
        )  # fmt: skip
        if "bias" in held and held["bias"].kept:
            shared.append(name)
    opened = {row.names[0]: row.opened for row in skeleton.sites if row.opened is not None}
    for name, path in opened.items():
        others = (n for n, p in opened.items() if p == path and sites[n].spec and n not in layers)
        if sites[name].reason is None and (other := next(others, None)):
            words = f"beside {other!r}, whose values cannot be read: {sites[other].reason}"
            sites[name] = replace(sites[name], reason=words)
    settle(sites)
    return FolderLayers(
        sites, layers, consumed, opened, skeleton.params, skeleton.architecture,
        skeleton.arranged, frozenset(shared),
    )  # fmt: skip


_NO_MODULE = nn.Module()


def _quantized(source: Source) -> str | None:
    method = source.quantizer
    if method is None:
        return None
    return (
        f"quantized: config.json says {method!r}, beside which there can be no chains: decompose "
        "the model in full precision, then quantize"
    )


def _unknown(source: Source, names: Sequence[str]) -> ValueError:
    config = source.config
    asked = ["architecture"] if "architecture" in config else ["model_type", "architectures"]
    kind = ", ".join(f"{key} {config[key]!r}" if config.get(key) else f"no {key}" for key in asked)
    added = ""
    if config.get("model_type") and not config.get("architectures"):
        added = ', or in config.json a class of transformers: "architectures": ["..."]'
    shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if names[3:] else "")
    return ValueError(
        f"{source.folder}: no library here knows this architecture (config.json: {kind}), so "
        "that it is not known which matrices are Linear layers and which are tables; expected "
        "include= with the names of Linear layers, or globs, of "
        f"{shown or 'which there are none'}{added}"
    )
