"""Let tokens stay out over several layers: cancel each merge that the next layer's split undoes.

before  %out    = merge_output(%draw, %rest, %layer, 0, True)
        %draw_1 = draw_tokens(%site_1, %out, True)
        %mask_1 = gather_argument(%draw_1, %mask, mask, (2, 3))
        %split_1 = split_hidden(%draw_1, %out, True)
        %layer_1 = call_module[target=layers.2](args = (%kept_1, %mask_1))
        %out_1  = merge_output(%draw_1, %rest_1, %layer_1, 0, True)

after   %out    = merge_output(%draw, None, %layer, 0, True)           stays at the kept tokens
        %layer_1 = call_module[target=layers.2](args = (%out, %mask))   gathered once, for the layer before
        %out_1  = merge_output(%draw, %rest, %layer_1, 0, True)

In the graph of one layer the neighbours are out of sight: ``hand_over`` and ``take_over`` stand for the edges.
"""

import operator
from typing import Any

from torch import fx

from ltd_fx.errors import LTDError
from ltd_fx.passes.graph_pass import GraphPass
from ltd_fx.passes.locate import VALUES, LocatedCall, located_calls
from ltd_fx.runtime import hand_over, rest_of, take_over


@GraphPass
def span(graph: fx.Graph) -> int:
    """Join the routed calls of each route over several layers.

    Args:
        graph: after ``route``; it is changed in place.

    Returns:
        How many pairs of merge and split are cancelled, or left to neighbours out of sight.

    Raises:
        LTDError: a layer of a route does not take the hidden states that the layer before it returned, or somebody else
            takes them too, or the layers are called in another order.
    """
    count = 0
    # For each route under way: its latest call, and the dropped tokens.
    under_way: dict[str | None, tuple[LocatedCall, fx.Node | None]] = {}
    for located in located_calls(graph):
        layer = located.layer
        assert located.split is not None
        rest: fx.Node | None = _rest(located.split)
        if layer.route and layer.enters == (layer.route in under_way):
            raise LTDError(
                f"ltd_fx: {layer.name} is called out of order on the route that starts at {layer.route}; leave it out, "
                "or give the layers routes of their own, in transform(..., routes=...)"
            )
        if not layer.enters:
            if layer.route:
                previous, rest = under_way.pop(layer.route)
                _check_chain(located, previous)
                draw = previous.draw
            else:  # This is the graph of one layer, whose neighbours are in others.
                with graph.inserting_before(located.draw):
                    holder, hidden, *_ = located.draw.args
                    draw = located.insert(take_over, holder, hidden, layer.leaves)
                    rest = located.insert(rest_of, draw) if layer.leaves else None
            _cancel(graph, located, draw, rest)
            count += 1
        if not layer.leaves:
            _keep_out(located)
            if layer.route:
                under_way[layer.route] = located, rest
            else:
                _hand_over(graph, located, rest)
                count += 1
    return count


def _rest(split: fx.Node) -> fx.Node:
    return next(user for user in split.users if user.target is operator.getitem and user.args[1] == 0)


def _keep_out(located: LocatedCall) -> None:
    """Have the merge return the kept tokens alone, whose number is known in a forward."""
    assert located.merge is not None
    located.merge.update_arg(1, None)
    for node in (located.merge, *(user for user in located.merge.users if user.target is operator.getitem)):
        for key in VALUES:
            node.meta.pop(key, None)


def _hand_over(graph: fx.Graph, located: LocatedCall, rest: fx.Node | None) -> None:
    """Leave it all to the next layer, which is in another graph."""
    merge, holder = located.merge, located.draw.args[0]
    assert merge is not None
    users = list(merge.users)
    with graph.inserting_after(merge):
        held = located.insert(hand_over, holder, located.draw, rest, merge, located.pattern.output)
    for user in users:
        user.replace_input_with(merge, held)


def _cancel(graph: fx.Graph, located: LocatedCall, draw: fx.Node, rest: fx.Node | None) -> None:
    assert located.split is not None
    assert located.merge is not None
    hidden: Any = located.split.args[1]
    for user in list(located.split.users):
        if user.args[1] == 1:
            user.replace_all_uses_with(hidden)
            graph.erase_node(user)
    own_rest: Any = located.merge.args[1]
    located.merge.update_arg(1, rest)
    graph.erase_node(own_rest)
    graph.erase_node(located.split)
    located.split = None
    own, located.draw = located.draw, draw
    own.replace_all_uses_with(draw)
    holder: Any = own.args[0]
    graph.erase_node(own)
    if not holder.users:
        graph.erase_node(holder)
    _reuse(graph, draw)


def _reuse(graph: fx.Graph, draw: fx.Node) -> None:
    """Gather an argument once for all layers that share the draw."""
    gathered: dict[Any, fx.Node] = {}
    for node in list(draw.users):
        try:
            first = gathered.setdefault((node.target, node.args), node)  # The nodes in it are compared by identity.
        except TypeError:  # A constant has no hash, as a slice has none before Python 3.12.
            continue
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _readers(hidden: fx.Node, previous: LocatedCall) -> set[fx.Node]:
    """Who reads the hidden states that ``previous`` returns, through ``hidden`` or another node."""
    merge, slot = previous.merge, previous.pattern.output
    assert merge is not None
    readers = set(hidden.users)
    if hidden is merge:
        return readers
    for user in merge.users:
        index = user.args[1] if user.target is operator.getitem else None
        if index == slot:  # A traced graph has a getitem for each place in the code that takes the slot.
            readers |= set(user.users)
        elif not isinstance(index, int) or index < 0:  # It reads the whole output, or from the end of it.
            readers.add(user)
    return readers


def _check_chain(located: LocatedCall, previous: LocatedCall) -> None:
    assert located.split is not None
    assert previous.merge is not None
    hidden: Any = located.split.args[1]
    slot = previous.pattern.output
    if hidden is not previous.merge and (hidden.target, hidden.args) != (operator.getitem, (previous.merge, slot)):
        what = "does not take its hidden states as they are"
    elif _readers(hidden, previous) - {located.draw, located.split}:
        what = "others take the hidden states between them too"
    else:
        return
    raise LTDError(
        f"ltd_fx: {located.layer.name} follows {previous.layer.name} on a route, but {what}; end the route there, with "
        "two of them in transform(..., routes=...)"
    )
