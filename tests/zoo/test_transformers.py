"""What people do next: generate, train with checkpoints, add to the vocabulary, store."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import tdecomp
from tdecomp.model.batches import tensors_of
from tests.zoo.of_transformers import MODELS, VOCABULARY

pytestmark = pytest.mark.slow


def decomposed(name, **options):
    case = MODELS[name]
    return tdecomp.decompose(
        case.build(), "auto", rank=0.5, example_inputs=case.inputs(), progress=False, **options
    ).model


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "t5", "whisper"])
def test_generates_with_a_cache_what_it_does_without(name):
    model = decomposed(name)
    inputs = MODELS[name].inputs()
    key = "input_features" if name == "whisper" else "input_ids"
    with_cache, without = (
        model.generate(inputs[key], max_new_tokens=6, do_sample=False, use_cache=cached)
        for cached in (True, False)
    )
    assert with_cache.shape[0] == 2
    assert torch.equal(with_cache, without)
    assert model.generate(inputs[key], max_new_tokens=6, num_beams=2).shape[0] == 2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_trains_with_activations_made_again(name, reentrant):
    plain = decomposed(name).train()
    saving = copy.deepcopy(plain)
    saving.activation_checkpointing_enable({"use_reentrant": reentrant})
    gradients = []
    for model in (plain, saving):
        torch.manual_seed(0)
        options = {} if name == "bert" else {"use_cache": False}
        out = model(**MODELS[name].inputs(), **options)
        sum(x.square().mean() for x in tensors_of(out) if x.requires_grad).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "qwen2", "t5", "whisper"])
def test_the_vocabulary_can_grow(name):
    # transformers resizes a head of its own only where it is a Linear.
    model = decomposed(name, exclude="lm_head" if name == "qwen2" else ())
    model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    assert model.get_input_embeddings().num_embeddings == VOCABULARY + 8
    if name != "bert":
        logits = model(**MODELS[name].inputs()).logits
        assert logits.shape[-1] == VOCABULARY + 8
        assert logits.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_save_pretrained_writes_the_values_of_the_factors(name, tmp_path):
    model = decomposed(name)
    model.save_pretrained(tmp_path, save_original_format=False)
    saved, state = load_file(tmp_path / "model.safetensors"), model.state_dict()
    assert saved.keys() <= state.keys()
    torch.testing.assert_close(saved, {key: state[key] for key in saved}, rtol=0, atol=0)
    left_out = {key for key in state if key not in saved}
    # What is tied is written once, and tied again where it is loaded.
    assert left_out <= {*model.all_tied_weights_keys}


# Embeddings, and what is tied to them -------------------------------------------------------------

TIED = {"gpt2": "transformer.wte", "llama": "model.embed_tokens", "t5": "shared",
        "bert_for_tokens": "bert.embeddings.word_embeddings"}  # fmt: skip
HEADS = {"bert_for_tokens": "cls.predictions.decoder"}
WIDER = VOCABULARY + 8
BUDGETS = {
    "params": tdecomp.Budget(params=0.5),
    "macs": tdecomp.Budget(macs=0.5),
    "named": {"*": 8},
}


def are_tied(model, name):
    table = model.get_submodule(TIED[name])
    head = model.get_submodule(HEADS.get(name, "lm_head"))
    ends = [m[at] if isinstance(m, tdecomp.Chain) else m for m, at in ((table, 0), (head, -1))]
    return ends[0].weight is ends[1].weight


@pytest.mark.parametrize("rank", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings_stay_tied(name, rank, tmp_path):
    case = MODELS[name]
    inputs = case.inputs()
    result = tdecomp.decompose(
        case.build(), "svd", rank=rank, example_inputs=inputs, progress=False
    )
    model = result.model
    if rank == BUDGETS["named"]:
        assert isinstance(model.get_submodule(TIED[name]), tdecomp.Chain)
    assert are_tied(model, name)
    assert result.report.after.params == sum(p.numel() for p in model.parameters())
    wanted = tensors_of(model(**inputs))
    model.tie_weights()
    torch.testing.assert_close(tensors_of(model(**inputs)), wanted)

    result.save(tmp_path / "tied.safetensors")
    loaded = tdecomp.load(tmp_path / "tied.safetensors", case.build())
    assert are_tied(loaded, name)
    torch.testing.assert_close(tensors_of(loaded(**inputs)), wanted)

    model.save_pretrained(tmp_path, save_original_format=False)
    saved, state = load_file(tmp_path / "model.safetensors"), model.state_dict()
    kept = {state[key].data_ptr() for key in saved}
    assert all(state[key].data_ptr() in kept for key in state.keys() - saved.keys())

    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-2)
    outputs = tensors_of(model(**inputs))
    sum(x.square().mean() for x in outputs if x.requires_grad).backward()
    optimizer.step()
    assert are_tied(model, name)

    for grown in (model.eval(), loaded):
        for size in (WIDER, VOCABULARY - 8):
            grown.resize_token_embeddings(size, mean_resizing=False)
            assert grown.get_input_embeddings().num_embeddings == size
            assert are_tied(grown, name)
            few = {key: x.clamp(max=size - 1) for key, x in inputs.items()}
            logits = grown(**few).logits
            assert logits.shape[-1] == size
            assert logits.isfinite().all()


def test_an_embedding_of_its_own_grows():
    model = tdecomp.decompose(
        MODELS["qwen2"].build(), "svd", rank={"model.embed_tokens": 8}, progress=False
    ).model
    model.resize_token_embeddings(WIDER)
    assert model.get_input_embeddings().num_embeddings == WIDER
    assert model(**MODELS["qwen2"].inputs()).logits.shape[-1] == WIDER
