"""Rewrite a model in place, and back: what to route, where the pieces are kept, how they are taken out again."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils.hooks import RemovableHandle

from ltd_fx.errors import LTDError
from ltd_fx.install.graph_module import route_graph, targets_of, unroute_graph
from ltd_fx.install.hooks import (
    REWRITE,
    add_forward_hooks,
    add_root_hook,
    check_places,
    check_routes,
    refuse_unlearnt,
    watch_routes,
)
from ltd_fx.install.places import Places
from ltd_fx.install.report import RewriteReport
from ltd_fx.learn import CallSite, layer_in, split_inputs
from ltd_fx.passes import (
    SCRIPTING,
    RoutedLayer,
    check_calls,
    refuse_replicas,
    refuse_scripting,
    routed_class,
    swap_back,
    swap_class,
)
from ltd_fx.prove import Examination
from ltd_fx.runtime import RouteState, Site, Span
from ltd_fx.schedule import LTDScheduler
from ltd_fx.torch_private import is_replica, pytree


@dataclass
class Rewrite:
    """What was done to a model; kept in its ``__dict__``, outside modules and buffers."""

    state: RouteState
    layers: Sequence[CallSite]  # All target layers, dense ones too; they have patterns once installed.
    # The sites of the routed ones, in order; there are none until installed.
    sites: list[Site] = field(default_factory=list)
    hooks: tuple[RemovableHandle, ...] = ()
    # The hooks that wait for the first training forward, while patterns are to be inferred at it.
    pending: tuple[RemovableHandle, ...] = ()
    # Whether the patterns are of the calls in training mode, where these are others than in eval mode.
    training: bool = False
    places: Places | None = None  # Where the layers are, once installed; an fx.GraphModule has none.
    forms: set[Any] = field(default_factory=set)  # The forms of arguments that the routes are known to hold for.
    original: fx.Graph | None = None  # The graph that an fx.GraphModule had.
    copied: bool = False  # Whether copy.deepcopy made it: the scheduler drives the original still.

    @property
    def routed(self) -> list[CallSite]:
        return [layer for layer in self.layers if layer.routed]

    def report(self, root: nn.Module) -> RewriteReport:
        """The layers with the graphs that they run, which are ``root``'s own if it is an ``fx.GraphModule``."""
        graphs = {site.name: _graph_of(root, site) for site in self.sites}
        return RewriteReport([replace(layer, graph=graphs.get(layer.name)) for layer in self.layers])

    def __getstate__(self) -> dict[str, Any]:
        """For copies and ``torch.save(model)``."""
        return {**self.__dict__, "copied": False}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rewrite":
        other = object.__new__(Rewrite)
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self.__getstate__(), memo), copied=True)
        return other


def _graph_of(root: nn.Module, site: Site) -> fx.Graph:
    if site.in_graph:
        assert isinstance(root, fx.GraphModule)
        return root.graph
    assert isinstance(site.layer, RoutedLayer)
    return site.layer._ltd_graph


def attach(model: nn.Module, layers: Sequence[CallSite], state: RouteState, example_inputs: Any) -> None:
    """Rewrite ``model``: now, or where a forward is needed to learn from and there is none, at its first training
    forward.

    Args:
        model: the root.
        layers: all target layers, those to route marked as such.
        state: what the sites share.
        example_inputs: for one forward to learn from, and to prove the layers by; or ``None``.

    Raises:
        LTDError: a layer cannot be routed; nothing is changed.
    """
    rewrite = Rewrite(state, layers)
    unknown = next((layer for layer in rewrite.routed if layer.pattern is None), None)
    is_graph = isinstance(model, fx.GraphModule)
    if unknown is not None and example_inputs is None and is_graph:
        raise LTDError(
            f"ltd_fx: {unknown.name} is a {unknown.layer_class}, for which no LayerPattern is known; pass "
            "example_inputs to learn it from, or call ltd_fx.register_pattern"
        )
    state.root, state.layers = type(model).__name__, layers
    # Only a forward shows that the layers of a route follow each other.
    chained = not is_graph and not all(layer.enters for layer in rewrite.routed)
    if example_inputs is not None or (unknown is None and not chained):
        install(model, rewrite, None if example_inputs is None else split_inputs(example_inputs))
    else:
        refusing = (add_root_hook(model.get_submodule(layer.name), refuse_unlearnt) for layer in rewrite.routed)
        rewrite.pending = (add_root_hook(model, _complete), *refusing)
        model.__dict__[SCRIPTING] = refuse_scripting
    if chained:
        hooks = add_forward_hooks(model, before=(_check_form, check_places), after=(check_routes,))
    else:
        hooks = add_forward_hooks(model, before=() if is_graph else (check_places,))
    rewrite.hooks = (*rewrite.hooks, *hooks)
    model.__dict__[REWRITE] = rewrite
    if state.scheduler is not None:
        state.scheduler._attach(state)


def _complete(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model whose patterns are to be inferred."""
    if not root.training:
        return
    if is_replica(root):
        refuse_replicas(root)
    if torch.compiler.is_compiling():
        raise LTDError(
            "ltd_fx: layers without a LayerPattern are learnt at the first training forward, and this one is within a "
            "larger compiled program; pass example_inputs to ltd_fx.transform"
        )
    torch.compiler.disable(install)(root, root.__dict__[REWRITE], (args, kwargs))


def _check_form(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: arguments of another form than any before (a ControlNet's residuals) may end a route."""
    if torch.compiler.is_compiling() or not root.training:
        return
    rewrite = root.__dict__[REWRITE]
    form = _form((args, kwargs))
    if form not in rewrite.forms:
        slots = {site.name: site.layer for site in rewrite.sites}
        calls = torch.compiler.disable(Examination)(root, rewrite.routed, slots, (args, kwargs)).calls
        check_calls(calls, targets=targets_of(rewrite.routed, slots))
        rewrite.forms.add(form)


def _form(inputs: Any) -> Any:
    """(args, kwargs) without values: what is where, and the number of dimensions of tensors."""
    flat, _ = pytree.tree_flatten_with_path(inputs)
    kinds = ((path, leaf.ndim if isinstance(leaf, torch.Tensor) else type(leaf)) for path, leaf in flat)
    return tuple((pytree.keystr(path), kind) for path, kind in kinds)


def install(model: nn.Module, rewrite: Rewrite, inputs: Any) -> None:
    """Put the rewritten pieces in place; whatever can be refused is, before anything changes.

    Args:
        model: the root.
        rewrite: gets the sites, patterns and proofs.
        inputs: (args, kwargs) of one forward, or ``None``.

    Raises:
        LTDError: a layer cannot be routed.
    """
    state, routed, examination = rewrite.state, rewrite.routed, None
    slots = {layer.name: model.get_submodule(layer.name) for layer in routed}
    if inputs is not None:
        rewrite.forms.add(_form(inputs))
        examination = Examination(model, routed, slots, inputs)
        routed = examination.accept_all(routed, shared=state.shared, protected=state.protected)
        rewrite.training = examination.training
    sites = make_sites(routed, slots, state, in_graph=isinstance(model, fx.GraphModule))
    targets = targets_of(routed, slots)
    if examination is not None:
        check_calls(examination.calls, targets=targets, sites={site.name: site for site in sites})
    if isinstance(model, fx.GraphModule):
        rewrite.original = route_graph(model, targets, sites)
    else:
        classes = [
            routed_class(type(slot), type(layer_in(slot)), layer.known_pattern, layer.enters, layer.leaves)
            for layer, slot in zip(routed, slots.values(), strict=True)
        ]
        for site, cls in zip(sites, classes, strict=True):
            swap_class(site.layer, cls, site)
        if examination is not None:
            try:
                examination.rehearse(sites)
            except LTDError:
                for site in sites:
                    swap_back(site.layer)
                raise
    _end_pending(model, rewrite)
    if not isinstance(model, fx.GraphModule):
        rewrite.places = Places(model, sites)
        rewrite.hooks = (*rewrite.hooks, *watch_routes(model, sites))
    examined = {layer.name: layer for layer in routed}
    rewrite.layers = [examined.get(layer.name, layer) for layer in rewrite.layers]
    rewrite.sites = sites


def _end_pending(model: nn.Module, rewrite: Rewrite) -> None:
    """The first training forward is not waited for any more."""
    for hook in rewrite.pending:
        hook.remove()
    rewrite.pending = ()
    model.__dict__.pop(SCRIPTING, None)


def make_sites(
    layers: Sequence[CallSite], slots: Mapping[str, nn.Module], state: RouteState, *, in_graph: bool
) -> list[Site]:
    """The sites of routed layers, in order; those on one route share a draw, hence a number."""
    numbers = {layer.name: i for i, layer in enumerate(layers)}
    spans: dict[str, Span] = {}
    sites = []
    for layer in layers:
        first = layer.route or layer.name
        span = spans.setdefault(first, Span()) if not (layer.enters and layer.leaves) else None
        slot, length = slots[layer.name], state.lengths[layer.share]
        sites.append(Site(layer.name, numbers[first], slot, state, length, span, in_graph))
    return sites


def uninstall(model: nn.Module) -> None:
    """Undo :func:`install`."""
    root, done = find_rewrite(model)
    if done.original is not None:
        assert isinstance(root, fx.GraphModule)
        unroute_graph(root, done.original)
    else:
        for site in done.sites:
            swap_back(site.layer)
    for hook in done.hooks:
        hook.remove()
    _end_pending(root, done)
    done.hooks = ()  # A copy.copy of the module shares layers and hooks with it, and is no longer transformed either.
    del root.__dict__[REWRITE]
    if done.state.scheduler is not None and not done.copied:
        done.state.scheduler._attach(None)


def find_rewrite_maybe(model: nn.Module) -> tuple[nn.Module, Rewrite] | None:
    """The transformed module, which is ``model`` or within it (torch.compile, DDP, ...), and what was done to it."""
    found = ((m, m.__dict__[REWRITE]) for m in model.modules() if REWRITE in m.__dict__)
    return next(((m, rewrite) for m, rewrite in found if rewrite.hooks), None)


def find_rewrite(model: nn.Module) -> tuple[nn.Module, Rewrite]:
    """As :func:`find_rewrite_maybe`.

    Raises:
        LTDError: the model is not transformed.
    """
    found = find_rewrite_maybe(model)
    if found is None:
        raise LTDError("ltd_fx: the model is not transformed; call ltd_fx.transform(model, scheduler) first")
    return found


def find_scheduler(model: nn.Module) -> tuple[nn.Module, LTDScheduler]:
    """The transformed module and its scheduler, for the callbacks of trainers.

    Raises:
        LTDError: the model is not transformed, or has no scheduler.
    """
    root, rewrite = find_rewrite(model)
    if rewrite.state.scheduler is None:
        raise LTDError("LTDCallback: the model keeps half of its tokens always; pass an LTDScheduler to transform")
    return root, rewrite.state.scheduler
