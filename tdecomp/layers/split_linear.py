"""A Linear whose inputs and outputs are in parts: each part of the outputs sees its own inputs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerSpec


class SplitLinear(nn.Module):
    """As a Linear with a block-diagonal weight: one block, a Linear, for each part.

    >>> from tdecomp.layers.split_linear import SplitLinear
    >>> layer = SplitLinear([2, 3], [8, 4])
    >>> layer(torch.ones(5, 2 + 3)).shape
    torch.Size([5, 12])

    Parameters
    ----------
    into, out : sequence of int
        The inputs and the outputs of each part.
    bias : bool
        Whether all outputs together have a bias.
    device, dtype
        As for `nn.Linear`.
    """

    def __init__(
        self,
        into: Sequence[int],
        out: Sequence[int],
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.into = [*into]
        specs = (LayerSpec(i, o, bias=False) for i, o in zip(into, out, strict=True))
        self.parts = nn.ModuleList(spec.build(device, dtype) for spec in specs)
        zeros = torch.zeros(sum(out), device=device, dtype=dtype) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros)

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.split(self.into, -1)
        outputs: list[Tensor] = []
        for i, part in enumerate(self.parts):  # in a form that torch.jit.script takes
            outputs.append(part(inputs[i]))
        y = torch.cat(outputs, dim=-1)
        # In place: no second tensor as large, and under autocast the dtype of the products.
        return y if self.bias is None else y.add_(self.bias)


@dataclass(frozen=True)
class SplitStage:
    """The stage of a chain whose module is a `SplitLinear`; its weight is (out, in), with zeros."""

    into: tuple[int, ...]
    out: tuple[int, ...]
    bias: bool

    @property
    def in_channels(self) -> int:
        return sum(self.into)

    @property
    def params(self) -> int:
        return self._weights + (sum(self.out) if self.bias else 0)

    @property
    def _weights(self) -> int:
        return sum(i * o for i, o in zip(self.into, self.out, strict=True))

    def macs(self, call: Call) -> int:
        return call.batch * self._weights

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return size

    def build(
        self, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SplitLinear:
        return SplitLinear(self.into, self.out, self.bias, device, dtype)

    def put(self, module: nn.Module, values: Tensor) -> None:
        with torch.no_grad():
            rows = values.split([*self.out])
            for i, (weight, row) in enumerate(zip(_weights(module), rows, strict=True)):
                weight.copy_(row.split([*self.into], dim=1)[i])

    def read(self, module: nn.Module) -> Tensor:
        weights = (weight.detach().double() for weight in _weights(module))
        dense: Tensor = torch.block_diag(*weights)
        return dense

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def words(self) -> tuple[str, ...]:
        """The lines of a drawing."""
        blocks = (f"{i}→{o}" for i, o in zip(self.into, self.out, strict=True))
        return "SplitLinear", ", ".join(blocks)

    def __str__(self) -> str:
        name, blocks = self.words
        return f"{name}({blocks}{'' if self.bias else ', no bias'})"


def _weights(module: nn.Module) -> list[nn.Parameter]:
    assert isinstance(module, SplitLinear)
    return [part.get_parameter("weight") for part in module.parts]
