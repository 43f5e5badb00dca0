"""Let tokens stay out over several layers: cancel each merge that the next layer's split undoes.

before  %out    = merge_output(%draw, %rest, %layer, 0, True)
        %draw_1 = draw_tokens(%site_1, %out, True)
        %mask_1 = align(%draw_1, %mask, mask, (2, 3))
        %split_1 = split_hidden(%draw_1, %out, True)
        %layer_1 = call_module[target=layers.2](args = (%kept_1, %mask_1))
        %out_1  = merge_output(%draw_1, %rest_1, %layer_1, 0, True)

after   %out    = merge_output(%draw, None, %layer, 0, True)           stays at the kept tokens
        %layer_1 = call_module[target=layers.2](args = (%out, %mask))   gathered once, for the layer before
        %out_1  = merge_output(%draw, %rest, %layer_1, 0, True)

In the graph of one layer the neighbours are out of sight: ``hand_over`` and ``take_over`` stand for the edges.
"""

import logging
import operator
from typing import Any

from torch import fx

from ltd_fx.errors import LTDError
from ltd_fx.passes.locate import CallSite, call_sites
from ltd_fx.runtime import hand_over, rest_of, take_over

logger = logging.getLogger(__name__)


def span(graph: fx.Graph) -> int:
    """Join the routed calls of each route over several layers.

    Returns:
        How many pairs of merge and split are cancelled, or left to neighbours out of sight.

    Raises:
        LTDError: a layer of a route does not take the hidden states that the layer before it returned, or somebody else
            takes them too.

    """
    count = 0
    before: dict[str | None, tuple[CallSite, fx.Node | None]] = {}
    for site in call_sites(graph):
        route = site.target.route
        assert site.split is not None
        assert site.merge is not None
        rest: fx.Node | None = _rest(site.split)
        if not site.target.enters:
            if route in before:
                previous, rest = before[route]
                _check_chain(site, previous)
                draw = previous.draw
            else:
                with graph.inserting_before(site.draw):
                    holder, hidden, *_ = site.draw.args
                    draw = graph.call_function(take_over, (holder, hidden, site.target.leaves))
                    rest = graph.call_function(rest_of, (draw,)) if site.target.leaves else None
            _cancel(graph, site, draw, rest)
            count += 1
        if not site.target.leaves:
            site.merge.update_arg(1, None)
            if route is not None:
                before[route] = site, rest
            else:
                users = list(site.merge.users)
                slot = site.target.pattern.output
                with graph.inserting_after(site.merge):
                    held = graph.call_function(hand_over, (site.draw.args[0], site.draw, rest, site.merge, slot))
                for user in users:
                    user.replace_input_with(site.merge, held)
    graph.lint()
    logger.debug("span: %d pairs", count)
    return count


def _rest(split: fx.Node) -> fx.Node:
    return next(user for user in split.users if user.target is operator.getitem and user.args[1] == 0)


def _cancel(graph: fx.Graph, site: CallSite, draw: fx.Node, rest: fx.Node | None) -> None:
    assert site.split is not None
    hidden: Any = site.split.args[1]
    for user in list(site.split.users):
        if user.args[1] == 1:
            user.replace_all_uses_with(hidden)
            graph.erase_node(user)
    assert site.merge is not None
    own_rest: Any = site.merge.args[1]
    site.merge.update_arg(1, rest)
    graph.erase_node(own_rest)
    graph.erase_node(site.split)
    site.split = None
    own, site.draw = site.draw, draw
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
        key = (node.target, repr(node.args))  # nodes have unique names
        if gathered.setdefault(key, node) is not node:
            node.replace_all_uses_with(gathered[key])
            graph.erase_node(node)


def _check_chain(site: CallSite, previous: CallSite) -> None:
    assert site.split is not None
    assert previous.merge is not None
    hidden: Any = site.split.args[1]
    slot = previous.target.pattern.output
    if hidden is not previous.merge and (hidden.target, hidden.args) != (operator.getitem, (previous.merge, slot)):
        what = "does not take its hidden states as they are"
    elif hidden.users.keys() - {site.draw, site.split}:
        what = "others take the hidden states between them too"
    else:
        return
    raise LTDError(
        f"ltd_fx: {site.target.name} follows {previous.target.name} on a route, but {what}; end the route there, with "
        "two of them in transform(..., routes=...)"
    )
