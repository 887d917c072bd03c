"""How much each layer's outputs matter to what the model says."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.calibration.accumulator import output_rows
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.batches import Batches, count_samples, in_parts, tensors_of
from tdecomp.torch_state import frozen, hooks, undisturbed

# Of these at a time the activations are kept.
_GRADIENTS_AT_A_TIME = 16


class OutputGradients:
    """Gradients at the layers' outputs, of random mixtures of the model's outputs.

    For outputs z and v ~ N(0, I), ``E[(∂vᵀz/∂y)(∂vᵀz/∂y)ᵀ] = Jᵀ J``: by how much a small error in
    y changes the square of the model's outputs, as in the Fisher information of a Gaussian
    (Martens and Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", section 2). No labels, and no assumption on what the outputs mean.
    """

    def __init__(self, layers: Mapping[str, tuple[nn.Module, LayerSpec]]) -> None:
        self._layers = layers
        self._sums: dict[str, Tensor] = {}
        self.samples = 0
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

        def mark(name: str, _: Any, __: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:  # nothing before it does: the graph begins here
                output = output.detach().requires_grad_()
                anchors.append(output)
            output.register_hook(lambda slope: self._take(name, slope))
            return output.clone()  # what follows may change it in place

        marks = [
            partial(layer.register_forward_hook, partial(mark, name))
            for name, (layer, _) in self._layers.items()
        ]
        with frozen(model), hooks(marks), torch.enable_grad():
            outputs = [z for z in tensors_of(batches.run(model, batch)) if z.requires_grad]
            if not outputs:
                return
            mixed = [
                (z * torch.randn(z.shape, generator=self._generator, device="cpu").to(z)).sum()
                for z in outputs
            ]
            torch.autograd.grad(torch.stack(mixed).sum(), anchors, allow_unused=True)
        self.samples += count_samples(batch)

    def _take(self, name: str, slope: Tensor) -> None:
        with undisturbed(slope.device):
            rows = output_rows(slope, self._layers[name][1]).float()
            product = (rows.T @ rows).double()
            self._sums[name] = self._sums[name] + product if name in self._sums else product

    def finish(self) -> dict[str, Tensor]:
        found = {name: total / max(self.samples, 1) for name, total in self._sums.items()}
        return {name: g for name, g in found.items() if bool(torch.isfinite(g).all())}
