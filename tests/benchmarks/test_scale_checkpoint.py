"""The checkpoint that large models are measured on has the shapes and the spectra that it says."""

import json
import math

import torch
from safetensors.torch import load_file

from benchmarks.scale.checkpoint import TINY, LlamaSizes, make_llama
from benchmarks.scale.streamed import plain_loop


def test_it_has_a_billion_parameters():
    params = sum(math.prod(shape) for shape in LlamaSizes().shapes().values())
    assert round(params / 1e9, 1) == 1.1


def test_it_is_a_folder_as_libraries_write_it(tmp_path):
    folder = make_llama(tmp_path / "llama", TINY)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    state = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    assert {name: tuple(value.shape) for name, value in state.items()} == TINY.shapes()
    assert all(value.dtype == torch.bfloat16 for value in state.values())
    assert len(set(index["weight_map"].values())) == TINY.shards
    squares = torch.linalg.svdvals(state["lm_head.weight"].float()).square()
    assert 0.5 < squares[:16].sum() / squares.sum() < 0.99  # neither flat nor of low rank
    before = (folder / "config.json").stat().st_mtime_ns
    make_llama(folder, TINY)
    assert (folder / "config.json").stat().st_mtime_ns == before  # made once


def test_the_loop_makes_the_factors(tmp_path):
    folder = make_llama(tmp_path / "llama", TINY)
    plain_loop(folder, tmp_path / "looped")
    found = {
        k: v
        for file in (tmp_path / "looped").glob("*.safetensors")
        for k, v in load_file(file).items()
    }
    first, second = found["lm_head.weight.0"], found["lm_head.weight.1"]
    assert first.numel() + second.numel() <= 0.6 * 96 * 64
    assert (second @ first).shape == (96, 64)
