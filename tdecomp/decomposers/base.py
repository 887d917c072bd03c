"""The contract of a decomposer.

A method's file holds its maths at the top, on one dense kernel (out, in, *kernel): tensors in, a
frozen dataclass of factors out. Below it stands the class that says which layers the method takes
and which chain it makes. Groups, transposed layouts, dtypes and scales are dealt with here, once.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdecomp.decomposers.factors import Factorization, Factors
from tdecomp.layers.chain import Chain, Rank
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.second_moment import SecondMoment
from tdecomp.linalg.spectrum import Spectrum, spectra
from tdecomp.linalg.svd import frobenius_norm
from tdecomp.torch_state import undisturbed

# Of iterative fits that only say what a rank would lose.
DRAFT_ITERATIONS = 8


class Decomposer(ABC):
    """One method: which layers it takes, its ranks, its chain and how to fit it.

    A subclass is usually a frozen dataclass whose fields are the options of the fit. It has a
    `name`, a `source` (the paper), and defines the five abstract methods; where a rank has a
    meaning for the spectrum of some unfoldings of the kernel, `unfoldings` too.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    # Normal equations square a condition number: methods that solve them fit in float64.
    fits_in_float64: ClassVar[bool] = False

    @abstractmethod
    def refusal(self, spec: LayerSpec) -> str | None:
        """Why this method cannot take such a layer; None if it can."""

    @abstractmethod
    def max_rank(self, spec: LayerSpec) -> Rank:
        """The largest useful rank: per group, and a tuple for methods of several ranks."""

    @abstractmethod
    def stages(self, spec: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        """The layers of the chain, first to last; the last one has the bias."""

    @abstractmethod
    def fit(self, kernel: Tensor, rank: Rank) -> Factors:
        """Fit the factors to one group's kernel (out, in, *kernel), scaled to at most 1."""

    def fit_to(
        self, kernel: Tensor, rank: Rank, moment: SecondMoment, start: Factors | None = None
    ) -> Factors | None:
        """Fit one group's kernel in the norm of what it sees; None for methods that cannot.

        Both tensors are float64. `start` holds factors of this rank to improve on, such as a
        chain's own; by default those that `fit` finds. The result is never worse than the start.
        """
        del kernel, rank, moment, start
        return None

    def lost_at_every_rank(
        self, kernel: Tensor, moment: SecondMoment | None, importance: Tensor | None = None
    ) -> Tensor | None:
        """What the best fits of rank 0, 1, 2 … lose, for methods whose fits are nested; or None.

        ``tr(H D G Dᵀ)`` of the difference D, with G the moment and H the importance (out, out) of
        the outputs; without either, identities.
        """
        del kernel, moment, importance
        return None

    def contained_in(self, spec: LayerSpec) -> tuple[str, ...]:
        """The methods that on such a layer find all that this one can, at its rank or its least.

        No two may name each other.
        """
        del spec
        return ()

    def exact_at_parity(self, spec: LayerSpec) -> bool:
        """Whether next to nothing is lost once a chain has as many weights as the layer."""
        del spec
        return False

    def brief(self, iterations: int) -> "Decomposer":
        """Itself with no more iterations than this, for drafts and for starts that are good."""
        del iterations
        return self

    def factors_of(self, stage_weights: tuple[Tensor, ...]) -> Factors | None:
        """The factors whose `stage_weights` these are, or None for methods that cannot tell."""
        del stage_weights
        return None

    def unfoldings(self, kernel: Tensor) -> tuple[Tensor, ...] | None:
        """One matrix per rank whose singular values tell how much that rank keeps, or None."""
        del kernel
        return None

    # -- what every method has from here -----------------------------------------------------

    def check_rank(self, rank: Rank, spec: LayerSpec) -> None:
        """Raise a ValueError unless `rank` is one that this method can use on this layer."""
        largest = self.max_rank(spec)
        ranks, limits = _as_tuple(rank), _as_tuple(largest)
        if len(ranks) != len(limits) or isinstance(rank, tuple) != isinstance(largest, tuple):
            wanted = "one rank" if isinstance(largest, int) else f"{len(limits)} ranks"
            raise ValueError(f"{self.name} takes {wanted}, got {rank!r}")
        if any(isinstance(r, bool) or not isinstance(r, int) for r in ranks):
            raise ValueError(f"{self.name} takes whole ranks, got {rank!r}")
        if any(not 1 <= r <= limit for r, limit in zip(ranks, limits, strict=True)):
            raise ValueError(
                f"rank {rank} is not in the range of {self.name} on {spec}: expected at least 1 "
                f"and at most {largest}, its largest useful rank"
            )

    def factorize(
        self,
        weight: Tensor,
        spec: LayerSpec,
        rank: Rank,
        moments: Sequence[SecondMoment] | None = None,
        start: Factorization | None = None,
    ) -> Factorization:
        """Fit the factors to a layer's weight, given in the layer's own layout.

        With moments, one for each group, in the norm of what the layer sees, where the method can.
        Half precision is fitted in float32; the factors come back in the weight's dtype.
        """
        self.check_rank(rank, spec)
        with undisturbed(weight.device):
            if moments is not None:
                fitted = self._fit_to_moments(weight, spec, rank, moments, start)
                if fitted is not None:
                    return fitted.to(weight.dtype)
            kernels = self.group_kernels(weight.detach().to(self.fit_dtype(weight)), spec)
            groups = tuple(self._fit_scaled(kernel, rank) for kernel in kernels)
            return Factorization(spec, groups).to(weight.dtype)

    def _fit_to_moments(
        self,
        weight: Tensor,
        spec: LayerSpec,
        rank: Rank,
        moments: Sequence[SecondMoment],
        start: Factorization | None,
    ) -> Factorization | None:
        kernels = self.group_kernels(weight.detach().double(), spec)
        groups = []
        for group, (kernel, moment) in enumerate(zip(kernels, moments, strict=True)):
            scale = float(kernel.abs().max()) or 1.0
            before = None if start is None else start.groups[group].scaled(1 / scale)
            fitted = self.fit_to(kernel / scale, rank, moment, before)
            if fitted is None:
                return None
            groups.append(fitted.scaled(scale))
        return Factorization(spec, tuple(groups))

    @property
    def uses_moments(self) -> bool:
        """Whether `fit_to` is defined."""
        return type(self).fit_to is not Decomposer.fit_to

    def factorization_of(self, chain: nn.Sequential, spec: LayerSpec) -> Factorization | None:
        """The factors in float64 that a chain of this method holds, or None if it cannot tell."""
        rank = getattr(chain, "rank", None)
        if rank is None:
            return None
        stages = zip(self.stages(spec, rank), chain, strict=True)
        held = [stage.read(module) for stage, module in stages]
        if spec.groups == 1:
            groups = [self.factors_of(tuple(held))]
        else:
            per_stage = [weight.chunk(spec.groups) for weight in held]
            groups = [self.factors_of(weights) for weights in zip(*per_stage, strict=True)]
        known = tuple(factors for factors in groups if factors is not None)
        return Factorization(spec, known) if len(known) == spec.groups else None

    def spectra(self, weight: Tensor, spec: LayerSpec) -> tuple[Spectrum, ...] | None:
        """The spectrum behind each rank, or None if this method's rank has none."""
        with undisturbed(weight.device):
            per_group = [self.unfoldings(k) for k in self.group_kernels(weight.detach(), spec)]
            if per_group[0] is None:
                return None
            return tuple(spectra(list(zip(*per_group, strict=True))))

    def build(
        self,
        spec: LayerSpec,
        rank: Rank,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Chain:
        """The chain for a layer and a rank, with uninitialised weights."""
        layers = [stage.build(device, dtype) for stage in self.stages(spec, rank)]
        return Chain.from_stages(layers, self, rank, spec)

    def build_like(self, layer: nn.Module, spec: LayerSpec, rank: Rank) -> Chain:
        """`build`, with the layer's device, dtype, mode, and what of it requires gradients."""
        weight = _parameter(layer.weight)
        chain = self.build(spec, rank, weight.device, weight.dtype)
        chain.requires_grad_(weight.requires_grad)
        if isinstance(layer.bias, nn.Parameter):
            _parameter(chain[-1].bias).requires_grad_(layer.bias.requires_grad)
        return chain.train(layer.training)

    def assemble(
        self,
        layer: nn.Module,
        factorization: Factorization,
        rank: Rank,
        shift: Tensor | None = None,
    ) -> Chain:
        """The chain that holds the factors and the layer's bias, like the layer in all else.

        `shift` (out,) is added to the bias of a layer that has one.
        """
        spec, weight, bias = factorization.spec, _parameter(layer.weight), layer.bias
        with undisturbed(weight.device):
            chain = self.build_like(layer, spec, rank)
            for stage, part, values in zip(
                self.stages(spec, rank), chain, factorization.stage_weights(), strict=True
            ):
                stage.put(part, values)
            if isinstance(bias, nn.Parameter):
                _parameter(chain[-1].bias).copy_(bias if shift is None else bias + shift)
        for memory_format in (torch.channels_last, torch.channels_last_3d):
            if _has_format(weight, memory_format):
                chain.to(memory_format=memory_format)  # type: ignore[call-overload]
        return chain

    def fit_dtype(self, weight: Tensor) -> torch.dtype:
        """float64 for float64 layers and for methods that need it, float32 for all others."""
        wide = self.fits_in_float64 or weight.dtype == torch.float64
        return torch.float64 if wide else torch.float32

    def group_kernels(self, weight: Tensor, spec: LayerSpec) -> Sequence[Tensor]:
        """Each group's kernel (out / groups, in / groups, *kernel)."""
        return spec.to_forward_layout(weight).chunk(spec.groups)

    def _fit_scaled(self, kernel: Tensor, rank: Rank) -> Factors:
        # The squares inside a fit leave the range of float32 for entries of 1e-30 or 1e+30.
        scale = float(kernel.abs().max()) or 1.0
        return self.fit(kernel / scale, rank).scaled(scale)


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """‖W − W̃‖ / ‖W‖ in the Frobenius norm; 0 for a zero weight that is met exactly."""
    weight, approximation = weight.detach(), approximation.detach()
    if torch.float64 not in (weight.dtype, approximation.dtype):
        # A difference of float32 numbers is known to as many digits as they are.
        weight, approximation = weight.float(), approximation.float()
    return frobenius_norm(weight - approximation) / (frobenius_norm(weight) or 1.0)


def check_iteration(method: str, n_iter_max: int, tol: float) -> None:
    """Refuse options that no iteration can run with."""
    if isinstance(n_iter_max, bool) or not isinstance(n_iter_max, int) or n_iter_max < 1:
        raise ValueError(f"{method}: expected n_iter_max of at least 1, got {n_iter_max!r}")
    if not isinstance(tol, (int, float)) or not tol >= 0:
        raise ValueError(f"{method}: expected tol of 0 or more, got {tol!r}")


def _as_tuple(rank: Rank) -> tuple[int, ...]:
    return rank if isinstance(rank, tuple) else (rank,)


def _parameter(value: Any) -> nn.Parameter:
    assert isinstance(value, nn.Parameter)
    return value


def _has_format(weight: Tensor, memory_format: torch.memory_format) -> bool:
    # A kernel of size 1 is contiguous in every format; only an unambiguous answer counts.
    rank_of_format = {torch.channels_last: 4, torch.channels_last_3d: 5}
    if weight.dim() != rank_of_format[memory_format] or weight.is_contiguous():
        return False
    return weight.is_contiguous(memory_format=memory_format)
