import signal

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.decomposers.oracle")

# The same examples in every run and at any speed; an inherited property runs once per subclass.
settings.register_profile(
    "tdecomp",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)
settings.load_profile("tdecomp")


@pytest.fixture(autouse=True, scope="session")
def interrupts():
    """SIGINT as in a terminal: a shell starts its background jobs with SIGINT ignored."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _threads(count):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """Torch has one thread, as most workers have."""
    yield from _threads(1)


@pytest.fixture
def two_threads():
    """Torch has two, so that layers are fitted side by side."""
    yield from _threads(2)


@pytest.fixture
def own_methods():
    """Forget afterwards the methods that a test registers."""
    from tdecomp.decomposers.registry import registered, unregister

    before = registered()
    yield
    for name in set(registered()) - set(before):
        unregister(name)
