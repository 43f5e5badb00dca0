"""Modules in the places of layers whose nodes are outlined."""

from collections.abc import Mapping
from types import MappingProxyType

from torch import fx, nn

from ltd_fx.torch_private import share_contents


def put_layers(
    model: fx.GraphModule, graphs: Mapping[str, fx.Graph], classes: Mapping[str, str] = MappingProxyType({})
) -> dict[str, nn.Module | None]:
    """Give ``model`` the modules that its graph calls once ``outline`` has changed it.

    Their weights stay where they are: names and ``state_dict`` keys are as they were.

    Args:
        model: the root.
        graphs: of the layers, by name.
        classes: what to call theirs.

    Returns:
        What was in the places of the layers: modules that hold their weights; ``None`` where there was none.
    """
    holders = {name: _holder_maybe(model, name) for name in graphs}
    for name, graph in graphs.items():
        holder = holders[name]
        layer = fx.GraphModule(nn.Module() if holder is None else holder, graph, classes.get(name, "GraphModule"))
        if holder is not None:  # All of it, also what the layer does not use.
            share_contents(layer, holder)
        layer.training = model.training
        put_module(model, name, layer)
    return holders


def _holder_maybe(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def put_module(model: nn.Module, name: str, module: nn.Module | None) -> None:
    """Set or, with ``None``, take away the submodule ``name``."""
    *holders, last = name.split(".")
    holder = model
    for part in holders:
        if part not in dict(holder.named_children()):
            holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    if module is None:
        delattr(holder, last)
    else:
        holder.add_module(last, module)
