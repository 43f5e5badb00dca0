"""Find the target layers of a model, as stacks: the layers that share a parent, in order."""

import difflib
import re
from collections.abc import Callable, Sequence
from contextlib import suppress

from torch import fx, nn

from ltd_fx.errors import LTDError
from ltd_fx.learn.call_site import CallSite
from ltd_fx.learn.patterns import find_pattern_maybe, is_known, is_registered
from ltd_fx.learn.traced import skeleton
from ltd_fx.torch_private import CHECKPOINT_WRAPPED_MODULE

Layers = type[nn.Module] | tuple[type[nn.Module], ...] | str | Sequence[str] | Callable[[str, nn.Module], bool] | None


def find_stacks(model: nn.Module, layers: Layers) -> list[list[CallSite]]:
    """The stacks of layers that ``layers`` selects (see ``ltd_fx.transform``).

    Of a flat graph, in which no layer is called, they are those that it was traced from: how they are called is the
    graph's own way, so no pattern of their classes is theirs.

    Raises:
        LTDError: as :func:`find_layers`.
    """
    stacks: dict[str, list[CallSite]] = {}
    traced = flat_layers(model, layers)
    for name, cls in traced.items():
        stack = name.rpartition(".")[0]
        stacks.setdefault(stack, []).append(CallSite(name, cls.__name__, stack))
    if traced:
        return list(stacks.values())
    for path in find_layers(model, layers):
        name = path.removesuffix("." + CHECKPOINT_WRAPPED_MODULE)
        layer, stack = layer_in(model.get_submodule(name)), name.rpartition(".")[0]
        pattern, vouched = find_pattern_maybe(layer), is_registered(layer)
        site = CallSite(name, type(layer).__name__, stack, pattern=pattern, vouched=vouched)
        stacks.setdefault(stack, []).append(site)
    return list(stacks.values())


def flat_layers(model: nn.Module, layers: Layers) -> dict[str, type[nn.Module]]:
    """The layers that ``layers`` selects of those that a flat ``fx.GraphModule`` was traced from, with their classes.

    None of a graph that calls them, or of one that was traced from none.

    Raises:
        LTDError: as :func:`find_layers`.
    """
    if not isinstance(model, fx.GraphModule):
        return {}
    called = {node.target for node in model.graph.nodes if node.op == "call_module"}
    tree = skeleton(model.graph)
    with suppress(LTDError):
        if called.issuperset(find_layers(model, layers)):
            return {}
    if not list(tree.children()):
        return {}
    return {name: type(tree.get_submodule(name)) for name in find_layers(tree, layers)}


def layer_in(slot: nn.Module) -> nn.Module:
    """The layer that a place in the model holds: the module there, or the one in the checkpoint wrapper there."""
    layer: nn.Module = getattr(slot, CHECKPOINT_WRAPPED_MODULE, slot)
    return layer


def find_layers(model: nn.Module, layers: Layers) -> list[str]:
    """The fully qualified names that ``layers`` selects, in order.

    Raises:
        LTDError: nothing matches, or a match lies within another.
    """
    modules = dict(model.named_modules())
    names = [name for name in _select(modules, layers) if name]
    if not names:
        raise LTDError(_nothing_matches(modules, layers))
    for name in names:
        outer = next((other for other in names if name.startswith(other + ".")), None)
        if outer is not None:
            raise LTDError(f"ltd_fx: layers={layers!r} matches {name} within {outer}; select one of them")
    return names


def _select(modules: dict[str, nn.Module], layers: Layers) -> list[str]:
    if layers is None:
        known = [name for name, module in modules.items() if is_known(module)]
        return known or _repeated(modules)
    if isinstance(layers, str):
        try:
            regex = re.compile(layers)
        except re.error as error:
            raise LTDError(f"ltd_fx: layers={layers!r} is not a regular expression: {error}") from error
        return [name for name in modules if regex.fullmatch(name)]
    if isinstance(layers, type) or (isinstance(layers, tuple) and all(isinstance(cls, type) for cls in layers)):
        return [name for name, module in modules.items() if isinstance(module, layers)]
    if callable(layers):
        return [name for name, module in modules.items() if layers(name, module)]
    if isinstance(layers, Sequence) and all(isinstance(name, str) for name in layers):
        missing = [name for name in layers if isinstance(name, str) and name not in modules]
        if missing:
            near = difflib.get_close_matches(missing[0], modules, n=3)
            raise LTDError(f"ltd_fx: the model has no layer {missing[0]!r}{_did_you_mean(near)}")
        return [name for name in modules if name in layers]
    raise LTDError(
        f"ltd_fx: layers={layers!r} must be a class, a tuple of classes, a regular expression, a list of names, or a "
        "predicate (name, module) -> bool"
    )


def _repeated(modules: dict[str, nn.Module]) -> list[str]:
    """The elements of the outermost lists of three or more modules of one class, which have modules of their own."""
    names: list[str] = []
    for name, module in modules.items():
        elements = [(f"{name}.{child}" if name else child, m) for child, m in module.named_children()]
        if not isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)) or len(elements) < 3:
            continue
        inner = any(name.startswith(other + ".") for other in names)
        if not inner and len({type(m) for _, m in elements}) == 1 and list(elements[0][1].children()):
            names += [element for element, _ in elements]
    return names


def _nothing_matches(modules: dict[str, nn.Module], layers: Layers) -> str:
    repeated = {
        name: type(next(module.children())).__name__
        for name, module in modules.items()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
    }
    seen = ", ".join(f"{cls} in {name}" for name, cls in list(repeated.items())[:5]) or "no repeated layers"
    if layers is None:
        return (
            f"ltd_fx: found neither a layer with a known LayerPattern nor a list of three like layers (seen: {seen}); "
            "select layers with transform(..., layers=...)"
        )
    near = difflib.get_close_matches(layers, modules, n=3) if isinstance(layers, str) else []
    return f"ltd_fx: layers={layers!r} matches nothing in the model{_did_you_mean(near)} (seen: {seen})"


def _did_you_mean(names: list[str]) -> str:
    return f"; did you mean {', '.join(map(repr, names))}?" if names else ""
