import os

from benchmarks.support.torchvision_import import import_torchvision

# The libraries import it, too, and do not declare its operators where those cannot be loaded.
import_torchvision()
# Nothing is ever downloaded: every model is made from its configuration.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_ignore_collect(config):
    """All tests here are slow, and importing the libraries takes seconds: leave that out, too."""
    return True if config.option.markexpr == "not slow" else None
