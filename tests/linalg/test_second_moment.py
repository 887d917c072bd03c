import pytest
import torch

from tdecomp.linalg.leading_outputs import leading_outputs
from tdecomp.linalg.second_moment import SecondMoment
from tests.decomposers.oracle import distance


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def both_ways(samples, fan_in, seed=0):
    """One second moment, by its samples and as a matrix."""
    rows = (
        gaussian(samples, fan_in, seed=seed) @ torch.diag(torch.linspace(2, 0.1, fan_in)).double()
    )
    rows = rows / samples**0.5
    return SecondMoment(rows=rows), SecondMoment(matrix=rows.T @ rows)


def inputs(kind, fan_in=12):
    """Rows x whose second moment is that of full rank, of few samples, or of dead inputs."""
    rows = gaussian(40 if kind != "few" else 5, fan_in, seed=1)
    if kind == "dead":
        rows[:, ::3] = 0
    if kind == "copied":
        rows[:, fan_in // 2 :] = rows[:, : fan_in // 2]
    return rows / len(rows) ** 0.5


KINDS = ("full", "few", "dead", "copied")


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("samples", [5, 40])
def test_rows_and_matrix_agree_in_every_method(samples, share):
    by_rows, by_matrix = (moment.shrunk(share) for moment in both_ways(samples, 12))
    kernel = gaussian(6, 12, seed=1)
    assert by_rows.fan_in == by_matrix.fan_in == 12
    for name in ("trace", "ridge"):
        assert getattr(by_rows, name) == pytest.approx(getattr(by_matrix, name))
    assert by_rows.lost(kernel) == pytest.approx(by_matrix.lost(kernel))
    for method, arguments in (
        ("applied", (kernel,)),
        ("between", (kernel,)),
        ("along", ((3, 4), 1)),
        ("solved", (kernel, 1e-3)),
    ):
        one, other = (getattr(m, method)(*arguments) for m in (by_rows, by_matrix))
        assert distance(one, other) < 1e-8, method


def test_a_shrunk_moment_has_a_share_of_the_mean_power_more_in_each_direction():
    moment = both_ways(40, 12)[1]
    more = 0.3 * moment.trace / 12 * torch.eye(12).double()
    assert distance(moment.shrunk(0.3).matrix, moment.matrix + more) < 1e-12


@pytest.mark.parametrize("samples", [5, 40])
def test_methods_are_what_they_say(samples):
    by_rows, by_matrix = both_ways(samples, 12)
    kernel, matrix = gaussian(6, 12, seed=1), by_matrix.matrix
    assert by_rows.trace == pytest.approx(matrix.trace().item())
    assert by_rows.lost(kernel) == pytest.approx((kernel @ matrix @ kernel.T).trace().item())
    assert distance(by_rows.applied(kernel), kernel @ matrix) < 1e-8
    assert distance(by_rows.between(kernel), kernel @ matrix @ kernel.T) < 1e-8
    ridged = matrix + 1e-2 * torch.eye(12).double()
    assert distance(by_rows.solved(kernel, 1e-2), kernel @ torch.linalg.inv(ridged)) < 1e-6


def test_zero_moment_falls_back_on_the_weights():
    kernel = gaussian(6, 12)
    for moment in (
        SecondMoment(rows=torch.zeros(3, 12).double()),
        SecondMoment(torch.zeros(12, 12).double()),
    ):
        assert moment.ridge > 0
        assert moment.lost(kernel) == 0.0
        outputs = leading_outputs(kernel, moment, 2)
        truncated = torch.linalg.svd(kernel)
        best = (truncated.U[:, :2] * truncated.S[:2]) @ truncated.Vh[:2]
        assert distance(outputs @ outputs.T @ kernel, best) < 1e-6


@pytest.mark.parametrize("power", [1e-318, -1e-20], ids=["too small", "round-off"])
def test_power_that_says_nothing_falls_back_on_the_weights(power):
    matrix = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64) * power
    kernel = torch.eye(2, dtype=torch.float64)
    assert SecondMoment(matrix=matrix).solved(kernel, 0.0).diagonal().min() > 0


def test_round_off_off_the_diagonal_becomes_definite():
    matrix = torch.tensor([[1e-20, 1e-9], [1e-9, 1e-20]], dtype=torch.float64)
    kernel = torch.eye(2, dtype=torch.float64)
    assert SecondMoment(matrix=matrix).solved(kernel, 0.0).isfinite().all()


def test_rounded_matrix_becomes_definite():
    rows = gaussian(200, 6).float()
    rows = torch.cat([rows, rows @ gaussian(6, 6, seed=1).float()], dim=1)
    rounded = (rows.T @ rows / 200).double()
    assert torch.linalg.eigvalsh(rounded)[0] < 0
    inverse = SecondMoment(matrix=rounded).solved(torch.eye(12).double(), 0.0)
    assert torch.linalg.eigvalsh(inverse)[0] > 0
    assert distance(torch.linalg.inv(inverse), rounded) < 1e-6


# -- the closed form ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out", [5, 12, 20])
def test_leading_outputs_are_those_of_a_dense_svd_of_the_outputs(out, kind):
    rows, kernel = inputs(kind), gaussian(out, 12)
    values = torch.linalg.svdvals(rows @ kernel.T)
    for moment in (SecondMoment(rows=rows), SecondMoment(matrix=rows.T @ rows)):
        for rank in range(1, min(out, 12) + 1):
            outputs = leading_outputs(kernel, moment, rank)
            assert outputs.shape == (out, rank)
            assert distance(outputs.T @ outputs, torch.eye(rank)) < 1e-10
            lost = moment.lost(kernel - outputs @ (outputs.T @ kernel))
            best = values[rank:].square().sum().item()
            assert lost == pytest.approx(best, rel=1e-6, abs=1e-9 * values.square().sum().item())


@pytest.mark.parametrize("out", [5, 20])
def test_leading_outputs_are_the_whitened_truncation(out):
    rows, kernel = inputs("full"), gaussian(out, 12)
    lower = torch.linalg.cholesky(rows.T @ rows)
    u, s, vh = torch.linalg.svd(kernel @ lower, full_matrices=False)
    expected = torch.linalg.solve_triangular(
        lower, (u[:, :3] * s[:3]) @ vh[:3], upper=False, left=False
    )
    outputs = leading_outputs(kernel, SecondMoment(rows=rows), 3)
    assert distance(outputs @ outputs.T @ kernel, expected) < 1e-6


@pytest.mark.parametrize("out", [7, 600])
def test_weighted_losses_are_the_explicit_ones(out):
    kernel, root = gaussian(out, 12), gaussian(out, out, seed=4)
    importance = root @ root.T
    for moment in both_ways(40, 12):
        explicit = (importance * moment.between(kernel)).sum().item()
        assert moment.weighted_loss(kernel, importance) == pytest.approx(explicit, rel=1e-9)
        below = importance.tril()
        assert moment.weighted_loss(kernel, below) == pytest.approx(explicit, rel=1e-9)
