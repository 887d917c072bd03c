"""Sums over batches of the gradients at layers' outputs."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdecomp.calibration.accumulator import spread
from tdecomp.calibration.counted_rows import CountedRows
from tdecomp.calibration.layer_inputs import Layers
from tdecomp.calibration.passes import Batches
from tdecomp.layers.patches import each_output, output_rows, patches_at
from tdecomp.model.batches import count_samples, in_parts, tensors_of
from tdecomp.model.trace import is_transformed
from tdecomp.runtime.torch_state import frozen, full_precision, hooks

# Of more gradients in a part of the samples than this for each output, and this many in all, a
# random sample is taken.
_PART, _LEAST = 8, 2048
_SAMPLES_AT_A_TIME = 16  # whose activations are kept for the backward pass


class OutputGradients:
    """Gradients at the layers' outputs, of random mixtures of the model's outputs.

    For layer outputs y, model outputs z and v ~ N(0, I), ``E[(∂vᵀz/∂y)(∂vᵀz/∂y)ᵀ] = Jᵀ J`` says by
    how much a small error in y changes the square of z, as the Fisher information of a Gaussian
    does (Martens and Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", section 2). It needs no labels, and z may mean anything.
    """

    def __init__(self, layers: Layers, batches: Batches) -> None:
        self._layers, self._batches = layers, batches
        self._rows, self._generator = CountedRows(batches), batches.generator(0)
        self._places = np.random.default_rng(batches.seed or 0)
        self._sums: dict[str, Tensor] = {}
        self.samples = 0

    def add(self, model: nn.Module, batch: Any, most: int) -> None:
        """Run the first samples forwards and backwards, a few at a time or, if that fails, all."""
        parts = in_parts(batch, _SAMPLES_AT_A_TIME, most)
        try:
            for few in parts:
                self._add(model, few)
        except Exception:
            if len(parts) == 1:
                raise
            self._add(model, batch)

    def _add(self, model: nn.Module, batch: Any) -> None:
        self._rows.begin(batch)
        anchors: list[Tensor] = []

        def mark(name: str, _: Any, __: Any, output: Tensor) -> Tensor:
            if is_transformed(output):
                return output
            if not output.requires_grad:  # no earlier layer is marked: the graph begins here
                output = output.detach().requires_grad_()
                anchors.append(output)
            output.register_hook(partial(self._take, name))
            return output.clone()  # the next module may change it in place

        marks = [
            partial(layer.register_forward_hook, partial(mark, name))
            for name, (layer, _) in self._layers.items()
        ]
        with frozen(model), hooks(marks), torch.enable_grad():
            outputs = tensors_of(self._batches.run(model, batch))
            mixed = [self._mixture(z) for z in outputs if z.requires_grad]
            if mixed:
                torch.autograd.grad(torch.stack(mixed).sum(), anchors, allow_unused=True)
                self.samples += count_samples(batch)

    def _mixture(self, z: Tensor) -> Tensor:
        v = torch.randn(z.shape, generator=self._generator, device="cpu").to(z)
        return self._rows.of_output(z * v).sum()

    def _take(self, name: str, slope: Tensor) -> None:
        spec = self._layers[name][1]
        with full_precision(slope.device):
            slope = self._rows.of_layer(slope, spec).float()
            present = slope.numel() // spec.out_channels
            taken = max(_LEAST, _PART * spec.out_channels)
            if present <= taken:
                rows, weight = output_rows(slope, spec), 1.0
            else:
                places = spread(present, taken, self._places).to(slope.device)
                rows, weight = patches_at(slope, each_output(spec), places)[0], present / taken
            product = (rows.T @ rows).double() * weight
            self._sums[name] = self._sums[name] + product if name in self._sums else product

    def finish(self) -> dict[str, Tensor]:
        """The second moment (out, out) for each layer that has a finite one."""
        found = {name: total / max(self.samples, 1) for name, total in self._sums.items()}
        return {name: g for name, g in found.items() if bool(torch.isfinite(g).all())}
