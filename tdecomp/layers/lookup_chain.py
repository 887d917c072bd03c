"""The chains in place of lookup tables, and of the output layers that are tied to them."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdecomp.layers.chain import Chain


class BagChain(Chain):
    """A chain whose first stage gets all that an `nn.EmbeddingBag` is called with."""

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        first, *others = self
        x: Tensor = first(*inputs, **named)
        for stage in others:
            x = stage(x)
        return x


class EmbeddingChain(Chain, nn.Embedding):
    """A chain that passes for an Embedding: code that resizes one resizes its table.

    >>> chain = EmbeddingChain(nn.Embedding(9, 2), nn.Linear(2, 4, bias=False))
    >>> chain.num_embeddings, tuple(chain.weight.shape), list(chain.state_dict())
    (9, (9, 2), ['0.weight', '1.weight'])

    Its `weight`, `num_embeddings` and `padding_idx` are those of its first stage: a new row, as
    transformers' `resize_token_embeddings` appends, is one of the factor (rows, rank).
    """

    # torch.jit.script compiles properties unless they are named here.
    __jit_unused_properties__: ClassVar[list[str]] = ["weight", "num_embeddings", "padding_idx"]

    def __init__(self, *stages: nn.Module) -> None:
        nn.Module.__init__(self)  # that of an Embedding would make a table
        for at, stage in enumerate(stages):
            self.add_module(str(at), stage)

    def mirror_weight(self) -> None:
        """Nothing: the weight is that of a stage."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The parameter of the first stage (rows, rank)."""
        return self._table.weight

    @property
    def num_embeddings(self) -> int:  # type: ignore[override]
        return self._table.num_embeddings

    @num_embeddings.setter
    def num_embeddings(self, rows: int) -> None:
        self._table.num_embeddings = rows

    @property
    def padding_idx(self) -> int | None:  # type: ignore[override]
        return self._table.padding_idx

    @padding_idx.setter
    def padding_idx(self, row: int | None) -> None:
        self._table.padding_idx = row

    @property
    def _table(self) -> Any:
        return self[0]
