"""The chains in place of lookup tables, and of the output layers that are tied to them."""

from typing import Any, ClassVar

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

    >>> from tdecomp.layers.lookup_chain import EmbeddingChain
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
        found: Tensor = self._table.weight
        return found

    @property
    def num_embeddings(self) -> int:
        found: int = self._table.num_embeddings
        return found

    @num_embeddings.setter
    def num_embeddings(self, rows: int) -> None:
        self._table.num_embeddings = rows

    @property
    def padding_idx(self) -> int | None:
        found: int | None = self._table.padding_idx
        return found

    @padding_idx.setter
    def padding_idx(self, row: int | None) -> None:
        self._table.padding_idx = row

    @property
    def _table(self) -> Any:
        return self[0]


class HeadChain(Chain):
    """A chain in place of an output layer that is tied to an Embedding: they share a factor.

    Its `weight` has as many rows as that factor has now, so that code that resized the table sees
    an output layer that is resized already. Its `bias` is the parameter itself, which such code
    hands on to others.
    """

    __jit_unused_properties__: ClassVar[list[str]] = ["weight", "bias"]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found, rows = super().shapes(), len(self._last.weight)
        return {name: (rows, *shape[1:]) for name, shape in found.items()}

    @property
    def weight(self) -> Tensor:
        """A tensor without values of the layer's shape."""
        described: Tensor = vars(self)["weight"]
        if len(described) != len(self._last.weight):
            self.mirror_weight()
        found: Tensor = vars(self)["weight"]
        return found

    @property
    def bias(self) -> nn.Parameter | None:
        """The last stage's."""
        found: nn.Parameter | None = self._last.bias
        return found

    @property
    def _last(self) -> Any:
        return self[-1]
