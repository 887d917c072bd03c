"""MACs of a call, whichever kernel runs, against products written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention
from torch.utils import flop_counter

import tdecomp
from tdecomp.model.macs import MacCounter
from tdecomp.runtime.torch_state import no_fast_path


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
        (torch.cdist, [(2, 5, 4), (2, 3, 4)], 2 * 5 * 3 * 4),
        (torch.cdist, [(40, 4), (30, 4)], 40 * 30 * 4),
        (torch.pdist, [(5, 4)], 10 * 4),
    ],
)
def test_other_products(function, shapes, macs):
    assert counted(function, *map(torch.randn, shapes)) == macs


@torch.library.custom_op("tdecomp_tests::product", mutates_args=())
def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x @ y


@torch.library.custom_op("tdecomp_tests::shifted", mutates_args=())
def shifted(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return x + by


def named(function, *args):
    with torch.no_grad(), MacCounter() as counter:
        function(*args)
    assert not counter.macs
    return counter.uncounted


SQUARE, HALF = torch.rand(4, 4) + torch.eye(4), torch.ones(4, 32, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "function, args, operator",
    [
        (torch.linalg.solve, (SQUARE, SQUARE), "aten::_linalg_solve_ex"),
        (torch.linalg.pinv, (SQUARE,), "aten::linalg_pinv"),
        (torch.linalg.qr, (SQUARE,), "aten::linalg_qr"),
        (torch.matrix_exp, (SQUARE,), "aten::linalg_matrix_exp"),
        (torch.fft.rfft, (SQUARE,), "aten::_fft_r2c"),
        (torch.sparse.mm, (torch.eye(4).to_sparse(), SQUARE), "aten::_sparse_addmm"),
        (torch.conv_tbc, (SQUARE[None], SQUARE[None], SQUARE[0]), "aten::conv_tbc"),
        (torch._weight_int8pack_mm, (HALF, HALF.char(), HALF[:, 0]), "aten::_weight_int8pack_mm"),
        (product, (SQUARE, SQUARE), "tdecomp_tests::product"),
    ],
)  # fmt: skip
def test_operators_that_nobody_can_count_are_named(function, args, operator):
    assert named(function, *args) == {operator}


def test_operators_without_products_are_not_named():
    def rest(x):
        x = nn.functional.layer_norm(torch.cat([x, x]).softmax(-1) * x.repeat(2, 1), (4,))
        x = nn.functional.interpolate(x[None, None], scale_factor=2, mode="bilinear")[0]
        x = nn.functional.grid_sample(x[None], torch.zeros(1, 3, 3, 2), align_corners=False)
        x.new_zeros(x.shape).index_copy_(0, torch.tensor([0]), x)
        shifted(x, torch.ones(1))
        return torch.linalg.vector_norm(x).clamp(max=1).cumsum(0)

    assert named(rest, SQUARE) == set()


def test_a_plan_names_what_it_cannot_count_until_there_is_a_formula(monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.mix = nn.Linear(8, 8), nn.Parameter(torch.eye(8))

        def forward(self, x):
            return product(self.fc(x), self.mix)

    def plan():
        return tdecomp.plan(Net(), "svd", rank=2, example_inputs=torch.ones(3, 8))

    words = "MACs 192 → 96 (0.500) without those of tdecomp_tests::product"
    assert words in plan().summary()
    assert words in tdecomp.Plan.from_json(plan().to_json()).summary()
    assert words in tdecomp.apply(Net(), plan(), progress=False).report.summary()
    monkeypatch.setattr(flop_counter, "flop_registry", dict(flop_counter.flop_registry))
    flop_counter.register_flop_formula(torch.ops.tdecomp_tests.product)(
        lambda a, b, **_: 2 * a[0] * a[1] * b[1]
    )
    assert "MACs 384 → 288 (0.750)" in plan().summary()
    assert "without" not in plan().summary()
    assert plan()["mix"].macs_before == 192


def test_a_formula_that_fails_is_that_of_an_operator_that_is_not_known(monkeypatch):
    registry = {**flop_counter.flop_registry, torch.ops.aten.mm: lambda *_, **__: 1 / 0}
    monkeypatch.setattr(flop_counter, "flop_registry", registry)
    assert named(torch.mm, SQUARE, SQUARE) == {"aten::mm"}


def test_tensors_of_a_class_are_counted_by_the_operators_that_they_stand_for():
    rows = torch.nested.nested_tensor([torch.ones(3, 8), torch.ones(2, 8)], layout=torch.jagged)
    assert counted(nn.Linear(8, 4), rows) == 5 * 8 * 4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_of_higher_order():
    q, k = torch.ones(1, 4, 16, 8), torch.ones(1, 2, 16, 8)
    with no_fast_path():
        assert counted(flex_attention, q, k, k, enable_gqa=True) == 4 * 16 * 16 * (8 + 8)


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
