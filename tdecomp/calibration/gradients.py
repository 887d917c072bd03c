"""How much an error in each layer's outputs changes the outputs of the model."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.calibration.accumulator import output_rows
from tdecomp.calibration.data import Batches, CountedRows
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.batches import count_samples, in_parts, tensors_of
from tdecomp.torch_state import frozen, hooks, undisturbed

_SAMPLES_AT_A_TIME = 16  # whose activations are kept for the backward pass
Layers = Mapping[str, tuple[nn.Module, LayerSpec]]  # by name


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
        with undisturbed(slope.device):
            rows = output_rows(self._rows.of_layer(slope, spec), spec).float()
            product = (rows.T @ rows).double()
            self._sums[name] = self._sums[name] + product if name in self._sums else product

    def finish(self) -> dict[str, Tensor]:
        """The second moment (out, out) for each layer that has a finite one."""
        found = {name: total / max(self.samples, 1) for name, total in self._sums.items()}
        return {name: g for name, g in found.items() if bool(torch.isfinite(g).all())}
