"""What the outputs of layers or of a whole model lose: old and new on the same inputs."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.calibration.accumulator import output_rows
from tdecomp.layers.spec import LayerSpec


class _Loss:
    """Sums over positions: of the squared error, and of the outputs and their squares."""

    def __init__(self, layer: nn.Module, chain: nn.Module) -> None:
        self._spec = LayerSpec.of(layer)
        self._chain = chain
        self._lost = self._power = 0.0
        self._count = 0
        self._total: Tensor | float = 0.0

    def add(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """A forward hook of the old layer."""
        wanted = output_rows(output, self._spec).double()  # (positions, out_channels)
        error = wanted - output_rows(self._chain(*inputs), self._spec).double()
        self._lost += float(error.square().sum())
        self._power += float(wanted.square().sum())
        self._total = self._total + wanted.sum(dim=0)
        self._count += len(wanted)

    @property
    def share(self) -> float:
        """Of the output's variance."""
        if not self._count:
            return float("nan")
        mean = torch.as_tensor(self._total) / self._count
        variance = self._power - self._count * float(mean.square().sum())
        return self._lost / variance if variance > 0 else float(self._lost > 0)


@torch.no_grad()
def output_errors(
    original: nn.Module, decomposed: nn.Module, names: Iterable[str], batches: Iterable[Tensor]
) -> dict[str, float]:
    """The share of each layer's output variance that its chain loses on the layer's own inputs."""
    losses = {}
    with ExitStack() as stack:
        for name in names:
            layer = original.get_submodule(name)
            losses[name] = _Loss(layer, decomposed.get_submodule(name))
            stack.callback(layer.register_forward_hook(losses[name].add).remove)
        for batch in batches:
            original(batch)
    return {name: loss.share for name, loss in losses.items()}


@torch.no_grad()
def model_error(original: nn.Module, model: nn.Module, batches: Iterable[Tensor]) -> float:
    """The share of the variance of the original's outputs (n, ...) that another model loses."""
    wanted, found = zip(*((original(x).double(), model(x).double()) for x in batches), strict=True)
    return lost_share(torch.cat(wanted), torch.cat(found))


def lost_share(outputs: Tensor, others: Tensor) -> float:
    """The share of the variance of outputs (n, ...) that others in their place lose."""
    about_mean = outputs - outputs.mean(dim=0)
    return float((outputs - others).square().sum() / about_mean.square().sum())
