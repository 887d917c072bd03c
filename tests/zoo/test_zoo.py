"""Models as people bring them: planned, decomposed, run, trained, saved, loaded and exported."""

import copy
from unittest import mock

import pytest
import torch

import tdecomp
from tdecomp.model.batches import each_tensor, tensors_of
from tdecomp.model.example import Example
from tests.models import torch_count
from tests.zoo import of_diffusers, of_timm, of_torch, of_transformers

pytestmark = pytest.mark.slow

LIBRARIES = {
    "torch": of_torch,
    "transformers": of_transformers,
    "timm": of_timm,
    "diffusers": of_diffusers,
}
ZOO = {
    f"{library}-{name}": case
    for library, table in LIBRARIES.items()
    for name, case in table.MODELS.items()
}
each_model = pytest.mark.parametrize("name", ZOO)


def outputs(model, inputs):
    """The tensors of its output; the inputs stay as they are."""
    return tensors_of(Example(inputs).copied().run(model))


def decompose(case, methods, rank, **options):
    return tdecomp.decompose(
        case.build(), methods, rank=rank, example_inputs=case.inputs(), progress=False, **options
    )


def check_rows(plan, model):
    """Each weight of two or more long dimensions has a row, and each row a method or a reason."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if sum(size > 1 for size in parameter.shape) > 1:
            parts = name.split(".")
            rows = [".".join(parts[:end]) in plan for end in range(1, len(parts) + 1)]
            # An open module may have other names for what it does with its weights.
            inside = [row for row in plan if row.name.startswith(f"{name.rpartition('.')[0]}.")]
            assert any(rows) or inside, name
    assert all((row.method is None) == bool(row.reason) for row in plan)
    assert sum(row.params_before for row in plan) + plan.everything_else.params == sum(
        p.numel() for p in model.parameters()
    )


def check_macs(case, model, cost, rows):
    """The MACs of a model and of its rows are those that torch counts with all written out."""
    # Which torch's counter does not know: experts are then multiplied one by one.
    with mock.patch.object(torch.nn.functional, "grouped_mm", None):
        counter = torch_count(case.double(model), case.inputs())
    found = {
        name.partition(".")[2]: sum(flops.values()) // 2
        for name, flops in counter.get_flop_counts().items()
        if name != "Global"
    }
    assert cost.macs == counter.get_total_flops() // 2
    for name, macs in rows.items():
        if name in found:
            assert macs == found[name], name
        else:  # a parameter, or a layer that did not run itself: its parent did the work
            assert macs <= found.get(name.rpartition(".")[0], 0), name


@each_model
def test_planned(name):
    case = ZOO[name]
    model, options = case.build(), {"rank": 0.5, "progress": False}
    for given in ({}, {"example_inputs": case.inputs()}, {"data": [case.inputs(4)]}):
        plan = tdecomp.plan(model, "auto", **given, **options)
        check_rows(plan, model)
        if "example_inputs" in given:
            check_macs(case, model, plan.before, {row.name: row.macs_before for row in plan})
            assert plan.everything_else.macs >= 0
            assert not plan.before.uncounted


@each_model
@pytest.mark.parametrize(
    "methods, rank", [("svd", tdecomp.Ratio(0.5, of="macs")), ("auto", 0.5)], ids=["svd", "auto"]
)
def test_decomposed_under_a_ratio(name, methods, rank):
    case = ZOO[name]
    inputs, result = case.inputs(), decompose(case, methods, rank)
    check_macs(
        case, result.model, result.report.after, {r.name: r.macs_after for r in result.report}
    )
    expected = [tensor.shape for tensor in outputs(case.build(), inputs)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = copy.deepcopy(result.model).to(dtype)
        given = each_tensor(inputs, lambda x: x.to(dtype) if x.is_floating_point() else x)  # noqa: B023
        with torch.no_grad():
            found = outputs(model, given)
        assert [tensor.shape for tensor in found] == expected
        assert all(tensor.isfinite().all() for tensor in found)


@each_model
def test_decomposed_by_data_alone(name):
    case = ZOO[name]
    model = case.build()
    tdecomp.decompose(model, "svd", rank=0.5, data=[case.inputs()], inplace=True, progress=False)
    assert any(isinstance(module, tdecomp.Chain) for module in model.modules())
    assert all(tensor.isfinite().all() for tensor in outputs(model, case.inputs()))


@each_model
def test_at_half_of_its_macs(name, tmp_path):
    case = ZOO[name]
    result = decompose(
        case, case.methods, tdecomp.Budget(macs=0.5), data=[case.inputs(4)], recover="refit"
    )
    report = result.report
    assert 0.4 < report.after.macs / report.before.macs <= 0.5
    for cost, model in ((report.before, case.build()), (report.after, result.model)):
        check_macs(case, model, cost, {})
    check_saved(result, case, tmp_path / "half.safetensors")
    check_exported(result.model, case)
    check_trained(result.model, case.inputs())


def check_saved(result, case, file):
    result.save(file)
    loaded = tdecomp.load(file, case.build())
    inputs = case.inputs()
    torch.testing.assert_close(outputs(loaded, inputs), outputs(result.model, inputs))


def check_exported(model, case):
    args, kwargs = case.arguments()
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs)
        torch.testing.assert_close(
            tensors_of(program.module()(*args, **kwargs)), tensors_of(model(*args, **kwargs))
        )


def check_trained(model, inputs):
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3)
    torch.manual_seed(0)
    learning = [tensor for tensor in outputs(model, inputs) if tensor.requires_grad]
    sum((x / x.detach().abs().max()).square().sum() for x in learning).backward()
    optimizer.step()
    for name, chain in model.named_modules():
        if isinstance(chain, tdecomp.Chain):
            for part, parameter in chain.named_parameters():
                assert parameter.grad is not None, (name, part)
                assert parameter.grad.isfinite().all(), (name, part)
                assert parameter.grad.any(), (name, part)
    assert all(tensor.isfinite().all() for tensor in outputs(model.eval(), inputs))


# What attention multiplies with itself: scores and mixtures, for each head.
@pytest.mark.parametrize(
    "name, own",
    [
        ("torch-encoder", 2 * 2 * 2 * 12 * 12 * 32),
        ("torch-transformer", 2 * 2 * (12 * 12 + 7 * 7 + 7 * 12) * 32),
        ("transformers-gpt2", 2 * 2 * 2 * 12 * 12 * 64),
        ("transformers-mixtral", 2 * 2 * 2 * 12 * 12 * 64),
        ("transformers-qwen2_moe", 2 * 2 * 2 * 12 * 12 * 64),
        # 17 patches, 4 queries that look at each other and at the patches, 12 tokens.
        ("transformers-blip2", 2 * 2 * 2 * (17 * 17 + 4 * 4 + 4 * 17 + 12 * 12) * 64),
    ],
)
def test_every_product_but_attentions_own_can_be_decomposed(name, own):
    full = tdecomp.Ratio(1.0, of="rank")
    case = ZOO[name]
    result = decompose(case, ["svd", "lowrank"], full, allow_expansion=True)
    report = result.report
    assert [row.reason for row in report if row.macs_before and row.method is None] == []
    assert report.everything_else.macs == own
    for x, y in zip(
        outputs(case.build(), case.inputs()), outputs(result.model, case.inputs()), strict=True
    ):
        assert x.shape == y.shape


@pytest.mark.parametrize("name", ["t5", "vit", "clip", "whisper"])
def test_reading_what_a_layer_is_like_costs_no_layer(name):
    report = decompose(ZOO[f"transformers-{name}"], ["svd", "lowrank"], 4).report
    left = [row.reason for row in report if row.layer is not None and row.method is None]
    assert all("tied" in reason for reason in left)
