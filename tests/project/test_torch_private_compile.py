"""What torch's private names must mean to its compiler. A failure here says which name a release has changed."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

from ltd_fx import torch_private

pytestmark = pytest.mark.compat("torch")


@pytest.fixture(autouse=True)
def _compile_anew() -> None:
    torch._dynamo.reset()


# ---- Dynamo


def test_skip_code() -> None:
    """The function costs no graph by itself; inlined, it is part of its caller's."""
    counter = CompileCounter()

    def skipped(x: Tensor) -> Tensor:
        return x.sin()

    def caller(x: Tensor) -> Tensor:
        return skipped(x).cos()

    torch_private.skip_code(skipped.__code__)
    x = torch.ones(2)
    assert torch.equal(torch.compile(skipped, backend=counter)(x), x.sin())
    assert counter.frame_count == 0
    torch.compile(caller, backend=counter, fullgraph=True)(x)
    assert (counter.frame_count, counter.op_count) == (1, 2)


@pytest.mark.parametrize("strict", [True, False])
def test_is_exporting(strict: bool) -> None:
    """Only an export is one, whether Dynamo traces it or not; a compilation is none."""

    class Asks(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin() if torch_private.is_exporting() else x.cos()

    x = torch.ones(2)
    assert torch.equal(Asks()(x), x.cos())
    assert torch.equal(torch.compile(Asks(), backend="eager", fullgraph=True)(x), x.cos())
    assert torch.equal(torch.export.export(Asks(), (x,), strict=strict).module()(x), x.sin())


@pytest.mark.parametrize("allowed", [True, False])
def test_allow_side_effects(allowed: bool) -> None:
    """What a checkpointed function writes to an object outside is traced, where Dynamo left to itself refuses it."""

    class Outside:
        size = 0

    outside = Outside()

    def write(size: int) -> None:
        outside.size = size

    def function(x: Tensor) -> Tensor:
        torch_private.allow_side_effects(write, x.shape[0]) if allowed else write(x.shape[0])
        return x.sin()

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)

    compiled = torch.compile(checkpointed, backend="eager", fullgraph=True)
    with nullcontext() if allowed else pytest.raises(torch._dynamo.exc.Unsupported, match=r"(?i)side effect"):
        compiled(torch.ones(3, requires_grad=True)).sum().backward()
    assert outside.size == (3 if allowed else 0)


@pytest.mark.parametrize(("marked", "graphs"), [(True, 1), (False, 2)])
def test_mark_dynamic(marked: bool, graphs: int) -> None:
    """One graph for all sizes; left to itself, Dynamo makes one for the first size and one for all others."""
    counter = CompileCounter()
    compiled = torch.compile(lambda length: length.shape[0] + torch.ones(2), backend=counter)
    for size in (5, 4, 9):
        length = torch.empty(size, 0)
        if marked:
            torch_private.mark_dynamic(length, 0)
        assert compiled(length).tolist() == [size + 1] * 2
    assert counter.frame_count == graphs


@pytest.mark.parametrize("marked", [True, False])
def test_mark_static(marked: bool) -> None:
    """Its size is not taken for another that it equals at first."""
    table = torch.ones(3, 2)
    if marked:
        assert torch_private.mark_static(table) is table
    counter = CompileCounter()
    compiled = torch.compile(lambda x: x.sum() + table.sum() * x.shape[0], backend=counter, dynamic=True)
    for size in (3, 4, 5):
        compiled(torch.ones(size))
    assert counter.frame_count == (1 if marked else 2)


def test_at_compile_time() -> None:
    """Once a graph, and with the locals of the function: a constant's value, and none for what the graph is given."""
    seen: list[tuple[Any, ...]] = []
    counter = CompileCounter()

    def look(context: Any) -> None:
        seen.append(tuple(torch_private.constant_local_maybe(context, name) for name in ("constant", "size")))

    def function(x: Tensor) -> Tensor:
        constant, size = 7, x.shape[0]
        torch_private.at_compile_time(look)
        return x * constant + size

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for size in (3, 4):
        assert compiled(torch.ones(size)).tolist() == [7 + size] * size
    assert seen == [(7, None)]
    assert counter.op_count == 2


# ---- AOTAutograd and Inductor


@torch.library.custom_op("ltd_fx_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


twice.register_fake(torch.empty_like)
twice.register_autograd(lambda ctx, grad: grad * 2)
TWICE = torch.ops.ltd_fx_test.twice.default


def last(graph: fx.Graph) -> fx.Node:
    return next(iter(reversed(graph.nodes)))


def inductor_graph(function: Callable[..., Tensor], *args: Tensor) -> set[Any]:
    """The operators that Inductor would make code of."""
    from torch._inductor.compile_fx import compile_fx

    found: set[Any] = set()

    def compile_inner(graph: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        found.update(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):  # it does not know of decompositions
        torch.compile(function, backend=partial(compile_fx, inner_compile=compile_inner))(*args)
    return found


def test_set_decompositions() -> None:
    """Inductor sees the function once it is registered, also after its first compile, and no longer once it is not."""
    table = {TWICE: lambda x: x + x}
    for active in (False, True, True, False):
        torch_private.set_decompositions(table, active=active)
        found = inductor_graph(torch.ops.ltd_fx_test.twice, torch.ones(2))
        assert (TWICE in found, torch.ops.aten.add.Tensor in found) == (not active, active)


def test_traced_graph_maybe() -> None:
    """In a decomposition: the graph, as far as it is traced."""
    seen: list[Any] = []

    def decomposed(x: Tensor) -> Tensor:
        graph = torch_private.traced_graph_maybe()
        before = last(graph)
        result = x.cos()
        seen.append((before.target, last(graph).target))
        return result

    make_fx(lambda x: twice(x.sin()), {TWICE: decomposed})(torch.ones(2))
    assert seen == [(torch.ops.aten.sin.default, torch.ops.aten.cos.default)]
    assert torch_private.traced_graph_maybe() is None


@pytest.mark.parametrize("recomputed", [False, True])
def test_must_recompute(recomputed: bool) -> None:
    """The partitioner keeps a matmul's result for the backward, unless its node is marked."""
    saved: list[int] = []

    def decomposed(x: Tensor) -> Tensor:
        result = x.mm(x)
        if recomputed:
            torch_private.must_recompute(last(torch_private.traced_graph_maybe()))
        return result

    def forward(graph: fx.GraphModule, _: Any) -> Any:
        saved.extend(node.target is torch.ops.aten.mm.default for node in graph.graph.output_node().args[0])
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph),
        decompositions={TWICE: decomposed},
        partition_fn=min_cut_rematerialization_partition,
    )
    x = torch.randn(4, 4, requires_grad=True)
    torch.compile(lambda x: torch.ops.ltd_fx_test.twice(x).sin(), backend=backend)(x).sum().backward()
    assert any(saved) == (not recomputed)
