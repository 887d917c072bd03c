import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.support.costs import count_macs, count_params
from benchmarks.support.data import digits
from benchmarks.support.models import DIGITS_WEIGHTS, MODELS, input_format, load_model
from benchmarks.support.training import accuracy

RESNET20_KEYS = {
    "conv1.weight",
    "bn1.running_var",
    "layer1.0.conv1.weight",
    "layer2.0.bn1.weight",
    "layer3.2.conv2.weight",
    "layer3.2.bn2.num_batches_tracked",
    "linear.weight",
    "linear.bias",
}
VGG11_KEYS = {
    "features.0.weight",
    "features.0.bias",
    "features.1.running_mean",
    "features.4.weight",
    "features.8.weight",
    "features.11.weight",
    "features.15.weight",
    "features.18.weight",
    "features.22.weight",
    "features.25.weight",
    "features.26.num_batches_tracked",
    "classifier.0.weight",
    "classifier.3.bias",
    "classifier.6.weight",
}


def example(name: str) -> torch.Tensor:
    images = input_format(name)
    return torch.zeros(1, images.channels, images.side, images.side)


@pytest.mark.parametrize(
    "name, macs, params",
    [("resnet20", 40_551_040, 269_722), ("vgg11_bn", 153_293_824, 9_756_426)],
)
def test_costs_of_the_cifar_networks(name, macs, params):
    model = load_model(name)
    assert count_macs(model, example(name)) == macs
    assert count_params(model) == params


@pytest.mark.parametrize(
    "name, keys, tensors", [("resnet20", RESNET20_KEYS, 116), ("vgg11_bn", VGG11_KEYS, 62)]
)
def test_key_names_of_the_cifar_networks(name, keys, tensors):
    state = load_model(name).state_dict()
    assert keys <= state.keys()
    assert len(state) == tensors


def test_digits_network_is_what_the_demo_promises():
    layers = list(load_model("digits_vgg").modules())
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert sum(conv.kernel_size == (3, 3) for conv in convolutions) >= 3
    assert max(conv.out_channels for conv in convolutions) >= 128
    assert sum(isinstance(layer, nn.Linear) for layer in layers) >= 2


def test_shipped_weights_are_small_and_accurate():
    assert DIGITS_WEIGHTS.stat().st_size < 2_000_000
    model = load_model("digits_vgg")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert accuracy(model, digits().val) >= 0.98


def test_weights_come_back_from_either_kind_of_file(tmp_path):
    model = load_model("resnet20", seed=3)
    state = model.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        loaded = load_model("resnet20", str(tmp_path / name)).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_half_precision_weights_are_loaded_as_float32(tmp_path):
    state = load_model("resnet20", seed=3).half().state_dict()
    save_file(state, tmp_path / "w.safetensors")
    model = load_model("resnet20", str(tmp_path / "w.safetensors"))
    assert model.conv1.weight.dtype == torch.float32
    assert torch.equal(model.conv1.weight, state["conv1.weight"].float())


def test_random_weights_follow_the_seed():
    first, again, other = (load_model("resnet20", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


@pytest.mark.parametrize("name", [*MODELS, "torchvision:resnet18"])
def test_models_are_ready_for_evaluation(name):
    model = load_model(name)
    assert not any(module.training for module in model.modules())
    assert model(example(name)).shape == (1, 1000 if name.startswith("torchvision") else 10)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_weights_for_other_classes(name, tmp_path):
    state = load_model(name).state_dict()
    state["fc.weight"], state["fc.bias"] = torch.ones(7, 512), torch.zeros(7)
    torch.save(state, tmp_path / "seven.pt")
    model = load_model(name, str(tmp_path / "seven.pt"))
    assert model.fc.weight.shape == (7, 512)


@pytest.mark.parametrize(
    "name, weights, message",
    [
        ("resnet21", None, "'resnet21'.* digits_vgg, .*torchvision:NAME and timm:NAME, or FILE.py"),
        ("torchvision:resnet17", None, "'resnet17'.* resnet18, "),
        ("timm:resnet17", None, "'resnet17'; of similar names it has .*resnet18,"),
        ("resnet20", "missing.safetensors", r"no weights file missing\.safetensors"),
        ("resnet20", "DEFAULT", "resnet20 ships without weights; give a file"),
    ],
)
def test_bad_names_say_what_there_is(name, weights, message):
    with pytest.raises(ValueError, match=message):
        load_model(name, weights)


def test_timm_says_how_its_own_images_are_normalised():
    images = input_format("timm:mobilevit_s")
    assert (images.side, images.resize) == (256, 284)
    assert images.mean == (0.0, 0.0, 0.0)
    assert input_format("torchvision:resnet18").mean == (0.485, 0.456, 0.406)


def test_weights_that_cannot_be_downloaded_are_told(monkeypatch, tmp_path):
    # No weights of earlier downloads, and a proxy that nobody answers at.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"resnet18 cannot be downloaded .*; give a file"):
        load_model("torchvision:resnet18", "DEFAULT")


def test_weights_of_another_network_are_refused(tmp_path):
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors do not fit resnet20"):
        load_model("resnet20", str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_files_that_hold_no_weights_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_model("resnet20", str(tmp_path / name))


def test_a_saved_tensor_is_no_state_dict(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="no state dict"):
        load_model("resnet20", str(tmp_path / "w.pt"))
