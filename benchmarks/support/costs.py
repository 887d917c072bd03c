"""What a model costs: parameters and MACs."""

from torch import Tensor, nn, no_grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tdecomp.runtime.torch_state import no_fast_path


def count_params(model: nn.Module) -> int:
    """Every parameter once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, x: Tensor) -> int:
    """MACs of one forward pass in eval mode: half of torch's FLOPs, by kernels that it sees."""
    counter = FlopCounterMode(display=False)
    with no_grad(), no_fast_path(), sdpa_kernel(SDPBackend.MATH), counter:
        model(x)
    return int(counter.get_total_flops()) // 2
