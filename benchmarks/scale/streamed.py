"""A process that streams a checkpoint, or goes over it in a plain loop, to be watched by another.

It says when torch is imported, and begins when it is told to.

    python -m benchmarks.scale.streamed stream|loop SOURCE TARGET
"""

import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

SHARE = 0.6  # of each layer's parameters


def main() -> None:
    """Say that torch is there, wait for a line, and work."""
    how, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    print("ready", flush=True)
    sys.stdin.readline()
    if how == "stream":
        import tdecomp

        rank = tdecomp.Ratio(SHARE, of="params")
        print(tdecomp.stream(source, target, "svd", rank=rank, progress=False).summary())
    else:
        plain_loop(source, target)


def plain_loop(source: Path, target: Path) -> None:
    """The SVD of each matrix in float32, cut to the rank and written, file by file."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.safetensors")):
        written = {}
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                if tensor.dim() < 2:
                    written[name] = tensor
                    continue
                u, s, vh = torch.linalg.svd(tensor.float(), full_matrices=False)
                out, into = tensor.shape
                rank = max(1, int(SHARE * out * into / (out + into)))
                root = s[:rank].sqrt()
                first, second = root[:, None] * vh[:rank], u[:, :rank] * root
                written[f"{name}.0"] = first.to(tensor.dtype).contiguous()
                written[f"{name}.1"] = second.to(tensor.dtype).contiguous()
        save_file(written, target / path.name, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
