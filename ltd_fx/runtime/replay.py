"""Which tokens the most recent training forward kept, drawn again on demand from what each call recorded."""

import torch
from torch import Tensor

from ltd_fx.errors import LTDError
from ltd_fx.runtime.records import Drawn, Site, Span


def sampled_indices(sites: list[Site]) -> dict[str, Tensor]:
    """``[B, k]`` int64 for each call of each site, by its name; the calls after the first have ``#1``, ``#2``, ...

    Raises:
        LTDError: no training forward was seen.
    """
    first: dict[Span, Site] = {}  # The layers of a route keep what its first one does.
    found = {}
    for site in sites:
        drawing = site if site.span is None else first.setdefault(site.span, site)
        for call, drawn in enumerate(drawing.drawn):
            found[f"{site.name}#{call}" if call else site.name] = _indices(drawing, call, drawn)
    if not found:
        raise LTDError(
            "ltd_fx.sampled_indices: no training forward of the transformed model was seen; run one (under torch.func, "
            "what a forward drew by the batch's mask is not kept)"
        )
    return found


def _indices(site: Site, call: int, drawn: Drawn) -> Tensor:
    key, batch, seq_len, keep, said = drawn
    if keep == seq_len:
        return torch.arange(seq_len, device=key.device).expand(batch, seq_len)
    state, number = site.state, site.number_of(call).to(key.device)
    like = torch.empty(batch, seq_len, 0, device=key.device)
    rank = state.preferences.rank(said, key, number, like, keep, state.shared)
    rows = 1 if state.shared else batch
    indices: Tensor = torch.ops.ltd_fx.sample_tokens(key, number, key, rows, seq_len, keep, rank)
    return indices.expand(batch, keep)
