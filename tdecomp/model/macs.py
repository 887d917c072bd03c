"""Multiply-accumulates of a whole call: torch's counter, and formulas for what it does not know."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import flop_counter
from torch.utils._pytree import tree_leaves

from tdecomp.model.operators import OperatorMode

Shape = Sequence[int]


class MacCounter(OperatorMode):
    """Counts what runs inside a `with` block, the same on every device and by every kernel.

    >>> from tdecomp.model.macs import MacCounter
    >>> with MacCounter() as counter:
    ...     q = torch.ones(1, 2, 16, 8)
    ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    >>> counter.macs == 2 * 16 * 16 * (8 + 8)
    True

    Attributes
    ----------
    uncounted : set of str
        Operators that multiply matrices, or may do so, and for which there is no formula.
    """

    def __init__(self) -> None:
        super().__init__()
        self._flops = 0
        self._formulas = {**flop_counter.flop_registry, **_formulas()}
        self.uncounted: set[str] = set()

    @property
    def macs(self) -> int:
        return self._flops // 2

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind.__torch_dispatch__ != Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # the class says first which operators on plain tensors it means
        operator = getattr(func, "_overloadpacket", func)
        formula = self._formulas.get(operator)
        if formula is None and isinstance(func, OpOverload):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        try:
            self._flops += formula(*args, **kwargs, out_val=out) if formula else 0
        except Exception:  # a formula that was made for other shapes
            formula = None
        if formula is None and _multiplies(func, (args, kwargs)):
            self.uncounted.add(func.name().partition(".")[0])
        return out


def _multiplies(func: Any, given: Any) -> bool:
    """Whether an operator multiplies matrices, by its name; or may do so, if it is not torch's."""
    if not isinstance(func, OpOverload):
        return True  # of higher order: it calls functions that are not seen here
    namespace, _, name = func.name().partition(".")[0].partition("::")
    if _WORK.search(name):
        return not _ABOUT_WEIGHTS.search(name)
    matrices = [x for x in tree_leaves(given) if isinstance(x, Tensor) and x.dim() > 1]
    return namespace not in _KNOWN and len(matrices) > 1 and torch.Tag.pointwise not in func.tags


_KNOWN = ("aten", "prim", "prims", "torchvision")  # whose operators are told by their names
_WORK = re.compile(
    r"(^|_)([a-z0-9]*mm|matmul|gemv|[a-z]*dot|q?linear|q?conv(olution|\dd)?|conv_tbc|attention|attn"
    r"|encoder_layer|lstm|gru|rnn|solve|spsolve|cholesky|p?inv|svd|svdvals|eig[a-z]*|qr|geqrf"
    r"|or[mg]qr|lu|ldl|lstsq|det|slogdet|householder|matrix_exp|fft)(_|$)"
)
_ABOUT_WEIGHTS = re.compile(r"(^|_)((pre|un)?pack|reorder|flatten|quantize|cell)(_|$)")


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


def _distances(a: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * math.prod(out_shape) * a[-1]


_BY_FORMULA: dict[Callable[..., int], str] = {
    _product: "mv dot vdot _int_mm _scaled_mm_v2 _grouped_mm _scaled_grouped_mm "
    "_scaled_grouped_mm_v2 transformers::grouped_mm_fallback",
    _added_product: "addmv addbmm addmm_ addbmm_ baddbmm_ _addmm_activation",
    _attention: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_attention_math_for_mps _scaled_dot_product_fused_attention_overrideable "
    "higher_order::flex_attention",
    _recurrence: "_cudnn_rnn miopen_rnn",
    _one_recurrence: "mkldnn_rnn_layer",
    _bilinear: "_trilinear",
    _distances: "_cdist_forward _pdist_forward _euclidean_dist",
}


def _formulas() -> dict[Any, Callable[..., int]]:
    """By operator, of those that there are by now, in this version of torch."""
    found = {}
    for formula, names in _BY_FORMULA.items():
        for name in names.split():
            namespace, _, name = name.rpartition("::")
            operator = getattr(getattr(torch.ops, namespace or "aten"), name, None)
            if operator is not None:
                found[operator] = flop_counter.shape_wrapper(formula)
    return found
