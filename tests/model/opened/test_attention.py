"""Open attention answers as `nn.MultiheadAttention` does, in every way that it can be called."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.layers.chain import Chain
from tdecomp.model.opened.attention import OpenAttention, SeparateAttention
from tdecomp.model.opened.scope import closed, opened

QUIET = {"progress": False}
SIZE, HEADS, LENGTH, BATCH = 16, 4, 5, 3
OPTIONS = ("batch_first", "bias", "add_bias_kv", "add_zero_attn")
KINDS = [
    dict(zip(OPTIONS, values, strict=True))
    for values in product((False, True), repeat=len(OPTIONS))
]
FULL = {"rank": tdecomp.Ratio(1.0, of="rank"), "allow_expansion": True, **QUIET}


def attention(training=False, seed=0, **options):
    torch.manual_seed(seed)
    layer = nn.MultiheadAttention(SIZE, HEADS, dropout=0.3, **options)
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return layer.train(training)


def inputs(layer, other=False, batched=True):
    """Query, key and value: the same tensor, or three of which two have another length."""
    sizes = [(LENGTH, SIZE), (LENGTH + 2, layer.kdim), (LENGTH + 2, layer.vdim)]
    x = [torch.randn(BATCH, length, size) for length, size in sizes]
    x = [t if layer.batch_first else t.transpose(0, 1) for t in x]
    x = x if batched else [t[0] if layer.batch_first else t[:, 0] for t in x]
    return tuple(x) if other else (x[0],) * 3


def ways(keys, batched):
    """Keyword arguments of a call, with every kind of mask."""
    padding = torch.zeros(BATCH, keys, dtype=torch.bool)
    padding[1:, -2:] = True
    padding = padding if batched else padding[1]
    mask = torch.triu(torch.ones(LENGTH, keys, dtype=torch.bool), 1)
    each = mask.expand((BATCH if batched else 1) * HEADS, LENGTH, keys)
    return [
        {},
        {"need_weights": False},
        {"average_attn_weights": False, "attn_mask": -3 * mask.float()},
        {"key_padding_mask": padding},
        {"key_padding_mask": padding, "attn_mask": mask, "need_weights": False},
        {"key_padding_mask": padding, "attn_mask": mask, "is_causal": True},
        {"attn_mask": each},
        {"attn_mask": mask, "is_causal": True, "need_weights": False},
    ]


def same(layer, other, x, **options):
    """Outputs and weights are equal, and so are the random numbers of dropout."""
    results = []
    for module in (layer, other):
        torch.manual_seed(1)
        results.append(module(*x, **options))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_open_attention_computes_the_same(options, batched, training):
    for kdim, other in ((None, False), (None, True), (12, True)):
        layer = attention(training, kdim=kdim, vdim=kdim and 20, **options)
        x = inputs(layer, other, batched)
        kinds = [SeparateAttention] if kdim else [SeparateAttention, OpenAttention]
        for kind in kinds:
            twin = copy.deepcopy(layer)
            kind.open(twin)
            for way in ways(LENGTH + 2 * other, batched):
                same(layer, twin, x, **way)


@pytest.mark.parametrize("kind", [OpenAttention, SeparateAttention])
def test_closing_brings_the_layer_back(kind):
    layer = attention()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    weight = layer.in_proj_weight
    kind.open(layer)
    assert isinstance(layer, nn.MultiheadAttention)
    layer.close()
    assert type(layer) is nn.MultiheadAttention
    assert list(layer.state_dict()) == list(state)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name])
    assert kind is SeparateAttention or layer.in_proj_weight is weight


def test_wrong_masks_are_refused_as_torch_refuses_them():
    layer = OpenAttention.open(attention())
    x = inputs(layer)
    for options in (
        {"attn_mask": torch.zeros(LENGTH, 1)},
        {"attn_mask": torch.zeros(2, LENGTH, LENGTH)},
        {"key_padding_mask": torch.zeros(BATCH, 1, dtype=torch.bool)},
        {"is_causal": True},
    ):
        with pytest.raises(RuntimeError, match="mask"):
            layer(*x, **options)


def test_a_chain_at_full_rank_is_the_layer():
    for other in (False, True):
        layer = attention(batch_first=True)
        x = inputs(layer, other)
        result = tdecomp.decompose(layer, "svd", example_inputs=x, **FULL)
        same(layer, result.model, x)
        names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if other else ["in_proj_weight"]
        assert [row.name for row in result.report] == [*names, "out_proj"]
        assert all(row.method == "svd" for row in result.report)
        counted = sum(row.macs_before for row in result.report)
        keys = LENGTH + 2 * other
        assert counted == BATCH * SIZE * SIZE * (2 * LENGTH + 2 * keys)
        assert type(layer) is nn.MultiheadAttention


def test_one_projection_alone_may_be_decomposed():
    layer, x = attention(kdim=12, vdim=20), None
    x = inputs(layer, other=True)
    result = tdecomp.decompose(
        layer, "svd", rank=4, include="v_proj_weight", example_inputs=x, **QUIET
    )
    chains = [name for name, m in result.model.named_modules() if isinstance(m, Chain)]
    assert chains == ["v_proj_weight"]
    result.model(*x)[0].sum().backward()
    assert all(p.grad is not None for p in result.model.parameters())


@pytest.mark.parametrize("options", [{}, {"kdim": 8}])
@pytest.mark.parametrize("inplace", [False, True])
def test_made_whole_again_it_has_torchs_own_layers(options, inplace):
    layer = attention(**options)
    model = nn.ModuleDict({"attention": layer})
    kinds = [type(module) for module in model.modules()]
    small = tdecomp.decompose(model, "svd", rank=2, **QUIET).model
    assert isinstance(small["attention"].out_proj, Chain)
    whole = tdecomp.recompose(small, inplace=inplace)
    assert [type(module) for module in whole.modules()] == kinds
    assert vars(whole["attention"]).keys() == vars(layer).keys()


def test_nothing_chosen_leaves_the_very_class():
    layer = attention(batch_first=True)
    x = inputs(layer)
    result = tdecomp.decompose(layer, "svd", rank=16, example_inputs=x, **QUIET)
    assert type(result.model) is nn.MultiheadAttention
    assert result.model.state_dict().keys() == layer.state_dict().keys()
    same(layer, result.model, x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (attention(batch_first=True) for _ in range(2))

    def forward(self, x):
        return self.second(*[self.first(x, x, x)[0]] * 3)[0]


def test_in_place_the_module_stays_the_same_object_and_optimizers_follow():
    model, x = Block(), torch.randn(BATCH, LENGTH, SIZE)
    first, second = model.first, model.second
    optimizer = torch.optim.Adam(model.parameters())
    tdecomp.decompose(
        model, "svd", rank=4, exclude="second", inplace=True, optimizers=optimizer, **QUIET
    )
    assert model.first is first
    assert isinstance(first.in_proj_weight, Chain)
    assert type(second) is nn.MultiheadAttention
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    model(x).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("inplace", [False, True])
def test_after_an_error_the_model_is_as_it_was(inplace):
    model = Block()
    state = {name: id(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        model.second.out_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        tdecomp.decompose(model, "svd", rank=4, inplace=inplace, **QUIET)
    assert {name: id(p) for name, p in model.named_parameters()} == state
    assert all(type(m) is nn.MultiheadAttention for m in (model.first, model.second))


def test_weights_that_others_read_stay_closed():
    class Reader(Block):
        def forward(self, x):
            return super().forward(x) + self.first.in_proj_weight.sum()

    model = Reader()
    plan = tdecomp.plan(model, "svd", rank=4, example_inputs=torch.randn(1, 4, SIZE), **QUIET)
    methods = {row.name: row.method for row in plan}
    assert methods == {
        "first.in_proj_weight": None,
        "first.out_proj": None,
        "second.in_proj_weight": "svd",
        "second.out_proj": "svd",
    }


def test_scopes_nest_and_restore():
    model = Block()
    with opened(model):
        assert isinstance(model.first, OpenAttention)
        inner = model.first.in_proj_weight
        with closed(model):
            assert type(model.first) is nn.MultiheadAttention
        assert model.first.in_proj_weight is inner
    assert type(model.first) is nn.MultiheadAttention


def test_it_is_saved_reduced_refitted_and_exported(tmp_path):
    model, x = Block(), torch.randn(64, LENGTH, SIZE)
    result = tdecomp.decompose(
        model, "svd", rank=6, data=[x], recover=["refit", "reconstruct"], **QUIET
    )
    result.save(tmp_path / "block.safetensors")
    loaded = tdecomp.load(tmp_path / "block.safetensors", Block())
    assert torch.equal(loaded(x), result.model(x))
    again = tdecomp.refit(result.model, model, [x], **QUIET)
    assert again.error_after <= again.error_before
    smaller = tdecomp.reduce_ranks(result, rank=3, **QUIET)
    assert smaller.model.first.in_proj_weight.rank == 3
    moments = tdecomp.calibrate(model, [x], **QUIET)
    assert "first.in_proj_weight" in moments
    exported = torch.export.export(result.model, (x,)).module()
    torch.testing.assert_close(exported(x), result.model(x))


def test_a_weight_that_others_share_is_not_split():
    class Tied(Block):
        def __init__(self):
            super().__init__()
            self.second.in_proj_weight = self.first.in_proj_weight

        def forward(self, x, y):
            return self.second(self.first(x, y, y)[0], y, y)[0]

    model, x, y = Tied().eval(), torch.randn(2, 5, SIZE), torch.randn(2, 3, SIZE)
    count = sum(p.numel() for p in model.parameters())
    result = tdecomp.decompose(model, "svd", example_inputs=(x, y), **FULL)
    assert result.report.before.params == count
    assert [row.name for row in result.report if row.method] == ["first.out_proj"]
    torch.testing.assert_close(result.model(x, y), model(x, y), rtol=1e-4, atol=1e-5)
    twin = result.model
    assert twin.first.in_proj_weight.weight is twin.second.in_proj_weight
    assert result.report.after.params == sum(p.numel() for p in twin.parameters())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_it_can_be_scripted_and_traced():
    layer = attention(batch_first=True)
    x = inputs(layer)
    small = tdecomp.decompose(layer, "svd", rank=4, example_inputs=x, **QUIET).model
    for module in (torch.jit.script(small), torch.jit.trace(small, x)):
        same(small, module, x)
