"""Where the documents of packed rows begin, by what libraries say of it; and draws that give each its share."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ltd_fx.ops import hashes
from ltd_fx.torch_private import is_fake

# What libraries call the cumulative lengths of documents, their numbers, and positions that restart with each.
BOUNDARIES = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "cu_seqlens",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "cu_seq_lens",
    "cu_seq_q",
    "cu_seq_k",
)
NUMBERS = ("seq_idx",)
POSITIONS = ("position_ids",)


class Documents:
    """Where the documents of a forward begin, by its positions, found once for all layers."""

    def __init__(self) -> None:
        self._found: tuple[Tensor, Tensor] | None = None

    def starts_of(self, position_ids: Tensor) -> Tensor:
        """See :func:`starts_of`."""
        if torch.compiler.is_compiling():
            return starts_of(position_ids)
        if self._found is None or self._found[0] is not position_ids:
            self._found = position_ids, starts_of(position_ids)
        return self._found[1]

    def forget(self) -> None:
        """Another forward begins: positions may have been written into."""
        self._found = None


def starts_of(position_ids: Tensor) -> Tensor:
    """``[documents]`` int64: where, in a row ``[1, S]`` of positions, one is as low as any.

    How many there are decides the size of the result, so an accelerator is waited for.
    """
    row = position_ids.reshape(-1)
    if is_fake(row):  # How many they are, its values would tell.
        return row.new_zeros(1)
    return (row == row.min()).nonzero().view(-1)


def find_documents(given: Mapping[str, Any]) -> tuple[str, Tensor] | None:
    """The argument of a forward that tells documents apart, with its name."""
    for name in (*BOUNDARIES, *NUMBERS, *POSITIONS):
        if isinstance(given.get(name), Tensor):
            return name, given[name]
    return None


def documents_of(found: tuple[str, Tensor], batch: int, seq_len: int) -> Tensor | None:
    """``[B, S]`` int64, ascending along each row: which document a token is of; ``None`` for another S.

    Args:
        found: by :func:`find_documents`: cumulative lengths ``[documents + 1]`` over all rows of the batch, the
            documents' numbers ``[B | 1, S]``, or positions ``[B | 1, S]``, which go on by one within a document.
        batch: B.
        seq_len: S.
    """
    name, value = found
    if name in BOUNDARIES:
        rows = torch.arange(batch * seq_len, device=value.device)
        return torch.searchsorted(value.to(torch.int64)[1:].contiguous(), rows, right=True).view(batch, seq_len)
    if value.ndim != 2 or value.shape[1] != seq_len:
        return None
    begins = value.diff(dim=1) != (1 if name in POSITIONS else 0)
    return torch.nn.functional.pad(begins.cumsum(1), (1, 0)).expand(batch, seq_len)


def share_out(key: Tensor, site: Tensor, documents: Tensor, keep: int) -> Tensor:
    """``[B, S]`` bool: ``keep`` tokens of each row, of each document its share of them, by chance within it.

    A document with ``n`` of ``S`` tokens keeps ``n * keep / S``, rounded up or down so that the sum is ``keep`` and the
    mean over draws is exact (systematic sampling, Madow 1949).

    Args:
        key: ``[]`` int64, the forward's.
        site: ``[]`` int64, the routed layer's number.
        documents: ``[B, S]`` int64, ascending along each row.
        keep: k.
    """
    batch, seq_len = documents.shape
    hashed = hashes(key, site, batch, seq_len + 1)
    by_chance = ((documents << 32) | hashed[:, :-1]).argsort(dim=1)  # A document's tokens stay in its own places.
    documents = documents.contiguous()
    first = torch.searchsorted(documents, documents)
    end = torch.searchsorted(documents, documents, right=True)
    offset = hashed[:, -1:] % seq_len
    share = (end * keep + offset) // seq_len - (first * keep + offset) // seq_len
    chosen = torch.arange(seq_len, device=documents.device) - first < share
    return torch.zeros_like(chosen).scatter(1, by_chance, chosen)
