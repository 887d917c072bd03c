"""Weight decay of what chains stand for: the products of their factors, not the factors.

Khodak et al. 2021, "Initialization and Regularization of Factorized Neural Layers", call it
Frobenius decay.
"""

import math

import torch
from torch import Tensor, nn

from tdecomp.decomposers.factors import Factors
from tdecomp.layers.chain import Chain
from tdecomp.layers.spec import LayerSpec, kind_of
from tdecomp.model.weights import is_plain, is_quantized


def factor_decay(model: nn.Module, weight_decay: float) -> Tensor:
    """The weight decay of the layers that chains stand for, to be added to the loss.

    >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> small = tdecomp.decompose(model, "svd", rank={"0": 8}, progress=False).model
    >>> loss = small(torch.randn(16, 32)).square().mean()
    >>> (loss + tdecomp.factor_decay(small, 1e-4)).backward()

    Half of `weight_decay` times the squared Frobenius norms of the products of the chains' factors:
    the L2 weight decay of the layers that they replaced. Decay of the factors themselves, as an
    optimizer's `weight_decay` is, draws the product to lower ranks (of two factors it is a decay of
    the nuclear norm): leave that at 0 for them. The norms come from the small Gram matrices of the
    factors, without the products. Biases, and layers without a chain, have no part in it.

    Khodak et al. 2021, "Initialization and Regularization of Factorized Neural Layers" (Frobenius
    decay).

    Parameters
    ----------
    model : nn.Module
        With chains, as `decompose` returns it.
    weight_decay : float
        The strength, as for the optimizer of the original.

    Returns
    -------
    Tensor
        A number in float32 (float64 for chains in it) through which gradients flow to the factors.

    Raises
    ------
    TypeError, ValueError
        If `model` is no module or has no chains, `weight_decay` is no number of 0 or more, a
        chain's method cannot tell its factors (`Decomposer.factors_of`), or its layers are
        quantized.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"factor_decay: expected a model, got {type(model).__name__}")
    number = isinstance(weight_decay, (int, float)) and not isinstance(weight_decay, bool)
    if not number or not 0 <= weight_decay < math.inf:
        raise ValueError(
            f"factor_decay: expected weight_decay to be a number of 0 or more, got {weight_decay!r}"
        )
    total = None
    for name, chain in _outermost(model):
        square = _squared_norm(name, chain)
        total = square if total is None else total + square.to(total.device)
    if total is None:
        raise ValueError(
            "factor_decay: the model has no chains; expected what tdecomp.decompose returned, its "
            "chains still in place (the weight decay of other layers is the optimizer's)"
        )
    return 0.5 * weight_decay * total


def _outermost(model: nn.Module) -> list[tuple[str, Chain]]:
    """Each chain once, without those inside others."""
    chains = [(name, part) for name, part in model.named_modules() if isinstance(part, Chain)]
    inner = {id(m) for _, chain in chains for part in chain for m in part.modules()}
    return [(name, chain) for name, chain in chains if id(chain) not in inner]


def _squared_norm(name: str, chain: Chain) -> Tensor:
    for part in chain.modules():
        if is_quantized(part) or not all(map(is_plain, part.parameters(recurse=False))):
            raise ValueError(
                f"factor_decay: layer {name!r} ({chain.replaced}): its {type(part).__name__} is "
                "quantized; expected factors in floating point: quantize last"
            )
    device = next(chain.parameters()).device
    with torch.autocast(device.type, enabled=False):  # which would round the Gram matrices
        factors = _factors(chain)
        if factors is not None:
            return torch.stack([each.squared_norm() for each in factors]).sum()
        matrix = _matrix(chain)
    if matrix is None:
        raise ValueError(
            f"factor_decay: layer {name!r} ({chain.replaced}): {chain.method} cannot tell the "
            "factors of its chain; expected a method that defines factors_of"
        )
    return matrix.square().sum()


def _factors(chain: Chain) -> list[Factors] | None:
    """Each group's factors, through which gradients reach the chain; None where it cannot tell."""
    spec, method = chain.replaced, chain.decomposer
    if method is None or spec is None or chain.rank is None:
        return None
    per_stage = []
    for stage, part in zip(method.stages(spec, chain.rank), chain, strict=True):
        if not isinstance(stage, LayerSpec):  # what it reads is detached
            return None
        weight = _weight(part)
        if weight is None:
            return None
        per_stage.append(stage.to_forward_layout(weight).chunk(spec.groups))
    groups = [method.factors_of(parts) for parts in zip(*per_stage, strict=True)]
    known = [factors for factors in groups if factors is not None]
    return known if len(known) == spec.groups else None


def _weight(part: nn.Module) -> Tensor | None:
    """The weight of a stage, also of one that was decomposed itself."""
    if not isinstance(part, Chain):
        if kind_of(part) is None:  # such as an adapter around a layer, which adds to its weight
            return None
        weight = getattr(part, "weight", None)
        return _wide(weight) if isinstance(weight, Tensor) else None
    factors, spec = _factors(part), part.replaced
    if factors is None or spec is None:
        return None
    return spec.from_forward_layout(torch.cat([each.to_kernel() for each in factors]))


def _matrix(chain: Chain) -> Tensor | None:
    """The matrix (in, out) of a chain for a Linear, whatever its modules are: its outputs."""
    spec, first = chain.replaced, next(chain.parameters())
    if spec is None or spec.ndim:
        return None
    unit: Tensor = torch.eye(spec.in_channels, device=first.device, dtype=first.dtype)
    outputs: Tensor = chain(unit)
    bias = chain[-1].bias
    return _wide(outputs - bias if isinstance(bias, Tensor) else outputs)


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least: squares of float16 overflow early."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
