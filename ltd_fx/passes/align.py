"""Gather every argument that follows the tokens.

before  %draw  = call_function[target=draw_tokens](args = (%site, %hidden, True))
        %layer = call_module[target=layers.1](args = (%hidden, %mask))

after   %draw  = call_function[target=draw_tokens](args = (%site, %hidden, True))
        %align = call_function[target=align](args = (%draw, %mask, mask, (2, 3)))
        %layer = call_module[target=layers.1](args = (%hidden, %align))
"""

import logging
from typing import Any

from torch import fx

from ltd_fx.align import align as align_argument
from ltd_fx.align import align_extra, align_extras
from ltd_fx.capture import ARGS, KWARGS
from ltd_fx.passes.locate import CallSite, call_sites

logger = logging.getLogger(__name__)


def align(graph: fx.Graph) -> int:
    """Route the aligned arguments of each located call through a gather.

    Returns:
        How many arguments are gathered.

    """
    count = 0
    for site in call_sites(graph):
        for name, value in site.full.items():
            gathered = _gathered(graph, site, name, value) if _may_follow(site, name) else None
            if gathered is not None:
                site.replace_argument(name, gathered)
                count += 1
    graph.lint()
    logger.debug("align: %d arguments", count)
    return count


def _gathered(graph: fx.Graph, site: CallSite, name: str, value: Any) -> fx.Node | None:
    aligned = site.target.pattern.aligned
    parameters = site.target.signature.parameters
    with graph.inserting_before(site.call):
        if name == KWARGS:
            entries: Any = {key: dims for key, dims in aligned.items() if key not in parameters}
            return graph.call_function(align_extras, (site.draw, value, entries))
        entry: Any = aligned.get(name)
        if entry == () or not isinstance(value, (fx.Node, tuple, list)):
            return None
        if callable(entry):
            return graph.call_function(entry, (site.draw, value))
        if entry is None or name not in parameters:
            name = "*args" if name == ARGS else name
            return graph.call_function(align_extra, (site.draw, value, name, entry))
        return graph.call_function(align_argument, (site.draw, value, name, entry))


def _may_follow(site: CallSite, name: str) -> bool:
    """Whether an argument can be anything that carries the sequence: not the hidden states, a cache or a flag."""
    pattern = site.target.pattern
    if name in (pattern.hidden, pattern.cache):
        return False
    parameter = site.target.signature.parameters.get(name)
    return parameter is None or not isinstance(parameter.default, (bool, int, float, str))
