"""What is launched: grid, block, strides and addresses, of sizes far beyond memory, which are never touched."""

from typing import Any

import pytest
import torch
from emulate import Emulated
from torch import Tensor

from ltd_fx import LTDError
from ltd_fx.cuda import launch
from ltd_fx.ops.sampling import sample

KEY, SITE = torch.tensor(5), torch.tensor(1)
HIDDEN = torch.arange(2 * 9 * 4.0).view(2, 9, 4)
INDICES = sample(KEY, SITE, 2, 9, 4)


def recorded(name: str, run: Any) -> tuple[Any, Any, Any]:
    kernels = Emulated(run=False)
    run(kernels)
    ((launched, *rest),) = kernels.launches
    assert launched == name
    return rest[0], rest[1], rest[2]


def test_sizes_beyond_32_bits() -> None:
    """Strides, addresses and grids of tensors of five gigabytes, of which no byte is read or written."""
    batch, seq_len, dim, keep = 3, 400_000, 1024, 200_000
    hidden = torch.empty(batch, seq_len, dim, dtype=torch.bfloat16)
    indices = torch.empty(batch, keep, dtype=torch.int64)
    outs: list[Tensor] = []
    args, grid, block = recorded("gather_rows", lambda k: outs.append(launch.gather_rows(k, hidden, indices, True)))
    assert (args.rows.data, args.rows.batch_stride, args.rows.row_stride) == (hidden.data_ptr(), 819_200_000, 2048)
    assert (args.out.data, args.out.batch_stride, args.out.row_stride) == (outs[0].data_ptr(), 409_600_000, 2048)
    assert (args.bytes, args.width) == (2048, 16)
    assert (args.indices.batch, args.indices.keep, args.indices.seq_len) == (batch, keep, seq_len)
    assert (args.indices.data, args.indices.batch_stride, args.indices.item_bytes) == (indices.data_ptr(), keep, 8)
    assert (grid, block) == ((keep // 8, batch, 1), (32, 8, 1))

    kept = outs[0].transpose(0, 1)
    args, grid, block = recorded(
        "merge_rows", lambda k: launch.merge_rows(k, hidden.transpose(0, 1), indices, kept, False)
    )
    assert (args.rest.batch_stride, args.rest.row_stride) == (819_200_000, 2048)
    assert (args.out.batch_stride, args.out.row_stride) == (2048, 3 * 2048)
    assert (args.bytes, args.width, args.tile) == (2048, 16, 16)
    assert (grid, block) == ((seq_len // 16, batch, 1), (32, 8, 1))


def test_offsets_beyond_32_bits() -> None:
    """Rows that lie more than 2**31 bytes apart, read and merged by the kernels."""
    apart = 2**31 + 64
    hidden = (
        torch.empty(2 * apart + 64, dtype=torch.uint8).as_strided((1, 3, 64), (0, apart, 1)).view(torch.float8_e4m3fn)
    )
    rows = torch.arange(3 * 64, dtype=torch.uint8).view(1, 3, 64)
    hidden.view(torch.uint8).copy_(rows)
    indices, kernels = torch.tensor([[0, 2]]), Emulated()
    kept = launch.gather_rows(kernels, hidden, indices, True)
    assert torch.equal(kept.view(torch.uint8), rows[:, [0, 2]])
    merged = launch.merge_rows(kernels, hidden, indices[:, :1], kept[:, 1:], True)
    assert torch.equal(merged.view(torch.uint8), rows[:, [2, 1, 2]])


def test_a_batch_beyond_the_grid_is_looped_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MAX_GRID_Y", 2)
    hidden, indices, kernels = torch.randn(5, 40, 6), sample(KEY, SITE, 5, 40, 13), Emulated()
    kept = launch.gather_rows(kernels, hidden, indices, True)
    assert torch.equal(kept, torch.ops.ltd_fx.gather_tokens(hidden, indices))
    merged = launch.merge_rows(kernels, hidden, indices, -kept, True)
    assert torch.equal(merged, torch.ops.ltd_fx.scatter_tokens(hidden, indices, -kept))
    assert [grid[1] for _, _, grid, _ in kernels.launches] == [2, 2]


@pytest.mark.parametrize(("seq_len", "threads"), [(1, 256), (2048, 256), (8192, 256), (8193, 1024), (1_000_000, 1024)])
def test_one_block_a_row_of_samples(seq_len: int, threads: int) -> None:
    args, grid, block = recorded("sample_tokens", lambda k: launch.sample_tokens(k, KEY, SITE, 192, seq_len, 1))
    assert (args.key, args.site, args.rank) == (KEY.data_ptr(), SITE.data_ptr(), None)
    assert (args.seq_len, args.keep) == (seq_len, 1)
    assert (grid, block) == ((192, 1, 1), (threads, 1, 1))


@pytest.mark.parametrize(
    ("dim", "dtype", "offset", "width", "block"),
    [
        (2048, torch.bfloat16, 0, 16, (64, 4)),
        (1024, torch.bfloat16, 0, 16, (32, 8)),
        (2048, torch.bfloat16, 1, 2, (256, 1)),
        (2048, torch.bfloat16, 4, 8, (128, 2)),
        (2046, torch.float32, 0, 8, (256, 1)),
        (33, torch.float32, 0, 4, (32, 8)),
        (64, torch.float32, 0, 16, (16, 16)),
        (1, torch.int64, 0, 8, (1, 256)),
        (3, torch.float16, 0, 2, (4, 64)),
        (5, torch.float8_e5m2, 0, 1, (8, 32)),
    ],
)
def test_the_widest_access_that_fits(
    dim: int, dtype: torch.dtype, offset: int, width: int, block: tuple[int, int]
) -> None:
    storage = torch.empty(2 * 9 * dim + 8, dtype=dtype)
    assert storage.data_ptr() % 16 == 0
    hidden = storage[offset : offset + 2 * 9 * dim].view(2, 9, dim)
    args, _, launched = recorded("gather_rows", lambda k: launch.gather_rows(k, hidden, INDICES, True))
    assert (args.width, launched) == (width, (*block, 1))


def test_a_token_too_large_is_refused() -> None:
    hidden = torch.empty(1).expand(1, 2, 2**29)
    with pytest.raises(LTDError, match="LTD_FX_CUDA=0"):
        launch._row_bytes(hidden)
