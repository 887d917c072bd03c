"""Generating from a Llama one token at a time, at half of its Linear weights and at all of them.

The weights are random: the time does not depend on their values. Beside the tokens a second stands
what the products with the weights alone take, and how fast the same memory is read by a plain sum.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.scale.row import ScaleRow
from benchmarks.support.fresh_process import in_fresh_process, in_this_process
from benchmarks.support.torchvision_import import import_torchvision
from tdecomp.decomposers.assemble import empty_chain_like
from tdecomp.decomposers.svd import SVD
from tdecomp.layers.spec import LayerSpec

_SHARE = 0.5
_WIDTH, _INNER, _BLOCKS, _VOCABULARY, _TOKENS, _ROUNDS = 2048, 8192, 16, 32000, 12, 3
_QUICK = (64, 128, 2, 100, 3, 1)
# Products that read memory at this share of a plain sum's speed are bound by it.
_BOUND_BY_MEMORY = 0.7


@dataclass(frozen=True)
class Speed:
    """Seconds a token, of the products alone, and of a sum over the same weights; their bytes."""

    token: float
    products: float
    read: float
    size: int


def run(options: argparse.Namespace) -> list[ScaleRow]:
    """A row for each dtype."""
    measure = in_this_process if options.quick else in_fresh_process
    sizes = _QUICK if options.quick else (_WIDTH, _INNER, _BLOCKS, _VOCABULARY, _TOKENS, _ROUNDS)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        whole, half = measure(generated, sizes, dtype)
        name = str(dtype).removeprefix("torch.")
        rows.append(ScaleRow(
            f"generation, batch 1, {name}: Llama of {sizes[2]} blocks of {sizes[0]} at half of its "
            "Linear weights", "–", in_words(whole, half),
        ))  # fmt: skip
    return rows


def in_words(whole: Speed, half: Speed) -> str:
    """Both speeds, and what bounds them, as far as it follows from the numbers."""
    speeds = [speed.size / speed.products / 1e9 for speed in (whole, half)]
    read = whole.size / whole.read / 1e9
    share = half.products / half.token
    gain = whole.token / half.token
    by = "memory" if speeds[1] >= _BOUND_BY_MEMORY * read else "the products' arithmetic"
    return (
        f"{1 / whole.token:.2f} → {1 / half.token:.2f} tokens/s: {gain:.2f} times"
        f"\nproducts with the weights alone: {whole.products / half.products:.2f} times,"
        f"\n{whole.size / 1e9:.2f} → {half.size / 1e9:.2f} GB a token "
        f"at {speeds[0]:.1f} → {speeds[1]:.1f} GB/s, where a sum reads {read:.1f} GB/s:"
        f"\nbound by {by}, in {share:.0%} of a token's time at half"
    )


def generated(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Speed, Speed]:
    """The whole model's speed and that of the model at half, in turns."""
    tokens, rounds = sizes[4:]
    models = [llama(sizes, dtype, chains=chains) for chains in (False, True)]
    prompt = torch.ones(1, 4, dtype=torch.long)

    def generate(model: nn.Module, count: int) -> None:
        model.generate(  # type: ignore[operator]
            prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )

    found: list[list[tuple[float, float, float]]] = [[] for _ in models]
    with torch.inference_mode():
        for model in models:
            generate(model, 1)
        for _ in range(rounds):
            for model, times in zip(models, found, strict=True):
                weights = list(read_weights(model))
                times.append((
                    _seconds(generate, model, tokens) / tokens,
                    _seconds(_multiply, weights),
                    _seconds(_sum, weights),
                ))  # fmt: skip
    speeds = []
    for model, times in zip(models, found, strict=True):
        token, products, read = (median(column) for column in zip(*times, strict=True))
        size = sum(weight.nbytes for weight in read_weights(model))
        speeds.append(Speed(token, products, read, size))
    return speeds[0], speeds[1]


def llama(sizes: tuple[int, ...], dtype: torch.dtype, *, chains: bool) -> nn.Module:
    """transformers' Llama of these sizes; with chains in place of the Linears in its blocks."""
    import_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM  # after torchvision, which it looks for
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    width, inner, blocks, vocabulary = sizes[:4]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner,
        num_hidden_layers=blocks, num_attention_heads=max(width // 64, 1),
        num_key_value_heads=max(width // 256, 1), tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
        model.to(dtype).eval()
        if chains:
            for name, layer in list(model.model.named_modules()):
                if isinstance(layer, nn.Linear):
                    model.model.set_submodule(name, _chain_of(layer))
    model.to_empty(device="cpu")
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers were on the meta device
    some = torch.randn(2**16, generator=torch.Generator().manual_seed(0)) * 0.02
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        flat.copy_(some.repeat(-(-len(flat) // len(some)))[: len(flat)])
    result: nn.Module = model
    return result


def _chain_of(layer: nn.Linear) -> nn.Module:
    """The chain at half of the layer's weights."""
    sides = layer.in_features, layer.out_features
    rank = max(1, int(_SHARE * layer.weight.numel() / sum(sides)))
    return empty_chain_like(layer, LayerSpec.of(layer), SVD(), rank)


def read_weights(model: nn.Module) -> Iterator[Tensor]:
    """The matrices that each token is multiplied by, the tied output layer's included."""
    return (m.weight for m in model.modules() if isinstance(m, nn.Linear))


def _multiply(weights: list[Tensor]) -> None:
    inputs = {len(w.T): torch.ones(1, 1, len(w.T), dtype=w.dtype) for w in weights}
    for weight in weights:
        functional.linear(inputs[len(weight.T)], weight)


def _sum(weights: list[Tensor]) -> None:
    for weight in weights:
        weight.view(-1).view(torch.int32).sum(dtype=torch.int32)  # the same bytes in any dtype


def _seconds(run: Callable[..., Any], *arguments: Any) -> float:
    began = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - began
