"""One pass over unlabelled batches: what every layer of a model saw."""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tdecomp.calibration.accumulator import Accumulator
from tdecomp.calibration.augment import PASSES, Augment, variants
from tdecomp.calibration.gradients import OutputGradients
from tdecomp.calibration.layer_moments import LayerMoments
from tdecomp.calibration.moments import Moments
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.batches import Batches, Forward, count_samples, device_of
from tdecomp.model.sites import find_sites
from tdecomp.torch_state import no_fast_path, untouched

# Examples whose gradients say how much each layer's outputs matter: ranks need no more.
_GRADIENT_SAMPLES = 128
# Patches for each entry of one, from which on a layer needs no variants of the batches.
_ENOUGH = 16


def calibrate(
    model: nn.Module,
    batches: Any,
    *,
    forward: Forward | None = None,
    max_batches: int | None = None,
    max_memory: int | None = None,
    gradients: bool = True,
    augment: Augment | None = None,
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
    augment : callable ``(batch, generator) -> batch``, optional
        Varies batches, in further passes for layers that the batches hold few patches for:
        `tdecomp.flip_and_shift` for pictures. A fit to few patches is good on these alone, and a
        budget would take it for better than it is.
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
    sites = find_sites(model).values()
    layers = {s.name: s.module for s in sites if s.reason is None and watchable(s.spec)}
    return calibrate_layers(
        model,
        layers,
        Batches(batches, "calibrate", forward, max_batches),
        max_memory=max_memory,
        gradients=gradients,
        augment=augment,
        progress=progress,
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
    augment: Augment | None = None,
    progress: bool = True,
) -> Moments:
    """`calibrate` for some layers, by name."""
    found: dict[str, LayerMoments] = {}
    samples = peak = 0
    groups = [list(layers)]
    if max_memory is not None:
        groups = _grouped(model, layers, batches, max_memory, 1 if augment is None else PASSES)
    if augment is not None:
        batches.again("augment")
    for number, names in enumerate(groups, 1):
        watched = {name: layers[name] for name in names}
        title = "calibrate" if len(groups) == 1 else f"calibrate {number}/{len(groups)}"
        sums, slopes, samples, held = _summed(
            model, watched, batches, title, gradients, augment, progress
        )
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


def _summed(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Batches,
    title: str,
    gradients: bool,
    augment: Augment | None,
    progress: bool,
) -> tuple[dict[str, Accumulator], dict[str, Tensor], int, int]:
    sums = {name: Accumulator(_spec(layer)) for name, layer in layers.items()}
    slopes = None
    if gradients:
        slopes = OutputGradients({name: (layer, _spec(layer)) for name, layer in layers.items()})
    samples = peak = 0
    watching = True
    enough: set[str] = set()

    def watch(name: str, x: Tensor) -> None:
        if watching and name not in enough:
            sums[name].add(x)

    with _inputs_shown(model, layers, watch), torch.inference_mode(False):
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
        for batch in variants(batches, device_of(model), augment):
            enough.update(n for n, s in sums.items() if s.count >= _ENOUGH * s.spec.fan_in)
            if len(enough) == len(sums):
                break
            with torch.no_grad():
                batches.run(model, batch)
            peak = max(peak, sum(s.nbytes for s in sums.values()))
    return sums, {} if slopes is None else slopes.finish(), samples, peak


@contextmanager
def _inputs_shown(
    model: nn.Module, layers: Mapping[str, nn.Module], show: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Each call of one of the layers is shown first, by name and input; the model is left as is."""
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(no_fast_path())
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: show(
                    name, next(iter((*args, *kwargs.values())))
                ),
                with_kwargs=True,
            )
            stack.callback(handle.remove)
        yield


def _grouped(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Batches,
    max_memory: int,
    passes: int,
) -> list[list[str]]:
    """Layers in groups whose sums stay under the limit, as far as the first batch tells."""
    batches.again("a max_memory")
    first = next(batches.on(device_of(model)))
    rows = dict.fromkeys(layers, 0)

    def count(name: str, x: Tensor) -> None:
        spec = _spec(layers[name])
        call = spec.call(x.shape)
        positions = 1
        for size in spec.output_size(call.size):
            positions *= size
        rows[name] += call.batch * positions

    with _inputs_shown(model, layers, count), torch.no_grad():
        batches.run(model, first)
    groups: list[list[str]] = []
    free = 0
    for name, layer in layers.items():
        spec = _spec(layer)
        wide, known = spec.groups * spec.fan_in, rows[name] * len(batches) * passes
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
