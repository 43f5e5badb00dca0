"""Tensors to kernel arguments: addresses, strides in bytes, the widest access, grid and block.

The structs mirror those of ``kernels.cu`` and ``align.cu``. Arguments have been checked by the operators; every size
is 64 bits wide.
"""

import ctypes
import math

from torch import Tensor

from ltd_fx.cuda.driver import Dim3, Kernels
from ltd_fx.errors import LTDError
from ltd_fx.ops import gathered_shape

THREADS = 256  # A block has so many threads, but for long rows of tokens to sample.
_MAX_GRID_Y = 65535  # The kernels loop over what is beyond.
_PTR, _I64, _U32 = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_uint


class SampleArgs(ctypes.Structure):
    _fields_ = [
        *((name, _PTR) for name in ("key", "site", "rank", "indices")),
        *((name, _I64) for name in ("rank_row", "rank_token", "rows", "seq_len", "keep")),
    ]


class Indices(ctypes.Structure):
    _fields_ = [
        ("data", _PTR),
        *((name, _I64) for name in ("batch_stride", "item_bytes", "batch", "keep", "seq_len")),
    ]


class Rows(ctypes.Structure):
    _fields_ = [("data", _PTR), ("batch_stride", _I64), ("row_stride", _I64)]


class GatherArgs(ctypes.Structure):
    _fields_ = [("indices", Indices), ("rows", Rows), ("out", Rows), ("bytes", _U32), ("width", _U32)]


class MergeArgs(ctypes.Structure):
    _fields_ = [
        ("indices", Indices),
        *((name, Rows) for name in ("rest", "kept", "out")),
        *((name, _U32) for name in ("bytes", "width", "tile")),
    ]


class Piece(ctypes.Structure):
    _fields_ = [
        *((name, _PTR) for name in ("data", "out")),
        *((name, _I64) for name in ("batch", "outer", "batch_stride", "outer_stride", "row_stride")),
        *((name, _U32) for name in ("bytes", "width", "threads")),
    ]


class AlignedArgs(ctypes.Structure):
    _fields_ = [("indices", Indices), ("pieces", Piece * 8)]


class MaskArgs(ctypes.Structure):
    _fields_ = [
        ("indices", Indices),
        *((name, _PTR) for name in ("data", "out")),
        *((name, _I64) for name in ("batch", "heads", "batch_stride", "head_stride", "row_stride", "column_stride")),
        *((name, _U32) for name in ("bytes", "count")),
    ]


def sample_tokens(
    kernels: Kernels, key: Tensor, site: Tensor, rows: int, seq_len: int, keep: int, rank: Tensor | None = None
) -> Tensor:
    """:func:`ltd_fx.ops.sampling.sample`, one block a row of a site."""
    indices = key.new_empty((*site.shape, rows, keep))
    if indices.numel() == 0:
        return indices
    site = site.contiguous()
    args = SampleArgs(key.data_ptr(), site.data_ptr(), None, indices.data_ptr(), 0, 0, rows, seq_len, keep)
    if rank is not None:
        args.rank = rank.data_ptr()
        args.rank_row, args.rank_token = rank.stride(0) if rank.shape[0] > 1 else 0, rank.stride(1)
    kernels.launch("sample_tokens", args, (rows * site.numel(), 1, 1), (THREADS if seq_len <= 8192 else 1024, 1, 1))
    return indices


def gather_rows(kernels: Kernels, hidden: Tensor, indices: Tensor, batch_first: bool) -> Tensor:
    """The kept rows.

    Args:
        kernels: of the tensors' device.
        hidden: ``[B, S, D]``, or ``[S, B, D]``.
        indices: ``[B, k]``.
        batch_first: the layout.

    Returns:
        ``[B, k, D]`` or ``[k, B, D]``, contiguous.
    """
    batch, keep = indices.shape
    out = hidden.new_empty((*((batch, keep) if batch_first else (keep, batch)), hidden.shape[2]))
    if out.numel() == 0:
        return out
    hidden, indices = _with_whole_rows(hidden), _with_whole_rows(indices)
    seq_len, width = hidden.shape[1 if batch_first else 0], _width(hidden, out)
    block = _block(_row_bytes(hidden) // width)
    rows = (_rows(value, batch_first) for value in (hidden, out))
    args = GatherArgs(_indices(indices, seq_len), *rows, _row_bytes(hidden), width)
    kernels.launch("gather_rows", args, (-(-keep // block[1]), min(batch, _MAX_GRID_Y), 1), block)
    return out


def merge_rows(kernels: Kernels, rest: Tensor, indices: Tensor, kept: Tensor, batch_first: bool) -> Tensor:
    """``rest`` with the rows at ``indices`` from ``kept``, every row read once.

    Args:
        kernels: of the tensors' device.
        rest: ``[B, S, D]``, or ``[S, B, D]``.
        indices: ``[B, k]``.
        kept: ``[B, k, D]``, or ``[k, B, D]``.
        batch_first: the layout.

    Returns:
        A fresh tensor of the shape of ``rest``, contiguous.
    """
    out = rest.new_empty(rest.shape)
    if out.numel() == 0:
        return out
    rest, kept, indices = (_with_whole_rows(value) for value in (rest, kept, indices))
    seq_len = rest.shape[1 if batch_first else 0]
    width = _width(rest, kept, out)
    block = _block(_row_bytes(rest) // width)
    tile = max(block[1], 16)  # The search for the first token shares it.
    rows = (_rows(value, batch_first) for value in (rest, kept, out))
    args = MergeArgs(_indices(indices, seq_len), *rows, _row_bytes(rest), width, tile)
    kernels.launch("merge_rows", args, (-(-seq_len // tile), min(indices.shape[0], _MAX_GRID_Y), 1), block)
    return out


def gather_aligned(kernels: Kernels, values: list[Tensor], indices: Tensor, dims: list[int]) -> list[Tensor]:
    """The kept rows of several tensors, eight to a launch.

    Args:
        kernels: of the tensors' device.
        values: ``[N, ..., S, ...]`` each, N of its own: 1, R, or anything where R is 1.
        indices: ``[R, k]``.
        dims: where S is in each.

    Returns:
        ``[N, ..., k, ...]`` each, with R in place of an N of 1; contiguous.
    """
    outs = [value.new_empty(gathered_shape(value, indices, (dim,))) for value, dim in zip(values, dims, strict=True)]
    indices = _with_whole_rows(indices)
    keep, kept = indices.shape[1], []  # Copies of values must live until the launch.
    pieces = []
    for value, dim, out in zip(values, dims, outs, strict=True):
        if out.numel() > 0:
            sizes = (value.shape[0], math.prod(value.shape[1:dim]), value.shape[dim], math.prod(value.shape[dim + 1 :]))
            kept.append(_with_whole_rows(value.reshape(sizes)))
            pieces.append(_piece(kept[-1], out))
    for first in range(0, len(pieces), 8):
        few = pieces[first : first + 8]
        args = AlignedArgs(_indices(indices, values[0].shape[dims[0]]), (Piece * 8)(*few))
        blocks = max(-(-keep // (THREADS // piece.threads)) for piece in few)
        batch = min(max(piece.batch for piece in few), _MAX_GRID_Y)
        kernels.launch("gather_aligned", args, (blocks, batch, len(few)), (THREADS, 1, 1))
    return outs


def _piece(value: Tensor, out: Tensor) -> Piece:
    """``value`` is ``[N, outer, S, row]``."""
    size, row_bytes, width = value.element_size(), _row_bytes(value), math.gcd(_width(value), out.data_ptr())
    strides = (value.stride(dim) * size if value.shape[dim] > 1 else 0 for dim in range(3))
    (threads, _, _) = _block(row_bytes // width)
    return Piece(value.data_ptr(), out.data_ptr(), out.shape[0], value.shape[1], *strides, row_bytes, width, threads)


def gather_mask(kernels: Kernels, mask: Tensor, indices: Tensor) -> Tensor:
    """The kept rows and columns.

    Args:
        kernels: of the tensors' device.
        mask: ``[N, H, S, S]``, N being 1, R, or anything where R is 1.
        indices: ``[R, k]``.

    Returns:
        ``[N, H, k, k]``, with R in place of an N of 1; contiguous.
    """
    out = mask.new_empty(gathered_shape(mask, indices, (2, 3)))
    if out.numel() == 0:
        return out
    indices = _with_whole_rows(indices)
    (batch, heads, keep, _), size = out.shape, mask.element_size()
    count = min(16 // size, 8)
    if math.gcd(out.data_ptr(), keep * size) % (count * size) != 0:
        count = 1
    stores = -(-keep // count)
    x = min(THREADS, 1 << (stores - 1).bit_length())
    block = (x, THREADS // x, 1)
    strides = (mask.stride(dim) * size if mask.shape[dim] > 1 else 0 for dim in range(4))
    rows = _indices(indices, mask.shape[2])
    args = MaskArgs(rows, mask.data_ptr(), out.data_ptr(), batch, heads, *strides, size, count)
    row_blocks = -(-keep // (4 * block[1]))  # A thread finds its columns once for four rows and more.
    grid = (-(-stores // x), min(row_blocks, _MAX_GRID_Y), min(batch, _MAX_GRID_Y))
    kernels.launch("gather_mask", args, grid, block)
    return out


def _with_whole_rows(value: Tensor) -> Tensor:
    """``value`` itself where its last dimension is contiguous, else a copy."""
    return value if value.stride(-1) == 1 or value.shape[-1] == 1 else value.contiguous()


def _indices(indices: Tensor, seq_len: int) -> Indices:
    batch_stride = indices.stride(0) if indices.shape[0] > 1 else 0
    return Indices(indices.data_ptr(), batch_stride, indices.element_size(), *indices.shape, seq_len)


def _rows(value: Tensor, batch_first: bool) -> Rows:
    batch, row = (0, 1) if batch_first else (1, 0)
    size = value.element_size()
    batch_stride = value.stride(batch) * size if value.shape[batch] > 1 else 0
    return Rows(value.data_ptr(), batch_stride, value.stride(row) * size)


def _row_bytes(value: Tensor) -> int:
    count: int = value.shape[-1] * value.element_size()
    if count >= 2**31:
        raise LTDError(f"ltd_fx: a token of {count} bytes is too large for the CUDA kernels; set LTD_FX_CUDA=0")
    return count


def _width(*values: Tensor) -> int:
    """Bytes of the widest access: 16, or the largest power of two below that every row starts at and consists of."""
    sizes = (
        size
        for value in values
        for size in (
            value.data_ptr(),
            *(stride * value.element_size() for stride in value.stride()[:-1]),
            value.shape[-1] * value.element_size(),
        )
    )
    return math.gcd(16, *sizes)


def _block(accesses: int) -> Dim3:
    """Threads of a row (for long rows a thread makes four accesses at once), and rows, of 256 threads."""
    threads = accesses if accesses <= 32 else max(32, accesses // 4)
    threads = min(THREADS, 1 << (threads - 1).bit_length())
    return threads, THREADS // threads, 1
