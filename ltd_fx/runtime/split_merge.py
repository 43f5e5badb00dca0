"""Gather before a layer, scatter after it, as a pair whose gradients are each other.

``rest, kept = split(hidden, indices)`` and ``out = merge(rest, indices, layer(kept))``: the rows of ``rest`` at
``indices`` are holes that nobody reads, so merge's backward may leave anything there and split's backward overwrites
them. No zero-filled gradient, no addition of two full gradients, nothing saved but the indices.
"""

from typing import Any

import torch
from torch import Tensor

from ltd_fx.errors import LTDError
from ltd_fx.runtime.eager import merge, split
from ltd_fx.runtime.records import Draw
from ltd_fx.tree import items_of, leaves, like


class _Split(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: Tensor, indices: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        return hidden.view_as(hidden), torch.ops.ltd_fx.gather_tokens(hidden, indices, batch_first)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, indices, ctx.batch_first = inputs
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_rest, grad_kept = grads
        (indices,) = ctx.saved_tensors
        return merge_tokens(grad_rest, indices, grad_kept, ctx.batch_first), None, None


class _Merge(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(rest: Tensor, indices: Tensor, kept: Tensor, batch_first: bool) -> Tensor:
        merged: Tensor = torch.ops.ltd_fx.scatter_tokens(rest, indices, kept, batch_first)
        return merged

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, indices, _, ctx.batch_first = inputs
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (grad,) = grads
        (indices,) = ctx.saved_tensors
        grad_rest, grad_kept = split_tokens(grad, indices, ctx.batch_first)
        return grad_rest, None, grad_kept, None


def split_tokens(hidden: Tensor, indices: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """``hidden`` with its kept rows declared unread, and those rows ``[B, k, D]`` (``[k, B, D]``) for the layer."""
    rest, kept = _Split.apply(hidden, indices, batch_first)
    return rest, kept


def merge_tokens(rest: Tensor, indices: Tensor, kept: Tensor, batch_first: bool) -> Tensor:
    """The stream after the layer: dropped rows from ``rest``, kept rows from the layer's output ``kept``."""
    merged: Tensor = _Merge.apply(rest, indices, kept, batch_first)
    return merged


def split_hidden(draw: Draw | None, hidden: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """The stream that waits for :func:`merge_output`, and the hidden states that the layer sees."""
    if draw is None:
        return hidden, hidden
    if draw.plain is not None:
        return split(hidden, draw.indices, draw.plain)
    return split_tokens(hidden, draw.indices.expand(draw.batch, -1), batch_first)


def merge_output(
    draw: Draw | None,
    rest: Tensor | None,
    output: Any,
    slot: int | None,
    batch_first: bool,
    returned: tuple[tuple[int, Any], ...] = (),
    dropped: tuple[int, ...] = (),
) -> Any:
    """The layer's output with its hidden states back at full length, cast to the stream's dtype.

    Args:
        draw: the site's draw; ``None``: the layer ran dense, and its output is returned as it is.
        rest: from :func:`split_hidden`; ``None``: the dropped tokens stay out for the next layer.
        output: the layer's.
        slot: where in it the hidden states are.
        batch_first: their layout.
        returned: pairs of a further slot and the full-length argument that the layer hands on in it, or ``None`` for
            a tensor that does not carry the sequence.
        dropped: further slots to replace with ``None``.

    Raises:
        LTDError: the hidden states are not in ``slot``, or another slot holds a tensor, which is of kept tokens only.
    """
    if draw is None:
        return output
    if isinstance(output, Tensor):
        return _merged(draw, rest, output, batch_first)
    items = items_of(output)
    if slot is None or items is None or slot >= len(items) or not isinstance(items[slot], Tensor):
        raise LTDError(
            f"ltd_fx: {draw.site.name} returned a {type(output).__name__}, but its LayerPattern says output={slot}; "
            "give the slot of the hidden states in its tuple"
        )
    known = dict(returned)
    for i, item in enumerate(items):
        if i == slot:
            items[i] = _merged(draw, rest, item, batch_first)
        elif i in dropped:
            items[i] = None
        elif item is not None and known.get(i) is not None:
            items[i] = known[i]
        elif i not in known and any(isinstance(leaf, Tensor) for leaf in leaves(item)):
            shape = next(tuple(leaf.shape) for leaf in leaves(item) if isinstance(leaf, Tensor))
            raise LTDError(
                f"ltd_fx: {draw.site.name} also returns a tensor of shape {shape} in slot {i}, computed from the kept "
                "tokens only; "
                "switch that output (attention weights?) off in training, or list it in `returned` or `dropped` of its "
                "LayerPattern"
            )
    return like(output, items)


def _merged(draw: Draw, rest: Tensor | None, kept: Tensor, batch_first: bool) -> Tensor:
    if rest is None:
        return kept
    if kept.dtype != rest.dtype:
        kept = kept.to(rest.dtype)
    if draw.plain is not None:
        return merge(rest, draw.indices, kept, draw.plain)
    return merge_tokens(rest, draw.indices.expand(draw.batch, -1), kept, batch_first)
