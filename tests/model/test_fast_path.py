"""torch's fused transformer layers are off where chains are, wherever those are."""

import copy

import pytest
import torch
from torch import nn

import tdecomp

QUIET = {"progress": False}
X = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(0))
PADDED = torch.arange(6) >= torch.tensor([[6], [4], [5]])
# torch says so of the nested tensors that its own encoder makes.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def close(model, other, **options):
    for training in (False, True):
        for grad in (False, True):
            outputs = []
            for module in (copy.deepcopy(model), copy.deepcopy(other)):
                torch.manual_seed(1)
                with torch.set_grad_enabled(grad):
                    outputs.append(module.train(training)(X, **options))
            # Where a sentence is padded the fused kernels give zeros, the others what they compute.
            y, z = (out[~PADDED] for out in outputs)
            torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layers",
    ["*", "layers.0.linear1", "layers.1.linear2", "layers.0.self_attn", "layers.1.self_attn"],
)
def test_outputs_are_those_of_the_original_with_and_without_masks(layers, tmp_path):
    model = encoder()
    result = tdecomp.decompose(
        model, "svd", rank=tdecomp.Ratio(1.0, of="rank"), allow_expansion=True, include=layers,
        example_inputs=(X, None, PADDED), **QUIET,
    )  # fmt: skip
    assert any(row.method for row in result.report)
    result.save(tmp_path / "encoder.safetensors")
    loaded = tdecomp.load(tmp_path / "encoder.safetensors", encoder())
    for small in (result.model, loaded):
        assert not small.use_nested_tensor
        close(model, small)
        close(model, small, src_key_padding_mask=PADDED)
        close(model, small, mask=torch.zeros(6, 6, dtype=torch.bool))
    assert model.use_nested_tensor


def test_in_place_an_error_leaves_the_encoder_as_it_was():
    model = encoder()
    with pytest.raises(ValueError, match="matches no"):
        tdecomp.decompose(model, "svd", rank=4, include="nothing", inplace=True, **QUIET)
    assert model.use_nested_tensor
    tdecomp.plan(model, "svd", rank=4, example_inputs=X, **QUIET)
    assert model.use_nested_tensor
    tdecomp.decompose(model, "svd", rank=4, inplace=True, **QUIET)
    assert not model.use_nested_tensor


def test_moments_and_recovery_take_padded_batches():
    model, data = encoder(), [{"src": X, "src_key_padding_mask": PADDED}] * 4
    result = tdecomp.decompose(model, "svd", rank=8, data=data, recover="refit", **QUIET)
    assert all(row.output_error is not None for row in result.report)


@pytest.mark.parametrize("inplace", [False, True])
def test_recomposing_switches_them_on_again(inplace):
    small = tdecomp.decompose(encoder(), "svd", rank=4, **QUIET).model
    whole = tdecomp.recompose(small, inplace=inplace)
    assert whole.use_nested_tensor
    assert type(whole.layers[0].self_attn) is nn.MultiheadAttention
    assert small.use_nested_tensor == inplace
    close(whole, small)


def test_the_report_says_what_it_costs():
    def note(**options):
        summary = str(tdecomp.decompose(encoder(), "svd", rank=4, **options, **QUIET).report)
        return summary.partition("fused transformer kernels are off")[2]

    assert "a profile tells" in note()
    profile = tdecomp.profile(encoder(), X, "svd", effort="quick", **QUIET)
    assert "without them the original takes" in note(example_inputs=X, profile=profile)


def test_a_decoder_has_three_rows_for_what_it_sees_of_the_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerDecoder(layer, 1).eval()
    for example in (None, (X, torch.randn(3, 9, 32))):
        plan = tdecomp.plan(model, "svd", rank=4, example_inputs=example, **QUIET)
        names = [row.name.removeprefix("layers.0.") for row in plan]
        assert names[:2] == ["self_attn.in_proj_weight", "self_attn.out_proj"]
        assert names[2:5] == [f"multihead_attn.{part}_proj_weight" for part in "qkv"]
        assert all(row.method == "svd" for row in plan)
    result = tdecomp.apply(model, plan, **QUIET)
    assert result.model(*example).shape == X.shape
