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
