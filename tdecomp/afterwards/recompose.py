"""From a decomposed model back to layers, with the products of the factors as their weights."""

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from tdecomp.checkpoint.pretrained import forget
from tdecomp.layers.chain import Chain
from tdecomp.model.declared_ties import restorer
from tdecomp.model.fast_path import switch_on
from tdecomp.model.opened.base import Contents, Opened, close_unchanged
from tdecomp.model.surgery import copy_with, swap


def recompose(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Put a layer with the product of its factors in the place of every chain.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    >>> small = tdecomp.decompose(model, "svd", rank=8, progress=False).model
    >>> recompose(small)
    Sequential(
      (0): Linear(in_features=64, out_features=64, bias=True)
      (1): ReLU()
    )

    The layers compute what the chains do, to rounding, and are as large and as slow as those of the
    original: for tools that know no chains, for merging and for measuring. `Chain.to_layer` does it
    for one chain and says what it keeps. Several names of one chain are those of one layer
    afterwards, and layers whose factors are shared share their weight. An Embedding and the output
    layer tied to it share one factor only: where their products differ, as after training or with
    data, they have a weight each, and a tie that the model declares is gone (transformers then
    wants `config.tie_word_embeddings = False`). Modules that were opened for their chains, such as
    attention, are what they were before.

    Parameters
    ----------
    model : nn.Module
        With chains, wherever they come from; trained since or not.
    inplace : bool
        Change `model` itself, wholly or, on an error, not at all.

    Returns
    -------
    nn.Module
        A copy, or `model` itself with `inplace`; `tdecomp.decompose` takes it again.

    Raises
    ------
    ValueError
        If the model has no chain, or one that cannot be multiplied back, by its name: its method
        does not define `factors_of`, its stages were adapted or quantized, or it has hooks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"recompose: expected an nn.Module, got {type(model).__name__}")
    chains = {name: m for name, m in model.named_modules() if isinstance(m, Chain)}
    if not chains:
        raise ValueError(
            f"recompose: the model ({type(model).__name__}) has no chain; expected one that "
            "decompose(), apply() or load() returned"
        )
    layers = {name: layer_of(name, chain) for name, chain in chains.items()}
    _share_weights(chains, layers)
    replacements: dict[nn.Module, nn.Module] = {chains[name]: layers[name] for name in chains}
    if not inplace:
        whole = copy_with(model, replacements)
        close_unchanged(whole)
        switch_on(whole, ExitStack())
        forget(whole)
        return whole
    with ExitStack() as undo:
        undo.callback(restorer(model))
        undo.callback(forget(model))
        swap(model, replacements)
        undo.callback(swap, model, {new: old for old, new in replacements.items()})
        for opened in (module for module in model.modules() if isinstance(module, Opened)):
            undo.callback(Contents(opened).put_back)
        close_unchanged(model)
        switch_on(model, undo)
        undo.pop_all()
    return model


def layer_of(name: str, chain: Chain) -> nn.Module:
    """`Chain.to_layer`, with the layer's name in its errors."""
    try:
        for part in chain.modules():
            _refuse_hooks(part)
        return chain.to_layer()
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def _refuse_hooks(module: nn.Module) -> None:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    if any(hooks) or module._backward_hooks or module._backward_pre_hooks:
        raise ValueError(
            f"its {type(module).__name__} has hooks of its own, which would be lost: remove them "
            "first"
        )
    if hasattr(module, "_hf_hook"):
        remedy = "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        raise ValueError(f"accelerate moves its weights: {remedy} with all weights in memory")


def _share_weights(chains: Mapping[str, Chain], layers: Mapping[str, nn.Module]) -> None:
    """Give layers whose chains share factors one weight, where their products are the same."""
    first: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        chain, bias = chains[name], chains[name][-1].bias
        for factor in (id(p) for p in chain.parameters() if p is not bias):
            other = first.setdefault(factor, layer).get_parameter("weight")
            if _alike(layer.get_parameter("weight"), other):
                layer.weight = other


def _alike(mine: Tensor, other: Tensor) -> bool:
    """Whether they differ by no more than rounding, as a table and the output layer tied to it."""
    if (mine.shape, mine.dtype, mine.device) != (other.shape, other.dtype, other.device):
        return False
    gap = torch.linalg.vector_norm(mine.detach().double() - other.detach().double())
    rounding = 2 * torch.finfo(mine.dtype).eps
    return bool(gap <= rounding * torch.linalg.vector_norm(other.detach().double()))
