"""The rewrite: ``locate``, ``align``, ``route``, ``check``, ``span``, each a function that changes one ``fx.Graph``.

Each lints the graph it leaves, logs (at debug level) what it did, and returns its count.
"""

from collections.abc import Mapping

from torch import fx

from ltd_fx.passes.align import align
from ltd_fx.passes.check import check
from ltd_fx.passes.locate import Target, locate
from ltd_fx.passes.route import route
from ltd_fx.passes.span import span
from ltd_fx.runtime import Site

__all__ = ["Target", "align", "check", "locate", "rewrite", "route", "span"]


def rewrite(graph: fx.Graph, targets: Mapping[str, Target], sites: Mapping[str, Site] | None = None) -> None:
    """Run all passes over ``graph``.

    Args:
        graph: with one ``call_module`` node a call of a layer.
        targets: the layers to route, by ``call_module`` target.
        sites: given for a graph recorded from example inputs, to check its values too; see :func:`check`.

    Raises:
        LTDError: a call cannot be routed; discard the graph then.

    """
    locate(graph, targets)
    align(graph)
    route(graph)
    check(graph, sites)
    span(graph)  # last: what it leaves of a call has no split of its own to check
