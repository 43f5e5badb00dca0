"""What says where the documents of packed rows begin, as transformers names it, for the tokens that are kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltd_fx.runtime.records import Draw


def _boundaries(draw: Draw, ends: Tensor) -> Tensor:
    """Cumulative lengths ``[documents + 1]`` over all rows of the batch: how many kept tokens come before each."""
    starts = draw.seq_len * torch.arange(draw.batch, device=draw.indices.device)
    rows = (starts[:, None] + draw.indices).flatten()  # They are ascending.
    return torch.searchsorted(rows, ends.to(rows.dtype)).to(ends.dtype)


def _per_token(draw: Draw, number: Tensor) -> Tensor:
    """``[B | 1, S]``, the document of each token."""
    rows = max(number.shape[0], draw.indices.shape[0])
    return number.expand(rows, -1).gather(1, draw.indices.expand(rows, -1))


# `max_length_q` and `max_length_k` are upper bounds, which the kept tokens do not exceed.
PACKED: dict[str, Callable[[Draw, Any], Any]] = {
    "cu_seq_lens_q": _boundaries,
    "cu_seq_lens_k": _boundaries,
    "seq_idx": _per_token,
}
