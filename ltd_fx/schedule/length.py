"""The reserved length as a compiled graph reads it: the *shape* of a zero-byte tensor, so that no change recompiles."""

from fractions import Fraction
from functools import cache
from typing import Any

import torch

from ltd_fx.torch_private import mark_dynamic


@cache
def _ratio(share: float | None) -> tuple[int, int]:
    """The share in integers, so that a symbolic sequence length stays exact."""
    return Fraction(0.5 if share is None else share).limit_denominator(10_000).as_integer_ratio()


class ReservedLength:
    """How many tokens the layers with one ``share`` keep.

    Args:
        share: of the tokens, between 0 and 1, at which a schedule starts, or which is kept always where there is none;
            ``None``: the scheduler's own length, or half.
    """

    def __init__(self, share: float | None = None) -> None:
        self.share = share
        self._numerator, self._denominator = _ratio(share)
        self._carrier: torch.Tensor | None = None
        self._whole: int | None = None
        # Of one forward: [k, S, 0], for sequences of S tokens; only where forwards are lengthened.
        self._lengthened: torch.Tensor | None = None

    @property
    def published(self) -> int | None:
        """The scheduler's length, in tokens; ``None`` without a scheduler."""
        return None if self._carrier is None else self._carrier.shape[0]

    def publish(self, length: int, whole: int | None = None) -> None:
        """Have compiled graphs read ``length``: one tensor a length, its dimension marked dynamic.

        It is the length of every sequence; or, with ``whole``, that of sequences of so many tokens, and in proportion
        of others.
        """
        self._whole = whole
        if self.published == length:
            return
        self._carrier = _carrier(length)

    def lengthen(self, forced: torch.Tensor | None) -> None:
        """Have the forward that starts now keep as many tokens as ``forced`` names in any sequence, if these are more.

        Args:
            forced: ``[B, S]`` bool; an accelerator is waited for. ``None``: there are none.
        """
        seq_len = 0 if forced is None else forced.shape[1]
        most = 0 if forced is None or not forced.numel() else int(forced.sum(1).max())
        self._lengthened = _carrier(max(self.of(seq_len, self.published), most), seq_len)

    def tokens(self, seq_len: int) -> int:
        """The reserved length for sequences of ``seq_len`` tokens; layers run dense where it is no less than that."""
        lengthened = self._lengthened
        if lengthened is not None and lengthened.shape[1] == seq_len:
            return lengthened.shape[0]
        return self.of(seq_len, None if self._carrier is None else self._carrier.shape[0])

    def of(self, seq_len: int, length: int | None) -> int:
        """The same with ``length`` as the published one. At least one token; a proportion is rounded down."""
        if length is None:
            return self.share_of(seq_len)
        if self._whole is None:
            return length
        if length >= self._whole:
            return seq_len
        kept = length * seq_len // self._whole
        # What is compiled then knows that the length is more than 1, where a layer asks for it.
        return kept if kept > 1 else 1

    def share_of(self, seq_len: int) -> int:
        """The share of ``seq_len`` tokens, at least one."""
        return max(seq_len * self._numerator // self._denominator, 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ReservedLength":
        """Copies of a model follow the same scheduler."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the tensor, whose mark does not survive; :meth:`publish` makes it anew."""
        return {**self.__dict__, "_carrier": self.published, "_lengthened": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        length = state["_carrier"]
        self.__dict__.update(state, _carrier=None)
        if length is not None:
            self.publish(length, self._whole)


def _carrier(length: int, *others: int) -> torch.Tensor:
    tensor = torch.empty(length, *others, 0)
    if length > 1:  # A length of 1 has a graph of its own, since torch specialises sizes 0 and 1.
        mark_dynamic(tensor, 0)
    return tensor
