"""What torch's private names about symbolic sizes must mean. A failure here says which name a release has changed."""

import pytest
import sympy
import torch
from torch import Tensor, nn

from ltd_fx import torch_private


def test_symbolic_length() -> None:
    size, mode = torch_private.symbolic_length(8)
    with mode:
        made = torch.empty(2, size + 1)
    assert torch_private.size_expr(made.shape[1]) == torch_private.size_expr(size) + 1
    assert size > 1
    assert torch_private.decided_by(mode, None)[0] == []  # It is known to be more than 1.


def test_size_expr() -> None:
    size, _ = torch_private.symbolic_length(8)
    assert isinstance(torch_private.size_expr(size), sympy.Symbol)
    assert torch_private.size_expr(2 * size).free_symbols == {torch_private.size_expr(size)}
    assert torch_private.size_expr(3) == 3


def test_decided_by() -> None:
    size, mode = torch_private.symbolic_length(8)
    symbol = torch_private.size_expr(size)
    assert torch_private.decided_by(mode, symbol) == ([], False)
    assert bool(size > 5)
    ((condition, place),), fixed = torch_private.decided_by(mode, symbol)
    assert isinstance(condition, sympy.StrictGreaterThan | sympy.StrictLessThan)
    assert ":" in place
    assert not fixed
    assert float(size) == 8
    assert torch_private.decided_by(mode, symbol)[1]


class Normed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (4,)).softmax(-1) * 2


def test_make_graph() -> None:
    """What is one operator of aten stays one, and a node of a module's forward knows the line that called it."""
    size, mode = torch_private.symbolic_length(8)
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
