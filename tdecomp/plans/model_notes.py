"""What a table says of the model: what had better be done to it before it is decomposed."""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdecomp.plans.row import Row

# What blocks with several branches in training call the merging of these (RepVGG, MobileOne, …).
_MERGES = ("reparameterize", "switch_to_deploy")


def model_notes(model: nn.Module, rows: Iterable[Row]) -> tuple[str, ...]:
    """For the rows of a plan or of a report.

    A block whose branches are not merged yet has batch norms in it, which merging takes away. Each
    branch would get a chain of its own, at the cost that one chain for all of them has.
    """
    changed = [row.name for row in rows if row.method is not None]
    blocks: dict[str, str] = {}
    for name, module in model.named_modules():
        merge = next((m for m in _MERGES if callable(getattr(module, m, None))), None)
        norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
        if merge is None or not norms or any(norm.training for norm in norms):
            continue
        if any(name and row.startswith(f"{name}.") for row in changed):
            timm = type(module).__module__.startswith("timm.")
            blocks[name] = "timm.utils.reparameterize_model(model)" if timm else f"their {merge}()"
    if not blocks:
        return ()
    first, how = next(iter(blocks.items()))
    return (
        f"hint: {len(blocks)} {'block has' if len(blocks) == 1 else 'blocks have'} branches that "
        f"merge into one layer exactly ({first!r}): merge them before decomposing, {how}",
    )
