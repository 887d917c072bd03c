"""LoRA of PEFT on the stages of chains: trained, merged, saved and loaded."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import tdecomp
from tests.models import Cnn
from tests.zoo.of_transformers import MODELS

pytestmark = pytest.mark.slow

OPTIONS = {"allow_expansion": True, "progress": False}
NAMES = {
    "llama": ["q_proj", "down_proj"],
    "bert": ["query", "output.dense"],
    "gpt2": ["c_attn"],
    "cnn": ["features.3", "features.6"],
}


def original(name):
    torch.manual_seed(0)
    return (Cnn() if name == "cnn" else MODELS[name].build()).eval()


def inputs_of(name):
    torch.manual_seed(1)
    return {"x": torch.randn(2, 3, 12, 12)} if name == "cnn" else MODELS[name].inputs()


def output(model, name):
    out = model(**inputs_of(name))
    return out if isinstance(out, torch.Tensor) else out.logits


def adapted(name, small):
    """An adapter on the stages of some chains, trained for a few steps."""
    torch.manual_seed(2)
    targets = tdecomp.stage_names(small, NAMES[name])
    model = get_peft_model(small, LoraConfig(r=2, target_modules=targets))
    tuned = {n.rpartition(".lora_A.")[0] for n, _ in model.named_modules() if "lora_A." in n}
    assert tuned == {f"base_model.model.{target}" for target in targets}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = output(model, name).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_trained_merged_saved_and_loaded(name, tmp_path):
    result = tdecomp.decompose(
        original(name), ["svd", "tucker2", "lowrank"], rank=0.75, include=_globs(name), **OPTIONS
    )
    result.save(tmp_path / "small.safetensors")
    before = {key: value.clone() for key, value in result.model.state_dict().items()}
    model = adapted(name, copy.deepcopy(result.model))
    expected = output(model, name)
    assert not torch.allclose(expected, output(result.model, name))
    model.save_pretrained(tmp_path / "adapter")

    # Into the decomposed model of a file, the factors as they were before.
    fresh = tdecomp.load(tmp_path / "small.safetensors", original(name))
    torch.testing.assert_close(fresh.state_dict(), before, rtol=0, atol=0)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(output(loaded, name), expected, rtol=0, atol=0)

    merged = loaded.merge_and_unload()
    assert sum(isinstance(m, tdecomp.Chain) for m in merged.modules()) == sum(
        row.method is not None for row in result.plan
    )
    torch.testing.assert_close(output(merged, name), expected, rtol=1e-4, atol=1e-5)
    # What was merged is an ordinary decomposed model: it is saved, and multiplied back.
    again = tdecomp.Decomposition(merged, result.report, result.plan)
    again.save(tmp_path / "merged.safetensors")
    back = tdecomp.load(tmp_path / "merged.safetensors", original(name))
    torch.testing.assert_close(output(back, name), output(merged, name), rtol=0, atol=0)
    whole = tdecomp.recompose(merged)
    torch.testing.assert_close(output(whole, name), expected, rtol=1e-4, atol=1e-5)


def _globs(name):
    return [f"*{end}" for end in NAMES[name]]


def test_an_adapted_model_is_not_decomposed_nor_multiplied_back():
    small = tdecomp.decompose(original("llama"), "svd", rank=4, include="*q_proj", **OPTIONS).model
    model = adapted("llama", small)
    with pytest.raises(ValueError, match=r"its stage 0 is a peft.*Linear now, .* merge adapters"):
        tdecomp.recompose(model)
    plan = tdecomp.plan(model, "svd", rank=4, **OPTIONS)
    reasons = {row.reason for row in plan if "q_proj" in row.name}
    assert reasons == {"part of an adapter: merge it first (merge_and_unload), or adapt the result"}


def test_layers_left_whole_are_adapted_beside_chains():
    small = tdecomp.decompose(
        original("llama"), "svd", rank=4, include="*0*q_proj", **OPTIONS
    ).model
    targets = tdecomp.stage_names(small, "q_proj")
    assert [name.endswith("q_proj") for name in targets] == [False, False, True]
    model = get_peft_model(small, LoraConfig(r=2, target_modules=targets))
    assert sum(isinstance(m, nn.ModuleDict) for m in model.modules()) > 0
