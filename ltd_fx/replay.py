"""Which tokens the most recent training forward kept, found again on demand: the forward itself records nothing."""

import torch
from torch import Tensor, nn

from ltd_fx.draw import Site, rank_tokens
from ltd_fx.errors import LTDError
from ltd_fx.observe import run_fake
from ltd_fx.span import Span
from ltd_fx.state import Forward, RouteState


def sampled_indices(root: nn.Module, state: RouteState, sites: list[Site]) -> dict[str, Tensor]:
    """``[B, k]`` int64 per site. The sites' shapes come from a forward under fake tensors, their draws from the key.

    Raises:
        LTDError: no training forward was seen, or it does not run on fake tensors.

    """
    forward = state.last
    if forward is None:
        raise LTDError(
            "ltd_fx.sampled_indices: no training forward of the transformed model was seen; run one (called from "
            "within a larger compiled program, it is not seen)"
        )
    observed: dict[str, tuple[int, int]] = {}
    state.observed = observed
    try:
        run_fake(root, *forward.inputs)
    finally:
        state.observed = None
    first: dict[Span, Site] = {}  # the layers of a route keep what its first one does
    found = {}
    for site in sites:
        drawing = site if site.span is None else first.setdefault(site.span, site)
        if drawing.name in observed:
            found[site.name] = _indices(drawing, forward, *observed[drawing.name])
    return found


def _indices(site: Site, forward: Forward, batch: int, seq_len: int) -> Tensor:
    keep = min(site.length.of(seq_len, forward.lengths[site.length.share]), seq_len)
    key = forward.key
    if keep == seq_len:
        return torch.arange(seq_len, device=key.device).expand(batch, seq_len)
    rows = 1 if site.state.shared else batch
    rank = rank_tokens(site.state, forward.mask, key.device, batch, seq_len)
    indices: Tensor = torch.ops.ltd_fx.sample_tokens(key, site.number.to(key.device), key, rows, seq_len, keep, rank)
    return indices.expand(batch, keep)
