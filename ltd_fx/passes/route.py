"""Let the layer see the kept tokens only, and put its output back among the others.

before  %layer  = call_module[target=layers.1](args = (%hidden, %align))
        return %layer

after   %split  = call_function[target=split_hidden](args = (%draw, %hidden, True))
        %rest   = call_function[target=getitem](args = (%split, 0))
        %kept   = call_function[target=getitem](args = (%split, 1))
        %layer  = call_module[target=layers.1](args = (%kept, %align))
        %merged = call_function[target=merge_output](args = (%draw, %rest, %layer, 0, True))
        return %merged
"""

import logging
import operator

from torch import fx

from ltd_fx.passes.locate import call_sites
from ltd_fx.runtime import merge_output, split_hidden

logger = logging.getLogger(__name__)


def route(graph: fx.Graph) -> int:
    """Wrap each located call in split and merge.

    Returns:
        How many calls are routed.

    """
    count = 0
    for site in call_sites(graph):
        pattern = site.target.pattern
        _, hidden, *_ = site.draw.args  # an earlier site may have replaced it since
        returned = tuple((slot, name and site.full.get(name)) for slot, name in pattern.returned.items())
        with graph.inserting_before(site.call):
            site.split = graph.call_function(split_hidden, (site.draw, hidden, pattern.batch_first))
            rest = graph.call_function(operator.getitem, (site.split, 0))
            kept = graph.call_function(operator.getitem, (site.split, 1))
        site.replace_argument(pattern.hidden, kept)
        with graph.inserting_after(site.call):
            further = (returned, pattern.dropped) if returned or pattern.dropped else ()
            args = (site.draw, rest, site.call, pattern.output, pattern.batch_first, *further)
            site.merge = graph.call_function(merge_output, args)
        for user in list(site.call.users):
            if user is not site.merge:
                user.replace_input_with(site.call, site.merge)
        if "val" in site.call.meta:
            site.merge.meta["val"] = site.call.meta["val"]
        count += 1
    graph.lint()
    logger.debug("route: %d calls", count)
    return count
