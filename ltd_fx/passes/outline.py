"""Make the nodes of each layer, in a flat traced graph, one call of a module: what the other passes start from.

before  %norm   = call_function[target=aten.layer_norm](args = (%hidden, ...))      nn_module_stack: layers.1.norm
        %view   = call_function[target=aten.view](args = (%norm, [%batch, %length, 2, 8]))              layers.1
        %add    = call_function[target=aten.add](args = (%hidden, %view, ...))                          layers.1

after   %layer  = call_module[target=layers.1](args = (%hidden, %mask))

Sizes are computed anew within, from what the layer is given, so that they are those of the kept tokens there.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from ltd_fx.errors import LTDError
from ltd_fx.learn import calls_of
from ltd_fx.passes.graph_pass import GraphPass
from ltd_fx.passes.locate import VALUES
from ltd_fx.torch_private import ASSERT_SCALAR

_ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg}
_SIZES = {torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default}


@GraphPass
def outline(graph: fx.Graph, *, names: Sequence[str]) -> dict[str, fx.Graph]:
    """Replace the nodes of each call of a layer by a ``call_module`` of its name.

    Args:
        graph: flat; it is changed in place.
        names: of the layers, as in ``nn_module_stack``.

    Returns:
        The layers' own graphs, by name: a placeholder for each tensor that comes from outside, the hidden states
        first, and attributes named as from within the layer. :func:`put_layers` makes modules of them.

    Raises:
        LTDError: a layer is never called; the nodes of a call have several results, or are not those of the others;
            discard the graph then.
    """
    _hoist_sizes(graph, names)
    return {name: _outline_layer(graph, name) for name in names}


def _hoist_sizes(graph: fx.Graph, names: Sequence[str]) -> None:
    """Take sizes that are read off a layer's tensors, and used outside of it, from tensors before all layers."""
    owner = {node: (name, i) for name in names for i, call in enumerate(calls_of(graph, name)) for node in call}
    before: dict[Any, tuple[fx.Node, int]] = {}
    last = next(reversed(graph.find_nodes(op="placeholder")), None)
    for node in [*graph.nodes]:
        value = _value(node)
        if node not in owner and isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                before.setdefault(_expr(size), (node, dim))
        elif node.target is torch.ops.aten.sym_size.int and isinstance(value, torch.SymInt):
            home = owner.get(node.args[0])
            if home is not None and _expr(value) in before and any(owner.get(user) != home for user in node.users):
                given, dim = before[_expr(value)]
                with graph.inserting_after(last if given.op == "placeholder" else given):
                    outside = graph.call_function(torch.ops.aten.sym_size.int, (given, dim))
                outside.meta = {key: value for key, value in node.meta.items() if key in VALUES}
                node.replace_all_uses_with(outside)


def _outline_layer(graph: fx.Graph, name: str) -> fx.Graph:
    calls = [_Call(graph, name, nodes) for nodes in calls_of(graph, name)]
    if not calls:
        raise LTDError(f"ltd_fx: {name} is never called; leave it out with transform(..., layers=...)")
    first, *others = [call.outline() for call in calls]
    code = first.python_code("self").src
    if any(other.python_code("self").src != code for other in others):
        raise LTDError(
            f"ltd_fx: {name} cannot be routed in this graph: it is called {len(calls)} times, not in the same way; "
            "leave it out with transform(..., layers=...)"
        )
    return first


class _Call:
    """The nodes of one call of a layer, and what becomes of them."""

    def __init__(self, graph: fx.Graph, name: str, nodes: list[fx.Node]) -> None:
        self.name, self.flat, self.own = name, graph, fx.Graph()
        self.nodes = {node: None for node in nodes if _computes(node)}
        self.copies: dict[fx.Node, fx.Node] = {}
        self.inputs: dict[fx.Node, fx.Node] = {}

    def outline(self) -> fx.Graph:
        output = self._output()
        hidden = self._hidden(output)
        if hidden is not None:
            self._input(hidden)
        for node in self.nodes:
            self._copy(node)
        self.own.output(self.copies[output])
        self._replace(output)
        self.own.lint()
        return self.own

    def _output(self) -> fx.Node:
        outputs = [node for node in self.nodes if any(map(self._escapes, node.users))]
        if len(outputs) != 1 or not _is_tensor(outputs[0]):
            seen = ", ".join(node.name for node in outputs) or "nothing"
            raise LTDError(
                f"ltd_fx: {self.name} cannot be routed in this graph: {seen} of it is used outside, and it should be "
                "its hidden states alone; leave it out with transform(..., layers=...), or trace the model with the "
                "layers as leaves"
            )
        output: fx.Node = outputs[0]
        return output

    def _escapes(self, user: fx.Node) -> bool:
        return user not in self.nodes and (not _is_size(user) or any(map(self._escapes, user.users)))

    def _hidden(self, output: fx.Node) -> fx.Node | None:
        """The first input of the output's shape, where the graph has values."""
        value = _value(output)
        if not isinstance(value, torch.Tensor):
            return None
        if value.ndim == 3 and not any(isinstance(size, torch.SymInt) for size in value.shape[:2]):
            raise LTDError(
                f"ltd_fx: {self.name} cannot be routed in this graph: it was traced for hidden states of shape "
                f"{tuple(value.shape)} only; trace the model with a dynamic sequence dimension (dynamic_shapes of "
                "torch.export, tracing_mode='symbolic' of make_fx)"
            )
        given = (arg for node in self.nodes for arg in node.all_input_nodes if arg not in self.nodes)
        return next((arg for arg in given if _same(_value(arg), value)), None)

    def _copy(self, node: fx.Node) -> fx.Node:
        """``node`` in the layer's graph: one of its own, a size computed anew, an attribute of it, or an input."""
        if node not in self.copies:
            if node in self.nodes:
                self.copies[node] = self._copied(node, self._within(node.target) if node.op == "call_module" else None)
            elif node.op == "get_attr" and str(node.target).startswith(self.name + "."):
                self.copies[node] = self._copied(node, self._within(node.target))
            elif _is_size(node):
                self.copies[node] = self._size(node)
            else:
                return self._input(node)
        return self.copies[node]

    def _copied(self, node: fx.Node, target: str | None = None) -> fx.Node:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._copy)
        copied = self.own.create_node(node.op, target or node.target, args, kwargs)
        copied.meta = {key: value for key, value in node.meta.items() if key not in VALUES}
        return copied

    def _within(self, target: Any) -> str:
        return str(target).removeprefix(self.name + ".")

    def _size(self, node: fx.Node) -> fx.Node:
        """From the hidden states, where it is known to be theirs; else from what it was computed from."""
        size = _value(node)
        for given, own in self.inputs.items():
            shape = getattr(_value(given), "shape", ())
            for dim, other in enumerate(shape):
                if isinstance(size, torch.SymInt) and isinstance(other, torch.SymInt) and _expr(size) == _expr(other):
                    return self.own.call_function(torch.ops.aten.sym_size.int, (own, dim))
        return self._copied(node)

    def _input(self, node: fx.Node) -> fx.Node:
        if node not in self.inputs:
            last = next(iter(reversed(self.inputs.values())), None)
            first = next(iter(self.own.nodes), None)
            place = self.own.inserting_after(last) if last is not None else self.own.inserting_before(first)
            with place:
                self.inputs[node] = self.own.placeholder(
                    f"input_{len(self.inputs)}" if self.inputs else "hidden_states"
                )
        return self.inputs[node]

    def _replace(self, output: fx.Node) -> None:
        """Put the call in the place of the nodes."""
        order = {node: i for i, node in enumerate(self.flat.nodes)}
        users = [user for user in output.users if user not in self.nodes]
        following = set(_following(self.nodes))
        late = next((node for node in self.inputs if node in following), None)
        last = max(self.inputs, key=order.__getitem__)
        first = min(users, key=order.__getitem__)
        if late is not None or order[last] > order[first]:
            raise LTDError(
                f"ltd_fx: {self.name} cannot be routed in this graph: {(late or last).name}, which it takes, is "
                "computed from within it; leave it out with transform(..., layers=...)"
            )
        with self.flat.inserting_before(first):
            call = self.flat.create_node("call_module", self.name, tuple(self.inputs))
        call.meta = dict(output.meta)
        for user in users:
            user.replace_input_with(output, call)
        for node in reversed([*self.flat.nodes]):
            if (node in self.nodes or _is_size(node) or node.op == "get_attr") and not node.users:
                self.flat.erase_node(node)


def _computes(node: fx.Node) -> bool:
    """Whether it is a layer's own: no size, which is computed where it is needed, nor a check of one, nor a number."""
    called = node.op in ("call_function", "call_method", "call_module")
    return called and not _is_size(node) and node.target is not ASSERT_SCALAR and not _is_number(node)


def _is_number(node: fx.Node) -> bool:
    """Whether it is a Python number that the graph is given, which Dynamo passes as a tensor (``dynamic=True``)."""
    return node.target == "item" and all(given.op == "placeholder" for given in node.all_input_nodes)


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a size of a tensor, or computed from such."""
    if node.op == "call_method":
        return node.target in ("size", "numel", "dim")
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    if node.target in _SIZES:
        return True
    given = node.all_input_nodes
    computed = node.target in _ARITHMETIC or node.target is operator.getitem or _is_symbolic(node)
    return computed and bool(given) and all(map(_is_size, given))


def _is_symbolic(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "").startswith("sym_")


def _value(node: fx.Node) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))


def _is_tensor(node: fx.Node) -> bool:
    value = _value(node)
    return value is None or isinstance(value, torch.Tensor)


def _same(a: Any, b: torch.Tensor) -> bool:
    """Whether a value may be the hidden states that a layer returns as ``b``."""
    if not isinstance(a, torch.Tensor) or not a.is_floating_point() or a.ndim != b.ndim:
        return False
    return all(_expr(n) == _expr(m) for n, m in zip(a.shape, b.shape, strict=True))


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _following(nodes: Any) -> Iterator[fx.Node]:
    """All that is computed from ``nodes``, and is none of them."""
    seen: set[fx.Node] = set()
    waiting = [user for node in nodes for user in node.users if user not in nodes]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [user for user in node.users if user not in nodes]
