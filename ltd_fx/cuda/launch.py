"""Tensors to kernel arguments: addresses, strides in bytes, the widest access, grid and block.

The structs mirror those of ``kernels.cu``. Arguments have been checked by the operators; every size is 64 bits wide.
"""

import ctypes
import math

from torch import Tensor

from ltd_fx.cuda.driver import Dim3, Kernels
from ltd_fx.errors import LTDError

THREADS = 256  # of a block, but for long rows of tokens to sample
_MAX_GRID_Y = 65535  # the kernels loop over what is beyond
_PTR, _I64, _U32 = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_uint


class SampleArgs(ctypes.Structure):
    _fields_ = [
        *((name, _PTR) for name in ("key", "site", "rank", "indices")),
        *((name, _I64) for name in ("rank_row", "rank_token", "seq_len", "keep")),
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


def sample_tokens(
    kernels: Kernels, key: Tensor, site: Tensor, rows: int, seq_len: int, keep: int, rank: Tensor | None = None
) -> Tensor:
    """:func:`ltd_fx.sampling.sample`, one block a row."""
    indices = key.new_empty((rows, keep))
    if indices.numel() == 0:
        return indices
    args = SampleArgs(key.data_ptr(), site.data_ptr(), None, indices.data_ptr(), 0, 0, seq_len, keep)
    if rank is not None:
        args.rank = rank.data_ptr()
        args.rank_row, args.rank_token = rank.stride(0) if rank.shape[0] > 1 else 0, rank.stride(1)
    kernels.launch("sample_tokens", args, (rows, 1, 1), (THREADS if seq_len <= 8192 else 1024, 1, 1))
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
    tile = max(block[1], 16)  # shared by the search for its first token
    rows = (_rows(value, batch_first) for value in (rest, kept, out))
    args = MergeArgs(_indices(indices, seq_len), *rows, _row_bytes(rest), width, tile)
    kernels.launch("merge_rows", args, (-(-seq_len // tile), min(indices.shape[0], _MAX_GRID_Y), 1), block)
    return out


def _with_whole_rows(value: Tensor) -> Tensor:
    """``value`` itself where its last dimension is contiguous, else a copy."""
    return value if value.stride(-1) == 1 or value.shape[-1] == 1 else value.contiguous()


def _indices(indices: Tensor, seq_len: int) -> Indices:
    return Indices(indices.data_ptr(), indices.stride(0), indices.element_size(), *indices.shape, seq_len)


def _rows(value: Tensor, batch_first: bool) -> Rows:
    batch, row = (0, 1) if batch_first else (1, 0)
    size = value.element_size()
    batch_stride = value.stride(batch) * size if value.shape[batch] > 1 else 0
    return Rows(value.data_ptr(), batch_stride, value.stride(row) * size)


def _row_bytes(value: Tensor) -> int:
    count: int = value.shape[2] * value.element_size()
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
            *(stride * value.element_size() for stride in value.stride()[:2]),
            value.shape[2] * value.element_size(),
        )
    )
    return math.gcd(16, *sizes)


def _block(accesses: int) -> Dim3:
    """Threads of a row (for long rows a thread makes four accesses at once), and rows, of 256 threads."""
    threads = accesses if accesses <= 32 else max(32, accesses // 4)
    threads = min(THREADS, 1 << (threads - 1).bit_length())
    return threads, THREADS // threads, 1
