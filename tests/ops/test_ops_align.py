"""The operators for aligned arguments against loops over Python lists, and against everything that PyTorch asks."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import decomposition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from ltd_fx import LTDError
from ltd_fx.ops import lowering

gather_aligned, gather_mask = torch.ops.ltd_fx.gather_aligned, torch.ops.ltd_fx.gather_mask
INDICES = torch.tensor([[0, 2, 5], [1, 2, 3], [2, 4, 5]])
ROWS = pytest.mark.parametrize("indices", [INDICES, INDICES[1:2], INDICES[:, :0]], ids=["each", "shared", "none kept"])


def randn(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (10 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_(grad)


def looped(value: Tensor, indices: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Entry by entry."""
    batch = len(indices) if len(value) == 1 else len(value)
    shape = [indices.shape[1] if dim in dims else size for dim, size in enumerate(value.shape)]
    out = torch.empty(batch, *shape[1:], dtype=value.dtype)
    for place in itertools.product(*map(range, out.shape)):
        row = indices[place[0] if len(indices) > 1 else 0].tolist()
        there = [row[at] if dim in dims else at for dim, at in enumerate(place)]
        out[place] = value[place[0] if len(value) > 1 else 0, *there[1:]]
    return out


def values(grad: bool = False) -> tuple[list[Tensor], list[int]]:
    shapes = {(1, 6, 4): 1, (3, 6): 1, (3, 2, 6, 2): 2, (3, 2, 6): 2}
    return [randn(*shape, grad=grad) for shape in shapes], [*shapes.values()]


@ROWS
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_values(indices: Tensor, index: torch.dtype) -> None:
    tensors, dims = values()
    tensors[1] = tensors[1] > 0
    tensors.append(tensors[0].transpose(1, 2))
    out = gather_aligned(tensors, indices.to(index), [*dims, 2])
    for got, value, dim in zip(out, tensors, [*dims, 2], strict=True):
        assert got.dtype == value.dtype
        assert torch.equal(got, looped(value, indices, (dim,)))
    for mask in (randn(1, 2, 6, 6), randn(3, 1, 6, 6) > 0, randn(3, 2, 6, 6).transpose(2, 3)):
        assert torch.equal(gather_mask(mask, indices.to(index)), looped(mask, indices, (2, 3)))


def test_one_row_serves_any_batch() -> None:
    (out,) = gather_aligned([randn(5, 6)], INDICES[:1], [1])
    assert torch.equal(out, randn(5, 6)[:, INDICES[0]])
    assert gather_aligned([], INDICES, []) == []


def test_functional() -> None:
    everything = INDICES.new_tensor([[0, 1, 2]])
    value, mask = randn(1, 3), randn(1, 1, 3, 3)
    for out, source in ((gather_aligned([value], everything, [1])[0], value), (gather_mask(mask, everything), mask)):
        assert out.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()
        assert torch.equal(out, source)


@pytest.mark.parametrize("indices", [INDICES, INDICES[:1]])
def test_gradients(indices: Tensor) -> None:
    tensors, dims = values(grad=True)
    one, all_of = tensors[1], functools.partial(gather_aligned, indices=indices, dims=dims)
    assert torch.autograd.gradcheck(lambda *each: tuple(all_of(list(each))), tensors)
    assert torch.autograd.gradgradcheck(lambda value: gather_aligned([value], indices, [1])[0], (one,))
    for mask in (randn(1, 2, 6, 6, grad=True), randn(3, 1, 6, 6, grad=True)):
        assert torch.autograd.gradcheck(lambda each: gather_mask(each, indices), (mask,))


def test_a_gradient_for_some_of_the_values() -> None:
    learnt, given = randn(1, 6, grad=True), randn(3, 6)
    unused, out = gather_aligned([given, learnt], INDICES, [1, 1])
    out.sum().backward()
    assert torch.equal(learnt.grad, torch.bincount(INDICES.flatten(), minlength=6)[None].double())
    assert unused.shape == (3, 3)


@ROWS
def test_opcheck(indices: Tensor) -> None:
    tensors, dims = values(grad=True)
    torch.library.opcheck(gather_aligned.default, (tensors, indices, dims))
    torch.library.opcheck(gather_mask.default, (randn(1, 2, 6, 6, grad=True), indices))
    torch.library.opcheck(gather_mask.default, (randn(3, 2, 6, 6), indices))


@pytest.mark.parametrize("mapped", [(0, None, 0), (None, 2, None), (0, 0, 0)], ids=str)
def test_vmap_is_a_loop(mapped: tuple[int | None, ...]) -> None:
    full = randn(1, 6, 4), randn(3, 6), INDICES
    stacked = [v if d is None else torch.stack([v, v.flip(0), v.clone()], d) for v, d in zip(full, mapped, strict=True)]

    def both(table: Tensor, ids: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        mask = table[:, None, :, :1] * table[:, None, :, 0, None].transpose(2, 3)
        return (*gather_aligned([table, ids], indices, [1, 1]), gather_mask(mask, indices))

    each = (itertools.repeat(v, 3) if d is None else v.unbind(d) for v, d in zip(stacked, mapped, strict=True))
    expected = zip(*(both(*args) for args in zip(*each, strict=True)), strict=True)
    for got, right in zip(torch.vmap(both, mapped)(*stacked), expected, strict=True):
        assert torch.equal(got, torch.stack(right))


def routed(table: Tensor, ids: Tensor, mask: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
    cos, positions = gather_aligned([table, ids], indices, [1, 1])
    return cos.view(-1).sin(), positions + 1, gather_mask(mask.relu(), indices).view(-1)


def inputs(seq_len: int, keep: int) -> tuple[Tensor, ...]:
    drawn = torch.rand(2, seq_len, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :keep].sort(1).values
    ids = torch.arange(seq_len).expand(2, -1)
    return randn(1, seq_len, 4), ids, randn(2, 3, seq_len, seq_len), drawn


@pytest.fixture
def kernel_lowering(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LTD_FX_LOWERING", "kernel")
    lowering.register_inductor_decompositions()
    yield
    monkeypatch.undo()
    lowering.register_inductor_decompositions()


def check_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(routed, backend=counter, fullgraph=True, dynamic=True)
    for sizes in ((9, 5), (12, 4), (12, 7)):
        for got, expected in zip(compiled(*inputs(*sizes)), routed(*inputs(*sizes)), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_for_every_length(backend: str) -> None:
    lowering.register_inductor_decompositions()
    check_one_graph(backend)


@pytest.mark.usefixtures("kernel_lowering")
def test_one_graph_calls_the_operators() -> None:
    check_one_graph("inductor")


def test_decompositions_leave_neither() -> None:
    lowering.register_inductor_decompositions()
    graph = make_fx(routed, decomposition.select_decomp_table())(*inputs(9, 4))
    assert not [node for node in graph.graph.nodes if "ltd_fx" in str(node.target)]
    for got, expected in zip(graph(*inputs(9, 4)), routed(*inputs(9, 4)), strict=True):
        assert torch.equal(got, expected)


VALUE, MASK = torch.zeros(3, 6, 4), torch.zeros(3, 1, 6, 6)
BAD: list[tuple[Any, tuple[Any, ...], str]] = [
    (gather_aligned, ([VALUE], INDICES, []), "1 values need as many dims, got 0"),
    (gather_aligned, ([VALUE], INDICES, [0]), r"shape \(3, 6, 4\) has no dimension 0 beyond its batch"),
    (gather_aligned, ([VALUE], INDICES, [3]), r"shape \(3, 6, 4\) has no dimension 3"),
    (gather_aligned, ([VALUE, VALUE], INDICES, [1, 2]), r"shape \(3, 6, 4\) must have 6 tokens in dimension 2"),
    (gather_aligned, ([VALUE[:2]], INDICES, [1]), r"shape \(2, 6, 4\) must have a batch of 3 or 1"),
    (gather_aligned, ([VALUE[:, :2]], INDICES, [1]), "indices keeps 3 tokens, but a value has only 2"),
    (gather_aligned, ([VALUE], INDICES.float(), [1]), r"indices .*int32 or int64.*float32"),
    (gather_aligned, ([VALUE], INDICES[0], [1]), r"indices must be \[B, k\], got shape \(3,\)"),
    (gather_aligned, ([VALUE.to("meta")], INDICES, [1]), "a value is on meta, indices on cpu"),
    (gather_mask, (MASK[0], INDICES), r"mask must be \[N, H, S, S\], got shape \(1, 6, 6\)"),
    (gather_mask, (MASK[..., :5], INDICES), r"a value of shape \(3, 1, 6, 5\) must have 6 tokens in dimension 3"),
    (gather_mask, (MASK[:2], INDICES), "must have a batch of 3 or 1"),
]


@pytest.mark.parametrize(("op", "args", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(op: Any, args: tuple[Any, ...], message: str) -> None:
    for given in (args, tree_map_only(Tensor, FakeTensorMode().from_tensor, args)):
        with pytest.raises(LTDError, match=message):
            op(*given)


@pytest.mark.parametrize("indices", [[[0, 6]], [[-1, 2]], [[2, 2]]])
def test_bad_index_values(indices: list[list[int]]) -> None:
    for run in (lambda rows: gather_aligned([VALUE], rows, [1]), lambda rows: gather_mask(MASK, rows)):
        with pytest.raises(LTDError, match="indices must be"):
            run(torch.tensor(indices))
