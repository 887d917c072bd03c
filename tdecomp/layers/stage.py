"""One step of a chain: what costs, builders and profiles need to know of it."""

import json
from typing import Any, Protocol

import torch
from torch import nn

from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerSpec


class Stage(Protocol):
    """One step of the chain that a method makes; a `LayerSpec` is one, for a stock layer of torch.

    A method whose chain has a module of its own defines a class with these members, usually a
    frozen dataclass: stages are compared and hashed. The module of the last stage has the layer's
    bias as its `bias`, a parameter, or None where the layer has none. Drawings show the few short
    lines of its `words`, if it has such a property, else the name of the class.
    """

    @property
    def in_channels(self) -> int: ...  # the input's last dimension; its second for convolutions

    @property
    def params(self) -> int: ...  # of the module, the bias included

    def macs(self, call: Call) -> int:
        """Multiply-accumulates of one call, without the bias."""

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial size of the output for inputs of spatial `size`; () for a Linear."""

    def build(
        self, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> nn.Module:
        """The module, whose weights need no particular values."""

    def put(self, module: nn.Module, values: Any) -> None:
        """Write into the module the values that `Factors.stage_weights` gives for this stage."""

    def read(self, module: nn.Module) -> Any:
        """The inverse of `put`: the module's values, detached, in float64."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, equal for equal stages only; a saved profile knows the stage by it."""


# What tells stages apart in a profile, also after saving and loading it.
StageId = LayerSpec | str


def id_of(stage: Stage) -> StageId:
    """A `LayerSpec` itself, and the plain data of any other stage, as JSON."""
    return stage if isinstance(stage, LayerSpec) else json.dumps(stage.to_dict(), sort_keys=True)
