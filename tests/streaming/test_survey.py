"""Plans and sensitivities of a folder are those of the model in memory."""

import pytest
import torch

import tdecomp
from tdecomp.calibration.data import Data
from tests.streaming.folders import llama, perceptron, unknown

EVERY = {"include": "*"}  # of an architecture that is not known


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("perceptron")
    unknown(place, shards=2)
    return place


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """Folders and models of a Llama whose output layer is tied, or not, by that."""
    made = {}
    for tied in (False, True):
        place = tmp_path_factory.mktemp("llama")
        made[tied] = place, llama(place, shards=3, tied=tied)
    return made


def check_alike(got, expected):
    """Two plans, but for what is said of the model's classes."""
    assert got.rows == expected.rows
    assert got.everything_else == expected.everything_else
    assert got.decomposers == expected.decomposers
    assert got.loss == expected.loss
    assert got.notes == expected.notes


RANKS = [
    ("svd", 4),
    ("svd", 0.5),
    ("svd", "vbmf"),
    ("svd", "breakeven"),
    ("svd", tdecomp.Energy(0.8)),
    ("svd", tdecomp.Ratio(0.4, of="params")),
    (["tt", "svd"], {"0": 3, "*": tdecomp.Energy(0.8)}),
    (["svd", "tt"], tdecomp.Budget(params=0.8)),
    ("dense", tdecomp.Budget(params=0.8, round_to=4)),
    ("cp", 4),
]


@pytest.mark.parametrize("methods, rank", RANKS)
@pytest.mark.parametrize("options", [{}, {"exclude": "2"}, {"allow_expansion": True}])
def test_plans_of_an_architecture_that_is_not_known(folder, methods, rank, options):
    options = {"rank": rank, "progress": False, **EVERY, **options}
    check_alike(
        tdecomp.plan(folder, methods, **options), tdecomp.plan(perceptron(), methods, **options)
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "methods, rank",
    [
        ("svd", 4),
        ("svd", {"lm_head": 6, "*": tdecomp.Energy(0.8)}),
        (["split-svd", "svd"], tdecomp.Budget(params=0.6)),
    ],
)
def test_plans_of_a_llama(llamas, tied, methods, rank):
    folder, model = llamas[tied]
    options = {"rank": rank, "progress": False}
    got, expected = (tdecomp.plan(one, methods, **options) for one in (str(folder), model))
    check_alike(got, expected)
    if not isinstance(rank, tdecomp.Budget):
        assert sum(row.method is not None for row in got) >= 14


def test_layers_of_a_width(folder):
    wide = {"where": tdecomp.at_least(features=24), "rank": 4, "progress": False, **EVERY}
    got = tdecomp.plan(folder, "svd", **wide)
    check_alike(got, tdecomp.plan(perceptron(), "svd", **wide))
    assert [row.rank for row in got] == [4, 4, None]


@pytest.mark.parametrize("methods", ["dense", ["svd", "tt"]])
def test_sensitivities(folder, llamas, methods):
    llama_folder, model = llamas[True]
    for one, other, options in ((folder, perceptron(), EVERY), (llama_folder, model, {})):
        got, expected = (
            tdecomp.sensitivity(each, methods, progress=False, **options) for each in (one, other)
        )
        assert got.to_dict() == expected.to_dict()
        assert str(got) == str(expected)
        assert any(layer.curves for layer in got.layers)


@pytest.mark.parametrize(
    "around",
    [torch.inference_mode, lambda: torch.autocast("cpu"), lambda: torch.device("meta")],
    ids=["inference mode", "autocast", "default device"],
)
def test_what_torch_is_set_to_changes_nothing(folder, around):
    options = {"rank": tdecomp.Budget(params=0.8), "progress": False, **EVERY}
    plan, table = (
        tdecomp.plan(folder, "dense", **options),
        tdecomp.sensitivity(folder, progress=False, **EVERY),
    )
    with around():
        check_alike(tdecomp.plan(folder, "dense", **options), plan)
        got = tdecomp.sensitivity(folder, progress=False, **EVERY)
    assert got.to_dict() == table.to_dict()


def test_the_folder_stays_as_it_is(folder):
    def contents():
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    before = contents()
    tdecomp.plan(folder, "svd", rank=tdecomp.Energy(0.9), progress=False, **EVERY)
    tdecomp.sensitivity(folder, progress=False, **EVERY)
    assert contents() == before


@pytest.mark.parametrize(
    "name, value",
    [
        ("example_inputs", torch.ones(1, 24)),
        ("data", [torch.ones(1, 24)]),
        ("data", Data([torch.ones(1, 24)])),
        ("forward", lambda model, batch: model(batch)),
        ("profile", object()),
        ("only_if_faster", True),
        ("where", lambda *_: True),
    ],
)
def test_what_needs_a_model_is_refused(folder, name, value):
    with pytest.raises(ValueError, match=rf"^plan: {name} .*folder") as caught:
        tdecomp.plan(folder, "svd", rank=4, progress=False, **EVERY, **{name: value})
    assert "include" in str(caught.value) or "load the model" in str(caught.value)
    if name not in ("profile", "only_if_faster"):
        with pytest.raises(ValueError, match=rf"^sensitivity: {name} .*folder"):
            tdecomp.sensitivity(folder, "svd", progress=False, **EVERY, **{name: value})


def test_a_budget_that_cannot_be_met(folder):
    options = {"rank": tdecomp.Budget(params=0.01), "progress": False, **EVERY}
    words = []
    for one in (folder, perceptron()):
        with pytest.raises(ValueError, match="the least is") as caught:
            tdecomp.plan(one, "svd", **options)
        words.append(str(caught.value))
    assert words[0] == words[1]


def test_ranks_that_need_a_model_are_refused(folder):
    for rank in (
        tdecomp.Budget(macs=0.5),
        tdecomp.Budget(latency=0.5),
        tdecomp.OutputVariance(0.9),
    ):
        with pytest.raises(ValueError, match=r"call of the model|expected data="):
            tdecomp.plan(folder, "svd", rank=rank, progress=False, **EVERY)


def test_weights_that_cannot_be_factorized_are_named(tmp_path):
    state = perceptron().state_dict()
    state["2.weight"][3, 4] = float("nan")
    from tests.streaming.folders import write

    unknown(tmp_path)
    write(tmp_path, state)
    with pytest.raises(ValueError, match=r"layer '2' .*1 of 1024 entries .*NaN"):
        tdecomp.plan(tmp_path, "svd", rank=tdecomp.Energy(0.9), progress=False, **EVERY)


def test_what_is_no_folder(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*none"):
        tdecomp.plan(tmp_path / "none", "svd", rank=4, progress=False)
    with pytest.raises(ValueError, match="expected include="):
        tdecomp.plan(folder, "svd", rank=4, progress=False)
    with pytest.raises(ValueError, match="include: 'none' matches no"):
        tdecomp.plan(folder, "svd", rank=4, progress=False, include="none")
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        tdecomp.plan(3, "svd", rank=4, progress=False)
