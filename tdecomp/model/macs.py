"""Multiply-accumulates of a whole call: torch's counter, and formulas for what it does not know."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]


class MacCounter(FlopCounterMode):
    """Counts what runs inside a `with` block, the same on every device and by every kernel.

    >>> with MacCounter() as counter:
    ...     q = torch.ones(1, 2, 16, 8)
    ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    >>> counter.macs == 2 * 16 * 16 * (8 + 8)
    True
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_FORMULAS)
        # torch's tracker of modules fails on views of parameters, such as learned queries.
        self.mod_tracker = _WholeCall()  # type: ignore[assignment]

    @property
    def macs(self) -> int:
        return self.get_total_flops() // 2


class _WholeCall(nullcontext[None]):
    """Says of every operator that it belongs to the call, and to no module in it."""

    parents = frozenset({"Global"})


# Each formula takes the shapes of an operator's arguments and gives its flops, two for each MAC.


def _product(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """A matrix, or a batch of them, times another one or a vector.

    Of grouped products, each row of `a` meets the matrix of its group only.
    """
    return 2 * math.prod(a) * (b[-1] if len(b) > 1 else 1)


def _added_product(_: Shape, a: Shape, b: Shape, *__: Any, **___: Any) -> int:
    return _product(a, b)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores and mixtures of values; several queries may share a key, and masks save nothing."""
    *batch, length, size = query
    return 2 * math.prod(batch) * length * key[-2] * (size + value[-1])


def _recurrence(x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    """Every weight matrix once for each step of each sequence."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(w) for w in weights if len(w) == 2)


def _one_recurrence(x: Shape, into: Shape, hidden: Shape, *_: Any, **__: Any) -> int:
    return _recurrence(x, [into, hidden])


def _bilinear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


_BY_FORMULA: dict[Callable[..., int], str] = {
    _product: "mv dot vdot _int_mm _grouped_mm _scaled_grouped_mm",
    _added_product: "addmv addbmm addmm_ addbmm_ baddbmm_ _addmm_activation",
    _attention: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_attention_math_for_mps _scaled_dot_product_fused_attention_overrideable",
    _recurrence: "_cudnn_rnn miopen_rnn",
    _one_recurrence: "mkldnn_rnn_layer",
    _bilinear: "_trilinear",
}
# By operator, of those that this version of torch has.
_FORMULAS = {
    getattr(torch.ops.aten, name): formula
    for formula, names in _BY_FORMULA.items()
    for name in names.split()
    if hasattr(torch.ops.aten, name)
}
