"""Lets `from_pretrained` of diffusers load what tdecomp decomposed; import it before.

As `tdecomp.integrations.transformers` does; pipelines load their parts by it. It needs accelerate,
as all of diffusers' quantizers do.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from tdecomp.calibration.opening import opened_for
from tdecomp.checkpoint.checks import refuse_other_factors
from tdecomp.checkpoint.description import METHOD, plan_in
from tdecomp.checkpoint.pretrained import remember
from tdecomp.checkpoint.rebuild import empty_chains
from tdecomp.checkpoint.standing import decomposed_part, without_whole
from tdecomp.integrations.saving import teach_imported
from tdecomp.layers.chain import Chain
from tdecomp.model.opened.base import close_unchanged
from tdecomp.model.sites import find_sites
from tdecomp.model.surgery import swap
from tdecomp.plans.plan import match_sites


class _Method(StrEnum):  # whose `value` diffusers reads
    TDECOMP = METHOD


class ChainsConfig(QuantizationConfigMixin):
    """What `config.json` says of the chains."""

    def __init__(self, quant_method: str = METHOD, **described: Any) -> None:
        vars(self).update(described, quant_method=_Method(quant_method))

    def to_diff_dict(self) -> dict[str, Any]:
        described: dict[str, Any] = self.to_dict()
        return described


class ChainsQuantizer(DiffusersQuantizer):
    """Puts the chains into a model before its weights are loaded."""

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: ChainsConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        described = quantization_config.to_dict()
        self._plan = plan_in({**described, "quant_method": METHOD})
        self._stored: set[str] = set()

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: Sequence[str]
    ) -> list[str]:
        del checkpoint_files
        self._stored = {*loaded_keys}
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        plan = without_whole(self._plan, self._stored)
        wanted = {row.name for row in plan if row.method is not None}
        with opened_for(model, names={name for row in plan for name in row.names}):
            sites = {name: site for name, site in find_sites(model).items() if name in wanted}
            matched = match_sites(sites, decomposed_part(plan))
            layers = {name: site.module for name, site in matched.items()}
            swap(model, empty_chains(layers, plan))
        close_unchanged(model)
        refuse_other_factors(model, self._stored)
        self._plan = plan

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for chain in (module for module in model.modules() if isinstance(module, Chain)):
            chain.mirror_weight()
        # diffusers would refuse to convert it.
        model.is_quantized = False
        del model.quantization_method
        remember(model, self._plan)
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


# Where diffusers looks for them; it has no function that registers.
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = ChainsConfig
AUTO_QUANTIZER_MAPPING[METHOD] = ChainsQuantizer
teach_imported()
