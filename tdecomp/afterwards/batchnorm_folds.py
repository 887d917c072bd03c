"""Which batch norms can be folded into which layers, and why others cannot."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tdecomp.layers.chain import Chain
from tdecomp.layers.spec import LayerSpec, kind_of
from tdecomp.model.batches import Forward
from tdecomp.model.batchnorm import is_batchnorm, why_it_stays
from tdecomp.model.example import Example
from tdecomp.model.flow import Flow, flow_of_graph, flow_of_pass, last_part
from tdecomp.model.reasons import Reasons
from tdecomp.model.sites import refuse_wrapped
from tdecomp.model.weights import Weights, refuse_lazy


@dataclass(frozen=True)
class BatchnormFold:
    r"""What becomes of one batch norm of a model; made by `batchnorm_folds`.

    >>> print(BatchnormFold("bn1", "conv1"), BatchnormFold("bn2", "", "in train mode"), sep="\n")
    bn1: into 'conv1'
    bn2: stays: in train mode

    Attributes
    ----------
    norm, layer : str
        The batch norm, and the layer or chain whose output it is given; "" where that is no layer.
    reason : str, optional
        Why the batch norm stays; None where it can be folded into the layer.
    """

    norm: str
    layer: str
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.norm}: {f'stays: {self.reason}' if self.reason else f'into {self.layer!r}'}"


def batchnorm_folds(
    model: nn.Module, example_inputs: Any = None, *, forward: Forward | None = None
) -> list[BatchnormFold]:
    r"""Which batch norms `fuse_batchnorm` folds into which layers, and why others stay.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
    >>> print(*batchnorm_folds(model.eval()), sep="\n")
    1: into '0'
    3: stays: its input is not the output of a layer

    Parameters
    ----------
    model, example_inputs, forward
        As for `fuse_batchnorm`, and so are the errors raised.

    Returns
    -------
    list of BatchnormFold
        One for each batch norm, in the order of the model.
    """
    _check(model)
    layers = dict(_layers(model))
    norms = {name: m for name, m in model.named_modules() if is_batchnorm(m)}
    if not norms:
        return []
    if example_inputs is None:
        flow = flow_of_graph(model, layers, norms)
    else:
        refuse_lazy(model, "fuse_batchnorm")
        example = Example.of(example_inputs, forward)
        flow = flow_of_pass(model, layers, norms, example)
    reasons = Reasons(model)
    folds = []
    for name, norm in norms.items():
        sources = flow.sources.get(name, set())
        layer = next(iter(sources)) or "" if len(sources) == 1 else ""
        reason = why_it_stays(norm) or flow.oddities.get(name) or _no_source(sources)
        if reason is None:
            reason = _unread(flow, name, layer, layers[layer], norm)
            reason = reason or _fixed(layers[layer], reasons)
        folds.append(BatchnormFold(name, layer, reason))
    return folds


def _check(model: nn.Module) -> None:
    refuse_wrapped(model)
    if model.training:
        raise ValueError(
            "fuse_batchnorm: the model is in train mode, in which batch norm takes the statistics "
            "of each batch; expected one in eval mode: model.eval()"
        )


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every chain, and every layer of a known kind that is in no chain, by its first name."""
    chains = [module for module in model.modules() if isinstance(module, Chain)]
    inside = {part for chain in chains for part in chain.modules() if part is not chain}
    for name, module in model.named_modules():
        if isinstance(module, Chain) or (kind_of(module) is not None and module not in inside):
            yield name, module


def _no_source(sources: set[str | None]) -> str | None:
    if not sources:
        return "no call reaches it"
    if sources == {None}:
        return "its input is not the output of a layer"
    if len(sources) > 1:
        named = ", ".join(sorted(repr(s) if s else "another tensor" for s in sources))
        return f"it is called with the outputs of several: {named}"
    return None


def _unread(flow: Flow, norm: str, layer: str, module: nn.Module, values: nn.Module) -> str | None:
    """Why the output of a layer is not the batch norm's alone, channel for channel."""
    if odd := flow.oddities.get(layer):
        return f"{layer!r}: {odd}"
    if others := flow.readers[layer] - {norm}:
        named = ", ".join(sorted(map(repr, others - {""})))
        return f"the output of {layer!r} is read elsewhere, too" + (
            f": by {named}" if named else ""
        )
    spec = module.replaced if isinstance(module, Chain) else LayerSpec.of(module)
    if spec is None:
        return f"{layer!r} is a chain that no method made"
    if flow.dims is None and not spec.ndim:
        return (
            "it follows a Linear layer: example_inputs show whether its channels are the features"
        )
    if flow.dims is not None and flow.dims[layer] != {spec.ndim + 2}:
        return f"its channels are not those of {layer!r}, as the shape of that output shows"
    channels = values.get_buffer("running_mean").numel()
    if spec.out_channels != channels:
        return f"it has {channels} channels, {layer!r} has {spec.out_channels}"
    return None


def _fixed(layer: nn.Module, reasons: Reasons) -> str | None:
    """Why the layer, or the last stage of the chain, cannot take other weights."""
    last = last_part(layer)
    if isinstance(layer, Chain) and (layer._forward_hooks or layer._forward_pre_hooks):
        return "the chain before it has hooks of its own, which would see other outputs"
    if kind_of(last) is None:
        return f"the chain before it ends in a module of its own ({type(last).__name__})"
    own = reasons.of_stage(last) if isinstance(layer, Chain) else reasons.of(_row(last), None)
    if own is not None:
        return f"the layer before it cannot be replaced: {own}"
    if last.get_parameter("weight").is_meta:
        return "the layer before it is on the meta device, without values"
    # A chain has what its layer could have, so that it can be multiplied back.
    stood = layer.replaced if isinstance(layer, Chain) else None
    for spec in filter(None, (LayerSpec.of(last), stood)):
        built = replace(spec, bias=True).build(torch.device("meta"))
        if not isinstance(getattr(built, "bias", None), nn.Parameter):
            return f"{spec.kind} has no bias"
    return None


def _row(module: nn.Module) -> Weights:
    return Weights([], module, ())
