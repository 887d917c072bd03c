import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path):
    """Two classes of 32×32 images: red ones and blue ones, 6 to train on and 4 to judge by."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for channel, name in ((0, "red"), (2, "blue")):
            place = tmp_path / "colours" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 180
                Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path / "colours"


MODEL_FILE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)]
    return nn.Sequential(*layers)

def data():
    x = torch.randn(96, 32, generator=torch.Generator().manual_seed(1))
    y = x[:, :4].argmax(1)
    return list(zip(x[:64].split(16), y[:64].split(16))), [(x[64:], y[64:])]
"""


@pytest.fixture
def model_file(tmp_path):
    """A user's own model and data, small enough to be compared in a second."""
    path = tmp_path / "own.py"
    path.write_text(MODEL_FILE)
    return path
