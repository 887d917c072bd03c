"""Ties that a model declares by name, as those of transformers do, name the chains' factors."""

import pytest
import torch
from torch import nn

import tdecomp

QUIET = {"progress": False}
IDS = torch.arange(12).reshape(2, 6)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(40, 16)

    def forward(self, ids):
        return self.tokens(ids)


class Predictions(nn.Module):
    """As BERT's: it holds the bias of its decoder as its own, too."""

    def __init__(self):
        super().__init__()
        self.decoder, self.bias = nn.Linear(16, 40), nn.Parameter(torch.zeros(40))
        self.decoder.bias = self.bias

    def forward(self, x):
        return self.decoder(x)


class Declares(nn.Module):
    """Ties by name, on its class and on each instance, whenever it is told to."""

    _tied_weights_keys = {  # noqa: RUF012  as transformers has it
        "head.decoder.weight": "body.tokens.weight",
        "head.decoder.bias": "head.bias",
        "other.weight": "body.tokens.weight",
        r"blocks\.\d+": "blocks.0",
    }

    def __init__(self, more=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = Body(), Predictions()
        self.other = nn.Embedding(40, 16) if more else nn.Identity()
        self.all_tied_weights_keys = {
            key: source
            for key, source in self._tied_weights_keys.items()
            if (more or "other" not in key) and "blocks" not in key
        }
        self.tie_weights()

    def tie_weights(self):
        for target, source in self.all_tied_weights_keys.items():
            path, _, name = target.rpartition(".")
            setattr(self.get_submodule(path), name, self.get_parameter(source))

    def forward(self, ids):
        return self.head(self.body(ids))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("given", [{}, {"example_inputs": IDS}], ids=["alone", "tried"])
def test_the_factors_are_named_in_place_of_the_layers(inplace, given):
    model = Declares()
    result = tdecomp.decompose(model, "svd", rank=5, inplace=inplace, **given, **QUIET).model
    expected = {
        "head.decoder.1.weight": "body.tokens.0.weight",
        "head.decoder.1.bias": "head.bias",
    }
    assert result.all_tied_weights_keys == expected
    assert expected.items() <= result._tied_weights_keys.items()
    assert result._tied_weights_keys[r"blocks\.\d+"] == "blocks.0"
    assert "head.decoder.weight" in Declares._tied_weights_keys
    assert result.head.bias is result.head.decoder[-1].bias
    wanted = result(IDS)
    result.tie_weights()
    assert torch.equal(result(IDS), wanted)
    if not inplace:
        assert model.all_tied_weights_keys["head.decoder.weight"] == "body.tokens.weight"
        assert "_tied_weights_keys" not in vars(model)
        assert model.head.bias is model.head.decoder.bias is not result.head.bias


def test_tables_share_both_factors():
    result = tdecomp.decompose(Declares(more=True), "svd", rank=5, **QUIET).model
    assert result.all_tied_weights_keys == {
        "head.decoder.1.weight": "body.tokens.0.weight",
        "head.decoder.1.bias": "head.bias",
        "other.0.weight": "body.tokens.0.weight",
        "other.1.weight": "body.tokens.1.weight",
    }


def test_in_place_is_undone_on_an_error():
    model = Declares()
    declared, bias = dict(model.all_tied_weights_keys), model.head.bias
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["params"] = ()
    with pytest.raises(TypeError), pytest.warns(UserWarning, match="no optimizer had these"):
        tdecomp.decompose(model, "svd", rank=5, inplace=True, optimizers=optimizer, **QUIET)
    assert model.all_tied_weights_keys == declared
    assert "_tied_weights_keys" not in vars(model)
    assert model.head.bias is bias is model.head.decoder.bias


def test_where_they_are_not_tied_the_declaration_stays():
    model = Declares()
    model.head.decoder.weight = nn.Parameter(torch.ones(40, 16) + torch.eye(40, 16))
    result = tdecomp.decompose(model, "svd", rank={"body.tokens": 3}, **QUIET)
    assert result.report["head.decoder"].reason.startswith("its bias is tied")
    assert result.model.all_tied_weights_keys == model.all_tied_weights_keys


def test_a_loaded_model_declares_them(tmp_path):
    result = tdecomp.decompose(Declares(), "svd", rank=5, **QUIET)
    result.save(tmp_path / "tied.safetensors")
    loaded = tdecomp.load(tmp_path / "tied.safetensors", Declares())
    assert loaded.all_tied_weights_keys == result.model.all_tied_weights_keys
    loaded.tie_weights()
    assert torch.equal(loaded(IDS), result.model(IDS))
    assert loaded.head.bias is loaded.head.decoder[-1].bias


def test_an_output_layer_is_as_large_as_its_table_is_now():
    result = tdecomp.decompose(Declares(), "svd", rank=5, **QUIET).model
    table, head = result.body.tokens, result.head.decoder
    table.weight.data = torch.cat([table.weight.data, torch.zeros(3, 5)])
    assert tuple(head.weight.shape) == (43, 16)
    assert head.weight.is_meta
    assert head.bias is result.head.bias


@pytest.mark.parametrize("inplace", [False, True])
def test_layers_that_are_back_are_tied_and_declared_as_before(inplace):
    model = tdecomp.decompose(Declares(more=True), "svd", rank=5, **QUIET).model
    wanted = model(IDS)
    whole = tdecomp.recompose(model, inplace=inplace)
    assert whole.all_tied_weights_keys == Declares(more=True).all_tied_weights_keys
    assert whole._tied_weights_keys == Declares._tied_weights_keys
    table = whole.body.tokens.weight
    assert whole.head.decoder.weight is table is whole.other.weight
    assert whole.head.bias is whole.head.decoder.bias
    torch.testing.assert_close(whole(IDS), wanted)


def trained():
    """A table and an output layer that share one factor, and no longer a product."""
    model = tdecomp.decompose(Declares(), "svd", rank=5, **QUIET).model
    with torch.no_grad():
        model.head.decoder[0].weight.mul_(1.01)
    return model


@pytest.mark.parametrize("inplace", [False, True])
def test_layers_that_are_back_with_other_products_declare_no_tie(inplace):
    model = trained()
    wanted = model(IDS)
    whole = tdecomp.recompose(model, inplace=inplace)
    assert whole.all_tied_weights_keys == {"head.decoder.bias": "head.bias"}
    assert whole.head.decoder.weight is not whole.body.tokens.weight
    torch.testing.assert_close(whole(IDS), wanted)
    whole.tie_weights()  # of names that are there
    torch.testing.assert_close(whole(IDS), wanted)


def test_recomposing_in_place_puts_declarations_back_on_an_error(monkeypatch):
    model = trained()
    declared = dict(model.all_tied_weights_keys)
    monkeypatch.setattr("tdecomp.afterwards.recompose.close_unchanged", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tdecomp.recompose(model, inplace=True)
    assert model.all_tied_weights_keys == declared


@pytest.mark.parametrize("inplace", [False, True])
def test_a_resized_vocabulary_is_multiplied_back(inplace):
    result = tdecomp.decompose(Declares(), "svd", rank=5, **QUIET)
    table, head = result.model.body.tokens, result.model.head.decoder
    table.weight.data, table.num_embeddings = (
        torch.cat([table[0].weight.data, torch.ones(3, 5)]),
        43,
    )
    head.out_features = 43
    head.bias.data = torch.zeros(43)
    with pytest.raises(
        ValueError, match=r"'body.tokens' stands for Embedding\(43→16\), in the plan"
    ):
        tdecomp.reduce_ranks(result, rank=2, **QUIET)
    wanted = result.model(IDS + 31)
    whole = tdecomp.recompose(result.model, inplace=inplace)
    assert whole.body.tokens.num_embeddings == whole.head.decoder.out_features == 43
    torch.testing.assert_close(whole(IDS + 31), wanted)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_chain_whose_module_has_no_weight(inplace):
    model = Declares()
    model.head.decoder = nn.Linear(16, 40)  # no longer tied, though the class declares it
    method = tdecomp.TT(in_shape=(4, 4), out_shape=(5, 8))
    result = tdecomp.decompose(
        model, method, rank=1, include=["head.decoder"], inplace=inplace,
        allow_expansion=True, **QUIET,
    ).model  # fmt: skip
    assert result.head.decoder.method == "tt"
    assert result._tied_weights_keys["head.decoder.weight"] == "body.tokens.weight"


@pytest.mark.parametrize("method", ["svd", tdecomp.TT(), tdecomp.SplitSVD(parts=2)], ids=repr)
def test_a_head_of_its_own_may_have_stages_of_any_kind(method):
    model = Declares()
    model.head.decoder = nn.Linear(16, 40)  # as where a config unties it
    declared = model._tied_weights_keys
    result = tdecomp.decompose(model, method, rank={"head.decoder": 4}, **QUIET)
    assert result.report["head.decoder"].method == getattr(method, "name", method)
    assert result.model(IDS).shape == model(IDS).shape
    key = "head.decoder.weight"
    assert result.model._tied_weights_keys[key] == declared[key]
