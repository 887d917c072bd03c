"""Chains that a model's configuration does not know of, where its library saves it."""

import inspect
import itertools
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

import tdecomp
from tdecomp.integrations.saving import teach
from tests.checkpoint.libraries import (
    KEY,
    OPTIONS,
    Plain,
    WithConfig,
    WithMapping,
    comes_back,
    decomposed,
    network,
    plain,
    written,
)
from tests.checkpoint.networks import assert_same


class OfConfig(WithConfig):
    """A class whose library is taught, here and not for other tests."""


class OfMapping(WithMapping):
    """Likewise."""


teach(OfConfig)
teach(OfMapping)
BASES = [OfConfig, OfMapping]


def said(model):
    """Everything that saving might leave on a model."""
    models = [m for m in model.modules() if hasattr(m, "save_pretrained")]
    return [(m.as_dict(), {"save_pretrained", "_weight_conversions"} & {*vars(m)}) for m in models]


def encoder(model):
    model.encoder = decomposed(model.encoder).model


def encoder_in_place(model):
    decomposed(model.encoder, inplace=True)


def head(model):
    model.head = decomposed(model.head).model


def head_in_place_within_the_encoder(model):
    model.encoder.first = decomposed(nn.Sequential(model.encoder.first)).model[0]


PARTS = [encoder, encoder_in_place, head, head_in_place_within_the_encoder]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("part", PARTS)
def test_part_that_was_decomposed_by_itself(tmp_path, base, part):
    whole = network(base)
    part(whole)
    before = said(whole)
    comes_back(whole, tmp_path, lambda: network(base))
    assert said(whole) == before
    rows = written(tmp_path / "first")[KEY]["plan"]["rows"]
    chains = {name for name, m in whole.named_modules() if isinstance(m, tdecomp.Chain)}
    assert {row["name"] for row in rows} == chains


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("parts", [*itertools.permutations([encoder_in_place, head])])
def test_one_part_after_the_other(tmp_path, base, parts):
    whole = network(base)
    for part in parts:
        part(whole)
    comes_back(whole, tmp_path / "whole", lambda: network(base))
    comes_back(whole.encoder, tmp_path / "encoder", lambda: network(base).encoder)
    comes_back(whole, tmp_path / "again", lambda: network(base))


def test_the_plan_counts_the_parameters_of_the_whole(tmp_path):
    whole = network(OfConfig)
    count = sum(p.numel() for p in whole.parameters())
    encoder(whole)
    whole.save_pretrained(tmp_path)
    plan = written(tmp_path)[KEY]["plan"]
    assert plan["before"]["params"] == count
    assert plan["after"]["params"] == sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("base", BASES)
def test_plan_that_is_right_already_is_kept(tmp_path, base):
    result = decomposed(network(base), exclude="head")
    comes_back(result.model, tmp_path, lambda: network(base))
    for name in ("first", "second"):
        plan = tdecomp.Plan.from_dict(written(tmp_path / name)[KEY]["plan"])
        assert plan["head"].reason == "excluded by 'head'"
        assert plan["layer"].expected_error == result.plan["layer"].expected_error


def test_layers_that_were_exchanged_added_and_put_back(tmp_path):
    model = decomposed(network(OfConfig)).model
    model.head = decomposed(nn.Linear(16, 16), rank=2).model  # in the place of a chain of rank 4
    model.encoder.second = model.encoder.second.to_layer()
    assert comes_back(model, tmp_path, lambda: network(OfConfig)).head.rank == 2
    model.more = decomposed(nn.Linear(16, 16)).model

    def deeper():
        model = network(OfConfig)
        model.more = nn.Linear(16, 16)
        return model

    comes_back(model, tmp_path / "more", deeper)


@pytest.mark.parametrize("base", BASES)
def test_models_without_chains_are_saved_as_before(tmp_path, base):
    model = network(base)
    model.save_pretrained(tmp_path)
    assert KEY not in written(tmp_path)
    assert inspect.signature(base.save_pretrained) == inspect.signature(WithConfig.save_pretrained)
    teach(base)  # again
    assert inspect.unwrap(base.save_pretrained) is base.save_pretrained.__wrapped__


@pytest.mark.parametrize("base", BASES)
def test_saving_that_fails_leaves_the_model_as_it_was(tmp_path, base):
    whole = network(base)
    encoder(whole)
    before = said(whole)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        whole.save_pretrained(tmp_path / "file")
    assert said(whole) == before


def refused(saved, folder, words):
    with pytest.raises(ValueError, match=words):
        saved.save_pretrained(folder)
    assert not folder.exists()


def test_parts_with_other_options_of_one_method_are_refused(tmp_path):
    whole, options = network(OfConfig), {**OPTIONS, "allow_expansion": True}
    for name, shapes in (("layer", ((4, 4), (4, 4))), ("head", ((2, 8), (8, 2)))):
        part = tdecomp.decompose(getattr(whole, name), tdecomp.TT(*shapes), **options)
        setattr(whole, name, part.model)
    before = said(whole)
    refused(whole, tmp_path / "no", "layer 'head': 'tt' has other options there")
    assert said(whole) == before


def test_a_quantized_whole_is_refused(tmp_path):
    whole = network(OfConfig)
    head(whole)
    whole.config.quantization_config = {"quant_method": "other"}
    refused(whole, tmp_path / "no", "the model is quantized, too")
    assert whole.config.quantization_config == {"quant_method": "other"}


@pytest.mark.parametrize("within", [False, True])
def test_batchnorm_that_was_folded_into_a_part_is_refused(tmp_path, within):
    whole = network(OfConfig)
    whole.layer = decomposed(whole.layer).model
    fused = tdecomp.fuse_batchnorm(whole, torch.ones(2, 16))
    if within:
        whole.encoder = fused
        fused = whole
    refused(fused, tmp_path / "no", "batch norm was folded in")


# -- factors of other sizes ---------------------------------------------------------------------

STAGES = {
    "smaller": (0, nn.Linear(16, 3, bias=False), r"0\.weight is \(3, 16\), expected \(4, 16\)"),
    "wider": (1, nn.Linear(4, 24), r"1\.bias is \(24,\), expected \(16,\); 1\.weight is \(24, 4\)"),
    "bias": (0, nn.Linear(16, 4), r"0\.bias is \(4,\), expected none"),
    "no bias": (1, nn.Linear(4, 16, bias=False), r"1\.bias is not there, expected \(16,\)"),
    "other": (1, nn.Identity(), r"1\.bias is not there, .*1\.weight is not there"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_stages_of_other_sizes_are_refused_where_they_are_saved(tmp_path, stage):
    at, module, words = STAGES[stage]
    result = decomposed(network(OfConfig))
    result.model.head[at] = module
    words = rf"layer 'head': .* by svd at rank 4: {words}.*lower ranks by tdecomp\.reduce_ranks"
    for saved in (result.model, result):
        refused(saved, tmp_path / "no", words)
    with pytest.raises(ValueError, match=words):
        result.save(tmp_path / "no")
    untaught = decomposed(network())
    untaught.model.head[at] = module
    refused(untaught, tmp_path / "no", words)


def test_a_stage_more_is_refused_and_the_remedy_helps(tmp_path):
    model = decomposed(network(OfConfig)).model
    model.head.append(nn.Linear(16, 16))
    refused(model, tmp_path / "no", "layer 'head': .*: 3 stages, expected 2")
    del model.head[2]
    model.head[0], model.head[1] = nn.Linear(16, 3, bias=False), nn.Linear(3, 16)
    refused(model, tmp_path / "no", "at rank 4")
    model.head = model.head.to_layer()
    comes_back(model, tmp_path, lambda: network(OfConfig))


def test_masked_factors_are_those_of_the_chain(tmp_path):
    """They are saved by other names, which training that goes on reads."""
    model = decomposed(network(OfConfig)).model
    prune.l1_unstructured(model.head[0], "weight", 0.5)
    model.save_pretrained(tmp_path / "masked")
    prune.remove(model.head[0], "weight")
    comes_back(model, tmp_path, lambda: network(OfConfig))


class Given(Plain):
    """As transformers has them: what is written may be given."""

    def save_pretrained(self, save_directory, state_dict=None):
        save_directory.mkdir(exist_ok=True)
        (save_directory / "config.json").write_text(json.dumps(self.as_dict()))
        save_file(state_dict or self.state_dict(), save_directory / "model.safetensors")


teach(Given)


def test_given_state_dict_is_what_is_looked_at(tmp_path):
    torch.manual_seed(0)
    whole = Given().eval()
    head(whole)
    state = dict(whole.state_dict())
    for parameter in whole.parameters():  # as where they are in other hands
        parameter.data = torch.empty(0)
    whole.save_pretrained(tmp_path, state_dict=state)
    loaded = tdecomp.load(tmp_path, plain())
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    small = state | {"head.0.weight": torch.ones(3, 16)}
    with pytest.raises(ValueError, match=r"0\.weight is \(3, 16\)"):
        whole.save_pretrained(tmp_path, state_dict=small)
    others = {name: value for name, value in state.items() if name != "head.0.weight"}
    whole.save_pretrained(tmp_path, others)  # whatever it is for: it has no such chain
    assert KEY not in written(tmp_path)


# -- libraries that are imported ----------------------------------------------------------------


@pytest.mark.parametrize(
    "module, name",
    [
        ("transformers.modeling_utils", "PreTrainedModel"),
        ("diffusers.models.modeling_utils", "ModelMixin"),
    ],
)
@pytest.mark.parametrize("way", ["decompose", "apply", "load"])
def test_libraries_are_taught_by_what_makes_chains(tmp_path, monkeypatch, module, name, way):
    class OfLibrary(WithConfig):
        pass

    part = decomposed(nn.Linear(16, 16))
    part.save(tmp_path / "part.safetensors")
    whole = network(OfLibrary)
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: OfLibrary}))
    layer = nn.Linear(16, 16)
    whole.head = {
        "decompose": lambda: decomposed(layer).model,
        "apply": lambda: tdecomp.apply(layer, part.plan, progress=False).model,
        "load": lambda: tdecomp.load(tmp_path / "part.safetensors", layer),
    }[way]()
    whole.save_pretrained(tmp_path)
    assert_same(tdecomp.load(tmp_path, network(OfLibrary)), whole)
