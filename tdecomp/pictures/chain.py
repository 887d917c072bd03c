"""What a drawing shows of a layer and of the chain that a method puts in its place."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.registry import get_decomposer
from tdecomp.layers.chain import Chain, Rank
from tdecomp.layers.cost import chain_cost, count_in_words
from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerSpec
from tdecomp.layers.stage import Stage
from tdecomp.pictures.drawing import Box, Drawing, Strip, drawn
from tdecomp.ranks.base import checked_rank


def draw(
    layer: nn.Module | LayerSpec,
    method: str | Decomposer | None = None,
    rank: Any = None,
    *,
    size: Sequence[int] | None = None,
) -> Drawing:
    """Draw a layer above the chain that a method puts in its place.

    >>> drawing = draw(nn.Conv2d(64, 128, 3), "tucker2", (16, 32), size=(14, 14))
    >>> drawing
    <Drawing: Conv2d(64→128, 3×3) and its chain by tucker2, rank (16, 32)>
    >>> drawing.save("tucker2.svg")        # doctest: +SKIP

    Boxes have the kernel, the channels, the cost; a bar below is as long as the cost. Ranks are
    light on dark.

    Parameters
    ----------
    layer : nn.Module or LayerSpec
        A Linear, a convolution, or what `decompose` put in its place, which needs nothing else.
    method : str or Decomposer
        Needed for a layer that is not decomposed yet.
    rank : int or tuple of int
        One int means it for each rank of the method.
    size : sequence of int, optional
        The input's spatial size, such as (14, 14), on which MACs are counted for one image. Without
        it, parameters are shown alone.

    Returns
    -------
    Drawing
        Its `str` is the SVG; `save(file)` writes it, notebooks show it.

    Raises
    ------
    TypeError, ValueError
        If this is no layer, the method cannot take it, or not at that rank.
    """
    if isinstance(layer, Chain) and layer.replaced is not None:
        spec, method, rank = layer.replaced, layer.decomposer or layer.method, layer.rank
    else:
        spec = layer if isinstance(layer, LayerSpec) else LayerSpec.of(layer)
    if method is None or rank is None:
        raise ValueError(f"draw: expected a method and a rank for {spec}, got {method!r}, {rank!r}")
    known = spec.ndim == 0 or size is not None
    call = Call(1, tuple(size) if isinstance(size, Sequence) else ())
    fits = spec.takes(call) and 0 not in spec.output_size(call.size)
    if size is not None and not (isinstance(size, Sequence) and fits):
        wanted = f"{spec.ndim} sizes large enough for its kernel" if spec.ndim else "none"
        raise ValueError(f"draw: {spec} takes no input of size {size!r}; expected {wanted}")
    decomposer = get_decomposer(method)
    chosen = checked_rank("draw", decomposer, spec, rank)
    return drawn_chain(spec, (call,) if known else None, decomposer, chosen)


def drawn_chain(
    spec: LayerSpec,
    calls: Sequence[Call] | None,
    method: Decomposer,
    rank: Rank,
    name: str = "",
) -> Drawing:
    """The drawing of one layer, with the costs of these calls."""
    if spec.lookup:  # which has no MACs to compare with
        calls = None
    whole = chain_cost((spec,), calls)
    stages = method.stages(spec, rank)
    cost = chain_cost(stages, calls)
    unit = whole.unit
    ratio = cost.amount / (whole.amount or 1)
    above = Strip(
        f"{name}: {spec}" if name else str(spec),
        tuple(_boxes((spec,), calls)),
        (spec.in_channels, spec.out_channels),
        (None, None),
        f"{count_in_words(whole.amount)} {unit}",
    )
    between = [stage.in_channels for stage in stages[1:]]
    below = Strip(
        f"{method.name}, rank {rank}",
        tuple(_boxes(stages, calls)),
        (spec.in_channels, *between, spec.out_channels),
        (None, *_ranks(rank, between, spec.groups), None),
        f"{count_in_words(cost.amount)} {unit} ({ratio:.3f})",
    )
    title = f"{above.caption} and its chain by {below.caption}"
    told = ", then ".join(" ".join(box.lines) for box in below.boxes)
    return drawn(title, [above, below], f"The layer: {above.total}. The chain: {told}; together "
                 f"{below.total} of the layer's.")  # fmt: skip


def _boxes(stages: Sequence[Stage], calls: Sequence[Call] | None) -> list[Box]:
    boxes = []
    for i, stage in enumerate(stages):
        before = stages[:i]
        cost = chain_cost(stages[: i + 1], calls) - chain_cost(before, calls)
        lines = _words(stage)
        if cost.macs:
            lines.append(f"{count_in_words(cost.macs)} MACs")
        lines.append(f"{count_in_words(cost.params)} parameters")
        boxes.append(Box(tuple(lines), cost.amount))
    return boxes


def _words(stage: Stage) -> list[str]:
    """The kernel, the channels, and what else the stage does with its input."""
    if not isinstance(stage, LayerSpec):
        return [*getattr(stage, "words", (type(stage).__name__,))]
    kernel = "×".join(map(str, stage.kernel_size))
    lines = [f"{stage.kind} {kernel}".rstrip(), f"{stage.in_channels} → {stage.out_channels}"]
    more = []
    if stage.depthwise:
        more.append("depthwise")
    elif stage.groups > 1:
        more.append(f"{stage.groups} groups")
    for name in ("stride", "dilation"):
        value = getattr(stage, name)
        if set(value) - {1}:
            shown = value[:1] if len(set(value)) == 1 else value
            more.append(f"{name} {'×'.join(map(str, shown))}")
    return [*lines, *([", ".join(more)] if more else [])]


def _ranks(rank: Rank, channels: Sequence[int], groups: int) -> list[str | None]:
    """The words for each arrow within the chain whose channels are a rank."""
    ranks = rank if isinstance(rank, tuple) else (rank,) * len(channels)
    if len(ranks) != len(channels):
        return [f"rank {c // groups}" if c // groups in ranks else None for c in channels]
    times = f" × {groups}" if groups > 1 else ""
    return [
        f"rank {r}{times}" if r * groups == c else None
        for r, c in zip(ranks, channels, strict=True)
    ]
