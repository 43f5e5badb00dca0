"""Say which nodes of a flat graph are a layer's, where no module tells: what ``outline`` goes by, for functions.

before  %linear = call_function[target=aten.linear](args = (%hidden, ...))      (no nn_module_stack)

after   %linear = call_function[target=aten.linear](args = (%hidden, ...))      nn_module_stack: block_1
"""

from collections.abc import Callable

from torch import fx, nn

from ltd_fx.learn import mark_module
from ltd_fx.passes.graph_pass import GraphPass


@GraphPass
def mark(graph: fx.Graph, *, targets: Callable[[fx.Node], str | None]) -> int:
    """Name the layer of each node; ``outline`` and ``transform(..., layers=[...])`` then know layers of these names.

    Args:
        graph: flat; what its nodes note is changed in place, not what they do.
        targets: from a node to the name of the layer that it belongs to, ``None`` where it belongs to none.

    Returns:
        How many nodes belong to a layer.
    """
    count = 0
    for node in graph.nodes:
        name = targets(node)
        if name is not None:
            mark_module(node, name, nn.Module)
            count += 1
    return count
