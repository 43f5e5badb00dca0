"""Find the calls of the layers to route, and give each its draw.

before  %layer = call_module[target=layers.1](args = (%hidden, %mask))

after   %site  = get_attr[target=_ltd_site_1]
        %draw  = call_function[target=draw_tokens](args = (%site, %hidden, True))
        %layer = call_module[target=layers.1](args = (%hidden, %mask))
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx

from ltd_fx.errors import LTDError
from ltd_fx.learn import CallSite, LayerPattern
from ltd_fx.passes.graph_pass import GraphPass
from ltd_fx.runtime import draw_tokens

META = "ltd_fx"
VALUES = ("val", "example_value", "tensor_meta")  # What make_fx, Dynamo and ShapeProp note of a node's value.
_ORIGIN = ("nn_module_stack", "stack_trace")


class Target(NamedTuple):
    """A layer to route: its record, the signature of its ``forward``, and the root's attribute that holds its site."""

    layer: CallSite
    signature: inspect.Signature
    site: str


@dataclass
class LocatedCall:
    """A call of a layer: its node, that of its draw, and (from ``route`` on) those of its split and merge.

    ``full`` has the arguments as they were before any was gathered.
    """

    layer: CallSite
    signature: inspect.Signature
    call: fx.Node
    draw: fx.Node
    full: dict[str, Any] = field(default_factory=dict)
    split: fx.Node | None = None
    merge: fx.Node | None = None

    @property
    def pattern(self) -> LayerPattern:
        return self.layer.known_pattern

    def arguments(self) -> dict[str, Any]:
        """What the call passes, by the layer's parameter names, positional ones first.

        What the layer takes through ``**kwargs`` has its own name, what it takes through ``*args`` that of its place.
        """
        parameters = self.signature.parameters
        positional = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        extra = [f"*args[{i}]" for i in range(len(self.call.args) - len(positional))]
        return {**dict(zip([*positional, *extra], self.call.args, strict=False)), **self.call.kwargs}

    def replace_argument(self, name: str, value: Any) -> None:
        if name in self.call.kwargs:
            self.call.update_kwarg(name, value)
        else:
            self.call.update_arg(list(self.arguments()).index(name), value)

    def insert(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """A call of ``function`` at the graph's insertion point, with the layer call's origin."""
        return self._from_here(self.call.graph.call_function(function, args))

    def insert_attribute(self, name: str) -> fx.Node:
        """A reference to the root's attribute ``name``, which it is given once the graph is accepted."""
        return self._from_here(self.call.graph.create_node("get_attr", name))

    def _from_here(self, node: fx.Node) -> fx.Node:
        node.meta.update({key: self.call.meta[key] for key in _ORIGIN if key in self.call.meta})
        return node


def located_calls(graph: fx.Graph) -> Iterator[LocatedCall]:
    """The calls that :func:`locate` found in ``graph``, in order of execution."""
    for node in list(graph.nodes):
        if META in node.meta:
            yield node.meta[META]


@GraphPass
def locate(graph: fx.Graph, *, targets: Mapping[str, Target]) -> int:
    """Mark the calls of ``targets`` (by ``call_module`` target) and insert their draws.

    Args:
        graph: with one ``call_module`` node a call of a layer; it is changed in place.
        targets: the layers to route, by that node's target.

    Returns:
        How many calls were found.

    Raises:
        LTDError: the graph is rewritten already, a target is never called, or a call lacks the hidden states.
    """
    nodes = list(graph.nodes)
    if any(node.target is draw_tokens for node in nodes):
        raise LTDError("ltd_fx.transform: the graph is rewritten already; transform the original fx.GraphModule")
    uncalled = targets.keys() - {node.target for node in nodes if node.op == "call_module"}
    if uncalled:
        raise LTDError(f"ltd_fx: {min(uncalled)} is never called; leave it out with transform(..., layers=...)")
    calls = [node for node in nodes if node.op == "call_module" and node.target in targets]
    for node in calls:
        layer, signature, site = targets[str(node.target)]
        located = LocatedCall(layer, signature, node, node)
        located.full = arguments = located.arguments()
        pattern = located.pattern
        if not isinstance(arguments.get(pattern.hidden), fx.Node):
            raise LTDError(
                f"ltd_fx: {layer.name} is called without {pattern.hidden!r}, which its LayerPattern says holds the "
                "hidden states; correct `hidden`"
            )
        cache = None if pattern.cache is None else arguments.get(pattern.cache)
        with graph.inserting_before(node):
            holder = located.insert_attribute(site)
            given = (holder, arguments[pattern.hidden], pattern.batch_first)
            located.draw = located.insert(draw_tokens, *given, *(() if cache is None else (cache,)))
        node.meta[META] = located
    return len(calls)
