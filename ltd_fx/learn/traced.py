"""The modules that a flat traced graph was made of, as its nodes remember them (``node.meta["nn_module_stack"]``)."""

import sys
from typing import Any

import torch
from torch import Tensor, fx, nn

from ltd_fx.torch_private import input_spec_maybe, pytree

_STACK = "nn_module_stack"


def modules_of(node: fx.Node) -> list[tuple[str, Any]]:
    """The modules that a node was traced in, outermost first: fully qualified name, class or its dotted name."""
    return [(name, cls) for name, cls in (node.meta.get(_STACK) or {}).values()]


def calls_of(graph: fx.Graph, name: str) -> list[list[fx.Node]]:
    """The nodes of each call of the module of that name, in order."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        for key, (inner, _) in (node.meta.get(_STACK) or {}).items():
            if inner == name:
                calls.setdefault(key, []).append(node)
    return list(calls.values())


def mark_module(node: fx.Node, name: str, cls: type[nn.Module]) -> None:
    """Have the node remember that it was traced in that module, innermost."""
    node.meta[_STACK] = {**(node.meta.get(_STACK) or {}), name: (name, cls)}


def skeleton(graph: fx.Graph) -> nn.Module:
    """A tree of empty modules of the classes and names that ``graph`` was traced from, to select layers in."""
    root = nn.Module()
    classes = {name: cls for node in graph.nodes for name, cls in modules_of(node)}
    for name in sorted(classes, key=lambda name: name.count(".")):
        if name and all(part.isidentifier() or part.isdecimal() for part in name.split(".")):
            _put(root, name, _class(classes[name]))
    return root


def traced_inputs(model: fx.GraphModule) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """(args, kwargs) of a forward that a flat graph was traced for; ``None`` where it has not noted their shapes.

    Of its own sizes, with random floating-point values and ones elsewhere: what is learnt from them is of sizes.
    """
    given = [node.meta.get("val", node.meta.get("example_value")) for node in model.graph.find_nodes(op="placeholder")]
    if not any(isinstance(value, Tensor) for value in given):
        return None
    generator = torch.Generator().manual_seed(0)  # the user's own is left as it is
    values = [_made(value, generator) for value in given]
    spec = input_spec_maybe(model)
    if spec is None:
        return tuple(values), {}
    args, kwargs = pytree.tree_unflatten(values, spec)
    return args, kwargs


def _made(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor):
        return int(value) if isinstance(value, torch.SymInt) else value
    shape = [int(size.node.hint) if isinstance(size, torch.SymInt) else size for size in value.shape]
    if not value.is_floating_point():
        return torch.ones(shape, dtype=value.dtype, device=value.device)
    return torch.randn(shape, generator=generator, device="cpu").to(value.device, value.dtype)


def _put(root: nn.Module, name: str, cls: type[nn.Module]) -> None:
    *holders, last = name.split(".")
    module = root
    for i, part in enumerate(holders):
        if part not in dict(module.named_children()):
            after = [*holders, last][i + 1]
            module.add_module(part, nn.ModuleList() if after.isdecimal() else nn.Module())
        module = module.get_submodule(part)
    empty = cls.__new__(cls)
    nn.Module.__init__(empty)
    module.add_module(last, empty)


def _class(traced: Any) -> type[nn.Module]:
    """The class itself; exported programs have its name only, and may have been loaded where there is no such class."""
    if isinstance(traced, type):
        return traced
    module, _, name = str(traced).rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else type(name, (nn.Module,), {})
