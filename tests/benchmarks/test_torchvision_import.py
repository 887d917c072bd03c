import subprocess
import sys

import torch

from benchmarks.support.torchvision_import import import_torchvision


def test_torchvision_imports_and_stays_the_same():
    torchvision = import_torchvision()
    assert torchvision is import_torchvision()
    assert "vgg16" in torchvision.models.list_models()


def test_the_operators_are_known_afterwards():
    import_torchvision()
    assert hasattr(torch.ops.torchvision, "nms")
    assert hasattr(torch.ops.torchvision, "qnms")


def test_it_works_in_a_fresh_interpreter_without_warnings():
    script = (
        "from benchmarks.support.torchvision_import import import_torchvision as get;"
        "print(get().models.resnet18(num_classes=3).fc.out_features)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["3"]
