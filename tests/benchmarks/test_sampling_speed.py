"""Sorted random subsets: the operator, and what others do, in eager mode and compiled.

pytest tests/benchmarks/test_sampling_speed.py --benchmark-only --benchmark-group-by=param:sizes,param:mode
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from ltd_fx.ops.lowering import register_inductor_decompositions
from ltd_fx.ops.sampling import draw_key

KEY, SITE = torch.tensor(draw_key(0, 0)), torch.tensor(1)


def ours(rows: int, seq_len: int, keep: int) -> Tensor:
    drawn: Tensor = torch.ops.ltd_fx.sample_tokens(KEY, SITE, KEY, rows, seq_len, keep)
    return drawn


def multinomial_sort(rows: int, seq_len: int, keep: int) -> Tensor:
    """DeepSpeed's way."""
    return torch.multinomial(torch.ones(rows, seq_len), keep).sort(1).values


def argsort_sort(rows: int, seq_len: int, keep: int) -> Tensor:
    return torch.rand(rows, seq_len).argsort(1)[:, :keep].sort(1).values


def topk_sort(rows: int, seq_len: int, keep: int) -> Tensor:
    return torch.rand(rows, seq_len).topk(keep, dim=1, sorted=False).indices.sort(1).values


# rows (24 layers of 8 sequences in the first), S, k
SIZES = [(192, 2048, 1024), (8, 2048, 1024), (64, 197, 98), *((1, 10**n, 10**n // 2) for n in (3, 4, 5, 6))]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("method", [ours, multinomial_sort, argsort_sort, topk_sort], ids=lambda m: m.__name__)
def test_sampling(benchmark: Any, method: Any, mode: str, sizes: tuple[int, int, int]) -> None:
    register_inductor_decompositions()
    draw = torch.compile(method, dynamic=False) if mode == "compiled" else method
    rows = draw(*sizes)
    assert rows.shape == (sizes[0], sizes[2])
    assert (rows.diff(dim=1) > 0).all()
    benchmark(draw, *sizes)
