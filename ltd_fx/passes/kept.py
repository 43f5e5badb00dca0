"""The arguments that a routed layer is called with, as its rewritten graph gathers them."""

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from ltd_fx.learn import LayerPattern, forward_signature
from ltd_fx.passes.capture import ARGS, KWARGS
from ltd_fx.passes.routed_layer import routed_class
from ltd_fx.runtime import Draw, draw_tokens, split_hidden


def kept_arguments(
    layer_class: type[nn.Module], pattern: LayerPattern, given: Mapping[str, Any], draw: Draw
) -> dict[str, Any]:
    """What ``layer_class.forward`` is given for the kept tokens of ``draw``, by its parameters' names.

    Args:
        layer_class: the layer's.
        pattern: how it is routed.
        given: what the layer was called with, by name; the hidden states are those of the kept tokens already.
        draw: which tokens are kept.

    Raises:
        LTDError: an argument does not fit the pattern.
    """
    signature = forward_signature(layer_class)
    parameters = signature.parameters.values()
    values: dict[fx.Node, Any] = {}
    for node in routed_class(layer_class, layer_class, pattern)._ltd_graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "placeholder":
            name = node.target.lstrip("*")
            empty: Any = {} if node.target.startswith("**") else ()
            values[node] = given.get(name, signature.parameters[name].default if name == node.target else empty)
        elif node.op == "get_attr":
            values[node] = draw.site
        elif node.target is draw_tokens:
            values[node] = draw
        elif node.target is split_hidden:
            values[node] = (None, given[pattern.hidden])
        elif node.op == "call_function":
            values[node] = node.target(*args, **kwargs)
        else:
            break
    special = {ARGS: "VAR_POSITIONAL", KWARGS: "VAR_KEYWORD"}
    by_kind = {p.kind.name: p.name for p in parameters}
    named = {by_kind[special[name]] if name in special else name: value for name, value in kwargs.items()}
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named.update(zip(positional, args, strict=False))
    return {name: named[name] for name in signature.parameters if name in named}
