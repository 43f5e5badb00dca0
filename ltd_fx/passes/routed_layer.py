"""A rewritten call site in place: the layer's class is swapped for one that runs its rewritten graph.

As in FSDP2, the instance stays: its name, hooks, parameters and ``state_dict`` keys are untouched, and ``isinstance``
still holds.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, fx, nn

from ltd_fx.errors import LTDError
from ltd_fx.learn import CallSite, LayerPattern, forward_signature
from ltd_fx.passes.capture import ARGS, KWARGS, LAYER, layer_graph
from ltd_fx.passes.locate import Target
from ltd_fx.passes.observer import skipped_passes
from ltd_fx.passes.rewrite import rewrite
from ltd_fx.runtime import Site
from ltd_fx.torch_private import REPLICATE
from ltd_fx.tree import items_of

SITE = "_ltd_site"
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def refuse_replicas(module: nn.Module) -> None:
    """Raise :class:`LTDError`: ``nn.DataParallel`` runs replicas of a module in threads, on one state."""
    raise LTDError(
        "ltd_fx: nn.DataParallel replicates the transformed model, and its replicas would share draws and masks; use "
        "nn.parallel.DistributedDataParallel, a process for each device, or call ltd_fx.restore(model) before"
    )


# The method of a module, if it has one, that `torch.jit.script` calls before it compiles it.
SCRIPTING = "__prepare_scriptable__"


def refuse_scripting(*_: nn.Module) -> None:
    """Raise :class:`LTDError`: TorchScript compiles Python code, which for a routed layer is not all that runs."""
    raise LTDError(
        "ltd_fx: torch.jit.script cannot compile a transformed model; call ltd_fx.restore(model) before, or "
        "torch.jit.trace in eval mode"
    )


class RoutedLayer(nn.Module):
    """Mixin of the swapped-in classes."""

    _ltd_site: Site
    _ltd_base: type[nn.Module]
    _ltd_graph: fx.Graph
    _ltd_forward: Callable[..., Any]
    _ltd_positional: tuple[str, ...]  # The names of what its forward takes by position, in order.
    _ltd_arguments: tuple[Any, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            self._ltd_site.begin_call()
        return super().__call__(*args, **kwargs)

    def _ltd_layer(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward.

        What needs gradients is passed by position, with all that comes before it: torch's reentrant checkpointing,
        which transformers puts around the forward, gives gradients to nothing else.
        """
        rest, extras = kwargs.pop(ARGS, ()), kwargs.pop(KWARGS, {})
        names = self._ltd_positional[len(args) :]
        count = len(names) if rest else 0
        for i, name in enumerate(names):
            if _needs_gradient(kwargs[name]):
                count = max(count, i + 1)
        given = [kwargs.pop(name) for name in names[:count]]
        return type(self).forward(self, *args, *given, *rest, **kwargs, **extras)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle as (base class, pattern, attributes): the swapped-in class itself has no importable name."""
        attributes = {name: value for name, value in self.__dict__.items() if not is_routed_forward(value, self)}
        return _rebuild, type(self)._ltd_arguments, attributes

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _set_forward(self)


def _needs_gradient(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    items = items_of(value)
    return items is not None and any(_needs_gradient(item) for item in items)


setattr(RoutedLayer, REPLICATE, refuse_replicas)
setattr(RoutedLayer, SCRIPTING, refuse_scripting)


def _rebuild(*arguments: Any) -> nn.Module:
    cls = routed_class(*arguments)
    return cls.__new__(cls)


_classes: dict[tuple[Any, ...], type[RoutedLayer]] = {}


def routed_class(
    slot_class: type[nn.Module],
    layer_class: type[nn.Module],
    pattern: LayerPattern,
    enters: bool = True,
    leaves: bool = True,
) -> type[RoutedLayer]:
    """The swapped-in class. One per class and pattern, so that identical layers share code, and so a compiled graph.

    Args:
        slot_class: the class to extend: the layer's, or its checkpoint wrapper's.
        layer_class: whose ``forward`` tells the arguments.
        pattern: how to route it.
        enters: whether tokens leave at it, rather than at a layer before it on its route.
        leaves: whether they return after it.

    Raises:
        LTDError: the layer's ``forward`` cannot be expressed as a graph, or it is routed already.
    """
    if issubclass(slot_class, RoutedLayer):
        raise LTDError(f"ltd_fx: {slot_class._ltd_base.__name__} layers are routed already; call ltd_fx.restore first")
    arguments = (slot_class, layer_class, pattern, enters, leaves)
    # A route whose layers were rewritten under different settings would not hold together.
    key = (*arguments, skipped_passes())
    if key in _classes:
        return _classes[key]
    signature = forward_signature(layer_class)
    graph = layer_graph(signature, pattern.hidden)
    name = layer_class.__name__
    # The other layers of its route are in graphs of their own: it is only known whether there are some.
    layer = CallSite(name, name, "", True, pattern=pattern, route=None if enters else "", leaves=leaves)
    rewrite(graph, targets={LAYER: Target(layer, signature, SITE)})
    namespace = {
        # not the base's: below a class of torch.nn.modules, Dynamo takes every tensor's shape, and so the reserved
        # length, to be static
        "__module__": __name__,
        "__doc__": slot_class.__doc__,
        "_ltd_base": slot_class,
        "_ltd_graph": graph,
        "_ltd_forward": _compile(graph),
        "_ltd_positional": tuple(p.name for p in signature.parameters.values() if p.kind in _POSITIONAL),
        "_ltd_arguments": arguments,
    }
    metaclass: Any = type(slot_class)
    routed: type[RoutedLayer] = metaclass(f"Routed{slot_class.__name__}", (RoutedLayer, slot_class), namespace)
    if not issubclass(layer_class, fx.GraphModule):  # Each of these has a class of its own, which ends with it.
        _classes[key] = routed
    return routed


def _compile(graph: fx.Graph) -> Callable[..., Any]:
    """The graph's Python function, as fx generates it; ``self`` is the routed layer."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<ltd_fx routed layer>", "exec"), scope)
    forward: Callable[..., Any] = scope["forward"]
    return forward


def swap_class(slot: nn.Module, routed: type[RoutedLayer], site: Site) -> None:
    """Turn the layer in its place into ``routed``; :func:`swap_back` undoes it."""
    slot.__class__ = routed
    setattr(slot, SITE, site)
    # On the instance, where hooks and `layer.compile()` are outside; the class's own `forward`, which transformers
    # checkpoints (with its recompute), is inside.
    assert isinstance(slot, RoutedLayer)
    _set_forward(slot)


def _set_forward(slot: RoutedLayer) -> None:
    forward = _bound(type(slot)._ltd_forward, weakref.ref(slot))
    forward.__signature__ = _signature(type(slot)._ltd_forward)  # type: ignore[attr-defined]
    slot.forward = forward


def _bound(function: Callable[..., Any], layer: weakref.ref[nn.Module]) -> Callable[..., Any]:
    """A method of ``layer`` that does not hold it: its weights would stay until cycles are collected."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(layer(), *args, **kwargs)

    return forward


@cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(function)
    return signature.replace(parameters=[*signature.parameters.values()][1:])


def is_routed_forward(forward: Any, layer: nn.Module) -> bool:
    """Whether ``forward`` is what :func:`swap_class` gave to ``layer``."""
    if getattr(forward, "__code__", None) is not _BOUND:
        return False
    return any(cell.cell_contents == weakref.ref(layer) for cell in forward.__closure__)


_BOUND = _bound(print, weakref.ref(nn.Module())).__code__


def swap_back(slot: nn.Module) -> None:
    assert isinstance(slot, RoutedLayer)
    slot.__class__ = slot._ltd_base  # type: ignore[assignment]
    delattr(slot, SITE)
    del slot.__dict__["forward"]


@contextmanager
def as_they_were(slots: Sequence[nn.Module]) -> Iterator[None]:
    """Within, routed layers are what they were before :func:`swap_class`; then again what became of them since."""
    before = [(slot, slot.__class__, getattr(slot, SITE), slot.__dict__["forward"]) for slot in slots]
    for slot in slots:
        swap_back(slot)
    try:
        yield
    finally:
        for slot, routed, site, forward in before:
            slot.__class__ = routed
            setattr(slot, SITE, site)
            slot.__dict__["forward"] = forward
