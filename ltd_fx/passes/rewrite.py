"""All passes over a graph, in their order."""

from collections.abc import Iterable, Mapping
from functools import partial

from torch import fx

from ltd_fx.learn import Call
from ltd_fx.passes.align import align
from ltd_fx.passes.capture import call_graph
from ltd_fx.passes.check import check
from ltd_fx.passes.locate import Target, locate
from ltd_fx.passes.observer import PassObserver
from ltd_fx.passes.route import route
from ltd_fx.passes.span import span
from ltd_fx.runtime import Site


def rewrite(graph: fx.Graph, *, targets: Mapping[str, Target], sites: Mapping[str, Site] | None = None) -> None:
    """Run all passes over ``graph``, in place; ``LTD_FX_PASSES`` times, dumps or skips them (``passes/observer.py``).

    Args:
        graph: with one ``call_module`` node a call of a layer.
        targets: the layers to route, by ``call_module`` target.
        sites: given for a graph recorded from example inputs, to check its values too; see :func:`check`.

    Raises:
        LTDError: a call cannot be routed; discard the graph then. Or ``LTD_FX_PASSES`` has an unknown word.
    """
    observer = PassObserver(graph)
    observer.run("locate", partial(locate, targets=targets))
    observer.run("align", align)
    observer.run("route", route)
    observer.run("check", partial(check, sites=sites))
    observer.run("span", span)  # last: what it leaves of a call has no split of its own to check


def check_calls(
    calls: Iterable[Call], *, targets: Mapping[str, Target], sites: Mapping[str, Site] | None = None
) -> None:
    """Whether a model's layers can be routed together, as one forward called them: their graph is rewritten, not run.

    Args:
        calls: of the layers, in order.
        targets: the layers to route, by name.
        sites: to check the values too; see :func:`check`.

    Raises:
        LTDError: a layer is not called, an argument does not fit, or the layers of a route do not follow each other.
    """
    graph = call_graph(calls)
    try:
        rewrite(graph, targets=targets, sites=sites)
    finally:
        for node in graph.nodes:  # it is a cycle, and the layers may be called with anything of the user's
            node.meta.clear()
