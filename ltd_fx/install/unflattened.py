"""A module of ``torch.export.unflatten``: its graphs, one a module, made one that is routed as a flat graph is."""

import operator
from typing import Any, NamedTuple

from torch import fx, nn

from ltd_fx.install.graph_module import leave_methods
from ltd_fx.install.hooks import REWRITE, add_forward_hooks
from ltd_fx.passes import SITE
from ltd_fx.torch_private import share_contents


class Unflattened(NamedTuple):
    """What :func:`adopt` replaced: the root's own graph, and the module that ``torch.compile`` runs."""

    graph: fx.Graph
    graph_module: Any


def is_unflattened(model: nn.Module) -> bool:
    """Whether ``torch.export.unflatten`` made it; known by name, since its module takes long to import."""
    return type(model).__name__ == "UnflattenedModule"


def flattened(model: nn.Module) -> fx.GraphModule:
    """One flat graph that computes what ``model`` does from its flat arguments, with the very same weights."""
    flat = fx.Graph()
    root: Any = model
    copies: dict[fx.Node, Any] = {node: flat.node_copy(node) for node in root.graph.find_nodes(op="placeholder")}
    flat.output(_inline(root, "", flat, copies))
    flat.lint()
    made = fx.GraphModule(model, flat, type(model).__name__)
    share_contents(made, model)
    return made


def _inline(module: Any, path: str, flat: fx.Graph, copies: dict[fx.Node, Any]) -> Any:
    """Copy the module's nodes, and those of the modules that it calls; returns what it returns."""

    def copied(value: Any) -> Any:
        return fx.node.map_arg(value, copies.__getitem__)

    for node in module.graph.nodes:
        if node.op == "output":
            return copied(node.args[0])
        called: Any = module.get_submodule(node.target) if node.op == "call_module" else None
        if hasattr(called, "graph"):
            given = [copied(value) for value in node.args] + [copied(node.kwargs[name]) for name in node.kwargs]
            inner = dict(zip(called.graph.find_nodes(op="placeholder"), given, strict=True))
            copies[node] = _inline(called, f"{path}{node.target}.", flat, inner)
        elif node.target is operator.getitem and isinstance(copies[node.args[0]], (tuple, list)):
            copies[node] = copies[node.args[0]][node.args[1]]  # Of several results of such a module.
        elif node not in copies:
            copies[node] = flat.node_copy(node, copies.__getitem__)
            if node.op in ("get_attr", "call_module"):
                copies[node].target = path + node.target
    raise AssertionError("a graph without an output")


def adopt(model: nn.Module, routed: nn.Module) -> None:
    """Have ``model`` run the graph of ``routed``, which was :func:`flattened` from it and is transformed since."""
    root: Any = model
    assert isinstance(routed, fx.GraphModule)
    rewrite: Any = routed.__dict__.pop(REWRITE)
    leave_methods(routed)
    rewrite.unflattened = Unflattened(root.graph, root.graph_module)
    for hook in rewrite.hooks:
        hook.remove()
    for name in [name for name in routed.__dict__ if name.startswith(SITE)]:
        root.__dict__[name] = routed.__dict__[name]
    root.graph, root.__dict__["graph_module"] = routed.graph, routed
    rewrite.hooks = add_forward_hooks(model)
    root.__dict__[REWRITE] = rewrite


def give_back(model: nn.Module, unflattened: Unflattened) -> None:
    """Undo :func:`adopt`."""
    root: Any = model
    for name in [name for name in root.__dict__ if name.startswith(SITE)]:
        del root.__dict__[name]
    root.graph, root.__dict__["graph_module"] = unflattened
