"""Saving by the model's own `save_pretrained`."""

import copy
import itertools
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tdecomp
from tests.checkpoint.libraries import (
    KEY,
    OPTIONS,
    Config,
    Plain,
    WithConfig,
    WithMapping,
    WithNothing,
    comes_back,
    decomposed,
    network,
    plain,
    written,
)
from tests.checkpoint.networks import assert_same
from tests.unchanged import unchanged

ONE = "model.safetensors"


def is_ordinary(saved, folder):
    """Nothing says that it ever was decomposed."""
    saved.save_pretrained(folder)
    assert not {"save_pretrained", "_weight_conversions"} & vars(saved).keys()
    assert KEY not in written(folder)
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("base", [WithConfig, WithMapping])
def test_plain_save_writes_the_plan(tmp_path, base):
    result = decomposed(network(base))
    comes_back(result.model, tmp_path, lambda: network(base))
    assert written(tmp_path / "first")[KEY]["plan"] == json.loads(result.plan.to_json())


@pytest.mark.parametrize("base", [WithConfig, WithMapping])
def test_that_of_the_result_adds_a_readme_and_what_the_class_does_not_save(tmp_path, base):
    model = network(base)
    model.register_buffer("unsaved", torch.ones(3), persistent=False)
    result = decomposed(model)
    result.save_pretrained(tmp_path, max_shard_size="1GB")
    buffers = "buffers_without_state.safetensors"
    assert {file.name for file in tmp_path.iterdir()} == {
        "README.md", "config.json", "model.safetensors", buffers,
    }  # fmt: skip
    assert "tdecomp.load" in (tmp_path / "README.md").read_text()
    fresh = network(base)
    fresh.register_buffer("unsaved", torch.zeros(3), persistent=False)
    loaded = tdecomp.load(tmp_path, fresh.to("meta"))
    assert torch.equal(loaded.unsaved, torch.ones(3))
    assert_same(loaded, result.model)


@pytest.mark.parametrize("base", [WithConfig, WithMapping])
def test_the_given_model_is_saved_as_before(tmp_path, base):
    given = network(base)
    with unchanged(given):
        decomposed(given)
    is_ordinary(given, tmp_path)


def test_a_class_that_writes_no_configuration_refuses_with_the_remedy(tmp_path):
    result = decomposed(network(WithNothing))
    for saved in (result.model, result.model.encoder, copy.deepcopy(result.model)):
        with pytest.raises(ValueError, match=r"which layers are chains; .*result\.save_pretrained"):
            saved.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    result.save_pretrained(tmp_path / "small")
    loaded = tdecomp.load(tmp_path / "small", network(WithNothing))
    assert_same(loaded, result.model)
    whole = tdecomp.recompose(result.model)
    whole.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole/model.safetensors").exists()


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_are_saved_as_they_are(tmp_path, copied):
    result = decomposed(plain())
    twin = copied(result.model)
    with torch.no_grad():
        twin.head[0].weight.add_(1.0)
    comes_back(twin, tmp_path / "twin")
    comes_back(result.model, tmp_path / "first")


@pytest.mark.parametrize("base", [WithConfig, WithMapping])
def test_changed_in_place(tmp_path, base):
    given = network(base)
    decomposed(given, inplace=True)
    comes_back(given, tmp_path, lambda: network(base))


@pytest.mark.parametrize("base", [WithConfig, WithMapping])
def test_in_place_that_fails_leaves_it_as_it_was(tmp_path, base):
    given = network(base)
    optimizer = torch.optim.SGD(given.parameters(), lr=0.1)
    optimizer.state = None  # which cannot be followed
    with pytest.raises((TypeError, AttributeError)):
        decomposed(given, inplace=True, optimizers=optimizer)
    assert type(given.head) is nn.Linear
    is_ordinary(given, tmp_path)


def test_in_place_that_fails_leaves_an_earlier_plan(tmp_path):
    given = plain()
    decomposed(given, include="head", inplace=True)
    optimizer = torch.optim.SGD(given.parameters(), lr=0.1)
    optimizer.state = None
    with pytest.raises((TypeError, AttributeError)):
        decomposed(given, include="layer", inplace=True, optimizers=optimizer)
    comes_back(given, tmp_path)


def test_nothing_to_decompose(tmp_path):
    is_ordinary(decomposed(plain(), exclude="*").model, tmp_path)


@pytest.mark.parametrize("inplace", [False, True])
def test_two_steps(tmp_path, inplace):
    first = decomposed(plain(), include="head")
    second = decomposed(first.model, include="layer", rank=3, inplace=inplace)
    assert comes_back(second.model, tmp_path / "both").layer.rank == 3
    if not inplace:
        comes_back(first.model, tmp_path / "first")
    # That of either result writes what the model has.
    for name, result in (("one", first), ("two", second)):
        result.save_pretrained(tmp_path / name)
        assert_same(tdecomp.load(tmp_path / name, plain()), result.model)


def test_two_steps_with_other_options_of_one_method_refuse(tmp_path):
    options = {"allow_expansion": True, "progress": False, "rank": 4}
    first = tdecomp.decompose(plain(), tdecomp.TT((4, 4), (4, 4)), include="head", **options)
    second = tdecomp.decompose(first.model, tdecomp.TT((2, 8), (8, 2)), include="layer", **options)
    for save in (second.model.save_pretrained, second.save_pretrained):
        with pytest.raises(ValueError, match="layer 'head': 'tt' has other options there"):
            save(tmp_path / "small")
    assert not (tmp_path / "small").exists()


class Own(tdecomp.SVD):
    """A method that no plan can bring back."""

    name = "own"

    def __init__(self, table):
        object.__setattr__(self, "table", table)


def test_methods_that_cannot_be_read_back_refuse(tmp_path):
    result = tdecomp.decompose(network(), Own({}), **OPTIONS)
    for saved in (result.model, result.model.encoder, result):
        with pytest.raises(ValueError, match="method 'own' cannot be rebuilt"):
            saved.save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_class_that_writes_another_configuration(tmp_path):
    class Other(Plain):
        def save_pretrained(self, save_directory):
            super().save_pretrained(save_directory)
            (Path(save_directory) / "config.json").write_text('{"of": "another"}')

    result = decomposed(Other().eval())
    result.save_pretrained(tmp_path)
    assert written(tmp_path)["of"] == "another"
    assert_same(tdecomp.load(tmp_path, Other().eval()), result.model)


class InShards(Plain):
    """As transformers does, it leaves an earlier single file beside shards, or their index."""

    def save_pretrained(self, save_directory, max_shard_size="5GB"):
        folder, shard = Path(save_directory), "model-00001-of-00001.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.as_dict()))
        (folder / shard).unlink(missing_ok=True)
        if max_shard_size == "1KB":
            where = dict.fromkeys(self.state_dict(), shard)
            (folder / f"{ONE}.index.json").write_text(json.dumps({"weight_map": where}))
        save_file(self.state_dict(), folder / (shard if max_shard_size == "1KB" else ONE))


@pytest.mark.parametrize("sizes", [*itertools.product(["5GB", "1KB"], repeat=2)])
def test_saving_over_an_earlier_model_leaves_none_of_its_weights(tmp_path, sizes):
    torch.manual_seed(0)
    given = InShards().eval()
    given.save_pretrained(tmp_path, sizes[0])
    result = decomposed(given)
    result.save_pretrained(tmp_path, max_shard_size=sizes[1])
    assert_same(tdecomp.load(tmp_path, given), result.model)
    weights = {file.name for file in tmp_path.glob("model*")}
    shards = {"model-00001-of-00001.safetensors", f"{ONE}.index.json"}
    assert weights == (shards if sizes[1] == "1KB" else {ONE})


def test_weights_of_two_models_in_one_folder_are_refused(tmp_path):
    torch.manual_seed(0)
    given = InShards().eval()
    given.save_pretrained(tmp_path)
    decomposed(given).model.save_pretrained(tmp_path, "1KB")
    with pytest.raises(ValueError, match=r"weights in model\.safetensors and in the shards.*older"):
        tdecomp.load(tmp_path, given)


def test_pushing_is_refused_since_the_readme_would_be_lost(tmp_path):
    with pytest.raises(ValueError, match=r"README\.md.*huggingface_hub\.upload_folder"):
        decomposed(plain()).save_pretrained(tmp_path / "small", push_to_hub=True)
    assert not (tmp_path / "small").exists()


def test_models_that_are_quantized_beside_refuse(tmp_path):
    model = plain()
    model.config.quantization_config = {"quant_method": "other"}
    result = decomposed(model)
    with pytest.raises(ValueError, match="the model is quantized, too"):
        result.model.save_pretrained(tmp_path / "small")
    assert result.model.config.quantization_config == {"quant_method": "other"}
    del result.model.config.quantization_config
    result.save_pretrained(tmp_path / "small")
    comes_back(result.model, tmp_path)  # plainly, too, from then on


def test_lower_ranks(tmp_path):
    result = decomposed(plain())
    lower = tdecomp.reduce_ranks(result, rank=2, progress=False)
    assert comes_back(lower.model, tmp_path / "lower").head.rank == 2
    assert comes_back(result.model, tmp_path / "before").head.rank == 4
    tdecomp.reduce_ranks(result, rank=3, inplace=True, progress=False)
    assert comes_back(result.model, tmp_path / "after").head.rank == 3


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("base", [WithConfig, WithMapping])
def test_recomposed_model_is_an_ordinary_one(tmp_path, base, inplace):
    result = decomposed(network(base))
    is_ordinary(tdecomp.recompose(result.model, inplace=inplace), tmp_path / "whole")
    if not inplace:
        comes_back(result.model, tmp_path / "small", lambda: network(base))


def test_recomposing_in_place_that_fails_leaves_it_as_it_was(tmp_path):
    result = decomposed(plain())
    result.model.head[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks of its own"):
        tdecomp.recompose(result.model, inplace=True)
    comes_back(result.model, tmp_path)


def test_layers_put_back_by_hand(tmp_path):
    result = decomposed(plain())
    result.model.head = result.model.head.to_layer()
    result.save_pretrained(tmp_path / "result")
    loaded = tdecomp.load(tmp_path / "result", plain())
    assert type(loaded.head) is nn.Linear
    assert_same(loaded, result.model)


def test_models_within_a_model_with_a_configuration_of_their_own(tmp_path):
    def fresh():
        model = network()
        model.encoder.config = Config(width=16)
        return model

    result = decomposed(fresh())
    comes_back(result.model.encoder, tmp_path, lambda: fresh().encoder)
    rows = written(tmp_path / "first")[KEY]["plan"]["rows"]
    assert [row["name"] for row in rows] == ["first", "second"]


@pytest.mark.parametrize("inplace", [False, True])
def test_folded_batchnorm_refuses(tmp_path, inplace):
    result = decomposed(plain())
    fused = tdecomp.fuse_batchnorm(result.model, torch.ones(2, 16), inplace=inplace)
    for saved in (fused, copy.deepcopy(fused), pickled(fused)):
        with pytest.raises(ValueError, match=r"batch norm was folded in.*save the model first"):
            saved.save_pretrained(tmp_path / "small")
    whole = tdecomp.Decomposition(fused, result.report, result.plan)
    with pytest.raises(ValueError, match=r"batch norm was folded in.*save the model first"):
        whole.save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small").exists()
    if not inplace:
        comes_back(result.model, tmp_path / "before")


@pytest.mark.parametrize("base", [WithConfig, WithMapping])
def test_batchnorm_folded_before_decomposing_refuses_but_for_parts_that_have_none(tmp_path, base):
    ordinary = tdecomp.fuse_batchnorm(network(base), torch.ones(2, 16))
    result = decomposed(ordinary)
    for saved in (ordinary, result.model, result):
        with pytest.raises(ValueError, match=r"batch norm was folded in.*save the model first"):
            saved.save_pretrained(tmp_path / "small")
    is_ordinary(ordinary.encoder, tmp_path / "part")
    result.model.encoder.save_pretrained(tmp_path / "chains")
    assert KEY in written(tmp_path / "chains")


@pytest.mark.parametrize("base", [WithConfig, WithMapping])
def test_tensors_that_safetensors_cannot_hold_are_refused_by_name(tmp_path, base):
    result = decomposed(network(base))
    result.model.head.register_buffer("odd", torch.eye(3).to_sparse())
    words = r"'head\.odd' of the state dict is a .*only tensors .*before it is quantized"
    with pytest.raises(ValueError, match=words):
        result.save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small").exists()
