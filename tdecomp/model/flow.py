"""Whose outputs a model's batch norms are given, and who else reads these outputs."""

import inspect
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from tdecomp.layers.chain import Chain
from tdecomp.model.batches import tensors_of
from tdecomp.model.example import Example
from tdecomp.model.surgery import copy_with
from tdecomp.model.trace import READ_OUTSIDE, OddUses, Reads
from tdecomp.runtime.torch_state import evaluating, hooks, no_fast_path

# In `Flow.readers`: something that is no batch norm, or the caller of the model.
OTHER = ""


@dataclass
class Flow:
    """Where the outputs of some layers go, by the names of layers and batch norms."""

    # The layers whose outputs each batch norm is given; None for any other tensor.
    sources: dict[str, set[str | None]] = field(default_factory=lambda: defaultdict(set))
    # The batch norms that read each layer's outputs, and `OTHER`.
    readers: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    # What else keeps a layer or a batch norm in its place.
    oddities: dict[str, str] = field(default_factory=dict)
    # How many dimensions each layer's outputs have; None where nothing was run.
    dims: dict[str, set[int]] | None = None


def flow_of_pass(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    norms: Mapping[str, nn.Module],
    example: Example,
) -> Flow:
    """The flow in one pass of the example inputs, in eval mode; a ValueError if they are rejected.

    Outputs are kept until the pass is over, so that no other tensor takes their identity.
    """
    flow = Flow(dims=defaultdict(set))
    running: list[str] = []
    outputs: dict[int, tuple[str, Tensor]] = {}

    def read(layer: str) -> None:
        if not running:  # a batch norm that is running has been noted already
            flow.readers[layer].add(OTHER)

    reads = Reads[str]({}, read)

    def put_out(name: str, _layer: nn.Module, _args: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            outputs[id(out)] = name, out
            reads.add(name, out)
            assert flow.dims is not None
            flow.dims[name].add(out.dim())

    def begin(name: str, _norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        source, _ = outputs.get(id((*args, *kwargs.values())[0]), (None, None))
        flow.sources[name].add(source)
        if source is not None:
            flow.readers[source].add(name)
        running.append(name)

    def end(*_: Any) -> None:
        running.pop()

    watched = [partial(m.register_forward_hook, partial(put_out, n)) for n, m in layers.items()]
    for name, norm in norms.items():
        start = partial(norm.register_forward_pre_hook, partial(begin, name), with_kwargs=True)
        watched += [start, partial(norm.register_forward_hook, end, always_call=True)]
    uses = OddUses({**{name: last_part(layer) for name, layer in layers.items()}, **norms})
    with evaluating(model), hooks(watched), torch.no_grad(), no_fast_path():
        try:
            with uses, reads:
                out = example.copied().run(model)
        except Exception as error:
            raise ValueError(
                f"the model rejected example_inputs ({example.describe()}): "
                f"{type(error).__name__}: {error}"
            ) from error
    reads.look_at(tensors_of(out))
    flow.oddities |= uses.found
    return flow


def last_part(layer: nn.Module) -> nn.Module:
    """The last stage of a chain; a layer itself."""
    return layer[-1] if isinstance(layer, Chain) else layer


def flow_of_graph(
    model: nn.Module, layers: Mapping[str, nn.Module], norms: Mapping[str, nn.Module]
) -> Flow:
    """The flow in the graph that torch.fx finds; a ValueError for a model that it cannot trace.

    What the graphs with and without the optional arguments of the model have in common: branches on
    whether one is given are decided while tracing.
    """
    optional = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    flow, errors, tries = Flow(), [], [{}, optional] if optional else [{}]
    for concrete in tries:
        # A model that keeps its activations would keep those of the tracer.
        twin = copy_with(model, {}, share=True)
        tracer = _Tracer({twin.get_submodule(name) for name in (*layers, *norms)})
        try:
            graph = tracer.trace(twin, concrete)
        except Exception as error:
            errors.append(error)
        else:
            _follow(graph, flow, layers, norms)
    if len(errors) == len(tries):
        last = errors[-1]
        raise ValueError(
            f"torch.fx cannot trace the model ({type(last).__name__}: {last}); expected "
            "example_inputs, with one pass of which the batch norms' inputs are found"
        ) from last
    return flow


def _follow(
    graph: fx.Graph, flow: Flow, layers: Mapping[str, nn.Module], norms: Mapping[str, nn.Module]
) -> None:
    """Note the outputs of the layers in one graph."""
    for node in graph.nodes:
        if node.op == "get_attr":
            for name in (*layers, *norms):
                if node.target.startswith(f"{name}."):
                    flow.oddities[name] = READ_OUTSIDE
        elif node.op == "call_module" and node.target in norms:
            source = next(iter(node.all_input_nodes), None)
            known = source is not None and source.op == "call_module" and source.target in layers
            flow.sources[node.target].add(source.target if source is not None and known else None)
        elif node.op == "call_module" and node.target in layers:
            for user in (user for user in node.users if not _reads_metadata(user)):
                norm = user.op == "call_module" and user.target in norms
                flow.readers[node.target].add(user.target if norm else OTHER)


class _Tracer(fx.Tracer):
    """A tracer to which layers, chains and batch norms are one call each."""

    def __init__(self, whole: set[nn.Module]) -> None:
        super().__init__()
        self._whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self._whole or super().is_leaf_module(m, module_qualified_name)


_METADATA = {"shape", "dtype", "device", "ndim", "size", "dim", "requires_grad"}


def _reads_metadata(node: fx.Node) -> bool:
    """Whether it needs no values of its input."""
    if node.op == "call_method":
        return node.target in _METADATA
    return node.op == "call_function" and node.target is getattr and node.args[1] in _METADATA
