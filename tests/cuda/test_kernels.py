"""The CUDA kernels, run on the CPU by real threads, against the torch implementation: bit for bit."""

import ctypes

import pytest
import torch
from emulate import ARGS, Emulated
from torch import Tensor

from ltd_fx.cuda import driver, launch
from ltd_fx.ops import tokens as ops
from ltd_fx.ops.sampling import draw_key, sample

KEY, SITE = torch.tensor(-(2**40) - 7), torch.tensor(3)
gather_tokens, scatter_tokens = torch.ops.ltd_fx.gather_tokens, torch.ops.ltd_fx.scatter_tokens


@pytest.fixture
def kernels() -> Emulated:
    return Emulated()


def same(got: Tensor, expected: Tensor) -> bool:
    return got.dtype == expected.dtype and torch.equal(got, expected)


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
    for keep in {0, 1, seq_len // 2, seq_len - 1, seq_len} if seq_len < 300 else {1, seq_len // 2, seq_len}:
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


# ---- rows

# B, S, D, k
SIZES = [(2, 5, 3, 2), (1, 1, 1, 1), (1, 7, 4, 1), (3, 41, 2, 17), (2, 6, 130, 6), (2, 300, 8, 113), (1, 19, 520, 9)]
EMPTY = [(3, 4, 2, 0), (0, 5, 3, 2), (2, 5, 0, 2), (2, 0, 3, 0)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MEMORY = ["contiguous", "misaligned", "rows apart", "strided", "transposed", "expanded"]


def tensor(shape: tuple[int, ...], memory: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Random bits of ``shape``, laid out as ``memory`` says."""
    first, second, dim = shape
    stored = {
        "rows apart": (first, second, dim + 1),
        "strided": (first, second, 2 * dim),
        "transposed": (second, first, dim),
        "expanded": (1, second, dim),
    }.get(memory, shape)
    count = stored[0] * stored[1] * stored[2] + 1
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8).view(dtype)
    value = (bits[1:] if memory == "misaligned" else bits[:-1]).view(stored)
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
        gathered = launch.gather_rows(kernels, hidden, indices, batch_first)
        merged = launch.merge_rows(kernels, hidden, indices, kept, batch_first)
        bits = INTEGERS[dtype.itemsize]  # torch indexes no float8, and compares no NaNs
        hidden, kept, gathered, merged = (value.view(bits) for value in (hidden, kept, gathered, merged))
        assert torch.equal(gathered, ops.gather_rows(hidden, indices.long(), batch_first))
        assert torch.equal(merged, ops.scatter_rows(hidden, indices.long(), kept, batch_first))
        assert gathered.is_contiguous()
        assert merged.is_contiguous()


def test_samples_of_several_sites(kernels: Emulated) -> None:
    sites, rank = torch.tensor([3, 0, 7, 2**31 + 5])[::2], torch.randint(-1, 2, (3, 40))
    for some in (sites, sites[:0]):
        args = KEY, some, 3, 40, 7, rank
        assert same(launch.sample_tokens(kernels, *args), sample(*args))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rows_in_any_memory(sizes: tuple[int, ...], memory: str, kernels: Emulated) -> None:
    check(kernels, sizes, memory, torch.float32, torch.int64)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_dtype(dtype: torch.dtype, index: torch.dtype, kernels: Emulated) -> None:
    for memory in ("contiguous", "misaligned", "rows apart"):
        check(kernels, (2, 41, 24, 17), memory, dtype, index)


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty_rows(sizes: tuple[int, ...], kernels: Emulated) -> None:
    check(kernels, sizes, "contiguous", torch.float32, torch.int64)
