"""Composer's two factorized layers, and whether a layer is worth factorizing."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from tdecomp.composer.core import LowRankSolution, factorize_conv2d, factorize_rows, resolve_size
from tdecomp.composer.factorized import Factorized, max_latent
from tdecomp.decomposers.lowrank import LowRank
from tdecomp.decomposers.svd import SVD
from tdecomp.layers.spec import LayerSpec


def factorizing_could_speedup(module: nn.Module, latent_size: int | float) -> bool:
    """Whether two layers would take fewer MACs than `module`, which is not always less time.

    >>> factorizing_could_speedup(nn.Linear(64, 64), 31), factorizing_could_speedup(nn.ReLU(), 1)
    (True, False)

    Parameters
    ----------
    module : nn.Module
        A Conv2d without groups, a Linear, or a factorized one, on which any smaller inner size
        saves MACs; False for others.
    latent_size : int or float
        Channels or features between the two, as for `FactorizedLinear`.

    Raises
    ------
    TypeError, ValueError
        If `latent_size` is neither a whole number nor a fraction.
    """
    if isinstance(module, Factorized):
        return module.should_factorize(latent_size)
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        return False
    spec = LayerSpec.of(module)
    sizes = (spec.in_channels, spec.out_channels)
    return spec.groups == 1 and resolve_size("latent_size", latent_size, *sizes) <= max_latent(spec)


class FactorizedLinear(Factorized):
    """A Linear as two: in_features→latent_features without a bias, →out_features with it.

    >>> layer = FactorizedLinear.from_linear(nn.Linear(64, 32), latent_features=8)
    >>> layer.module0, layer(torch.randn(5, 64)).shape
    (Linear(in_features=64, out_features=8, bias=False), torch.Size([5, 32]))

    The constructor gives random weights, to be trained; `from_linear` keeps trained ones.

    Parameters
    ----------
    in_features, out_features, bias, device, dtype
        As for `nn.Linear`.
    latent_features : int or float
        Below 1 a fraction of the smaller of inputs and outputs, at least 1.

    Raises
    ------
    ValueError
        If `latent_features` saves no MACs: if above `max_allowed_latent_features`.
    """

    _layer, _arguments = nn.Linear, ("in_features", "out_features")
    _unit, _method = "features", SVD()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        latent_features: int | float = 0.25,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spec = LayerSpec(in_features, out_features, bias=bias)
        super().__init__(spec, latent_features, device=device, dtype=dtype)

    in_features = property(lambda self: self.in_size, doc="The size of an input vector.")
    out_features = property(lambda self: self.out_size, doc="The size of an output vector.")
    latent_features = property(lambda self: self.latent_size, doc="The size between the two.")

    @staticmethod
    def max_allowed_latent_features(in_features: int, out_features: int) -> int:
        """The largest latent size that saves MACs; 0 if none does.

        >>> FactorizedLinear.max_allowed_latent_features(64, 64)
        31
        """
        return max_latent(LayerSpec(in_features, out_features))

    # Under this name in Composer's code, under the other in its documentation.
    max_allowed_latent_channels = max_allowed_latent_features

    @classmethod
    def from_linear(
        cls,
        module: nn.Linear,
        module_ix: int = -1,
        *,
        latent_features: int | float = 0.25,
        keep_weights: bool = True,
    ) -> Self:
        """Two layers in place of a Linear, which is not changed, with its device, dtype and mode.

        >>> FactorizedLinear.from_linear(nn.Linear(64, 32), latent_features=4).latent_features
        4

        Parameters
        ----------
        module_ix : int
            Not used; Composer has it.
        latent_features : int or float
            As for the constructor.
        keep_weights : bool
            True for the nearest weights of that rank (truncated SVD); False for random ones.

        Raises
        ------
        TypeError, ValueError
            If `module` is not a Linear, or `latent_features` saves no MACs.
        """
        del module_ix
        return cls.of(module, latent_features, keep_weights)

    def solution_for_rank(self, input: Tensor, rank: int) -> LowRankSolution:  # noqa: A002
        rows = torch.atleast_2d(input).flatten(0, -2)
        wanted = resolve_size("rank", rank, self.in_size, self.out_size)
        wa, wb = self.module0.weight.T, self.module1.weight.T
        return factorize_rows(rows, None, wa, wb, self.module1.bias, wanted)


class FactorizedConv2d(Factorized):
    """A Conv2d as two: K×K to latent_channels without a bias, then 1×1 to out_channels with it.

    >>> conv = nn.Conv2d(32, 64, 3, stride=2, padding=1)
    >>> layer = FactorizedConv2d.from_conv2d(conv, latent_channels=16)
    >>> layer.module1, layer(torch.randn(1, 32, 8, 8)).shape
    (Conv2d(16, 64, kernel_size=(1, 1), stride=(1, 1)), torch.Size([1, 64, 4, 4]))

    The constructor gives random weights, to be trained; `from_conv2d` keeps trained ones.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, **conv2d_kwargs
        As for `nn.Conv2d`: `bias` is the second layer's, the geometry the first one's.
    latent_channels : int or float
        As for `FactorizedLinear`, with the same error.

    Raises
    ------
    NotImplementedError
        If there are several groups.
    """

    _geometry = ("stride", "padding", "dilation", "groups", "padding_mode")
    _layer, _arguments = nn.Conv2d, ("in_channels", "out_channels", "kernel_size", *_geometry)
    _unit, _method = "channels", LowRank()

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        latent_channels: int | float = 0.25,
        **conv2d_kwargs: Any,
    ) -> None:
        placed = {name: conv2d_kwargs.pop(name, None) for name in ("device", "dtype")}
        # torch checks the arguments and normalises them.
        whole = nn.Conv2d(in_channels, out_channels, kernel_size, device="meta", **conv2d_kwargs)
        super().__init__(LayerSpec.of(whole), latent_channels, **placed)

    in_channels = property(lambda self: self.in_size, doc="The channels of an input map.")
    out_channels = property(lambda self: self.out_size, doc="The channels of an output map.")
    latent_channels = property(lambda self: self.latent_size, doc="The channels between the two.")
    kernel_size = property(lambda self: self.replaced.kernel_size, doc="Of the first layer.")

    @staticmethod
    def max_allowed_latent_channels(
        in_channels: int, out_channels: int, kernel_size: int | tuple[int, int]
    ) -> int:
        """The largest latent size that saves MACs; 0 if none does.

        >>> FactorizedConv2d.max_allowed_latent_channels(64, 64, 3)
        57
        """
        sizes = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        rest = ((1, 1), (0, 0), (1, 1), (0, 0))  # stride, padding, dilation, output_padding
        return max_latent(LayerSpec(in_channels, out_channels, tuple(sizes), *rest))

    max_allowed_latent_features = max_allowed_latent_channels

    @classmethod
    def from_conv2d(
        cls,
        module: nn.Conv2d,
        module_ix: int = -1,
        *,
        latent_channels: int | float = 0.25,
        keep_weights: bool = True,
    ) -> Self:
        """Two layers in place of a Conv2d; all else is as for `FactorizedLinear.from_linear`.

        >>> FactorizedConv2d.from_conv2d(nn.Conv2d(32, 32, 3)).latent_channels
        8
        """
        del module_ix
        return cls.of(module, latent_channels, keep_weights)

    def solution_for_rank(self, input: Tensor, rank: int) -> LowRankSolution:  # noqa: A002
        wa, wb, bias = self.module0.weight, self.module1.weight, self.module1.bias
        geometry = {name: getattr(self.module0, name) for name in self._geometry}
        return factorize_conv2d(input, wa, wb, rank, biasB=bias, **geometry)
