"""The CUDA kernels, run on the CPU by real threads, against the torch implementation: bit for bit."""

import ctypes
import itertools

import pytest
import torch
from emulate import Emulated
from torch import Tensor

from ltd_fx.cuda import driver, launch, ops
from ltd_fx.sampling import draw_key, sample

KEY, SITE = torch.tensor(-(2**40) - 7), torch.tensor(3)
ARGS = {
    "sample_tokens": launch.SampleArgs,
    "gather_rows": launch.GatherArgs,
    "merge_rows": launch.MergeArgs,
}
gather_tokens, scatter_tokens = torch.ops.ltd_fx.gather_tokens, torch.ops.ltd_fx.scatter_tokens


@pytest.fixture
def kernels() -> Emulated:
    return Emulated()


def same(got: Tensor, expected: Tensor) -> bool:
    """The same bits, NaNs included."""
    got, expected = (value.contiguous().view(torch.uint8) for value in (got, expected))
    return torch.equal(got, expected)


@pytest.mark.parametrize("name", driver.NAMES)
def test_arguments_have_the_layout_that_the_kernel_reads(name: str, kernels: Emulated) -> None:
    size_of = getattr(kernels.library, f"sizeof_{name}")
    size_of.restype = ctypes.c_ulong
    assert size_of() == ctypes.sizeof(ARGS[name])


# ---- sample_tokens


@pytest.mark.parametrize("key", [0, -1, 2**32, 2**63 - 1, -(2**63), draw_key(3, 10**9)])
def test_samples_of_any_key(key: int, kernels: Emulated) -> None:
    for site in (0, 77):
        args = torch.tensor(key), torch.tensor(site), 3, 37, 18
        assert same(launch.sample_tokens(kernels, *args), sample(*args))


@pytest.mark.parametrize("seq_len", [1, 2, 31, 33, 257, 2048, 4097, 8193])
def test_samples_of_any_length(seq_len: int, kernels: Emulated) -> None:
    for keep in {0, 1, seq_len // 2, seq_len - 1, seq_len}:
        assert same(launch.sample_tokens(kernels, KEY, SITE, 1, seq_len, keep), sample(KEY, SITE, 1, seq_len, keep))


@pytest.mark.parametrize("seq_len", [100_003, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_samples_of_long_rows(seq_len: int, kernels: Emulated) -> None:
    keep = seq_len // 3
    assert same(launch.sample_tokens(kernels, KEY, SITE, 1, seq_len, keep), sample(KEY, SITE, 1, seq_len, keep))


@pytest.mark.parametrize("rows", [1, 3])
def test_samples_by_rank(rows: int, kernels: Emulated) -> None:
    rank = torch.randint(-1, 2, (300, 2 * rows), generator=torch.Generator().manual_seed(0)).T[::2]
    counts = [int((rank == level).sum()) for level in (-1, 0)]
    for keep in (1, counts[0] // rows, counts[0] // rows + 5, sum(counts) // rows + 5, 299, 300):
        args = KEY, SITE, 3, 300, keep, rank
        assert same(launch.sample_tokens(kernels, *args), sample(*args))


def test_samples_with_equal_hashes_keep_the_first_tokens(kernels: Emulated) -> None:
    """Two tokens of a row of 60,000 that share their hash, kept or not by their order."""
    from ltd_fx import sampling

    row_of = sampling.hashes(KEY, SITE, 1, 60_000)[0]
    order = row_of.sort(stable=True)
    (ties,) = torch.nonzero(order.values[1:] == order.values[:-1], as_tuple=True)
    assert len(ties), "choose another key"
    keep = int(ties[0]) + 1  # the first of the two is the last one kept
    got = launch.sample_tokens(kernels, KEY, SITE, 1, 60_000, keep)
    first, second = order.indices[keep - 1 : keep + 1].tolist()
    assert first < second
    assert first in got
    assert second not in got
    assert same(got, sample(KEY, SITE, 1, 60_000, keep))


# ---- rows

# B, S, D, k
SIZES = [(2, 5, 3, 2), (1, 1, 1, 1), (1, 7, 4, 1), (3, 41, 2, 17), (2, 6, 130, 6), (2, 300, 8, 113), (1, 19, 520, 9)]
EMPTY = [(3, 4, 2, 0), (0, 5, 3, 2), (2, 5, 0, 2), (2, 0, 3, 0)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
MEMORY = ["contiguous", "misaligned", "rows apart", "strided", "transposed", "expanded"]


def tensor(shape: tuple[int, ...], memory: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Random bits of ``shape``, laid out as ``memory`` says."""
    generator = torch.Generator().manual_seed(seed)
    first, second, dim = shape
    stored = {
        "misaligned": (first, second, dim),
        "rows apart": (first, second, dim + 1),
        "strided": (first, second, 2 * dim),
        "transposed": (second, first, dim),
        "expanded": (1, second, dim),
    }.get(memory, shape)
    count = dtype.itemsize * (stored[0] * stored[1] * stored[2] + 1)
    bits = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype)
    value = bits[1:].view(stored) if memory == "misaligned" else bits[:-1].view(stored)
    if memory == "rows apart":
        return value[..., :dim]
    if memory == "strided":
        return value[..., ::2]
    return value.transpose(0, 1) if memory == "transposed" else value.expand(shape)


def check(kernels: Emulated, sizes: tuple[int, ...], memory: str, dtype: torch.dtype, index: torch.dtype) -> None:
    batch, seq_len, dim, keep = sizes
    indices = sample(KEY, SITE, batch, seq_len, keep).to(index)
    for batch_first in (True, False):
        full, few = ((batch, seq_len), (batch, keep)) if batch_first else ((seq_len, batch), (keep, batch))
        hidden, kept = tensor((*full, dim), memory, dtype, 0), tensor((*few, dim), memory, dtype, 1)
        (gathered,) = launch.gather_rows(kernels, [hidden], indices, batch_first)
        merged = launch.merge_rows(kernels, hidden, indices, kept, batch_first)
        expected = gather_tokens(hidden.double(), indices, batch_first), scatter_tokens(
            hidden.double(), indices, kept.double(), batch_first
        )
        for got, bits in zip((gathered, merged), expected, strict=True):
            assert got.is_contiguous()
            assert got.shape == bits.shape


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("sizes", SIZES + EMPTY, ids=str)
def test_rows(sizes: tuple[int, ...], memory: str, kernels: Emulated) -> None:
    check(kernels, sizes, memory, torch.float32, torch.int64)
