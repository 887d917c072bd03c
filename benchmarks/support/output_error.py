"""What the outputs of a whole model lose: old and new on the same inputs."""

from torch import Tensor


def lost_share(outputs: Tensor, others: Tensor) -> float:
    """The share of the variance of outputs (n, ...) that others in their place lose."""
    about_mean = outputs - outputs.mean(dim=0)
    return float((outputs - others).square().sum() / about_mean.square().sum())
