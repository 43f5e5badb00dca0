"""The operators against loops over Python lists, and against everything that PyTorch asks of an operator."""

import functools
import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import decomposition
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from ltd_fx import LTDError
from ltd_fx.ops import lowering

gather_tokens, scatter_tokens = torch.ops.ltd_fx.gather_tokens, torch.ops.ltd_fx.scatter_tokens
sample_tokens = torch.ops.ltd_fx.sample_tokens

# B, S, D, k
SIZES = [(2, 5, 3, 2), (1, 7, 4, 1), (3, 4, 2, 0), (2, 6, 3, 5), (2, 6, 3, 6), (0, 5, 3, 2), (2, 5, 0, 2), (2, 0, 3, 0)]
LAYOUTS = pytest.mark.parametrize("batch_first", [True, False], ids=["BSD", "SBD"])
MEMORY = pytest.mark.parametrize("memory", ["contiguous", "strided", "transposed"])
KEY, SITE = torch.tensor(-(2**40) - 7), torch.tensor(3)


def randn(*shape, memory="contiguous", dtype=torch.float64, seed=0, grad=False):
    stored = {"strided": (*shape[:-1], 2 * shape[-1]), "transposed": (shape[1], shape[0], *shape[2:])}
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(*stored.get(memory, shape), generator=generator, dtype=torch.float64).to(dtype)
    value = value[..., ::2] if memory == "strided" else value.transpose(0, 1) if memory == "transposed" else value
    return value.requires_grad_(grad)


def subsets(batch, seq_len, keep):
    order = torch.rand(batch, seq_len, generator=torch.Generator().manual_seed(batch + keep)).argsort(1)
    return order[:, :keep].sort(1).values


def inputs(batch, seq_len, dim, keep, batch_first=True, **options):
    """Hidden states, indices and kept rows."""
    hidden = randn(*((batch, seq_len) if batch_first else (seq_len, batch)), dim, **options)
    kept = randn(*((batch, keep) if batch_first else (keep, batch)), dim, **{**options, "seed": 1})
    return hidden, subsets(batch, seq_len, keep), kept


def flip(value, batch_first):
    """``[S, B, D]`` as ``[B, S, D]`` and back."""
    return value if batch_first else value.transpose(0, 1)


def loop_gather(hidden, indices):
    hidden = hidden.tolist()
    return [[hidden[b][t] for t in row] for b, row in enumerate(indices.tolist())]


def loop_scatter(hidden, indices, kept):
    out, kept = hidden.tolist(), kept.tolist()
    for b, row in enumerate(indices.tolist()):
        for j, t in enumerate(row):
            out[b][t] = kept[b][j]
    return out


def check_values(hidden, indices, kept, batch_first=True):
    gathered, scattered = (
        gather_tokens(hidden, indices, batch_first),
        scatter_tokens(hidden, indices, kept, batch_first),
    )
    assert gathered.dtype == scattered.dtype == hidden.dtype
    assert (gathered.shape, scattered.shape) == (kept.shape, hidden.shape)
    hidden, kept, gathered, scattered = (flip(value, batch_first) for value in (hidden, kept, gathered, scattered))
    assert gathered.tolist() == loop_gather(hidden, indices)
    assert scattered.tolist() == loop_scatter(hidden, indices, kept)


@LAYOUTS
@MEMORY
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values(sizes, memory, batch_first):
    check_values(*inputs(*sizes, batch_first, memory=memory), batch_first)


@LAYOUTS
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, index_dtype, batch_first):
    hidden, indices, kept = inputs(2, 6, 3, 4, batch_first, dtype=dtype)
    check_values(hidden, indices.to(index_dtype), kept, batch_first)


@pytest.mark.parametrize("keep", [0, 2, 5])
def test_functional(keep):
    tensors = inputs(2, 5, 3, keep)
    before = [tensor.clone() for tensor in tensors]
    outputs = gather_tokens(*tensors[:2]), scatter_tokens(*tensors), sample_tokens(KEY, SITE, tensors[0], 2, 5, keep)
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*tensors, KEY, SITE) if tensor.numel()}
    assert all(out.untyped_storage().data_ptr() not in owned for out in outputs)
    for out in outputs:
        out.fill_(-1)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(tensors, before, strict=True))


def test_autocast_leaves_dtypes_alone():
    hidden, indices, kept = inputs(2, 6, 3, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        check_values(hidden, indices, kept)
        with pytest.raises(LTDError, match=r"kept is torch\.bfloat16, hidden is torch\.float32"):
            scatter_tokens(hidden, indices, kept @ torch.ones(3, 3))


@LAYOUTS
@pytest.mark.parametrize("shape", [(2, 4, 2, 2), (1, 3, 2, 0), (2, 3, 1, 3)], ids=str)
def test_gradcheck(shape, batch_first):
    hidden, indices, kept = inputs(*shape, batch_first, grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda h: gather_tokens(h, indices, batch_first), (hidden,))
        assert check(lambda h, k: scatter_tokens(h, indices, k, batch_first), (hidden, kept))


def test_samples_have_no_gradient():
    assert not sample_tokens(KEY, SITE, randn(2, 5, 3, grad=True), 2, 5, 3).requires_grad


@MEMORY
@LAYOUTS
def test_opcheck(batch_first, memory):
    hidden, indices, kept = inputs(2, 5, 3, 4, batch_first, memory=memory, grad=True)
    torch.library.opcheck(gather_tokens.default, (hidden, indices, batch_first))
    torch.library.opcheck(scatter_tokens.default, (hidden, indices, kept, batch_first))


def test_opcheck_sample():
    torch.library.opcheck(sample_tokens.default, (KEY, SITE, randn(2, 7, 0), 2, 7, 3))
    torch.library.opcheck(torch.ops.ltd_fx._sample_on_cpu.default, (KEY, SITE, 2, 7, 3))


def looped(op, in_dims, *tensors):
    each = (itertools.repeat(t) if dim is None else t.unbind(dim) for t, dim in zip(tensors, in_dims, strict=True))
    return torch.stack([op(*args) for args in zip(*each, strict=False)])


def mapped(tensors, in_dims, size):
    """Each tensor with ``size`` different copies of itself along its mapped dimension, as far as it has one."""
    shifted = [[torch.roll(t, i, 1) if t.is_floating_point() else (t + i) for i in range(size)] for t in tensors]
    return [each[0] if dim is None else torch.stack(each, dim) for each, dim in zip(shifted, in_dims, strict=True)]


@LAYOUTS
@pytest.mark.parametrize(
    ("op", "in_dims"),
    [(gather_tokens, dims) for dims in ((0, 0), (2, 1), (-1, -1), (None, 0), (1, None))]
    + [(scatter_tokens, dims) for dims in ((0, 0, 0), (3, 1, 2), (None, 0, 1), (1, None, None), (None, None, -1))],
    ids=str,
)
def test_vmap_is_a_loop(op, in_dims, batch_first):
    hidden, _, kept = inputs(2, 8, 4, 3, batch_first)
    tensors = mapped([hidden, subsets(2, 6, 3), kept][: len(in_dims)], in_dims, 3)
    op = functools.partial(op, batch_first=batch_first)
    assert torch.equal(torch.vmap(op, in_dims, out_dims=2)(*tensors), looped(op, in_dims, *tensors).movedim(0, 2))


@pytest.mark.parametrize(("shape", "in_dim"), [((4, 2, 9, 0), 0), ((2, 9, 4, 3), 2), ((2, 9, 1, 4), -1)], ids=str)
def test_vmap_sample_draws_for_each_mapped_sample(shape, in_dim):
    rows = torch.vmap(lambda like: sample_tokens(KEY, SITE, like, 2, 40, 20), in_dim)(torch.empty(shape))
    assert torch.equal(rows, sample_tokens(KEY, SITE, torch.empty(0), 8, 40, 20).view(4, 2, 20))
    nested = torch.vmap(torch.vmap(lambda like: sample_tokens(KEY, SITE, like, 2, 40, 20)))(torch.empty(3, 4, 2))
    for draws in (rows, nested):
        assert len(set(map(tuple, draws.flatten(0, -2).tolist()))) == draws.shape[:-1].numel()


@pytest.mark.parametrize("in_dims", [(0, None, 0), (None, 0, 0)])
def test_vmap_over_key_or_site_is_refused(in_dims):
    key, site = (KEY if dim is None else torch.arange(3) for dim in in_dims[:2])
    with pytest.raises(LTDError, match="maps over `like`, never over its key or site"):
        torch.vmap(lambda k, s, like: sample_tokens(k, s, like, 2, 9, 4), in_dims)(key, site, torch.empty(3, 0))


def routed(hidden, key, batch_first):
    batch, seq_len = hidden.shape[:2] if batch_first else (hidden.shape[1], hidden.shape[0])
    indices = sample_tokens(key, SITE, hidden, batch, seq_len, seq_len // 2)
    kept = torch.nn.functional.layer_norm(gather_tokens(hidden.relu(), indices, batch_first), hidden.shape[2:])
    return scatter_tokens(hidden, indices, kept, batch_first)


@pytest.mark.parametrize(("batch_first", "memory"), [(True, "contiguous"), (True, "strided"), (False, "transposed")])
def test_one_graph_for_every_length_equals_eager(batch_first, memory):
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(routed, backend=backend, fullgraph=True, dynamic=True)
    for seq_len in (8, 10, 13):
        hidden = inputs(2, seq_len, 3, 4, batch_first, memory=memory, grad=True)[0]
        out, expected = (f(hidden, KEY, batch_first) for f in (compiled, routed))
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-15)
        grad, expected_grad = (torch.autograd.grad(each.square().sum(), hidden)[0] for each in (out, expected))
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-14)
    assert backend.frame_count == 1


@pytest.fixture
def undecomposed(monkeypatch):
    """As in a process where nothing was compiled yet and no model transformed."""
    for name in lowering._DECOMPOSITIONS:
        monkeypatch.delitem(decomposition.decompositions, getattr(torch.ops.ltd_fx, name).default, raising=False)
    decomposition.fast_random_decomps.cache_clear()
    yield
    monkeypatch.undo()
    decomposition.fast_random_decomps.cache_clear()


@LAYOUTS
@pytest.mark.usefixtures("undecomposed")
def test_decompositions_leave_no_route_and_equal_the_kernels(batch_first):
    lowering.register_inductor_decompositions()
    hidden = inputs(2, 9, 3, 4, batch_first, memory="strided")[0]
    graph = make_fx(routed, decomposition.select_decomp_table())(hidden, KEY, batch_first)
    left = {str(node.target) for node in graph.graph.nodes if "ltd_fx" in str(node.target)}
    assert left == {"ltd_fx._sample_on_cpu.default"}
    torch.testing.assert_close(graph(hidden, KEY, batch_first), routed(hidden, KEY, batch_first), rtol=0, atol=1e-15)


@pytest.mark.usefixtures("undecomposed")
def test_decompositions_may_be_registered_after_a_compile():
    decomposition.select_decomp_table()  # what the first compile does
    lowering.register_inductor_decompositions()
    assert gather_tokens.default in decomposition.select_decomp_table()


@pytest.mark.usefixtures("undecomposed")
def test_inductor_fuses_the_gather():
    lowering.register_inductor_decompositions()
    torch._dynamo.reset()
    hidden, indices, _ = inputs(2, 9, 8, 3, dtype=torch.float32)

    def fused(hidden, indices):
        return torch.nn.functional.layer_norm(gather_tokens(hidden.relu(), indices), (8,))

    with torch._functorch.config.patch(enable_autograd_cache=False):  # it does not know of decompositions
        out, codes = run_and_get_code(torch.compile(fused, fullgraph=True), hidden, indices)
    torch.testing.assert_close(out, fused(hidden, indices))
    assert ["torch.ops.ltd_fx" in code for code in codes] == [False]
    assert codes[0].count("async_compile.cpp_pybinding(") == 1


HIDDEN, ROWS = torch.zeros(2, 5, 3), torch.tensor([[0, 2], [1, 4]])
BAD_VALUES = [
    ([[0, 5], [1, 2]], r"indices .*\[0, 5\).* from 0 to 5"),
    ([[-1, 2], [1, 2]], r"indices .*\[0, 5\).* from -1 to 2"),
    ([[0, 2], [2, 1]], "indices must be ascending and unique"),
    ([[0, 2], [3, 3]], "indices must be ascending and unique"),
]
BAD_INDICES = [
    (HIDDEN[0], ROWS, r"hidden .*\(5, 3\)"),
    (HIDDEN[None], ROWS, r"hidden .*\(1, 2, 5, 3\)"),
    (HIDDEN.long(), ROWS, r"hidden .*floating point.*int64"),
    (HIDDEN, ROWS.float(), r"indices .*int32 or int64.*float32"),
    (HIDDEN, ROWS[0], r"indices .*\(2,\)"),
    (HIDDEN, ROWS[:1], "indices has 1 rows.*hidden.* 2"),
    (HIDDEN, torch.arange(6).expand(2, 6), "indices keeps 6 tokens.*hidden has only 5"),
    (HIDDEN.to("meta"), ROWS, "hidden is on meta, indices on cpu"),
]
BAD_KEPT = [
    (torch.zeros(2, 2), r"kept .*\(2, 2\)"),
    (torch.zeros(2, 3, 3), r"kept .*\(2, 3, 3\)"),
    (torch.zeros(2, 2, 4), r"kept .*\(2, 2, 4\)"),
    (torch.zeros(2, 2, 3).double(), r"kept is torch\.float64, hidden is torch\.float32"),
]
BAD_SAMPLE = [
    ((KEY.int(), SITE, 2, 5, 3), "key .*0-dim int64.*int32"),
    ((KEY.expand(2), SITE, 2, 5, 3), "key .*0-dim int64"),
    ((KEY, SITE.double(), 2, 5, 3), "site .*0-dim int64.*float64"),
    ((KEY, SITE, -1, 5, 3), "batch .*-1"),
    ((KEY, SITE, 2, 5, -1), "keep .*-1"),
    ((KEY, SITE, 2, 5, 6), "keep=6 .*seq_len=5"),
]


@LAYOUTS
@pytest.mark.parametrize(("indices", "message"), BAD_VALUES)
def test_bad_index_values(indices, message, batch_first):
    hidden, kept = flip(HIDDEN, batch_first), flip(HIDDEN[:, :2], batch_first)
    for op, args in ((gather_tokens, ()), (scatter_tokens, (kept,))):
        with pytest.raises(LTDError, match=message):
            op(hidden, torch.tensor(indices), *args, batch_first)


@pytest.mark.parametrize(
    ("op", "args", "message"),
    [(gather_tokens, (hidden, indices), message) for hidden, indices, message in BAD_INDICES]
    + [(scatter_tokens, (hidden, indices, hidden), message) for hidden, indices, message in BAD_INDICES]
    + [(scatter_tokens, (HIDDEN, ROWS, kept), message) for kept, message in BAD_KEPT]
    + [(sample_tokens, (key, site, HIDDEN, *sizes), message) for (key, site, *sizes), message in BAD_SAMPLE],
)
def test_bad_input(op, args, message):
    for tensors in (args, tree_map_only(torch.Tensor, FakeTensorMode().from_tensor, args)):
        with pytest.raises(LTDError, match=message):
            op(*tensors)
