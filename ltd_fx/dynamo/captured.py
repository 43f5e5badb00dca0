"""A graph that Dynamo captured, as a flat ``fx.GraphModule`` of the model: its weights are attributes again.

Dynamo's graph takes the weights as inputs, its sizes too, and names modules by where the frame found them
(``L['self'].layers.1``).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from ltd_fx.dynamo.origin import Origin, weight_of
from ltd_fx.torch_private_dynamo import put_tensor, source_name, sources_of

_ITEM = re.compile(r".*\['(\w+)'\]")
_STACK = "nn_module_stack"


class Captured:
    """The graph of one frame.

    Args:
        graph: Dynamo's; it stays as it is.
        inputs: what it was captured with.
        origin: where it comes from.
        names: of the modules in the model.

    Attributes:
        module: the flat graph: it takes what is no weight, and remembers the modules by the model's names.
        given: the places among Dynamo's inputs of those that it takes.
        weights: the places of its attributes, by name.
    """

    def __init__(
        self, graph: fx.GraphModule, inputs: Sequence[Any], origin: Origin, names: Mapping[nn.Module, str]
    ) -> None:
        self.given: list[int] = []
        self.weights: dict[str, int] = {}
        self._arguments: dict[str, int] = {}
        self._flat, self._copies = fx.Graph(), dict[fx.Node, fx.Node]()
        self._take(graph.graph.find_nodes(op="placeholder"), origin, names)
        entries = _Entries(origin, names)
        for node in graph.graph.nodes:
            if node.op == "output":
                self._flat.output(fx.node.map_arg(node.args[0], self._copies.__getitem__))
            elif node.op != "placeholder":
                self._copies[node] = self._flat.node_copy(node, self._copies.__getitem__)
                self._copies[node].meta = {**node.meta, _STACK: entries.of(node)}
        self._flat.lint()
        held = {name: inputs[place] for name, place in self.weights.items()}
        calls = {name: attrgetter(name)(graph) for name in _targets(self._flat) if name not in held}
        self.module = fx.GraphModule({**held, **calls}, self._flat)
        del self._copies, self._flat  # Dynamo's own nodes are among them.
        self._holders = {name: self.module.get_submodule(name.rpartition(".")[0]) for name in held}
        self._bind(dict.fromkeys(held))

    def _take(self, placeholders: Sequence[fx.Node], origin: Origin, names: Mapping[nn.Module, str]) -> None:
        sizes = []
        for place, node in enumerate(placeholders):
            value, weight = node.meta["example_value"], _name_maybe(node, origin, names)
            if isinstance(value, torch.SymInt):
                sizes.append((place, node))
            elif weight is not None:
                self.weights[weight] = place
            else:
                self._place(place, node)
        for name, place in self.weights.items():
            self._copies[placeholders[place]] = self._flat.get_attr(name)
        for place, node in sizes:
            self._copies[node] = self._size_maybe(node.meta["example_value"]) or self._place(place, node)
        for node, copied in self._copies.items():
            copied.meta = {"example_value": node.meta["example_value"]}

    def _place(self, place: int, node: fx.Node) -> fx.Node:
        last = next(reversed(self._flat.find_nodes(op="placeholder")), None)
        with self._flat.inserting_after(last) if last is not None else self._flat.inserting_before(None):
            self._copies[node] = self._flat.placeholder(node.name)
        self.given.append(place)
        item = _ITEM.fullmatch(next(map(source_name, sources_of(node)), ""))
        if item is not None:
            self._arguments[item[1]] = place
        return self._copies[node]

    def _size_maybe(self, size: torch.SymInt) -> fx.Node | None:
        """The size, computed from a tensor that is given: as an input, each of its values would be compiled."""
        for node, copied in self._copies.items():
            value = node.meta["example_value"]
            for dim, other in enumerate(getattr(value, "shape", ())):
                if isinstance(other, torch.SymInt) and other.node.expr == size.node.expr:
                    return self._flat.call_function(torch.ops.aten.sym_size.int, (copied, dim))
        return None

    def argument(self, name: str | None, inputs: Sequence[Any]) -> Any:
        """That of ``inputs`` which is an argument of the frame, or an item of one, called ``name``; or ``None``."""
        place = self._arguments.get(name or "")
        return None if place is None else inputs[place]

    @contextmanager
    def weights_of(self, inputs: Sequence[Any]) -> Iterator[None]:
        """Within, the module has the weights that are among ``inputs``; it holds none otherwise."""
        self._bind({name: inputs[place] for name, place in self.weights.items()})
        try:
            yield
        finally:
            self._bind(dict.fromkeys(self.weights))

    def _bind(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            put_tensor(self._holders[name], name.rpartition(".")[2], value)


class _Entries:
    """``nn_module_stack`` of nodes, by the model's names."""

    def __init__(self, origin: Origin, names: Mapping[nn.Module, str]) -> None:
        self._origin, self._names = origin, names
        self._outer = {source: (names[root], type(root)) for source, root in origin.roots.items() if names.get(root)}

    def of(self, node: fx.Node) -> dict[str, tuple[str, Any]]:
        entries = dict(self._outer)
        for key, (path, cls) in (node.meta.get(_STACK) or {}).items():
            module = self._origin.module_maybe(path)
            if module is not None and module in self._names:
                entries[key] = (self._names[module], cls)
        return entries


def _name_maybe(node: fx.Node, origin: Origin, names: Mapping[nn.Module, str]) -> str | None:
    """What the input is called in the model, if it is a weight of it."""
    found = weight_of(node)
    root = None if found is None else origin.roots.get(found["root"])
    if found is None or root is None:
        return None
    holder = root.get_submodule(".".join(re.findall(r"\['([^']+)'\]", found["path"])))
    if holder not in names:
        return None
    return f"{names[holder]}.{found['name']}" if names[holder] else str(found["name"])


def _targets(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
