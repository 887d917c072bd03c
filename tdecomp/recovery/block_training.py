"""The training of one block to give the original block's outputs for the inputs that it gets."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tdecomp.calibration.counted_rows import CountedRows
from tdecomp.calibration.estimate import helps
from tdecomp.calibration.passes import Batches
from tdecomp.model.batches import copied, in_parts, tensors_of
from tdecomp.recovery.adam import Adam, Coordinates
from tdecomp.recovery.blocks import Block
from tdecomp.recovery.range_test import range_test
from tdecomp.recovery.walk import Item
from tdecomp.recovery.whitening import bases_of

Call = tuple[Item, Any, list[Tensor]]  # what the block is called with, and the outputs wanted
_TINY = 1e-30  # no variance is below it
_SHOWN = 64  # samples by which the inputs of layers are known
_STEP = 32  # samples of a step
_VARIED = 256  # samples that tell how much outputs vary


class BlockTraining:
    """Adam on the distance between a block's outputs and those of the original's block."""

    def __init__(
        self, block: Block, calls: Sequence[tuple[Item, Any, Any]], batches: Batches
    ) -> None:
        """`calls` have the inputs that the block gets, and what the original's returns."""
        self._block, self._rows = block, CountedRows(batches)
        self._generator, self._progress = batches.generator(0), batches.progress
        known = [(item, given, tensors_of(wanted)) for item, given, wanted in self._in_steps(calls)]
        self._fits: list[Call] = [call for call in known if not call[0].held]
        self._held: list[Call] = [call for call in known if call[0].held]
        few = self._fits[: -(-_VARIED // _STEP)]
        outputs = zip(*(wanted for _, _, wanted in few), strict=False)
        self._scales = [1.0 / max(_variance(ys), _TINY) for ys in outputs]

    def train(
        self, epochs: float, lr: float | None, device: torch.device
    ) -> tuple[float, float, bool]:
        """The lost shares of the outputs before and after, and whether the training is kept.

        Without a rate, a range test finds one.
        """
        trained = self._block.parameters()
        values = [p.detach().clone() for p in trained]
        before = self._errors()
        runs = ((item.batch, partial(self._run, given)) for item, given, _ in self._fits)
        bases = bases_of(self._block.modules, trained, self._rows, runs, _SHOWN)
        coordinates = Coordinates(trained, bases)
        losses = self._losses(max(1, round(epochs * len(self._fits))))
        lr = range_test(coordinates, losses, device) if lr is None else lr
        optimizer = Adam.one_cycle(coordinates, lr, len(losses))
        with torch.enable_grad():
            for loss_of in self._progress.over(losses, "train", len(losses), "steps"):
                loss = loss_of()
                if loss.requires_grad:  # else something in the block has no gradients
                    optimizer.step(loss, device)
        for parameter in trained:
            parameter.grad = None
        after = self._errors()
        better = helps(before, after, held_out=bool(self._held))
        if not better:
            for parameter, value in zip(trained, values, strict=True):
                parameter.copy_(value)
        return float(before.mean()), float((after if better else before).mean()), better

    def _in_steps(self, calls: Sequence[tuple[Item, Any, Any]]) -> list[tuple[Item, Any, Any]]:
        """The calls in parts of as many samples as a step takes, if the block can be cut so."""
        parts: list[tuple[Item, Any, Any]] = []
        checked = False
        for item, given, wanted in calls:
            cut = [in_parts(each, _STEP, item.samples) for each in (item.batch, given, wanted)]
            count = len(cut[0])
            alike = all(len(each) == count for each in cut)
            if alike and count > 1 and not checked:
                alike = checked = self._alike(given, *cut[1:])
            if not alike:
                return [*calls]
            items = [Item(batch, item.held, item.number) for batch in cut[0]]
            parts += zip(items, *cut[1:], strict=True)
        return parts

    def _alike(self, given: Any, parts: Sequence[Any], wanted: Sequence[Any]) -> bool:
        """Whether the block gives the same for the parts as for the whole, and as is wanted."""
        try:
            pieces = [tensors_of(self._run(part)) for part in parts]
        except Exception:  # what is cut was no sample
            return False
        shapes = [[y.shape for y in tensors_of(part)] for part in wanted]
        if shapes != [[y.shape for y in piece] for piece in pieces]:  # an output was not cut
            return False
        together = map(torch.cat, zip(*pieces, strict=True))
        whole = tensors_of(self._run(given))
        return all(
            a.shape == b.shape and float((a - b).norm()) <= _rounding(b) * float(b.norm())
            for a, b in zip(together, whole, strict=True)
        )

    def _run(self, given: Any) -> Any:
        args, kwargs = copied(given)
        return self._block(args, kwargs)

    def _losses(self, steps: int) -> list[Callable[[], Tensor]]:
        """Those of the calls that are fitted to, again and again in another order."""
        order: list[int] = []
        while len(order) < steps:
            order += torch.randperm(
                len(self._fits), generator=self._generator, device="cpu"
            ).tolist()
        return [partial(self._loss, *self._fits[place]) for place in order[:steps]]

    def _loss(self, item: Item, given: Any, wanted: Sequence[Tensor]) -> Tensor:
        return self._distances(item, given, wanted).mean()

    def _errors(self) -> Tensor:
        """Each sample's distance (samples,), of those that are held out if there are any."""
        found = [self._distances(*call) for call in self._held or self._fits]
        return torch.cat(found).double().cpu()

    def _distances(self, item: Item, given: Any, wanted: Sequence[Tensor]) -> Tensor:
        """Each sample's mean squared distance (samples,), as a share of the variance."""
        self._rows.begin(item.batch)
        total = []
        outputs = tensors_of(self._run(given))
        for mine, target, scale in zip(outputs, wanted, self._scales, strict=True):
            squares = scale * (mine - target).square()
            mask = self._rows.mask_of_output(squares)
            if mask is not None:
                squares = squares * mask.reshape(*mask.shape, *[1] * (mine.dim() - mask.dim()))
            # Not flattened, which would copy images channels last.
            total.append(squares[..., None].mean(dim=tuple(range(1, squares.dim() + 1))))
        if len({*map(len, total)}) > 1:  # as a router's scores, which are those of tokens
            count = item.samples
            total = [each if len(each) == count else each.mean().expand(count) for each in total]
        return torch.stack(total).sum(dim=0)


def _rounding(outputs: Tensor) -> float:
    """By how much the same outputs may differ, as a share of their size."""
    return float(torch.finfo(outputs.dtype).eps ** 0.5)


def _variance(outputs: Sequence[Tensor]) -> float:
    """The mean over entries of the variance, each about its own mean over all calls."""
    rows = [y.double().reshape(len(y), -1) for y in outputs]
    count = sum(map(len, rows))
    # Entries of sequences of several lengths have no mean in common.
    alike = len({r.shape[1] for r in rows}) == 1
    mean: Any = sum(r.sum(dim=0) for r in rows) / count if alike else 0.0
    found = sum(float((r - mean).square().mean(dim=1).sum()) for r in rows) / count
    return found if math.isfinite(found) else 1.0
