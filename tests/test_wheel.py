"""The wheel works outside the checkout, without any extra installed."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Names that only extras install; importing one of them is made to fail.
SCRIPT = """
import sys
for name in ("matplotlib", "sklearn", "torchvision", "onnx", "nbformat", "benchmarks"):
    sys.modules[name] = None
import torch, tdecomp
from torch import nn
model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
inputs = torch.randn(2, 8, 8, 8)
result = tdecomp.decompose(
    model, ["tucker2", "svd"], rank=0.5, example_inputs=inputs, progress=False
)
assert result.model(inputs).shape == (2, 10)
print(tdecomp.__version__, tdecomp.__file__)
"""


def test_wheel_decomposes_outside_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    subprocess.run([*build, "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "tdecomp/py.typed" in archive.namelist()
        assert not any(name.startswith(("benchmarks", "tests")) for name in archive.namelist())
        archive.extractall(tmp_path / "site")
    # -S leaves out the site directory, where an editable install would answer for the wheel.
    packages = [p for p in sys.path if p.endswith("site-packages")]
    path = ":".join([str(tmp_path / "site"), *packages])
    ran = subprocess.run(
        [sys.executable, "-S", "-c", SCRIPT],
        cwd=tmp_path,
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert str(tmp_path / "site") in ran.stdout
