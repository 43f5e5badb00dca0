"""What torch's private names about symbolic sizes must mean. A failure here says which name a release has changed."""

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

from ltd_fx import torch_private, torch_private_sizes


def length(size: int) -> tuple[Any, torch_private.FakeTensorMode]:
    mode = torch_private_sizes.symbolic_mode()
    return torch_private_sizes.symbolic_sizes(mode, (size,), "length")[0], mode


def test_symbolic_mode() -> None:
    """Sizes that are equal by chance are two symbols."""
    mode = torch_private_sizes.symbolic_mode()
    first, second = (torch_private_sizes.symbolic_sizes(mode, (8,), name)[0] for name in ("first", "second"))
    assert torch_private_sizes.size_expr(first) != torch_private_sizes.size_expr(second)
    with mode:
        assert torch.empty(2, first + 1).fake_mode is mode


def test_symbolic_sizes() -> None:
    mode = torch_private_sizes.symbolic_mode()
    sizes = torch_private_sizes.symbolic_sizes(mode, (8, 1, 0), "some")
    assert sizes[1:] == (1, 0)
    assert isinstance(sizes[0], torch.SymInt)
    assert sizes[0] > 1
    assert torch_private_sizes.decided_by(mode, None)[0] == []  # It is known to be more than 1.


def test_simplified() -> None:
    """What a forward needs to be equal becomes one symbol, and what it needs to be a number is that number."""
    mode = torch_private_sizes.symbolic_mode()
    first, second, third = torch_private_sizes.symbolic_sizes(mode, (8, 8, 4), "some")
    with mode:
        torch.empty(first) + torch.empty(second)
        torch.empty(third) @ torch.empty(4)
    assert torch_private_sizes.simplified(mode, first) == torch_private_sizes.simplified(mode, second)
    assert torch_private_sizes.simplified(mode, third) == 4


def test_replaced() -> None:
    """And a size's own symbols stay what they were."""
    mode = torch_private_sizes.symbolic_mode()
    a, b = torch_private_sizes.symbolic_sizes(mode, (5, 5), "sizes")
    before = torch_private_sizes.own_symbols(a), torch_private_sizes.own_symbols(b)
    assert torch_private_sizes.replaced(mode) == []
    assert before[0] != before[1]
    assert a == b
    ((symbol, size),) = torch_private_sizes.replaced(mode)
    assert {symbol} | size.free_symbols == before[0] | before[1]
    assert (torch_private_sizes.own_symbols(a), torch_private_sizes.own_symbols(b)) == before
    assert torch_private_sizes.own_symbols(5) == set()


def test_symbolic_products() -> None:
    mode = torch_private_sizes.symbolic_mode()
    sizes = torch_private_sizes.symbolic_sizes(mode, (2, 3, 22, 12), "sizes")
    with mode, torch_private_sizes.symbolic_products():
        queries = torch.empty(sizes)
        assert (queries @ queries.mT).shape[-1] == sizes[2]
    assert torch_private_sizes.replaced(mode) == []


def test_size_expr() -> None:
    size, _ = length(8)
    assert isinstance(torch_private_sizes.size_expr(size), sympy.Symbol)
    assert torch_private_sizes.size_expr(2 * size).free_symbols == {torch_private_sizes.size_expr(size)}
    assert torch_private_sizes.size_expr(3) == 3


def test_decided_by() -> None:
    size, mode = length(8)
    symbol = torch_private_sizes.size_expr(size)
    assert torch_private_sizes.decided_by(mode, symbol) == ([], False)
    assert bool(size > 5)
    ((condition, place),), fixed = torch_private_sizes.decided_by(mode, symbol)
    assert isinstance(condition, sympy.StrictGreaterThan | sympy.StrictLessThan)
    assert ":" in place
    assert not fixed
    assert float(size) == 8
    assert torch_private_sizes.decided_by(mode, symbol)[1]


class Normed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (4,)).softmax(-1) * 2


def test_make_graph() -> None:
    """What is one operator of aten stays one, and a node of a module's forward knows the line that called it."""
    size, mode = length(8)
    with mode:
        graph = torch_private.make_graph(Normed(), [torch.empty(2, size, 4)]).graph
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    names = [torch_private.schema_of(node.target).name for node in nodes]
    assert names == ["aten::layer_norm", "aten::softmax", "aten::mul"]
    assert "test_torch_private_sizes.py" in (nodes[-1].stack_trace or "")


@pytest.mark.parametrize(("operator", "writes"), [("add.Tensor", False), ("add_.Tensor", True)])
def test_schema_of(operator: str, writes: bool) -> None:
    name, overload = operator.split(".")
    schema = torch_private.schema_of(getattr(getattr(torch.ops.aten, name), overload))
    assert schema.name == f"aten::{name}"
    assert schema.is_mutable == writes
    assert [argument.name for argument in schema.arguments] == ["self", "other", "alpha"]
