"""Find the call sites of the target layers, and give each its draw.

before  %layer = call_module[target=layers.1](args = (%hidden, %mask))

after   %site  = get_attr[target=_ltd_site_1]
        %draw  = call_function[target=draw_tokens](args = (%site, %hidden, True))
        %layer = call_module[target=layers.1](args = (%hidden, %mask))
"""

import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ltd_fx.errors import LTDError
from ltd_fx.learn import LayerPattern
from ltd_fx.runtime import draw_tokens

logger = logging.getLogger(__name__)
META = "ltd_fx"


@dataclass(frozen=True)
class Target:
    """A layer to route: ``site`` is the attribute of the graph's root that holds its :class:`ltd_fx.runtime.draw.Site`.

    Tokens leave at it (``enters``) and return after it (``leaves``), or do so at other layers of its ``route``.
    """

    name: str
    site: str
    signature: inspect.Signature
    pattern: LayerPattern
    route: str | None = None
    enters: bool = True
    leaves: bool = True


@dataclass
class CallSite:
    """A located call: the node of the layer, of its draw, and (from ``route`` on) of its split and merge.

    ``full`` has the arguments as they were before any was gathered.
    """

    target: Target
    call: fx.Node
    draw: fx.Node
    full: dict[str, Any] = field(default_factory=dict)
    split: fx.Node | None = None
    merge: fx.Node | None = None

    def arguments(self) -> dict[str, Any]:
        """What the call passes, by the layer's parameter names, positional ones first.

        What the layer takes through ``**kwargs`` has its own name, what it takes through ``*args`` that of its place.
        """
        parameters = self.target.signature.parameters
        positional = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        extra = [f"*args[{i}]" for i in range(len(self.call.args) - len(positional))]
        return {**dict(zip([*positional, *extra], self.call.args, strict=False)), **self.call.kwargs}

    def replace_argument(self, name: str, value: Any) -> None:
        if name in self.call.kwargs:
            self.call.update_kwarg(name, value)
        else:
            self.call.update_arg(list(self.arguments()).index(name), value)


def call_sites(graph: fx.Graph) -> Iterator[CallSite]:
    """The sites that :func:`locate` found in ``graph``, in order of execution."""
    for node in list(graph.nodes):
        if META in node.meta:
            yield node.meta[META]


def locate(graph: fx.Graph, targets: Mapping[str, Target]) -> int:
    """Mark the calls of ``targets`` (by ``call_module`` target) and insert their draws.

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
    count = 0
    for node in nodes:
        if node.op != "call_module" or node.target not in targets:
            continue
        target = targets[node.target]
        pattern = target.pattern
        site = CallSite(target, node, node)
        site.full = arguments = site.arguments()
        if not isinstance(arguments.get(pattern.hidden), fx.Node):
            raise LTDError(
                f"ltd_fx: {target.name} is called without {pattern.hidden!r}, which its LayerPattern says holds the "
                "hidden states; correct `hidden`"
            )
        with graph.inserting_before(node):
            holder = graph.create_node("get_attr", target.site)
            args = [holder, arguments[pattern.hidden], pattern.batch_first]
            if pattern.cache is not None and arguments.get(pattern.cache) is not None:
                args.append(arguments[pattern.cache])
            site.draw = graph.call_function(draw_tokens, tuple(args))
        node.meta[META] = site
        count += 1
    graph.lint()
    logger.debug("locate: %d call sites", count)
    return count
