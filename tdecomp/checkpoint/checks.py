"""What is refused, since it could not be loaded again, or is not there to be loaded."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.checkpoint.description import CONFIG
from tdecomp.layers.chain import Chain
from tdecomp.layers.lookup_chain import EmbeddingChain, HeadChain
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.weights import refuse_lazy
from tdecomp.plans.plan import Plan


def refuse_changed(model: nn.Module, plan: Plan, *, resized: bool = False) -> None:
    """Raise a ValueError, with the remedy, unless the chains are those of the plan.

    `resized` allows other sizes, where what loads the model knows them.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for row in plan:
        chain = modules.get(row.name)
        if not isinstance(chain, Chain):
            continue
        if chain.replaced != row.layer:
            raise ValueError(
                f"layer {row.name!r} stands for {chain.replaced}, in the plan for {row.layer}, as "
                "after fuse_batchnorm; a file is loaded into the architecture that was decomposed: "
                "save first, and fuse what tdecomp.load returns"
            )
        refuse_other_sizes(row.name, chain, resized=resized)
        if (chain.method, chain.rank) != (row.method, row.rank):
            raise ValueError(
                f"layer {row.name!r} is decomposed by {chain.method} at rank {chain.rank}, in the "
                f"plan by {row.method} at rank {row.rank}; expected the plan of the model as it is"
            )
    for name, module in modules.items():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            raise ValueError(
                f"{name!r} holds an adapter, which the model would be loaded without: merge it "
                "first (merge_and_unload), or save the adapter by itself"
            )
    refuse_lazy(model, "save")


def refuse_other_sizes(
    name: str, chain: Chain, *, resized: bool = False, state: Mapping[str, Any] | None = None
) -> None:
    """Raise a ValueError, with the remedy, unless the factors have the sizes of the chain's rank.

    `resized` allows another vocabulary, where what loads the model knows its size. `state` has what
    is saved in place of the parameters, by their names in the model.
    """
    spec = _with_rows_of(chain) if resized else chain.replaced
    made = [s.build(torch.device("meta")) for s in chain.decomposer.stages(spec, chain.rank)]
    wrong = [f"{len(chain)} stages, expected {len(made)}"] if len(chain) != len(made) else []
    for at, (stage, new) in enumerate(zip(chain, made, strict=False)):
        expected = {part: tuple(p.shape) for part, p in new.named_parameters()}
        for part, size in ({"bias": None} | expected).items():
            known = (state or {}).get(f"{name}.{at}.{part}")
            got = _size(stage, part) if known is None else tuple(known.shape)
            if got != size:
                wrong.append(f"{at}.{part} is {got or 'not there'}, expected {size or 'none'}")
    if wrong:
        raise ValueError(
            f"layer {name!r}: its stages have other sizes than those of {spec} by {chain.method} "
            f"at rank {chain.rank}: {'; '.join(wrong)}. They could not be loaded: save first, and "
            "resize a vocabulary (resize_token_embeddings) or quantize after loading; lower ranks "
            "by tdecomp.reduce_ranks; of stages that were exchanged put chain.to_layer() in the "
            "chain's place"
        )


def _with_rows_of(chain: Chain) -> LayerSpec | None:
    """The layer that it stands for, with as many words as its table has by now."""
    spec = chain.replaced
    if spec is not None and isinstance(chain, EmbeddingChain):
        return replace(spec, in_channels=chain.num_embeddings)
    if spec is not None and isinstance(chain, HeadChain):
        return replace(spec, out_channels=len(chain.weight))
    return spec


def _size(stage: nn.Module, part: str) -> tuple[int, ...] | None:
    """That of a parameter, or of what stands for it, as adapters and masks have it."""
    try:
        found = attrgetter(part)(stage)
    except AttributeError:
        return None
    return tuple(found.shape) if isinstance(found, Tensor) else None


def refuse_other_factors(model: nn.Module, stored: Collection[str]) -> None:
    """Raise a ValueError if a weight would stay random, since chains and what is stored differ.

    The names that are stored may be those of a larger model that has this one in it.
    """
    layers = [path for path, m in model.named_modules() if m._parameters.get("weight") is not None]
    if beside := [
        path for path in layers if f"{path}.weight" not in stored and f"{path}.0.weight" in stored
    ]:
        raise ValueError(
            f"{CONFIG} says nothing of chains in the place of these layers, and only factors are "
            f"stored for them: {', '.join(beside)}; as where a process that did nothing else with "
            "tdecomp saved a model into which chains were put: save what has them after import "
            "tdecomp.integrations.transformers (or diffusers)"
        )
    parts = (name.split(".") for name in stored)
    ends = {".".join(part[at:]) for part in parts for at in range(len(part))}
    held = dict(model.named_parameters(remove_duplicate=False))
    found = {id(parameter) for name, parameter in held.items() if name in ends}
    chains = [f"{path}." for path, m in model.named_modules() if isinstance(m, Chain)]
    lost = [n for n, p in held.items() if id(p) not in found and n.startswith(tuple(chains))]
    if lost:
        raise ValueError(
            f"{CONFIG} says that these are factors of chains, and no file of weights has them: "
            f"{', '.join(lost)}; expected what tdecomp saved (adapters merged, no layer replaced)"
        )
