"""Batch norm folded into the layers and chains whose outputs it is given."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.afterwards.batchnorm_folds import batchnorm_folds
from tdecomp.checkpoint.pretrained import refuse_saving
from tdecomp.layers.chain import Chain
from tdecomp.layers.layout import channels_last_of
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.batches import Forward
from tdecomp.model.batchnorm import rest_of
from tdecomp.model.flow import last_part
from tdecomp.model.surgery import copy_with, swap
from tdecomp.runtime.torch_state import full_precision

_SAVE_FIRST = (
    "its batch norm was folded in, and it would be loaded into the architecture that has it: save "
    "the model first, and fuse what was loaded"
)


def fuse_batchnorm(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    forward: Forward | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Fold each batch norm into the layer before it, or into the last stage of the chain.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    >>> fuse_batchnorm(model)
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
    )

    In eval mode a batch norm multiplies each channel and adds to it, which the weight and bias of
    the layer can do: the result computes the same, to rounding (in float64, rounded once), without
    the batch norm. A batch norm is folded only where its input is always the output of one and the
    same layer, and nobody else reads that output; others stay as they are, and `batchnorm_folds`
    says why. A model with nothing to fold comes back as it is. Save a decomposed model before it is
    fused: a file is loaded into the architecture that was decomposed. The `save_pretrained` of a
    model of transformers or diffusers, decomposed or not, refuses what `from_pretrained` could not
    load.

    Parameters
    ----------
    model : nn.Module
        In eval mode; decomposed or not.
    example_inputs : tensor, tuple or dict, optional
        One pass of them shows which output goes where. Without them torch.fx has to be able to
        trace the model, and a batch norm after a Linear layer stays, since only inputs show whether
        its channels are the features.
    forward : callable ``(model, inputs) -> output``, optional
        How to call the model with `example_inputs`.
    inplace : bool
        Change `model` itself, wholly or, on an error, not at all.

    Returns
    -------
    nn.Module
        A copy, or `model` itself with `inplace`, with an `nn.Identity` in the place of each batch
        norm that was folded (the activation, in that of timm's `BatchNormAct2d`).

    Raises
    ------
    ValueError
        If the model is in train mode, rejects `example_inputs`, or without them cannot be traced.
    """
    folds = batchnorm_folds(model, example_inputs, forward=forward)
    folds = [fold for fold in folds if fold.reason is None]
    replacements: dict[nn.Module, nn.Module] = {}
    for fold in folds:
        layer, norm = last_part(model.get_submodule(fold.layer)), model.get_submodule(fold.norm)
        replacements[layer] = _folded(layer, norm)
        replacements[norm] = rest_of(norm, copied=not inplace)
    fused = model if inplace else copy_with(model, replacements)
    if inplace:
        swap(model, replacements)
    for chain in (fused.get_submodule(fold.layer) for fold in folds):
        if isinstance(chain, Chain):
            chain.add_bias()
    if folds:
        refuse_saving(fused, [*replacements.values()], _SAVE_FIRST)
    return fused


def _folded(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """The layer and the batch norm after it as one layer, in all else like the layer.

    Computed in float64, where torch.nn.utils.fusion computes in the layer's dtype, and takes no
    transposed convolution with groups.
    """
    weight, bias, spec = layer.get_parameter("weight"), layer.bias, LayerSpec.of(layer)
    with full_precision(weight.device):
        fused: nn.Module = replace(spec, bias=True).build(weight.device, weight.dtype)
        scale, shift = _affine(norm, weight.device)
        kernel = spec.read(layer)
        replace(spec, bias=True).put(fused, kernel * scale.reshape(-1, *[1] * (kernel.dim() - 1)))
        if isinstance(bias, Tensor):
            shift = shift + scale * bias.double()
        fused.get_parameter("bias").copy_(shift)
        if last := channels_last_of([weight]):
            fused.to(memory_format=last)  # type: ignore[call-overload]
    fused.get_parameter("weight").requires_grad_(weight.requires_grad)
    trained = bias.requires_grad if isinstance(bias, Tensor) else weight.requires_grad
    fused.get_parameter("bias").requires_grad_(trained)
    return fused.train(layer.training)


def _affine(norm: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a batch norm in eval mode multiplies each channel by, and adds to it, in float64."""
    mean, var = (norm.get_buffer(f"running_{name}").to(device).double() for name in ("mean", "var"))
    weight, bias, eps = norm.weight, norm.bias, norm.eps
    assert isinstance(eps, float)
    scale = torch.rsqrt(var + eps)
    if isinstance(weight, Tensor):
        scale = scale * weight.to(device).double()
    shift = -mean * scale
    return scale, shift + bias.to(device).double() if isinstance(bias, Tensor) else shift
