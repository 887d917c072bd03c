"""Networks with wide layers and the unlabelled data that `benchmarks.fit_speed` gives them."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.support.model_fits import plant
from benchmarks.support.torchvision_import import import_torchvision


def smooth_images(count: int, side: int, *, at_a_time: int) -> list[Tensor]:
    """Batches of images whose power falls with the frequency, as it does in photographs."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(count, 3, side, side)
    size = 4
    while size <= side:
        noise = torch.randn(count, 3, size, size, generator=generator)
        total += functional.interpolate(noise, side, mode="bilinear") * (4 / size) ** 0.5
        size *= 2
    return list(total.split(at_a_time))


def sounds(frames: int, *, at_a_time: int = 100) -> list[Tensor]:
    """Batches of frames of 1,024 samples: a few harmonics of a random pitch, and noise."""
    generator = torch.Generator().manual_seed(0)
    pitch = 0.01 * 2 ** (4 * torch.rand(frames, 1, generator=generator))  # periods a sample
    phase = 6.28 * torch.rand(frames, 8, 1, generator=generator)
    harmonics = torch.arange(1.0, 9.0)[None, :, None]
    waves = torch.sin(6.28 * pitch[:, None] * harmonics * torch.arange(1024.0) + phase) / harmonics
    noise = 0.1 * torch.randn(frames, 1024, generator=generator)
    return list((waves.sum(dim=1) + noise)[:, None, :, None].split(at_a_time))


def vgg16() -> nn.Module:
    """The convolutions of torchvision's VGG-16-BN, with kernels of decaying singular values."""
    torch.manual_seed(0)
    features: nn.Module = import_torchvision().models.vgg16_bn(weights=None).features
    return _as_if_trained(features, smooth_images(2, 128, at_a_time=2)[0])


def resnet18() -> nn.Module:
    """torchvision's ResNet-18, with kernels of decaying singular values."""
    torch.manual_seed(0)
    network: nn.Module = import_torchvision().models.resnet18(weights=None)
    return _as_if_trained(network, smooth_images(2, 128, at_a_time=2)[0])


def text_detector() -> nn.Module:
    """27 convolutions: the trunk of VGG-16-BN, two wide layers, and a decoder with skips."""
    torch.manual_seed(0)
    return _as_if_trained(_Detector(), smooth_images(2, 128, at_a_time=2)[0])


def pitch_network() -> nn.Module:
    """Six convolutions of 64×1 over up to 128 channels, for frames of 1,024 samples."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    widths = [1, 128, 16, 16, 16, 32, 64]
    for i, (into, out) in enumerate(pairwise(widths)):
        stride = 4 if i == 0 else 1
        conv = nn.Conv2d(into, out, (64, 1), (stride, 1), padding="valid")
        layers += [
            nn.ZeroPad2d((0, 0, 31, 32)),
            conv,
            nn.ReLU(),
            nn.BatchNorm2d(out),
            nn.MaxPool2d((2, 1)),
        ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, 360))
    return _as_if_trained(model, sounds(100)[0])


class _Detector(nn.Module):
    """A heat map at half the size, as text detectors of the kind of CRAFT make it."""

    def __init__(self) -> None:
        super().__init__()
        features = import_torchvision().models.vgg16_bn(weights=None).features
        self.parts = nn.ModuleList(
            features[a:b] for a, b in ((0, 13), (13, 23), (23, 33), (33, 43))
        )
        self.wide = nn.Sequential(
            nn.MaxPool2d(3, 1, 1),
            nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.Conv2d(1024, 1024, 1),
        )  # fmt: skip
        self.up = nn.ModuleList([
            _double(1024 + 512, 512, 256), _double(256 + 512, 256, 128),
            _double(128 + 256, 128, 64), _double(64 + 128, 64, 32),
        ])  # fmt: skip
        self.last = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for part in self.parts:
            x = part(x)
            skips.append(x)
        x = self.wide(x)
        for up, skip in zip(self.up, reversed(skips), strict=True):
            x = functional.interpolate(x, skip.shape[2:], mode="bilinear")
            x = up(torch.cat([x, skip], dim=1))
        heat: Tensor = self.last(x)
        return heat


def _double(into: int, middle: int, out: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(into, middle, 1), nn.BatchNorm2d(middle), nn.ReLU(),
        nn.Conv2d(middle, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(),
    )  # fmt: skip


@torch.no_grad()
def _as_if_trained(model: nn.Module, batch: Tensor) -> nn.Module:
    """Kernels a part of which has a third of the full rank, and batch norms with statistics."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            plant(module)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()(batch)
    return model.eval()
