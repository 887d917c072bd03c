"""The moments of the inputs of one layer, and of all layers of a model."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from tdecomp.calibration.estimate import Estimate
from tdecomp.calibration.fit_cache import FitCache
from tdecomp.calibration.held_patches import HeldPatches
from tdecomp.calibration.precision import difference, precision_of, products
from tdecomp.files.tensors import read_tensors, write_tensors
from tdecomp.files.typed import typed
from tdecomp.files.whole_file import named_in_errors
from tdecomp.layers.spec import Call, LayerSpec
from tdecomp.linalg.second_moment import SecondMoment
from tdecomp.model.sites import Site

_KEY = "tdecomp_moments"
# Of a file that names each tensor once, and of one in which layers share tensors: versions that
# know only the first say of the other that it is a later one's.
_FORMAT, _FORMAT_SHARED = 1, 2
_TENSORS = ("mean", "matrix", "rows", "gradient")  # in LayerMoments
_HELD = ("held_rows", "held_owners")  # in its HeldPatches
# Entries of a matrix above which a sample of the patches is held instead, and entries of that.
_LARGEST_MATRIX, _SAMPLE, _LEAST_SAMPLE = 2**25, 2**24, 1024
_COLUMNS = 2048  # of a lookup's kernel that are converted at a time
Value = TypeVar("Value")


@dataclass(frozen=True)
class LayerMoments:
    """Moments of the inputs that one layer saw, and of the gradients at its outputs."""

    spec: LayerSpec
    count: int  # of input patches; for a Linear, of input vectors
    mean: Tensor  # (groups, fan_in), float64; of a lookup, how often each row is read
    matrix: Tensor | None = None  # E[x xᵀ], not centred: (groups, fan_in, fan_in)
    # The patches (groups, patches, fan_in) instead: all while there are fewer than fan_in, and a
    # random sample in the widest layers.
    rows: Tensor | None = None
    sizes: tuple[tuple[int, ...], ...] = ()  # the spatial sizes of the inputs
    gradient: Tensor | None = None  # E[g gᵀ], summed over positions: (out, out), float64
    held: HeldPatches | None = None  # of samples that are held out, in none of these moments
    samples: int | None = None  # independent of each other, as patches of one are not

    @property
    def few(self) -> bool:
        """Whether fewer patches are held than a patch has entries; a lookup needs no more."""
        return not self.spec.lookup and self.patches < self.spec.fan_in

    @property
    def patches(self) -> int:
        """The number of patches that the moments are made of, as far as single ones are held."""
        return self.count if self.rows is None else self.rows.shape[1]

    @property
    def sampled(self) -> bool:
        """Whether the rows are a sample of the patches."""
        return self.patches < self.count

    def __getstate__(self) -> dict[str, Any]:
        """The fields: what `single` keeps is computed again where it is needed."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by the name of the field."""
        named = {name: getattr(self, name) for name in _TENSORS}
        if self.held is not None:
            named |= {"held_rows": self.held.rows, "held_owners": self.held.owners}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @cached_property
    def single(self) -> list[SecondMoment]:
        """`second_moments` in single precision, kept."""
        return self.second_moments(torch.float32)

    def second_moments(self, dtype: torch.dtype | None = None) -> list[SecondMoment]:
        """One for each group; about the mean where the layer has a bias, which can correct it.

        In double precision by default, a sample of the patches in its own.
        """
        mean, bias = self.mean[:, None], self.spec.bias
        if self.spec.lookup:
            return [SecondMoment(diagonal=self.mean[0].to(dtype or torch.float64))]
        if self.rows is None:
            matrix = self._as_matrix()
            if bias:  # subtracted in the precision that the matrix was found to need
                precise = torch.promote_types(matrix.dtype, dtype or torch.float64)
                about = mean.to(precise)
                matrix = matrix.to(precise, copy=True).baddbmm_(about.mT, about, alpha=-1)
            return [SecondMoment(matrix=group.to(dtype or torch.float64)) for group in matrix]
        dtype = dtype or (self.rows.dtype if self.sampled else torch.float64)
        rows = self.rows.to(dtype, copy=True)
        if bias:
            rows -= mean.to(dtype)
        rows /= max(rows.shape[1], 1) ** 0.5
        return [SecondMoment(rows=group) for group in rows]

    def shrunk(self, second: Sequence[SecondMoment]) -> Sequence[SecondMoment]:
        """`second_moments` as fits lean on them, which would follow the noise of few samples.

        They are those of one sample more, whose inputs vary alike in all directions: the posterior
        mean where the prior, an inverse Wishart distribution, weighs as much as one sample.
        """
        return [moment.shrunk(1 / self.samples) for moment in second] if self.samples else second

    def output_variance(
        self, weight: Tensor, second: Sequence[SecondMoment] | None = None
    ) -> float:
        """``E‖y − E y‖²`` of the layer's outputs with this weight."""
        if self.spec.lookup:
            (kernel,), about = self._kernels(weight), self.mean_output(weight)[:, None]
            parts = zip(kernel.split(_COLUMNS, 1), self.mean[0].split(_COLUMNS), strict=True)
            return sum(float(((k.double() - about).square() @ often).sum()) for k, often in parts)
        if second is None or not self.spec.bias:
            second = replace(self, spec=replace(self.spec, bias=True)).second_moments()
        kernels = self._kernels(weight)
        return sum(m.lost(k) for m, k in zip(second, kernels, strict=True))

    def lost(
        self, weight: Tensor, difference: Tensor, second: Sequence[SecondMoment]
    ) -> tuple[float, float | None]:
        """The share ``E‖D x‖² / E‖W x − E[W x]‖²`` of the outputs' variance that is lost.

        D is a difference of weights in the layer's own layout, with the bias corrected for the
        mean. Also ``tr(H E[D x xᵀ Dᵀ])`` with H the gradients' second moment, None without.
        """
        kernels = self._kernels(difference)
        lost = sum(m.lost(d) for m, d in zip(second, kernels, strict=True))
        variance = self.output_variance(weight, second)
        share = lost / variance if variance > 0 else float(lost > 0)
        loss = self.weighted_loss(difference, second)
        return share, None if loss is None else max(loss, 0.0)

    def weighted_loss(self, difference: Tensor, second: Sequence[SecondMoment]) -> float | None:
        """``tr(H E[D x xᵀ Dᵀ])`` with H the gradients' second moment; None without."""
        blocks = self.gradient_blocks()
        if blocks is None:
            return None
        groups = zip(blocks, second, self._kernels(difference), strict=True)
        return sum(m.weighted_loss(d, block) for block, m, d in groups)

    def output_error(self, weight: Tensor, approximation: Tensor) -> float:
        """The share of the outputs' variance that another weight in this one's place loses."""
        gone = difference(weight, approximation)
        return self.lost(weight, gone, self.second_moments())[0]

    def held_error(self, weight: Tensor, approximation: Tensor) -> Estimate | None:
        """`output_error` on samples that are held out, the bias corrected; None without any."""
        if self.held is None:
            return None
        gone = difference(weight, approximation)
        shift = self.mean_output(gone) if self.spec.bias else None
        return self.held.error(self._kernels(weight), self._kernels(gone), shift)

    def mean_output(self, weight: Tensor) -> Tensor:
        """``W E[x]`` (out_channels,), without the bias."""
        kernels = self._kernels(weight)
        return torch.cat([products(k, mean) for k, mean in zip(kernels, self.mean, strict=True)])

    def kernels(self, weight: Tensor) -> list[Tensor]:
        """Each group's kernel as a float64 matrix (out / groups, fan_in)."""
        return self._matrices(weight.detach().double())

    def _kernels(self, weight: Tensor) -> list[Tensor]:
        """`kernels`, which large layers keep in float32."""
        return self._matrices(weight.detach().to(precision_of(weight)))

    def _matrices(self, weight: Tensor) -> list[Tensor]:
        kernel = self.spec.to_forward_layout(weight)
        return list(kernel.flatten(1).chunk(self.spec.groups))

    def gradient_blocks(self) -> list[Tensor] | None:
        """Each group's own block (out / groups, out / groups) of the gradient's second moment."""
        if self.gradient is None:
            return None
        size = self.spec.group_out
        places = range(0, self.spec.out_channels, size)
        return [self.gradient[at : at + size, at : at + size] for at in places]

    def merged(self, other: "LayerMoments", share: float) -> "LayerMoments":
        """The moments of both sets of inputs; `share` is this one's share of all samples."""
        gradient = self.merged_gradient(other, share)
        return replace(self.merged_inputs(other), gradient=gradient)

    def merged_inputs(self, other: "LayerMoments") -> "LayerMoments":
        """`merged`, without gradients."""
        other = other.to(self.mean.device)
        count = self.count + other.count
        mine, matrix, rows = self.count / count, None, None
        if self.rows is not None and other.rows is not None and is_widest(self.spec):
            rows = _sample_of_both(self.rows, other.rows, mine)
        elif self.rows is not None and other.rows is not None and count < self.spec.fan_in:
            rows = torch.cat([self.rows, other.rows], dim=1)
        elif not self.spec.lookup:
            matrix = mine * self._as_matrix() + (1 - mine) * other._as_matrix()
        mean = mine * self.mean + (1 - mine) * other.mean
        sizes = tuple(sorted({*self.sizes, *other.sizes}))
        held = self.held or other.held
        if self.held is not None and other.held is not None:
            held = self.held.merged(other.held)
        samples = self.samples and other.samples and self.samples + other.samples
        return LayerMoments(self.spec, count, mean, matrix, rows, sizes, None, held, samples)

    def merged_gradient(self, other: "LayerMoments", share: float) -> Tensor | None:
        """That of both sets of inputs; `share` is this one's share of all samples."""
        if self.gradient is None or other.gradient is None:
            return None
        return share * self.gradient + (1 - share) * other.gradient.to(self.gradient.device)

    def of_inputs(self) -> tuple[int, ...]:
        """What says which tensors, but for gradients, it has: layers may share them."""
        return tuple(id(t) for name, t in self.tensors().items() if name != "gradient")

    def _as_matrix(self) -> Tensor:
        if self.rows is not None:
            rows = self.rows.double()
            return rows.mT @ rows / rows.shape[1]
        assert self.matrix is not None
        return self.matrix

    def to(self, device: torch.device) -> "LayerMoments":
        held = {name: getattr(self, name) for name in (*_TENSORS, "held")}
        moved = {name: value.to(device) for name, value in held.items() if value is not None}
        return replace(self, **moved)


def is_widest(spec: LayerSpec) -> bool:
    """Whether a sample of the patches is held, as a matrix of moments would be too large."""
    return spec.fan_in**2 > _LARGEST_MATRIX


def sample_size(spec: LayerSpec) -> int:
    """The patches that are held of one of the widest layers."""
    return max(_SAMPLE // spec.fan_in, _LEAST_SAMPLE)


def _sample_of_both(mine: Tensor, others: Tensor, share: float) -> Tensor:
    """Rows of both samples in proportion."""
    most = min(mine.shape[1] / share, others.shape[1] / (1 - share))
    parts = []
    for rows, part in ((mine, share), (others, 1 - share)):
        places = torch.linspace(0, rows.shape[1] - 1, max(1, round(part * most))).long()
        parts.append(rows[:, places.to(rows.device)])
    return torch.cat(parts, dim=1)


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
                keys = {part: f"{name}/{part}" for part in (*_TENSORS, *_HELD)}
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
