"""Decomposed models whose stages are quantized: they run, stay close, and are saved and loaded."""

import copy
import warnings

import pytest
import torch

import tdecomp
from benchmarks.support.int8 import int8_by_torchao, int8_dynamic, stored_bytes
from tdecomp.model.batches import tensors_of
from tdecomp.model.example import Example
from tests.zoo.of_transformers import MODELS

pytestmark = pytest.mark.slow
pytest.importorskip("torchao")

NAMES = ["bert", "gpt2", "llama", "vit"]
# The share of the outputs' norm that rounding to int8 may take.
CLOSE = {"dynamic": 0.1, "torchao": 0.03, "torchao-activations": 0.05}


def int8_activations_by_torchao(model):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    twin = copy.deepcopy(model)
    quantize_(twin, Int8DynamicActivationInt8WeightConfig())
    return twin


QUANTIZE = {
    "dynamic": int8_dynamic,
    "torchao": int8_by_torchao,
    "torchao-activations": int8_activations_by_torchao,
}


def decomposed(case):
    return tdecomp.decompose(
        case.build(), "svd", rank=0.5, example_inputs=case.inputs(), progress=False
    ).model


@torch.no_grad()
def outputs(model, inputs):
    found = tensors_of(Example(inputs).copied().run(model))
    return torch.cat([x.flatten().float() for x in found if x.is_floating_point()])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized tensor:UserWarning")
@pytest.mark.parametrize("way", QUANTIZE)
@pytest.mark.parametrize("name", NAMES)
def test_stages_are_quantized_and_outputs_stay_close(name, way, tmp_path):
    case, quantize = MODELS[name], QUANTIZE[way]
    small, inputs = decomposed(case), case.inputs()
    small_bytes, wanted = stored_bytes(small), outputs(small, inputs)
    quantized = quantize(small)
    chains = [module for module in quantized.modules() if isinstance(module, tdecomp.Chain)]
    assert chains
    for chain in chains:
        assert isinstance(chain.weight, torch.Tensor)  # what code around the layer reads of it
        for stage in chain:
            weight = stage.weight() if way == "dynamic" else stage.weight
            assert "Int8Tensor" in type(weight).__name__ or weight.dtype == torch.qint8
    found = outputs(quantized, inputs)
    assert (found - wanted).norm() < CLOSE[way] * wanted.norm()
    if way != "dynamic":  # whose packed weights are in no parameter
        assert stored_bytes(quantized) < 0.75 * small_bytes
    torch.testing.assert_close(outputs(small, inputs), wanted)  # it was a copy

    torch.save(quantized.state_dict(), tmp_path / "int8.pt")
    other = decomposed(case)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)  # so that loading is seen
    again = quantize(other)
    with warnings.catch_warnings(action="ignore"):  # torch's own, of how it saves packed weights
        # Packed weights are objects of torch's classes, which `weights_only` refuses.
        # The first releases of Python 3.11 pickle an enum's member, as torchao has, by `getattr`.
        with torch.serialization.safe_globals([getattr]):
            state = torch.load(tmp_path / "int8.pt", weights_only=way != "dynamic")
        again.load_state_dict(state, assign=way != "dynamic")
    torch.testing.assert_close(outputs(again, inputs), found)


def test_a_plan_gives_the_chains_that_a_quantized_state_is_loaded_into(tmp_path):
    """Where weights and plan are saved apart: `apply` builds the chains, then they are filled."""
    case = MODELS["bert"]
    result = tdecomp.decompose(
        case.build(), "svd", rank=0.5, example_inputs=case.inputs(), progress=False
    )
    quantized = int8_by_torchao(result.model)
    torch.save(quantized.state_dict(), tmp_path / "int8.pt")
    plan = tdecomp.Plan.from_json(result.plan.to_json())
    shell = tdecomp.apply(case.build(), plan, progress=False).model
    shell.load_state_dict(torch.load(tmp_path / "int8.pt", weights_only=True), assign=True)
    inputs = case.inputs()
    torch.testing.assert_close(outputs(shell, inputs), outputs(quantized, inputs))
