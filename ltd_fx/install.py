"""Rewrite a model in place, and back: what to route, where the pieces are kept, how they are taken out again."""

import copy
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn
from torch.utils.hooks import RemovableHandle

from ltd_fx.capture import record
from ltd_fx.draw import Site
from ltd_fx.errors import LTDError
from ltd_fx.find import Layer
from ltd_fx.passes import Target, rewrite
from ltd_fx.patterns import forward_signature
from ltd_fx.report import CallSite, RewriteReport
from ltd_fx.site import SITE, RoutedLayer, routed_class, swap_back, swap_class
from ltd_fx.state import RouteState, watch_forwards

_REWRITE = "_ltd_rewrite"


@dataclass
class Rewrite:
    """What was done to a model; kept in its ``__dict__``, outside modules and buffers."""

    state: RouteState
    sites: list[Site]
    entries: list[CallSite]
    hook: RemovableHandle
    graph: fx.Graph | None  # the rewritten call-site graph of the whole model, where there is one
    original: fx.Graph | None  # of an fx.GraphModule

    def report(self) -> RewriteReport:
        graphs = {site.name: getattr(site.layer, "_ltd_graph", self.graph) for site in self.sites}
        return RewriteReport([replace(entry, graph=graphs.get(entry.name)) for entry in self.entries], self.graph)

    def __getstate__(self) -> dict[str, Any]:
        """For ``torch.save(model)``: the recorded graph holds fake tensors and is only for reading."""
        return {**self.__dict__, "graph": None}


def plan(stacks: list[list[Layer]], skip_first: int, skip_last: int) -> tuple[list[Layer], list[CallSite]]:
    """The layers to route, and a report entry for every target layer.

    Raises:
        LTDError: every stack is too short to route any layer, or a layer is routed already.

    """
    routed: list[Layer] = []
    entries: list[CallSite] = []
    for stack in stacks:
        for i, layer in enumerate(stack):
            if isinstance(layer.slot, RoutedLayer):
                raise LTDError(f"ltd_fx: {layer.name} is routed already; restore it, or leave it out with layers=...")
            reason = "its LayerPattern"
            if i < skip_first:
                reason = f"skip_first={skip_first}"
            elif i >= len(stack) - skip_last:
                reason = f"skip_last={skip_last}"
            else:
                routed.append(layer)
            entries.append(_entry(layer, reason, layer in routed))
    if not routed:
        sizes = ", ".join(f"{len(stack)} in {_parent(stack[0].name) or 'the root'}" for stack in stacks)
        raise LTDError(
            f"ltd_fx: skip_first={skip_first} and skip_last={skip_last} leave no layer to route (found {sizes}); "
            "lower them"
        )
    return routed, entries


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _entry(layer: Layer, reason: str, routed: bool) -> CallSite:
    aligned = {
        name: getattr(dims, "__name__", repr(dims)) if callable(dims) else dims
        for name, dims in layer.pattern.aligned.items()
    }
    return CallSite(layer.name, type(layer.module).__name__, _parent(layer.name), routed, reason, aligned, None)


def install(
    model: nn.Module, layers: list[Layer], entries: list[CallSite], state: RouteState, example_inputs: Any
) -> None:
    """Put the rewritten pieces in place; whatever can be refused is, before anything changes.

    Args:
        model: the root.
        layers: those to route.
        entries: for the report.
        state: what the sites share.
        example_inputs: for one forward to record the call sites from and check them; or ``None``.

    Raises:
        LTDError: a layer cannot be routed.

    """
    sites = [Site(layer.name, i, layer.slot, state) for i, layer in enumerate(layers)]
    targets = {
        site.name: Target(site.name, f"{SITE}_{i}", forward_signature(type(layer.module)), layer.pattern)
        for i, (site, layer) in enumerate(zip(sites, layers, strict=True))
    }
    graph = original = None
    if example_inputs is not None:
        graph = record(model, {layer.name: layer.slot for layer in layers}, example_inputs)
        rewrite(graph, targets, {site.name: site for site in sites})
    if isinstance(model, fx.GraphModule):
        original, graph = model.graph, copy.deepcopy(model.graph)
        graph.owning_module = None  # the passes name attributes that the module is given only after they succeed
        rewrite(graph, targets)
        for site, target in zip(sites, targets.values(), strict=True):
            setattr(model, target.site, site)
        model.graph = graph
    else:
        classes = [routed_class(type(layer.slot), type(layer.module), layer.pattern) for layer in layers]
        for site, routed in zip(sites, classes, strict=True):
            swap_class(site.layer, routed, site)
    hook = watch_forwards(model, state)
    model.__dict__[_REWRITE] = Rewrite(state, sites, entries, hook, graph, original)
    if state.scheduler is not None:
        state.scheduler._attach(state)


def uninstall(model: nn.Module) -> None:
    """Undo :func:`install`."""
    root, done = find_rewrite(model)
    if isinstance(root, fx.GraphModule):
        assert done.original is not None
        root.graph = done.original
        for i in range(len(done.sites)):
            delattr(root, f"{SITE}_{i}")
    else:
        for site in done.sites:
            swap_back(site.layer)
    done.hook.remove()
    del root.__dict__[_REWRITE]
    if done.state.scheduler is not None:
        done.state.scheduler._attach(None)


def find_rewrite_maybe(model: nn.Module) -> tuple[nn.Module, Rewrite] | None:
    """The transformed module, which is ``model`` or within it (torch.compile, DDP, ...), and what was done to it."""
    return next(((m, m.__dict__[_REWRITE]) for m in model.modules() if _REWRITE in m.__dict__), None)


def find_rewrite(model: nn.Module) -> tuple[nn.Module, Rewrite]:
    """As :func:`find_rewrite_maybe`.

    Raises:
        LTDError: the model is not transformed.

    """
    found = find_rewrite_maybe(model)
    if found is None:
        raise LTDError("ltd_fx: the model is not transformed; call ltd_fx.transform(model, scheduler) first")
    return found
