"""What says where the documents of packed rows begin, for the tokens that are kept."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ltd_fx.errors import LTDError
from ltd_fx.runtime.documents import BOUNDARIES, NUMBERS
from ltd_fx.runtime.kernels import is_flash, is_unknown, kernel_of
from ltd_fx.runtime.records import Draw

# What transformers' kernels are given, where they do not look for themselves.
_HANDED = ("cu_seq_lens_q", "cu_seq_lens_k")
_LONGEST = ("max_length_q", "max_length_k")


def _kept_before(draw: Draw, ends: Tensor) -> Tensor:
    """Cumulative lengths ``[documents + 1]`` over all rows of the batch: how many kept tokens come before each.

    A document that has lost all its tokens has length zero: none merges with its neighbour.

    Raises:
        LTDError: they are of another form.
    """
    if ends.ndim != 1:
        raise LTDError(
            f"ltd_fx: {draw.site.name}: boundaries of documents must be cumulative lengths [documents + 1] over all "
            f"rows of the batch, but are of shape {tuple(ends.shape)}; give the argument another name, or list it in "
            "`aligned` of the layer's LayerPattern"
        )
    starts = draw.seq_len * torch.arange(draw.batch, device=draw.indices.device)
    rows = (starts[:, None] + draw.indices).flatten()  # They are ascending.
    return torch.searchsorted(rows, ends.to(rows.dtype)).to(ends.dtype)


def _per_token(draw: Draw, number: Tensor) -> Tensor:
    """``[B | 1, S]``, the document of each token."""
    rows = max(number.shape[0], draw.indices.shape[0])
    return number.expand(rows, -1).gather(1, draw.indices.expand(rows, -1))


# The longest document's length is an upper bound, which holds for kept tokens.
PACKED: dict[str, Callable[[Draw, Any], Any]] = {
    **dict.fromkeys(BOUNDARIES, _kept_before),
    **dict.fromkeys(NUMBERS, _per_token),
}


def hand_boundaries(draw: Draw | None, extras: Mapping[str, Any], position_ids: Any, mask: Any) -> Mapping[str, Any]:
    """A layer's ``**kwargs``, with the boundaries of documents where its kernel would look for them in the positions.

    Transformers' flash attention takes a row alone in its batch for packed documents where its positions are not
    consecutive, and cuts where they are as in the first place. That token may be dropped, and positions of kept tokens
    are never consecutive. With boundaries it does not look.

    Args:
        draw: the site's.
        extras: of the call, gathered.
        position_ids: ``[1, S]`` of the call, not gathered.
        mask: the attention mask; where there is one, the kernel looks for nothing else.
    """
    if (
        draw is None
        or draw.batch != 1
        or mask is not None
        or not isinstance(position_ids, Tensor)
        or position_ids.ndim != 2
    ):
        return extras
    looks = any(is_flash(kernel_of(module)) for module in draw.site.attentions)
    if not looks or all(extras.get(name) is not None for name in (*_HANDED, *_LONGEST)):  # It goes by all or none.
        return extras
    starts = draw.site.state.documents.starts_of(position_ids)
    ends = torch.cat([starts, starts.new_full((1,), draw.seq_len)]).to(torch.int32)
    return {
        **extras,
        **dict.fromkeys(_HANDED, _kept_before(draw, ends)),
        **dict.fromkeys(_LONGEST, draw.indices.shape[1]),
    }


def restart_positions(draw: Draw | None, kept: Any, position_ids: Any, mask: Any) -> Any:
    """Positions of the kept tokens, for an attention function of the user's own that looks for documents in them.

    They are counted anew within each document, so that its first kept token is where the document begins. A layer that
    makes anything else of them is not what it was, which its proof sees.

    Args:
        draw: the site's.
        kept: ``[1, k]``, gathered.
        position_ids: ``[1, S]`` of the call.
        mask: the attention mask; where there is one, it tells documents apart.
    """
    if draw is None or draw.batch != 1 or mask is not None or not isinstance(kept, Tensor) or kept.ndim != 2:
        return kept
    if not any(is_unknown(kernel_of(module)) for module in draw.site.attentions):
        return kept
    least = position_ids.min()
    number = _per_token(draw, (position_ids == least).cumsum(1)).contiguous()
    places = torch.arange(number.shape[1], device=number.device) - torch.searchsorted(number, number)
    return (places + least).to(kept.dtype)
