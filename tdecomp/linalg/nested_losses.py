"""What the best approximations of a kernel lose at every rank, each inside that of the next one.

They keep the leading principal components of the kernel's outputs (Zhang et al. 2016, "Accelerating
Very Deep Convolutional Networks for Classification and Detection", equations 4 to 6).
"""

import torch
from torch import Tensor

from tdecomp.linalg.column_space import in_column_spaces
from tdecomp.linalg.leading_outputs import outputs_moment
from tdecomp.linalg.second_moment import SecondMoment
from tdecomp.linalg.spectrum import tails, tails_of


def nested_losses(
    kernel: Tensor, moment: SecondMoment | None, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The losses of a kernel (out, in) at rank 0, 1, 2 …: ``tr(D G Dᵀ)``, and ``tr(H D G Dᵀ)``.

    D is the difference, G the moment (None counts as the identity), H the importance (out, out);
    the second ones are None without. A large kernel may be float32. No matrix is decomposed that is
    larger than the smaller side.
    """
    if moment is None and importance is None:
        return tails(kernel), None
    triangular = kernel.shape[0] > kernel.shape[1]
    (kernel,), importance = in_column_spaces([kernel], importance)
    outputs = outputs_moment(kernel, moment, triangular=triangular)
    del kernel
    if importance is None:
        return tails_of(torch.linalg.eigvalsh(outputs).flip(0)), None
    values, vectors = torch.linalg.eigh(outputs)
    del outputs
    values = values.flip(0).clamp_min(0.0)
    counts = ((importance @ vectors) * vectors).sum(dim=0).flip(0).clamp_min(0.0)
    return tails_of(values), tails_of(values * counts)
