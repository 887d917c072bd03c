"""A truncated SVD for each part of a Linear that is several in one, such as `qkv`.

Denton et al. 2014, "Exploiting Linear Structure Within Convolutional Networks", section 3.2.1, for
each part.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.factors import Factors
from tdecomp.decomposers.svd import SVD, LowRankFactors
from tdecomp.layers.chain import Rank
from tdecomp.layers.spec import LayerSpec
from tdecomp.layers.split_linear import SplitStage
from tdecomp.layers.stage import Stage
from tdecomp.linalg.best_ranks import BestRanks, best_ranks
from tdecomp.linalg.second_moment import SecondMoment

_PART = SVD()


@dataclass(frozen=True)
class SplitSVD(Decomposer):
    """A fused Linear becomes one to all ranks together, then a block-diagonal one to its parts.

    >>> qkv = LayerSpec(64, 192, parts=(64, 64, 64))
    >>> print(*SplitSVD().stages(qkv, (8, 8, 24)))
    Linear(64→40, no bias) SplitLinear(8→64, 8→64, 24→64)

    Each part has its own rank and is cut by its own SVD, or to its own leading outputs on data. A
    budget takes the ranks that lose least together.

    Denton et al. 2014, "Exploiting Linear Structure Within Convolutional Networks for Efficient
    Evaluation", section 3.2.1, for each part.

    Parameters
    ----------
    parts : int or tuple of int, optional
        How many parts of equal size the outputs are, or the size of each. By default layers with
        the names under which libraries fuse them are taken, such as ``qkv``, ``c_attn``,
        ``qkv_proj`` or ``gate_up_proj``.

    Raises
    ------
    ValueError
        If there are fewer than two parts, or one without outputs.
    """

    name = "split-svd"
    int_rank_caps = True
    source = "Denton et al. 2014, for each part"

    parts: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        sizes = self.parts if isinstance(self.parts, tuple) else (1,) * 2
        count = len(sizes) if isinstance(self.parts, tuple) else self.parts
        whole = all(type(size) is int and size >= 1 for size in sizes)
        if count is not None and not (type(count) is int and count >= 2 and whole):
            raise ValueError(
                "split-svd: expected parts to be a number of at least 2, or a tuple of two or more "
                f"sizes of at least 1, got {self.parts!r}"
            )

    def sizes(self, spec: LayerSpec) -> tuple[int, ...]:
        """The outputs of each part of a layer, or () for a layer that has none."""
        out, parts = spec.out_channels, self.parts
        if spec.ndim or spec.groups > 1:
            return ()
        if parts is None:
            return spec.parts if len(spec.parts) > 1 else ()
        if isinstance(parts, int):
            return (out // parts,) * parts if out and out % parts == 0 else ()
        return parts if sum(parts) == out else ()

    def refusal(self, spec: LayerSpec) -> str | None:
        if self.sizes(spec):
            return None
        if spec.groups > 1 and not spec.ndim:
            return "split-svd takes no experts; svd does"
        if self.parts is None:
            return "split-svd takes Linear layers that are several in one, such as qkv"
        wanted = f"a multiple of {self.parts}" if isinstance(self.parts, int) else sum(self.parts)
        return f"split-svd with parts={self.parts} takes Linear layers whose outputs are {wanted}"

    def max_rank(self, spec: LayerSpec) -> tuple[int, ...]:
        return tuple(min(spec.in_channels, size) for size in self.sizes(spec))

    def stages(self, spec: LayerSpec, rank: Rank) -> tuple[Stage, ...]:
        assert isinstance(rank, tuple)
        first = spec.like(out_channels=sum(rank), bias=False)
        return first, SplitStage(rank, self.sizes(spec), spec.bias)

    def for_layer(self, spec: LayerSpec) -> "SplitSVD":
        return replace(self, parts=self.sizes(spec))

    def fit(
        self, kernel: Tensor, rank: Rank, start: Factors | None = None, *, draft: bool = False
    ) -> LowRankFactors:
        del start, draft  # the closed form needs neither
        assert isinstance(rank, tuple)
        parts = zip(self._split(kernel), rank, strict=True)
        return _joined([_PART.fit(part, r) for part, r in parts])

    def fit_to(
        self,
        kernel: Tensor,
        rank: Rank,
        moment: SecondMoment,
        start: Factors | None = None,
        *,
        draft: bool = False,
    ) -> LowRankFactors:
        del start, draft
        assert isinstance(rank, tuple)
        parts = zip(self._split(kernel), rank, strict=True)
        return _joined([_PART.fit_to(part, r, moment) for part, r in parts])

    def best_ranks(
        self,
        kernel: Tensor,
        moment: SecondMoment | None,
        importance: Tensor | None,
        steps: Sequence[int],
    ) -> BestRanks:
        return best_ranks(self._split(kernel), moment, importance, steps)

    def output_blocks(self, spec: LayerSpec) -> tuple[int, ...]:
        return self.sizes(spec)

    def factors_of(self, stage_weights: tuple[Tensor, ...]) -> LowRankFactors:
        return _PART.factors_of(stage_weights)

    def unfoldings(self, kernel: Tensor) -> tuple[Tensor, ...]:
        return self._split(kernel)

    def _split(self, kernel: Tensor) -> tuple[Tensor, ...]:
        assert isinstance(self.parts, tuple), "for_layer says what the parts of a kernel are"
        parts: tuple[Tensor, ...] = kernel.split([*self.parts])
        return parts


def _joined(parts: Sequence[LowRankFactors]) -> LowRankFactors:
    """The factors of all parts, below one another: the second factor is block-diagonal."""
    seconds = (part.second for part in parts)
    second = torch.block_diag(*seconds)
    return LowRankFactors(torch.cat([part.first for part in parts]), second)
