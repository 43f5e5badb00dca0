"""A flat ``fx.GraphModule`` whose layers are called as modules, each a graph of its own, until it is put back."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from ltd_fx.errors import LTDError
from ltd_fx.passes import outline, put_layers, put_module

# The operators that tell the mode in which a layer was traced, by an argument and its place.
_MODES: dict[Any, tuple[str, int]] = {
    torch.ops.aten.dropout.default: ("train", 2),
    torch.ops.aten.native_dropout.default: ("train", 2),
    torch.ops.aten.feature_dropout.default: ("train", 2),
    torch.ops.aten.batch_norm.default: ("training", 5),
}


class Outlined(NamedTuple):
    """What :func:`outline_layers` changed.

    Attributes:
        graph: the flat one.
        holders: what was in the places of the layers: modules that hold their weights; ``None`` where there was none.
    """

    graph: fx.Graph
    holders: dict[str, nn.Module | None]


def outline_layers(model: fx.GraphModule, layers: Mapping[str, type[nn.Module]]) -> Outlined:
    """Make ``layers`` of a flat graph (by name, with the classes that they were traced from) modules that it calls.

    Their weights stay where they are: names and ``state_dict`` keys are as they were.

    Raises:
        LTDError: a layer cannot be told from the rest of the graph, or was traced in eval mode; nothing is changed.
    """
    flat, graph = model.graph, copy.deepcopy(model.graph)
    graph.owning_module = None
    graphs = outline(graph, names=list(layers))
    for name, own in graphs.items():
        _refuse_eval(name, own)
    holders = put_layers(model, graphs, {name: cls.__name__ for name, cls in layers.items()})
    model.graph = graph
    return Outlined(flat, holders)


@contextmanager
def outlined(model: nn.Module, layers: Mapping[str, type[nn.Module]]) -> Iterator[Outlined | None]:
    """:func:`outline_layers`, undone where what follows fails; of another model, nothing."""
    if not layers:
        yield None
        return
    assert isinstance(model, fx.GraphModule)
    done = outline_layers(model, layers)
    try:
        yield done
    except BaseException:
        inline_layers(model, done)
        raise


def inline_layers(model: fx.GraphModule, outlined: Outlined) -> None:
    """Undo :func:`outline_layers`."""
    for name, holder in outlined.holders.items():
        put_module(model, name, holder)
    model.graph = outlined.graph


def _refuse_eval(name: str, graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target in _MODES:
            argument, place = _MODES[node.target]
            training = node.kwargs.get(argument, node.args[place] if place < len(node.args) else None)
            if training is False:
                raise LTDError(
                    f"ltd_fx: {name} was traced in eval mode ({node.target} has {argument}=False), so it cannot be "
                    "trained; call model.train() before torch.export or make_fx"
                )
