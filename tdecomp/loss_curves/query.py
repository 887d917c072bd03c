"""Questions about what layers lose, answered side by side, in turn, or by workers elsewhere."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from tdecomp.calibration.fit_cache import KnownFits, NotKnownError
from tdecomp.layers.kinds import check_registered
from tdecomp.loss_curves.losses import LayerLosses
from tdecomp.runtime.parallel import parallel_map
from tdecomp.runtime.progress import Step

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Query(Generic[Answer]):
    """A question about one layer: plain data, of which a worker needs no model."""

    name: str  # of the layer
    losses: LayerLosses
    ask: Callable[[LayerLosses], Answer]  # a function at the top level of a module, or its partial

    def __str__(self) -> str:
        return f"layer {self.name!r} ({self.losses.spec})"


def answers(
    queries: Sequence[Query[Answer]], step: Step, executor: Executor | None = None
) -> list[Answer]:
    """The answer to each; what was found out on the way is kept in the losses' own caches."""

    def learn(query: Query[Answer], found: tuple[Answer, Mapping[Hashable, Any]]) -> None:
        query.losses.cache.learn(found[1])
        step.words = ""  # such as the time that was expected: the bar knows better from now on
        step.advance(work=query.losses.work)

    def size(query: Query[Answer]) -> int:
        return 0 if executor is not None and _is_known(query) else query.losses.work

    found = parallel_map(answered, queries, size=size, done=learn, executor=executor)
    return [answer for answer, _ in found]


def _is_known(query: Query[Any]) -> bool:
    """Whether nothing has to be computed, such as with moments that a plan has used before."""
    with suppress(NotKnownError):
        known = KnownFits(query.losses.cache)
        with suppress(Exception):  # it is raised again where it is reported
            query.ask(replace(query.losses, cache=known))
        return True
    return False


def answered(query: Query[Answer]) -> tuple[Answer, dict[Hashable, Any]]:
    """The answer, and what its losses have in their cache that they had not before.

    An error names the layer.
    """
    losses = query.losses
    check_registered(losses.spec, str(query))
    before = len(losses.cache)
    # What its fits share is kept by a copy of the moments, and forgotten with it.
    copy = losses.moments and replace(losses.moments)
    try:
        answer = query.ask(replace(losses, moments=copy))
    except Exception as error:
        if isinstance(error, ValueError) and repr(query.name) in str(error):
            raise
        raise ValueError(
            f"{query}: what its ranks lose cannot be told, {type(error).__name__}: {error}. Leave "
            f"the layer alone with exclude=[{query.name!r}], or choose other methods for it"
        ) from error
    return answer, losses.cache.since(before)
