"""One pass over unlabelled batches, for the moments of the inputs of a model's layers."""

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.calibration.accumulator import Accumulator, enough
from tdecomp.calibration.augment import Augment
from tdecomp.calibration.counted_rows import CountedRows
from tdecomp.calibration.held_patches import HeldPatches
from tdecomp.calibration.held_sample import HeldSample
from tdecomp.calibration.layer_inputs import Layers, shown_inputs
from tdecomp.calibration.layer_moments import LayerMoments
from tdecomp.calibration.memory_groups import memory_groups
from tdecomp.calibration.moments import Moments
from tdecomp.calibration.opening import opened_for
from tdecomp.calibration.output_gradients import OutputGradients
from tdecomp.calibration.passes import Batches, batches_for
from tdecomp.calibration.row_counts import RowCounts
from tdecomp.calibration.shared_sums import SharedSums
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.batches import Forward, count_samples, device_of
from tdecomp.model.sites import Site, find_sites
from tdecomp.model.trace import OddUses
from tdecomp.runtime.torch_state import evaluating, exact_passes, no_inference_mode, restoring

_GRADIENT_SAMPLES = 128  # weighing layers needs output gradients of no more samples
_ENOUGH = 16  # patches for each entry of a patch, with which no variants are needed
_MOST = 2**16  # patches of a layer that are summed up, as long as there are enough of them


def calibrate(
    model: nn.Module,
    batches: Any,
    *,
    forward: Forward | None = None,
    max_batches: int | None = None,
    max_memory: int | None = None,
    gradients: bool = True,
    augment: Augment | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> Moments:
    """Run unlabelled batches through a model and sum up the moments of each layer's inputs.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> moments = calibrate(model, [torch.randn(8, 3, 8, 8)], progress=False)
    >>> moments["2"].matrix.shape
    torch.Size([1, 72, 72])

    A layer needs memory for fan_in · min(fan_in, patches) numbers, however many batches there are.
    The model runs in eval mode and is left as it was.

    Parameters
    ----------
    model : nn.Module
        The one whose layers are going to be decomposed.
    batches, max_batches
        As for `tdecomp.Data`; a Data, which may also hold a mask, is taken for both.
    forward : callable ``(model, batch) -> output``, optional
        How the model is called, if not with the batch as its arguments.
    max_memory : int, optional
        Bytes that the sums may hold at a time, by default half of what is free: layers are done
        in groups, one pass over the batches each, which must then be a list or a DataLoader.
    gradients : bool
        Also take, from the first few batches, the gradients at the layers' outputs, by which a
        whole-model budget weighs the layers.
    augment : callable ``(batch, generator) -> batch``, optional
        Varies batches, in further passes for layers that see few patches, whose errors would
        otherwise come out too low: `tdecomp.flip_and_shift` for images. A `Data`'s is ignored.
    seed : int, optional
        Of gradients, `augment`, and a DataLoader that shuffles; without it, the same each time
        except for the DataLoader.
    progress : bool
        Show a bar over the batches.

    Returns
    -------
    Moments
        For every layer that can be decomposed and that the batches reach, except transposed
        convolutions, which are fitted by their weights.

    Raises
    ------
    ValueError
        If there are no batches, the model rejects one, a layer's inputs hold NaN or infinities, or
        the mask fits no layer.
    """
    given = batches_for(
        "calibrate", batches, forward=forward, seed=seed, progress=progress,
        max_batches=max_batches, max_memory=max_memory,
    )  # fmt: skip
    given = given.varied_by(augment)
    # Another thread's hooks would be a reason to leave layers alone.
    with restoring(model, seed=seed), opened_for(model, data=given):
        sites = find_sites(model).values()
        layers = {s.name: s.module for s in sites if s.reason is None and watchable(s.spec)}
        return calibrate_layers(model, layers, given, gradients=gradients, variants=True)


def site_moments(
    model: nn.Module,
    sites: Sequence[Site],
    wanted: Collection[str],
    data: Batches | Moments | None,
    *,
    gradients: bool,
    variants: bool = False,
) -> Moments | None:
    """The moments of the wanted sites, taken now unless `data` are moments; None without data."""
    if isinstance(data, Moments):
        data.check_fit(sites)
    if data is None or isinstance(data, Moments):
        return data
    layers = {s.name: s.module for s in sites if s.name in wanted and watchable(s.spec)}
    return calibrate_layers(model, layers, data, gradients=gradients, variants=variants)


def watchable(spec: LayerSpec | None) -> bool:
    """Whether an output of such a layer is a product with a patch of its input."""
    return unwatched(spec) is None


def unwatched(spec: LayerSpec | None) -> str | None:
    """Why no moments are taken of the inputs of such a layer; None if they are."""
    if spec is None:
        return "its sizes are not known"
    return f"no moments of a {spec.kind}" if spec.transposed or spec.kind in _UNWATCHED else None


# Whose outputs are no products of one matrix with each patch.
_UNWATCHED = ("EmbeddingBag", "GroupedLinear")


def calibrate_layers(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Batches,
    *,
    gradients: bool = False,
    variants: bool = False,
) -> Moments:
    """`calibrate` for some layers, by name; `variants` are for those that see few patches."""
    if not variants:
        batches = batches.varied_by(None)
    batches = batches.taken_by(model)
    # With the spec of a layer, or of the layer that a chain replaced.
    known = {n: (m, getattr(m, "replaced", None) or LayerSpec.of(m)) for n, m in layers.items()}
    groups = memory_groups(model, known, batches)
    if batches.data.augment is not None:
        batches.require_several_passes("augment")
    moments, rows = Moments({}), CountedRows(batches)
    for number, group in enumerate(groups, 1):
        title = "calibrate" if len(groups) == 1 else f"calibrate {number}/{len(groups)}"
        _add_pass(moments, model, group, batches, rows, title, gradients)
    if layers:
        rows.check_used()
    moments.unreached = tuple(name for name in layers if name not in moments)
    return moments


def _add_pass(
    moments: Moments,
    model: nn.Module,
    layers: Layers,
    batches: Batches,
    rows: CountedRows,
    title: str,
    gradients: bool,
) -> None:
    """Add what one pass over the batches, and further ones over variants, show of these layers."""
    specs = {name: spec for name, (_, spec) in layers.items()}
    keys = {name: _inputs_key(spec) for name, spec in specs.items()}
    sums = SharedSums(keys, lambda name: _accumulator(specs[name]))
    held = SharedSums(keys, lambda name: HeldSample(specs[name], batches.seed or 0))
    slopes = OutputGradients(layers, batches) if gradients else None
    uses = OddUses({name: layer for name, (layer, _) in layers.items()})
    moments.samples, outside = 0, 0

    def add(name: str, x: Tensor) -> None:
        sums.add(name, x, lambda total: total.add(rows.of_layer(x, specs[name])))

    def draw(batch: Any, first: int) -> None:
        samples = range(first, first + count_samples(batch))
        rows.begin(batch)
        held.begin()

        def keep(name: str, x: Tensor) -> None:
            held.add(name, x, lambda sample: sample.add(x, rows, samples))

        with shown_inputs(keep, layers), torch.no_grad(), uses:
            batches.run(model, batch)

    def run(batch: Any, names: Iterable[str]) -> None:
        rows.begin(batch)
        sums.begin()
        with shown_inputs(add, {name: layers[name] for name in names}), torch.no_grad(), uses:
            batches.run(model, batch)
        moments.peak_bytes = max(moments.peak_bytes, sum(s.nbytes for s in sums.sums()))

    device = device_of(model)
    with evaluating(model), exact_passes(), no_inference_mode():
        for batch, is_held in batches.bar_of_parts(device, title):
            if is_held:
                draw(batch, outside)
                outside += count_samples(batch)
                continue
            run(batch, layers)
            if slopes is not None and moments.samples < _GRADIENT_SAMPLES:
                try:
                    slopes.add(model, batch, _GRADIENT_SAMPLES - moments.samples)
                except Exception as error:  # the model runs forwards, as has just been seen
                    slopes = None
                    words = f"no gradients can be taken through this model ({error!r})"
                    warnings.warn(f"calibrate: {words}: budgets weigh layers alike", stacklevel=4)
            moments.samples += count_samples(batch)
        for batch in batches.variants(device):
            few = [name for name in layers if sums.of(name).sees_few(_ENOUGH)]
            if not few:
                break
            run(batch, few)
    moments.held_out = outside
    moments.oddities |= uses.found
    importance = {} if slopes is None else slopes.finish()
    outsides: dict[str, HeldPatches | None] = {}
    for sample, names in held.taken():
        outsides |= dict.fromkeys(names, sample.finish())
    taken: dict[str, LayerMoments] = {}
    for total, names in sums.taken():
        if (found := total.finish()) is not None:
            taken |= dict.fromkeys(names, found)
    for name in layers:
        if name in taken:
            moments.layers[name] = replace(
                taken.pop(name), spec=specs[name], gradient=importance.get(name),
                held=outsides.get(name), samples=moments.samples,
            )  # fmt: skip
            _check_finite(name, moments.layers[name])


def _accumulator(spec: LayerSpec) -> Accumulator | RowCounts:
    return RowCounts(spec) if spec.lookup else Accumulator(spec, _useful(spec))


def _inputs_key(spec: LayerSpec) -> tuple[int, int] | None:
    """Layers with the same key see the same patches of the same input; None for what may not."""
    return None if spec.ndim or spec.lookup else (spec.in_channels, spec.groups)


def _useful(spec: LayerSpec) -> int:
    """The number of patches beyond which a fit hardly gains: their sums cost fan_in² each."""
    return min(enough(spec), max(_MOST, _ENOUGH * spec.fan_in))


def _check_finite(name: str, moments: LayerMoments) -> None:
    mean, matrix = moments.mean, moments.matrix
    # A non-finite entry off the diagonal always shows on the diagonal too, one of rows in the mean.
    squares = mean if matrix is None else matrix.diagonal(dim1=1, dim2=2)
    patches = mean if moments.held is None else moments.held.rows
    if not bool((mean.isfinite() & squares.isfinite()).all() and patches.isfinite().all()):
        raise ValueError(
            f"calibrate: layer {name!r} ({moments.spec}): its inputs hold NaN or infinities, or "
            "numbers too large to be squared; expected finite activations. Look at the batches and "
            "at the layers before it"
        )
