"""MACs of a call, whichever kernel runs, against products written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import tdecomp
from tdecomp.model.macs import MacCounter


def counted(function, *args, **options):
    with torch.no_grad(), MacCounter() as counter:
        function(*args, **options)
    return counter.macs


def written_out(q, k, v, **_):
    """Attention as two products of matrices; queries that share a key have copies of it."""
    copies = q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(copies, dim=-3) for x in (k, v))
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [4, 2, 1])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.ones(7, 9) > 0}])
def test_attention(keys, options, dtype):
    lengths = (7, 7) if options.get("is_causal") else (7, 9)
    q = torch.randn(2, 4, lengths[0], 8, dtype=dtype)
    k, v = (torch.randn(2, keys, lengths[1], 8, dtype=dtype) for _ in range(2))
    found = counted(functional.scaled_dot_product_attention, q, k, v, enable_gqa=True, **options)
    assert found == counted(written_out, q, k, v) == 2 * 4 * 7 * lengths[1] * (8 + 8)


def test_attention_of_plain_matrices():
    q = torch.randn(5, 7, 8)
    found = counted(functional.scaled_dot_product_attention, q, q, torch.randn(5, 7, 6))
    assert found == 5 * 7 * 7 * (8 + 6)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"num_layers": 2}, {"bias": False}]
)
def test_recurrent_layers(kind, options):
    layer, x = kind(8, 16, **options), torch.randn(5, 3, 8)
    weights = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    assert counted(layer, x) == counted(layer.double(), x.double()) == 5 * 3 * weights


def test_grouped_products_are_those_of_the_rows():
    rows = torch.randn(32, 64, dtype=torch.bfloat16)
    experts = torch.randn(4, 64, 16, dtype=torch.bfloat16)
    ends = torch.tensor([8, 8, 24, 32], dtype=torch.int32)
    assert counted(torch._grouped_mm, rows, experts, offs=ends) == 32 * 64 * 16
    batches = torch.randn(4, 5, 64, dtype=torch.bfloat16)
    assert counted(torch._grouped_mm, batches, experts) == 4 * 5 * 64 * 16


@pytest.mark.parametrize(
    "function, shapes, macs",
    [
        (nn.Bilinear(8, 6, 5), [(3, 2, 8), (3, 2, 6)], 3 * 2 * 8 * 6 * 5),
        (torch.mv, [(3, 4), (4,)], 12),
        (torch.dot, [(4,), (4,)], 4),
        (torch.addmv, [(3,), (3, 4), (4,)], 12),
        (torch.addbmm, [(3, 5), (2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
        (lambda a, b: torch.einsum("bij,bjk->bik", a, b), [(2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
        (nn.Linear(4, 5), [(2, 3, 4)], 2 * 3 * 4 * 5),
        (nn.Conv2d(4, 8, 3, groups=2), [(2, 4, 6, 6)], 2 * 16 * 8 * 2 * 9),
    ],
)
def test_other_products(function, shapes, macs):
    assert counted(function, *map(torch.randn, shapes)) == macs


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_a_budget_counts_attention():
    x = torch.randn(1, 256, 64)
    plan = tdecomp.plan(Attention().eval(), "svd", rank=tdecomp.Budget(macs=0.9), example_inputs=x)
    assert plan.everything_else.macs == 2 * 256 * 256 * 64
    assert plan.before.macs == 256 * 64 * (192 + 64) + 2 * 256 * 256 * 64
    assert plan.after.macs <= 0.9 * plan.before.macs


class Queries(nn.Module):
    """Learned queries: a view of a parameter is what its block gets."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 4, 64))
        self.block = nn.Sequential(nn.Linear(64, 64))

    def forward(self, x):
        return self.block(self.query.expand(x.shape[0], -1, -1)) + x


def test_views_of_parameters_may_be_inputs_of_layers():
    x = torch.randn(2, 4, 64)
    result = tdecomp.decompose(
        Queries().eval(), "svd", rank=8, example_inputs=x, data=[x], progress=False
    )
    assert result.report["block.0"].macs_before == 2 * 4 * 64 * 64
    assert result.report.before.macs == 2 * 4 * 64 * 64
