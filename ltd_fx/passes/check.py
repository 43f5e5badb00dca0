"""Refuse a rewritten graph that would not be right; the graph itself is left as it is.

%split  = call_function[target=split_hidden](args = (%draw, %hidden, True))     hidden: 3-D floating point?
%align  = call_function[target=align](args = (%draw, %mask, mask, (2, 3)))      mask: S in both dimensions?
%layer  = call_module[target=layers.1](args = (%kept, %align))                  reads no full-length value?
"""

import logging
from collections.abc import Mapping

import torch
from torch import fx

from ltd_fx.passes.locate import CallSite, call_sites
from ltd_fx.runtime import Draw, Site, hidden_shape
from ltd_fx.torch_private import fake_mode_of

logger = logging.getLogger(__name__)


def check(graph: fx.Graph, sites: Mapping[str, Site] | None = None) -> int:
    """Check every routed call; with ``sites`` (by layer name), its recorded values too.

    Args:
        graph: rewritten by ``locate``, ``align`` and ``route``.
        sites: where the graph was recorded from a forward (``node.meta["val"]``), the sites to check it for.

    Returns:
        How many calls were checked.

    Raises:
        LTDError: recorded hidden states are not 3-D floating point, or an aligned argument does not fit them.

    """
    count = 0
    for site in call_sites(graph):
        assert site.split is not None, f"{site.target.name} is located but not routed"
        hidden = site.split.args[1]
        assert site.arguments()[site.target.pattern.hidden] is not hidden, (
            f"{site.target.name} reads full hidden states"
        )
        assert set(site.call.users) == {site.merge}, f"{site.target.name} has readers that bypass the merge"
        if sites is not None:
            _check_values(site, sites[site.target.name])
        count += 1
    graph.lint()
    logger.debug("check: %d call sites", count)
    return count


def _check_values(call: CallSite, site: Site) -> None:
    """Run the site's own gathers on the recorded fake values: what they refuse in training they refuse here."""
    (_, hidden_node, *_) = call.draw.args
    assert isinstance(hidden_node, fx.Node)
    hidden = hidden_node.meta["val"]
    batch, seq_len = hidden_shape(site, hidden, call.target.pattern.batch_first)
    if seq_len < 2:
        return
    state = site.state
    keep = max(seq_len // 2, min(state.protected, seq_len))
    with fake_mode_of(hidden):
        indices = torch.arange(keep, device=hidden.device).expand(1 if state.shared else batch, keep)
        draw = Draw(site, indices, batch, seq_len, state.protected)
        for node in call.draw.users:
            if node not in (call.split, call.merge):
                assert callable(node.target)
                node.target(draw, *fx.node.map_arg(node.args[1:], lambda value: value.meta["val"]))
