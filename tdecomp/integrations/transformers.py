"""Lets `from_pretrained` of transformers load what tdecomp decomposed; import it before.

transformers asks the quantizer that is registered for a folder's `quantization_config` to change
the model on the meta device, before weights are read. What was loaded is no quantized model: it is
moved, converted, trained and saved as every other (`saving` says how). It needs transformers 5.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, __version__
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tdecomp.calibration.opening import opened_for
from tdecomp.checkpoint.checks import refuse_other_factors
from tdecomp.checkpoint.description import KEY, METHOD, plan_in, read_config
from tdecomp.checkpoint.folder import indexed_files, names_in, refuse_shards_beside
from tdecomp.checkpoint.pretrained import remember
from tdecomp.checkpoint.rebuild import empty_chains
from tdecomp.checkpoint.standing import renamed, without_whole
from tdecomp.files.index import INDEX_SUFFIX, NAMES
from tdecomp.files.whole_file import named_in_errors
from tdecomp.integrations.saving import teach_imported
from tdecomp.layers.chain import Chain, Described
from tdecomp.layers.lookup_chain import EmbeddingChain
from tdecomp.model.fused import with_parts
from tdecomp.model.opened.base import Opened, close_unchanged
from tdecomp.model.surgery import swap
from tdecomp.model.weights import spec_of
from tdecomp.plans.plan import Plan

if int(__version__.partition(".")[0]) < 5:
    raise ImportError(f"tdecomp.integrations.transformers: got transformers {__version__}, needs 5")
teach_imported()


@register_quantization_config(METHOD)
class ChainsConfig(QuantizationConfigMixin):
    """What `config.json` says of the chains."""

    def __init__(self, quant_method: str = METHOD, **described: Any) -> None:
        vars(self).update(described, quant_method=quant_method)


@register_quantizer(METHOD)
class ChainsQuantizer(HfQuantizer):
    """Puts the chains into a model before its weights are loaded."""

    def __init__(self, quantization_config: ChainsConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._plan = plan_in(quantization_config.to_dict())
        self._stand_ins: list[tuple[nn.Module, str]] = []

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        stored = None
        if checkpoint_files is not None:
            stored = _stored(model, [Path(file) for file in checkpoint_files])
        self._plan = put_chains(model, self._plan, stored)
        self._stand_ins = _put_stand_ins(model)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for chain in (module for module in model.modules() if isinstance(module, Chain)):
            chain.mirror_weight()
        for module, name in self._stand_ins:
            del vars(module)[name]
        # transformers would refuse to convert and to train it.
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        for marked in (m for m in model.modules() if isinstance(m, PreTrainedModel)):
            vars(marked.config).pop("_is_quantized", None)
        remember(model, self._plan)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def load_pretrained(folder: Path, model: Any) -> Any:
    """What a folder holds as a model of this one's class, on its device, in its training mode."""
    with named_in_errors(folder):
        plan = plan_in(read_config(folder).get(KEY))
    names = {name for row in plan for name in row.names}
    with opened_for(model, names=names):
        held = dict(model.named_modules(remove_duplicate=False))
        for row in (row for row in plan if row.method is not None):
            if row.name not in held:
                words = "the folder has it, the model has no such layer; expected a model of its"
                raise ValueError(f"{folder}: layer {row.name!r}: {words} architecture")
        _check_layers(plan, {r.name: held[r.name] for r in plan if r.method is not None})
    device = next(model.parameters()).device
    places = {} if device.type in ("meta", "cpu") else {"device_map": {"": device}}
    loaded = type(model).from_pretrained(folder, local_files_only=True, **places)
    _freeze_as(model, loaded)
    _take_buffers(model, loaded)
    return loaded.train(model.training)


def _take_buffers(model: nn.Module, loaded: nn.Module) -> None:
    """Fill the buffers that no folder has, in modules of which transformers knows no values.

    It makes all models without values, and has values for such buffers of its own classes alone.
    """
    for path, module in model.named_modules():
        names = module._non_persistent_buffers_set
        if not names or type(module).__module__.partition(".")[0] == "transformers":
            continue
        held = loaded.get_submodule(path)._buffers
        for name in names:
            old, new = module._buffers.get(name), held.get(name)
            if old is not None and new is not None and not old.is_meta and old.shape == new.shape:
                held[name] = old.to(new.device, new.dtype, copy=True)


def _freeze_as(model: nn.Module, loaded: nn.Module) -> None:
    """Let what the model does not train, be it a layer that is now a chain, not be trained."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    chains = {path: m for path, m in loaded.named_modules() if isinstance(m, Chain)}
    for name, parameter in loaded.named_parameters():
        path = next((path for path in chains if name.startswith(f"{path}.")), None)
        if path is not None:
            name = f"{path}.{'bias' if parameter is chains[path][-1].bias else 'weight'}"
        if name in frozen:
            parameter.requires_grad_(False)
    for chain in chains.values():
        chain.mirror_weight()


def put_chains(model: Any, plan: Plan, stored: Collection[str] | None = None) -> Plan:
    """Put chains without values into a model of transformers, in place, on the meta device, say.

    `stored` are the names of the tensors that are to be loaded: layers that are there whole are
    left alone, and a ValueError names factors that are not there. Returns the plan by the model's
    own names: a base model lacks a prefix that a model with a head has, and the head's layers.
    """
    _tie(model)
    prefix = _prefix(model)
    names = {name for row in plan for name in row.names}
    known = names | {name.removeprefix(prefix) for name in names} | {prefix + n for n in names}
    with opened_for(model, names=known):
        held = dict(model.named_modules(remove_duplicate=False))

        def new_name(name: str) -> str | None:
            found = (name, name.removeprefix(prefix), prefix + name)
            return next((n for n in found if n in held), None)

        found = renamed(plan, new_name)
        if any(row.method for row in plan) and not any(row.method for row in found):
            raise ValueError(
                f"{type(model).__name__} has none of the layers that were decomposed "
                f"({', '.join(r.name for r in plan if r.method)}); expected a model of the "
                "architecture that was saved"
            )
        mine = without_whole(found, stored or ())
        layers = {row.name: held[row.name] for row in mine if row.method is not None}
        _check_layers(mine, layers)
        swap(model, empty_chains(layers, mine))
        for table in (m for m in model.modules() if isinstance(m, EmbeddingChain)):
            table.describe_layer()  # while models compute tables that are then not used
    close_unchanged(model)
    _check_ties(model)
    if stored is not None:
        refuse_other_factors(model, stored)
    return mine


def _put_stand_ins(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Let parameters that moved into layers be found, by code that gives them first values.

    transformers runs that code after loading, and what stands in is taken for loaded, too.
    """
    put: list[tuple[nn.Module, str]] = []
    for module in (module for module in model.modules() if isinstance(module, Opened)):
        for name in [name for name, held in module._parameters.items() if held is None]:
            vars(module)[name] = Described.like(next(module.parameters()), ())
            put.append((module, name))
    return put


def _tie(model: Any) -> None:
    """Tie the weights that the model declares, which transformers does after loading only."""
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        path, _, part = target.rpartition(".")
        setattr(model.get_submodule(path), part, model.get_parameter(source))


def _check_layers(plan: Plan, layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers of another kind; sizes may differ, as after the vocabulary was resized."""
    for name, layer in layers.items():
        row = plan[name]
        spec, known = with_parts(spec_of(layer), row.names), row.layer
        kinds = [None if s is None else (s.ndim, s.lookup, s.bias) for s in (spec, known)]
        if None in kinds or kinds[0] != kinds[1]:
            raise ValueError(
                f"layer {name!r}: got {spec or type(layer).__name__}, but the plan expects "
                f"{known}; expected a model of the architecture that was saved"
            )


def _check_ties(model: Any) -> None:
    """Refuse a head that is tied to a table of which only the factors are there."""
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        for name in (target, source):
            try:
                model.get_parameter_or_buffer(name)
            except AttributeError as error:
                layers = " and ".join(n.rpartition(".")[0] for n in (target, source))
                raise ValueError(
                    f"{layers} have one weight in a {type(model).__name__}, and what was saved has "
                    "no chains that share their factors for them; expected a model of the class "
                    "that was saved, or config.tie_word_embeddings = False"
                ) from error


def _stored(model: Any, files: Sequence[Path]) -> set[str]:
    """The names of the tensors in files, also as those of a base model, or of one with a head."""
    index = files[0].parent / f"{NAMES[0]}{INDEX_SUFFIX}"
    if len(files) > 1 and index.is_file():
        names = {*indexed_files(index)}
    else:
        if len(files) == 1:
            refuse_shards_beside(files[0])
        names = {name for file in files for name in names_in(file)}
    prefix = _prefix(model)
    return names | {name.removeprefix(prefix) for name in names} | {prefix + name for name in names}


def _prefix(model: Any) -> str:
    """What the names in a model with a head have before those in its base model."""
    return f"{model.base_model_prefix}." if model.base_model_prefix else ""
