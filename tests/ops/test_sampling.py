"""Draws: the documented function of (key, site, row, token), uniform, and independent of each other.

All draws are fixed by their keys, so a p-value is the same in every run. ``P`` is the smallest one accepted.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from ltd_fx.errors import LTDError
from ltd_fx.ops.sampling import draw_key, hashes, sample, sample_on_cpu

P = 1e-3
SEED = 20221117


def draws(axis, count, seq_len, keep, *, site=0, first=0):
    """``[count, keep]``: as many draws of one row over steps, forwards or sites, or as many rows of one forward."""
    key = draw_key(SEED, first)
    if axis == "rows":
        return sample(torch.tensor(key), torch.tensor(site), count, seq_len, keep).numpy()
    keys_sites = {
        "steps": lambda i: (draw_key(SEED, first + i), site),
        "forwards": lambda i: (key + i, site),
        "sites": lambda i: (key, i),
    }[axis]
    each = (map(torch.tensor, keys_sites(i)) for i in range(count))
    return torch.cat([sample(key, site, 1, seq_len, keep) for key, site in each]).numpy()


def inclusion(rows, seq_len):
    """``[draws, tokens]``, 1 where a draw keeps the token."""
    kept = np.zeros((len(rows), seq_len))
    np.put_along_axis(kept, rows, 1.0, axis=1)
    return kept


def accept(statistic, degrees):
    """Neither less nor more even than chance."""
    assert P < stats.chi2.sf(statistic, degrees) < 1 - P


# ---- the function itself


def mix(x):
    x ^= x >> 16
    x = x * 0x21F0AAAD % 2**32
    x ^= x >> 15
    x = x * 0x735A2D97 % 2**32
    return x ^ x >> 15


def reference(key, site, rows, seq_len, keep):
    """The docstrings of ltd_fx.ops.sampling in Python integers."""
    increments = (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1)
    result = []
    for row in range(rows):
        left = right = 0
        for word, increment in zip((key, key >> 32, site, row, 0), increments, strict=True):
            left, right = right ^ mix(((left ^ word % 2**32) + increment) % 2**32), left
        ranked = sorted((mix(mix((token + left) % 2**32) ^ right), token) for token in range(seq_len))
        result.append(sorted(token for _, token in ranked[:keep]))
    return result


@pytest.mark.parametrize("site", [0, 1, 77])
@pytest.mark.parametrize("key", [0, 1, -1, 2**32, 2**63 - 1, -(2**63), draw_key(0, 0), draw_key(3, 10**9)])
def test_equals_the_reference(key, site):
    for rows, seq_len, keep in ((3, 37, 18), (1, 1, 1), (2, 5, 5), (2, 16, 1), (0, 4, 2), (2, 4, 0), (2, 0, 0)):
        drawn = sample(torch.tensor(key), torch.tensor(site), rows, seq_len, keep)
        operator = torch.ops.ltd_fx.sample_tokens(torch.tensor(key), torch.tensor(site), drawn, rows, seq_len, keep)
        assert (drawn.dtype, drawn.shape) == (operator.dtype, operator.shape) == (torch.int64, (rows, keep))
        assert drawn.tolist() == operator.tolist() == reference(key, site, rows, seq_len, keep)


@pytest.mark.parametrize(
    "sizes", [(3, 37, 18), (1, 1, 1), (2, 5, 5), (0, 4, 2), (2, 4, 0), (2, 0, 0), (2, 70_001, 999), (700, 131, 60)]
)
@pytest.mark.parametrize("rank_rows", [None, 1, "each"])
def test_the_cpu_draws_as_all_devices_do(sizes, rank_rows):
    rows, seq_len, _ = sizes
    shape = (rows if rank_rows == "each" else 1, seq_len)
    rank = None if rank_rows is None else torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(0))
    for key, site in itertools.product((0, -1, 2**63 - 1, draw_key(3, 10**9)), (0, 77)):
        args = torch.tensor(key), torch.tensor(site), *sizes, rank
        assert torch.equal(sample_on_cpu(*args), sample(*args))


@pytest.mark.parametrize("rank_rows", [None, 1, 3])
def test_sites_draw_together_as_each_does(rank_rows):
    key, sites = torch.tensor(2**40 + 9), torch.tensor([5, 0, 2**17, 5])
    rank = None if rank_rows is None else torch.randint(-1, 2, (rank_rows, 20))
    each = torch.stack([torch.from_numpy(np.array(reference(int(key), int(s), 3, 20, 6))) for s in sites])
    for draw in (sample, sample_on_cpu, lambda *args: torch.ops.ltd_fx.sample_tokens(*args[:2], key, *args[2:])):
        together = draw(key, sites, 3, 20, 6, rank)
        assert together.shape == (4, 3, 6)
        assert torch.equal(together, torch.stack([sample(key, site, 3, 20, 6, rank) for site in sites]))
        if rank is None:
            assert torch.equal(together, each)
        assert draw(key, sites[:0], 3, 20, 6, rank).shape == (0, 3, 6)
    with pytest.raises(LTDError, match="site 1-dim, too"):
        torch.ops.ltd_fx.sample_tokens(key, sites[None], key, 3, 20, 6)


def test_no_two_tokens_of_a_row_have_the_same_hash():
    """So there are no ties to break, here or in the kernels."""
    hashed = hashes(torch.tensor(draw_key(SEED, 0)), torch.tensor(0), 2, 1_000_000)
    assert all(len(row.unique()) == 1_000_000 for row in hashed)


def test_a_draw_neither_reads_nor_moves_a_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draws("rows", 4, 50, 25)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert np.array_equal(first, draws("rows", 4, 50, 25))


def test_a_row_does_not_depend_on_how_many_there_are():
    assert np.array_equal(draws("rows", 64, 50, 25)[:5], draws("rows", 5, 50, 25))


# ---- uniform


@pytest.mark.parametrize(
    ("axis", "seq_len", "keep"),
    [("rows", 4, 1), ("rows", 5, 4), ("rows", 7, 4), ("steps", 6, 3), ("forwards", 6, 3), ("sites", 6, 3)],
)
def test_every_subset_is_equally_likely(axis, seq_len, keep):
    rows = draws(axis, 4000 if axis == "rows" else 1000, seq_len, keep)
    subsets = {subset: i for i, subset in enumerate(itertools.combinations(range(seq_len), keep))}
    counts = np.bincount([subsets[tuple(row)] for row in rows.tolist()], minlength=len(subsets))
    assert P < stats.chisquare(counts).pvalue < 1 - P


@pytest.mark.parametrize(
    ("axis", "seq_len", "keep"),
    [
        ("rows", 37, 2),
        ("rows", 37, 18),
        ("rows", 64, 62),
        ("rows", 100, 50),
        ("rows", 197, 32),
        ("rows", 500, 250),
        ("steps", 37, 18),
        ("forwards", 37, 18),
        ("sites", 37, 18),
    ],
)
def test_tokens_and_pairs_are_equally_likely(axis, seq_len, keep):
    """Counts of tokens, and what counts of pairs tell beyond them, scaled by their variances under uniform subsets.

    Of the covariance of the pairs' inclusions (the Johnson scheme), tokens span one eigenspace, and the rest of
    dimension S (S - 3) / 2 is the other.
    """
    count = 4000 if axis == "rows" else 1000
    kept = inclusion(draws(axis, count, seq_len, keep), seq_len)
    share = keep / seq_len
    tokens = kept.sum(0) - count * share
    accept((tokens**2).sum() * (seq_len - 1) / seq_len / (count * share * (1 - share)), seq_len - 1)

    two, three, four = (
        math.comb(seq_len - n, keep - n) / math.comb(seq_len, keep) if keep >= n else 0 for n in (2, 3, 4)
    )
    pairs = kept.T @ kept - count * two
    np.fill_diagonal(pairs, 0)
    by_token = pairs.sum(0) / (seq_len - 2)
    beyond = pairs - by_token[:, None] - by_token[None, :]
    np.fill_diagonal(beyond, 0)
    # variance - 2 cov(pairs sharing a token) + cov(disjoint pairs); each pair is in the matrix twice
    accept((beyond**2).sum() / 2 / (count * (two - 2 * three + four)), seq_len * (seq_len - 3) / 2)


# ---- independent


def neighbours(axis, count):
    rows = draws(axis, count, 24, 9)
    return rows[:-1:2], rows[1::2]


# draws that differ in one thing only
PAIRS = {
    "rows": lambda: neighbours("rows", 4000),
    "steps": lambda: neighbours("steps", 1200),
    "forwards": lambda: neighbours("forwards", 1200),
    "sites": lambda: neighbours("sites", 1200),
    "rows far apart": lambda: np.split(draws("rows", 4000, 24, 9), 2),
    "the rows of two sites": lambda: (draws("rows", 4000, 24, 9), draws("rows", 4000, 24, 9, site=1)),
    "the rows of two steps": lambda: (draws("rows", 4000, 24, 9), draws("rows", 4000, 24, 9, first=1)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_draws_are_independent(pair):
    """Joint inclusions of token t in one draw and u in the other: uncorrelated for every t and u."""
    first, second = PAIRS[pair]()
    count, seq_len, keep = len(first), 24, 9
    share = keep / seq_len
    a, b = (inclusion(rows, seq_len) - share for rows in (first, second))
    variance = share * (1 - share) * seq_len / (seq_len - 1)
    accept(((a.T @ b) ** 2).sum() / (count * variance**2), (seq_len - 1) ** 2)
    overlap = stats.hypergeom(seq_len, keep, keep)
    z = ((inclusion(first, seq_len) * inclusion(second, seq_len)).sum(1).mean() - overlap.mean()) * count**0.5
    assert abs(z / overlap.std()) < stats.norm.isf(P / 2)


def test_no_two_draws_are_equal():
    seen = set()
    for step, forward, site in itertools.product((0, 1, 2, 10**6), range(3), range(6)):
        key = torch.tensor(draw_key(0, step) + forward)
        seen.update(map(tuple, sample(key, torch.tensor(site), 32, 100, 50).tolist()))
    assert len(seen) == 4 * 3 * 6 * 32


# ---- keys


def test_keys_are_distinct_int64_with_room_for_forwards():
    keys = [draw_key(seed, step) for seed in (-(2**63), -2, -1, *range(50), 2**63 - 1) for step in range(400)]
    assert all(torch.full((), key, dtype=torch.int64).item() == key for key in keys)
    assert min(keys) >= 0
    assert 2**61 < max(keys) < 2**62
    assert min(after - before for before, after in itertools.pairwise(sorted(keys))) > 1000


@pytest.mark.parametrize(
    ("state", "output"),
    [(0, 0xE220A8397B1DCDAF), (0x9E3779B97F4A7C15, 0x6E789E6AA1B965F4), (1234567, 6457827717110365317)],
)
def test_key_is_splitmix64_twice(state, output):
    """Published outputs of SplitMix64 by its state, which here is the first output for the seed, plus the step."""
    assert draw_key(0, (state - 0xE220A8397B1DCDAF) % 2**64) == output >> 2
