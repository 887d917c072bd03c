"""Linears that see the same inputs share what is summed up, and have what they would have alone."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

import tdecomp

WIDTH = 12


class Model(nn.Module):
    """Five Linears; a function of the model, the input and the number of the pass calls them."""

    def __init__(self, call, apart=False):
        super().__init__()
        torch.manual_seed(0)
        self.call, self.apart, self.passes = call, apart, 0
        self.q, self.k, self.v = (nn.Linear(WIDTH, size) for size in (4, 8, WIDTH))
        self.out, self.up = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 20)

    def forward(self, x):
        self.passes += 1
        return self.call(self, x, self.passes)

    def on(self, layer, x):
        return layer(x.clone() if self.apart else x)


def attention(model, x, _):
    q, k, v = (model.on(layer, x) for layer in (model.q, model.k, model.v))
    y = model.on(model.out, v + q.sum() + k.sum())
    return model.on(model.up, y)


def later_apart(model, x, number):
    model.on(model.q, x)
    model.on(model.k, x if number < 3 else x + 1)
    return model.on(model.v, x)


def at_times_left_out(model, x, number):
    model.on(model.q, x)
    if number % 3:
        model.on(model.k, x)
    return model.on(model.v, x)


def changed_in_place(model, x, _):
    x = x + 0
    q = model.on(model.q, x)
    return model.on(model.v, x.add_(1.0)) + q.sum()


def changed_uncounted(model, x, number):
    """In ways that torch does not count."""
    x = x + 0
    q = model.on(model.q, x)
    if number % 3 == 0:
        x.data.add_(1.0)
    elif number % 3 == 1:
        x.numpy()[0, 0, 0] = 5.0
    else:
        x.data = x.data.flip(0)
    return model.on(model.v, x) + q.sum()


def several_calls(model, x, number):
    for step in range(3):
        y = x + step
        model.on(model.q, y)
        if step != 1 or number < 2:
            model.on(model.k, y)
    return model.on(model.v, x)


def first_called_later(model, x, number):
    if number > 2:
        model.on(model.v, x)
    return model.on(model.q, x) + (model.on(model.k, x).sum() if number > 1 else 0.0)


def sparse(model, x, number):
    """As bags of words may be given."""
    x = (x * (x > 1)).flatten(0, 1)
    x = x.to_sparse() if number % 2 else x.to_sparse_csr()
    return torch.cat([model.on(layer, x) for layer in (model.q, model.k)], dim=1)


CALLS = [
    attention,
    later_apart,
    first_called_later,
    at_times_left_out,
    changed_in_place,
    changed_uncounted,
    several_calls,
    pytest.param(sparse, marks=pytest.mark.filterwarnings("ignore:Sparse CSR")),
]


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 5, WIDTH, generator=generator) for _ in range(6)]


def moments_of(call, *, apart=False, data=None):
    return tdecomp.calibrate(Model(call, apart), data or batches(), progress=False)


def check_equal(one, other):
    assert list(one) == list(other)
    for name in one:
        mine, others = one[name].tensors(), other[name].tensors()
        assert mine.keys() == others.keys()
        for part in mine:
            assert torch.equal(mine[part], others[part]), (name, part)
        assert (one[name].count, one[name].spec) == (other[name].count, other[name].spec)


@pytest.mark.parametrize("call", CALLS)
def test_each_layer_has_the_moments_of_its_own_inputs(call):
    check_equal(moments_of(call), moments_of(call, apart=True))


def test_with_a_mask_and_samples_held_out():
    data = tdecomp.Data(batches(), mask=lambda x: x[..., 0] > 0, held_out=0.4)
    shared = moments_of(attention, data=data)
    check_equal(shared, moments_of(attention, apart=True, data=data))
    assert shared["q"].held.rows is shared["v"].held.rows


def test_one_sum_for_all():
    shared, apart = moments_of(attention), moments_of(attention, apart=True)
    assert shared["q"].matrix is shared["k"].matrix is shared["v"].matrix
    assert shared["q"].matrix is not shared["out"].matrix
    # Of five layers three share one sum and a copy of it.
    assert shared.peak_bytes == pytest.approx(4 / 5 * apart.peak_bytes)


def test_wide_layers_share_their_rows():
    torch.manual_seed(0)
    wide = nn.ModuleDict({name: nn.Linear(6000, 3) for name in "qk"})
    wide.forward = lambda x: wide["q"](x) + wide["k"](x)
    moments = tdecomp.calibrate(wide, [torch.randn(8, 6000)] * 3, progress=False)
    assert moments["q"].rows is moments["k"].rows
    assert moments["q"].rows.shape[1] == moments["q"].count


def test_saved_once_and_shared_again(tmp_path):
    moments = moments_of(attention)
    moments.save(tmp_path / "moments.safetensors")
    loaded = tdecomp.Moments.load(tmp_path / "moments.safetensors")
    check_equal(loaded, moments)
    assert loaded["q"].matrix is loaded["v"].matrix
    both = loaded + moments
    assert both["q"].matrix is both["v"].matrix
    assert both["q"].gradient.shape == (4, 4)
    assert both["v"].spec == moments["v"].spec
    check_equal(both, moments_of(attention, apart=True) + moments)
    moments_of(attention, apart=True).save(tmp_path / "apart.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("moments", "apart")]
    assert sizes[0] < sizes[1] - 2 * moments["q"].matrix.nbytes


def test_a_version_that_shares_nothing_is_told_that_a_file_is_a_later_ones(tmp_path):
    forms = {}
    for call in (attention, changed_in_place):
        moments_of(call).save(tmp_path / "moments.safetensors")
        with safe_open(tmp_path / "moments.safetensors", "pt") as file:
            forms[call] = json.loads(file.metadata()["tdecomp_moments"])["format"]
    assert forms == {attention: 2, changed_in_place: 1}


def one_in_each_batch(model, x, number):
    return model.on((model.q, model.k)[number % 2], x)


def test_the_same_tensor_in_the_next_batch_is_another_input():
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))
    masks = [torch.arange(6) < 2, torch.arange(6) >= 2]
    data = tdecomp.Data(masks, mask=lambda mask: mask, held_out=0)

    def found(*, apart):
        model = Model(one_in_each_batch, apart)
        options = {"forward": lambda m, _: m(x), "gradients": False, "progress": False}
        return tdecomp.calibrate(model, data, **options)

    shared = found(apart=False)
    check_equal(shared, found(apart=True))
    assert (shared["k"].count, shared["q"].count) == (2, 4)
