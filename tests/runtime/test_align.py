"""Arguments that follow the tokens, against index_select row by row."""

import collections

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ltd_fx import LTDError
from ltd_fx.runtime.arguments import Aligned, gather_argument, gather_arguments, gather_extras
from ltd_fx.runtime.records import Draw, Site
from ltd_fx.runtime.state import RouteState

BATCH, SEQ, HEADS, DIM = 3, 6, 2, 4
INDICES = torch.tensor([[0, 2, 5], [1, 2, 3], [2, 4, 5]])
SHARED = INDICES[1:2]
DRAWS = pytest.mark.parametrize("indices", [INDICES, SHARED], ids=["per_sample", "shared"])


def draw_of(indices=INDICES, batch=BATCH):
    state = RouteState(None, seed=0, shared=indices.shape[0] == 1, routed=1, dense=0)
    return Draw(Site("layers.1", 0, nn.Identity(), state), indices, batch, SEQ)


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def select(value, row, dims):
    """One sequence's kept tokens along each of ``dims`` that is not there to broadcast."""
    for dim in dims:
        if value.shape[dim] != 1:
            value = value.index_select(dim, row)
    return value


def batched(value, indices, dims):
    """``[N, ...]`` with N = B times heads; a batch of 1 repeated for as many draws as there are."""
    rows = indices.expand(BATCH if value.shape[0] > 1 else indices.shape[0], -1)
    value = value.expand(rows.shape[0], *value.shape[1:]) if value.shape[0] == 1 else value
    heads = value.shape[0] // rows.shape[0]
    return torch.stack([select(value[i], rows[i // heads], [d - 1 for d in dims]) for i in range(len(value))])


def unbatched(value, indices, dims):
    """A table of the sequence: for each draw, or without a batch dimension where one draw serves all."""
    each = [select(value, row, dims) for row in indices]
    return each[0] if len(each) == 1 else torch.stack(each)


@DRAWS
@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((BATCH, SEQ), (1,)),
        ((BATCH, SEQ, DIM), (1,)),
        ((BATCH, DIM, SEQ), (2,)),
        ((BATCH, 1, SEQ, SEQ), (2, 3)),
        ((BATCH, HEADS, SEQ, SEQ), (2, 3)),
        ((BATCH, HEADS, SEQ, SEQ), (3, 2)),
        ((BATCH, SEQ, HEADS, SEQ), (1, 3)),
        ((BATCH, SEQ, SEQ, SEQ), (1, 2, 3)),
        ((BATCH, SEQ, SEQ), (2,)),
        ((BATCH, 1, 1, SEQ), (2, 3)),
        ((BATCH, HEADS, SEQ, 1), (2, 3)),
        ((1, SEQ), (1,)),
        ((1, SEQ, DIM), (1,)),
        ((1, 1, SEQ, SEQ), (2, 3)),
        ((1, HEADS, 1, SEQ), (2, 3)),
        ((BATCH * HEADS, 1, SEQ), (2,)),
        ((BATCH * HEADS, 1, SEQ), (1, 2)),
        ((BATCH * HEADS, SEQ, SEQ), (1, 2)),
    ],
)
def test_batched(shape, dims, indices):
    value = randn(*shape)
    torch.testing.assert_close(
        gather_argument(draw_of(indices), value, "mask", dims), batched(value, indices, dims), rtol=0, atol=0
    )


@DRAWS
@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((SEQ,), (0,)),
        ((SEQ, DIM), (0,)),
        ((SEQ, SEQ), (0, 1)),
        ((SEQ, SEQ), (1, 0)),
        ((SEQ, HEADS, SEQ), (0, 2)),
        ((1, SEQ), (0, 1)),
        ((SEQ, 1), (0, 1)),
    ],
)
def test_unbatched(shape, dims, indices):
    value = randn(*shape)
    aligned = gather_argument(draw_of(indices), value, "table", dims)
    torch.testing.assert_close(aligned, unbatched(value, indices, dims), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "dims"),
    [((BATCH, 1, SEQ, SEQ), (-2, -1)), ((SEQ, SEQ), (0, -1)), ((SEQ, HEADS, SEQ), (0, -1)), ((SEQ,), (-1,))],
)
def test_negative_dims_are_refused(shape, dims):
    with pytest.raises(LTDError, match="aligned"):
        gather_argument(draw_of(), randn(*shape), "table", dims)


@pytest.mark.parametrize(("shape", "dims"), [((1, SEQ), (1,)), ((HEADS, 1, SEQ), (2,)), ((SEQ, DIM), (0,))])
def test_a_batch_of_one(shape, dims):
    value = randn(*shape)
    aligned = gather_argument(draw_of(INDICES[:1], batch=1), value, "mask", dims)
    torch.testing.assert_close(aligned, value.index_select(dims[0], INDICES[0]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.bfloat16])
def test_dtypes_stay(dtype):
    value = (randn(BATCH, SEQ) * 3).to(dtype)
    aligned = gather_argument(draw_of(), value, "mask", (1,))
    assert aligned.dtype == dtype
    assert torch.equal(aligned, value.gather(1, INDICES))


def test_gradients_go_to_the_kept_entries():
    value = randn(1, SEQ, DIM).requires_grad_()
    gather_argument(draw_of(), value, "bias", (1,)).sum().backward()
    counts = torch.bincount(INDICES.flatten(), minlength=SEQ).float()
    assert torch.equal(value.grad, counts[None, :, None].expand(1, SEQ, DIM))


class Called(TorchDispatchMode):
    """The operators of ours that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [func.name()] if func.namespace == "ltd_fx" else []
        return func(*args, **(kwargs or {}))


def test_several_arguments_are_one_call():
    tables, ids, mask = (randn(1, SEQ, DIM), randn(1, SEQ, DIM)), randn(BATCH, SEQ) > 0, randn(BATCH, HEADS, SEQ, SEQ)
    shorter, heads = randn(1, SEQ - 1), randn(BATCH * HEADS, SEQ)
    draw = draw_of(INDICES[1:2])._replace(protected=1)
    entries = (1,), (1,), (2, 3), Aligned((1,), prefix=-1), (1,), ()
    with Called() as called:
        out = gather_arguments(draw, "abcdef", (tables, ids, mask, shorter, heads, ids), entries)
    assert sorted(called.names) == ["ltd_fx::gather_aligned", "ltd_fx::gather_aligned", "ltd_fx::gather_mask"]
    kept = INDICES[1]
    expected = [table[:, kept] for table in tables]
    expected += [ids[:, kept], mask[..., kept[:, None], kept], shorter[:, kept[1:] - 1], heads[:, kept], ids]
    assert all(torch.equal(*pair) for pair in zip((*out[0], *out[1:]), expected, strict=True))
    assert type(out[0]) is tuple


@pytest.mark.parametrize(("shape", "dims"), [((BATCH * HEADS, SEQ), (1,)), ((BATCH, SEQ, SEQ, SEQ), (1, 2, 3))])
def test_what_the_operators_do_not_serve_is_indexed(shape, dims):
    with Called() as called:
        gather_argument(draw_of(), randn(*shape), "mask", dims)
    assert called.names == []


def test_torch_func_differentiates_a_learnt_bias():
    bias, rows = randn(1, HEADS, SEQ, SEQ), INDICES
    grad = torch.func.grad(lambda bias: gather_argument(draw_of(), bias, "bias", (2, 3)).sum())(bias)
    counts = sum(torch.zeros(SEQ, SEQ).index_put((row[:, None], row), torch.tensor(1.0)) for row in rows)
    assert torch.equal(grad, counts.expand(1, HEADS, SEQ, SEQ))


def test_arguments_of_a_shared_draw_are_gathered_once():
    draw, first, second = draw_of()._replace(gathered={}), randn(BATCH, SEQ), randn(1, SEQ)
    out = gather_arguments(draw, ("a", "b"), (first, second), ((1,), (1,)))
    with Called() as called:
        again = gather_arguments(draw, ("a", "b"), (first, second), ((1,), (1,)))
        assert all(x is y for x, y in zip(out, again, strict=True))
        assert called.names == []
        assert gather_argument(draw, second.clone(), "b", (1,)) is not out[1]
    assert called.names == ["ltd_fx::gather_aligned"]


Rotary = collections.namedtuple("Rotary", "cos sin")


@pytest.mark.parametrize(
    "value",
    [
        (randn(1, SEQ, DIM), randn(BATCH, SEQ)),
        [randn(1, SEQ), None, (randn(BATCH, SEQ, DIM), [randn(1, SEQ)])],
        Rotary(randn(1, SEQ, DIM), randn(1, SEQ, DIM)),
        (),
    ],
    ids=["tuple", "nested", "namedtuple", "empty"],
)
def test_structures(value):
    def check(aligned, value):
        assert type(aligned) is type(value)
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(aligned, batched(value, INDICES, (1,)), rtol=0, atol=0)
        elif value is not None:
            assert len(aligned) == len(value)
            for pair in zip(aligned, value, strict=True):
                check(*pair)

    check(gather_argument(draw_of(), value, "position_embeddings", (1,)), value)


@pytest.mark.parametrize(
    ("draw", "value", "dims"),
    [
        (None, randn(BATCH, SEQ), (1,)),
        (None, "anything", (1,)),
        (draw_of(), None, (1,)),
        (draw_of(), object(), ()),
        (draw_of(), randn(BATCH, SEQ), ()),
        (draw_of(), randn(BATCH, HEADS, 1, 1), (2, 3)),
        (draw_of(), randn(1), (0,)),
    ],
    ids=["dense", "dense, no tensor", "None", "unaligned", "unaligned tensor", "broadcasts", "broadcast table"],
)
def test_passes_through(draw, value, dims):
    assert gather_argument(draw, value, "mask", dims) is value


@pytest.mark.parametrize(
    ("value", "dims", "message"),
    [
        (
            randn(BATCH, SEQ + 1),
            (1,),
            r"'mask' of shape \(3, 7\) must have the sequence length 6 \(or 1\) in dimension 1",
        ),
        (randn(BATCH, 1, SEQ, SEQ - 1), (2, 3), r"'mask' of shape \(3, 1, 6, 5\) .* in dimension 3"),
        (randn(BATCH, SEQ), (2,), r"'mask' of shape \(3, 6\) .* in dimension 2"),
        (torch.tensor(1.0), (1,), r"'mask' of shape \(\) .* in dimension 1"),
        (randn(BATCH + 1, SEQ), (1,), r"'mask' of shape \(4, 6\) must have the batch size 3, .* in dimension 0"),
        (randn(2, SEQ, SEQ), (1, 2), r"'mask' of shape \(2, 6, 6\) must have the batch size 3"),
        ("text", (1,), "'mask' is a str, and only tensors"),
        ({"mask": object()}, (1,), "'mask' is a object, and only tensors"),
        ((randn(BATCH, SEQ),) * 3, ((1,), None), "'mask' has 3 items, its LayerPattern 2"),
        (randn(BATCH, SEQ - 1), Aligned((1,), prefix=-1), "'mask' .* no row for the first 1 tokens.*protect=1"),
        ((randn(BATCH, SEQ), 3), (1,), "'mask' is a int, and only tensors"),
        ((randn(BATCH, SEQ), randn(BATCH, SEQ + 2)), (1,), r"'mask' of shape \(3, 8\)"),
    ],
)
def test_what_does_not_fit(value, dims, message):
    with pytest.raises(LTDError, match=r"layers\.1: argument " + message):
        gather_argument(draw_of(), value, "mask", dims)


def test_extras():
    mask, other, cache = randn(BATCH, SEQ), randn(BATCH, SEQ + 1), object()
    extras = {"mask": mask, "flag": True, "other": other, "cache": cache, "kept": randn(BATCH, SEQ), "none": None}
    aligned = gather_extras(draw_of(), extras, {"mask": (1,), "kept": (), "none": (1,), "absent": (1,)})
    assert aligned.keys() == extras.keys()
    assert torch.equal(aligned["mask"], mask.gather(1, INDICES))
    assert all(aligned[name] is extras[name] for name in extras if name != "mask")
    assert gather_extras(None, extras, {"mask": (1,)}) is extras


def test_an_extra_that_seems_to_carry_the_sequence():
    message = r"layers\.1: argument 'bias' of shape \(2, 6\) seems to carry the sequence \(S=6\)"
    with pytest.raises(LTDError, match=message):
        gather_extras(draw_of(), {"bias": randn(2, SEQ)}, {"mask": (1,)})
