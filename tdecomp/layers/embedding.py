"""Lookup tables: `nn.Embedding` and `nn.EmbeddingBag`, a Linear whose inputs are one-hot."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdecomp.layers.chain import Chain
from tdecomp.layers.geometry import Call
from tdecomp.layers.lookup_chain import BagChain, EmbeddingChain
from tdecomp.layers.spec import LayerKind, LayerSpec


class _Lookup(LayerKind):
    """A table (in, out) with a row for each number."""

    lookup: ClassVar[bool] = True
    stock: ClassVar[type[nn.Module]]
    # What else the module is made with, and torch's defaults.
    usual: ClassVar[dict[str, int | str | bool | None]]

    def base_class(self, module: nn.Module) -> type[nn.Module] | None:
        # A chain in an Embedding's place passes for one.
        mine = isinstance(module, self.stock) and not isinstance(module, Chain)
        return self.stock if mine else None

    def spec_of(self, module: nn.Module) -> LayerSpec:
        table: Any = module
        given = ((name, getattr(table, name)) for name in self.usual)
        options = tuple((name, value) for name, value in given if value != self.usual[name])
        rows, columns = int(table.num_embeddings), int(table.embedding_dim)
        return LayerSpec(rows, columns, bias=False, options=options)

    def refusal(self, module: nn.Module) -> str | None:
        if module.max_norm is None:
            return None
        return "its max_norm scales rows down as they are looked up, which no chain can follow"

    def build(
        self, spec: LayerSpec, device: torch.device | None, dtype: torch.dtype | None
    ) -> nn.Module:
        # Given a weight, it draws no random numbers for one.
        weight = torch.empty(spec.in_channels, spec.out_channels, device=device, dtype=dtype)
        made: Any = self.stock
        table: nn.Module = made(
            spec.in_channels, spec.out_channels, _weight=weight, **dict(spec.options)
        )
        return table

    def attributes(self, spec: LayerSpec) -> dict[str, Any]:
        sizes = {"num_embeddings": spec.in_channels, "embedding_dim": spec.out_channels}
        found = {**sizes, "max_norm": None, "norm_type": 2.0, **self.usual, **dict(spec.options)}
        # An `EmbeddingChain` has some of these of its first stage.
        return {name: value for name, value in found.items() if not hasattr(self.chain, name)}

    def to_forward_layout(self, weight: Tensor, spec: LayerSpec) -> Tensor:
        del spec
        return weight.T

    def from_forward_layout(self, kernel: Tensor, spec: LayerSpec) -> Tensor:
        del spec
        return kernel.T


class Table(_Lookup):
    """`nn.Embedding`, with weight (in, out)."""

    name = "Embedding"
    stock = nn.Embedding
    chain: ClassVar[Any] = EmbeddingChain
    usual: ClassVar[dict[str, int | str | bool | None]] = {
        "padding_idx": None,
        "scale_grad_by_freq": False,
        "sparse": False,
    }


class Bag(_Lookup):
    """`nn.EmbeddingBag`: sums or means of rows."""

    name = "EmbeddingBag"
    stock = nn.EmbeddingBag
    chain: ClassVar[Any] = BagChain
    usual: ClassVar[dict[str, int | str | bool | None]] = {
        **Table.usual,
        "mode": "mean",
        "include_last_offset": False,
    }

    def refusal(self, module: nn.Module) -> str | None:
        if module.mode == "max":
            return "its mode is 'max': no product with a matrix follows the maximum of rows"
        return super().refusal(module)

    def call(self, spec: LayerSpec, *inputs: Any, **named: Any) -> Call | None:
        given = dict(zip(("input", "offsets"), inputs, strict=False)) | named
        offsets, last = given.get("offsets"), bool(dict(spec.options).get("include_last_offset"))
        return Call(len(given["input"]) if offsets is None else len(offsets) - last)
