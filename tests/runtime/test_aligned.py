"""What :class:`ltd_fx.Aligned` says and what becomes of block masks, against plain indexing."""

import collections
import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ltd_fx import Aligned, LTDError
from ltd_fx.runtime.arguments import gather_argument
from ltd_fx.runtime.eager import plain_draws
from ltd_fx.runtime.records import Draw, Site
from ltd_fx.runtime.state import RouteState

BATCH, SEQ, HEADS, DIM = 3, 7, 2, 4
INDICES = torch.tensor([[0, 1, 2, 5], [0, 1, 3, 4], [0, 1, 4, 6]])
DRAWS = pytest.mark.parametrize("indices", [INDICES, INDICES[2:]], ids=["per_sample", "shared"])


EAGER = False  # Whether draws are those of the eager path.


@pytest.fixture(autouse=True, params=[False, True], ids=["operators", "eager"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.EAGER", request.param)


def draw_of(indices: Tensor = INDICES, seq_len: int = SEQ, protected: int = 2) -> Draw:
    state = RouteState(None, seed=0, shared=len(indices) == 1, routed=1, dense=0)
    plain = plain_draws(indices[None], BATCH, seq_len, True)[0][1] if EAGER else None
    return Draw(Site("layers.1", 0, nn.Identity(), state), indices, BATCH, seq_len, protected, plain=plain)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def expected(value: Tensor, entry: Aligned, indices: Tensor) -> Tensor:
    """Entry by entry; with the batch in front, each sequence in turn."""
    first = list(range(max(entry.prefix, 0)))
    tables = [first + [t + entry.prefix for t in row if t + entry.prefix >= 0] for row in indices.tolist()]

    def gathered(value: Tensor, rows: list[int], dims: list[int]) -> Tensor:
        columns = [rows if d in dims and n != 1 else range(n) for d, n in enumerate(value.shape)]
        entries = [value[place] for place in itertools.product(*columns)]
        return torch.stack(entries).view([len(column) for column in columns])

    if entry.batch is None:
        each = [gathered(value, rows, [*entry.dims]) for rows in tables]
        return each[0] if len(each) == 1 else torch.stack(each)[:, None] if entry.per_head else torch.stack(each)
    dims = [d - (d > entry.batch) for d in entry.dims]
    samples = value.movedim(entry.batch, 0)
    if len(samples) == 1:
        samples = samples.expand(len(tables), *samples.shape[1:])
    if len(tables) == 1:
        tables = tables * BATCH
    heads = max(len(samples) // BATCH, 1)
    each = [gathered(sample, tables[i // heads], dims) for i, sample in enumerate(samples)]
    return torch.stack(each).movedim(0, entry.batch)


ENTRIES = {
    "batch in dimension 1": ((3, BATCH, SEQ, DIM), Aligned((2,), 1)),
    "batch in dimension 1, sequence first": ((SEQ, BATCH, DIM), Aligned((0,), 1)),
    "batch between": ((SEQ, BATCH, SEQ), Aligned((0, 2), 1)),
    "batch last": ((SEQ, SEQ, BATCH), Aligned((1, 0), 2)),
    "batch of one": ((2, 1, SEQ), Aligned((2,), 1)),
    "mask": ((BATCH, 1, SEQ, SEQ), Aligned((2, 3))),
    "mask of all": ((1, 1, SEQ, SEQ), Aligned((2, 3))),
    "mask, per head": ((BATCH, HEADS, SEQ, SEQ), Aligned((2, 3))),
    "padding": ((BATCH, 1, 1, SEQ), Aligned((2, 3))),
    "table of all": ((1, SEQ, DIM), Aligned((1,))),
    "table": ((BATCH, SEQ, DIM), Aligned((1,))),
    "ids": ((BATCH, SEQ), Aligned((1,))),
    "batch times heads": ((BATCH * HEADS, SEQ, SEQ), Aligned((1, 2), 0)),
    "batch times heads in dimension 1": ((2, BATCH * HEADS, SEQ, 1), Aligned((2, 3), 1)),
    "heads first": ((HEADS, SEQ, SEQ), Aligned((1, 2), None)),
    "heads between": ((SEQ, HEADS, 1, SEQ), Aligned((0, 3), None)),
    "per head": ((SEQ, DIM), Aligned((0,), None, per_head=True)),
    "per head has no say with a batch": ((BATCH, SEQ), Aligned((1,), 0, per_head=True)),
    "joint table": ((BATCH, 3 + SEQ, DIM), Aligned((1,), 0, 3)),
    "joint table without batch": ((3 + SEQ, DIM), Aligned((0,), None, 3)),
    "joint mask": ((BATCH, HEADS, 3 + SEQ, 3 + SEQ), Aligned((2, 3), 0, 3)),
    "joint mask, broadcast": ((1, 1, 1, 3 + SEQ), Aligned((2, 3), 0, 3)),
    "no class token": ((SEQ - 1, DIM), Aligned((0,), None, -1)),
    "no class token, per head": ((SEQ - 2, DIM), Aligned((0,), None, -2, True)),
    "no class token, batched": ((BATCH, SEQ - 2, SEQ - 2), Aligned((1, 2), 0, -2)),
    "one row is the table": ((BATCH, 1, DIM), Aligned((1,), 0, 3)),
}


@DRAWS
@pytest.mark.parametrize("which", ENTRIES)
def test_values(which: str, indices: Tensor) -> None:
    shape, entry = ENTRIES[which]
    value = randn(*shape)
    aligned = gather_argument(draw_of(indices), value, "table", entry)
    assert torch.equal(aligned, expected(value, entry, indices))


def test_values_by_hand() -> None:
    """That ``expected`` above expects the right thing."""
    table, heads = torch.arange(SEQ - 2), torch.arange(HEADS * SEQ).view(HEADS, SEQ)
    assert gather_argument(draw_of(), table, "table", Aligned((0,), None, -2)).tolist() == [[0, 3], [1, 2], [2, 4]]
    joint = gather_argument(draw_of(), torch.arange(SEQ + 2), "table", Aligned((0,), None, 2, True))
    assert joint.tolist() == [[[0, 1, 2, 3, 4, 7]], [[0, 1, 2, 3, 5, 6]], [[0, 1, 2, 3, 6, 8]]]
    shared = gather_argument(draw_of(INDICES[:1]), heads, "table", Aligned((1,), None))
    assert shared.tolist() == [[0, 1, 2, 5], [7, 8, 9, 12]]
    assert gather_argument(draw_of(), heads, "table", Aligned((1,), None))[1].tolist() == [[0, 1, 3, 4], [7, 8, 10, 11]]


Rotary = collections.namedtuple("Rotary", "cos sin")


@dataclasses.dataclass(frozen=True)
class Bundle:
    mask: Any
    rotary: Any = None
    table: Any = None


@DRAWS
def test_nested_structures_with_an_entry_for_each_item(indices: Tensor) -> None:
    mask, table, joint, other = randn(BATCH, SEQ), randn(SEQ, DIM), randn(BATCH, SEQ + 2), randn(BATCH, SEQ)
    row, flat, prefixed = Aligned((1,), 0), Aligned((0,), None), Aligned((1,), 0, 2)
    entry = ((1,), (flat, None), (prefixed, ((1,), (0,))))
    draw = draw_of(indices)
    wanted = [expected(mask, row, indices), expected(table, flat, indices), expected(joint, prefixed, indices)]

    def check(value: Any, parts: Any) -> Any:
        aligned = gather_argument(draw, value, "given", entry)
        assert type(aligned) is type(value)
        first, (second, kept), (third, (fourth, fifth)) = parts(aligned)
        for ours, theirs in zip((first, second, third, fourth, fifth), (*wanted, wanted[0], wanted[1]), strict=True):
            assert torch.equal(ours, theirs)
        assert kept is other
        return aligned

    inner, deep = Rotary(table, other), [joint, (mask, table)]
    assert type(check((mask, inner, deep), tuple)[1]) is Rotary
    assert type(check([mask, inner, tuple(deep)], list)[2]) is tuple
    assert list(check({"m": mask, "r": inner, "d": deep}, lambda aligned: aligned.values())) == ["m", "r", "d"]
    check(collections.OrderedDict(m=mask, r=[*inner], d=deep), lambda aligned: aligned.values())
    assert type(check(Bundle(mask, inner, deep), lambda b: (b.mask, b.rotary, b.table)).table) is list
    shared = gather_argument(draw, Bundle(mask, {"a": mask}, (None, mask)), "given", (1,))  # one entry for all
    assert all(torch.equal(item, wanted[0]) for item in (shared.mask, shared.rotary["a"], shared.table[1]))


@pytest.mark.parametrize(
    ("value", "entry", "message"),
    [
        (randn(SEQ + 2, DIM), Aligned((0,), None, 3), r"must have the sequence length 7\+3 \(or 1\) in dimension 0"),
        (randn(SEQ, DIM), Aligned((2,), None), "in dimension 2"),
        (randn(SEQ - 3, DIM), Aligned((0,), None, -3), "no row for the first 3 tokens.*protect=3 to ltd_fx.transform"),
        (randn(2, 4, SEQ), Aligned((2,), 1), "must have the batch size 3, a multiple of it, or 1 in dimension 1"),
        (randn(SEQ, BATCH), Aligned((0,), 0), "batch size 3, .* in dimension 0"),
        (randn(BATCH, SEQ), ((1,), (1,)), "is a Tensor, and only tensors"),
        ({"a": randn(BATCH, SEQ)}, ((1,), None), "has 1 items, its LayerPattern 2"),
        (Bundle(randn(BATCH, SEQ)), ((1,), None), "has 3 items, its LayerPattern 2"),
    ],
)
def test_what_does_not_fit(value: Any, entry: Any, message: str) -> None:
    with pytest.raises(LTDError, match=r"layers\.1: argument 'given' .*" + message):
        gather_argument(draw_of(), value, "given", entry)


# ---- block masks

LONG = 40
DROPPED = torch.stack([torch.randperm(LONG, generator=torch.Generator().manual_seed(i))[:17] for i in range(BATCH)])
LONG_INDICES = torch.stack([torch.tensor([t for t in range(LONG) if t not in row]) for row in DROPPED.tolist()])
LENGTHS = torch.tensor([LONG, 30, 17])
MASKS = {  # batch, heads, and whether query q of head h sees key kv
    "window": (None, None, lambda b, h, q, kv: (q - kv).abs() <= 6),
    "all": (BATCH, HEADS, lambda b, h, q, kv: (kv < LENGTHS[b]) & ((q - kv).abs() <= 5 + 20 * h)),
}
LONG_DRAWS = pytest.mark.parametrize("indices", [LONG_INDICES, LONG_INDICES[1:2]], ids=["per_sample", "shared"])


def dense(function: Any, length: int) -> Tensor:
    """``[B, H, length, length]``, asked for every query and key."""
    places = itertools.product(range(BATCH), range(HEADS), range(length), range(length))
    seen = [bool(function(*map(torch.tensor, place))) for place in places]
    return torch.tensor(seen).view(BATCH, HEADS, length, length)


@pytest.fixture(scope="module", params=MASKS)
def mask_of(request: pytest.FixtureRequest) -> tuple[Any, Tensor]:
    batch, heads, function = MASKS[request.param]
    b, h, t = torch.arange(BATCH), torch.arange(HEADS), torch.arange(LONG)
    seen = function(b[:, None, None, None], h[:, None, None], t[:, None], t).expand(BATCH, HEADS, LONG, LONG)
    return lambda size: create_block_mask(function, batch, heads, LONG, LONG, device="cpu", BLOCK_SIZE=size), seen


@LONG_DRAWS
@pytest.mark.parametrize("size", [8, (16, 4), 128], ids=str)
def test_a_block_mask_is_rebuilt_for_the_kept_tokens(mask_of: Any, size: Any, indices: Tensor) -> None:
    make, seen = mask_of
    mask, keep = make(size), indices.shape[1]
    aligned = gather_argument(draw_of(indices, LONG), mask, "mask", (2, 3))
    rows = indices.expand(BATCH, -1)
    wanted = torch.stack([seen[b][:, rows[b]][:, :, rows[b]] for b in range(BATCH)])
    assert torch.equal(dense(aligned.mask_mod, keep), wanted)
    assert aligned.seq_lengths == (keep, keep)
    assert aligned.BLOCK_SIZE == mask.BLOCK_SIZE
    q_size, kv_size = mask.BLOCK_SIZE
    padded = F.pad(wanted, (0, -keep % kv_size, 0, -keep % q_size))
    blocks = padded.unflatten(2, (-1, q_size)).unflatten(4, (-1, kv_size)).amax((3, 5))
    assert (aligned.to_dense().expand(blocks.shape) != 0).eq(blocks).all()
    q, k, v = randn(3, BATCH, HEADS, keep, 16)
    ours, theirs = flex_attention(q, k, v, block_mask=aligned), F.scaled_dot_product_attention(q, k, v, wanted)
    some = wanted.any(-1)
    torch.testing.assert_close(ours[some], theirs[some], rtol=1e-4, atol=1e-5)


def test_a_block_mask_of_another_length_is_refused() -> None:
    mask = create_block_mask(MASKS["window"][2], None, None, LONG, LONG + 1, device="cpu")
    with pytest.raises(LTDError, match=r"'mask' is a BlockMask for \(40, 41\) queries and keys.* 40 tokens"):
        gather_argument(draw_of(LONG_INDICES, LONG), mask, "mask", (2, 3))


def test_transformers_outputs_are_mappings_and_dataclasses_at_once() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    value = outputs.BaseModelOutput(last_hidden_state=randn(BATCH, SEQ, DIM))  # its other fields are None
    gathered = gather_argument(draw_of(), value, "states", (1,))
    assert type(gathered) is type(value)
    assert gathered.attentions is None
    assert torch.equal(gathered.last_hidden_state, value.last_hidden_state[torch.arange(BATCH)[:, None], INDICES])


def test_as_many_rows_before_the_tokens_as_there_are() -> None:
    """Of any number of them; along two dimensions it must be the same number."""
    entry = Aligned((2, 3), 0, None)
    for more in (0, 2, 5):
        value = randn(BATCH, HEADS, SEQ + more, SEQ + more)
        found = gather_argument(draw_of(), value, "mask", entry)
        assert torch.equal(found, expected(value, entry._replace(prefix=more), INDICES))
    for shape in ((SEQ + 2, SEQ + 1), (SEQ - 1, SEQ - 1)):
        with pytest.raises(LTDError, match=r"argument 'mask' of shape .* must have the sequence length"):
            gather_argument(draw_of(), randn(BATCH, HEADS, *shape), "mask", entry)
