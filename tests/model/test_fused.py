"""Parts of fused layers: found by name, held by specs, and no part of what a layer is."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import LayerSpec
from tdecomp.model.fused import with_parts
from tdecomp.model.sites import find_sites


@pytest.mark.parametrize(
    "name, sizes, parts",
    [
        ("blocks.0.attn.qkv", (8, 24), (8, 8, 8)),
        ("qkv", (8, 24), (8, 8, 8)),
        ("transformer.h.0.attn.c_attn", (8, 24), (8, 8, 8)),
        ("h.0.crossattention.c_attn", (8, 16), (8, 8)),  # keys and values only
        ("layers.0.self_attn.qkv_proj", (8, 12), (8, 2, 2)),  # grouped queries
        ("attn.in_proj_weight", (8, 24), (8, 8, 8)),
        ("attn.Wqkv", (8, 10), (8, 1, 1)),  # one key and one value for all queries
        ("attn.to_kv", (6, 16), (8, 8)),
        ("layers.0.mlp.gate_up_proj", (8, 40), (20, 20)),
        ("layers.0.mlp.gate_up_proj", (8, 41), ()),
        ("attn.qkv", (8, 23), ()),
        ("attn.qkv", (8, 6), ()),
        ("attn.query", (8, 24), ()),
        ("qkv.proj", (8, 24), ()),
        ("", (8, 24), ()),
    ],
)
def test_sizes_of_the_parts_follow_from_the_name(name, sizes, parts):
    assert with_parts(LayerSpec(*sizes), [name]).parts == parts


def test_experts_have_parts_each_of_its_own():
    experts = LayerSpec(4 * 8, 4 * 32, groups=4)
    assert with_parts(experts, ["layers.0.mlp.experts.gate_up_proj"]).parts == ()
    reason = "split-svd takes no experts; svd does"
    for method in (tdecomp.SplitSVD(), tdecomp.SplitSVD(parts=2)):
        assert method.refusal(replace(experts, parts=(64, 64))) == reason


def test_any_of_a_layers_names_will_do():
    assert with_parts(LayerSpec(8, 24), ["layer", "attn.qkv"]).parts == (8, 8, 8)


def test_only_linear_layers_have_parts():
    assert with_parts(LayerSpec.of(nn.Conv2d(8, 24, 1)), ["qkv"]).parts == ()
    assert with_parts(None, ["qkv"]) is None
    stated = LayerSpec(8, 24, parts=(12, 12))
    assert with_parts(stated, ["qkv"]) is stated


@pytest.mark.parametrize("parts", [(4, 5), (0, 8), (4.0, 4), ("a",)])
def test_parts_are_all_of_the_outputs(parts):
    with pytest.raises(ValueError, match=r"expected parts to be sizes .* the 8 outputs"):
        LayerSpec(3, 8, parts=parts)


def test_a_convolution_has_no_parts():
    with pytest.raises(ValueError, match="parts"):
        replace(LayerSpec.of(nn.Conv2d(3, 8, 1)), parts=(4, 4))


def test_specs_that_differ_in_parts_are_of_equal_layers():
    fused, plain = LayerSpec(3, 8, parts=(4, 4)), LayerSpec(3, 8)
    assert fused == plain
    assert hash(fused) == hash(plain)
    assert str(fused) == str(plain)
    assert fused.like(out_channels=5).parts == fused.pointwise(3, 8).parts == ()


def test_plain_data_keeps_the_parts_and_may_lack_them():
    spec = LayerSpec(3, 8, parts=(6, 2))
    data = json.loads(json.dumps(spec.to_dict()))
    assert LayerSpec.from_dict(data).parts == (6, 2)
    del data["parts"]
    assert LayerSpec.from_dict(data).parts == ()
    with pytest.raises(TypeError, match="missing or unknown"):
        LayerSpec.from_dict({**data, "part": (6, 2)})


class Attention(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


def model(seed=0, width=12):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(Attention(width), nn.ReLU()).eval()


def test_sites_have_the_parts():
    sites = find_sites(model())
    assert {name: site.spec.parts for name, site in sites.items()} == {
        "0.qkv": (12, 12, 12),
        "0.proj": (),
    }


def without_parts(data):
    if isinstance(data, dict):
        return {key: without_parts(value) for key, value in data.items() if key != "parts"}
    return [without_parts(value) for value in data] if isinstance(data, list) else data


def test_a_plan_of_before_there_were_parts_still_fits():
    original = model()
    plan = tdecomp.plan(original, "svd", rank=2, progress=False)
    old = json.dumps(without_parts(json.loads(plan.to_json())))
    assert "parts" not in old
    read = tdecomp.Plan.from_json(old)
    assert read["0.qkv"].layer.parts == ()
    assert tdecomp.apply(original, read, progress=False).report["0.qkv"].rank == 2


def test_a_profile_of_before_there_were_parts_can_be_read(tmp_path):
    x = torch.zeros(2, 4, 12)
    times = tdecomp.profile(model(), x, "svd", effort="quick", progress=False)
    times.save(tmp_path / "times.json")
    old = without_parts(json.loads((tmp_path / "times.json").read_text()))
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert tdecomp.Profile.load(tmp_path / "old.json") == times
