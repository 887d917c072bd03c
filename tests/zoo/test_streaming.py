"""Checkpoints of transformers, streamed: layers, ties and experts as the library has them."""

import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tdecomp
import tdecomp.integrations.transformers
from tdecomp.streaming.of_transformers import asked_elsewhere, looked_at, skeleton_of
from tdecomp.streaming.source import open_source

pytestmark = pytest.mark.slow
QUIET = {"progress": False}
_LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_BERT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
MODELS = {
    "llama": ("Llama", "ForCausalLM", _LLAMA),
    "tied": ("Llama", "ForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", "LMHeadModel", {**_GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    "t5": ("T5", "ForConditionalGeneration", _T5),
    "mixtral": ("Mixtral", "ForCausalLM", {**_LLAMA, "num_local_experts": 4}),
    "gpt-oss": ("GptOss", "ForCausalLM", {**_LLAMA, "num_local_experts": 4, "head_dim": 8}),
    "bert": ("Bert", "ForMaskedLM", _BERT),
}
_VIT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
_QWEN_MOE = {
    **_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}  # fmt: skip
# Saved by transformers in a form that its models do not have: other names, experts one by one, a
# bias that two modules have, weights in fewer bits.
CONVERTED = {
    "vit": ("ViT", "ForImageClassification", _VIT),
    "qwen2-moe": ("Qwen2Moe", "ForCausalLM", _QWEN_MOE),
    "roberta": ("Roberta", "ForMaskedLM", {**_BERT, "pad_token_id": 1}),
    "t5": MODELS["t5"],
}


def made(name, dtype=torch.bfloat16):
    family, head, sizes = {**MODELS, **CONVERTED}[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**sizes)
        return getattr(transformers, f"{family}{head}")(config).to(dtype).eval()


@pytest.fixture
def source(request, tmp_path):
    made(request.param).save_pretrained(tmp_path / "source", max_shard_size="60KB")
    return tmp_path / "source"


def tensors_in(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def call(model):
    ids = torch.arange(6).reshape(1, 6) + 1
    names = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        names["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(**names).logits


@pytest.mark.parametrize("rank", [tdecomp.Ratio(0.6, of="params"), tdecomp.Budget(params=0.6)])
@pytest.mark.parametrize("source", MODELS, indirect=True)
def test_it_has_the_bits_of_decomposing_in_memory(source, tmp_path, rank):
    report = tdecomp.stream(source, tmp_path / "target", "svd", rank=rank, **QUIET)
    family = type(made_like(source))
    original = family.from_pretrained(source, dtype="auto")
    result = tdecomp.decompose(original, "svd", rank=rank, **QUIET)
    assert [(row.name, row.method, row.rank, row.tied_to) for row in report] == [
        (row.name, row.method, row.rank, row.tied_to) for row in result.report
    ]
    assert (report.before, report.after) == (result.report.before, result.report.after)
    written, wanted, given = (
        tensors_in(tmp_path / "target"), result.model.state_dict(), tensors_in(source)
    )  # fmt: skip
    for name, value in written.items():
        assert torch.equal(value, wanted[name] if name in wanted else given[name]), name
    loaded = family.from_pretrained(tmp_path / "target", dtype="auto")
    assert torch.equal(call(loaded), call(result.model))
    fresh = tdecomp.load(tmp_path / "target", made_like(source))
    assert torch.equal(call(fresh), call(result.model))


@pytest.mark.parametrize(
    "name, exclude", [*((name, ()) for name in CONVERTED), ("qwen2-moe", "*expert*")]
)
def test_its_file_is_that_of_a_model_saved_from_memory(tmp_path, name, exclude):
    source, target, saved = tmp_path / "source", tmp_path / "target", tmp_path / "saved"
    model = made(name, torch.float16)
    model.save_pretrained(source)
    options = {"rank": 4, "exclude": exclude, **QUIET}
    report = tdecomp.stream(source, target, "svd", **options)
    original = type(model).from_pretrained(source, dtype="auto")
    tdecomp.decompose(original, "svd", **options).save_pretrained(saved)
    assert any(row.method for row in report)
    written, wanted = (folder / "model.safetensors" for folder in (target, saved))
    assert list(tensors_in(target)) == list(tensors_in(saved))
    assert written.read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize(
    "methods, rank",
    [("svd", tdecomp.Energy(0.8)), ("dense", tdecomp.Budget(params=0.6)), ("auto", 4)],
)
@pytest.mark.parametrize("source", MODELS, indirect=True)
def test_its_plan_is_that_of_the_model_in_memory(source, methods, rank):
    model = type(made_like(source)).from_pretrained(source, dtype="auto")
    got, expected = (tdecomp.plan(one, methods, rank=rank, **QUIET) for one in (source, model))
    assert got.to_dict() == expected.to_dict()
    assert any(row.method is not None for row in got)


@pytest.mark.parametrize("source", MODELS, indirect=True)
def test_its_sensitivity_is_that_of_the_model_in_memory(source):
    model = type(made_like(source)).from_pretrained(source, dtype="auto")
    got, expected = (tdecomp.sensitivity(one, "dense", **QUIET) for one in (source, model))
    assert got.to_dict() == expected.to_dict()


@pytest.mark.parametrize("source", ["llama"], indirect=True)
def test_a_folder_without_chains_is_none_to_load(source):
    with pytest.raises(
        ValueError, match=r"source: config\.json has .* nothing is decomposed there"
    ):
        tdecomp.load(source, made_like(source))


def made_like(source):
    config = transformers.AutoConfig.from_pretrained(source)
    return getattr(transformers, config.architectures[0])(config).to(torch.bfloat16).eval()


@pytest.mark.parametrize("source", ["mixtral"], indirect=True)
def test_a_process_of_its_own_says_the_same(source, tmp_path, monkeypatch):
    found = open_source(source)
    assert asked_elsewhere(found) == looked_at(found) == skeleton_of(found)
    (tmp_path / "transformers.py").write_text("raise ImportError('it is broken')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"transformers cannot look at it, .* it is broken"):
        asked_elsewhere(found)


@pytest.mark.parametrize("source", ["tied"], indirect=True)
def test_the_command_where_torchvision_cannot_be_imported(source, tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "part.py").write_text("")
    code = "import torchvision.part\nraise RuntimeError('operator torchvision::nms does not exist')"
    (package / "__init__.py").write_text(code)
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "tdecomp", "plan", str(source), "--rank", "4", "--no-progress"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths},
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tdecomp.plan(source, 'svd', rank=4, **QUIET)}\n"


def test_weights_that_are_computed_from_others(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.Wav2Vec2Config(
        **sizes, vocab_size=32, num_hidden_layers=1, conv_dim=(16,), conv_stride=(2,),
        conv_kernel=(3,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForCTC(config)
    model.save_pretrained(tmp_path)
    got, expected = (tdecomp.plan(one, "svd", rank=4, **QUIET) for one in (tmp_path, model))
    assert "parametrized" in got["wav2vec2.encoder.pos_conv_embed.conv"].reason
    assert got.to_dict() == expected.to_dict()


@pytest.mark.parametrize("source", ["tied"], indirect=True)
def test_a_tied_weight_that_is_stored_twice(source, tmp_path):
    (file,) = source.glob("*.safetensors")
    state = load_file(file)
    table = state["model.embed_tokens.weight"]
    save_file({**state, "lm_head.weight": table.clone()}, file, metadata={"format": "pt"})
    report = tdecomp.stream(source, tmp_path / "same", "svd", rank=0.5, include="lm_head", **QUIET)
    assert report["lm_head"].reason is not None  # not without the table, which include leaves out
    both = ["lm_head", "model.embed_tokens"]
    options = {"rank": tdecomp.Ratio(0.5, of="params"), **QUIET}
    report = tdecomp.stream(source, tmp_path / "both", "svd", include=both, **options)
    assert report["lm_head"].tied_to == "model.embed_tokens"
    assert "lm_head.weight" not in tensors_in(tmp_path / "both")
    save_file({**state, "lm_head.weight": table + 1}, file, metadata={"format": "pt"})
    report = tdecomp.stream(source, tmp_path / "other", "svd", include=both, exclude=(), **options)
    assert "tie_word_embeddings=false" in report["lm_head"].reason
    assert torch.equal(tensors_in(tmp_path / "other")["lm_head.weight"], table + 1)


@pytest.mark.parametrize("source", ["llama"], indirect=True)
def test_tensors_that_do_not_fit_the_config(source, tmp_path):
    (file,) = source.glob("*.safetensors")
    state = load_file(file)
    del state["model.layers.0.mlp.up_proj.weight"]
    state["model.layers.0.mlp.gate_proj.weight"] = torch.ones(4, 4)
    state["model.layers.1.mlp.up_proj.weight"] = torch.ones(48, 32, dtype=torch.int8)
    save_file(state, file, metadata={"format": "pt"})
    report = tdecomp.stream(source, tmp_path / "target", "svd", rank=2, **QUIET)
    assert report["model.layers.0.mlp.up_proj"].reason == "the checkpoint has no values for it"
    assert "the shape (4, 4)" in report["model.layers.0.mlp.gate_proj"].reason
    assert "stored as I8" in report["model.layers.1.mlp.up_proj"].reason
    assert report["model.layers.1.mlp.gate_proj"].rank == 2


def test_a_folder_of_diffusers(tmp_path):
    import diffusers

    import tdecomp.integrations.diffusers

    model = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "source")
    options = {"rank": 8, "include": "*to_q", **QUIET}
    tdecomp.stream(tmp_path / "source", tmp_path / "target", "svd", **options)
    loaded = diffusers.UNet2DModel.from_pretrained(tmp_path / "target")
    wanted = tdecomp.decompose(model, "svd", **options).model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())
