"""Let the layer see the kept tokens only, and put its output back among the others.

before  %layer  = call_module[target=layers.1](args = (%hidden, %mask_1))
        return %layer

after   %split  = call_function[target=split_hidden](args = (%draw, %hidden, True))
        %rest   = call_function[target=getitem](args = (%split, 0))
        %kept   = call_function[target=getitem](args = (%split, 1))
        %layer  = call_module[target=layers.1](args = (%kept, %mask_1))
        %merged = call_function[target=merge_output](args = (%draw, %rest, %layer, 0, True))
        return %merged
"""

import operator

from torch import fx

from ltd_fx.passes.graph_pass import GraphPass
from ltd_fx.passes.locate import VALUES, located_calls
from ltd_fx.runtime import merge_output, split_hidden


@GraphPass
def route(graph: fx.Graph) -> int:
    """Wrap each located call in split and merge.

    Where nodes have a value (:data:`VALUES`), the merge has the layer's. The layer has none: it sees the kept tokens
    only, and how many these are is known in a forward.

    Args:
        graph: after ``align``; it is changed in place.

    Returns:
        How many calls are routed.
    """
    count = 0
    for located in located_calls(graph):
        pattern, call = located.pattern, located.call
        _, hidden, *_ = located.draw.args  # An earlier call may have replaced it since.
        returned = tuple((slot, name and located.full.get(name)) for slot, name in pattern.returned.items())
        with graph.inserting_before(call):
            located.split = located.insert(split_hidden, located.draw, hidden, pattern.batch_first)
            rest = located.insert(operator.getitem, located.split, 0)
            kept = located.insert(operator.getitem, located.split, 1)
        located.replace_argument(pattern.hidden, kept)
        with graph.inserting_after(call):
            further = (returned, pattern.dropped) if returned or pattern.dropped else ()
            merge = located.insert(
                merge_output, located.draw, rest, call, pattern.output, pattern.batch_first, *further
            )
        for user in list(call.users):
            if user is not merge:
                user.replace_input_with(call, merge)
        located.merge = merge
        merge.meta.update({key: call.meta.pop(key) for key in VALUES if key in call.meta})
        assert isinstance(hidden, fx.Node)
        rest.meta.update({key: hidden.meta[key] for key in VALUES if key in hidden.meta})
        count += 1
    return count
