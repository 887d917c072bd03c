"""Every weight of two or more dimensions has its row, with its reason and its MACs."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import tdecomp
from tdecomp.model.sites import find_sites


class Experts(nn.Module):
    """Weights of three dimensions, chosen by index and one by one."""

    def __init__(self, gathered):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(3, 16, 16)) for _ in range(2))
        self.scale, self.gathered = nn.Parameter(torch.ones(1, 1, 16)), gathered

    def forward(self, x):
        if self.gathered:
            up = self.up[torch.tensor([0, 2])]
            x = torch.einsum("bi,eio->beo", x, up).sum(1)
        else:
            x = sum(x @ up.T for up in self.up[:2])
        return torch.relu(x) @ self.down.float().transpose(1, 2)[0] * self.scale[0]


class Own(nn.Module):
    """A module of somebody's own whose weight is called that."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.zeros(16))

    def forward(self, x):
        return x @ (self.weight / self.weight.norm()) + self.bias


class OutputOf(nn.Module):
    """The first part of what a module returns for its input, given a few times."""

    def __init__(self, module, times=1):
        super().__init__()
        self.module, self.times = module, times

    def forward(self, x):
        out = self.module(*(x,) * self.times)
        return out[0] if isinstance(out, tuple) else out


class Biased(nn.Module):
    """Attention with a learned bias, which a fused kernel is given as the mask."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(5, 5))

    def forward(self, x):
        x = x[None, None]
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=self.bias.exp())[0, 0]


class Scaled(nn.Module):
    """A weight that is masked, scaled by a vector of its own and, with `dtype`, complex."""

    def __init__(self, dtype=None):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(16, 16, dtype=dtype))
        self.scale = nn.Parameter(torch.zeros(16))
        self.register_buffer("mask", torch.ones(16, 16).tril())

    def forward(self, x):
        return (x.to(self.matrix.dtype) @ (self.matrix * self.mask * self.scale.exp()).T).real


# The rows of a module that gets inputs of (5, 16), with their MACs.
_SQUARE = 5 * 16 * 16
ROWS = {
    "embedding": (lambda: nn.Embedding(9, 16), {"": 0}),
    "lstm": (lambda: OutputOf(nn.LSTM(16, 16, num_layers=2)), {"module": 16 * _SQUARE}),
    "gru": (lambda: OutputOf(nn.GRU(16, 8, bidirectional=True)), {"module": 2 * 9 * 5 * 8 * 8}),
    "cell": (lambda: nn.GRUCell(16, 16), {"": 6 * _SQUARE}),
    "attention": (
        lambda: OutputOf(nn.MultiheadAttention(16, 2), 3),
        {"module.in_proj_weight": 3 * _SQUARE, "module.out_proj": _SQUARE},
    ),
    "bilinear": (lambda: OutputOf(nn.Bilinear(16, 16, 16), 2), {"module": 16 * _SQUARE}),
    "gathered": (lambda: Experts(True), {"up": 2 * _SQUARE, "down": _SQUARE}),
    "in turn": (lambda: Experts(False), {"up": 2 * _SQUARE, "down": _SQUARE}),
    "own": (Own, {"": _SQUARE}),
    "parametrized": (lambda: parametrizations.weight_norm(Own()), {"": _SQUARE}),
    "scaled": (Scaled, {"matrix": _SQUARE}),
    "complex": (lambda: Scaled(torch.cfloat), {"matrix": _SQUARE}),
    "mask": (Biased, {"bias": 0}),
    "norm of maps": (lambda: nn.LayerNorm((5, 16)), {"": 0}),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_weight_of_no_known_layer_is_a_row_with_its_macs_and_a_reason(kind):
    make, expected = ROWS[kind]
    model = nn.Sequential(make(), nn.Linear(16, 16)).eval()
    x = torch.arange(5) if kind == "embedding" else torch.randn(5, 16)
    report = tdecomp.decompose(model, "svd", rank=4, example_inputs=x).report

    names = [f"0.{name}".removesuffix(".") for name in expected]
    assert [row.name for row in report] == [*names, "1"]
    assert [report[name].macs_before for name in names] == list(expected.values())
    # Attention is open while it is decomposed.
    assert all((report[name].method is None) == (kind != "attention") for name in names)
    attention = kind in ("attention", "mask")
    assert report.everything_else.macs == (2 * 5 * 5 * 16 if attention else 0)
    assert report.before.params == sum(p.numel() for p in model.parameters())


def test_parameters_with_a_single_long_dimension_are_no_rows():
    module = nn.Sequential(nn.BatchNorm2d(8), nn.PReLU(8), nn.Linear(8, 8))
    module.token = nn.Parameter(torch.zeros(1, 1, 8))
    assert list(find_sites(module)) == ["2"]


def test_a_weight_with_two_names_is_counted_once_and_its_work_is_where_it_is_done():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.body = nn.Embedding(9, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 9, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, ids):
            x = self.body(self.tokens(ids))
            return self.head(x) + x @ self.tokens.weight.T

    plan = tdecomp.plan(Tied(), "svd", rank=4, example_inputs=torch.arange(5))
    assert (plan["tokens"].params_before, plan["head"].params_before) == (9 * 16, 0)
    assert plan["tokens"].macs_before == plan["head"].macs_before == 5 * 9 * 16
    assert plan.everything_else.macs == 0


def test_work_with_a_weight_that_autocast_copies_is_that_of_its_row():
    model = nn.Sequential(OutputOf(nn.MultiheadAttention(16, 2), 3), nn.Linear(16, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = tdecomp.plan(model, "svd", rank=4, example_inputs=torch.randn(5, 16))
    assert plan["0.module.in_proj_weight"].macs_before == 3 * _SQUARE


def test_a_budget_that_cannot_be_met_names_the_largest_of_what_is_left_alone():
    tokens = nn.Sequential(nn.Embedding(999, 16), OutputOf(nn.LSTM(16, 16)), nn.Linear(16, 16))
    ids = torch.arange(5)
    with pytest.raises(ValueError, match=r"of all parameters: '0' \(86\.\d%: .*Embedding\(999×16"):
        tdecomp.plan(tokens, "svd", rank=tdecomp.Budget(params=0.5), example_inputs=ids)
    both = tdecomp.Budget(macs=1.0, params=0.5)
    with pytest.raises(ValueError, match=r"params=0.5 cannot be met.*of all parameters: '0'"):
        tdecomp.plan(tokens, "svd", rank=both, example_inputs=ids)
    with pytest.raises(ValueError, match=r"of all MACs: '1.module' \(88\.9%: .*LSTM\(64×16, 64×16"):
        tdecomp.plan(tokens, "svd", rank=tdecomp.Budget(macs=0.5), example_inputs=ids)


def test_attention_that_no_budget_reaches_is_named():
    class Scores(nn.Linear):
        """Its class is that of a layer, what it does is not."""

        def forward(self, x):
            return (x @ x.mT).softmax(-1) @ super().forward(x)

    model = nn.Sequential(nn.Linear(16, 16), Scores(16, 16))
    words = r"of all MACs: '1' \(.*Scores overrides forward\)$"
    with pytest.raises(ValueError, match=words):
        tdecomp.plan(
            model, "svd", rank=tdecomp.Budget(macs=0.5), example_inputs=torch.randn(64, 16)
        )

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))

    with pytest.raises(ValueError, match=r"of all MACs: everything else \(84\.2%: no layer's"):
        tdecomp.plan(
            Attention(),
            "svd",
            rank=tdecomp.Budget(macs=0.5),
            example_inputs=torch.randn(1, 128, 16),
        )
