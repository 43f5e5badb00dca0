"""The kernels for aligned arguments, run on the CPU by real threads, against torch's indexing: bit for bit."""

import itertools
from typing import Any

import pytest
import torch
from emulate import Emulated
from torch import Tensor

from ltd_fx.cuda import launch
from ltd_fx.ops.arguments import aligned_by_indexing, mask_by_indexing
from ltd_fx.ops.sampling import draw_key, sample

KEY, SITE = torch.tensor(draw_key(0, 0)), torch.tensor(3)
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.bool, torch.float8_e4m3fn, torch.int64, torch.complex128]
MEMORY = ["contiguous", "misaligned", "strided", "reversed", "expanded"]


@pytest.fixture
def kernels() -> Emulated:
    return Emulated()


def tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, memory: str = "contiguous") -> Tensor:
    """Random bits of ``shape``, laid out as ``memory`` says; ``reversed`` has its dimensions the other way round."""
    stored = {"strided": (*shape[:-1], 2 * shape[-1]), "reversed": shape[::-1], "expanded": (1, *shape[1:])}
    stored_shape = stored.get(memory, shape)
    generator = torch.Generator().manual_seed(sum(shape))
    high = 2 if dtype == torch.bool else 256
    count = (torch.Size(stored_shape).numel() + 1) * dtype.itemsize
    bits = torch.randint(0, high, (count,), generator=generator, dtype=torch.uint8).view(dtype)
    value = (bits[1:] if memory == "misaligned" else bits[:-1]).view(stored_shape)
    if memory == "strided":
        return value[..., ::2]
    return value.permute(*range(value.ndim)[::-1]) if memory == "reversed" else value.expand(shape)


def rows(batch: int, seq_len: int, keep: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return sample(KEY, SITE, batch, seq_len, keep).to(dtype)


def bits_of(value: Tensor) -> Tensor:
    return torch.view_as_real(value) if value.is_complex() else value.view(INTEGERS[value.dtype.itemsize])


def check_aligned(kernels: Emulated, values: list[Tensor], indices: Tensor, dims: list[int]) -> None:
    got = launch.gather_aligned(kernels, values, indices, dims)
    for out, value, dim in zip(got, values, dims, strict=True):
        (expected,) = aligned_by_indexing([bits_of(value)], indices.long(), [dim])
        assert out.dtype == value.dtype
        assert out.is_contiguous()
        assert torch.equal(bits_of(out).view(torch.uint8), expected.view(torch.uint8))


def check_mask(kernels: Emulated, mask: Tensor, indices: Tensor) -> None:
    out = launch.gather_mask(kernels, mask, indices)
    assert out.dtype == mask.dtype
    assert out.is_contiguous()
    if mask.is_complex():
        mask, out = (
            torch.view_as_real(mask).view(torch.int64).sum(-1),
            torch.view_as_real(out).view(torch.int64).sum(-1),
        )
    else:
        mask, out = bits_of(mask), bits_of(out)
    assert torch.equal(out, mask_by_indexing(mask, indices.long()))


# ---- gather_aligned


def test_what_a_layer_takes_is_gathered_in_one_launch(kernels: Emulated) -> None:
    """Rotary cos and sin, position ids and key masks, of their own sizes, dtypes and batches."""
    values = [
        tensor((1, 41, 24), torch.bfloat16),
        tensor((1, 41, 24), torch.float32),
        tensor((3, 41), torch.int64),
        tensor((3, 1, 1, 41), torch.bool),
        tensor((3, 41, 130), torch.float32),
        tensor((3, 5, 41, 2), torch.float16),
    ]
    check_aligned(kernels, values, rows(3, 41, 17), [1, 1, 1, 3, 1, 2])
    ((name, args, grid, block),) = kernels.launches
    assert (name, grid, block) == ("gather_aligned", (3, 3, 6), (256, 1, 1))
    pieces = args.pieces[:6]
    assert [(p.batch, p.outer) for p in pieces] == [(3, 1)] * 5 + [(3, 5)]
    assert [(p.bytes, p.width, p.threads) for p in pieces] == [
        (48, 16, 4),
        (96, 16, 8),
        (8, 8, 1),
        (1, 1, 1),
        (520, 8, 32),
        (4, 4, 1),
    ]
    assert [p.batch_stride for p in pieces] == [0, 0, 328, 41, 41 * 520, 5 * 41 * 4]


def test_more_than_eight_are_several_launches(kernels: Emulated) -> None:
    values = [tensor((2, 9, size)) for size in range(1, 12)]
    check_aligned(kernels, values, rows(2, 9, 4), [1] * 11)
    assert [grid[2] for _, _, grid, _ in kernels.launches] == [8, 3]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_aligned_in_any_memory_and_dtype(dtype: torch.dtype, memory: str, kernels: Emulated) -> None:
    shapes = {(3, 11): 1, (3, 11, 8): 1, (3, 2, 5, 11): 3, (3, 2, 11, 3, 2): 2, (3, 4, 11, 8): 2}
    values = [tensor(shape, dtype, memory) for shape in shapes]
    check_aligned(kernels, values, rows(3, 11, 6, torch.int32), [*shapes.values()])


@pytest.mark.parametrize(("batch", "drawn"), [(1, 1), (1, 3), (3, 1), (3, 3), (6, 1)])
@pytest.mark.parametrize("keep", [0, 1, 300])
def test_batches_and_lengths(batch: int, drawn: int, keep: int, kernels: Emulated) -> None:
    values = [tensor((batch, 300, 2)), tensor((1, 300)), tensor((batch, 0, 300))]
    check_aligned(kernels, values, rows(drawn, 300, keep), [1, 1, 2])
    check_mask(kernels, tensor((batch, 2, 40, 40)), rows(drawn, 40, min(keep, 40)))


# ---- gather_mask


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_in_any_memory_and_dtype(dtype: torch.dtype, memory: str, kernels: Emulated) -> None:
    for keep, index in itertools.product((8, 7), (torch.int32, torch.int64)):  # stored in vectors, and not
        check_mask(kernels, tensor((2, 3, 19, 19), dtype, memory), rows(2, 19, keep, index))
    counts = [args.count for _, args, _, _ in kernels.launches]
    assert counts == [min(16 // dtype.itemsize, 8)] * 2 + [1] * 2


def test_a_mask_of_several_blocks(kernels: Emulated) -> None:
    check_mask(kernels, tensor((1, 1, 600, 600)), rows(2, 600, 290))
    check_mask(kernels, tensor((1, 1, 600, 600), torch.float64), rows(1, 600, 522))
    shapes: list[Any] = [(grid, block) for _, _, grid, block in kernels.launches]
    assert shapes == [((2, 73, 2), (256, 1, 1)), ((2, 131, 1), (256, 1, 1))]


# ---- sizes


def test_a_batch_beyond_the_grid_is_looped_over(kernels: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MAX_GRID_Y", 2)
    indices = rows(5, 40, 33)
    check_aligned(kernels, [tensor((5, 40, 6)), tensor((1, 40))], indices, [1, 1])
    check_mask(kernels, tensor((5, 2, 40, 40)), indices)
    assert [grid[1:] for _, _, grid, _ in kernels.launches] == [(2, 2), (2, 2)]


def test_offsets_beyond_32_bits(kernels: Emulated) -> None:
    """Rows and columns that lie more than 2**31 bytes apart, of memory that is not touched between them."""
    apart = 2**31 + 64
    storage = torch.empty(2 * apart + 64, dtype=torch.uint8)
    table = storage.as_strided((1, 3, 64), (0, apart, 1))
    table.copy_(torch.arange(3 * 64, dtype=torch.uint8).view(1, 3, 64))
    indices = torch.tensor([[0, 2]])
    (out,) = launch.gather_aligned(kernels, [table], indices, [1])
    assert torch.equal(out[0], torch.arange(3 * 64, dtype=torch.uint8).view(3, 64)[[0, 2]])
    for strides in ((0, 0, apart, 1), (0, 0, 1, apart)):
        mask = storage.as_strided((1, 1, 3, 3), strides)
        mask.copy_(torch.arange(9, dtype=torch.uint8).view(3, 3))
        assert launch.gather_mask(kernels, mask, indices).tolist() == [[[[0, 2], [6, 8]]]]
