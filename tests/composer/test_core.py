"""Both functions against dense oracles, at their edges and with bad input."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from tdecomp.composer.core import factorize_conv2d, factorize_matrix
from tdecomp.composer.modules import FactorizedConv2d, FactorizedLinear
from tests.composer.oracle import best, data, directly, flat, predict, run
from tests.geometries import case

# The closed form of a matrix --------------------------------------------------------------------

SIZES = {
    "tall": (200, 12, 10),
    "more outputs": (200, 10, 30),
    "few samples": (7, 40, 20),
    "one sample": (1, 12, 10),
    "several slices": (20000, 6, 8),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_it_is_as_good_as_any_rank_k_outputs(sizes):
    for rank in (1, 3, 5):
        for bias in (False, True):
            with case(rank, bias):
                check_outputs(sizes, rank, bias)


def check_outputs(sizes, rank, bias):
    x, w = data(*sizes)
    b = torch.randn(w.shape[1], dtype=x.dtype) if bias else None
    y = x @ w if b is None else x @ w + b
    solution = factorize_matrix(x, y, w, bias=b, rank=rank)
    lost = float((y - predict(solution, x)).square().sum())
    assert lost <= best(y, rank, bias) + 1e-12 * float(y.square().sum())
    assert (solution.rank, solution.Wa.shape, solution.Wb.shape) == (
        rank, (sizes[1], rank), (rank, sizes[2]),
    )  # fmt: skip
    assert (solution.bias is None) == (b is None)
    assert solution.nmse == pytest.approx(lost / y.numel() / _variance(y), abs=1e-12)


def _variance(y):
    return float(y.var())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("factored", [False, True])
def test_a_target_of_its_own_is_regressed_first(factored, bias):
    """Reduced rank regression: the oracle whitens, in float64, by a plain QR and SVD."""
    x, w = data()
    y = torch.randn(len(x), 10, dtype=x.dtype) + x @ w
    wa, wb = (w[:, :6], torch.randn(6, 10, dtype=x.dtype)) if factored else (w, None)
    b = torch.randn(10, dtype=x.dtype) if bias else None
    solution = factorize_matrix(x, y, wa, wb, bias=b, rank=4)
    xc, yc = (x - x.mean(0), y - y.mean(0)) if bias else (x, y)
    fitted = torch.linalg.qr(xc)[0].T @ yc
    floor = float((yc.square().sum() - fitted.square().sum()) + best(fitted, 4))
    lost = float((y - predict(solution, x)).square().sum())
    assert lost == pytest.approx(floor, rel=1e-9)
    assert solution.nmse == pytest.approx(directly(y, predict(solution, x)), rel=1e-9)


@pytest.mark.parametrize("samples", [9, 300])
def test_a_target_of_its_own_from_inputs_that_do_not_span(samples):
    x, w = data(samples, 20, 10, seen=5)
    y = torch.randn(samples, 10, dtype=x.dtype)
    solution = factorize_matrix(x, y, w, rank=3)
    basis = torch.linalg.svd(x, full_matrices=False)[0][:, :5]
    fitted = basis.T @ y
    floor = float((y.square().sum() - fitted.square().sum()) + best(fitted, 3))
    assert float((y - predict(solution, x)).square().sum()) == pytest.approx(floor, rel=1e-9)
    whole = factorize_matrix(x, y, w, rank=10)
    unseen = torch.linalg.svd(x)[2][5:]  # where nothing is known, the weights stay
    assert torch.allclose(unseen @ whole.Wa, unseen @ w)


@pytest.mark.parametrize("bias", [False, True])
def test_it_reduces_what_is_factorized_already(bias):
    x, _ = data(200, 24, 1)
    wa, wb = torch.randn(24, 8).double(), torch.randn(8, 32).double()
    b = torch.randn(32).double() if bias else None
    y = x @ wa @ wb + (0 if b is None else b)
    solution = factorize_matrix(x, y, wa, wb, b, rank=5)
    lost = float((y - predict(solution, x)).square().sum())
    assert lost == pytest.approx(best(y, 5, bias), rel=1e-8)
    assert solution.Wa.shape == (24, 5)


def test_a_new_bias_is_the_one_to_have():
    x, w = data()
    b = torch.randn(10, dtype=x.dtype)
    y = x @ w + b
    solution = factorize_matrix(x, y, w, bias=b, rank=3)
    residual = y - predict(solution, x)
    assert torch.allclose(residual.mean(0), torch.zeros(10).double(), atol=1e-12)
    assert not torch.allclose(solution.bias, b)
    assert solution.nmse < factorize_matrix(x, y - b, w, rank=3).nmse * _variance(y - b) / (
        _variance(y)
    )


def test_no_number_of_iterations_matters():
    x, w = data()
    first, *others = (factorize_matrix(x, x @ w, w, rank=3, n_iters=n) for n in (0, 1, 3, 50))
    for other in others:
        assert torch.equal(first.Wa, other.Wa)
        assert first.nmse == other.nmse


@given(st.integers(1, 40), st.integers(2, 12), st.integers(2, 12), st.integers(1, 11))
def test_the_error_falls_with_the_rank_and_is_the_true_one(samples, fan_in, out, rank):
    draw = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, fan_in, generator=draw)
    w, b = torch.randn(fan_in, out, generator=draw), torch.randn(out, generator=draw)
    y = x @ w + b
    lower, higher = (factorize_matrix(x, y, w, bias=b, rank=k) for k in (rank, rank + 1))
    assert higher.nmse <= lower.nmse + 1e-9
    assert lower.nmse == pytest.approx(directly(y, predict(lower, x)), rel=1e-3, abs=1e-9)


def test_a_planted_rank_is_found():
    x, _ = data(50, 16, 1, dtype=torch.float32)
    w = torch.randn(16, 3) @ torch.randn(3, 12)
    assert factorize_matrix(x, x @ w, w, rank=3).nmse < 1e-10


def test_dead_inputs_and_outputs():
    x, w = data()
    x[:, :4], w[:, 2] = 0, 0
    solution = factorize_matrix(x, x @ w, w, rank=4)
    assert float((x @ w - predict(solution, x)).square().sum()) == pytest.approx(
        best(x @ w, 4), rel=1e-9
    )
    zeros = factorize_matrix(x * 0, x @ w * 0, w, rank=4)
    approximated = w - zeros.Wa @ zeros.Wb
    assert float(approximated.square().sum()) == pytest.approx(best(w, 4), rel=1e-9)
    assert zeros.nmse == 0
    nothing = factorize_matrix(x, x @ w * 0, w * 0, rank=4)
    assert nothing.nmse == 0
    assert nothing.Wa.isfinite().all()
    assert nothing.Wb.isfinite().all()


def test_what_the_data_leaves_open_the_weights_decide():
    x, w = data(3, 30, 20)
    solution = factorize_matrix(x, x @ w, w, rank=12)
    assert solution.nmse < 1e-15
    outputs = torch.linalg.svd(x @ w)[2][:3]  # these must be kept; of the rest, the best nine
    rest = w - w @ outputs.T @ outputs
    lost = float((w - solution.Wa @ solution.Wb).square().sum())
    assert lost == pytest.approx(best(rest, 9), rel=1e-3)


def test_both_factors_have_one_scale():
    x, w = data()
    solution = factorize_matrix(x, x @ w, w * 1.0, rank=5)
    assert torch.allclose(solution.Wa.norm(dim=0), solution.Wb.norm(dim=1))


# Edge cases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("rank", [10, 12, 100])
def test_a_rank_of_a_dimension_gives_one_matrix(rank, factored):
    x, w = data()
    wa, wb = (w[:, :6], torch.randn(6, 10).double()) if factored else (w, None)
    b = torch.randn(10).double()
    w = wa if wb is None else wa @ wb
    solution = factorize_matrix(x, x @ w + b, wa, wb, b, rank=rank)
    assert solution.Wb is None
    assert solution.rank == -1
    assert solution.nmse < 1e-20
    assert torch.allclose(solution.Wa, w, rtol=1e-12)
    assert torch.allclose(solution.bias, b, rtol=1e-12)


def test_a_rank_of_the_fan_in_gives_one_matrix():
    x, w = data(50, 6, 10)
    assert factorize_matrix(x, x @ w, w, rank=6).Wb is None
    assert factorize_matrix(x, x @ w, w, rank=5).rank == 5


def test_one_matrix_is_fitted_to_a_target_of_its_own():
    x, w = data()
    y = torch.randn(len(x), 10).double()
    solution = factorize_matrix(x, y, w, bias=torch.zeros(10).double(), rank=10)
    ones = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    oracle = ones @ torch.linalg.lstsq(ones, y, driver="gelsd").solution
    assert solution.nmse == pytest.approx(directly(y, oracle), rel=1e-9)
    assert solution.nmse == pytest.approx(directly(y, predict(solution, x)), rel=1e-9)


@pytest.mark.parametrize("rank", [6, 7, 9])
def test_a_rank_above_the_latent_one_gives_the_given_factors(rank):
    x, w = data()
    wa, wb, b = w[:, :6].contiguous(), torch.randn(6, 10).double(), torch.randn(10).double()
    y = x @ wa @ wb + 2 * b
    solution = factorize_matrix(x, y, wa, wb, b, rank=rank)
    assert torch.equal(solution.Wa, wa)
    assert torch.equal(solution.Wb, wb)
    assert torch.equal(solution.bias, b)
    assert solution.rank == -1
    assert solution.nmse == pytest.approx(directly(y, x @ wa @ wb + b))


def test_fractions_of_a_rank():
    x, w = data(50, 16, 32)
    assert factorize_matrix(x, x @ w, w).rank == 4  # of D, by default a quarter
    assert factorize_matrix(x, x @ w, w, rank=0.5).rank == 8
    assert factorize_matrix(x, x @ w, w, rank=0.01).rank == 1
    assert factorize_matrix(x, x @ w, w, rank=0).rank == 1
    assert factorize_matrix(x, x @ w, w, rank=3.0).rank == 3
    assert factorize_matrix(x, x @ w, w, rank=1.0).rank == 1
    wa, wb = w[:, :3], torch.randn(3, 6).double()
    kept = factorize_matrix(x, x @ wa @ wb, wa, wb, rank=0.5)  # at most the current one
    assert torch.equal(kept.Wa, wa)


# Convolutions -----------------------------------------------------------------------------------

GEOMETRIES = {
    "plain": {},
    "padding": {"padding": 1},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "stride": {"stride": 2, "padding": (1, 0)},
    "dilation": {"dilation": (2, 1), "padding": 2},
    "all": {"stride": (2, 1), "dilation": 2, "padding": (2, 1)},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (1, 2), "padding_mode": "circular", "stride": 2},
}


def predict_conv(solution, x, options):
    latent = run(solution.Wa, None, x, options)
    return functional.conv2d(latent, solution.Wb, solution.bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
def test_convolutions_are_the_optimum(options, bias):
    x = (torch.randn(3, 4, 9, 8) + 1).double()
    w = torch.randn(9, 4, 3, 2).double()
    b = torch.randn(9).double() if bias else None
    y = run(w, b, x, options)
    solution = factorize_conv2d(x, w, rank=3, biasA=b, **options)
    assert solution.Wa.shape == (3, 4, 3, 2)
    assert solution.Wb.shape == (9, 3, 1, 1)
    assert solution.Wa.is_contiguous()
    assert solution.Wb.is_contiguous()
    assert solution.rank == 3
    assert (solution.bias is None) == (not bias)
    got = predict_conv(solution, x, options)
    assert float((y - got).square().sum()) == pytest.approx(best(flat(y), 3, bias), rel=1e-9)
    assert solution.nmse == pytest.approx(directly(y, got), rel=1e-9)


def test_a_convolution_is_the_matrix_of_its_patches():
    x, w, b = torch.randn(2, 4, 7, 7), torch.randn(6, 4, 3, 3), torch.randn(6)
    rows = functional.unfold(x, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    matrix = w.flatten(1).T
    linear = factorize_matrix(rows, rows @ matrix + b, matrix, bias=b, rank=3)
    conv = factorize_conv2d(x, w, rank=3, biasA=b, padding=1, stride=2)
    assert conv.nmse == pytest.approx(linear.nmse, rel=1e-4)
    product = (conv.Wb.flatten(1) @ conv.Wa.flatten(1)).T
    assert torch.allclose(product, linear.Wa @ linear.Wb, atol=1e-4)
    assert torch.allclose(conv.bias, linear.bias, atol=1e-4)


@pytest.mark.parametrize("biases", ["", "A", "B", "AB"])
def test_two_convolutions_are_reduced_with_their_biases(biases):
    x, options = torch.randn(4, 6, 7, 7).double(), {"padding": 1, "stride": 2}
    wa, wb = torch.randn(5, 6, 3, 3).double(), torch.randn(12, 5, 1, 1).double()
    a = torch.randn(5).double() if "A" in biases else None
    b = torch.randn(12).double() if "B" in biases else None
    y = functional.conv2d(run(wa, a, x, options), wb, b)
    solution = factorize_conv2d(x, wa, wb, 3, a, b, **options)
    got = predict_conv(solution, x, options)
    assert float((y - got).square().sum()) == pytest.approx(
        best(flat(y), 3, bool(biases)), rel=1e-9
    )
    assert solution.nmse == pytest.approx(directly(y, got), rel=1e-9)
    assert (solution.bias is None) == (not biases)

    kept = factorize_conv2d(x, wa, wb, 5, a, b, **options)
    assert kept.rank == -1
    assert torch.equal(kept.Wa, wa)
    assert torch.equal(kept.Wb, wb)
    assert torch.allclose(predict_conv(kept, x, options), y)

    whole = factorize_conv2d(x, wa, wb, 12, a, b, **options)
    assert whole.rank == -1
    assert whole.Wb is None
    assert torch.allclose(run(whole.Wa, whole.bias, x, options), y)


def test_convolutions_of_more_outputs_than_inputs():
    x, w = torch.randn(4, 3, 8, 8).double(), torch.randn(64, 3, 2, 2).double()
    solution = factorize_conv2d(x, w, rank=8)
    y = run(w, None, x, {})
    assert float((y - predict_conv(solution, x, {})).square().sum()) == pytest.approx(
        best(flat(y), 8), rel=1e-8
    )
    assert factorize_conv2d(x, w, rank=12).Wb is None  # of a fan-in of 12


def test_a_fraction_of_channels():
    x, w = torch.randn(1, 8, 6, 6), torch.randn(32, 8, 3, 3)
    assert factorize_conv2d(x, w).rank == 2
    assert factorize_conv2d(x, w, rank=0.01).rank == 1
    assert factorize_conv2d(x[0], w, rank=10).rank == 10  # above in_channels, below both sizes
    assert factorize_conv2d(x, w, rank=32).rank == -1


# Dtypes, devices and modes ----------------------------------------------------------------------


def test_results_have_the_dtype_of_the_weights():
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for inputs, weights in itertools.product(dtypes, dtypes):
        with case(inputs, weights):
            check_dtypes(inputs, weights)


def check_dtypes(inputs, weights):
    x, w = data(60, dtype=torch.float32)
    b = torch.randn(10)
    y = x @ w + b
    solution = factorize_matrix(*(t.to(inputs) for t in (x, y)), w.to(weights), None, b, rank=4)
    reference = factorize_matrix(x, y, w, bias=b, rank=4)
    for part in (solution.Wa, solution.Wb, solution.bias):
        assert part.dtype == weights
        assert not part.requires_grad
    assert solution.nmse == pytest.approx(reference.nmse, abs=0.01)
    maps, kernel = torch.randn(2, 4, 5, 5).to(inputs), torch.randn(6, 4, 3, 3).to(weights)
    conv = factorize_conv2d(maps, kernel, rank=3)
    assert conv.Wa.dtype == conv.Wb.dtype == weights


def test_an_operator_rounded_to_half_precision_is_judged_as_rounded():
    x, w = data(60, dtype=torch.float32)
    w = (w[:, :2] @ torch.randn(2, 10)).bfloat16()
    y = x @ w.float()
    solution = factorize_matrix(x, y, w, rank=9)
    assert 1e-9 < solution.nmse == pytest.approx(directly(y, predict(solution, x)), rel=1e-3)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, "autocast"])
def test_modes_of_the_caller_stay_outside(mode):
    context = torch.autocast("cpu") if mode == "autocast" else mode()
    x, w = (t.requires_grad_() for t in data(dtype=torch.float32))
    expected = factorize_matrix(x, x @ w, w, rank=3)
    layer = FactorizedLinear.from_linear(nn.Linear(24, 24), latent_features=8)
    maps = FactorizedConv2d.from_conv2d(nn.Conv2d(8, 8, 3), latent_channels=4)
    with context:
        got = factorize_matrix(x, x.detach() @ w.detach(), w, rank=3)
        layer.set_rank(torch.randn(30, 24), 4)
        maps.set_rank(torch.randn(2, 8, 5, 5), 2)
    assert not got.Wa.is_inference()
    assert got.nmse == pytest.approx(expected.nmse, rel=0.05)
    for module, shape in ((layer, (2, 24)), (maps, (1, 8, 4, 4))):
        module(torch.randn(shape)).sum().backward()
        assert module.module0.weight.grad is not None
        assert module.module0.weight.dtype == torch.float32


def test_half_precision_is_fitted_in_single():
    x, w = (t.half() for t in data(60, dtype=torch.float32))
    y = (x.float() @ w.float()).half()
    half = factorize_matrix(x, y, w, rank=4)
    single = factorize_matrix(x.float(), x.float() @ w.float(), w.float(), rank=4)
    assert torch.equal(half.Wa, single.Wa.half())
    assert torch.equal(half.Wb, single.Wb.half())


def test_autocast_changes_nothing():
    maps, kernel = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)
    layer = FactorizedLinear.from_linear(nn.Linear(24, 24), latent_features=8)
    x = torch.randn(50, 24)
    expected = factorize_conv2d(maps, kernel, rank=3), layer.solution_for_rank(x, 3)
    with torch.autocast("cpu"):
        got = factorize_conv2d(maps, kernel, rank=3), layer.solution_for_rank(x, 3)
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one.Wa, other.Wa)
        assert one.nmse == other.nmse


def test_a_single_output_of_a_single_sample():
    x, w = data(1, 4, 1)
    assert factorize_matrix(x, x @ w, w, rank=1).nmse == 0


def test_given_tensors_stay_as_they_are():
    x, w = data()
    y, b = x @ w, torch.ones(10).double()
    before = [t.clone() for t in (x, y, w, b)]
    for rank in (3, 10):
        factorize_matrix(x, y, w, bias=b, rank=rank)
    assert all(map(torch.equal, before, (x, y, w, b)))


# Bad input --------------------------------------------------------------------------------------

X, W = torch.ones(4, 6), torch.ones(6, 5)
MAPS, KERNEL = torch.ones(1, 6, 4, 4), torch.ones(5, 6, 3, 3)
BAD_MATRICES = {
    "X of Y": ((torch.ones(3, 6), X @ W, W), {}, ValueError, r"X \(3, 6\), Y \(4, 5\)"),
    "X of Wa": ((torch.ones(4, 5), X @ W, W), {}, ValueError, "a Linear's transposed"),
    "Y of Wa": ((X, torch.ones(4, 6), W), {}, ValueError, "expected X"),
    "Wb of Wa": ((X, X @ W, W, W), {}, ValueError, r"Wb \(6, 5\)"),
    "vectors": ((X[0], X[0] @ W, W), {}, ValueError, "expected X"),
    "no samples": ((X[:0], X[:0] @ W, W), {}, ValueError, "expected something"),
    "bias": ((X, X @ W, W, None, torch.ones(4)), {}, ValueError, r"bias \(4,\)"),
    "integers": ((X.int(), X @ W, W), {}, TypeError, "X: expected .*torch.int32"),
    "no tensor": ((X, X @ W, [1.0]), {}, TypeError, "Wa: expected .* list"),
    "nan": ((X * torch.nan, X @ W, W), {"rank": 2}, ValueError, "X: 24 of 24 values"),
    "nan target": ((X, X @ W * torch.nan, W), {"rank": 2}, ValueError, "Y: 20 of 20"),
    "negative": ((X, X @ W, W), {"rank": -1}, ValueError, "rank: got -1; expected"),
    "not whole": ((X, X @ W, W), {"rank": 2.5}, ValueError, "rank: got 2.5"),
    "nan rank": ((X, X @ W, W), {"rank": float("nan")}, ValueError, "rank: got nan"),
    "infinite": ((X, X @ W, W), {"rank": float("inf")}, ValueError, "rank: got inf"),
    "bool": ((X, X @ W, W), {"rank": True}, TypeError, "rank: got True"),
    "words": ((X, X @ W, W), {"rank": "all"}, TypeError, "rank: got 'all'"),
}
BAD_KERNELS = {
    "biasB": ((MAPS, KERNEL), {"biasB": torch.ones(5)}, RuntimeError, "biasB: .* without Wb"),
    "groups": ((MAPS, KERNEL), {"groups": 2}, NotImplementedError, "groups: got 2.*lowrank"),
    "channels": ((MAPS[:, :5], KERNEL), {}, ValueError, r"X \(1, 5, 4, 4\)"),
    "matrix": ((MAPS, KERNEL.flatten(1)), {}, ValueError, "expected X"),
    "Wb": ((MAPS, KERNEL, KERNEL), {}, ValueError, "Wb"),
    "biasA": ((MAPS, KERNEL), {"biasA": torch.ones(6)}, ValueError, r"biasA \(6,\)"),
    "biasB size": (
        (MAPS, KERNEL, torch.ones(7, 5, 1, 1)), {"biasB": torch.ones(5)}, ValueError, r"B \(5,\)",
    ),
    "option": ((MAPS, KERNEL), {"strides": 2}, TypeError, "strides"),
    "empty": ((MAPS[:0], KERNEL), {}, ValueError, "expected something"),
    "inf": ((MAPS / 0, KERNEL), {}, ValueError, "X: 96 of 96 values"),
    "overflow": ((MAPS * 1e30, KERNEL * 1e30), {}, ValueError, "leave the range of torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MATRICES.values(), ids=BAD_MATRICES)
def test_bad_matrices(case):
    args, kwargs, error, words = case
    with pytest.raises(error, match=words):
        factorize_matrix(*args, **kwargs)


@pytest.mark.parametrize("case", BAD_KERNELS.values(), ids=BAD_KERNELS)
def test_bad_kernels(case):
    args, kwargs, error, words = case
    with pytest.raises(error, match=words):
        factorize_conv2d(*args, **kwargs)
