"""The chains in place of lookup tables, and of the output layers that are tied to them."""

from typing import Any, ClassVar

from torch import Tensor, nn

from tdecomp.layers.chain import Chain, Described

_DATA: Any = Tensor.data
_DEVICE: Any = Tensor.device


class BagChain(Chain):
    """A chain whose first stage gets all that an `nn.EmbeddingBag` is called with."""

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        first, *others = self
        x: Tensor = first(*inputs, **named)
        for stage in others:
            x = stage(x)
        return x


class TableWeight(Described):
    """The table of a chain's first stage, as other code may see it: to resize, not to compute with.

    What `data` and `device` say, and `data` is set to, is the parameter's own.
    """

    table: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        table = vars(args[0]).get("table") if args and isinstance(args[0], cls) else None
        if table is not None and func in (_DATA.__get__, _DEVICE.__get__):
            return func(table)
        if table is not None and func == _DATA.__set__:
            table.data = args[1]
            return None
        return super().__torch_function__(func, types, args, kwargs)


class EmbeddingChain(Chain, nn.Embedding):
    """A chain that passes for an Embedding: code that resizes one resizes its table.

    >>> from tdecomp.layers.lookup_chain import EmbeddingChain
    >>> chain = EmbeddingChain(nn.Embedding(9, 2), nn.Linear(2, 4, bias=False))
    >>> chain.num_embeddings, tuple(chain.weight.shape), list(chain.state_dict())
    (9, (9, 2), ['0.weight', '1.weight'])

    Its `weight`, `num_embeddings` and `padding_idx` are those of its first stage: a new row, as
    transformers' `resize_token_embeddings` appends, is one of the factor (rows, rank). Values of
    the weight are only there by `weight.data`: those of the layer's own weight are gone.
    """

    # torch.jit.script compiles properties unless they are named here.
    __jit_unused_properties__: ClassVar[list[str]] = ["weight", "num_embeddings", "padding_idx"]

    def __init__(self, *stages: nn.Module) -> None:
        nn.Module.__init__(self)  # that of an Embedding would make a table
        for at, stage in enumerate(stages):
            self.add_module(str(at), stage)

    def mirror_weight(self) -> None:
        """From here on the weight is made when it is asked for."""
        vars(self).pop("_layer_weight", None)

    def describe_layer(self) -> None:
        """Let the weight have the shape of the layer's own, until `mirror_weight`.

        As code expects that computes a table, such as one of sines, before values are loaded.
        """
        described = Described.like(self._table.weight, self.shapes()["weight"])
        vars(self)["_layer_weight"] = described

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The shape (rows, rank), dtype and device of the first stage's, and its `data`."""
        whole: Tensor | None = vars(self).get("_layer_weight")
        if whole is not None:
            return whole
        table: Tensor = self._table.weight
        found = TableWeight.like(table, tuple(table.shape))
        found.table = table
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
