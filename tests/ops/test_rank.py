"""``sample_tokens`` with ``rank``: tokens of lower rank first, by chance within a rank."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from ltd_fx import LTDError

KEY, SITE = torch.tensor(-(2**40) - 7), torch.tensor(3)
RANKS = {
    "each": torch.tensor([[0, -1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0, -1]]),
    "all": torch.tensor([[-1, 0, 1] * 2 + [0]]),
}


@pytest.mark.parametrize("rank", RANKS)
def test_opcheck_vmap_and_compile_with_rank(rank: str) -> None:
    sample, like, table = torch.ops.ltd_fx.sample_tokens, torch.empty(2, 7, 0), RANKS[rank]
    torch.library.opcheck(sample.default, (KEY, SITE, like, 2, 7, 3, table))
    for keep in range(8):
        worst = sample(KEY, SITE, like, 2, 7, keep, table)
        ranks = table.expand(2, 7).gather(1, worst)
        assert ranks.sort(1).values.tolist() == table.expand(2, 7).sort(1).values[:, :keep].tolist()
    expected = sample(KEY, SITE, like, 6, 7, 3, table.expand(2, 7).repeat(3, 1) if len(table) > 1 else table)
    tables = table.expand(3, *table.shape)
    for dim, given in ((None, table), (0, tables), (2, tables.movedim(0, 2))):
        rows = torch.vmap(lambda like, r: sample(KEY, SITE, like, 2, 7, 3, r), (0, dim))(torch.empty(3, 0), given)
        assert torch.equal(rows.flatten(0, 1), expected)
    compiled = torch.compile(lambda *args: sample(*args), fullgraph=True, backend="aot_eager", dynamic=True)
    for keep in (3, 5):
        args = (KEY, SITE, like, 2, 7, keep, table)
        assert torch.equal(compiled(*args), sample(*args))


BAD_RANKS = {
    (2, 7, torch.int32): "rank must be a 2-dim int64 tensor, got 2-dim torch.int32",
    (2, 7, torch.bool): "got 2-dim torch.bool",
    (7, torch.long): "got 1-dim torch.int64",
    (1, 2, 7, torch.long): "got 3-dim",
    (2, 6, torch.long): r"rank must be \[2 or 1, 7\], got \(2, 6\)",
    (3, 7, torch.long): r"got \(3, 7\)",
}


@pytest.mark.parametrize("bad", BAD_RANKS, ids=str)
def test_bad_ranks_are_refused(bad: Any) -> None:
    *shape, dtype = bad
    args = (KEY, SITE, torch.empty(0), 2, 7, 3, torch.zeros(shape, dtype=dtype))
    for tensors in (args, tree_map_only(Tensor, FakeTensorMode().from_tensor, args)):
        with pytest.raises(LTDError, match=BAD_RANKS[bad]):
            torch.ops.ltd_fx.sample_tokens(*tensors)
