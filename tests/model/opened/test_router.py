"""Modules that look like routers: opened where a run shows that they multiply by their weight."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import tdecomp

QUIET = {"progress": False}
FULL = {"rank": tdecomp.Ratio(1.0, of="rank"), "allow_expansion": True, **QUIET}
SIZE, EXPERTS = 16, 4


class ScoreGate(nn.Module):
    """A gate whose scores are computed in some way."""

    def __init__(self, scores):
        super().__init__()
        self.weight, self.scores = nn.Parameter(torch.randn(EXPERTS, SIZE)), scores

    def forward(self, x):
        return self.scores(x, self.weight)


PRODUCTS = {
    "linear": functional.linear,
    "named": lambda x, w: functional.linear(input=x, weight=w),
    "cast": lambda x, w: functional.linear(x.double(), w.to(torch.float64)).float(),
}
OTHERS = {
    "transposed": lambda x, w: x @ w.T,
    "method": lambda x, w: x @ w.t(),
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "cosine": lambda x, w: functional.linear(x, functional.normalize(w, dim=-1)),
    "values": lambda x, w: (x.unsqueeze(-2) * w).sum(dim=-1),
    "half": lambda x, w: functional.linear(x.half(), w.half()).float(),
}


def model_with(scores):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, SIZE), ScoreGate(scores), nn.Linear(EXPERTS, EXPERTS))


@pytest.mark.parametrize("scores", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("shown", ["example_inputs", "data"])
def test_a_gate_that_multiplies_is_a_row(scores, shown, tmp_path):
    model, x = model_with(scores), torch.randn(64, SIZE)
    given = {"example_inputs": x} if shown == "example_inputs" else {"data": [x]}
    result = tdecomp.decompose(model, "svd", **given, **FULL)
    assert result.report["1.projection"].method == "svd"
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-4)
    result.save(tmp_path / "gate.safetensors")
    loaded = tdecomp.load(tmp_path / "gate.safetensors", model_with(scores))
    assert torch.equal(loaded(x), result.model(x))


@pytest.mark.parametrize("scores", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("shown", ["example_inputs", "data", "nothing"])
def test_a_gate_that_needs_the_values_is_left_alone(scores, shown):
    model, x = model_with(scores), torch.randn(64, SIZE)
    given = {"example_inputs": {"example_inputs": x}, "data": {"data": [x]}, "nothing": {}}[shown]
    result = tdecomp.decompose(model, "svd", **given, **FULL)
    assert [row.name for row in result.report if row.method] == ["0", "2"]
    assert "no layer of a known kind" in result.report["1"].reason
    assert type(result.model[1]) is type(model[1]) is ScoreGate
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-3, atol=1e-3)


def test_a_run_that_fails_for_another_reason_is_refused_as_before():
    model = model_with(functional.linear)
    with pytest.raises(ValueError, match="rejected example_inputs"):
        tdecomp.plan(model, "svd", rank=2, example_inputs=torch.randn(3, 5), **QUIET)
    assert isinstance(model[1].weight, nn.Parameter)
