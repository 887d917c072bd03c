"""The `save_pretrained` of models whose class has one, as those of Hugging Face's libraries do."""

import copy
import gc
import inspect
import json
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tdecomp
from tests.checkpoint.networks import assert_same
from tests.unchanged import unchanged

OPTIONS = {"rank": 4, "progress": False}


class Library(nn.Module):
    """A class of a library: it writes its configuration and its state dict."""

    width = 16

    def save_pretrained(self, save_directory, is_main_process=True, push_to_hub=False, **options):
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"width": self.width, "options": sorted(options)}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(self.state_dict(), folder / "model.safetensors")
        return "saved"


class Encoder(Library):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 16)

    def forward(self, x):
        return self.second(self.first(x).relu())


class Model(Library):
    """A model with another one of the library in it."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        return self.head(self.norm(self.encoder(x)))


def model():
    torch.manual_seed(0)
    return Model().eval()


def decomposed(given=None, **options):
    return tdecomp.decompose(model() if given is None else given, "svd", **{**OPTIONS, **options})


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def comes_back(saved, folder, fresh=model):
    """Whether a model's plain `save_pretrained` writes what is loaded as it was."""
    assert saved.save_pretrained(folder) == "saved"
    assert config_of(folder)["quantization_config"]["quant_method"] == "tdecomp"
    assert config_of(folder)["width"] == 16
    loaded = tdecomp.load(folder, fresh())
    assert_same(loaded, saved)
    assert_same(tdecomp.load(folder, fresh()), loaded)
    return loaded


def is_ordinary(saved, folder):
    """Whether it is saved as if nothing had ever been decomposed."""
    saved.save_pretrained(folder)
    assert "save_pretrained" not in vars(saved)
    assert "quantization_config" not in config_of(folder)
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_plain_save_and_that_of_the_result_write_the_same(tmp_path):
    result = decomposed()
    comes_back(result.model, tmp_path / "plain")
    result.save_pretrained(tmp_path / "result", variant="fp16")
    for name in ("model.safetensors", "README.md"):
        files = [tmp_path / kind / name for kind in ("plain", "result")]
        assert files[0].read_bytes() == files[1].read_bytes()
    described = [config_of(tmp_path / kind)["quantization_config"] for kind in ("plain", "result")]
    assert described[0] == described[1]
    assert described[0]["plan"] == json.loads(result.plan.to_json())
    assert config_of(tmp_path / "result")["options"] == ["max_shard_size", "variant"]


def test_the_given_model_is_saved_as_before(tmp_path):
    given = model()
    with unchanged(given):
        decomposed(given)
    is_ordinary(given, tmp_path)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies_save_themselves(tmp_path, copied):
    result = decomposed()
    twin = copied(result.model)
    with torch.no_grad():
        twin.head[0].weight.add_(1.0)
    comes_back(twin, tmp_path / "twin")
    comes_back(result.model, tmp_path / "first")


def test_changed_in_place(tmp_path):
    given = model()
    decomposed(given, inplace=True)
    comes_back(given, tmp_path)


def test_in_place_that_fails_leaves_it_as_it_was(tmp_path):
    given = model()
    optimizer = torch.optim.SGD(given.parameters(), lr=0.1)
    optimizer.state = None  # which cannot be followed
    with pytest.raises((TypeError, AttributeError)):
        decomposed(given, inplace=True, optimizers=optimizer)
    assert type(given.head) is nn.Linear
    is_ordinary(given, tmp_path)


def test_nothing_to_decompose(tmp_path):
    is_ordinary(decomposed(exclude="*").model, tmp_path)


def test_two_steps(tmp_path):
    first = decomposed(include="head")
    second = decomposed(first.model, include="encoder*", rank=3)
    assert sum(isinstance(m, tdecomp.Chain) for m in second.model.modules()) == 3
    comes_back(second.model, tmp_path / "both")
    comes_back(first.model, tmp_path / "first")


def test_two_steps_with_other_options_of_one_method_are_refused(tmp_path):
    first = tdecomp.decompose(
        model(), tdecomp.TT((4, 4), (4, 4)), include="head", allow_expansion=True, **OPTIONS
    )
    second = tdecomp.decompose(
        first.model, tdecomp.TT((4, 4), (8, 4)), include="encoder.first", allow_expansion=True,
        **OPTIONS,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"layer 'head': 'tt' has other options there"):
        second.model.save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_lower_ranks(tmp_path):
    result = decomposed()
    lower = tdecomp.reduce_ranks(result, rank=2, progress=False)
    assert comes_back(lower.model, tmp_path / "lower").head.rank == 2
    assert comes_back(result.model, tmp_path / "before").head.rank == 4
    tdecomp.reduce_ranks(result, rank=3, inplace=True, progress=False)
    assert comes_back(result.model, tmp_path / "after").head.rank == 3


@pytest.mark.parametrize("inplace", [False, True])
def test_recomposed_model_is_an_ordinary_one(tmp_path, inplace):
    result = decomposed()
    is_ordinary(tdecomp.recompose(result.model, inplace=inplace), tmp_path / "whole")
    if not inplace:
        comes_back(result.model, tmp_path / "small")


def test_recomposing_in_place_that_fails_leaves_it_as_it_was(tmp_path):
    result = decomposed()
    result.model.head[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks of its own"):
        tdecomp.recompose(result.model, inplace=True)
    comes_back(result.model, tmp_path)


def test_layers_put_back_by_hand_are_layers(tmp_path):
    result = decomposed()
    result.model.head = result.model.head.to_layer()
    assert type(comes_back(result.model, tmp_path / "one").head) is nn.Linear
    for name in ("first", "second"):
        encoder = result.model.encoder
        setattr(encoder, name, encoder.get_submodule(name).to_layer())
    result.model.save_pretrained(tmp_path / "all")
    assert "quantization_config" not in config_of(tmp_path / "all")


def test_models_within_a_model_save_themselves(tmp_path):
    encoder = decomposed().model.encoder
    loaded = comes_back(encoder, tmp_path, lambda: model().encoder)
    rows = config_of(tmp_path)["quantization_config"]["plan"]["rows"]
    assert [row["name"] for row in rows] == ["first", "second"]
    assert isinstance(loaded.first, tdecomp.Chain)


@pytest.mark.parametrize("inplace", [False, True])
def test_folded_batchnorm_refuses(tmp_path, inplace):
    torch.manual_seed(0)
    given = nn.Sequential()
    given.add_module("model", model())
    whole = Chained(given.model).eval()
    result = decomposed(whole)
    fused = tdecomp.fuse_batchnorm(result.model, torch.ones(2, 16), inplace=inplace)
    with pytest.raises(ValueError, match="batch norm was folded in.*save the model first"):
        copy.deepcopy(fused).save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small").exists()
    if not inplace:
        comes_back(result.model, tmp_path / "before", lambda: Chained(model()).eval())


class Chained(Library):
    def __init__(self, parts):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(16, 16), parts.norm, parts.head

    def forward(self, x):
        return self.head(self.norm(self.layer(x)))


def test_adapters_refuse(tmp_path):
    result = decomposed()
    result.model.head[0].base_layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'head\.0' holds an adapter.*merge_and_unload"):
        result.model.save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_uploads_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="upload_folder afterwards"):
        decomposed().model.save_pretrained(tmp_path / "small", push_to_hub=True)
    assert not (tmp_path / "small").exists()


def test_only_the_main_process_writes_the_plan(tmp_path):
    decomposed().model.save_pretrained(tmp_path, is_main_process=False)
    assert "quantization_config" not in config_of(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_signature_is_that_of_the_class():
    small, whole = decomposed().model, model()
    assert inspect.signature(small.save_pretrained) == inspect.signature(whole.save_pretrained)


def test_one_that_somebody_else_put_there_stays(tmp_path):
    given = model()
    given.save_pretrained = lambda folder: folder
    result = decomposed(given)
    assert result.model.save_pretrained(tmp_path) == tmp_path


def test_memory_is_freed_with_the_model():
    gc.collect()
    gc.disable()
    try:
        result = decomposed()
        held = weakref.ref(result.model.head)
        save = result.model.save_pretrained
        del result
        assert held() is None
    finally:
        gc.enable()
    with pytest.raises(ReferenceError, match="the model of this save_pretrained is gone"):
        save("folder")
