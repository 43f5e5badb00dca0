"""Gather every argument that follows the tokens.

before  %draw  = call_function[target=draw_tokens](args = (%site, %hidden, True))
        %layer = call_module[target=layers.1](args = (%hidden, %mask))

after   %draw  = call_function[target=draw_tokens](args = (%site, %hidden, True))
        %align = call_function[target=align](args = (%draw, %mask, mask, (2, 3)))
        %layer = call_module[target=layers.1](args = (%hidden, %align))

Several arguments of a call are gathered at once:

        %align = call_function[target=gather_arguments](args = (%draw, (mask, bias), (%mask, %bias), ((1,), (2,))))
        %mask_1 = call_function[target=getitem](args = (%align, 0))
"""

import logging
import operator
from typing import Any

from torch import fx

from ltd_fx.passes.capture import ARGS, KWARGS
from ltd_fx.passes.locate import CallSite, call_sites
from ltd_fx.runtime import gather_argument, gather_arguments, gather_extra, gather_extras

logger = logging.getLogger(__name__)


def align(graph: fx.Graph) -> int:
    """Route the aligned arguments of each located call through a gather.

    Returns:
        How many arguments are gathered.

    """
    count = 0
    for site in call_sites(graph):
        following = {name: value for name, value in site.full.items() if _may_follow(site, name, value)}
        aligned = site.target.pattern.aligned
        plain = {name: value for name, value in following.items() if isinstance(aligned.get(name), tuple)}
        with graph.inserting_before(site.call):
            gathered = {
                **_together(graph, site, plain),
                **{name: _alone(graph, site, name, value) for name, value in following.items() if name not in plain},
            }
        for name, node in gathered.items():
            site.replace_argument(name, node)
        count += len(gathered)
    graph.lint()
    logger.debug("align: %d arguments", count)
    return count


def _together(graph: fx.Graph, site: CallSite, values: dict[str, Any]) -> dict[str, fx.Node]:
    """Those of which the pattern gives the dimensions."""
    entries: Any = [site.target.pattern.aligned[name] for name in values]
    if len(values) == 1:
        ((name, value),) = values.items()
        return {name: graph.call_function(gather_argument, (site.draw, value, name, entries[0]))}
    if not values:
        return {}
    node = graph.call_function(gather_arguments, (site.draw, tuple(values), tuple(values.values()), tuple(entries)))
    return {name: graph.call_function(operator.getitem, (node, i)) for i, name in enumerate(values)}


def _alone(graph: fx.Graph, site: CallSite, name: str, value: Any) -> fx.Node:
    """Those that a function gathers, or of which the pattern says nothing."""
    aligned = site.target.pattern.aligned
    if name == KWARGS:
        parameters = site.target.signature.parameters
        extras: Any = {key: dims for key, dims in aligned.items() if key not in parameters}
        return graph.call_function(gather_extras, (site.draw, value, extras))
    entry = aligned.get(name)
    if callable(entry):
        return graph.call_function(entry, (site.draw, value))
    return graph.call_function(gather_extra, (site.draw, value, "*args" if name == ARGS else name))


def _may_follow(site: CallSite, name: str, value: Any) -> bool:
    """Whether an argument can carry the sequence: not the hidden states, a cache or a flag, and not excluded."""
    pattern = site.target.pattern
    if name in (pattern.hidden, pattern.cache):
        return False
    if name != KWARGS and (pattern.aligned.get(name) == () or not isinstance(value, (fx.Node, tuple, list))):
        return False
    parameter = site.target.signature.parameters.get(name)
    return parameter is None or not isinstance(parameter.default, (bool, int, float, str))
