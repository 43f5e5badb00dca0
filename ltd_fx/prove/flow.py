"""Token flow: how tokens meet in a layer, read off its traced graph, operator by operator.

A layer may see a subset of the tokens if they meet in attention only, and if nothing in it depends on how many there
are or on which place one has among them. ``values`` has what is known of a tensor, ``rules`` what an operator makes of
it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from ltd_fx.prove.nodes import operator_name, where, writes, written_maybe
from ltd_fx.prove.values import Axis, Factor, Kind, MixesError, UnknownError, Value, axis_of, has_tokens, size_of
from ltd_fx.prove.verdict import Verdict
from ltd_fx.torch_private import OpOverload, pytree, schema_of, storage_of, written_by
from ltd_fx.torch_private_sizes import size_expr

# What they take of a tensor is its shape and its dtype: of the first, or of the second.
_SHAPE_ALONE = ("ones_like", "zeros_like", "full_like", "empty_like", "rand_like", "randn_like", "new_empty_strided")
_SHAPE_OF_ANOTHER = ("expand_as", "view_as", "reshape_as", "type_as", "to")
# What may be done with the boundaries of documents: some of them, of another type, and looking places up.
_OF_BOUNDARIES = ("searchsorted", "bucketize", "slice", "to", "clone", "contiguous", "detach", "alias")

Rule = Callable[["Op"], Any]
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register the rule of the operators ``aten.<name>``, whatever their overloads; names have spaces between them."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


class Op:
    """One call of an operator, as a rule sees it: arguments by their names in the schema, tensors as their values."""

    def __init__(self, flow: "Flow", node: fx.Node) -> None:
        self.flow, self.node = flow, node
        schema = schema_of(node.target)
        self.name = operator_name(node)
        self.names = frozenset(argument.name for argument in schema.arguments)
        self._bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        self._bound.update(zip((a.name for a in schema.arguments), node.args, strict=False))
        self._bound.update(node.kwargs)
        self.out: Any = node.meta.get("val")

    def __getitem__(self, name: str) -> Any:
        """An argument that is no tensor; a symbolic number as it is."""
        value = self._bound.get(name)
        return pytree.tree_map_only(fx.Node, lambda node: node.meta.get("val"), value)

    def value(self, name: str) -> Value:
        """A tensor's value; a number's is that of a tensor without dimensions."""
        return self._value_of(self._bound[name])

    def values(self, name: str) -> list[Value]:
        return [self._value_of(item) for item in self._bound[name]]

    def maybe(self, name: str) -> Value | None:
        return None if self._bound.get(name) is None else self.value(name)

    def operands(self) -> list[Value]:
        """All tensors and symbolic numbers among the arguments, in order."""
        nodes = [leaf for leaf in pytree.tree_leaves(list(self._bound.values())) if isinstance(leaf, fx.Node)]
        return [self._value_of(node) for node in nodes if node in self.flow.values or self.flow.is_length(node)]

    def _value_of(self, item: Any) -> Value:
        if isinstance(item, fx.Node) and item in self.flow.values:
            value: Value = self.flow.values[item]
            return value
        counts = isinstance(item, fx.Node) and self.flow.is_length(item)
        return Value(Kind.POSITION if counts else Kind.FIXED, ())

    def dim(self, name: str, ndim: int) -> int:
        return int(self[name]) % max(ndim, 1)

    def dims(self, name: str, ndim: int) -> set[int]:
        """Dimensions to reduce: those that are named, or all."""
        given = self[name]
        given = [given] if isinstance(given, int) else given
        return {int(d) % max(ndim, 1) for d in given} if given else set(range(ndim))

    def axis(self, size: Any) -> Axis:
        return self.axis_of(size_expr(size))

    def axis_of(self, size: Any) -> Axis:
        """The axis of a new tensor, by the expression of its size."""
        return axis_of(size, self.flow.length, self.flow.protected)

    def axes(self, shape: Sequence[Any]) -> tuple[Axis, ...]:
        """The axes of a new tensor."""
        return tuple(map(self.axis, shape))


class Flow:
    """The abstract interpretation of one graph.

    Args:
        graph: traced from a layer, with the fake tensor of each node in ``meta["val"]``.
        length: the symbol of the number of tokens.
        inputs: the values of the placeholders, in order.
        protected: so many first tokens are always there.
    """

    def __init__(self, graph: fx.Graph, length: Any, inputs: Sequence[Value], protected: int = 0) -> None:
        self.length, self.protected = length, protected
        self.values: dict[fx.Node, Any] = {}
        self.flaws: dict[fx.Node, Verdict] = {}  # What is wrong with a value, or with what it was computed from.
        self.origins: dict[Verdict, fx.Node] = {}  # Where each flaw was found.
        self._graph, self._inputs = graph, iter(inputs)
        self._storages: dict[int, set[fx.Node]] = {}
        self._written = set(map(written_maybe, graph.nodes))

    def is_length(self, node: fx.Node) -> bool:
        """Whether the node is a number that depends on the length."""
        value = node.meta.get("val")
        return isinstance(value, (torch.SymInt, torch.SymFloat)) and self.length in size_expr(value).free_symbols

    def judge(self, output: Callable[[Any], Any], hidden: tuple[Axis, ...]) -> Verdict:
        """What the graph says of the layer.

        What is wrong with a value matters if the hidden states that the layer returns come of it: a loss on the side
        may be a mean over all tokens.

        Args:
            output: of what the layer returns, the hidden states.
            hidden: their axes, as they came in.
        """
        for node in self._graph.nodes:
            try:
                if node.op == "output":
                    returned = output(node.args[0])
                    if returned in self.flaws:
                        return self.flaws[returned]
                    self._check_output(returned, hidden)
                elif writes(node) or any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node.meta.get("val"))):
                    self._visit(node)
            except (MixesError, UnknownError) as error:
                return self._verdict(error, node)
        return Verdict()

    def _visit(self, node: fx.Node) -> None:
        made: Any = node.meta.get("val")
        if writes(node):
            self._check_write(node)
        flaw = self._inherited(node)
        if flaw is None:
            try:
                self.values[node] = self._evaluate(node)
            except (MixesError, UnknownError) as error:
                flaw = self._verdict(error, node)
        if flaw is not None:
            self.flaws[node] = flaw
            shape = made.shape if isinstance(made, Tensor) else ()
            axes = tuple(axis_of(size_expr(n), self.length, self.protected) for n in shape)
            self.values[node] = Value(Kind.ROW, axes, hidden=True)
        if writes(node):
            self._write(node)
        if isinstance(made, Tensor):
            self._storages.setdefault(storage_of(made), set()).add(node)

    def _inherited(self, node: fx.Node) -> Verdict | None:
        """What is wrong with the values that a node is computed from."""
        name = operator_name(node)
        if name in _SHAPE_ALONE:
            return None
        read = node.all_input_nodes[:1] if name in _SHAPE_OF_ANOTHER else node.all_input_nodes
        flaws = [self.flaws[each] for each in read if each in self.flaws]
        if not flaws:
            return None
        if isinstance(node.target, OpOverload) and name not in RULES:
            return self._verdict(UnknownError("nothing is known of this operator"), node)
        return max(flaws, key=lambda flaw: bool(flaw.mixes))

    def _evaluate(self, node: fx.Node) -> Any:
        if any(self._is_of_values(each) for each in node.all_input_nodes):
            raise UnknownError("it goes by a number that was taken of a tensor")
        if operator_name(node) not in _OF_BOUNDARIES and any(map(self._is_boundaries, node.all_input_nodes)):
            raise UnknownError("it computes with the boundaries of documents")
        found = self._value(node)
        for made, value in zip(
            *(x if isinstance(x, (list, tuple)) else [x] for x in (node.meta["val"], found)), strict=True
        ):
            if isinstance(made, Tensor) and [size_of(a) for a in value.axes] != [size_expr(n) for n in made.shape]:
                raise UnknownError("its axes cannot be told")
        return found

    def _is_boundaries(self, node: fx.Node) -> bool:
        value = self.values.get(node)
        return isinstance(value, Value) and value.kind is Kind.BOUNDARIES

    def _is_of_values(self, node: fx.Node) -> bool:
        """Whether the node is a number that came of a tensor's values, not of the length alone."""
        value = node.meta.get("val")
        numbers = (torch.SymInt, torch.SymFloat, torch.SymBool)
        return isinstance(value, numbers) and bool(size_expr(value).free_symbols - {self.length})

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            value = next(self._inputs)
            keeps = node in self._written and value.kind is Kind.FIXED
            return replace(value, kind=Kind.STATE) if keeps else value
        if node.op == "get_attr":
            return Value(Kind.FIXED, tuple(axis_of(size_expr(n), self.length) for n in node.meta["val"].shape))
        if not isinstance(node.target, OpOverload):
            return self._getitem(node)
        op = Op(self, node)
        if op.name not in RULES:
            return self._without_rule(op)
        try:
            return RULES[op.name](op)
        except (MixesError, UnknownError):
            raise
        except Exception as error:  # Its rule did not think of this way to call the operator.
            raise UnknownError(f"its rule fails ({type(error).__name__}: {error})") from error

    def _getitem(self, node: fx.Node) -> Any:
        source, *index = cast("tuple[Any, ...]", node.args)
        if getattr(node.target, "__name__", "") != "getitem" or not isinstance(self.values.get(source), (list, tuple)):
            raise UnknownError("nothing is known of this operator")
        return self.values[source][index[0]]

    def _check_write(self, node: fx.Node) -> None:
        """An operator that writes into a tensor: its first argument alone, which nothing else may see."""
        written = written_maybe(node)
        if written is None or written_by(cast("OpOverload", node.target)) - {0, "self"}:
            raise UnknownError("it writes into several tensors, or another than its first")
        if self.values[written].kind is Kind.ROW and written.op == "placeholder":
            raise MixesError("it writes into its input")
        if self._storages.get(storage_of(written.meta["val"]), set()) - {written}:
            raise UnknownError("it writes into a part of a tensor")

    def _write(self, node: fx.Node) -> None:
        """What was written to has the value of the result; what outlives the forward is a state."""
        written = written_maybe(node)
        assert written is not None
        if written.op != "call_function":
            if self.values[node].hidden:
                raise UnknownError("it keeps a state of its hidden states")
            self.values[node] = replace(self.values[node], kind=Kind.STATE)
        self.values[written] = self.values[node]
        if node in self.flaws:
            self.flaws[written] = self.flaws[node]

    def _without_rule(self, op: Op) -> Value:
        """An operator that is not known: harmless, where nothing that it takes depends on tokens."""
        axes = op.axes(op.out.shape) if isinstance(op.out, Tensor) else None
        given = op.operands()
        if axes is None or any(map(has_tokens, axes)) or any(v.token_axes() or v.kind is not Kind.FIXED for v in given):
            raise UnknownError("nothing is known of this operator")
        return Value(Kind.FIXED, axes)

    def _verdict(self, error: Exception, node: fx.Node) -> Verdict:
        said = f"{error}: {where(node)}"
        verdict = Verdict(mixes=said) if isinstance(error, MixesError) else Verdict(unknown=said)
        self.origins.setdefault(verdict, node)
        return verdict

    def _check_output(self, node: Any, hidden: tuple[Axis, ...]) -> None:
        value = self.values.get(node)
        if not isinstance(value, Value):
            raise UnknownError("its hidden states cannot be told among what it returns")
        if value.kind in (Kind.RANK, Kind.POSITION, Kind.STATE):
            raise MixesError("what it returns counts positions among the tokens that are there")
        if value.kind is Kind.WEIGHTS or _plain(value.axes) != _plain(hidden):
            raise UnknownError("the hidden states that it returns have other axes")


def _plain(axes: Sequence[Axis]) -> list[tuple[Factor, ...]]:
    return [tuple(factor for factor in axis if factor.tokens) for axis in axes]
