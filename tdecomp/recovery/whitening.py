"""Weights in coordinates in which the inputs of their layer vary alike in all directions.

Steps of equal length then change the outputs alike. Desjardins et al. 2015, "Natural Neural
Networks", section 3.1: ``V = W U Λ^½`` for inputs with the second moment ``U Λ Uᵀ``.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.calibration.accumulator import Accumulator, enough
from tdecomp.calibration.calibrate import watchable
from tdecomp.calibration.counted_rows import CountedRows
from tdecomp.calibration.layer_moments import LayerMoments
from tdecomp.layers.spec import LayerSpec, kind_of
from tdecomp.model.batches import count_samples
from tdecomp.runtime.torch_state import hooks

# Added to the eigenvalues, as a share of their mean.
_DAMPING = 1e-2
# With more inputs, the change of coordinates costs more than the steps themselves.
_MOST_INPUTS = 1024


@dataclass(frozen=True)
class Basis:
    """The coordinates of one layer's weight."""

    spec: LayerSpec
    inward: Tensor  # U Λ^½ (groups, fan_in, fan_in)
    outward: Tensor  # U Λ^-½

    @classmethod
    def of(cls, moments: LayerMoments) -> "Basis":
        eye = torch.eye(moments.spec.fan_in, dtype=torch.float64, device=moments.mean.device)
        matrix = torch.stack([second.applied(eye) for second in moments.second_moments()])
        values, vectors = torch.linalg.eigh(matrix)
        values = values.clamp_min(0.0)
        roots = (values + _DAMPING * values.mean(dim=1, keepdim=True)).sqrt()[:, None]
        return cls(moments.spec, (vectors * roots).float(), (vectors / roots).float())

    def inwards(self, weight: Tensor) -> Tensor:
        """The coordinates V of a weight, in its own layout."""
        return self._times(weight, self.inward)

    def outwards(self, coordinates: Tensor) -> Tensor:
        return self._times(coordinates, self.outward.mT)

    def slope(self, gradient: Tensor) -> Tensor:
        """The gradient by V, of that by the weight."""
        return self._times(gradient, self.outward)

    def _times(self, weight: Tensor, matrix: Tensor) -> Tensor:
        spec = self.spec
        kernel = spec.to_forward_layout(weight)
        moved = kernel.reshape(spec.groups, -1, spec.fan_in).to(matrix.dtype) @ matrix
        return spec.from_forward_layout(moved.reshape(kernel.shape))


def bases_of(
    modules: Iterable[nn.Module],
    trained: Iterable[nn.Parameter],
    rows: CountedRows,
    runs: Iterable[tuple[Any, Callable[[], object]]],
    samples: int,
) -> Mapping[nn.Parameter, Basis]:
    """The bases of the trained weights of layers in these modules.

    They come from the rows that count of the first `samples` samples; `runs` are batches, each
    with a call that shows it to the modules. Layers with many inputs have none.
    """
    able = {*trained}
    sums: dict[nn.Parameter, Accumulator] = {}

    def add(weight: nn.Parameter, _: nn.Module, args: tuple[Any, ...], __: Any) -> None:
        total = sums[weight]
        total.add(rows.of_layer(args[0].detach(), total.spec))

    marks = []
    for layer in {layer: None for module in modules for layer in module.modules()}:
        weight = getattr(layer, "weight", None)
        if kind_of(layer) is None or weight not in able or weight in sums:
            continue
        # About zero and not about the mean: a step may well change the mean output.
        spec = replace(LayerSpec.of(layer), bias=False)
        if not watchable(spec) or spec.lookup or spec.fan_in > _MOST_INPUTS:
            continue
        sums[weight] = Accumulator(spec, enough(spec))
        marks.append(partial(layer.register_forward_hook, partial(add, weight)))
    shown = 0
    with hooks(marks), torch.no_grad():
        for batch, run in runs:
            rows.begin(batch)
            run()
            shown += count_samples(batch)
            if shown >= samples:
                break
    found = {weight: total.finish() for weight, total in sums.items()}
    return {
        w: Basis.of(m) for w, m in found.items() if m is not None and bool(m.mean.isfinite().all())
    }
