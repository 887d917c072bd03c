"""Kernels and numbers that the fits have trouble with: what is said of them, and what is done."""

import math
import re

import numpy as np
import pytest
import scipy.linalg
import torch
from tensorly.backend.pytorch_backend import PyTorchBackend
from torch import nn

import tdecomp
from tests.geometries import case
from tests.unchanged import unchanged

CPS = (tdecomp.CP, tdecomp.CPSeparable)


def border_rank_kernel(noise=0.0, seed=0):
    """a⊗a⊗b + a⊗b⊗a + b⊗a⊗a over orthonormal pairs: no best fit of rank 2 exists.

    de Silva and Lim 2008, "Tensor Rank and the Ill-Posedness of the Best Low-Rank Approximation
    Problem", section 4: fits of rank 2 come as close as one likes, with components that grow
    without bound. The noise leaves that so, and tilts the kernel off its symmetry.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pairs = [torch.linalg.qr(normal(size, 2))[0] for size in (8, 6, 4)]
    terms = ((0, 0, 1), (0, 1, 0), (1, 0, 0))
    kernel = sum(
        torch.einsum("i,j,k->ijk", *(p[:, c] for p, c in zip(pairs, term, strict=True)))
        for term in terms
    )
    return kernel + noise * normal(*kernel.shape)


def border_rank_layer(**options):
    """A Conv1d whose only spatial mode is the third one: both forms of CP are the same there."""
    layer = nn.Conv1d(6, 8, 4).double()
    with torch.no_grad():
        layer.weight.copy_(border_rank_kernel(**options))
    return layer


def conv(*args, scale=1.0, dtype=torch.float64, seed=0, **options):
    layer = nn.Conv2d(*args, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(layer.weight.shape, generator=generator, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        layer.weight.copy_(values * scale)
    return layer


def decompose(model, method, rank, **options):
    return tdecomp.decompose(
        model, method, rank=rank, allow_expansion=True, progress=False, **options
    )


# -- components that cancel ---------------------------------------------------------------------


@pytest.mark.parametrize("method", CPS)
@pytest.mark.parametrize("noise", [0.0, 1e-3, 1e-2])
def test_without_the_ridge_a_degenerate_fit_is_refused(method, noise):
    model = nn.Sequential(border_rank_layer(noise=noise))
    greedy = method(l2_reg=0.0, n_iter_max=1000, tol=0.0)
    with unchanged(model), pytest.raises(ValueError, match=r"'0'.*degenerates") as caught:
        decompose(model, greedy, 2)
    found = re.search(
        r"sum to ([\d.e+]+) times the kernel's norm, expected at most ([\d.]+)", str(caught.value)
    )
    got, bound = map(float, found.groups())
    assert bound == pytest.approx(5 * math.sqrt(2), rel=1e-2)
    assert got > bound
    assert "lower rank or another method" in str(caught.value)


@pytest.mark.parametrize("method", CPS)
@pytest.mark.parametrize("sweeps", [100, 1000])
def test_with_the_default_ridge_it_is_bounded_and_close(method, sweeps):
    for noise in (0.0, 1e-3, 1e-2):
        layer = border_rank_layer(noise=noise)
        row = decompose(layer, method(n_iter_max=sweeps, tol=0.0), 2).report[""]
        with case(noise):
            # The best fit of rank 1 is at 0.745: anything near it does not use both components.
            assert row.weight_error < 0.15
            assert 1.0 < row.component_norms <= 5 * math.sqrt(2)


def test_refusal_of_one_layer_leaves_the_model_and_its_optimizer():
    model = nn.Sequential(nn.Conv1d(6, 6, 4).double(), border_rank_layer(noise=1e-2))
    with torch.no_grad():
        model[0].weight.copy_(torch.einsum("i,j,k->ijk", *map(torch.ones, (6, 6, 4))))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    greedy = tdecomp.CP(l2_reg=0.0, n_iter_max=1000, tol=0.0)
    with (
        unchanged(model, optimizer),
        pytest.raises(ValueError, match=r"layer '1' .*degenerates"),
    ):
        decompose(model, greedy, 2, inplace=True, optimizers=optimizer)


# -- what the report says -----------------------------------------------------------------------


def component_norms(chain, weight, groups=1):
    """From the chain's own layers: each component is an outer product of vectors."""
    into, *spatial, out = (stage.weight.detach().double() for stage in chain)
    norms = into.flatten(1).norm(dim=1)
    for factor in spatial:
        norms = norms * factor.flatten(1).norm(dim=1)
    # (out, R) of each group, whose components are the next R of the middle channels
    columns = torch.cat([block.flatten(1).norm(dim=0) for block in out.chunk(groups)])
    weight = weight.detach().double()
    scale = weight.abs().max()
    return float((norms * columns / scale).sum() / (weight / scale).norm())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("method", CPS)
def test_component_norms_of_the_row(method, groups):
    layer = conv(8, 12, 3, groups=groups)
    result = decompose(layer, method(n_iter_max=10), 5)
    expected = component_norms(result.model, layer.weight, groups)
    assert result.report[""].component_norms == pytest.approx(expected, rel=1e-9)
    assert expected > 0.1


@pytest.mark.parametrize("method", CPS)
def test_component_norms_do_not_depend_on_the_scale(method):
    def norms(scale, dtype):
        layer = conv(8, 12, 3, scale=scale, dtype=dtype)
        row = decompose(layer, method(n_iter_max=3), 5).report[""]
        assert math.isfinite(row.weight_error)
        return row.component_norms

    usual = norms(1.0, torch.float64)
    for scale, dtype in (
        (1e-30, torch.float32),
        (1e30, torch.float32),
        (1e-200, torch.float64),
        (1e200, torch.float64),
        (1e30, torch.bfloat16),
        (1e3, torch.float16),
    ):
        with case(scale, dtype):
            assert norms(scale, dtype) == pytest.approx(usual, rel=0.05)


def test_one_component_has_the_norm_of_its_kernel():
    layer = nn.Conv2d(6, 8, 3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("i,j,k,l->ijkl", *map(torch.ones, (8, 6, 3, 3))))
    for method in CPS:
        assert decompose(layer, method(), 1).report[""].component_norms == pytest.approx(1.0)


def test_report_shows_the_component_norms():
    model = nn.Sequential(conv(8, 12, 3), nn.Flatten(), nn.Linear(12, 10))
    report = decompose(model, [tdecomp.CP(n_iter_max=10), "svd"], 5).report
    norms = report["0"].component_norms
    line = next(line for line in str(report).splitlines() if line.startswith("0 "))
    assert f"component norms {norms:.1f} times the kernel's" in line
    assert f"component norms {norms:.1f} times the kernel&#x27;s" in report._repr_html_()
    assert report["0"].to_dict()["component_norms"] == norms
    assert report["2"].component_norms is None
    assert str(report).count("component norms") == 1


def test_zero_kernel_has_no_components():
    row = decompose(conv(8, 12, 3, scale=0.0), "cp", 5).report[""]
    assert (row.component_norms, row.weight_error) == (0.0, 0.0)


# -- an SVD that does not converge --------------------------------------------------------------

# Ranks below the channel counts: there CP's second start takes singular vectors as well.
LAYERS = {
    "svd": (nn.Linear, (16, 12)),
    "lowrank": (nn.Conv2d, (12, 16, 3)),
    "spatial": (nn.Conv2d, (12, 16, 3)),
    "tucker2": (nn.Conv2d, (12, 16, 3)),
    "cp": (nn.Conv2d, (12, 16, 3)),
    "cp-separable": (nn.Conv2d, (12, 16, 3)),
}


def layer_for(method):
    kind, sizes = LAYERS[method]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Identity(), kind(*sizes))


@pytest.fixture
def no_torch_svd(monkeypatch):
    """torch's drivers fail, for TensorLy as well; a list of what SciPy is asked for."""
    asked = []
    original = scipy.linalg.svd

    def diverge(*_args, **_options):
        raise torch.linalg.LinAlgError("linalg.svd: did not converge")

    def gesvd(matrix, **options):
        asked.append((matrix.dtype, options))
        return original(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", diverge)
    monkeypatch.setattr(torch.linalg, "eigh", diverge)
    monkeypatch.setattr(PyTorchBackend, "svd", staticmethod(diverge))
    monkeypatch.setattr(scipy.linalg, "svd", gesvd)
    return asked


@pytest.mark.parametrize("method", LAYERS)
def test_svd_falls_back_to_gesvd(method, request):
    expected = decompose(layer_for(method), method, 4)
    asked = request.getfixturevalue("no_torch_svd")
    result = decompose(layer_for(method), method, 4)
    # CP can do without: it has another start than the one by singular vectors.
    assert asked or method in ("cp", "cp-separable")
    assert all(
        dtype == np.float64 and options == {"full_matrices": False, "lapack_driver": "gesvd"}
        for dtype, options in asked
    )
    row = result.report["1"]
    # From another start, or from singular vectors of other signs, sweeps end a little elsewhere.
    near = 0.02 if "cp" in method else 1e-3
    assert row.weight_error == pytest.approx(expected.report["1"].weight_error, rel=near)
    for parameter in result.model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.isfinite().all()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("method", ["svd", "lowrank", "spatial"])
def test_where_gesvd_fails_too_the_layer_is_named(method, inplace, monkeypatch, no_torch_svd):
    def diverge(*_args, **_options):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(scipy.linalg, "svd", diverge)
    model = layer_for(method)
    wanted = rf"layer '1' \(.*\): {method} at rank 4 failed with LinAlgError: .*exclude=\['1'\]"
    with unchanged(model), pytest.raises(ValueError, match=wanted):
        decompose(model, method, 4, inplace=inplace)
    assert no_torch_svd == []


# -- weights that are no numbers ----------------------------------------------------------------


@pytest.mark.parametrize("method", LAYERS)
def test_weights_that_are_no_numbers_are_refused_by_name(method):
    for bad in (math.nan, math.inf, -math.inf):
        model = layer_for(method)
        weight = model[1].weight
        with torch.no_grad():
            weight[2] = bad
        wanted = (
            rf"layer '1' \(.*\): {weight[2].numel()} of {weight.numel()} entries of its weight are "
            "NaN or inf"
        )
        for inplace, match in ((False, wanted), (True, r"exclude=\['1'\]")):
            with case(bad), unchanged(model), pytest.raises(ValueError, match=match):
                decompose(model, method, 4, inplace=inplace)


def test_bias_that_is_no_number_is_refused_by_name():
    model = layer_for("lowrank")
    with torch.no_grad():
        model[1].bias[0] = math.nan
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"layer '1' .*1 of 16 entries of its bias"),
    ):
        decompose(model, "lowrank", 4)


def test_weights_that_went_bad_after_planning_are_refused():
    model = layer_for("lowrank")
    plan = tdecomp.plan(model, "lowrank", rank=4, allow_expansion=True)
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    with unchanged(model), pytest.raises(ValueError, match=r"layer '1' .*NaN or infinite"):
        tdecomp.apply(model, plan, progress=False)


def test_layer_that_is_left_alone_may_hold_anything():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    report = decompose(model, "svd", 4, exclude=["0"]).report
    assert [row.method for row in report] == [None, "svd"]
