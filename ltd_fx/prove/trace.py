"""A layer's own forward as a graph, as a routed call runs it: in training mode, on a symbolic number of kept tokens."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx, nn

from ltd_fx.learn import Call, LayerPattern, Sandbox, forward_signature, quiet
from ltd_fx.passes import kept_arguments
from ltd_fx.prove.nodes import line_of
from ltd_fx.prove.values import Axis, Kind, Value, axis_of
from ltd_fx.runtime import BOUNDARIES, Draw, RouteState, Site
from ltd_fx.torch_private import FAKE_TENSOR_LOG, make_graph, pytree
from ltd_fx.torch_private_sizes import decided_by, size_expr, symbolic_mode, symbolic_sizes

_TORCH = str(Path(torch.__file__).parent)


class Trace(NamedTuple):
    """A traced layer.

    Attributes:
        graph: its operators, with fake tensors in ``meta["val"]``, and of a placeholder its name in ``meta["name"]``.
        length: the symbol of the number of tokens.
        inputs: what is known of the graph's placeholders.
        hidden: the axes of the hidden states.
        fixed: whether the number of tokens became a plain number, so that the graph is of that number alone.
        bound: a bound on the number of tokens for the way that was taken, and where; empty if there is none.
        unsure: another condition on it.
    """

    graph: fx.Graph
    length: Any
    inputs: list[Value]
    hidden: tuple[Axis, ...]
    fixed: bool
    bound: str
    unsure: str


def trace(
    layer: nn.Module, pattern: LayerPattern, call: Call, sandbox: Sandbox, *, shared: bool = False, protected: int = 0
) -> Trace:
    """Trace ``layer`` as it is called for the kept tokens of ``call``.

    Args:
        layer: stays as it is.
        pattern: which arguments follow the tokens.
        call: its tensors may be fake.
        sandbox: of the model.
        shared: one draw for the batch.
        protected: so many first tokens are always kept.

    Raises:
        Exception: whatever the layer raises, or what traces it.
    """
    signature = forward_signature(type(layer))
    given = dict(signature.bind(*call.args, **call.kwargs).arguments)
    # The call that was watched has filled its cache.
    given = {name: None if hasattr(value, "get_seq_length") else value for name, value in given.items()}
    batch, seq_len = given[pattern.hidden].shape[:2]
    if not pattern.batch_first:
        batch, seq_len = seq_len, batch
    mode = symbolic_mode()
    (size,) = symbolic_sizes(mode, (max(seq_len // 2, protected + 2),), "length")
    length = size_expr(size)
    with mode, quiet(FAKE_TENSOR_LOG):
        given = pytree.tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=t.device), given)
        hidden = given[pattern.hidden]
        indices = torch.empty(1 if shared else batch, size, dtype=torch.int64, device=hidden.device)
        draw = Draw(_site(layer, protected), indices, batch, seq_len, protected)
        shape = (batch, size, hidden.shape[2]) if pattern.batch_first else (size, batch, hidden.shape[2])
        given[pattern.hidden] = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
        kept = kept_arguments(type(layer), pattern, given, draw)
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    with mode:
        own = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in state.values()]
    leaves, spec = pytree.tree_flatten(kept)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    made = [*(leaves[i] for i in places), *own]
    names = _leaf_names(kept)
    values = [_value(tensor, length, protected, tensor is kept[pattern.hidden]) for tensor in made]
    for i, place in enumerate(places):
        name = names[place].rpartition("[")[2].strip("]'")
        if name in BOUNDARIES and name not in pattern.aligned and not values[i].token_axes():
            values[i] = replace(values[i], kind=Kind.BOUNDARIES)
    before = len(decided_by(mode, length)[0])

    def run(*tensors: Tensor) -> Any:
        again = list(leaves)
        for place, tensor in zip(places, tensors, strict=False):
            again[place] = tensor
        bound = inspect.BoundArguments(signature, pytree.tree_unflatten(again, spec))
        parameters = dict(zip(state, tensors[len(places) :], strict=True))
        return torch.func.functional_call(layer, parameters, bound.args, bound.kwargs)

    with sandbox.open(layer), mode, quiet(FAKE_TENSOR_LOG):
        layer.train()
        graph = make_graph(run, made).graph
    if isinstance(layer, fx.GraphModule):
        _set_lines(graph, layer.graph)
    for node, name in zip(graph.find_nodes(op="placeholder"), [*(names[i] for i in places), *state], strict=True):
        node.meta["name"] = name
    axes = next(value.axes for value in values if value.hidden)
    conditions, fixed = decided_by(mode, length)
    return Trace(graph, length, values, axes, fixed, *_conditions(conditions[before:], length, protected))


def _set_lines(graph: fx.Graph, traced: fx.Graph) -> None:
    """Give nodes of a layer that is itself a graph, ``traced``, the user's lines that it was traced from."""
    lines = {node.name: node.stack_trace for node in traced.nodes}
    for node in graph.nodes:
        line = line_of(node)
        if line is not None and line[0].startswith("<eval_with_key>"):  # what fx calls the code that it generates
            node.stack_trace = lines.get(line[2].partition(" ")[0]) or node.stack_trace


def _leaf_names(arguments: dict[str, Any]) -> list[str]:
    """The names of all leaves of a layer's arguments: ``position_embeddings[0]``."""
    paths = ((name, path) for name, given in arguments.items() for path, _ in pytree.tree_flatten_with_path(given)[0])
    return [name + pytree.keystr(path) for name, path in paths]


def _site(layer: nn.Module, protected: int) -> Site:
    state = RouteState(None, seed=0, shared=False, routed=1, dense=0)
    state.protected = protected
    return Site("the layer", 0, layer, state)


def _value(tensor: Tensor, length: Any, protected: int, hidden: bool) -> Value:
    axes = tuple(axis_of(size_expr(n), length, protected) for n in tensor.shape)
    along = any(factor.tokens for axis in axes for factor in axis)
    return Value(Kind.ROW if along else Kind.FIXED, axes, hidden)


def _conditions(conditions: list[tuple[Any, str]], length: Any, protected: int) -> tuple[str, str]:
    """What the trace took for granted of the number of tokens: a bound that the layer asks for, or anything else.

    What torch itself asks for (is this tensor contiguous, is that index within it) is no way that the layer takes,
    unless it ends at some number of tokens.
    """
    bound = unsure = ""
    for expr, place in conditions:
        if length not in expr.free_symbols or _always(expr, length, max(2, protected + 1)):
            continue
        of_torch, is_bound = place.startswith(_TORCH), isinstance(expr, (sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge))
        if of_torch and (isinstance(expr, sympy.Ne) or (is_bound and expr.subs(length, 10**9) == sympy.true)):
            continue
        said = f"it takes this way only where {str(expr).replace(str(length), 'tokens')} ({place})"
        if is_bound and not of_torch:
            bound = bound or said
        else:
            unsure = unsure or said
    return bound, unsure


def _always(condition: Any, length: Any, least: int) -> bool:
    """Whether a condition is seen to hold for ``least`` tokens and all larger numbers of them."""
    more = sympy.Symbol("more", integer=True, nonnegative=True)
    condition = condition.subs(length, more + least).replace(_divides, lambda mod: sympy.Integer(0))
    return bool(sympy.simplify(condition) == sympy.true)


def _divides(expr: Any) -> bool:
    """Whether ``expr`` is the remainder of what is a multiple."""
    return type(expr).__name__ in ("Mod", "PythonMod") and bool(sympy.cancel(expr.args[0] / expr.args[1]).is_Integer)
