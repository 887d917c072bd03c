"""What people use without tdecomp: the plain SVD, TensorLy by the usual recipe, tensorly-torch.

The recipe replaces a convolution by TensorLy's factors as a chain of convolutions. As it goes
around, it loses the bias of some layers and pads both spatial dimensions alike; here both are
right. Linear layers get the plain SVD. Ranks are those that tdecomp's method of the same chain has
for the same cost, so only the factors differ.
"""

import contextlib
import copy
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import tensorly
import torch
from tensorly.decomposition import parafac, partial_tucker
from torch import Tensor, nn

from tdecomp import Plan

Replace = Callable[[Any, Any], nn.Module]  # a convolution and its rank to what takes its place
TENSORLY_TORCH = "tensorly-torch"


@dataclass(frozen=True)
class Today:
    """A way of today, and the method of tdecomp that has the same chain and so the same ranks."""

    like: str
    replace: Replace
    package: str = "tensorly"

    def missing(self) -> str | None:
        """Why it cannot be run here, if it cannot."""
        try:
            version(self.package)
        except PackageNotFoundError:
            return f"{self.package} is not installed"
        return None


def takes(module: nn.Module) -> bool:
    """Whether the recipe can replace a layer."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


@torch.no_grad()
def decomposed(model: nn.Module, plan: Plan, way: Today) -> nn.Module:
    """A copy of the model with layers replaced at the ranks of a plan for `way.like`."""
    result = copy.deepcopy(model)
    for row in plan:
        if row.method is None:
            continue
        layer = model.get_submodule(row.name)
        replace: Replace = way.replace if row.method == way.like else svd_of_layer
        new = replace(layer, row.rank)
        for name in row.names:
            result.set_submodule(name, new)
    return result.eval()


def svd_of_layer(layer: nn.Module, rank: int) -> nn.Sequential:
    """Two layers from the truncated SVD of a Linear or a convolution."""
    if isinstance(layer, nn.Conv2d):
        return svd_of_conv(layer, rank)
    assert isinstance(layer, nn.Linear)
    first, last = _truncated(layer.weight, rank)
    layers = (
        nn.Linear(layer.in_features, rank, bias=False),
        nn.Linear(rank, layer.out_features, bias=layer.bias is not None),
    )
    return _filled(layers, (first, last), layer.bias)


def svd_of_conv(conv: nn.Conv2d, rank: int) -> nn.Sequential:
    """A narrow convolution and a 1×1 one from the truncated SVD of the kernel as (out, rest)."""
    first, last = _truncated(conv.weight.flatten(1), rank)
    layers = (
        _conv(conv, conv.in_channels, rank),
        nn.Conv2d(rank, conv.out_channels, 1, bias=conv.bias is not None),
    )
    return _filled(layers, (first.reshape(rank, *conv.weight.shape[1:]), last), conv.bias)


def tucker_of_conv(conv: nn.Conv2d, rank: tuple[int, int]) -> nn.Sequential:
    """1×1, K×K, 1×1 from TensorLy's `partial_tucker` at the ranks (in, out)."""
    into, out = rank
    with quiet_tensorly():
        (core, (last, first)), _ = partial_tucker(
            conv.weight, rank=[out, into], modes=[0, 1], init="svd"
        )
    layers = (
        nn.Conv2d(conv.in_channels, into, 1, bias=False),
        _conv(conv, into, out),
        nn.Conv2d(out, conv.out_channels, 1, bias=conv.bias is not None),
    )
    return _filled(layers, (first.T, core, last), conv.bias)


def cp_of_conv(conv: nn.Conv2d, rank: int) -> nn.Sequential:
    """1×1, two depthwise ones, 1×1 from TensorLy's `parafac`."""
    with quiet_tensorly():
        weights, (last, first, down, across) = parafac(conv.weight, rank=rank, init="svd")
    layers = (
        nn.Conv2d(conv.in_channels, rank, 1, bias=False),
        _conv(conv, rank, rank, only=0),
        _conv(conv, rank, rank, only=1),
        nn.Conv2d(rank, conv.out_channels, 1, bias=conv.bias is not None),
    )
    return _filled(layers, (first.T, down.T, across.T, last * weights), conv.bias)


def _tensorly_torch(factorization: str) -> Replace:
    def replace(conv: nn.Conv2d, rank: Any) -> nn.Module:
        # Tucker-2 is Tucker with the full rank in space.
        full = (*rank[::-1], *conv.kernel_size) if isinstance(rank, tuple) else rank
        with quiet_tensorly():
            layer: nn.Module = importlib.import_module("tltorch").FactorizedConv.from_conv(
                conv,
                rank=full,
                factorization=factorization,
                implementation="factorized",
                decompose_weights=True,
            )
        return _OnTorch(layer)

    return replace


class _OnTorch(nn.Module):
    """Calls a layer of tensorly-torch, which takes TensorLy's backend of the moment for torch."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with quiet_tensorly():
            outputs: Tensor = self.layer(x)
        return outputs


TODAY = {
    "plain-svd": Today("lowrank", svd_of_conv, "torch"),
    "tensorly-tucker": Today("tucker2", tucker_of_conv),
    "tensorly-cp": Today("cp-separable", cp_of_conv),
    "tltorch-tucker": Today("tucker2", _tensorly_torch("tucker"), TENSORLY_TORCH),
    "tltorch-cp": Today("cp-separable", _tensorly_torch("cp"), TENSORLY_TORCH),
}


@contextlib.contextmanager
def quiet_tensorly() -> Iterator[None]:
    """TensorLy on tensors of torch, without its warning of ranks above the sizes of a mode."""
    with tensorly.backend_context("pytorch"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Trying to compute SVD with n_eigenvecs")
        yield


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (rank, in) and (out, rank) of a matrix (out, in)."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _conv(conv: nn.Conv2d, into: int, out: int, only: int | None = None) -> nn.Conv2d:
    """A convolution in the geometry of another, or in that of one of its two dimensions.

    One between as many channels in one dimension is depthwise.
    """

    def part(values: Any, neutral: int) -> Any:
        if only is None or isinstance(values, str):  # "same" and "valid" hold for each dimension
            return values
        return tuple(value if i == only else neutral for i, value in enumerate(values))

    return nn.Conv2d(
        into,
        out,
        part(conv.kernel_size, 1),
        stride=part(conv.stride, 1),
        padding=part(conv.padding, 0),
        dilation=part(conv.dilation, 1),
        groups=1 if only is None else into,
        bias=False,
        padding_mode=conv.padding_mode,
    )


def _filled(
    layers: Sequence[nn.Linear | nn.Conv2d], weights: Sequence[Tensor], bias: Tensor | None
) -> nn.Sequential:
    """The layers in a row with these weights, and the bias in the last."""
    chain = nn.Sequential(*layers)
    state = {f"{i}.weight": w.reshape(layers[i].weight.shape) for i, w in enumerate(weights)}
    if bias is not None:
        state[f"{len(layers) - 1}.bias"] = bias
    chain.load_state_dict(state)
    return chain
