"""Several Linear layers in one, as the experts of a mixture: each row meets one of them."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tdecomp.layers.chain import Chain
from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerKind, LayerSpec

_OF_CPU = (torch.float32, torch.float16)  # that torch's kernel takes there, bfloat16 aside


class GroupedLinear(nn.Module):
    """`groups` layers ``in_features → out_features``, for rows that are sorted by group.

    >>> from tdecomp.layers.grouped_linear import GroupedLinear
    >>> layer = GroupedLinear(2, 4, 3)
    >>> layer(torch.ones(5, 4), torch.tensor([2, 5])).shape  # 2 rows of the first, 3 of the second
    torch.Size([5, 3])

    Attributes
    ----------
    weight : Parameter of shape (groups, out_features, in_features)
    bias : Parameter of shape (groups, out_features), or None
    """

    bias: nn.Parameter | None

    def __init__(
        self, groups: int, in_features: int, out_features: int, bias: bool = False, **where: Any
    ) -> None:
        super().__init__()
        self.groups, self.in_features, self.out_features = groups, in_features, out_features
        bound = 1 / math.sqrt(max(in_features, 1))  # as `nn.Linear` draws its weights
        weight = torch.empty(groups, out_features, in_features, **where)
        self.weight = nn.Parameter(weight.uniform_(-bound, bound))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(groups, out_features, **where).zero_())

    @classmethod
    def of(cls, weight: nn.Parameter, bias: nn.Parameter | None) -> "GroupedLinear":
        """One with these very parameters."""
        groups, out, into = weight.shape
        layer = cls(0, 0, 0)
        layer.groups, layer.in_features, layer.out_features = groups, into, out
        layer.weight, layer.bias = weight, bias
        return layer

    def forward(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        """The outputs of rows (rows, in); `ends` (groups,) has the number of the row after each.

        Rows that `ends` leaves out belong to no group: their outputs have no particular values.
        Without `ends` all groups have the same number of rows.
        """
        if ends is None:
            last, rows = torch.arange(1, self.groups + 1, device=x.device), x.shape[0]
            ends = last * rows // self.groups
        ends = ends.to(torch.int32)  # as torch's kernel wants them
        x = x.to(self.weight.dtype)  # as autocast would; it does not know this product
        y = _grouped_product(x, self.weight.transpose(1, 2), ends)
        if self.bias is None:
            return y
        return y + self.bias[_groups(x, ends)]

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"groups={self.groups}, {sizes}, bias={self.bias is not None}"


def _grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Each row times the matrix (in, out) of its group."""
    kernel: Any = getattr(functional, "grouped_mm", None)
    traced = torch.compiler.is_compiling()
    takes = x.device.type == "cpu" and x.dtype in _OF_CPU and not traced
    # It wants rows that begin at multiples of 16 bytes.
    aligned = all(size * x.element_size() % 16 == 0 for size in weights.shape[1:])
    if kernel is not None and aligned and (takes or x.dtype == torch.bfloat16):
        return kernel(x, weights, offs=ends)  # type: ignore[no-any-return]
    if traced:
        return _traceable_product(x, weights, ends)
    firsts = [0, *ends.tolist()]
    parts = [x[a:b] @ w for a, b, w in zip(firsts, firsts[1:], weights, strict=False)]
    left_out = x.new_zeros(x.shape[0] - firsts[-1], weights.shape[2])
    return torch.cat([*parts, left_out])


def _traceable_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """The same where torch traces: without a loop whose steps depend on the data."""
    operators: Any = getattr(torch.ops, "transformers", None)  # if that has been imported
    if hasattr(operators, "grouped_mm_fallback"):
        return operators.grouped_mm_fallback(x, weights, offs=ends)  # type: ignore[no-any-return]
    return (x.unsqueeze(1) @ weights[_groups(x, ends)]).squeeze(1)


def _groups(x: Tensor, ends: Tensor) -> Tensor:
    """The group of each row; the last for those that have none."""
    row = torch.arange(x.shape[0], device=x.device)
    return torch.searchsorted(ends, row, right=True).clamp_max(len(ends) - 1)


class GroupedChain(Chain):
    """The chain in the place of a `GroupedLinear`: every stage is told which rows are whose."""

    def forward(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        for stage in self:
            x = stage(x, ends)
        return x


class GroupedLinearKind(LayerKind):
    """`GroupedLinear`: a Linear with groups, all inputs of a row being those of its own group."""

    name = "GroupedLinear"
    chain: ClassVar[Any] = GroupedChain

    def base_class(self, module: nn.Module) -> type[nn.Module] | None:
        return GroupedLinear if isinstance(module, GroupedLinear) else None

    def spec_of(self, module: nn.Module) -> LayerSpec:
        assert isinstance(module, GroupedLinear)
        groups, out, into = module.weight.shape
        bias = module.bias is not None
        return LayerSpec(groups * into, groups * out, groups=groups, bias=bias)

    def call(self, spec: LayerSpec, *inputs: Any, **named: Any) -> Call | None:
        return spec.call(next(iter((*inputs, *named.values()))).shape)

    def attributes(self, spec: LayerSpec) -> dict[str, Any]:
        sizes = {"in_features": spec.group_in, "out_features": spec.group_out}
        return {"groups": spec.groups, **sizes}

    def build(
        self, spec: LayerSpec, device: torch.device | None, dtype: torch.dtype | None
    ) -> nn.Module:
        sizes = spec.groups, spec.group_in, spec.group_out
        return GroupedLinear(*sizes, bias=spec.bias, device=device, dtype=dtype)

    def to_forward_layout(self, weight: Tensor, spec: LayerSpec) -> Tensor:
        return weight.reshape(spec.kernel_shape)

    def from_forward_layout(self, kernel: Tensor, spec: LayerSpec) -> Tensor:
        return kernel.reshape(spec.groups, spec.group_out, spec.group_in)
