"""Models with a `save_pretrained` of their own, as those of Hugging Face's libraries have it."""

import copy
import functools
import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import tdecomp
from tests.checkpoint.networks import assert_same

KEY = "quantization_config"
OPTIONS = {"rank": 4, "progress": False}


class Config:
    """As transformers has them: attributes, and all of them in a dictionary."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def to_dict(self):
        return copy.deepcopy(vars(self))


class Saved(nn.Module):
    """A class of a library: it writes its configuration and its state dict."""

    def save_pretrained(self, save_directory, max_shard_size="5GB"):
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.as_dict()))
        save_file(self.state_dict(), folder / "model.safetensors", {"size": max_shard_size})


class WithConfig(Saved):
    def configure(self, config):
        self.config = config

    def as_dict(self):
        return self.config.to_dict()


class Frozen(OrderedDict):
    """As diffusers has them: nothing in it can be changed."""

    def __delitem__(self, *_):
        raise TypeError("frozen")

    def __setitem__(self, name, value):
        if name in self:
            raise TypeError("frozen")
        super().__setitem__(name, value)

    def pop(self, *_):
        raise TypeError("frozen")

    update = pop


class WithMapping(Saved):
    def configure(self, config):
        self._internal_dict = Frozen(vars(config))

    def as_dict(self):
        return dict(self._internal_dict)


class WithNothing(Saved):
    def configure(self, config):
        pass

    def as_dict(self):
        return {}


@functools.cache
def classes(base):
    """A class of a library, and one of models that hold a model of it."""

    class Encoder(base):
        def __init__(self, config):
            super().__init__()
            self.configure(config)
            self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            return self.second(self.first(x).relu())

    class Model(base):
        def __init__(self):
            super().__init__()
            config = Config(width=16)
            self.configure(config)
            self.encoder = Encoder(config)
            self.layer, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)
            self.head = nn.Linear(16, 16)

        def forward(self, x):
            return self.head(self.norm(self.layer(self.encoder(x))))

    return Model


def network(base=WithConfig):
    torch.manual_seed(0)
    return classes(base)().eval()


class Plain(WithConfig):
    """One that can be pickled."""

    def __init__(self, config=None):
        super().__init__()
        self.config = config or Config(width=16)
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 16)
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return self.head(self.norm(self.layer(x)))


def plain():
    torch.manual_seed(0)
    return Plain().eval()


def decomposed(model, **options):
    return tdecomp.decompose(model, "svd", **{**OPTIONS, **options})


def written(folder):
    return json.loads((folder / "config.json").read_text())


def comes_back(saved, folder, fresh=plain):
    """Plain `save_pretrained` writes what is loaded as it was; loaded models do so again."""
    loaded = saved
    for name in ("first", "second"):
        loaded.save_pretrained(folder / name)
        found = written(folder / name)
        assert found["width"] == 16
        assert found[KEY]["quant_method"] == "tdecomp"
        loaded = tdecomp.load(folder / name, fresh())
        # The order of the state dict, too, which is that of the layers.
        assert_same(loaded, saved)
    return loaded
