"""Which tokens a routed layer keeps: a sorted random subset, as a pure function of its key.

There is no generator state: the same (key, site, row) gives the same subset on every device, in a recompute under
activation checkpointing, after a resume, and in ``ltd_fx.sampled_indices``. Each token of a row gets a 32-bit hash and
the ``keep`` smallest win, so every subset is equally likely (up to ties, about S / 2**32).
"""

import torch
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


def draw_key(seed: int, step: int) -> int:
    """The key of the first forward of ``step``, in [0, 2**62); later forwards of the step add one each.

    SplitMix64's finaliser (Steele, Lea and Flood 2014) over the two words.
    """
    word = 0
    for value in (seed, step):
        word = (word + value + 0x9E3779B97F4A7C15) & (2**64 - 1)
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        word ^= word >> 31
    return word >> 2


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words held in int64: every input bit flips every output bit about half of the time."""
    x = x ^ (x >> 16)
    x = (x * _MULTIPLIERS[0]) & _MASK32
    x = x ^ (x >> 15)
    x = (x * _MULTIPLIERS[1]) & _MASK32
    return x ^ (x >> 15)


def sample(key: Tensor, site: Tensor, rows: int, seq_len: int, keep: int, rank: Tensor | None = None) -> Tensor:
    """Draw ``rows`` sorted subsets of ``keep`` tokens out of ``seq_len``.

    Args:
        key: ``[]`` int64, the forward's key (see :func:`draw_key`).
        site: ``[]`` int64, the routed layer's number.
        rows: how many independent subsets.
        seq_len: S, the number of tokens to choose from.
        keep: k, the number of tokens to choose, ``0 <= k <= S``.
        rank: ``[rows | 1, S]`` int64 of -1, 0 or 1: those of lower rank are chosen first, by chance within a rank.

    Returns:
        ``[rows, keep]`` int64 on the key's device, ascending and unique in each row.

    """
    row = torch.arange(rows, device=key.device)
    token = torch.arange(seq_len, device=key.device)
    # A two-word Feistel network absorbs the 64 bits of the key, the site and the row: distinct inputs keep distinct
    # 64-bit states, so streams of different rows do not collide the way 32-bit seeds would.
    left, right = torch.zeros_like(row), torch.zeros_like(row)
    words = (key & _MASK32, (key >> 32) & _MASK32, site & _MASK32, row, torch.zeros_like(row))
    for word, increment in zip(words, _INCREMENTS, strict=True):
        left, right = right ^ _mix(((left ^ word) + increment) & _MASK32), left
    hashed = _mix(_mix((token + left[:, None]) & _MASK32) ^ right[:, None])
    ranked = (hashed << _TOKEN_BITS) | token
    if rank is not None:
        ranked = ranked + (rank << _HASH_AND_TOKEN_BITS)
    smallest = ranked.topk(keep, dim=-1, largest=False, sorted=False).values
    return (smallest & ((1 << _TOKEN_BITS) - 1)).sort(dim=-1).values
