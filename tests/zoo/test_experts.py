"""Experts that are open against those of transformers, tokens that no expert gets among them."""

import copy

import pytest
import torch
import transformers as hf

import tdecomp
from tdecomp.model.opened.experts import OpenExperts
from tests.zoo.of_transformers import MODELS

pytestmark = pytest.mark.slow

_SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
KINDS = {
    "mixtral": lambda: MODELS["mixtral"].build(),
    "qwen2_moe": lambda: MODELS["qwen2_moe"].build(),
    # Biases, weights stored the other way round, and a gate of its own.
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **_SMALL,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=8,
            intermediate_size=24,
        )
    ).eval(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_open_experts_compute_the_same(kind):
    model = KINDS[kind]()
    experts = next(m for m in model.modules() if hasattr(m, "down_proj") and hasattr(m, "has_gate"))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    size = experts.down_proj.shape[1 if experts.is_transposed is False else 2]
    x = torch.randn(10, size, requires_grad=True)
    chosen, shares = torch.randint(0, 4, (10, 2)), torch.rand(10, 2)
    state = {name: value.clone() for name, value in experts.state_dict().items()}
    found = []
    for opening in (False, True):
        twin = copy.deepcopy(experts)
        if opening:
            assert OpenExperts.opens(twin)
            OpenExperts.open(twin)
        y = twin(x, chosen, shares)
        found.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    torch.testing.assert_close(*found)
    twin.close()
    assert type(twin) is type(experts)
    torch.testing.assert_close({**twin.state_dict()}, state, rtol=0, atol=0)


def test_tokens_of_no_expert_get_nothing():
    experts = KINDS["mixtral"]().model.layers[0].mlp.experts
    x, chosen = torch.randn(6, 64, requires_grad=True), torch.tensor([[0, 1]] * 5 + [[4, 4]])
    OpenExperts.open(experts)
    y = experts(x, chosen, torch.full((6, 2), 0.5))
    assert not y[5].any()
    assert not torch.autograd.grad(y.sum(), x)[0][5].any()


def test_experts_of_an_unknown_class_have_a_row_with_the_reason():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Parameter(torch.randn(4, 16, 16))
            self.out = torch.nn.Linear(16, 16)

        def forward(self, x):
            return self.out(torch.einsum("bi,eoi->bo", x, self.up))

    plan = tdecomp.plan(Experts(), "svd", rank=2, example_inputs=torch.ones(2, 16), progress=False)
    assert plan["up"].reason == "no layer of a known kind: Experts(4×16×16)"
    assert plan["out"].method == "svd"


@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_chains_are_trained_to_the_original(kind):
    batches = [hf.BatchEncoding({"input_ids": torch.randint(3, 50, (4, 6))}) for _ in range(2)]
    options = {"data": tdecomp.Data(batches, held_out=0), "progress": False}
    recover = [tdecomp.Reconstruct(epochs=8), tdecomp.Distill(steps=8)]
    fitted, trained = (
        tdecomp.decompose(KINDS[kind](), "svd", rank=4, recover=steps, **options).model
        for steps in ([], recover)
    )
    factors = [n for n, _ in fitted.named_parameters() if "experts.down_proj." in n]
    assert factors
    for name in factors:
        assert not torch.equal(fitted.get_parameter(name), trained.get_parameter(name))
