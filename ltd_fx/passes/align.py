"""Gather every argument that follows the tokens.

before  %draw   = call_function[target=draw_tokens](args = (%site, %hidden, True))
        %layer  = call_module[target=layers.1](args = (%hidden, %mask))

after   %draw   = call_function[target=draw_tokens](args = (%site, %hidden, True))
        %mask_1 = call_function[target=gather_argument](args = (%draw, %mask, mask, (2, 3)))
        %layer  = call_module[target=layers.1](args = (%hidden, %mask_1))

Several arguments of a call are gathered at once:

        %both   = call_function[target=gather_arguments](args = (%draw, (mask, bias), (%mask, %bias), ((1,), (2,))))
        %mask_1 = call_function[target=getitem](args = (%both, 0))
"""

import operator
from typing import Any

from torch import fx

from ltd_fx.passes.capture import ARGS, KWARGS
from ltd_fx.passes.graph_pass import GraphPass
from ltd_fx.passes.locate import LocatedCall, located_calls
from ltd_fx.runtime import (
    gather_argument,
    gather_arguments,
    gather_extra,
    gather_extras,
    hand_boundaries,
    restart_positions,
)


@GraphPass
def align(graph: fx.Graph) -> int:
    """Gather the arguments that follow the tokens, for each located call.

    Args:
        graph: after ``locate``; it is changed in place.

    Returns:
        How many arguments are gathered.
    """
    count = 0
    for call in located_calls(graph):
        following = {name: value for name, value in call.full.items() if _may_follow(call, name, value)}
        aligned = call.pattern.aligned
        plain = {name: value for name, value in following.items() if isinstance(aligned.get(name), tuple)}
        with graph.inserting_before(call.call):
            gathered = {
                **_together(call, plain),
                **{name: _alone(call, name, value) for name, value in following.items() if name not in plain},
            }
            if "position_ids" in gathered and KWARGS in gathered:
                given = (call.full.get(name) for name in ("position_ids", "attention_mask"))
                gathered["position_ids"] = call.insert(restart_positions, call.draw, gathered["position_ids"], *given)
        for name, node in gathered.items():
            call.replace_argument(name, node)
        count += len(gathered)
    return count


def _together(call: LocatedCall, values: dict[str, Any]) -> dict[str, fx.Node]:
    """Those of which the pattern gives the dimensions."""
    entries = tuple(call.pattern.aligned[name] for name in values)
    if len(values) == 1:
        ((name, value),) = values.items()
        return {name: call.insert(gather_argument, call.draw, value, name, entries[0])}
    if not values:
        return {}
    node = call.insert(gather_arguments, call.draw, tuple(values), tuple(values.values()), entries)
    return {name: call.insert(operator.getitem, node, i) for i, name in enumerate(values)}


def _alone(call: LocatedCall, name: str, value: Any) -> fx.Node:
    """Those that a function gathers, or of which the pattern says nothing."""
    aligned = call.pattern.aligned
    if name == KWARGS:
        parameters = call.signature.parameters
        extras = {key: dims for key, dims in aligned.items() if key not in parameters}
        return _with_boundaries(call, call.insert(gather_extras, call.draw, value, extras))
    entry = aligned.get(name)
    if callable(entry):
        return call.insert(entry, call.draw, value)
    return call.insert(gather_extra, call.draw, value, "*args" if name == ARGS else name)


def _with_boundaries(call: LocatedCall, extras: fx.Node) -> fx.Node:
    """Of layers that pass on whatever they are given, for kernels that else look for documents in the positions."""
    positions, mask = (call.full.get(name) for name in ("position_ids", "attention_mask"))
    if not isinstance(positions, fx.Node):
        return extras
    return call.insert(hand_boundaries, call.draw, extras, positions, mask)


def _may_follow(call: LocatedCall, name: str, value: Any) -> bool:
    """Whether an argument can carry the sequence: not the hidden states, a cache or a flag, and not excluded."""
    pattern = call.pattern
    if name in (pattern.hidden, pattern.cache):
        return False
    if name != KWARGS and (pattern.aligned.get(name) == () or not isinstance(value, (fx.Node, tuple, list))):
        return False
    parameter = call.signature.parameters.get(name)
    return parameter is None or not isinstance(parameter.default, (bool, int, float, str))
