"""Small checkpoints as they are published: one file, shards with an index, an unknown maker."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.support.torchvision_import import import_torchvision

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def llama(folder: Path, *, shards: int = 1, tied: bool = False, **config: Any) -> nn.Module:
    """A Llama of two blocks, as transformers saves it; the model that was saved."""
    import_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    options: dict[str, Any] = {**sizes, **heads, "tie_word_embeddings": tied, **config}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**options)).eval()
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]  # type: ignore[union-attr]
    model.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    state = model.state_dict()
    if tied:
        del state["lm_head.weight"]
    write(folder, state, shards=shards)
    return model


def perceptron() -> nn.Sequential:
    """Three layers of a known kind, with the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32, bias=False), nn.ReLU(),
            nn.Linear(32, 8),
        )  # fmt: skip


def unknown(folder: Path, *, shards: int = 1) -> nn.Sequential:
    """The weights of an architecture that no library knows; the model that was saved."""
    model = perceptron()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "perceptron-of-my-own"}))
    write(folder, model.state_dict(), shards=shards)
    return model


def write(folder: Path, state: Mapping[str, Tensor], *, shards: int = 1) -> None:
    """The tensors in one file, or in order in this many with the index that says where."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    if shards == 1:
        save_file(whole, folder / SINGLE, metadata={"format": "pt"})
        return
    names = list(whole)
    places: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        mine = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        places |= dict.fromkeys(mine, file)
        save_file({n: whole[n] for n in mine}, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in whole.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
