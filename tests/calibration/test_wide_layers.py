"""Layers whose moments would be large: sums in single precision, samples, a limit by default."""

import numpy as np
import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.calibration.accumulator import Accumulator, sums_bytes
from tdecomp.calibration.layer_moments import sample_size
from tdecomp.calibration.memory import free_memory
from tdecomp.decomposers.fit_layer import fit_layer
from tdecomp.decomposers.registry import get_decomposer
from tdecomp.layers.spec import LayerSpec
from tdecomp.recovery.checks import Checks


def rows(count, width, seed=0, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, 4, generator=generator) @ torch.randn(4, width, generator=generator)
    return mixed + 0.1 * torch.randn(count, width, generator=generator) + mean


@pytest.mark.parametrize("mean, dtype", [(0.5, torch.float32), (1e3, torch.float64)])
def test_sums_of_wide_layers_are_single_unless_a_large_mean_hides_the_variance(mean, dtype):
    x = rows(1100, 1030, mean=mean)
    sums = Accumulator(LayerSpec(1030, 4))
    for part in x.split(500):
        sums.add(part)
    moments = sums.finish()
    assert moments.matrix.dtype == dtype
    wanted = (x.double() - x.double().mean(dim=0)).square().mean(dim=0)
    (second,) = moments.second_moments()
    torch.testing.assert_close(second.matrix.diagonal(), wanted, rtol=2e-3, atol=0.0)
    assert sums.nbytes <= sums_bytes(sums.spec, 1100, torch.float32)


WIDEST = 6000


def widest():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(WIDEST, 3)


def test_of_the_widest_layers_a_sample_of_all_batches_is_held():
    sums, most = Accumulator(LayerSpec(WIDEST, 3)), sample_size(LayerSpec(WIDEST, 3))
    for batch in range(4):
        sums.add(torch.full((2000, WIDEST), float(batch)))
    moments = sums.finish()
    assert (moments.count, moments.sampled, moments.few) == (8000, True, True)
    held = moments.rows[0, :, 0]
    assert len(held) == pytest.approx(most, abs=4)
    shares = torch.stack([(held == batch).float().mean() for batch in range(4)])
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.01, rtol=0.0)
    assert sums.nbytes <= 1.1 * sums_bytes(sums.spec, 8000, torch.float32)
    both = moments.merged(moments, 0.5)
    assert both.count == 16000
    assert both.sampled


def test_of_the_widest_layers_fewer_patches_judge_a_refit():
    for width, kept in ((1024, 2048), (WIDEST, 700)):
        checks = Checks(LayerSpec(width, 3), calls=2, generator=np.random.default_rng(0))
        for x in rows(6000, width).split(3000):
            checks.add(x, x[:, :3], torch.arange(3000), 3000)
        assert sum(len(owners) for _, _, owners, _ in checks.parts) == pytest.approx(kept, abs=2)


def test_fits_to_a_sample_lose_little_on_other_inputs(tmp_path):
    model = widest()
    data = tdecomp.Data(list(rows(3000, WIDEST).split(1500)), held_out=0)
    moments = tdecomp.calibrate(model, data, gradients=False, progress=False)
    moments.save(tmp_path / "moments")
    seen = tdecomp.Moments.load(tmp_path / "moments")[""]
    fitted = fit_layer(model.weight, seen.spec, get_decomposer("svd"), 2, seen)
    gone = model.weight.detach() - fitted.factors.to_kernel()
    other = rows(500, WIDEST, seed=1) - seen.mean.float()
    lost = (other @ gone.T).square().sum() / (other @ model.weight.detach().T).square().sum()
    assert fitted.output_error is not None
    assert 0 < float(lost) < 1.0
    assert fitted.notes == (f"fewer samples ({sample_size(seen.spec):,}) than fan_in (6,000)",)


def test_the_memory_that_is_free_is_the_default_limit():
    free = free_memory(torch.device("cpu"))
    assert isinstance(free, int)
    assert free > 0
    assert free_memory(torch.device("meta")) is None
    # What yields its batches once is taken in one pass all the same.
    once = tdecomp.calibrate(widest(), iter([rows(3, WIDEST)]), gradients=False, progress=False)
    assert len(once) == 1
