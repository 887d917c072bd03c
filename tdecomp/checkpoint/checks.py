"""What is refused, since it could not be loaded again, or is not there to be loaded."""

from collections.abc import Collection

import torch
from torch import nn

from tdecomp.checkpoint.description import CONFIG
from tdecomp.layers.chain import Chain
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
        if not resized and _is_resized(chain):
            raise ValueError(
                f"layer {row.name!r}: its stages have other sizes than those of {row.layer}, as "
                "after resize_token_embeddings; save first, and resize what tdecomp.load returns"
            )
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
            f"stored for them: {', '.join(beside)}; as where layers were added or exchanged after "
            "decomposing: save what has them by tdecomp.Decomposition(model, report, plan)"
            ".save_pretrained(folder), with the report and the plan of the result"
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


def _is_resized(chain: Chain) -> bool:
    """Whether a parameter of it has another shape than its method gives it."""
    stages = chain.decomposer.stages(chain.replaced, chain.rank)
    built = [p for stage in stages for p in stage.build(torch.device("meta")).parameters()]
    shapes = [[p.shape for p in parameters] for parameters in (built, chain.parameters())]
    # Of what was quantized some are no parameters any more: that is refused in other words.
    return len(shapes[0]) == len(shapes[1]) and shapes[0] != shapes[1]
