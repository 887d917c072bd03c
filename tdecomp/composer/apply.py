"""Factorized layers in place of a model's wide ones."""

import warnings
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from tdecomp.composer.core import resolve_size
from tdecomp.composer.factorized import Factorized
from tdecomp.composer.modules import FactorizedConv2d, FactorizedLinear, factorizing_could_speedup
from tdecomp.model.filters import Filters, at_least
from tdecomp.model.optimizers import as_optimizers, unoptimized
from tdecomp.model.sites import check_weight, find_sites
from tdecomp.model.surgery import swap
from tdecomp.runtime.torch_state import restoring


def apply_factorization(
    model: nn.Module,
    factorize_convs: bool = True,
    factorize_linears: bool = True,
    min_channels: int = 512,
    latent_channels: int | float = 0.25,
    min_features: int = 512,
    latent_features: int | float = 0.25,
    optimizers: Optimizer | Sequence[Optimizer] | None = None,
) -> nn.Module:
    """Replace a model's wide layers by factorized ones that keep what they have learned.

    >>> model = nn.Sequential(nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10))
    >>> apply_factorization(model)[0].latent_features
    128

    Without data the weights are approximated; ``set_rank(input, rank)`` of each new layer reduces
    it further on data. Layers whose weights are read outside their own `forward` (such as those of
    an `nn.MultiheadAttention`), tied, or hooked stay as they are: `tdecomp.plan` gives the reasons.

    Parameters
    ----------
    model : nn.Module
        Changed in place; on an error not at all.
    factorize_convs, factorize_linears : bool
        Whether to replace the `nn.Conv2d` without groups, and the `nn.Linear`, that are wide
        enough and would take fewer MACs.
    min_channels, min_features : int
        Layers with fewer inputs or outputs stay as they are.
    latent_channels, latent_features : int or float
        The inner sizes; a value below 1 is a fraction of the smaller of inputs and outputs.
    optimizers : Optimizer or sequence of them, optional
        New parameters take the places of old ones in their groups. A warning names replaced
        parameters that no optimizer has.

    Returns
    -------
    nn.Module
        `model`, or the new layer if the model is itself the layer to be replaced.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, the model is wrapped, or a weight is not finite.
    """
    listed = as_optimizers(optimizers)
    resolve_size("latent_channels", latent_channels, 1)
    resolve_size("latent_features", latent_features, 1)
    plain = (nn.Conv2d, nn.Linear)
    if isinstance(model, nn.Module) and not any(isinstance(m, plain) for m in model.modules()):
        return model  # `find_sites` would refuse it
    kinds: dict[type, tuple[type[Factorized], int | float]] = {}
    if factorize_convs:
        kinds[nn.Conv2d] = FactorizedConv2d, latent_channels
    if factorize_linears:
        kinds[nn.Linear] = FactorizedLinear, latent_features
    replacements: dict[nn.Module, Factorized] = {}
    wide = Filters(where=at_least(min_channels, min_features))
    with restoring(model):
        sites = find_sites(model, wide)
        # Whose weights torch's fused kernel reads.
        encoders = (m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer))
        fused = {layer for m in encoders for layer in (m.linear1, m.linear2)}
        for site in sites.values():
            kind, size = kinds.get(type(site.module), (None, 1))
            alone = site.reason is None and not site.tied and site.module not in fused
            if kind and alone and factorizing_could_speedup(site.module, size):
                check_weight(site)
                replacements[site.module] = kind.of(site.module, size)
        # Before anything is changed: the caller may have made warnings errors.
        if missing := ", ".join(unoptimized(model, replacements, listed)):
            warnings.warn(f"no optimizer had these replaced parameters: {missing}", stacklevel=2)
        # In a holder even the model itself can be replaced.
        holder = nn.ModuleList([model])
        swap(holder, replacements, listed)
        return holder[0]
