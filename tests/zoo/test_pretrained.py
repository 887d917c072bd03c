"""Folders of decomposed models: saved and loaded as transformers, diffusers and timm do."""

import copy
import functools
import hashlib
import json
import shutil
import subprocess
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import diffusers
import huggingface_hub
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import tdecomp
import tdecomp.integrations.diffusers
import tdecomp.integrations.transformers
from tdecomp.checkpoint.description import describe_in_config, description
from tdecomp.model.batches import tensors_of
from tests.zoo import of_diffusers, of_timm
from tests.zoo.of_transformers import _TEXT, _WIDE, MODELS, _case, _text

pytestmark = pytest.mark.slow

KEY = "quantization_config"
TIED_QWEN2 = _case(
    hf.Qwen2ForCausalLM,
    hf.Qwen2Config(**_WIDE, **_TEXT, num_key_value_heads=2, tie_word_embeddings=True),
    _text,
)
NAMES = ("bert", "bert_for_tokens", "gpt2", "llama", "t5", "vit", "whisper", "mixtral", "clip")
CASES = {name: MODELS[name] for name in NAMES} | {"qwen2_tied": TIED_QWEN2}


@functools.cache
def decomposed(name):
    """A result that no test changes: everything that can be is a chain, tables and experts too."""
    # This table transformers fills with sines itself, for which its width has to be even.
    rank = {"model.encoder.embed_positions": 7} if name == "whisper" else {}
    return tdecomp.decompose(CASES[name].build(), "svd", rank={**rank, "*": 8}, progress=False)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder that the model's plain `save_pretrained` writes, made once."""

    @functools.cache
    def made(name):
        folder = tmp_path_factory.mktemp(name) / "small"
        decomposed(name).model.save_pretrained(folder, max_shard_size="60KB")
        return folder

    return made


def from_pretrained(name, folder, **options):
    return type(decomposed(name).model).from_pretrained(folder, **options)


def sharing(model):
    holders = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)].add(name)
    return {frozenset(names) for names in holders.values()}


def assert_same(loaded, saved):
    left, right = loaded.state_dict(), saved.state_dict()
    assert list(left) == list(right)
    for key, value in left.items():
        assert value.dtype == right[key].dtype, key
        assert torch.equal(value, right[key]), key
    assert sharing(loaded) == sharing(saved)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in saved.modules()]


def outputs(model, inputs):
    with torch.no_grad():
        return tensors_of(model.eval()(**inputs))


@pytest.mark.parametrize("name", CASES)
def test_from_pretrained_brings_back_every_bit_and_tie_and_saves_it_again(
    name, folder_of, tmp_path
):
    saved, folder = decomposed(name).model, folder_of(name)
    assert (folder / "model.safetensors.index.json").exists()
    loaded = from_pretrained(name, folder)
    assert_same(loaded, saved)
    inputs = CASES[name].inputs()
    for mine, its in zip(outputs(loaded, inputs), outputs(saved, inputs), strict=True):
        assert torch.equal(mine, its)
    loaded.save_pretrained(tmp_path)
    assert_same(from_pretrained(name, tmp_path), saved)


def test_experts_are_among_the_chains(folder_of, tmp_path):
    loaded = from_pretrained("mixtral", folder_of("mixtral"))
    experts = loaded.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, tdecomp.Chain)
    assert isinstance(experts.down_proj, tdecomp.Chain)
    loaded.model.save_pretrained(tmp_path)
    assert_same(hf.AutoModel.from_pretrained(tmp_path), loaded.model)


FRESH = """
import hashlib, sys
from benchmarks.support.torchvision_import import import_torchvision
import_torchvision()
import tdecomp.integrations.diffusers
import tdecomp.integrations.transformers
import transformers
for folder in sys.argv[1:]:
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder)
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode() + value.numpy().tobytes())
    print("bits", digest.hexdigest(), sum(p.numel() for p in model.parameters()))
"""


def test_a_fresh_process_loads_equal_bits(folder_of):
    names = ("bert", "llama", "mixtral", "whisper")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *(str(folder_of(name)) for name in names)],
        capture_output=True, text=True, check=False, cwd=Path(tdecomp.__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("bits ")]
    for name, (bits, count) in zip(names, found, strict=True):
        model, digest = decomposed(name).model, hashlib.sha256()
        for key, value in model.state_dict().items():
            digest.update(key.encode() + value.numpy().tobytes())
        assert (bits, int(count)) == (
            digest.hexdigest(),
            sum(p.numel() for p in model.parameters()),
        )


def test_result_writes_tokenizer_readme_and_shards(tmp_path):
    result = decomposed("llama")
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=_tokenizer())
    (tmp_path / "README.md").write_text("# A card\n")
    result.save_pretrained(tmp_path, tokenizer=tokenizer, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("# A card\n\n## Decomposed by tdecomp")
    assert "import tdecomp.integrations.transformers  # before from_pretrained" in readme
    assert "LlamaForCausalLM.from_pretrained" in readme
    assert_same(hf.AutoModelForCausalLM.from_pretrained(tmp_path), result.model)
    assert hf.AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"] == [0]


def _tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))


def test_base_model_of_a_model_with_a_head(folder_of, tmp_path):
    base = hf.AutoModel.from_pretrained(folder_of("llama"))
    saved = decomposed("llama").model.model
    assert_same(base, saved)
    for model in (base, saved):
        model.save_pretrained(tmp_path)
        assert_same(hf.AutoModel.from_pretrained(tmp_path), saved)
        with pytest.raises(ValueError, match="lm_head"):  # which is tied to what is a chain
            hf.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["text_model", "vision_model"])
def test_model_in_a_larger_one(part, folder_of):
    saved = decomposed("clip").model.get_submodule(part)
    loaded = type(saved).from_pretrained(folder_of("clip"))
    assert any(isinstance(module, tdecomp.Chain) for module in loaded.modules())
    assert_same(loaded, saved)


def test_another_head_is_new_as_transformers_says(folder_of):
    model = hf.AutoModelForQuestionAnswering.from_pretrained(folder_of("bert"))
    chains = [m for m in model.bert.encoder.modules() if isinstance(m, tdecomp.Chain)]
    assert len(chains) == 12
    assert type(model.qa_outputs) is torch.nn.Linear


def test_dtype_device_and_conversions(folder_of, tmp_path):
    folder, saved = folder_of("llama"), decomposed("llama").model
    inputs = CASES["llama"].inputs()
    half = from_pretrained("llama", folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.lm_head[1].weight is half.model.embed_tokens[0].weight
    half.save_pretrained(tmp_path / "half")
    assert from_pretrained("llama", tmp_path / "half").dtype == torch.bfloat16
    model = from_pretrained("llama", folder)
    assert model.half().dtype == torch.float16
    assert model.float().to("cpu").to(torch.float64).dtype == torch.float64
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
              "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    for device_map in ("cpu", "auto", places):
        placed = from_pretrained("llama", folder, device_map=device_map, offload_folder=tmp_path)
        assert torch.equal(outputs(placed, inputs)[0], outputs(saved, inputs)[0])


def test_trainer_trains_saves_and_goes_on(folder_of, tmp_path):
    model = from_pretrained("bert", folder_of("bert"))
    inputs = CASES["bert"].inputs()
    data = [{k: v[i] for k, v in inputs.items()} | {"labels": i % 5} for i in range(2)] * 2

    def trainer(model, steps):
        arguments = hf.TrainingArguments(
            tmp_path, max_steps=steps, save_steps=1, per_device_train_batch_size=2,
            use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        return hf.Trainer(model, arguments, train_dataset=data)

    with warnings.catch_warnings(action="ignore"):  # its own
        trainer(model, 2).train()
        again = type(model).from_pretrained(tmp_path / "checkpoint-2")
        assert_same(again, model)
        before = decomposed("bert").model.state_dict()
        factor = "bert.encoder.layer.0.output.dense.0.weight"
        assert not torch.equal(again.get_parameter(factor), before[factor])
        trainer(again, 3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(type(model).from_pretrained(tmp_path / "checkpoint-3"), again)


def test_folder_that_held_another_model_in_one_file(tmp_path):
    original, result = CASES["llama"].build(), decomposed("llama")
    original.save_pretrained(tmp_path)
    result.save_pretrained(tmp_path, max_shard_size="60KB")
    assert_same(from_pretrained("llama", tmp_path), result.model)
    original.save_pretrained(tmp_path)
    result.model.save_pretrained(tmp_path, max_shard_size="60KB")  # which leaves the single file
    refused(tmp_path, "and in the shards", "remove those that are older", name="llama")


def test_code_for_first_values_finds_what_moved_into_layers(tmp_path):
    """That of SigLIP gives the bias of its pooling attention first values, also where loaded."""
    config = hf.SiglipVisionConfig(**_WIDE, image_size=32, patch_size=8)
    result = tdecomp.decompose(hf.SiglipVisionModel(config), "svd", rank=8, progress=False)
    result.save_pretrained(tmp_path)
    loaded = hf.SiglipVisionModel.from_pretrained(tmp_path)
    assert_same(loaded, result.model)
    attention = next(m for m in loaded.modules() if isinstance(m, torch.nn.MultiheadAttention))
    assert isinstance(attention.in_proj_weight, tdecomp.Chain)
    assert attention.in_proj_bias is None
    assert "in_proj_bias" not in vars(attention)


def test_code_for_first_values_passes_routers(tmp_path):
    """That of Qwen3-Next gives the weight of its routers first values, also where loaded."""
    config = hf.Qwen3NextConfig(
        **_WIDE, **_TEXT, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=32, shared_expert_intermediate_size=32, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    result = tdecomp.decompose(
        hf.Qwen3NextForCausalLM(config), "svd", rank=2, include="*gate.projection", progress=False
    )
    result.save_pretrained(tmp_path)
    loaded = hf.Qwen3NextForCausalLM.from_pretrained(tmp_path)
    assert_same(loaded, result.model)
    assert isinstance(loaded.model.layers[0].mlp.gate.projection, tdecomp.Chain)


def test_what_is_done_after_loading(folder_of, tmp_path):
    model = from_pretrained("llama", folder_of("llama"))
    for size in (104, 88):  # the vocabulary grows, and shrinks
        resized = copy.deepcopy(model)
        resized.resize_token_embeddings(size, mean_resizing=False)
        resized.save_pretrained(tmp_path / str(size))
        assert_same(from_pretrained("llama", tmp_path / str(size)), resized)
    whole = tdecomp.recompose(model)
    whole.save_pretrained(tmp_path / "whole")
    assert KEY not in json.loads((tmp_path / "whole/config.json").read_text())
    assert_same(from_pretrained("llama", tmp_path / "whole"), whole)
    # A layer that is put back by hand is loaded as a layer.
    model.model.layers[0].mlp.up_proj = model.model.layers[0].mlp.up_proj.to_layer()
    model.save_pretrained(tmp_path / "one")
    assert_same(from_pretrained("llama", tmp_path / "one"), model)
    two = tdecomp.decompose(
        from_pretrained("llama", tmp_path / "one"), "svd", rank=6, include="*up_proj",
        progress=False,
    )  # fmt: skip
    two.model.save_pretrained(tmp_path / "two")
    assert_same(from_pretrained("llama", tmp_path / "two"), two.model)


def test_layers_added_after_decomposing(tmp_path):
    deeper = copy.deepcopy(decomposed("llama").model)
    deeper.model.layers.append(copy.deepcopy(deeper.model.layers[0]))
    deeper.config.num_hidden_layers = 3
    deeper.save_pretrained(tmp_path)
    loaded = from_pretrained("llama", tmp_path)
    assert_same(loaded, deeper)
    loaded.save_pretrained(tmp_path)
    assert_same(from_pretrained("llama", tmp_path), deeper)
    # As where such a model is saved by a process that knows nothing of tdecomp.
    describe_in_config(tmp_path, description(decomposed("llama").plan))
    with pytest.raises(
        ValueError, match=r"nothing of chains .*layers\.2\.self_attn\.q_proj.*save what"
    ):
        from_pretrained("llama", tmp_path)


@pytest.mark.parametrize(
    "path, layer",
    [
        ("lm_head", torch.nn.Linear(64, 96, bias=False)),
        ("model.embed_tokens", torch.nn.Embedding(96, 64)),
    ],
)
def test_layer_put_in_the_place_of_a_chain_that_shared_factors(path, layer, tmp_path):
    model, inputs = copy.deepcopy(decomposed("llama").model), CASES["llama"].inputs()
    model.set_submodule(path, layer)
    model.save_pretrained(tmp_path / "tied")
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "apart")
    loaded = from_pretrained("llama", tmp_path / "apart")
    assert torch.equal(outputs(loaded, inputs)[0], outputs(model, inputs)[0])
    with pytest.raises(ValueError, match=r"have one weight.*tie_word_embeddings = False"):
        from_pretrained("llama", tmp_path / "tied")


class OfTheHub(torch.nn.Module, huggingface_hub.PyTorchModelHubMixin):
    """Has a configuration, which is not what the mixin writes."""

    def __init__(self, width=32):
        super().__init__()
        self.config = hf.BertConfig(hidden_size=width)
        self.layer = torch.nn.Linear(width, width)

    def forward(self, x):
        return self.layer(x)


def test_mixin_of_the_hub(tmp_path):
    result = tdecomp.decompose(OfTheHub(), "svd", rank=4, progress=False)
    with pytest.raises(ValueError, match=r"writes no configuration.*result\.save_pretrained"):
        result.model.save_pretrained(tmp_path)
    result.save_pretrained(tmp_path)
    assert_same(tdecomp.load(tmp_path, OfTheHub()), result.model)


def test_model_made_from_the_configuration_of_a_decomposed_one(tmp_path):
    saved = decomposed("llama").model
    ordinary = type(saved)(copy.deepcopy(saved.config))
    ordinary.save_pretrained(tmp_path)
    assert_same(from_pretrained("llama", tmp_path), ordinary)


def test_adapters_that_are_not_merged(tmp_path):
    result = tdecomp.decompose(
        CASES["llama"].build(), "svd", rank=4, include="*q_proj", progress=False
    )
    targets = tdecomp.stage_names(result.model, "q_proj")
    adapted = peft.get_peft_model(result.model, peft.LoraConfig(r=2, target_modules=targets))
    inner = adapted.base_model.model
    with pytest.raises(ValueError, match=r"holds an adapter.*merge_and_unload"):
        tdecomp.Decomposition(inner, result.report, result.plan).save_pretrained(tmp_path / "no")
    inner.save_pretrained(tmp_path / "inner")
    with pytest.raises(
        ValueError, match=r"no file of weights has them: .*q_proj\.0\.weight.*merged"
    ):
        from_pretrained("llama", tmp_path / "inner")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert_same(from_pretrained("llama", tmp_path / "merged"), merged)


def test_other_tensors_may_have_the_names_of_the_original(tmp_path):
    """As where a checkpoint was decomposed file by file: experts are stored one by one there."""
    original = CASES["mixtral"].build()
    original.save_pretrained(tmp_path)
    result = tdecomp.decompose(original, "svd", rank=8, include="*q_proj", progress=False)
    file = tmp_path / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if "q_proj" not in k}
    assert any("experts.0." in name for name in tensors)
    tensors |= {k: v for k, v in result.model.state_dict().items() if "q_proj" in k}
    save_file(tensors, file, metadata={"format": "pt"})
    describe_in_config(tmp_path, description(result.plan))
    loaded = from_pretrained("mixtral", tmp_path)
    assert_same(loaded, result.model)
    loaded.save_pretrained(tmp_path / "again")
    assert_same(from_pretrained("mixtral", tmp_path / "again"), result.model)


# -- tdecomp.load -------------------------------------------------------------------------------


def rows_of(result):
    return [(row.name, row) for row in result.plan if row.method is not None and not row.tied_to]


def on_meta(name):
    with torch.device("meta"):
        return CASES[name].model()


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral"])
def test_load_takes_folders_and_files_into_models_with_and_without_values(
    name, folder_of, tmp_path
):
    result, inputs = decomposed(name), CASES[name].inputs()
    result.save(tmp_path / "small.safetensors")
    wanted = outputs(result.model, inputs)
    for fresh in (CASES[name].build(), on_meta(name)):
        frozen = next(name for name, row in rows_of(result) if row.layer.kind == "Linear")
        fresh.get_submodule(frozen).requires_grad_(False)
        for source in (folder_of(name), tmp_path / "small.safetensors"):
            loaded = tdecomp.load(source, fresh)
            assert_same(loaded, result.model)
            trained = {p.requires_grad for p in loaded.get_submodule(frozen).parameters()}
            assert trained == {False}
            assert loaded.get_submodule(frozen).weight.requires_grad is False
            for mine, its in zip(outputs(loaded, inputs), wanted, strict=True):
                assert torch.equal(mine, its)


class OfOnesOwn(hf.PreTrainedModel):
    """A class that does not tell transformers the values of a buffer that is not saved."""

    config_class = hf.BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.bert, self.head = hf.BertModel(config), torch.nn.Linear(64, 8)
        self.register_buffer("scales", torch.arange(8.0), persistent=False)
        self.post_init()

    def forward(self, **inputs):
        return self.head(self.bert(**inputs).last_hidden_state) * self.scales


def test_load_takes_buffers_that_are_not_saved_from_the_given_model(tmp_path):
    config = hf.BertConfig(**_WIDE, **_TEXT)
    result = tdecomp.decompose(OfOnesOwn(config), "svd", rank=8, progress=False)
    result.save_pretrained(tmp_path)
    fresh, inputs = OfOnesOwn(config), CASES["bert"].inputs()
    loaded = tdecomp.load(tmp_path, fresh)
    assert torch.equal(outputs(loaded, inputs)[0], outputs(result.model, inputs)[0])
    assert loaded.scales.data_ptr() != fresh.scales.data_ptr()


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_diffusers(form, tmp_path):
    case = of_diffusers.MODELS["unet"]
    model = case.build().to(memory_format=form)
    result = tdecomp.decompose(model, ["svd", "lowrank"], rank=8, progress=False)
    result.save_pretrained(tmp_path / "small", max_shard_size="100KB")
    result.model.save_pretrained(tmp_path / "plain")
    kind = type(model)
    wanted = outputs(result.model, case.inputs())
    for folder in (tmp_path / "small", tmp_path / "plain"):
        with torch.device("meta"):
            empty = kind.from_config(kind.load_config(folder))
        for loaded in (tdecomp.load(folder, empty), kind.from_pretrained(folder)):
            assert_same(loaded, result.model)
            for mine, its in zip(outputs(loaded, case.inputs()), wanted, strict=True):
                torch.testing.assert_close(mine, its)
    half = kind.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert loaded.half().float().dtype == torch.float32
    loaded = kind.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "again")
    assert_same(kind.from_pretrained(tmp_path / "again"), result.model)
    whole = tdecomp.recompose(loaded)
    whole.save_pretrained(tmp_path / "whole")
    assert KEY not in json.loads((tmp_path / "whole/config.json").read_text())
    assert_same(kind.from_pretrained(tmp_path / "whole"), whole)


def test_pipelines_of_diffusers(tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    result = tdecomp.decompose(unet, "lowrank", rank=4, progress=False)
    diffusers.DDPMPipeline(result.model, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert_same(pipeline.unet, result.model)
    shard = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("conv1.0.weight"))
    save_file({k: v for k, v in tensors.items() if k != name}, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"no file of weights has them: {name}"):
        diffusers.UNet2DModel.from_pretrained(tmp_path / "unet")


@pytest.mark.parametrize("name", ["resnet50", "vit", "swin"])
def test_timm(name, tmp_path):
    case = of_timm.MODELS[name]
    result = tdecomp.decompose(case.build(), ["svd", "lowrank"], rank=8, progress=False)
    result.save_pretrained(tmp_path, max_shard_size="100KB")
    assert_same(tdecomp.load(tmp_path, case.build()), result.model)
    with torch.device("meta"):
        empty = case.model().eval()
    loaded, x = tdecomp.load(tmp_path, empty), case.inputs()
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model.eval()(x))


# -- folders that do not fit --------------------------------------------------------------------


@pytest.fixture
def folder(folder_of, tmp_path):
    return Path(shutil.copytree(folder_of("bert"), tmp_path / "small"))


def refused(folder, *words, name="bert"):
    for load in (from_pretrained, lambda name, folder: tdecomp.load(folder, CASES[name].build())):
        with pytest.raises((ValueError, OSError)) as caught:
            load(name, folder)
        for word in words:
            assert str(word) in str(caught.value)


def test_missing_and_truncated_shards_are_named(folder):
    shard = sorted(folder.glob("model-*"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused(folder, shard, "damaged")
    shard.unlink()
    refused(folder, shard.name, "missing")


def test_index_that_disagrees_with_the_shards(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(name for name in content["weight_map"] if name.endswith("query.0.weight"))
    file = content["weight_map"].pop(name)
    index.write_text(json.dumps(content))
    refused(folder, index, f"the index has {name!r} in no file, it is in {file}")


def test_newer_version(folder):
    config = json.loads((folder / "config.json").read_text())
    config[KEY] |= {"format": 3, "version": "9.8.7"}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "format 3, written by tdecomp 9.8.7", "update tdecomp")


def test_ordinary_folder(tmp_path):
    CASES["bert"].build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}: .*nothing is decomposed there"):
        tdecomp.load(tmp_path, CASES["bert"].build())


def test_another_architecture(folder_of):
    with pytest.raises(ValueError, match=r"layer 'bert\.e.*the model has no such layer"):
        tdecomp.load(folder_of("bert"), CASES["llama"].build())
    with pytest.raises(ValueError, match="has none of the layers that were decomposed"):
        hf.GPT2Model.from_pretrained(folder_of("bert"), ignore_mismatched_sizes=True)
