"""Gather the arguments that follow the tokens: masks, rotary tables, position ids."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ltd_fx.draw import Draw
from ltd_fx.errors import LTDError


def align(draw: Draw | None, value: Any, name: str, dims: tuple[int, ...]) -> Any:
    """``value`` with only the kept tokens along ``dims``.

    Args:
        draw: the site's draw; ``None`` where the layer runs dense, and ``value`` is returned as it is.
        value: a tensor with size S (or 1, to broadcast) in each of ``dims``, nested tuples or lists of such, or None.
        name: the argument, for messages.
        dims: dimensions that carry the sequence. Dimension 0 is the batch unless listed.

    Returns:
        The same structure, k in place of S. A batch of 1 becomes B where each sequence has its own draw; an unbatched
        value gains a batch dimension then.

    Raises:
        LTDError: a size is neither S nor 1, the batch does not fit, or the value is of another type.

    """
    if draw is None or value is None or not dims:
        return value
    if isinstance(value, (tuple, list)):
        return like(value, [align(draw, item, name, dims) for item in value])
    if not isinstance(value, Tensor):
        raise LTDError(
            f"ltd_fx: {draw.site.name}: argument {name!r} is a {type(value).__name__}, and only tensors (or tuples of "
            "them) can follow the tokens; register a LayerPattern whose entry for it is a callable (draw, value)"
        )
    for dim in dims:
        if not 0 <= dim < value.ndim or value.shape[dim] not in (1, draw.seq_len):
            raise LTDError(
                f"ltd_fx: {draw.site.name}: argument {name!r} of shape {tuple(value.shape)} must have the sequence "
                f"length {draw.seq_len} (or 1) in dimension {dim}; correct `aligned` in the layer's LayerPattern"
            )
    if 0 not in dims and value.shape[0] != 1 and value.shape[0] % draw.batch != 0:
        raise LTDError(
            f"ltd_fx: {draw.site.name}: argument {name!r} of shape {tuple(value.shape)} must have the batch size "
            f"{draw.batch}, a multiple of it, or 1 in dimension 0; correct `aligned` in the layer's LayerPattern"
        )
    unbatched = 0 in dims
    dims = tuple(dim for dim in dims if value.shape[dim] != 1)
    if not dims:
        return value
    return _gather_table(draw.indices, value, dims) if unbatched else _gather_batched(draw.indices, value, dims)


def like(sequence: Any, items: list[Any]) -> Any:
    """``items`` as the kind of list, tuple or named tuple that ``sequence`` is."""
    return type(sequence)(*items) if hasattr(sequence, "_fields") else type(sequence)(items)


def _gather_table(indices: Tensor, value: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A value without batch dimension: ``[S, ...]`` to ``[B, k, ...]``, or to ``[k, ...]`` for a shared draw."""
    count = len(dims)
    gathered = value.movedim(dims, tuple(range(count)))[_grid(indices, count)]
    if indices.shape[0] == 1:
        return gathered[0].movedim(tuple(range(count)), dims)
    return gathered.movedim(tuple(range(1, count + 1)), tuple(dim + 1 for dim in dims))


def _gather_batched(indices: Tensor, value: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``[B * n, ..., S, ...]`` to ``[B * n, ..., k, ...]``; a batch of 1 to as many as there are draws."""
    count = len(dims)
    tokens = tuple(range(1, count + 1))
    moved = value.movedim(dims, tokens)
    if moved.shape[0] == 1:
        return moved[0][_grid(indices, count)].movedim(tokens, dims)
    batch: slice | Tensor = slice(None)
    if indices.shape[0] == 1:
        indices = indices[0]
    else:
        # batch times heads: the heads of one sequence lie next to each other and share its draw
        indices = indices.repeat_interleave(moved.shape[0] // indices.shape[0], dim=0)
        batch = torch.arange(moved.shape[0], device=indices.device).view(-1, *[1] * count)
    return moved[(batch, *_grid(indices, count))].movedim(tokens, dims)


def _grid(indices: Tensor, count: int) -> tuple[Tensor, ...]:
    """``indices`` ``[..., k]`` once for each of ``count`` dimensions, shaped to broadcast to ``[..., k, k]``."""
    *batch, keep = indices.shape
    return tuple(indices.reshape(*batch, *(keep if i == axis else 1 for i in range(count))) for axis in range(count))


def align_extra(draw: Draw | None, value: Any, name: str, dims: tuple[int, ...] | None) -> Any:
    """An argument that the layer takes through ``*args`` or ``**kwargs``: :func:`align`, where the pattern mentions it.

    Raises:
        LTDError: the pattern does not (``dims`` is None), and a tensor in it has a dimension as long as the sequence.

    """
    if draw is None:
        return value
    if dims is not None:
        return align(draw, value, name, dims)
    for item in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(item, Tensor) and draw.seq_len in item.shape:
            raise LTDError(
                f"ltd_fx: {draw.site.name}: argument {name!r} of shape {tuple(item.shape)} seems to carry the sequence "
                f"(S={draw.seq_len}), but the layer's LayerPattern does not mention it; give it a name in the layer's "
                "forward if it has none, and list its dimensions in `aligned`, or () if it does not"
            )
    return value


def align_extras(draw: Draw | None, extras: Mapping[str, Any], aligned: Mapping[str, Any]) -> Mapping[str, Any]:
    """All of a layer's ``**kwargs``; ``aligned`` has the dimensions of those that the pattern mentions.

    Raises:
        LTDError: as :func:`align_extra`.

    """
    if draw is None:
        return extras
    return {name: align_extra(draw, value, name, aligned.get(name)) for name, value in extras.items()}
