"""The closed form's oracle: plain SVDs in float64, and errors written out."""

import torch
from torch import nn


def directly(y, predicted):
    """The nmse, written out."""
    y, predicted = y.double(), predicted.double()
    return float(((y - predicted) ** 2).mean() / y.var())


def best(y, rank, bias=False):
    """The least squared error of any rank-k outputs in the span of y, by a plain SVD."""
    y = y.double()
    y = y - y.mean(0) if bias else y
    return float((torch.linalg.svdvals(y)[rank:] ** 2).sum())


def predict(solution, x):
    y = x @ solution.Wa.to(x)
    y = y if solution.Wb is None else y @ solution.Wb.to(x)
    return y if solution.bias is None else y + solution.bias.to(x)


def data(samples=200, fan_in=12, out=10, seen=None, dtype=torch.float64):
    """Inputs of unequal and correlated features, with a mean; of `seen` dimensions only."""
    spread = torch.logspace(0, -2, seen or fan_in, dtype=dtype)
    x = (torch.randn(samples, seen or fan_in, dtype=dtype) + 1) * spread
    return x @ torch.randn(seen or fan_in, fan_in, dtype=dtype), torch.randn(
        fan_in, out, dtype=dtype
    )


def run(kernel, bias, x, options):
    out, into, *size = kernel.shape
    conv = nn.Conv2d(into, out, size, bias=bias is not None, dtype=x.dtype, **options)
    with torch.no_grad():
        conv.weight.copy_(kernel)
        if bias is not None:
            conv.bias.copy_(bias)
        return conv(x)


def flat(maps):
    return maps.movedim(1, -1).flatten(0, -2)
