"""Which tokens draws keep first: by the user's settings, and by what a forward is given."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ltd_fx.errors import LTDError
from ltd_fx.runtime.documents import documents_of, find_documents, share_out
from ltd_fx.schedule import ReservedLength
from ltd_fx.torch_private import is_functorch_wrapped_tensor

Protect = int | str | Callable[[Tensor], Tensor] | None
SAMPLING = ("per_sample", "shared", "per_document")


class Batch(NamedTuple):
    """What the arguments of one forward say of its tokens.

    Attributes:
        mask: ``[B, S]``, zero for padding, where ``protect`` names it.
        forced: ``[B, S]`` bool of tokens that are in every draw, where ``keep_mask`` names it.
        documents: what tells documents apart, with its name, where each is to keep its share.
    """

    mask: Tensor | None = None
    forced: Tensor | None = None
    documents: tuple[str, Tensor] | None = None

    def is_wrapped(self) -> bool:
        """Whether it ends with a transformation of ``torch.func``."""
        for value in (self.mask, self.forced, None if self.documents is None else self.documents[1]):
            if value is not None and is_functorch_wrapped_tensor(value):
                return True
        return False


class Preferences:
    """What ``ltd_fx.transform`` was told of the tokens to keep: its arguments of these names.

    Args:
        root: the model, whose arguments they may name.
        protect: tokens to keep first.
        keep_mask: the argument of tokens to keep in any case.
        per_document: whether each document keeps its share.

    Raises:
        LTDError: one is of another kind, no argument of ``root``, or does not go with another.
    """

    def __init__(
        self,
        root: nn.Module | None = None,
        protect: Protect = None,
        keep_mask: str | None = None,
        per_document: bool = False,
    ) -> None:
        self.protected = 0  # So many first tokens are in every draw.
        self.per_document = per_document
        self.keep_mask = keep_mask
        self._parameters = () if root is None else tuple(inspect.signature(root.forward).parameters)
        for name, value in (("protect", protect), ("keep_mask", keep_mask)):
            if isinstance(value, str) and value not in self._parameters:
                raise LTDError(f"ltd_fx.transform: {name}={value!r} is not an argument of the model's forward")
        if isinstance(protect, int) and not isinstance(protect, bool) and protect >= 0:
            self.protected = protect
            protect = protect or None
        elif protect is not None and not isinstance(protect, str) and not callable(protect):
            raise LTDError(
                "ltd_fx.transform: protect must be a number of first tokens, a function of positions, or the name of "
                f"the model's [B, S] attention mask, got {protect!r}"
            )
        if keep_mask is not None and not isinstance(keep_mask, str):
            raise LTDError(
                f"ltd_fx.transform: keep_mask must be the name of the model's [B, S] argument, got {keep_mask!r}"
            )
        if per_document and (protect is not None or keep_mask is not None):
            raise LTDError(
                "ltd_fx.transform: sampling='per_document' gives each document its share, and protect or keep_mask "
                "would take from it; leave one of them out"
            )
        self.protect = protect

    def needs_arguments(self) -> str:
        """The setting for which a forward of the model must be seen; empty if there is none."""
        if isinstance(self.protect, str):
            return f"protect={self.protect!r}"
        if self.keep_mask is not None:
            return f"keep_mask={self.keep_mask!r}"
        return "sampling='per_document'" if self.per_document else ""

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
        """What the arguments of a forward say.

        Raises:
            LTDError: one that a setting names is no ``[B, S]`` tensor of its kind, or none tells documents apart.
        """
        if not self.needs_arguments():
            return Batch()
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        mask = given.get(self.protect) if isinstance(self.protect, str) else None
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise LTDError(
                f"ltd_fx: protect={self.protect!r} names the batch's padding mask, which must be [B, S], but it is "
                f"{_said(mask)}; give the model that mask, or transform it with protect=None"
            )
        forced = None if self.keep_mask is None else given.get(self.keep_mask)
        if forced is not None and not (isinstance(forced, Tensor) and forced.ndim == 2 and forced.dtype == torch.bool):
            raise LTDError(
                f"ltd_fx: keep_mask={self.keep_mask!r} names the tokens that every draw keeps, which must be bool "
                f"[B, S], but it is {_said(forced)}"
            )
        documents = find_documents(given) if self.per_document else None
        if self.per_document and documents is None:
            raise LTDError(
                "ltd_fx: sampling='per_document' tells documents apart by the model's argument position_ids, seq_idx "
                "or cu_seq_lens_q, and is given none of them; pass one, or transform with sampling='per_sample'"
            )
        return Batch(mask, forced, documents)

    def lengthen(self, batch: Batch, lengths: Iterable[ReservedLength], shared: bool) -> None:
        """Have this forward keep all tokens that it must, where these are more than the reserved ``lengths``.

        Raises:
            LTDError: within a larger compiled program, where no number can be read.
        """
        if self.keep_mask is None:
            return
        if torch.compiler.is_compiling():
            raise LTDError(
                f"ltd_fx: keep_mask={self.keep_mask!r} decides how many tokens are kept, which a larger compiled "
                "program cannot read; compile the model itself, and call that"
            )
        torch.compiler.disable(self._lengthen)(batch, lengths, shared)

    def _lengthen(self, batch: Batch, lengths: Iterable[ReservedLength], shared: bool) -> None:
        forced = self.forced_tokens(batch)
        if forced is not None and shared:
            forced = forced.any(0, keepdim=True)
        for length in lengths:
            length.lengthen(forced)

    def forced_tokens(self, batch: Batch) -> Tensor | None:
        """``[B, S]`` bool of tokens that are in every draw, where the batch names any."""
        if batch.forced is None or not self.protected:
            return batch.forced
        return batch.forced | (torch.arange(batch.forced.shape[1], device=batch.forced.device) < self.protected)

    def rank(self, batch: Batch, key: Tensor, site: Tensor, like: Tensor, keep: int, shared: bool) -> Tensor | None:
        """``[B | 1, S]`` int64: -1 for tokens that are kept first, 1 for those dropped first (padding), else 0.

        What the batch says of another S is of another stack.

        Args:
            batch: of the forward.
            key: ``[]`` int64, the forward's.
            site: ``[]`` int64, the layer's number.
            like: ``[B, S, 0]``, on the device.
            keep: k.
            shared: one draw for the batch.

        Raises:
            LTDError: it is of another batch size, or ``protect`` returns no mask of its positions.
        """
        size, seq_len = like.shape[:2]
        rank = self._rank_positions(seq_len, like.device)
        if batch.mask is not None and _fits(batch.mask, f"protect={self.protect!r}", size, seq_len):
            padding = batch.mask.to(like.device) == 0
            # A draw for the whole batch drops first what is padding in every sequence.
            rank = (padding.all(0, keepdim=True) if shared else padding).to(torch.int64)
        forced = self.forced_tokens(batch)
        if forced is not None and _fits(forced, f"keep_mask={self.keep_mask!r}", size, seq_len):
            forced = forced.to(like.device)
            forced = forced.any(0, keepdim=True) if shared else forced
            rank = -forced.to(torch.int64) if rank is None else rank.masked_fill(forced, -1)
        if batch.documents is not None:
            documents = documents_of(batch.documents, size, seq_len)
            if documents is not None:
                rank = -share_out(key, site, documents.to(like.device), keep).to(torch.int64)
        return rank

    def _rank_positions(self, seq_len: int, device: torch.device) -> Tensor | None:
        protect = self.protect
        if protect is None or isinstance(protect, str):
            return None
        positions = torch.arange(seq_len, device=device)
        first = positions < protect if isinstance(protect, int) else protect(positions)
        if not isinstance(first, Tensor) or first.shape != positions.shape or first.dtype != torch.bool:
            raise LTDError(f"ltd_fx.transform: protect must return a bool tensor like its positions [S], got {first!r}")
        return -first.to(torch.int64)[None]


def _said(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _fits(mask: Tensor, setting: str, batch: int, seq_len: int) -> bool:
    if mask.shape[1] != seq_len:
        return False
    if mask.shape[0] != batch:
        raise LTDError(
            f"ltd_fx: {setting} names a mask of {mask.shape[0]} sequences, but hidden states have {batch}; give the "
            "model a mask with a row for each, or transform it without"
        )
    return True
