from tests.latency.conftest import clock, model, x

__all__ = ["clock", "model", "x"]
