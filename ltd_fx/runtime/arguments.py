"""Gather the arguments that follow the tokens: masks, rotary tables, position ids."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from ltd_fx.errors import LTDError
from ltd_fx.ops import gather_by_indexing
from ltd_fx.runtime.eager import Plain, Take, take_maybe
from ltd_fx.runtime.packed import PACKED
from ltd_fx.runtime.records import Draw
from ltd_fx.tree import items_of, leaves, like


class Aligned(NamedTuple):
    """How a tensor follows the tokens, in full; a plain tuple of dimensions says as much for the usual tensor.

    Attributes:
        dims: the dimensions that carry the sequence.
        batch: the dimension that carries the batch, of size B, 1, or a multiple of B such as batch times heads;
            ``None``: there is none, so where each sequence has its own draw a batch dimension is put in front.
        prefix: rows along ``dims`` before those of the tokens, which all stay (a joint table of text, then image, for
            the image's layer); ``None``: as many as there are, which may differ from batch to batch; negative: so many
            first tokens have no row (a rotary table without the class token), and must be protected from being dropped.
        per_head: the batch dimension put in front is followed by one of size 1, to broadcast over attention heads.
    """

    dims: tuple[int, ...]
    batch: int | None = 0
    prefix: int | None = 0
    per_head: bool = False


def gather_argument(draw: Draw | None, value: Any, name: str, entry: tuple[Any, ...]) -> Any:
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
    (aligned,) = gather_arguments(draw, (name,), (value,), (entry,))
    return aligned


def gather_arguments(
    draw: Draw | None, names: Sequence[str], values: Sequence[Any], entries: Sequence[tuple[Any, ...]]
) -> Sequence[Any]:
    """:func:`gather_argument` for several arguments; those that carry the sequence in one dimension take one launch."""
    if draw is None:
        return values
    if draw.plain is not None and draw.gathered is None:
        return [_taken(draw, draw.plain, *each) for each in zip(names, values, entries, strict=True)]
    return _gather_together(draw, names, values, entries)


def _taken(draw: Draw, plain: Plain, name: str, value: Any, entry: tuple[Any, ...]) -> Any:
    """``value`` with only the kept tokens, on the eager path."""
    if value is None or not entry:
        return value
    if type(value) is tuple and not _is_each(entry):
        return tuple([_taken(draw, plain, name, item, entry) for item in value])
    if type(value) is Tensor:
        kind = value.shape, entry
        if kind not in plain.takes:
            plain.takes[kind] = _take_maybe(draw, plain, *_tensors(draw, value, name, entry)[0])
        take = plain.takes[kind]
        if take is not None:
            return take(draw, value)
    return _gather_together(draw, (name,), (value,), (entry,))[0]


def _take_maybe(draw: Draw, plain: Plain, value: Tensor, aligned: Aligned) -> Take | None:
    if aligned.batch != 0 or aligned.prefix != 0:
        return None
    return take_maybe(value, aligned.dims, draw.batch, len(draw.indices) != draw.batch, plain.batch_first)


def _is_each(entry: tuple[Any, ...]) -> bool:
    """Whether it has an entry for each item."""
    return not isinstance(entry, Aligned) and not isinstance(entry[0], int)


def _gather_together(
    draw: Draw, names: Sequence[str], values: Sequence[Any], entries: Sequence[tuple[Any, ...]]
) -> Sequence[Any]:
    done = {} if draw.gathered is None else draw.gathered
    given = list(zip(names, values, entries, strict=True))
    fresh = [(name, value, entry) for name, value, entry in given if name not in done or done[name][0] is not value]
    found = [_tensors(draw, value, name, entry) for name, value, entry in fresh]
    gathered = _gather(draw, [request for requests in found for request in requests])
    for name, value, entry in fresh:
        done[name] = (value, _fill(value, entry, gathered))
    return [done[name][1] for name in names]


def _tensors(draw: Draw, value: Any, name: str, entry: tuple[Any, ...]) -> list[tuple[Any, Aligned]]:
    """What is to be gathered of ``value``, in order, as dimensions that are not there to broadcast."""
    if value is None or not entry:
        return []
    each = _is_each(entry)
    items = items_of(value)
    if items is not None:
        if each and len(items) != len(entry):
            raise LTDError(
                f"ltd_fx: {draw.site.name}: argument {name!r} has {len(items)} items, its LayerPattern {len(entry)}"
            )
        pairs = zip(items, _entries(entry, len(items)), strict=True)
        return [request for item, e in pairs for request in _tensors(draw, item, name, e or ())]
    if isinstance(value, BlockMask):  # Nothing is left to gather.
        return [(_rebuild(draw, value, name), Aligned(()))]
    if each or not isinstance(value, Tensor):
        raise LTDError(
            f"ltd_fx: {draw.site.name}: argument {name!r} is a {type(value).__name__}, and only tensors (or tuples of "
            "them) can follow the tokens; register a LayerPattern whose entry for it is a callable (draw, value)"
        )
    aligned = entry if isinstance(entry, Aligned) else Aligned(entry, None if 0 in entry else 0)
    _check(draw, value, name, aligned)
    return [(value, aligned._replace(dims=tuple(dim for dim in aligned.dims if value.shape[dim] != 1)))]


def _entries(entry: tuple[Any, ...], count: int) -> Iterable[Any]:
    """Of ``count`` items: an entry each, or one for all."""
    return entry if _is_each(entry) else [entry] * count


def _fill(value: Any, entry: tuple[Any, ...] | None, gathered: list[Any]) -> Any:
    """``value`` with what :func:`_tensors` found in it replaced by the first of ``gathered``, which it takes away."""
    if value is None or not entry:
        return value
    items = items_of(value)
    if items is None:
        return gathered.pop(0)
    pairs = zip(items, _entries(entry, len(items)), strict=True)
    return like(value, [_fill(item, e, gathered) for item, e in pairs])


def _check(draw: Draw, value: Tensor, name: str, aligned: Aligned) -> None:
    remedy = "correct `aligned` in the layer's LayerPattern"

    def what() -> str:
        # The name is read here alone: in the traced path, it would cost a graph for each layer.
        return f"ltd_fx: {draw.site.name}: argument {name!r} of shape {tuple(value.shape)}"

    prefix, rows = aligned.prefix or 0, draw.seq_len + (aligned.prefix or 0)
    if aligned.prefix is None:  # As many rows as there are, and as many along each dimension.
        rows = max([draw.seq_len, *(value.shape[dim] for dim in aligned.dims if 0 <= dim < value.ndim)])
    for dim in aligned.dims:
        if not 0 <= dim < value.ndim or value.shape[dim] not in (1, rows):
            length = f"{draw.seq_len}{prefix:+}" if prefix else draw.seq_len
            raise LTDError(f"{what()} must have the sequence length {length} (or 1) in dimension {dim}; {remedy}")
    if aligned.batch is not None:
        size = value.shape[aligned.batch] if aligned.batch < value.ndim else 0
        if aligned.batch in aligned.dims or size == 0 or (size != 1 and size % draw.batch != 0):
            raise LTDError(
                f"{what()} must have the batch size {draw.batch}, a multiple of it, or 1 in dimension {aligned.batch}; "
                f"{remedy}"
            )
    if -prefix > draw.protected:
        raise LTDError(
            f"{what()} has no row for the first {-prefix} tokens, so none of them may be dropped: pass "
            f"protect={-prefix} to ltd_fx.transform"
        )


def _rows(draw: Draw, prefix: int) -> Tensor:
    """``[B | 1, k + prefix]``: the kept tokens' rows in a table with ``prefix`` more (or, if negative, fewer) rows."""
    if prefix <= 0:
        return draw.indices[:, -prefix:] + prefix if prefix else draw.indices
    first = torch.arange(prefix, device=draw.indices.device).expand(draw.indices.shape[0], prefix)
    return torch.cat([first, draw.indices + prefix], dim=1)


def _gather(draw: Draw, requests: list[tuple[Any, Aligned]]) -> list[Any]:
    """The kept rows of each; by the operators, or by indexing where they do not serve."""
    gathered = [value for value, _ in requests]
    # For each prefix, which decides the rows: the place in `requests`, the value, the dimension.
    together: dict[int, list[tuple[int, Tensor, int]]] = {}
    for place, (value, aligned) in enumerate(requests):
        if not aligned.dims:
            continue
        front = value[None] if aligned.batch is None else value.movedim(aligned.batch, 0)
        dims = tuple(dim + (aligned.batch is None or dim < aligned.batch) for dim in aligned.dims)
        rows = draw.indices.shape[0]
        # Others have batch times heads, or need a gradient, which torch.func cannot take of an operator with a formula.
        served = (front.shape[0] == 1 or rows == 1 or front.shape[0] == rows) and not value.requires_grad
        prefix = front.shape[dims[0]] - draw.seq_len if aligned.prefix is None else aligned.prefix
        if served and len(dims) == 1 and aligned.prefix is not None:
            together.setdefault(prefix, []).append((place, front, dims[0]))
        elif served and len(dims) == 2 and front.ndim <= 4:
            gathered[place] = _gather_mask(front, _rows(draw, prefix), dims)
        else:
            gathered[place] = gather_by_indexing(front, _rows(draw, prefix), dims)
    for prefix, group in together.items():
        places, values, dims = zip(*group, strict=True)
        out = torch.ops.ltd_fx.gather_aligned(list(values), _rows(draw, prefix), list(dims))
        for place, value in zip(places, out, strict=True):
            gathered[place] = value
    return [
        _in_place(draw, value, aligned) if aligned.dims else value
        for value, (_, aligned) in zip(gathered, requests, strict=True)
    ]


def _gather_mask(mask: Tensor, indices: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``[N, ...]`` with S in both ``dims``."""
    moved = mask.movedim(dims, (-2, -1))
    heads: Tensor = torch.ops.ltd_fx.gather_mask(moved if mask.ndim == 4 else moved[:, None], indices)
    return (heads if mask.ndim == 4 else heads[:, 0]).movedim((-2, -1), dims)


def _in_place(draw: Draw, value: Tensor, aligned: Aligned) -> Tensor:
    """The batch from the front to where it belongs."""
    if aligned.batch is not None:
        return value.movedim(0, aligned.batch)
    if draw.indices.shape[0] == 1:
        return value[0]
    return value[:, None] if aligned.per_head else value


def _rebuild(draw: Draw, mask: BlockMask, name: str) -> BlockMask:
    """The block mask whose query and key numbers count the kept tokens."""
    if mask.seq_lengths != (draw.seq_len, draw.seq_len):
        raise LTDError(
            f"ltd_fx: {draw.site.name}: argument {name!r} is a BlockMask for {mask.seq_lengths} queries and keys, and "
            f"the sequence has {draw.seq_len} tokens"
        )
    indices, keep = draw.indices, draw.indices.shape[1]
    shared, full = indices.shape[0] == 1, mask.mask_mod
    if indices.device.type == "cpu":
        # Inductor's C++ template garbles a symbolic size of what a mask looks up (pytorch 2.14). Sorted, for it misses
        # writes into a buffer of that length, and takes no padding that it fused.
        indices = nn.functional.pad(indices, (0, draw.seq_len - keep), value=draw.seq_len - 1).sort(dim=1).values

    def kept(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        row = indices[0] if shared else indices[b]
        return full(b, h, row[q], row[kv])

    batch, heads = mask.kv_num_blocks.shape[:2]
    batch = batch if shared else draw.batch
    device = str(indices.device)
    return create_block_mask(kept, batch, heads, keep, keep, device=device, BLOCK_SIZE=mask.BLOCK_SIZE)


def gather_extra(draw: Draw | None, value: Any, name: str) -> Any:
    """An argument of which the pattern knows nothing, as it is; but for the boundaries of packed rows.

    Raises:
        LTDError: a tensor in it has a dimension as long as the sequence.
    """
    if draw is None:
        return value
    if name in PACKED and isinstance(value, Tensor):
        return PACKED[name](draw, value)
    for item in leaves(value):
        if isinstance(item, BlockMask) or (isinstance(item, Tensor) and draw.seq_len in item.shape):
            raise LTDError(
                f"ltd_fx: {draw.site.name}: argument {name!r} of shape {tuple(item.shape)} seems to carry the sequence "
                f"(S={draw.seq_len}), but the layer's LayerPattern does not mention it; give it a name in the layer's "
                "forward if it has none, and list its dimensions in `aligned`, or () if it does not"
            )
    return value


def gather_extras(draw: Draw | None, extras: Mapping[str, Any], aligned: Mapping[str, Any]) -> Mapping[str, Any]:
    """All of a layer's ``**kwargs``; ``aligned`` has the entries of those that the pattern mentions.

    Raises:
        LTDError: as :func:`gather_argument`, and :func:`gather_extra` for the others.
    """
    if draw is None:
        return extras
    names = [name for name in extras if name in aligned]
    known = gather_arguments(draw, names, [extras[name] for name in names], [aligned[name] for name in names])
    others = {name: gather_extra(draw, value, name) for name, value in extras.items() if name not in aligned}
    return {**extras, **others, **dict(zip(names, known, strict=True))}
