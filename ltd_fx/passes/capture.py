"""A model as an ``fx.Graph`` at call-site granularity: one ``call_module`` node per target layer.

Nothing inside a layer is traced, and no user code is traced symbolically: a layer's graph comes from its signature, and
a model's graph from watching one forward (``observe``).
"""

import inspect
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ltd_fx.errors import LTDError
from ltd_fx.learn import Call
from ltd_fx.torch_private import pytree

LAYER = "_ltd_layer"
ARGS, KWARGS = "_ltd_args", "_ltd_kwargs"


def layer_graph(signature: inspect.Signature, hidden: str) -> fx.Graph:
    """One call of a layer, from its signature: a placeholder per argument, one ``call_module``, its output.

    The layer is called with its hidden states by position where that is possible and everything else by name, as
    models do. ``*args`` and ``**kwargs`` travel as one tuple and one dict, under the names :data:`ARGS` and
    :data:`KWARGS`: an ``fx.Node`` cannot spread them.

    Raises:
        LTDError: a required keyword-only argument, which an ``fx.Graph`` cannot express.
    """
    graph = fx.Graph()
    args: list[fx.Node] = []
    kwargs: dict[str, fx.node.Argument] = {}
    for parameter in signature.parameters.values():
        name = parameter.name
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            raise LTDError(
                f"ltd_fx: the layer's required keyword-only argument {name!r} is not supported; give it a default"
            )
        if parameter.kind is parameter.VAR_POSITIONAL:
            kwargs[ARGS] = graph.placeholder(f"*{name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            kwargs[KWARGS] = graph.placeholder(f"**{name}")
        else:
            default = inspect.Signature.empty if parameter.default is parameter.empty else parameter.default
            node = graph.placeholder(name, default_value=default)
            by_position = parameter.kind is parameter.POSITIONAL_ONLY or (name == hidden and not kwargs)
            if by_position:
                args.append(node)
            else:
                kwargs[name] = node
    graph.output(graph.call_module(LAYER, tuple(args), kwargs))
    graph.lint()
    return graph


def call_graph(calls: Iterable[Call]) -> fx.Graph:
    """A model's call sites as a graph.

    Args:
        calls: of its layers, in order.

    Returns:
        The graph, with a placeholder for every value made outside of the layers, an edge where one layer's output is
        another's input, and the values in ``node.meta["val"]``.
    """
    recorder = _Recorder()
    for call in calls:
        recorder.record(call)
    recorder.graph.output(recorder.last)
    recorder.graph.lint()
    return recorder.graph


class _Recorder:
    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.last: fx.Node | None = None
        self._nodes: dict[int, fx.Node] = {}

    def record(self, call: Call) -> None:
        node_args, node_kwargs = pytree.tree_map(self._node, (call.args, call.kwargs))
        node = self.graph.call_module(call.name, node_args, node_kwargs)
        self.last = node
        self._remember(node, call.output)
        if isinstance(call.output, (tuple, list)):
            for i, item in enumerate(call.output):
                if isinstance(item, torch.Tensor) and id(item) not in self._nodes:
                    self._remember(self.graph.call_function(operator.getitem, (node, i)), item)

    def _node(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
            return value
        if id(value) not in self._nodes:
            # placeholders come first in a graph
            first = next(iter(self.graph.nodes), None)
            place = self.graph.inserting_before(first) if first is not None else self.graph.inserting_after(None)
            with place:
                self._remember(self.graph.placeholder(f"value_{len(self._nodes)}"), value)
        return self._nodes[id(value)]

    def _remember(self, node: fx.Node, value: Any) -> None:
        self._nodes[id(value)] = node
        node.meta["val"] = value
