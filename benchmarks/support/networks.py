"""The networks defined here: a VGG for 8×8 digits, and ResNet-20 and VGG-11 for 32×32 images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

POOL = "pool"


def conv_bn_relu(widths: Sequence[int | str], in_channels: int, *, bias: bool) -> nn.Sequential:
    """Stack conv-bn-relu triples of the given widths, with a max-pool for each `POOL`."""
    layers: list[nn.Module] = []
    for width in widths:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [
            nn.Conv2d(in_channels, width, 3, padding=1, bias=bias),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        in_channels = width
    return nn.Sequential(*layers)


class DigitsVGG(nn.Module):
    """Five 3×3 convolutions of up to 128 channels and three Linear layers, for 8×8 digits."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = conv_bn_relu(
            [64, 128, 128, POOL, 128, 128, POOL], in_channels=1, bias=False
        )
        self.classifier = nn.Sequential(
            nn.Linear(128 * 2 * 2, 256),
            nn.ReLU(inplace=True),
            nn.Linear(256, 128),
            nn.ReLU(inplace=True),
            nn.Linear(128, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


class VGG11(nn.Module):
    """VGG-11 with batch norm (Simonyan & Zisserman 2015), its classifier cut down for 32×32."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        widths: list[int | str] = [
            64,
            POOL,
            128,
            POOL,
            256,
            256,
            POOL,
            512,
            512,
            POOL,
            512,
            512,
            POOL,
        ]
        self.features = conv_bn_relu(widths, in_channels=3, bias=True)
        self.classifier = nn.Sequential(
            nn.Linear(512, 512),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(512, 512),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(512, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        before = self.new_channels // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, before, self.new_channels - before))


class ResNet20(nn.Module):
    """The CIFAR ResNet-20 of He et al. 2016, section 4.2, for (n, 3, 32, 32) images."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, stride=1)
        self.layer2 = self._stage(16, 32, stride=2)
        self.layer3 = self._stage(32, 64, stride=2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(in_channels, out_channels, stride),
            BasicBlock(out_channels, out_channels, 1),
            BasicBlock(out_channels, out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.mean(x, dim=(2, 3)))
        return logits
