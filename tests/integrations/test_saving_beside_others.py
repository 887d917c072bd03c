"""Models saved while others have their configuration, in threads, or inside of wrappers."""

import threading

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import tdecomp
from tdecomp.integrations.saving import teach
from tests.checkpoint.libraries import (
    KEY,
    OPTIONS,
    Plain,
    WithConfig,
    WithMapping,
    comes_back,
    decomposed,
    network,
    written,
)
from tests.checkpoint.networks import assert_same


class OfConfig(WithConfig):
    """A class whose library is taught, here and not for other tests."""


class OfMapping(WithMapping):
    """Likewise."""


teach(OfConfig)
teach(OfMapping)


@pytest.mark.parametrize("base", [OfConfig, OfMapping])
def test_models_without_chains_say_nothing_of_those_of_others(tmp_path, base):
    """Of a model, and of another model, that have the same configuration."""
    whole, other = network(base), network(base)
    if base is OfConfig:  # nothing can change the other kind
        other.config = other.encoder.config = whole.config
    tdecomp.decompose(whole, "svd", include="head", inplace=True, **OPTIONS)
    before = whole.as_dict(), other.as_dict()
    for name, model in (("encoder", whole.encoder), ("other", other)):
        model.save_pretrained(tmp_path / name)
        assert KEY not in written(tmp_path / name)
    assert (whole.as_dict(), other.as_dict()) == before
    comes_back(whole, tmp_path, lambda: network(base))


def test_names_in_the_state_dict_are_those_without_wrappers(tmp_path):
    """As where activations are computed again for the gradient."""
    model, same = (decomposed(network(OfConfig)).model for _ in range(2))
    model.encoder, model.head = map(checkpoint_wrapper, (model.encoder, model.head))
    model.save_pretrained(tmp_path / "wrapped")
    assert_same(tdecomp.load(tmp_path / "wrapped", network(OfConfig)), same)
    model.layer = decomposed(nn.Linear(16, 16), rank=2).model
    words = "layer 'encoder._checkpoint_wrapped_module.first' is inside of a wrapper"
    with pytest.raises(ValueError, match=words):
        model.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_layers_in_a_compiled_wrapper_are_refused(tmp_path):
    model = decomposed(network(OfConfig)).model
    model.encoder.compile(backend="eager")
    comes_back(model, tmp_path, lambda: network(OfConfig))
    model.encoder = torch.compile(model.encoder, backend="eager")
    words = r"layer 'encoder\._orig_mod\.first' .* layer\.compile\(\)"
    with pytest.raises(ValueError, match=words):
        model.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()


class Slow(Plain):
    """Its first configuration is written while another thread begins to save the model."""

    def __init__(self):
        super().__init__()
        self.begun, self.ended = threading.Event(), threading.Event()
        self.other = None

    def save_pretrained(self, folder):
        if self.other is None:
            self.other = threading.Thread(
                target=self.save_pretrained, args=[folder / "other"], daemon=True
            )
            self.other.start()
            self.begun.wait(0.2)
        else:
            self.begun.set()
            self.ended.wait()
        super().save_pretrained(folder)


class Locked(Slow):
    """A class of its own, to be taught."""


teach(Locked)


def test_threads_that_save_one_model_all_write_its_chains(tmp_path):
    torch.manual_seed(0)
    whole = Locked()
    whole.head = decomposed(whole.head).model
    whole.save_pretrained(tmp_path)
    whole.ended.set()
    whole.other.join()
    for folder in (tmp_path, tmp_path / "other"):
        assert written(folder)[KEY]["plan"]["rows"][0]["name"] == "head"
    assert KEY not in vars(whole.config)
