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


@pytest.fixture
def own_methods():
    """Forget afterwards the methods that a test registers."""
    from tdecomp.decomposers.registry import registered, unregister

    before = registered()
    yield
    for name in set(registered()) - set(before):
        unregister(name)
