"""Which tokens a routed layer keeps: a sorted random subset, as a pure function of its key.

There is no generator state: the same (key, site, row) gives the same subset on every device, in a recompute under
activation checkpointing, after a resume, and in ``ltd_fx.sampled_indices``. Each token of a row gets a 32-bit hash and
the ``keep`` smallest win, so every subset is equally likely. No two tokens of a row have the same hash (it is a
bijection), so there are no ties.

The function is written three times with the same result: in torch for every device and compiler, in numpy for the CPU,
and in ``cuda/kernels.cu``.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK32 = 0xFFFFFFFF
# The 32-bit finaliser "[16 21f0aaad 15 735a2d97 15]" (bias 0.107) from C. Wellons' hash-prospector tables. Both
# multipliers are below 2**31, so a product with a 32-bit word never overflows int64: the same bits from every compiler.
_MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)
# Added to each absorbed word, so that zero keys, sites and rows do not start from the hash's fixed point at zero.
_INCREMENTS = (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1)
# Tokens are numbered in the low bits of (hash, token); together they fit int64 with room to spare.
_TOKEN_BITS = 30
_HASH_AND_TOKEN_BITS = 62


def draw_key(seed: int, step: int, rank: int = 0) -> int:
    """The key of the first forward of ``step``, in [0, 2**62); later forwards of the step add one each.

    SplitMix64's finaliser (Steele, Lea and Flood 2014) over the words. ``rank`` 0 is left out: it draws as one process.
    """
    word = 0
    for value in (seed, step, rank) if rank else (seed, step):
        word = (word + value + 0x9E3779B97F4A7C15) & (2**64 - 1)
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        word ^= word >> 31
    return word >> 2


def _mix(x: Any) -> Any:
    """A bijection of 32-bit words (int, or int64 tensor): every input bit flips every output bit half of the time."""
    x = x ^ (x >> 16)
    x = (x * _MULTIPLIERS[0]) & _MASK32
    x = x ^ (x >> 15)
    x = (x * _MULTIPLIERS[1]) & _MASK32
    return x ^ (x >> 15)


def hashes(key: Tensor, site: Tensor, rows: int, seq_len: int) -> Tensor:
    """``[N, rows, seq_len]`` int64 (no N for one site), the tokens' 32-bit hashes; arguments as :func:`sample`."""
    row = torch.arange(rows, device=key.device)
    token = torch.arange(seq_len, device=key.device)
    # A two-word Feistel network absorbs the 64 bits of the key, the site and the row: distinct inputs keep distinct
    # 64-bit states, so streams of different rows do not collide the way 32-bit seeds would.
    left, right = torch.zeros_like(row), torch.zeros_like(row)
    words = (key & _MASK32, (key >> 32) & _MASK32, site[..., None] & _MASK32, row, torch.zeros_like(row))
    for word, increment in zip(words, _INCREMENTS, strict=True):
        left, right = right ^ _mix(((left ^ word) + increment) & _MASK32), left
    hashed: Tensor = _mix(_mix((token + left[..., None]) & _MASK32) ^ right[..., None])
    return hashed


def sample(key: Tensor, site: Tensor, rows: int, seq_len: int, keep: int, rank: Tensor | None = None) -> Tensor:
    """Draw ``rows`` sorted subsets of ``keep`` tokens out of ``seq_len``.

    Args:
        key: ``[]`` int64, the forward's key (see :func:`draw_key`).
        site: ``[]`` int64, the routed layer's number; or ``[N]`` those of several, which draw together.
        rows: how many independent subsets.
        seq_len: S, the number of tokens to choose from.
        keep: k, the number of tokens to choose, ``0 <= k <= S``.
        rank: ``[rows | 1, S]`` int64 of -1, 0 or 1: those of lower rank are chosen first, by chance within a rank.

    Returns:
        ``[rows, keep]`` or ``[N, rows, keep]`` int64 on the key's device, ascending and unique in each row.
    """
    ranked = (hashes(key, site, rows, seq_len) << _TOKEN_BITS) | torch.arange(seq_len, device=key.device)
    if rank is not None:
        ranked = ranked + (rank << _HASH_AND_TOKEN_BITS)
    smallest = ranked.topk(keep, dim=-1, largest=False, sorted=False).values
    return (smallest & ((1 << _TOKEN_BITS) - 1)).sort(dim=-1).values


def sample_on_cpu(key: Tensor, site: Tensor, rows: int, seq_len: int, keep: int, rank: Tensor | None = None) -> Tensor:
    """:func:`sample` for tensors on the CPU, several times as fast.

    Hashes in 32 bits and in place, and the keep-th smallest by partition, linear in S; nothing is sorted, for the
    tokens are in order already.
    """
    count = rows * site.numel()
    if count * keep == 0:
        return torch.empty((*site.shape, rows, keep), dtype=torch.int64)
    number, left, right = int(key), 0, 0
    for word, increment in zip((number, number >> 32), _INCREMENTS, strict=False):
        left, right = right ^ _mix(((left ^ (word & _MASK32)) + increment) & _MASK32), left
    row = np.arange(rows, dtype=np.uint32)
    lefts, rights = np.full(rows, left, np.uint32), np.full(rows, right, np.uint32)
    absorbed = (site.numpy()[..., None].astype(np.uint32), row, np.zeros_like(row))
    for words, increment in zip(absorbed, _INCREMENTS[2:], strict=True):
        lefts, rights = rights ^ _mix_in_place((lefts ^ words) + np.uint32(increment)), lefts
    hashed = np.arange(seq_len, dtype=np.uint32) + lefts[..., None]
    hashed = _mix_in_place(np.bitwise_xor(_mix_in_place(hashed), rights[..., None], out=hashed))
    ranked: NDArray[Any] = hashed
    if rank is not None:
        ranked = hashed + ((rank.numpy() + 1).astype(np.uint64) << np.uint64(32))
    last = np.partition(ranked, keep - 1, axis=-1)[..., keep - 1 : keep]
    indices = np.flatnonzero(ranked <= last).reshape(count, keep)
    indices -= np.arange(count)[:, None] * seq_len
    return torch.from_numpy(indices.reshape(*site.shape, rows, keep))


def _mix_in_place(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """:func:`_mix`, into its argument."""
    shifted = x >> np.uint32(16)
    x ^= shifted
    for multiplier in _MULTIPLIERS:
        x *= np.uint32(multiplier)
        np.right_shift(x, np.uint32(15), out=shifted)
        x ^= shifted
    return x
