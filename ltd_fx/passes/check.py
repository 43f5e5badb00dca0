"""Refuse a rewritten graph that would not be right; the graph itself is left as it is.

%split  = call_function[target=split_hidden](args = (%draw, %hidden, True))           hidden: 3-D floating point?
%mask_1 = call_function[target=gather_argument](args = (%draw, %mask, mask, (2, 3)))  mask: S in both dimensions?
%layer  = call_module[target=layers.1](args = (%kept, %mask_1))                              reads no full-length value?
"""

from collections.abc import Mapping

import torch
from torch import fx

from ltd_fx.passes.graph_pass import GraphPass
from ltd_fx.passes.locate import LocatedCall, located_calls
from ltd_fx.runtime import Draw, Site, hidden_shape
from ltd_fx.torch_private import fake_mode_of


@GraphPass
def check(graph: fx.Graph, *, sites: Mapping[str, Site] | None = None) -> int:
    """Check every routed call; with ``sites`` (by layer name), its recorded values too.

    Args:
        graph: rewritten by ``locate``, ``align`` and ``route``; it stays as it is.
        sites: where the graph was recorded from a forward (``node.meta["val"]``), the sites to check it for.

    Returns:
        How many calls were changed: none.

    Raises:
        LTDError: recorded hidden states are not 3-D floating point, or an aligned argument does not fit them.
    """
    for located in located_calls(graph):
        name, hidden = located.layer.name, located.pattern.hidden
        assert located.split is not None, f"{name} is located but not routed"
        assert located.arguments()[hidden] is not located.split.args[1], f"{name} reads full hidden states"
        assert set(located.call.users) == {located.merge}, f"{name} has readers that bypass the merge"
        if sites is not None:
            _check_values(located, sites[name])
    return 0


def _check_values(located: LocatedCall, site: Site) -> None:
    """Run the site's own gathers on the recorded fake values: what they refuse in training they refuse here."""
    (_, hidden_node, *_) = located.draw.args
    assert isinstance(hidden_node, fx.Node)
    hidden = hidden_node.meta["val"]
    batch, seq_len = hidden_shape(site, hidden, located.pattern.batch_first)
    if seq_len < 2:
        return
    state = site.state
    keep = max(seq_len // 2, min(state.protected, seq_len))
    with fake_mode_of(hidden):
        indices = torch.arange(keep, device=hidden.device).expand(1 if state.shared else batch, keep)
        draw = Draw(site, indices, batch, seq_len, state.protected)
        for node in located.draw.users:
            if node not in (located.split, located.merge):
                assert callable(node.target)
                node.target(draw, *fx.node.map_arg(node.args[1:], lambda value: value.meta["val"]))
