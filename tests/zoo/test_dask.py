"""Work on a local Dask cluster: two spawned processes of one thread each."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.decomposers.svd import SVD

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]  # as Dask's workers have
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def client():
    import dask
    from distributed import Client, LocalCluster

    # One death of a worker is forgiven, the second in the same task is not.
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 32, 3, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 16, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def images():
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def same(one, other):
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return one.plan.to_json() == other.plan.to_json() and all(torch.equal(a, b) for a, b in pairs)


CALLS = {
    "budget on data": {
        "methods": "auto", "rank": tdecomp.Budget(macs=0.5), "example_inputs": images()[:1],
        "data": [images()],
    },
    "energy": {"methods": "svd", "rank": tdecomp.Energy(0.5)},
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_the_workers_find_the_same_bits(client, call):
    model, executor = network(), client.get_executor()
    found = tdecomp.decompose(model, **CALLS[call], **QUIET, executor=executor)
    assert any(row.method for row in found.report)
    assert same(found, tdecomp.decompose(model, **CALLS[call], **QUIET))


def test_weights_that_dask_calls_large_are_no_warning(client):
    layer = nn.Linear(2048, 2048)  # 16 MB
    found = tdecomp.decompose(layer, "svd", rank=8, **QUIET, executor=client.get_executor())
    assert found.report[""].rank == 8


def test_methods_and_selectors_of_a_notebook_travel(client):
    @dataclass(frozen=True)
    class Own(SVD):
        name = "own"

    class Third(tdecomp.LocalSelector):
        def choose(self, candidate):
            values = candidate.spectra()[0].squares
            return tdecomp.Choice(candidate, values.shape[1] // 3)

    call = {"methods": Own(), "rank": Third(), **QUIET}
    found = tdecomp.decompose(network(), **call, executor=client.get_executor())
    assert found.report["7"].rank == 21
    assert type(found.model[7].decomposer) is Own
    assert same(found, tdecomp.decompose(network(), **call))


def test_a_failure_names_the_layer(client):
    @dataclass(frozen=True)
    class Fails(SVD):
        name = "fails"

        def fit(self, *_):
            raise ZeroDivisionError

    with pytest.raises(ValueError, match=r"layer '7' \(Linear.* fails at rank 4 .*ZeroDivision"):
        tdecomp.decompose(
            network(), Fails(), rank=4, include="7", **QUIET, executor=client.get_executor()
        )


@dataclass(frozen=True)
class Deadly(SVD):
    """Ends the processes that fit it, but for the caller's, until so many have ended."""

    name = "deadly"
    folder: str = ""
    caller: int = 0
    deaths: int = 0

    def fit(self, kernel, rank):
        marks = list(Path(self.folder).iterdir())
        if os.getpid() != self.caller and len(marks) < self.deaths:
            Path(self.folder, str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fit(kernel, rank)


def test_a_worker_that_dies_has_its_layers_done_by_others(client, tmp_path):
    method = Deadly(folder=str(tmp_path), caller=os.getpid(), deaths=1)
    found = tdecomp.decompose(network(), method, rank=4, **QUIET, executor=client.get_executor())
    assert len(list(tmp_path.iterdir())) == 1
    assert same(found, tdecomp.decompose(network(), method, rank=4, **QUIET))


def test_a_layer_that_no_worker_survives_is_done_here(client, tmp_path):
    method = Deadly(folder=str(tmp_path), caller=os.getpid(), deaths=100)
    call = {"rank": 4, "include": "7", **QUIET}
    with pytest.warns(UserWarning, match=r"workers were lost \(KilledWorker.*in this process"):
        found = tdecomp.decompose(network(), method, **call, executor=client.get_executor())
    assert len(list(tmp_path.iterdir())) == 2
    assert same(found, tdecomp.decompose(network(), method, **call))


def test_an_executor_of_a_client_that_was_closed_is_refused(client):
    from distributed import Client

    with Client(client.scheduler.address, set_as_default=False) as other:
        executor = other.get_executor()
    with pytest.raises(ValueError, match=r"executor: .*it was shut down .*make a new one"):
        tdecomp.plan(network(), "svd", rank=4, **QUIET, executor=executor)
