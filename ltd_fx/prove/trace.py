"""A layer's own forward as a graph: in training mode, at a symbolic number of tokens, in its own dtype."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx, nn

from ltd_fx.learn import Call, LayerPattern, Sandbox, forward_signature
from ltd_fx.prove.values import Axis, Kind, Value, axis_of
from ltd_fx.runtime import Aligned
from ltd_fx.torch_private import (
    guards_of,
    is_replaced,
    make_graph,
    pytree,
    size_expr,
    symbolic_length,
    symbolic_mode,
)


class Trace(NamedTuple):
    """A traced layer.

    Attributes:
        graph: its operators, with fake tensors in ``meta["val"]``.
        length: the symbol of the number of tokens.
        inputs: what is known of the graph's placeholders.
        hidden: the axes of the hidden states.
        decided: what the layer decides by the number of tokens, and where; empty if nothing.
        excluded: a number of tokens, if any, at which it does something else.
    """

    graph: fx.Graph
    length: Any
    inputs: list[Value]
    hidden: tuple[Axis, ...]
    decided: str
    excluded: str


def trace(layer: nn.Module, pattern: LayerPattern, call: Call, sandbox: Sandbox) -> Trace:
    """Trace ``layer`` as ``call`` calls it, with a symbol for the number of tokens wherever ``pattern`` has them.

    Args:
        layer: stays as it is.
        pattern: which arguments follow the tokens.
        call: its tensors may be fake.
        sandbox: of the model.

    Raises:
        Exception: whatever the layer raises, or what traces it.
    """
    signature = forward_signature(type(layer))
    bound = signature.bind(*call.args, **call.kwargs)
    tokens = bound.arguments[pattern.hidden].shape[int(pattern.batch_first)]
    if pattern.cache in bound.arguments:
        bound.arguments[pattern.cache] = None
    mode = symbolic_mode()
    size = symbolic_length(mode, tokens)
    length, before = size_expr(size), len(guards_of(mode))
    leaves, spec = pytree.tree_flatten_with_path(dict(bound.arguments))
    made: list[Tensor] = []
    values: list[Value] = []

    def add(tensor: Tensor, dims: set[int], hidden: bool = False) -> Tensor:
        shape = [size + (n - tokens) if d in dims else n for d, n in enumerate(tensor.shape)]
        with mode:
            made.append(torch.empty(shape, dtype=tensor.dtype, device=tensor.device))
        axes = tuple(axis_of(size_expr(n), length) for n in shape)
        values.append(Value(Kind.ROW if dims else Kind.FIXED, axes, hidden))
        return made[-1]

    places = []
    for i, (path, leaf) in enumerate(leaves):
        if isinstance(leaf, Tensor):
            names = [key.key for key in path if hasattr(key, "key")]
            hidden = names[0] == pattern.hidden
            entry = (int(pattern.batch_first),) if hidden else _entry(pattern, names)
            add(leaf, _along(leaf, entry, tokens), hidden)
            places.append(i)
    hidden_axes = next(value.axes for value in values if value.hidden)
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    for tensor in state.values():
        add(tensor, set())
    flat = [leaf for _, leaf in leaves]

    def run(*tensors: Tensor) -> Any:
        given = list(flat)
        for place, tensor in zip(places, tensors, strict=False):
            given[place] = tensor
        again = signature.bind_partial()
        again.arguments.update(pytree.tree_unflatten(given, spec))
        own = dict(zip(state, tensors[len(places) :], strict=True))
        return torch.func.functional_call(layer, own, again.args, again.kwargs)

    with sandbox.open(layer), mode:
        layer.train()
        graph = make_graph(run, made).graph
    return Trace(graph, length, values, hidden_axes, *_decisions(mode, length, before))


def _decisions(mode: Any, length: Any, before: int) -> tuple[str, str]:
    """What was decided by the length: that holds for a part of all lengths, or for all but one."""
    if is_replaced(mode, length):
        return "it makes a plain number of the number of tokens", ""
    decided = {False: "", True: ""}
    for expr, place in guards_of(mode)[before:]:
        if length in expr.free_symbols:
            excludes_one = isinstance(expr, sympy.Ne)
            said = str(expr).replace(str(length), "tokens")
            decided[excludes_one] = decided[excludes_one] or f"it takes this way only where {said}: {place}"
    return decided[False], decided[True]


def _entry(pattern: LayerPattern, names: Sequence[Any]) -> Any:
    """What the pattern says of an argument, or of a member of ``**kwargs``."""
    return next((pattern.aligned[name] for name in names[:2] if name in pattern.aligned), ())


def _along(tensor: Tensor, entry: Any, tokens: int) -> set[int]:
    """The dimensions of ``tensor`` along which tokens lie."""
    sizes = {tokens + prefix for prefix in _prefixes(entry)}
    named = set(entry) if isinstance(entry, tuple) and entry and all(isinstance(d, int) for d in entry) else None
    return {d for d, n in enumerate(tensor.shape) if n in sizes and n > 1 and (named is None or d in named)}


def _prefixes(entry: Any) -> set[int]:
    if entry is None or entry == ():
        return set()
    if isinstance(entry, Aligned):
        return {entry.prefix}
    if isinstance(entry, tuple) and any(isinstance(item, tuple) for item in entry):
        return set().union(*map(_prefixes, entry))
    return {0}
