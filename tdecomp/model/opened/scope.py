"""A model whose modules are open inside a `with` block, and closed again where nothing changed."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from tdecomp.model.fast_path import switch_off, switched_on_again
from tdecomp.model.opened.attention import OpenAttention, SeparateAttention
from tdecomp.model.opened.base import Contents, Opened, has_chains
from tdecomp.model.opened.experts import OpenExperts
from tdecomp.model.opened.router import OpenRouter
from tdecomp.model.trace import Reads
from tdecomp.model.weights import is_lazy
from tdecomp.runtime.scope import Scope
from tdecomp.runtime.torch_state import evaluating, exact_passes, hooks

_CLASSES: tuple[type[Opened], ...] = (OpenAttention, SeparateAttention, OpenExperts, OpenRouter)
Run = Callable[[nn.Module], Any]


class opened(Scope):
    """Inside, the weights of attention, experts and routers of `model` are layers in them.

    Afterwards those modules are closed in which no layer was replaced. `runs` call the model as it
    is going to be called: what reads the weights of such a module itself keeps it closed. `names`
    are those of layers that are wanted or known, of an earlier plan, say.
    """

    def __init__(
        self, model: nn.Module, runs: Sequence[Run] = (), names: Collection[str] | None = None
    ) -> None:
        super().__init__()
        self._model, self._runs, self._names = model, runs, names
        # The modules that are open, with the parameters that they had.
        self.closed: dict[Opened, dict[str, nn.Parameter]] = {}

    def change(self) -> None:
        if not isinstance(self._model, nn.Module):
            return  # it is refused later, in words
        found = {m: (path, kind) for path, m, kind in _openable(self._model)}
        if not found:
            return
        self.undo.callback(switched_on_again(self._model))  # after all are closed
        watch = _Watch([*found])
        if self._runs and not any(map(is_lazy, self._model.modules())):
            watch.run(self._model, self._runs)
        routers: dict[Any, Contents] = {}
        for module, (path, kind) in found.items():
            if module in watch.read or (
                kind is OpenRouter and not self._takes(module, path, watch)
            ):
                continue
            if kind is OpenAttention and self._separate(module, path, watch):
                kind = SeparateAttention
            contents = Contents(module)
            self.undo.callback(partial(_close, module, contents))
            self.closed[kind.open(module)] = contents.parameters
            if kind is OpenRouter:
                routers[module] = contents
        while (failing := _failing(self._model, self._runs, routers)) is not None:
            routers.pop(failing).put_back()
            del self.closed[failing]
        switch_off(self._model, ExitStack())

    def _takes(self, module: nn.Module, path: str, watch: "_Watch") -> bool:
        """Whether a router may be opened; a run of it then shows whether it should be."""
        names = self._names or ()
        if path in names:  # of a plan that was made before routers were opened
            return False
        known = f"{path}.projection" in names or type(module).__module__.startswith("transformers.")
        return known or module in watch.ran

    def _separate(self, module: nn.Module, path: str, watch: "_Watch") -> bool:
        weight = module._parameters["in_proj_weight"]
        held = (p for m in self._model.modules() for p in m._parameters.values())
        if sum(p is weight for p in held) > 1:  # its parts would not be shared
            return False
        prefix = f"{path}." if path else ""
        if self._names is not None and f"{prefix}q_proj_weight" in self._names:
            return True
        if self._names is not None and f"{prefix}in_proj_weight" in self._names:
            return False
        if module in watch.ran:
            return module in watch.differing
        return module in (getattr(m, "multihead_attn", None) for m in self._model.modules())


class closed(Scope):
    """Inside, what `opened` opened is closed, but for modules that hold chains."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def change(self) -> None:
        for module in list(self._model.modules()):
            if isinstance(module, Opened) and not has_chains(module):
                self.undo.callback(Contents(module).put_back)
                module.close()


def _openable(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[Opened]]]:
    for path, module in model.named_modules():
        for kind in _CLASSES:
            if not isinstance(module, Opened) and kind.opens(module):
                yield path, module, kind
                break


def _close(module: nn.Module, contents: Contents) -> None:
    if not has_chains(module):
        contents.put_back()


def _failing(model: nn.Module, runs: Sequence[Run], routers: Collection[Any]) -> Any:
    """A router in whose forward one of the runs fails, as it needs the values of its weight."""
    running: list[nn.Module] = []

    def begin(router: nn.Module, _: Any) -> None:
        running.append(router)

    def end(*_: Any) -> None:  # not where it failed
        running.pop()

    starts = [partial(router.register_forward_pre_hook, begin) for router in routers]
    ends = [partial(router.register_forward_hook, end) for router in routers]
    with evaluating(model), hooks([*starts, *ends]), exact_passes(), torch.no_grad():
        for run in runs if routers else ():
            try:
                run(model)
            except Exception:
                if running:
                    return running[-1]
    return None


class _Watch:
    """How modules are used in a few calls of their model."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.read: set[nn.Module] = set()  # whose weights are read outside of their own forward
        self.ran: set[nn.Module] = set()
        self.differing: set[nn.Module] = set()  # attention called with inputs that differ
        self._modules = modules
        self._running: list[nn.Module] = []

    def run(self, model: nn.Module, runs: Sequence[Run]) -> None:
        own = {m: tuple(m.parameters()) for m in self._modules}
        starts = [partial(m.register_forward_pre_hook, self._begin, with_kwargs=True) for m in own]
        ends = [partial(m.register_forward_hook, self._end, always_call=True) for m in own]
        reads = Reads(own, self._read)
        with evaluating(model), hooks([*starts, *ends]), exact_passes(), torch.no_grad(), reads:
            for run in runs:
                with suppress(Exception):  # whoever runs it next says what is wrong
                    run(model)
                self._running.clear()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.append(module)
        self.ran.add(module)
        if isinstance(module, nn.MultiheadAttention):
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key, value = (named.get(name) for name in ("query", "key", "value"))
            if not (query is key and key is value):
                self.differing.add(module)

    def _end(self, module: nn.Module, *_: Any) -> None:
        if self._running[-1:] == [module]:
            self._running.pop()

    def _read(self, module: nn.Module) -> None:
        if module not in self._running:
            self.read.add(module)
