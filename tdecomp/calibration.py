"""One pass over unlabelled batches: what every layer of a model saw."""

import json
import os
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from tdecomp.batches import (
    Batches,
    Forward,
    count_samples,
    device_of,
    in_parts,
    tensors_of,
)
from tdecomp.layer import LayerSpec
from tdecomp.linalg import undisturbed
from tdecomp.moments import Accumulator, LayerMoments, output_rows
from tdecomp.sites import Site, find_sites
from tdecomp.tracing import no_fast_path, untouched

# Examples whose gradients say how much each layer's outputs matter: ranks need no more.
_GRADIENT_SAMPLES = 128
# Of these at a time the activations are kept.
_GRADIENTS_AT_A_TIME = 16


class Moments(Mapping[str, LayerMoments]):
    """What every layer of a model saw, by the layer's name.

    >>> moments = tdecomp.calibrate(model, batches)            # doctest: +SKIP
    >>> moments.save("moments.safetensors")                    # doctest: +SKIP
    >>> halves = calibrate(model, first) + calibrate(model, second)  # doctest: +SKIP

    Attributes
    ----------
    layers : dict of str to LayerMoments
    unreached : tuple of str
        Layers that no batch reached; they are fitted by their weights.
    samples : int
        Examples that were run.
    peak_bytes : int
        The most that the sums held at a time.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerMoments],
        unreached: tuple[str, ...] = (),
        samples: int = 0,
        peak_bytes: int = 0,
    ) -> None:
        self.layers = dict(layers)
        self.unreached = unreached
        self.samples = samples
        self.peak_bytes = peak_bytes
        # Fits that were made to choose ranks, so that the next budget finds them.
        self.fits: dict[Any, dict[Any, Any]] = {}

    def __getitem__(self, name: str) -> LayerMoments:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        few = sum(layer.few for layer in self.layers.values())
        words = f"moments of {len(self)} layers from {self.samples:,} samples"
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
        for name in self.layers.keys() & other.layers.keys():
            mine, others = self.layers[name], other.layers[name]
            if mine.spec != others.spec:
                raise ValueError(
                    f"layer {name!r}: moments of {mine.spec} and of {others.spec} cannot be "
                    "merged; expected two calibrations of one model"
                )
            both[name] = mine.merged(others, self.samples / max(self.samples + other.samples, 1))
        return Moments(
            both,
            tuple(name for name in self.unreached if name not in both),
            self.samples + other.samples,
            max(self.peak_bytes, other.peak_bytes),
        )

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write them to a safetensors file; `Moments.load` reads it."""
        tensors = {
            f"{name}/{part}": getattr(layer, part).contiguous()
            for name, layer in self.layers.items()
            for part in _TENSORS
            if getattr(layer, part) is not None
        }
        layers = {
            name: {
                "spec": layer.spec.to_dict(),
                "count": layer.count,
                "sizes": [list(size) for size in layer.sizes],
            }
            for name, layer in self.layers.items()
        }
        header = {
            "format": _FORMAT,
            "layers": layers,
            "unreached": self.unreached,
            "samples": self.samples,
            "peak_bytes": self.peak_bytes,
        }
        save_file(tensors, file, {"tdecomp_moments": json.dumps(header)})

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> "Moments":
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            If the file holds no moments, those of a newer format, or is damaged.
        """
        try:
            with safe_open(file, "pt") as opened:
                text = (opened.metadata() or {}).get("tdecomp_moments")
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file}: not a safetensors file: {error}") from error
        if text is None:
            raise ValueError(f"{file}: holds no moments; expected a file that Moments.save wrote")
        try:
            header = json.loads(text)
            if header["format"] != _FORMAT:
                raise ValueError(
                    f"{file}: moments format {header['format']!r}; this version reads {_FORMAT}"
                )
            _check_tensors(file, header["layers"], tensors)
            layers = {
                name: LayerMoments(
                    spec=LayerSpec.from_dict(entry["spec"]),
                    count=entry["count"],
                    sizes=tuple(tuple(size) for size in entry["sizes"]),
                    **{part: tensors.get(f"{name}/{part}") for part in _TENSORS},  # type: ignore[arg-type]
                )
                for name, entry in header["layers"].items()
            }
            return cls(layers, tuple(header["unreached"]), header["samples"], header["peak_bytes"])
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file}: its header is not that of moments ({type(error).__name__}: {error}); "
                "expected a file that Moments.save wrote"
            ) from error


def _check_tensors(file: Any, names: Collection[str], tensors: Collection[str]) -> None:
    lacking = [f"{name}/mean" for name in names if f"{name}/mean" not in tensors]
    lacking += [
        f"{name}/matrix"
        for name in names
        if f"{name}/matrix" not in tensors and f"{name}/rows" not in tensors
    ]
    if lacking:
        raise ValueError(
            f"{file}: lacks the moments {', '.join(map(repr, lacking))}; the file is damaged"
        )


_FORMAT = 1
_TENSORS = ("mean", "matrix", "rows", "gradient")


def calibrate(
    model: nn.Module,
    batches: Any,
    *,
    forward: Forward | None = None,
    max_batches: int | None = None,
    max_memory: int | None = None,
    gradients: bool = True,
    progress: bool = True,
) -> Moments:
    """Run unlabelled batches through a model and sum up what each layer sees.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> moments = calibrate(model, [torch.randn(8, 3, 8, 8)], progress=False)
    >>> moments["2"].matrix.shape
    torch.Size([1, 72, 72])

    Memory is fan_in · min(fan_in, patches) for each layer, whatever the number of batches. The
    model runs in eval mode and is left as it was.

    Parameters
    ----------
    model : nn.Module
    batches : iterable of batches
        A DataLoader, or any iterable of tensors, tuples or dicts: what the model takes, labels
        (further items of a tuple) ignored. A single tensor is one batch.
    forward : callable ``(model, batch) -> output``, optional
        How the model is called, where the batch is not simply its arguments.
    max_batches : int, optional
    max_memory : int, optional
        Bytes that the sums may hold at a time: layers are done in groups, one pass over the
        batches each, which must then be a list or a DataLoader.
    gradients : bool
        Also take, from the first few batches, the gradients at the layers' outputs, by which a
        whole-model budget weighs the layers.
    progress : bool
        Show a bar over the batches.

    Returns
    -------
    Moments
        Of every layer that can be decomposed and that the batches reach. Transposed convolutions
        have none: they are fitted by their weights.

    Raises
    ------
    ValueError
        For no batches, batches that the model rejects, NaN or infinities in a layer's inputs.
    """
    sites, _ = find_sites(model)
    layers = {s.name: s.module for s in sites if s.reason is None and watchable(s.spec)}
    return calibrate_layers(
        model,
        layers,
        Batches(batches, "calibrate", forward, max_batches),
        max_memory=max_memory,
        gradients=gradients,
        progress=progress,
    )


@dataclass(frozen=True)
class Source:
    """Unlabelled data as a user hands it over: batches, or moments already taken from them."""

    data: Any = None
    forward: Forward | None = None
    max_batches: int | None = None
    max_memory: int | None = None
    progress: bool = True

    def batches(self, wanted_by: str) -> Batches:
        """The batches, for steps that moments are not enough for."""
        if self.data is None or isinstance(self.data, Moments):
            got = "none" if self.data is None else "moments"
            raise ValueError(
                f"{wanted_by} runs the model on batches, got {got}; expected data= to be a "
                "DataLoader or a list of batches"
            )
        return Batches(self.data, wanted_by, self.forward, self.max_batches)

    def moments(
        self, model: nn.Module, sites: Sequence[Site], wanted: Collection[str], *, gradients: bool
    ) -> Moments | None:
        """Moments of the wanted sites, taken now unless they were handed over; None without data.

        Raises
        ------
        ValueError
            For moments of another model or of inputs of another size, and as `calibrate`.
        """
        if self.data is None:
            return None
        if isinstance(self.data, Moments):
            _check_fit(self.data, sites)
            return self.data
        layers = {s.name: s.module for s in sites if s.name in wanted and watchable(s.spec)}
        return calibrate_layers(
            model,
            layers,
            self.batches("data"),
            max_memory=self.max_memory,
            gradients=gradients,
            progress=self.progress,
        )


def _check_fit(moments: Moments, sites: Sequence[Site]) -> None:
    known = {name: site for site in sites for name in site.names}
    for name, layer in moments.items():
        site = known.get(name)
        if site is None or site.spec != layer.spec:
            found = "no such layer" if site is None else str(site.spec)
            raise ValueError(
                f"layer {name!r}: the moments are of {layer.spec}, the model has {found}; expected "
                "moments of this very model: calibrate(model, batches) takes them"
            )
        for call in site.calls or ():
            if layer.sizes and call.size not in layer.sizes:
                seen = ", ".join("×".join(map(str, size)) for size in layer.sizes[:3])
                asked = "×".join(map(str, call.size))
                raise ValueError(
                    f"layer {name!r}: the moments are of inputs of size {seen}, the example inputs "
                    f"give it {asked}; expected both to be of one size: calibrate with images as "
                    "large as example_inputs"
                )


def watchable(spec: LayerSpec | None) -> bool:
    """Whether an output of such a layer is a product with a patch of its input."""
    return spec is not None and not spec.transposed


def calibrate_layers(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Batches,
    *,
    max_memory: int | None = None,
    gradients: bool = False,
    progress: bool = True,
) -> Moments:
    """`calibrate` for some layers, by name."""
    found: dict[str, LayerMoments] = {}
    samples = peak = 0
    groups = [list(layers)]
    if max_memory is not None:
        groups = _grouped(model, layers, batches, max_memory)
    if len(groups) > 1:
        batches.again("a max_memory")
    for number, names in enumerate(groups, 1):
        watched = {name: layers[name] for name in names}
        title = "calibrate" if len(groups) == 1 else f"calibrate {number}/{len(groups)}"
        sums, slopes, samples, held = _one_pass(model, watched, batches, title, gradients, progress)
        peak = max(peak, held)
        for name in names:
            moments = sums.pop(name).finish(slopes.get(name))
            if moments is not None:
                _check_finite(name, moments)
                found[name] = moments
    unreached = tuple(name for name in layers if name not in found)
    moments_of_all = Moments(found, unreached, samples, peak)
    if progress:
        tqdm.write(f"calibrate: {moments_of_all!r}", file=sys.stderr)
    return moments_of_all


def _one_pass(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Batches,
    title: str,
    gradients: bool,
    progress: bool,
) -> tuple[dict[str, Accumulator], dict[str, Tensor], int, int]:
    sums = {name: Accumulator(_spec(layer)) for name, layer in layers.items()}
    slopes = _Slopes(layers) if gradients else None
    samples = peak = 0
    watching = True

    def watch(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if watching:
            sums[name].add(next(iter((*args, *kwargs.values()))))

    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(no_fast_path())
        stack.enter_context(torch.inference_mode(False))
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: watch(name, args, kwargs), with_kwargs=True
            )
            stack.callback(handle.remove)
        for batch in batches.bar(device_of(model), title, progress):
            with torch.no_grad():
                batches.run(model, batch)
            if slopes is not None and samples < _GRADIENT_SAMPLES:
                watching = False
                try:
                    slopes.add(model, batch, batches, _GRADIENT_SAMPLES - samples)
                except Exception as error:  # the model runs forwards, as has just been seen
                    slopes = None
                    warnings.warn(
                        "calibrate: no gradients can be taken through this model, so that a budget "
                        f"will weigh its layers alike ({type(error).__name__}: {error})",
                        stacklevel=4,
                    )
                watching = True
            samples += count_samples(batch)
            peak = max(peak, sum(s.nbytes for s in sums.values()))
    return sums, {} if slopes is None else slopes.finish(), samples, peak


class _Slopes:
    """Gradients at the layers' outputs, of random mixtures of the model's outputs.

    For outputs z and v ~ N(0, I), ``E[(∂vᵀz/∂y)(∂vᵀz/∂y)ᵀ] = Jᵀ J``: by how much a small error in
    y changes the square of the model's outputs, as in the Fisher information of a Gaussian
    (Martens and Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", section 2). No labels, and no assumption on what the outputs mean.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._sums: dict[str, Tensor] = {}
        self._samples = 0
        self._generator = torch.Generator("cpu").manual_seed(0)

    def add(self, model: nn.Module, batch: Any, batches: Batches, most: int) -> None:
        """Run the first samples of a batch forwards and backwards, a few at a time.

        Where the model takes no part of the batch, as of a long sequence, all of it at once.
        """
        parts = in_parts(batch, _GRADIENTS_AT_A_TIME, most)
        try:
            for few in parts:
                self._add(model, few, batches)
        except Exception:
            if len(parts) == 1:
                raise
            self._add(model, batch, batches)

    def _add(self, model: nn.Module, batch: Any, batches: Batches) -> None:
        anchors: list[Tensor] = []

        def mark(name: str, output: Tensor) -> Tensor:
            if not output.requires_grad:  # nothing before it does: the graph begins here
                output = output.detach().requires_grad_()
                anchors.append(output)
            output.register_hook(lambda slope: self._take(name, slope))
            return output.clone()  # what follows may change it in place

        with ExitStack() as stack:
            stack.enter_context(_frozen(model))
            for name, layer in self._layers.items():
                handle = layer.register_forward_hook(
                    lambda _, __, output, name=name: mark(name, output)
                )
                stack.callback(handle.remove)
            with torch.enable_grad():
                outputs = [z for z in tensors_of(batches.run(model, batch)) if z.requires_grad]
                if not outputs:
                    return
                mixed = [
                    (z * torch.randn(z.shape, generator=self._generator, device="cpu").to(z)).sum()
                    for z in outputs
                ]
                torch.autograd.grad(torch.stack(mixed).sum(), anchors, allow_unused=True)
        self._samples += count_samples(batch)

    def _take(self, name: str, slope: Tensor) -> None:
        with undisturbed(slope.device):
            rows = output_rows(slope, _spec(self._layers[name])).float()
            product = (rows.T @ rows).double()
            self._sums[name] = self._sums[name] + product if name in self._sums else product

    def finish(self) -> dict[str, Tensor]:
        found = {name: total / max(self._samples, 1) for name, total in self._sums.items()}
        return {name: g for name, g in found.items() if bool(torch.isfinite(g).all())}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside, so that only activations are kept for it."""
    # Inference tensors take no gradient anyway, and could not be told to again.
    trained = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _grouped(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches, max_memory: int
) -> list[list[str]]:
    """Layers in groups whose sums stay under the limit, as far as the first batch tells."""
    batches.again("a max_memory")
    first = next(batches.on(device_of(model)))
    rows = dict.fromkeys(layers, 0)

    def count(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        spec, x = _spec(layers[name]), next(iter((*args, *kwargs.values())))
        call = spec.call(x.shape)
        positions = 1
        for size in spec.output_size(call.size):
            positions *= size
        rows[name] += call.batch * positions

    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(no_fast_path())
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: count(name, args, kwargs), with_kwargs=True
            )
            stack.callback(handle.remove)
        with torch.no_grad():
            batches.run(model, first)
    groups: list[list[str]] = []
    free = 0
    for name, layer in layers.items():
        spec = _spec(layer)
        wide, known = spec.groups * spec.fan_in, rows[name] * len(batches)
        each = 8 if next(layer.parameters()).dtype == torch.float64 else 4
        need = 8 * wide * spec.fan_in if not 0 < known < spec.fan_in else each * wide * known
        if need > max_memory:
            raise ValueError(
                f"calibrate: layer {name!r} ({spec}) alone needs {need:,} bytes; expected "
                f"max_memory of at least that, got {max_memory:,}; fewer batches (max_batches) "
                f"need less, as does a plan or decompose with exclude=[{name!r}]"
            )
        if not groups or need > free:
            groups.append([])
            free = max_memory
        groups[-1].append(name)
        free -= need
    return groups


def _check_finite(name: str, moments: LayerMoments) -> None:
    matrix = moments.matrix
    # Whatever is not finite in the rest of a second moment is not on its diagonal either.
    diagonal = None if matrix is None else matrix.diagonal(dim1=1, dim2=2)
    for part in (diagonal, moments.rows, moments.mean):
        if part is not None and not bool(torch.isfinite(part).all()):
            raise ValueError(
                f"calibrate: layer {name!r} ({moments.spec}): its inputs hold NaN or infinities; "
                "expected finite activations. Look at the batches and at the layers before it"
            )


def _spec(layer: nn.Module) -> LayerSpec:
    """Of a layer, or of the one that a chain replaced."""
    return getattr(layer, "replaced", None) or LayerSpec.of(layer)
