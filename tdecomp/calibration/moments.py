"""The moments of the inputs of all layers of a model, and the files that hold them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tdecomp.calibration.fit_cache import FitCache
from tdecomp.calibration.held_patches import HeldPatches
from tdecomp.calibration.layer_moments import TENSORS, LayerMoments, is_widest
from tdecomp.files.tensors import read_tensors, write_tensors
from tdecomp.files.typed import typed
from tdecomp.files.whole_file import named_in_errors
from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.sites import Site

_KEY = "tdecomp_moments"
# Of a file that names each tensor once, and of one in which layers share tensors: versions that
# know only the first say of the other that it is a later one's.
_FORMAT, _FORMAT_SHARED = 1, 2
_HELD = ("held_rows", "held_owners")  # in its HeldPatches


@dataclass(eq=False, repr=False)
class Moments(Mapping[str, LayerMoments]):
    """The moments of every layer's inputs, by the layer's name.

    >>> model, batches = nn.Sequential(nn.Linear(16, 8)), [*torch.randn(4, 64, 16)]
    >>> moments = tdecomp.calibrate(model, batches, progress=False)
    >>> moments.save("moments.safetensors")
    >>> both = moments + Moments.load("moments.safetensors")
    >>> moments.samples, both.samples, list(both)
    (192, 384, ['0'])

    Attributes
    ----------
    layers : dict of str to LayerMoments
        The mean and the second moment of each layer's inputs.
    unreached : tuple of str
        Layers that no batch reached; they are fitted by their weights.
    oddities : dict of str to str
        How the model uses layers in a way that no chain could follow; they are left alone.
    samples : int
        The number of samples that were run.
    peak_bytes : int
        The largest memory that the sums took at a time.
    held_out : int
        The number of samples that were run and are held out.
    """

    layers: dict[str, LayerMoments]
    unreached: tuple[str, ...] = ()
    samples: int = 0
    peak_bytes: int = 0
    oddities: dict[str, str] = field(default_factory=dict)
    held_out: int = 0
    # Losses and drafts already computed, so that the next plan finds them.
    fits: FitCache = field(default_factory=FitCache, init=False)

    def __getitem__(self, name: str) -> LayerMoments:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        few = sum(layer.few for layer in self.layers.values())
        words = f"moments of {len(self)} layers from {self.samples:,} samples"
        if self.held_out:
            words += f" ({self.held_out:,} more held out)"
        if few:
            words += f", in {few} of them fewer than fan_in"
        if self.unreached:
            words += f", {len(self.unreached)} never reached"
        return f"<{words}; at most {self.peak_bytes / 2**20:.0f} MiB held>"

    def __add__(self, other: Any) -> "Moments":
        """The moments of both sets of batches together."""
        if not isinstance(other, Moments):
            return NotImplemented
        both = {**self.layers, **other.layers}
        share = self.samples / max(self.samples + other.samples, 1)
        merged: dict[tuple[int, ...], LayerMoments] = {}  # what layers share they share afterwards
        for name in self.layers.keys() & other.layers.keys():
            mine, others = self.layers[name], other.layers[name]
            if mine.spec != others.spec:
                words = f"moments of {mine.spec} and of {others.spec} cannot be merged"
                raise ValueError(f"layer {name!r}: {words}; expected calibrations of one model")
            tensors = (*mine.of_inputs(), *others.of_inputs())
            if tensors not in merged:
                merged[tensors] = mine.merged_inputs(others)
            gradient = mine.merged_gradient(others, share)
            both[name] = replace(merged[tensors], spec=mine.spec, gradient=gradient)
        unreached = tuple(name for name in self.unreached if name not in both)
        peak = max(self.peak_bytes, other.peak_bytes)
        odd = self.oddities | other.oddities
        held_out = self.held_out + other.held_out
        return Moments(both, unreached, self.samples + other.samples, peak, odd, held_out)

    def check_fit(self, sites: Sequence[Site]) -> None:
        """Refuse moments of other layers than these, or of inputs of other sizes."""
        known = {name: site for site in sites for name in site.names}
        for name, layer in self.items():
            site = known.get(name)
            if site is None or site.spec != layer.spec:
                raise ValueError(
                    f"layer {name!r}: the moments are of {layer.spec}, the model has "
                    f"{site.spec if site else 'no such layer'}; expected moments of this very "
                    "model: calibrate(model, batches) takes them"
                )
            for call in site.calls or ():
                if layer.sizes and call.size not in layer.sizes:
                    sizes = (*layer.sizes[:3], call.size)
                    *seen, asked = ("×".join(map(str, size)) for size in sizes)
                    raise ValueError(
                        f"layer {name!r}: the moments are of inputs of size {', '.join(seen)}, the "
                        f"example inputs give it {asked}; expected one size: calibrate with images "
                        "as large as example_inputs"
                    )

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the moments to a safetensors file; `Moments.load` reads it."""
        tensors, layers = {}, {}
        # Layers that saw the same inputs share tensors, which safetensors has no way to say.
        first: dict[int, str] = {}
        shared: dict[str, str] = {}
        for name, layer in self.layers.items():
            for part, tensor in layer.tensors().items():
                key = f"{name}/{part}"
                if first.setdefault(id(tensor), key) == key:
                    tensors[key] = tensor.contiguous()
                else:
                    shared[key] = first[id(tensor)]
            layers[name] = {
                "spec": layer.spec.to_dict(),
                "count": layer.count,
                "sizes": layer.sizes,
            }
        header: dict[str, Any] = {"format": _FORMAT_SHARED if shared else _FORMAT}
        header |= {"layers": layers, "unreached": self.unreached}
        header |= {"shared": shared} if shared else {}
        header |= {n: getattr(self, n) for n in ("samples", "peak_bytes", "oddities", "held_out")}
        write_tensors(file, _KEY, header, tensors)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> "Moments":
        """Read what `save` wrote; a ValueError for a file that is damaged or another's."""
        with named_in_errors(file):
            header, tensors = read_tensors(file, _KEY, "moments", _FORMAT_SHARED, oldest=_FORMAT)
            layers = {}
            shared = typed(dict[str, str], header.get("shared", {}), "shared")
            if lost := [key for key, first in shared.items() if first not in tensors]:
                raise ValueError(f"damaged: it lacks what is shared by the moments {lost}")
            tensors |= {key: tensors[first] for key, first in shared.items()}
            samples, peak = (typed(int, header.get(n), n) for n in ("samples", "peak_bytes"))
            for name, entry in typed(dict[str, _Entry], header.get("layers"), "layers").items():
                keys = {part: f"{name}/{part}" for part in (*TENSORS, *_HELD)}
                held = {part: tensors.pop(key) for part, key in keys.items() if key in tensors}
                second = "rows" if "rows" in held else "matrix"
                needed = ("mean",) if entry.spec.lookup else ("mean", second)
                if lacking := [keys[part] for part in needed if part not in held]:
                    raise ValueError(f"damaged: it lacks the moments {lacking}")
                outside = [held.pop(part) for part in _HELD if part in held]
                patches = HeldPatches(*outside) if len(outside) == len(_HELD) else None
                layers[name] = LayerMoments(
                    entry.spec, entry.count, sizes=entry.sizes, held=patches, samples=samples,
                    **held,
                )  # fmt: skip
                if problem := _problem(layers[name]):
                    raise ValueError(f"damaged: layer {name!r}: {problem}")
            if tensors:
                raise ValueError(f"damaged: no layer has the moments {[*tensors]}")
            unreached = typed(tuple[str, ...], header.get("unreached"), "unreached")
            odd = typed(dict[str, str], header.get("oddities", {}), "oddities")
            held_out = typed(int, header.get("held_out", 0), "held_out")
            return cls(layers, unreached, samples, peak, odd, held_out)


@dataclass(frozen=True)
class _Entry:
    """What the header says of a layer."""

    spec: LayerSpec
    count: int
    sizes: tuple[tuple[int, ...], ...]


def _problem(moments: LayerMoments) -> str | None:
    """What cannot be true of any layer's inputs; None if nothing is found."""
    spec, rows = moments.spec, moments.count
    if is_widest(spec) and moments.rows is not None:
        rows = min(rows, moments.rows.shape[1])
    shapes = {
        "mean": (spec.groups, spec.fan_in),
        "matrix": (spec.groups, spec.fan_in, spec.fan_in),
        "rows": (spec.groups, rows, spec.fan_in),
        "gradient": (spec.out_channels, spec.out_channels),
    }
    if held := moments.held:
        count = len(held.owners) if held.owners.dim() == 1 else -1
        patches = (1, count) if spec.lookup else (spec.groups, count, spec.fan_in)
        shapes |= {"held_rows": patches, "held_owners": (count,)}
        if held.owners.dtype != torch.int64 or not count:
            return "held_owners holds no numbers of samples"
    for part, tensor in moments.tensors().items():
        if tuple(tensor.shape) != shapes[part]:
            return f"{part} of shape {tuple(tensor.shape)}, expected {shapes[part]}"
        if part == "held_rows" and spec.lookup:
            whole = tensor.dtype == torch.int64
            if not whole or not bool(((tensor >= 0) & (tensor < spec.in_channels)).all()):
                return f"{part} holds other numbers than those of rows"
            continue
        if part == "held_owners":
            continue
        if tensor.dtype not in (torch.float32, torch.float64) or not bool(tensor.isfinite().all()):
            return f"{part} holds NaN or infinities, or no floating-point numbers"
        if part in ("matrix", "gradient") and bool((tensor.diagonal(dim1=-2, dim2=-1) < 0).any()):
            return f"{part} has squares below 0 on its diagonal"
    for size in moments.sizes:
        if not spec.takes(Call(1, size)):
            return f"inputs of size {size}"
    if moments.samples is not None and moments.samples < 0:
        return f"{moments.samples} samples"
    return None if moments.count > 0 else f"{moments.count} patches, expected some"
