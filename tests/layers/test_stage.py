"""A user's own method whose chain is one module of its own, from outside by `register` alone."""

import copy
import math
import pickle
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.layers.cost import chain_cost
from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerSpec
from tdecomp.layers.stage import id_of
from tdecomp.linalg.svd import truncated_svd
from tdecomp.timing.profile import key_of
from tdecomp.timing.speed import Quartiles

QUIET = {"progress": False}


class KroneckerLinear(nn.Module):
    """A Linear whose weight is a sum of Kronecker products ``left[r] ⊗ right[r]``."""

    def __init__(self, left, right, bias, device=None, dtype=None):
        super().__init__()
        self.left = nn.Parameter(torch.empty(left, device=device, dtype=dtype))  # (rank, o1, i1)
        self.right = nn.Parameter(torch.empty(right, device=device, dtype=dtype))  # (rank, o2, i2)
        out = left[1] * right[1]
        self.bias = nn.Parameter(torch.empty(out, device=device, dtype=dtype)) if bias else None

    def forward(self, x):
        split = x.unflatten(-1, (self.left.shape[2], self.right.shape[2]))  # (..., i1, i2)
        inner = torch.einsum("...ij,rqj->...riq", split, self.right)  # (..., rank, i1, o2)
        y = torch.einsum("...riq,rpi->...pq", inner, self.left).flatten(-2)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class KroneckerStage:
    """The chain's only stage: it has the shapes of both factors."""

    left: tuple[int, int, int]
    right: tuple[int, int, int]
    bias: bool

    @property
    def in_channels(self):
        return self.left[2] * self.right[2]

    @property
    def params(self):
        bias = self.left[1] * self.right[1] if self.bias else 0
        return math.prod(self.left) + math.prod(self.right) + bias

    def macs(self, call):
        return call.batch * (
            self.left[2] * math.prod(self.right) + self.right[1] * math.prod(self.left)
        )

    def output_size(self, size):
        return size

    def build(self, device=None, dtype=None):
        return KroneckerLinear(self.left, self.right, self.bias, device, dtype)

    def put(self, module, values):
        with torch.no_grad():
            module.left.copy_(values[0])
            module.right.copy_(values[1])

    def read(self, module):
        return module.left.detach().double(), module.right.detach().double()

    def to_dict(self):
        return asdict(self)


@dataclass(frozen=True)
class KroneckerFactors(tdecomp.Factors):
    left: torch.Tensor
    right: torch.Tensor

    def to_kernel(self):
        kernel = torch.einsum("rpi,rqj->pqij", self.left, self.right)
        return kernel.flatten(2).flatten(0, 1)

    def stage_weights(self):
        return ((self.left, self.right),)

    def scaled(self, scale):
        return KroneckerFactors(self.left * scale, self.right)


@dataclass(frozen=True)
class Kronecker(tdecomp.Decomposer):
    """Van Loan and Pitsianis 1993, "Approximation with Kronecker Products"."""

    name = "kronecker"
    source = "Van Loan and Pitsianis 1993"

    inner: int = 8

    def refusal(self, spec):
        if spec.ndim or spec.in_channels % self.inner or spec.out_channels % self.inner:
            return f"kronecker takes Linear layers with sizes in multiples of {self.inner}"
        return None

    def _outer(self, spec):
        return spec.out_channels // self.inner, spec.in_channels // self.inner

    def max_rank(self, spec):
        return min(math.prod(self._outer(spec)), self.inner**2)

    def stages(self, spec, rank):
        left, right = (rank, *self._outer(spec)), (rank, self.inner, self.inner)
        return (KroneckerStage(left, right, spec.bias),)

    def fit(self, kernel, rank):
        out, into = (size // self.inner for size in kernel.shape)
        blocks = kernel.reshape(out, self.inner, into, self.inner).transpose(1, 2)
        u, s, vh = truncated_svd(blocks.flatten(2).flatten(0, 1), rank)
        return KroneckerFactors(
            (u * s).T.reshape(-1, out, into), vh.reshape(-1, self.inner, self.inner)
        )


@dataclass(frozen=True)
class Readable(Kronecker):
    """The same, for a method that can tell the factors of its chain."""

    name = "readable"

    def factors_of(self, stage_weights):
        return KroneckerFactors(*stage_weights[0])


@pytest.fixture(autouse=True)
def registered(own_methods):  # noqa: ARG001
    """Both methods are known during a test and forgotten after it."""
    tdecomp.register(Kronecker)
    tdecomp.register(Readable)


def model(seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = (nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32, bias=False))
        return nn.Sequential(*layers).to(dtype).eval()


@pytest.fixture
def x():
    return torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(1))


FULL = {"0": 48, "2": 24}


def test_at_full_rank_a_chain_equals_the_layer_forward_and_backward(x):
    original = model(dtype=torch.float64)
    result = tdecomp.decompose(original, "kronecker", rank=FULL, allow_expansion=True, **QUIET)
    assert type(result.model[0][0]) is KroneckerLinear
    inputs = [x.double().requires_grad_() for _ in range(2)]
    outputs = [net(value) for net, value in zip((original, result.model), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    assert all(p.grad is not None for p in result.model.parameters())


def test_the_report_has_costs_and_errors(x):
    original = model()
    result = tdecomp.decompose(original, "kronecker", rank=2, example_inputs=x, **QUIET)
    for row in result.report:
        chain = result.model.get_submodule(row.name)
        assert (row.method, row.rank) == ("kronecker", 2)
        assert row.params_after == sum(p.numel() for p in chain.parameters())
        spec = row.layer
        assert row.macs_after == Kronecker().stages(spec, 2)[0].macs(Call(15)) < row.macs_before
        kernel = chain(torch.eye(spec.in_channels)) - chain(torch.zeros(spec.in_channels))
        weight = original.get_submodule(row.name).weight
        error = (kernel.T - weight).norm() / weight.norm()
        assert row.weight_error == pytest.approx(error.item(), rel=1e-4)
    assert "kronecker" in str(result.report)


def test_a_chain_may_mix_stages():
    own = KroneckerStage((2, 3, 4), (2, 5, 6), bias=False)
    stock = LayerSpec(15, 7)
    assert chain_cost([own, stock], [Call(2)]).params == own.params + stock.params
    assert chain_cost([own, stock], [Call(2)]).macs == own.macs(Call(2)) + stock.macs(Call(2))


def test_saved_loaded_copied_and_planned(x, tmp_path):
    result = tdecomp.decompose(model(), Kronecker(inner=4), rank=2, **QUIET)
    result.save(tmp_path / "small.safetensors")
    loaded = tdecomp.load(tmp_path / "small.safetensors", model(seed=1))
    expected = result.model(x)
    for net in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(net(x), expected)
        assert net[0].decomposer == Kronecker(inner=4)
        assert net[0].method == "kronecker"
    plan = tdecomp.Plan.from_json(result.plan.to_json())
    assert torch.equal(tdecomp.apply(model(), plan, **QUIET).model(x), expected)


def test_a_trainable_layer_stays_trainable_and_a_frozen_one_frozen():
    original = model()
    original[0].requires_grad_(False)
    changed = tdecomp.decompose(original, "kronecker", rank=2, **QUIET).model
    assert not any(p.requires_grad for p in changed[0].parameters())
    assert all(p.requires_grad for p in changed[2].parameters())


def test_a_chain_is_left_alone_by_a_second_decomposition():
    first = tdecomp.decompose(model(), "kronecker", rank=2, include="0", **QUIET)
    second = tdecomp.decompose(first.model, "svd", rank=2, **QUIET)
    rows = {row.name: row.method or row.reason for row in second.report}
    before = "part of a chain that 'kronecker' made before"
    assert rows == {"0.0.left": before, "0.0.right": before, "2": "svd"}


@pytest.mark.parametrize("method", ["kronecker", "readable"])
def test_refit_leaves_it_alone_and_says_so(method, x):
    original = model()
    # A chain that refit does take, beside one that it does not.
    rank = {"0": 2, "2": 3}
    plan = tdecomp.plan(original, method, rank=rank)
    result = tdecomp.apply(original, plan.edit("2", method="svd", rank=3), **QUIET)
    before = copy.deepcopy(result.model)
    recovery = tdecomp.refit(result.model, original, [x], augment=None, **QUIET)
    assert set(recovery.layers) == {"2"}
    assert any("'0'" in note and method in note for note in recovery.notes)
    assert torch.equal(recovery.model[0](x), before[0](x))


def test_a_budget_mixes_it_with_other_methods(x):
    plan = tdecomp.plan(
        model(), ["kronecker", "svd"], rank=tdecomp.Budget(params=0.5), example_inputs=x, **QUIET
    )
    assert plan.after.params <= 0.5 * plan.before.params


def test_a_saved_profile_knows_it(tmp_path):
    original, x = nn.Linear(64, 48), torch.zeros(4, 64)
    method, call = Kronecker(), Call(4)
    chains = {(LayerSpec(64, 48),): 3.0, method.stages(LayerSpec(64, 48), 2): 2.0}
    times = tdecomp.profile(original, x, "svd", effort="quick", **QUIET)
    times.times = {
        key_of("contiguous", stages, call): Quartiles(seconds, seconds, seconds)
        for stages, seconds in chains.items()
    }
    times.save(tmp_path / "times.json")
    loaded = tdecomp.Profile.load(tmp_path / "times.json")
    assert loaded == times
    assert str(loaded) == str(times)
    assert loaded.chain(method, LayerSpec(64, 48), 2, (call,), "contiguous") == 2.0


def test_it_is_timed(x):
    original = model()
    times = tdecomp.profile(original, x, ["kronecker", "svd"], effort="quick", **QUIET)
    again = tdecomp.profile(original, x, "kronecker", effort="quick", cache=times, **QUIET)
    assert {key: again.times[key] for key in times.times} == times.times
    plan = tdecomp.plan(
        original, "kronecker", rank=1, example_inputs=x, profile=times, only_if_faster=True, **QUIET
    )
    assert all(row.latency_before is not None for row in plan)


def test_stages_are_told_apart_in_a_profile():
    stage = KroneckerStage((2, 3, 4), (2, 5, 6), bias=True)
    assert id_of(stage) == id_of(replace(stage)) != id_of(replace(stage, bias=False))
    assert id_of(LayerSpec(4, 3)) == LayerSpec(4, 3)
