"""Plans: made, printed, edited, saved, brought back and refused."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import CP, SVD, Plan, Ratio
from tests.models import METHODS, MODELS
from tests.unchanged import unchanged


def cnn_plan(methods=("tucker2", "svd"), rank=0.25, **options):
    case = MODELS["cnn"]
    return tdecomp.plan(
        case.build(), methods, rank=rank, **{"example_inputs": case.inputs(), **options}
    )


def same_outputs(a, b, x):
    with torch.no_grad():
        return torch.equal(a.eval()(x), b.eval()(x))


# Made --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("inputs", [True, False])
def test_planning_changes_nothing(name, inputs):
    case = MODELS[name]
    model = case.build()
    with unchanged(model):
        plan = tdecomp.plan(
            model, METHODS, rank=0.25, example_inputs=case.inputs() if inputs else None
        )
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    projections = sum(isinstance(m, nn.MultiheadAttention) for m in model.modules())
    assert sum(row.layer is not None for row in plan) == len(layers) + projections
    for row in plan:
        assert (row.method is None) == (row.reason is not None)
        assert (row.method is None) == (row.rank is None)
        assert row.weight_error is None
        assert row.fit_seconds is None
        assert (row.macs_before is None) == (not inputs)


def test_the_first_method_that_can_take_a_layer_is_used():
    plan = cnn_plan(("svd", "tucker2", "lowrank"), rank=2)
    assert plan["head"].method == "svd"
    assert plan["features.6"].method == "svd"  # 1×1
    assert plan["features.3"].method == "tucker2"
    plan = cnn_plan(("lowrank", "tucker2", "svd"), rank=2)
    assert plan["features.3"].method == "lowrank"
    assert plan["features.6"].method == "lowrank"


def test_layers_no_method_takes_say_why_for_each():
    plan = cnn_plan(("tucker2", "lowrank"), rank=2)
    assert plan["head"].reason == (
        "tucker2 takes convolutions; svd takes Linear layers; "
        "lowrank takes convolutions; svd takes Linear layers"
    )
    plan = tdecomp.plan(MODELS["cnn"].build(), "svd", rank=2)
    assert plan["features.0"].reason == "svd takes Linear layers and 1×1 convolutions"


@pytest.mark.parametrize("method", ["lowrank", "tucker2", "cp", "cp-separable"])
def test_depthwise_layers_are_left_alone(method):
    plan = cnn_plan((method, "svd"), rank=1, allow_expansion=True)
    assert plan["features.5"].method is None
    assert "depthwise" in plan["features.5"].reason


def test_a_ready_made_decomposer_is_taken_as_it_is():
    plan = cnn_plan([CP(n_iter_max=5), "svd"], rank=2)
    assert plan.decomposers["cp"] == CP(n_iter_max=5)
    assert plan["features.3"].method == "cp"


@pytest.mark.parametrize("methods", ["nope", ["svd", "nope"], ("Tucker2",)])
def test_an_unknown_method_says_which_exist(methods):
    with pytest.raises(ValueError, match="unknown method") as caught:
        cnn_plan(methods)
    for name in tdecomp.registered():
        assert repr(name) in str(caught.value)
    assert "tdecomp.register" in str(caught.value)


def test_no_methods_and_the_same_method_twice():
    with pytest.raises(ValueError, match="at least one method"):
        cnn_plan([])
    with pytest.raises(ValueError, match="'svd' twice"):
        cnn_plan(["svd", SVD()])


@pytest.mark.parametrize("methods", [None, 5, tdecomp.SVD], ids=repr)
def test_what_are_no_methods(methods):
    with pytest.raises((TypeError, ValueError), match="method"):
        cnn_plan(methods)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_weights_that_are_not_finite_are_refused_by_name(value, parameter):
    model = MODELS["nested"].build()
    with torch.no_grad():
        getattr(model.stem[1], parameter).view(-1)[:3] = value
    for call in (tdecomp.plan, lambda *a, **k: tdecomp.decompose(*a, **k, inplace=True)):
        with unchanged(model), pytest.raises(ValueError, match=r"layer 'stem\.1'") as caught:
            call(model, METHODS, rank=2)
        message = str(caught.value)
        assert f"of its {parameter} are NaN or infinite" in message
        assert "3 of" in message
        assert "Conv1d(16→16, 3)" in message
        assert "exclude=['stem.1']" in message
    plan = tdecomp.plan(model, METHODS, rank=2, exclude=["stem.1"])
    assert plan["stem.1"].method is None


def test_weights_that_became_nan_after_the_plan_are_refused():
    model = MODELS["nested"].build()
    plan = tdecomp.plan(model, METHODS, rank=2)
    with torch.no_grad():
        model.stem[1].weight[0] = float("nan")
    with unchanged(model), pytest.raises(ValueError, match=r"layer 'stem.1'.*NaN or infinite"):
        tdecomp.apply(model, plan, inplace=True, progress=False)


def test_meta_modules_are_refused_with_the_remedy():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"layer '0'.*on the meta device") as caught:
        tdecomp.plan(model, "svd", rank=2)
    assert "to_empty" in str(caught.value)


def test_meta_modules_are_refused_with_example_inputs_too():
    model = nn.Sequential(nn.Linear(8, 8, device="meta"))
    with pytest.raises(ValueError, match="to_empty"):
        tdecomp.plan(model, "svd", rank=2, example_inputs=torch.zeros(1, 8))


# Printed and read --------------------------------------------------------------------------------


def test_a_plan_prints_before_anything_is_changed():
    text = str(cnn_plan())
    assert "features.3" in text
    assert "tucker2" in text
    assert "(4, 6)" in text
    assert "everything else" in text
    assert "total" in text
    header = next(line for line in text.splitlines() if line.startswith("layer "))
    assert "expected error" in header
    assert "weight error" not in header  # nothing was fitted yet


def test_rows_by_name_and_in_order():
    plan = cnn_plan()
    assert [row.name for row in plan] == [row.name for row in plan.rows]
    assert len(plan) == 7
    assert plan["head"] is plan.rows[-1]
    assert "head" in plan
    assert "nope" not in plan
    with pytest.raises(KeyError, match=r"named 'nope'; of 7 there are 'features\.0'"):
        plan["nope"]


def test_a_shared_layer_is_found_by_each_of_its_names():
    plan = tdecomp.plan(MODELS["twice"].build(), "svd", rank=2)
    assert plan["again"] is plan["first"]
    assert len(plan) == 1


# Edited ------------------------------------------------------------------------------------------


def test_edit_gives_a_new_plan_with_new_costs():
    plan = cnn_plan(rank=2)
    edited = plan.edit("features.3", rank=(4, 6))
    assert plan["features.3"].rank == (2, 2)
    assert edited["features.3"].rank == (4, 6)
    planned = cnn_plan(rank={"*": 2, "features.3": (4, 6)})["features.3"]
    assert edited["features.3"] == replace(planned, expected_error=None)
    assert edited["head"] == plan["head"]
    edited = plan.edit("features.3", method="lowrank", rank=3)
    assert (edited["features.3"].method, edited["features.3"].rank) == ("lowrank", 3)
    assert plan.edit("features.3", rank=[4, 6])["features.3"].rank == (4, 6)


def test_edit_takes_up_a_layer_that_was_left_alone():
    plan = cnn_plan("tucker2", rank=2)
    assert plan["head"].reason
    edited = plan.edit("head", method=SVD(), rank=3)
    assert edited["head"].reason is None
    result = tdecomp.apply(MODELS["cnn"].build(), edited, progress=False)
    assert result.report["head"].rank == 3


def test_an_edited_plan_is_what_is_applied():
    model = MODELS["cnn"].build()
    plan = tdecomp.plan(model, ("tucker2", "svd"), rank=2).edit("head", rank=5)
    result = tdecomp.apply(model, plan, progress=False)
    assert result.model.head[0].out_features == 5


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("head", {"rank": 11}, "layer 'head': rank 11 is not in the range of svd"),
        ("head", {"rank": 0}, "layer 'head': rank 0 is not in the range"),
        ("head", {"rank": (2, 2)}, "layer 'head': svd takes one rank"),
        ("head", {"rank": "4"}, "layer 'head': svd takes .*got '4'"),
        ("head", {"method": "nope"}, "unknown method 'nope'"),
        ("head", {"method": "cp", "rank": 2}, "layer 'head' .*cp takes convolutions"),
        ("features.3", {"rank": (1, 2, 3)}, "layer 'features.3': tucker2 takes 2 ranks"),
        ("features.5", {"rank": 2}, "'features.5' is left alone .*name a method for it"),
    ],
)
def test_what_cannot_be_edited(name, options, message):
    with pytest.raises(ValueError, match=message):
        cnn_plan(rank=2).edit(name, **options)


def test_editing_an_unknown_layer():
    with pytest.raises(KeyError, match=r"named 'nope'; of 7 there are 'features\.0'"):
        cnn_plan().edit("nope", rank=2)


@pytest.mark.parametrize("rank", [2.5, True])
def test_editing_in_a_rank_that_is_none(rank):
    with pytest.raises(ValueError, match="layer 'head'"):
        cnn_plan(rank=2).edit("head", rank=rank)


def test_editing_in_an_int_for_tucker():
    assert cnn_plan(rank=2).edit("features.3", rank=3)["features.3"].rank == (3, 3)


def test_editing_one_layers_options_leaves_the_others():
    plan = cnn_plan([CP(n_iter_max=5), "svd"], rank=2)
    try:
        edited = plan.edit("features.3", method=CP(n_iter_max=7))
    except ValueError:
        return  # refusing is fine too
    assert edited.decomposers["cp"] == CP(n_iter_max=5)


def test_editing_drops_the_old_choices_note():
    layer = nn.Linear(40, 40)
    plan = tdecomp.plan(layer, "svd", rank="vbmf", example_inputs=torch.zeros(1, 40))
    assert "estimate was 0" in plan[""].note
    assert plan.edit("", rank=5)[""].note is None


# Saved and brought back --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rank", [2, "vbmf", Ratio(0.5, of="macs")], ids=str)
@pytest.mark.parametrize("inputs", [True, False])
def test_json_and_back(name, rank, inputs):
    case = MODELS[name]
    x = case.inputs() if inputs else None
    plan = tdecomp.plan(case.build(), METHODS, rank=rank, example_inputs=x)
    again = Plan.from_json(plan.to_json())
    assert again.rows == plan.rows
    assert again.everything_else == plan.everything_else
    assert again.decomposers == plan.decomposers
    assert str(again) == str(plan)
    assert again.to_json() == plan.to_json()


def test_lazy_and_quantized_rows_survive_json():
    plan = tdecomp.plan(nn.Sequential(nn.LazyLinear(4), nn.Linear(8, 8)), "svd", rank=2)
    assert Plan.from_json(plan.to_json()).rows == plan.rows


def test_options_survive_json_and_decide_the_fit():
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    plan = tdecomp.plan(model, CP(n_iter_max=3, random_state=5), rank=8)
    again = Plan.from_json(plan.to_json())
    assert again.decomposers == {"cp": CP(n_iter_max=3, random_state=5)}
    x = torch.randn(1, 8, 5, 5)
    first, second, default = (
        tdecomp.apply(model, p, progress=False).model
        for p in (plan, again, tdecomp.plan(model, "cp", rank=8))
    )
    assert same_outputs(first, second, x)
    assert not same_outputs(first, default, x)


def test_a_plan_is_applied_to_a_fresh_copy():
    case = MODELS["cnn"]
    model, x = case.build(), case.inputs()
    plan = tdecomp.plan(model, ("tucker2", "svd"), rank=0.5, example_inputs=x)
    fresh = copy.deepcopy(model)
    here = tdecomp.apply(model, plan, progress=False)
    there = tdecomp.apply(fresh, Plan.from_json(plan.to_json()), progress=False)
    assert same_outputs(here.model, there.model, x)
    assert here.plan is plan


def edited_json(change, plan=None):
    data = json.loads((plan or cnn_plan(rank=2)).to_json())
    change(data)
    return json.dumps(data)


def row_in(data, name="head"):
    return next(row for row in data["rows"] if row["name"] == name)


def test_edited_json_is_counted_anew():
    text = edited_json(lambda data: row_in(data).update(rank=5))
    assert Plan.from_json(text)["head"] == cnn_plan(rank=2).edit("head", rank=5)["head"]
    text = edited_json(lambda data: row_in(data, "features.3").update(method="lowrank", rank=3))
    row = Plan.from_json(text)["features.3"]
    assert row == cnn_plan(rank=2).edit("features.3", method="lowrank", rank=3)["features.3"]


def test_json_may_leave_a_layer_alone():
    text = edited_json(lambda d: row_in(d).update(method=None, rank=None, reason="I said so"))
    row = Plan.from_json(text)["head"]
    assert (row.method, row.reason, row.params_after) == (None, "I said so", row.params_before)


REFUSED = {
    "a newer format": (lambda d: d.update(format=3), "plan format 3, .*reads format 2; update"),
    "no format": (
        lambda d: d.pop("format"),
        "format: it has none, so that it is no plan of tdecomp",
    ),
    "no rows": (lambda d: d.pop("rows"), "plan: rows: expected a list, got None"),
    "no methods": (lambda d: d.pop("methods"), "plan: methods: expected an object, got None"),
    "rows of another kind": (lambda d: d.update(rows=[1]), r"rows\[0\]: expected an object, got 1"),
    "no rank": (lambda d: row_in(d).pop("rank"), r"rows\[.*\]: entries missing .*'rank'"),
    "rank 0": (lambda d: row_in(d).update(rank=0), "layer 'head': rank 0 is not in the range"),
    "rank 99": (lambda d: row_in(d).update(rank=99), "layer 'head': rank 99 is not in the range"),
    "a fraction": (lambda d: row_in(d).update(rank=2.5), r"rank: expected a whole .*, got 2\.5"),
    "a bool": (lambda d: row_in(d).update(rank=True), r"rank: expected a whole .*, got True"),
    "two ranks": (lambda d: row_in(d).update(rank=[2, 2]), "layer 'head': svd takes one rank"),
    "unknown method": (lambda d: row_in(d).update(method="nope"), "unknown method 'nope'"),
    "wrong method": (lambda d: row_in(d).update(method="cp"), "layer 'head'.*cp takes conv"),
    "unknown option": (lambda d: d["methods"]["svd"].update(n=3), "'svd' has no option 'n'"),
    "a layer without sizes": (lambda d: row_in(d).update(layer={}), r"layer: .*'in_channels'"),
    "a null layer": (lambda d: row_in(d).update(layer=None), "layer 'head' cannot be decomposed"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_json_that_is_refused(kind):
    change, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        Plan.from_json(edited_json(change))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "5", '"plan"', "{}", "{", '{"format": 2}', "\x00",
     pytest.param("[" * 100_000, id="deep")],
)  # fmt: skip
def test_junk_is_no_plan(text):
    with pytest.raises(
        ValueError, match=r"^plan: (not JSON: |format: |plan: |methods: |expected an object)"
    ):
        Plan.from_json(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: row_in(d).update(params_before="many"),
        lambda d: row_in(d).update(name=5),
        lambda d: d["rows"].append(d["rows"][-1]),
        lambda d: (
            d["methods"].update(cp={"n_iter_max": "five"})
            or row_in(d, "features.3").update(method="cp", rank=2)
        ),
    ],
    ids=["words", "a number for a name", "a row twice", "an option of another type"],
)
def test_json_of_the_wrong_types_is_refused(change):
    with pytest.raises(ValueError, match=r".+"):
        Plan.from_json(edited_json(change))


# Applied to something else -----------------------------------------------------------------------


def apply_to(model, plan):
    with unchanged(model), pytest.raises(ValueError, match=r"layer|plan") as caught:
        tdecomp.apply(model, plan, inplace=True, progress=False)
    return str(caught.value)


def test_a_model_without_the_planned_layer_is_refused():
    plan = tdecomp.plan(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "svd", rank=2)
    message = apply_to(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), plan)
    assert "layer '1': the plan has it, the model has no such layer" in message


@pytest.mark.parametrize(
    "other",
    [nn.Linear(8, 9), nn.Linear(8, 8, bias=False), nn.Conv1d(8, 8, 1)],
    ids=["size", "bias", "kind"],
)
def test_a_model_of_other_layers_is_refused(other):
    plan = tdecomp.plan(nn.Sequential(nn.Linear(8, 8)), "svd", rank=2)
    message = apply_to(nn.Sequential(other), plan)
    assert "layer '0': got" in message
    assert "the plan expects Linear(8→8); plan anew for this model" in message


def test_geometry_is_part_of_the_architecture():
    plan = tdecomp.plan(nn.Sequential(nn.Conv2d(8, 8, 3, stride=2)), "lowrank", rank=2)
    message = apply_to(nn.Sequential(nn.Conv2d(8, 8, 3)), plan)
    assert "stride=2" in message


def test_a_layer_that_can_no_longer_be_replaced_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    plan = tdecomp.plan(model, "svd", rank=2)
    model[0].register_forward_hook(lambda *_: None)
    assert "layer '0' cannot be replaced: it has hooks of its own" in apply_to(model, plan)


def test_a_plan_is_not_applied_twice():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    plan = tdecomp.plan(model, "svd", rank=2)
    tdecomp.apply(model, plan, inplace=True, progress=False)
    assert "layer '0': the plan has it, the model has no such" in apply_to(model, plan)


def test_a_model_with_more_layers_is_refused():
    plan = tdecomp.plan(nn.Sequential(nn.Linear(8, 8)), "svd", rank=2)
    apply_to(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), plan)


def test_a_model_that_does_not_share_a_layer_is_refused():
    shared = nn.Linear(8, 8)
    plan = tdecomp.plan(nn.Sequential(shared, shared), "svd", rank=2)
    apply_to(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), plan)
