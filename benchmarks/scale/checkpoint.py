"""A checkpoint of a Llama at its real shapes, with values like trained ones, made cheaply.

Each matrix is a product whose singular values decay as a power of their number, plus noise: made
by one multiplication, written shard by shard.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_TERMS = 128  # of a product
_DECAY = 0.7  # the power of a singular value's number
_NOISE = 0.5  # of the entries, as a share of the product's


@dataclass(frozen=True)
class LlamaSizes:
    """The sizes of a Llama; by default those of 1.1 billion parameters."""

    vocabulary: int = 32_000
    hidden: int = 2_048
    intermediate: int = 5_632
    blocks: int = 22
    heads: int = 32
    key_heads: int = 4
    shards: int = 8

    @property
    def config(self) -> dict[str, Any]:
        """What its config.json says."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
            "vocab_size": self.vocabulary, "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads, "num_key_value_heads": self.key_heads,
            "head_dim": self.hidden // self.heads, "tie_word_embeddings": False,
        }  # fmt: skip

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By its name the shape of each tensor."""
        hidden, inner = self.hidden, self.intermediate
        keys = hidden // self.heads * self.key_heads
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, hidden)}
        for i in range(self.blocks):
            block = {
                "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
            }  # fmt: skip
            found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
        return found | {
            "model.norm.weight": (hidden,),
            "lm_head.weight": (self.vocabulary, hidden),
        }


TINY = LlamaSizes(96, 64, 96, 2, 4, 2, 3)


def make_llama(folder: Path, sizes: LlamaSizes = LlamaSizes()) -> Path:
    """Write the checkpoint, unless it is there; the folder."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    total = 0
    for number, names in enumerate(_shards(sizes), start=1):
        file = f"model-{number:05}-of-{sizes.shards:05}.safetensors"
        shapes = sizes.shapes()
        tensors = {name: _values(shapes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(sizes.config, indent=2))
    return folder


def _shards(sizes: LlamaSizes) -> Iterator[list[str]]:
    """The names of each file's tensors: files of about one size, in the order of the model."""
    shapes = sizes.shapes()
    entries = [torch.Size(shape).numel() for shape in shapes.values()]
    files: list[list[str]] = [[] for _ in range(sizes.shards)]
    done, whole = 0, sum(entries)
    for name, count in zip(shapes, entries, strict=True):
        files[min(sizes.shards - 1, done * sizes.shards // whole)].append(name)
        done += count
    yield from files


def _values(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    terms = min(_TERMS, *shape)
    decay = torch.arange(1, terms + 1).float().pow(-_DECAY)
    left = torch.randn(shape[0], terms, generator=generator) * decay
    product = left @ torch.randn(terms, shape[1], generator=generator)
    noise = torch.randn(shape, generator=generator) * (_NOISE * float(decay.norm()))
    return (product.add_(noise) * (0.02 / float(decay.norm()))).bfloat16()
