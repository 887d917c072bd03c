"""Weights in whole numbers of a few bits, and the bytes that a model takes to store."""

import copy
import importlib
import warnings
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.ao.quantization import PerChannelMinMaxObserver, quantize_dynamic

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SCALE_BYTES = 4  # one float32 for each output


def rounded(model: nn.Module, bits: int) -> tuple[nn.Module, int]:
    """A copy whose convolutions and Linear layers compute with weights of so many bits.

    Torch's own observer finds a scale for each output, and its fake quantization rounds: values in
    float32 that are whole multiples of the scale. Also the bytes that it would take to store.
    """
    twin, saved = copy.deepcopy(model), 0.0
    for module in twin.modules():
        if isinstance(module, _WEIGHTED):
            weight = module.weight
            largest = 2 ** (bits - 1) - 1
            observer = PerChannelMinMaxObserver(
                ch_axis=0,
                dtype=torch.qint8,
                qscheme=torch.per_channel_symmetric,
                quant_min=-largest - 1,
                quant_max=largest,
            )
            observer(weight.detach())
            scale, zero = observer.calculate_qparams()
            with torch.no_grad():
                weight.copy_(
                    torch.fake_quantize_per_channel_affine(
                        weight, scale, zero.int(), 0, -largest - 1, largest
                    )
                )
            saved += weight.numel() * (weight.element_size() - bits / 8) - _SCALE_BYTES * len(scale)
    return twin, stored_bytes(model) - round(saved)


def int8_by_torchao(model: nn.Module) -> nn.Module:
    """A copy whose Linear layers hold int8 weights with a scale for each output."""
    # Not installed with the benchmarks, and its import takes seconds.
    torchao = importlib.import_module("torchao.quantization")
    twin = copy.deepcopy(model)
    torchao.quantize_(twin, torchao.Int8WeightOnlyConfig())
    return twin


def int8_dynamic(model: nn.Module) -> nn.Module:
    """A copy by torch's `quantize_dynamic`: int8 weights and, in each call, int8 inputs."""
    with warnings.catch_warnings():  # that torchao is going to take its place
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, message=".*quantized tensor")
        quantized: nn.Module = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        return quantized


def stored_bytes(model: nn.Module) -> int:
    """The bytes of all parameters and buffers, each once, those in torchao's tensors too."""
    found = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return sum(part.numel() * part.element_size() for t in found.values() for part in _parts(t))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors in one that wraps others."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _parts(getattr(tensor, name))
