"""Gather the arguments that follow the tokens: masks, rotary tables, position ids."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from ltd_fx.draw import Draw
from ltd_fx.errors import LTDError
from ltd_fx.tree import items_of, leaves, like


class Aligned(NamedTuple):
    """How a tensor follows the tokens, in full; a plain tuple of dimensions says as much for the usual tensor.

    Args:
        dims: the dimensions that carry the sequence.
        batch: the dimension that carries the batch, of size B, 1, or a multiple of B such as batch times heads;
            ``None``: there is none, so where each sequence has its own draw a batch dimension is put in front.
        prefix: rows along ``dims`` before those of the tokens, which all stay (a joint table of text, then image, for
            the image's layer); negative: so many first tokens have no row (a rotary table without the class token),
            and must be protected from being dropped.
        per_head: the batch dimension put in front is followed by one of size 1, to broadcast over attention heads.

    """

    dims: tuple[int, ...]
    batch: int | None = 0
    prefix: int = 0
    per_head: bool = False


def align(draw: Draw | None, value: Any, name: str, entry: tuple[Any, ...]) -> Any:
    """``value`` with only the kept tokens.

    Args:
        draw: the site's draw; ``None`` where the layer runs dense, and ``value`` is returned as it is.
        value: a tensor with size S (or 1, to broadcast) in each dimension that carries the sequence; nested tuples,
            lists, mappings or dataclasses of such; a FlexAttention ``BlockMask``; or None.
        name: the argument, for messages.
        entry: dimensions that carry the sequence (dimension 0 is the batch unless listed), or :class:`Aligned`, or one
            of them (or ``None``) for each item of ``value``.

    Returns:
        The same structure, k in place of S. A batch of 1 becomes B where each sequence has its own draw; an unbatched
        value gains a batch dimension then.

    Raises:
        LTDError: a size is neither S nor 1, the batch does not fit, or the value is of another type.

    """
    if draw is None or value is None or not entry:
        return value
    if draw.gathered is None:
        return _align(draw, value, name, entry)
    if name not in draw.gathered or draw.gathered[name][0] is not value:
        draw.gathered[name] = (value, _align(draw, value, name, entry))
    return draw.gathered[name][1]


def _align(draw: Draw, value: Any, name: str, entry: tuple[Any, ...]) -> Any:
    if value is None or not entry:
        return value
    each = not isinstance(entry, Aligned) and not isinstance(entry[0], int)
    items = items_of(value)
    if items is not None:
        if each and len(items) != len(entry):
            raise LTDError(
                f"ltd_fx: {draw.site.name}: argument {name!r} has {len(items)} items, its LayerPattern {len(entry)}"
            )
        entries: Iterable[Any] = entry if each else [entry] * len(items)
        return like(value, [_align(draw, item, name, e or ()) for item, e in zip(items, entries, strict=True)])
    if isinstance(value, BlockMask):
        return _rebuild(draw, value, name)
    if each or not isinstance(value, Tensor):
        raise LTDError(
            f"ltd_fx: {draw.site.name}: argument {name!r} is a {type(value).__name__}, and only tensors (or tuples of "
            "them) can follow the tokens; register a LayerPattern whose entry for it is a callable (draw, value)"
        )
    aligned = entry if isinstance(entry, Aligned) else Aligned(entry, None if 0 in entry else 0)
    _check(draw, value, name, aligned)
    present = aligned._replace(dims=tuple(dim for dim in aligned.dims if value.shape[dim] != 1))
    return _gather(_rows(draw, aligned.prefix), draw.batch, value, present) if present.dims else value


def _check(draw: Draw, value: Tensor, name: str, aligned: Aligned) -> None:
    remedy = "correct `aligned` in the layer's LayerPattern"

    def what() -> str:
        # only where it is needed: a layer's name in the traced path would cost a graph a layer
        return f"ltd_fx: {draw.site.name}: argument {name!r} of shape {tuple(value.shape)}"

    rows = draw.seq_len + aligned.prefix
    for dim in aligned.dims:
        if not 0 <= dim < value.ndim or value.shape[dim] not in (1, rows):
            length = f"{draw.seq_len}{aligned.prefix:+}" if aligned.prefix else draw.seq_len
            raise LTDError(f"{what()} must have the sequence length {length} (or 1) in dimension {dim}; {remedy}")
    if aligned.batch is not None:
        size = value.shape[aligned.batch] if aligned.batch < value.ndim else 0
        if aligned.batch in aligned.dims or size == 0 or (size != 1 and size % draw.batch != 0):
            raise LTDError(
                f"{what()} must have the batch size {draw.batch}, a multiple of it, or 1 in dimension {aligned.batch}; "
                f"{remedy}"
            )
    if -aligned.prefix > draw.protected:
        raise LTDError(
            f"{what()} has no row for the first {-aligned.prefix} tokens, so none of them may be dropped: pass "
            f"protect={-aligned.prefix} to ltd_fx.transform"
        )


def _rows(draw: Draw, prefix: int) -> Tensor:
    """``[B | 1, k + prefix]``: the kept tokens' rows in a table with ``prefix`` more (or, if negative, fewer) rows."""
    if prefix <= 0:
        return draw.indices[:, -prefix:] + prefix if prefix else draw.indices
    first = torch.arange(prefix, device=draw.indices.device).expand(draw.indices.shape[0], prefix)
    return torch.cat([first, draw.indices + prefix], dim=1)


def _gather(indices: Tensor, batch: int, value: Tensor, aligned: Aligned) -> Tensor:
    count = len(aligned.dims)
    if aligned.batch is None:  # [S, ...] to [B, k, ...], or to [k, ...] for a shared draw
        gathered = value.movedim(aligned.dims, tuple(range(count)))[_grid(indices, count)]
        if indices.shape[0] == 1:
            return gathered[0].movedim(tuple(range(count)), aligned.dims)
        gathered = gathered.movedim(tuple(range(1, count + 1)), tuple(dim + 1 for dim in aligned.dims))
        return gathered[:, None] if aligned.per_head else gathered
    there, here = (aligned.batch, *aligned.dims), tuple(range(count + 1))
    moved = value.movedim(there, here)
    if moved.shape[0] == 1:  # [1, S, ...] to as many as there are draws
        return moved[0][_grid(indices, count)].movedim(here, there)
    rows: slice | Tensor = slice(None)
    if indices.shape[0] == 1:
        indices = indices[0]
    else:
        # batch times heads: the heads of one sequence lie next to each other and share its draw
        indices = indices.repeat_interleave(moved.shape[0] // batch, dim=0)
        rows = torch.arange(moved.shape[0], device=indices.device).view(-1, *[1] * count)
    return moved[(rows, *_grid(indices, count))].movedim(here, there)


def _grid(indices: Tensor, count: int) -> tuple[Tensor, ...]:
    """``indices`` ``[..., k]`` once for each of ``count`` dimensions, shaped to broadcast to ``[..., k, k]``."""
    *batch, keep = indices.shape
    return tuple(indices.reshape(*batch, *(keep if i == axis else 1 for i in range(count))) for axis in range(count))


def _rebuild(draw: Draw, mask: BlockMask, name: str) -> BlockMask:
    """The block mask whose query and key numbers count the kept tokens."""
    if mask.seq_lengths != (draw.seq_len, draw.seq_len):
        raise LTDError(
            f"ltd_fx: {draw.site.name}: argument {name!r} is a BlockMask for {mask.seq_lengths} queries and keys, and "
            f"the sequence has {draw.seq_len} tokens"
        )
    indices, keep = draw.indices, draw.indices.shape[1]
    shared, full = indices.shape[0] == 1, mask.mask_mod

    def kept(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        row = indices[0] if shared else indices[b]
        return full(b, h, row[q], row[kv])

    batch, heads = mask.kv_num_blocks.shape[:2]
    batch = batch if shared else draw.batch
    device = str(indices.device)
    return create_block_mask(kept, batch, heads, keep, keep, device=device, BLOCK_SIZE=mask.BLOCK_SIZE)


def align_extra(draw: Draw | None, value: Any, name: str, entry: tuple[Any, ...] | None) -> Any:
    """An argument of which the pattern may know nothing: :func:`align`, where it does.

    Raises:
        LTDError: it does not (``entry`` is None), and a tensor in it has a dimension as long as the sequence.

    """
    if draw is None:
        return value
    if entry is not None:
        return align(draw, value, name, entry)
    for item in leaves(value):
        if isinstance(item, BlockMask) or (isinstance(item, Tensor) and draw.seq_len in item.shape):
            raise LTDError(
                f"ltd_fx: {draw.site.name}: argument {name!r} of shape {tuple(item.shape)} seems to carry the sequence "
                f"(S={draw.seq_len}), but the layer's LayerPattern does not mention it; give it a name in the layer's "
                "forward if it has none, and list its dimensions in `aligned`, or () if it does not"
            )
    return value


def align_extras(draw: Draw | None, extras: Mapping[str, Any], aligned: Mapping[str, Any]) -> Mapping[str, Any]:
    """All of a layer's ``**kwargs``; ``aligned`` has the entries of those that the pattern mentions.

    Raises:
        LTDError: as :func:`align_extra`.

    """
    if draw is None:
        return extras
    return {name: align_extra(draw, value, name, aligned.get(name)) for name, value in extras.items()}
