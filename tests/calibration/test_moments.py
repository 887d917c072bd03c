"""The moments of all layers of a model: merged, saved, and refused for another model."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tdecomp
from tdecomp.calibration.moments import Moments
from tests.calibration.small_model import check_same, images, small, taken
from tests.decomposers.oracle import distance


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_two_parts_give_the_same_as_the_whole(share):
    # 36 images are more than the 20 inputs of the Linear, the parts of 18 (or 9) are not.
    x = images(36)
    first = int(36 * share)
    parts = [taken(small(), [part], gradients=False) for part in (x[:first], x[first:])]
    merged, whole = parts[0] + parts[1], taken(small(), [x], gradients=False)
    assert parts[0]["5"].few
    assert not merged["5"].few
    assert merged.samples == merged["5"].samples == 36
    check_same(merged, whole)
    few = taken(small(), [x[:5]], gradients=False) + taken(small(), [x[5:12]], gradients=False)
    check_same(few, taken(small(), [x[:12]], gradients=False))
    assert few["5"].rows is not None


def test_merged_gradients_are_weighed_by_samples():
    parts = [taken(small(), [images(n, seed=n)]) for n in (10, 30)]
    merged = (parts[0] + parts[1])["0"].gradient
    assert distance(merged, 0.25 * parts[0]["0"].gradient + 0.75 * parts[1]["0"].gradient) < 1e-12


def test_layer_reached_by_either_part_is_reached():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    a, b = (taken(model, [torch.ones(9, 4)], forward=lambda m, x, k=k: m[k](x)) for k in "ab")
    assert sorted(a + b) == ["a", "b"]
    assert (a + b).unreached == ("c",)


def test_moments_of_other_layers_cannot_be_merged():
    one, other = taken(nn.Linear(4, 3), torch.ones(9, 4)), taken(nn.Linear(4, 2), torch.ones(9, 4))
    with pytest.raises(
        ValueError, match=r"layer '': moments of Linear\(4→3\) and of Linear\(4→2\)"
    ):
        one + other
    with pytest.raises(TypeError):
        one + 3


def test_saved_moments_come_back(tmp_path):
    model = nn.ModuleDict({"net": small(), "spare": nn.Linear(4, 4)})
    moments = taken(model, [images()], forward=lambda m, x: m["net"](x))
    moments.save(tmp_path / "moments.safetensors")
    loaded = Moments.load(tmp_path / "moments.safetensors")
    check_same(loaded, moments, bound=1e-15)
    assert loaded.unreached == ("spare",)
    assert (loaded.samples, loaded.peak_bytes) == (moments.samples, moments.peak_bytes)
    assert loaded["net.5"].samples == moments.samples
    assert loaded["net.5"].rows.dtype == torch.float32
    assert loaded["net.0"].spec.kernel_size == (3, 3)
    check_same(loaded + moments, moments + loaded, bound=1e-15)


def test_file_that_holds_no_moments(tmp_path):
    file = tmp_path / "other.safetensors"
    file.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"other\.safetensors: damaged or no safetensors file"):
        Moments.load(file)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="no moments"):
        Moments.load(file)
    for header in ("{}", "[1]", "nonsense", '{"format": 1, "layers": {"0": {}}}'):
        save_file({"x": torch.zeros(1)}, file, {"tdecomp_moments": header})
        with pytest.raises(ValueError, match=r"other\.safetensors: "):
            Moments.load(file)
    save_file({"x": torch.zeros(1)}, file, {"tdecomp_moments": '{"format": 99}'})
    with pytest.raises(ValueError, match=r"moments format 99, .*this version reads format 2"):
        Moments.load(file)
    with pytest.raises(FileNotFoundError):
        Moments.load(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("part", ["mean", "matrix"])
def test_damaged_file_names_the_tensor_that_it_lacks(tmp_path, part):
    file = tmp_path / "moments.safetensors"
    moments = taken(small(), [images()])
    object.__setattr__(moments["2"], part, None)
    moments.save(file)
    with pytest.raises(ValueError, match=f"lacks .*'2/{part}"):
        Moments.load(file)


@pytest.mark.parametrize(
    "part, change, words",
    [
        ("mean", lambda t: t * float("nan"), "mean holds NaN"),
        ("mean", lambda t: t[:, :-1], "mean of shape"),
        ("matrix", lambda t: -t, "matrix has squares below 0"),
        ("matrix", lambda t: t[:, :-1], "matrix of shape"),
        ("rows", lambda t: t[:, :-1], "rows of shape"),
        ("rows", lambda t: t.long(), "no floating-point numbers"),
        ("gradient", lambda t: -t, "gradient has squares below 0"),
        ("gradient", lambda t: t[:1], "gradient of shape"),
    ],
)
def test_moments_that_cannot_be_are_refused(tmp_path, part, change, words):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    moments = tdecomp.calibrate(model, [torch.randn(8, 3, 6, 6)], progress=False)
    name = next(name for name, layer in moments.items() if getattr(layer, part) is not None)
    changed = change(getattr(moments[name], part)).contiguous()
    moments.layers[name] = replace(moments[name], **{part: changed})
    moments.save(tmp_path / "moments.safetensors")
    with pytest.raises(
        ValueError, match=rf"moments\.safetensors: damaged: layer '{name}': .*{words}"
    ):
        tdecomp.Moments.load(tmp_path / "moments.safetensors")


def test_moments_of_another_model_are_refused():
    moments = taken(small(), [images()])
    other = small()
    other[2] = nn.Conv2d(6, 5, 3, stride=2, bias=False)
    with pytest.raises(ValueError, match=r"layer '2': the moments .*, the model has .*stride=2"):
        tdecomp.plan(other, "lowrank", rank=2, data=moments, progress=False)
    with pytest.raises(ValueError, match="no such layer"):
        tdecomp.plan(nn.Linear(4, 4), "svd", rank=2, data=moments, progress=False)


def test_moments_of_another_input_size_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3))
    moments = taken(model, [images()])
    with pytest.raises(ValueError, match=r"layer '0': .*inputs of size 8×8.*give it 9×7"):
        tdecomp.plan(
            model,
            "lowrank",
            rank=2,
            data=moments,
            example_inputs=torch.ones(1, 3, 9, 7),
            progress=False,
        )
    tdecomp.plan(model, "lowrank", rank=2, data=moments, example_inputs=images(1), progress=False)
