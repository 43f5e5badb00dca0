"""Rewrite a model in place, and back: what to route, where the pieces are kept, how they are taken out again."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils.hooks import RemovableHandle

from ltd_fx.errors import LTDError
from ltd_fx.install.graph_module import route_graph, targets_of, unroute_graph
from ltd_fx.install.hooks import REWRITE, watch_routes
from ltd_fx.install.outlined import Outlined, inline_layers
from ltd_fx.install.places import Places
from ltd_fx.install.report import RewriteReport
from ltd_fx.install.router_losses import unroute_losses
from ltd_fx.install.unflattened import Unflattened, give_back
from ltd_fx.learn import CallSite, layer_in
from ltd_fx.passes import SCRIPTING, RoutedLayer, as_they_were, check_calls, routed_class, swap_back, swap_class
from ltd_fx.prove import Examination
from ltd_fx.runtime import RouteState, Site, Span, compiled_together
from ltd_fx.schedule import LTDScheduler
from ltd_fx.torch_private import pytree


@dataclass
class Rewrite:
    """What was done to a model; kept in its ``__dict__``, outside modules and buffers."""

    state: RouteState
    layers: Sequence[CallSite]  # All target layers, dense ones too; they have patterns once installed.
    sites: list[Site] = field(default_factory=list)  # Those of the routed ones, in order; none until installed.
    hooks: tuple[RemovableHandle, ...] = ()
    pending: tuple[RemovableHandle, ...] = ()  # They wait for the first training forward, to learn or test patterns.
    first_hook: Callable[..., None] | None = None  # The one of the root, which copies of an fx.GraphModule lack.
    training: bool = False  # Whether the patterns are of calls in training mode, where eval mode has others.
    places: Places | None = None  # Where the layers are, once installed; an fx.GraphModule has none.
    forms: set[Any] = field(default_factory=set)  # The forms of arguments that the layers were examined with.
    original: fx.Graph | None = None  # The graph that an fx.GraphModule had, with one call_module a layer.
    outlined: Outlined | None = None  # How that came of a flat one.
    unflattened: Unflattened | None = None  # What that was made of, where the root is no fx.GraphModule itself.
    absent: frozenset[str] = frozenset()  # Routed layers that this graph does not call: another one of the model does.
    note: str = ""  # What ``warm_up`` measured.
    undone: bool = False  # Whether it was taken out again; a copy.copy of the module holds it still.
    copied: bool = False  # Whether copy.deepcopy made it: the scheduler drives the original still.

    @property
    def routed(self) -> list[CallSite]:
        return [layer for layer in self.layers if layer.routed and layer.name not in self.absent]

    @property
    def numbers(self) -> dict[str, int]:
        """Which draw each routed layer of the model takes."""
        return {layer.name: i for i, layer in enumerate(layer for layer in self.layers if layer.routed)}

    @property
    def untested(self) -> list[CallSite]:
        """The layers that are routed by a pattern of which no forward has shown whether it is right."""
        return [layer for layer in self.routed if self.sites and layer.status == "to be tested"]

    def report(self, root: nn.Module) -> RewriteReport:
        """The layers with the graphs that they run, which are ``root``'s own if it is an ``fx.GraphModule``."""
        graphs = {site.name: _graph_of(root, site) for site in self.sites}
        return RewriteReport([replace(layer, graph=graphs.get(layer.name)) for layer in self.layers], self.note)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and ``torch.save(model)``."""
        return {**self.__dict__, "copied": False}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rewrite":
        memo[id(self)] = other = object.__new__(Rewrite)
        other.__dict__.update(copy.deepcopy(self.__getstate__(), memo), copied=True)
        return other


def _graph_of(root: nn.Module, site: Site) -> fx.Graph:
    if site.in_graph:
        return cast("fx.Graph", root.graph)
    assert isinstance(site.layer, RoutedLayer)
    return site.layer._ltd_graph


def form_of(inputs: Any) -> Any:
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
        rewrite.forms.add(form_of(inputs))
        examination = Examination(model, routed, slots, inputs)
        routed = examination.accept_all(routed, shared=state.shared, protected=state.protected)
        rewrite.training = examination.training
    sites = make_sites(routed, slots, state, rewrite.numbers, in_graph=isinstance(model, fx.GraphModule))
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
        rewrite.sites = sites
        if examination is not None:
            try:
                examination.rehearse(sites)
            except LTDError:
                take_out(rewrite)
                raise
    if not isinstance(model, fx.GraphModule):
        rewrite.places = Places(model, sites)
        rewrite.hooks = (*rewrite.hooks, *watch_routes(model, sites))
    rewrite.sites = sites
    _set_examined(rewrite, routed)
    _warn_trusted(routed)


def _warn_trusted(layers: Sequence[CallSite]) -> None:
    trusted = sorted({layer.layer_class for layer in layers if layer.status == "trusted"})
    if trusted:
        warnings.warn(
            f"ltd_fx: the pattern registered for {', '.join(trusted)} is trusted, for nothing has shown it right or "
            "wrong; see ltd_fx.summary(model) for why",
            stacklevel=5,
        )


def test_installed(model: nn.Module, rewrite: Rewrite, layers: Sequence[CallSite], inputs: Any) -> str | None:
    """Hold the known patterns that layers are routed by, without a proof, to a forward that calls these layers.

    Layers that it does not call, or on a few tokens or little but padding, wait for another.

    Args:
        model: the root.
        rewrite: gets the proofs.
        layers: which of those that are untested.
        inputs: (args, kwargs) of that forward.

    Returns:
        Why the forward cannot be watched; ``None`` if it can.

    Raises:
        LTDError: a pattern is wrong, or a built-in one and nothing can be shown of it; what is installed stays, and the
            layers untested.
    """
    if rewrite.places is not None:
        rewrite.places.check(model)
    state, slots = rewrite.state, {site.name: site.layer for site in rewrite.sites}
    with _unrouted(model, rewrite):
        try:
            examination = Examination(model, layers, slots, inputs, learn=False)
        except LTDError as error:  # It needs hooks that are not called, say. If it fails anyway, the user is told next.
            rewrite.forms.add(form_of(inputs))
            return f"where its forward cannot be watched ({str(error).removeprefix('ltd_fx: ')})"
        shown, too_short = examination.divide(layers, state.protected)
        shown = examination.accept_all(shown, shared=state.shared, protected=state.protected)
        targets, names = targets_of(shown, slots), {layer.name for layer in shown}
        calls = [call for call in examination.calls if call.name in names]
        check_calls(calls, targets=targets, sites={site.name: site for site in rewrite.sites})
    if shown and not isinstance(model, fx.GraphModule):
        examination.rehearse(rewrite.sites)
    rewrite.training = rewrite.training or (bool(shown) and examination.training)
    _set_examined(rewrite, shown)
    _warn_trusted(shown)
    if not too_short and all(layer.proof is not None for layer in shown):
        rewrite.forms.add(form_of(inputs))
    if not rewrite.untested:
        end_pending(model, rewrite)
    return None


@contextmanager
def _unrouted(model: nn.Module, rewrite: Rewrite) -> Iterator[None]:
    """Within, the model is as it was before it was transformed."""
    if rewrite.original is None:
        with as_they_were([site.layer for site in rewrite.sites]):
            yield
        return
    assert isinstance(model, fx.GraphModule)
    routed, forward = model.graph, type(model).forward
    model.graph = rewrite.original
    try:
        yield
    finally:
        model.graph = routed
        type(model).forward = forward  # the very same, for what was compiled from it


def _set_examined(rewrite: Rewrite, layers: Sequence[CallSite]) -> None:
    examined = {layer.name: layer for layer in layers}
    rewrite.layers = [examined.get(layer.name, layer) for layer in rewrite.layers]


def end_pending(model: nn.Module, rewrite: Rewrite) -> None:
    """The first training forward is not waited for any more."""
    for hook in rewrite.pending:
        hook.remove()
    rewrite.pending = ()
    rewrite.state.untested = False
    model.__dict__.pop(SCRIPTING, None)


def make_sites(
    layers: Sequence[CallSite],
    slots: Mapping[str, nn.Module],
    state: RouteState,
    numbers: Mapping[str, int],
    *,
    in_graph: bool,
) -> list[Site]:
    """The sites of routed layers, in order; those on one route share a draw, hence a number."""
    spans: dict[str, Span] = {}
    sites = []
    for layer in layers:
        first = layer.route or layer.name
        span = spans.setdefault(first, Span()) if not (layer.enters and layer.leaves) else None
        slot, length = slots[layer.name], state.lengths[layer.share]
        sites.append(Site(layer.name, numbers[first], slot, state, length, span, in_graph))
    return compiled_together(sites)


def uninstall(model: nn.Module) -> None:
    """Undo :func:`install`."""
    root, done = find_rewrite(model)
    if done.original is not None:
        holder: Any = root if done.unflattened is None else root.graph_module
        unroute_graph(holder, done.original)
        if done.outlined is not None:
            inline_layers(holder, done.outlined)
        if done.unflattened is not None:
            give_back(root, done.unflattened)
    else:
        take_out(done)
        unroute_losses(root)
    for hook in done.hooks:
        hook.remove()
    end_pending(root, done)
    done.undone = True
    del root.__dict__[REWRITE]
    if done.state.scheduler is not None and not done.copied:
        done.state.scheduler._attach(None)


def take_out(rewrite: Rewrite) -> None:
    """Turn routed layers in place into what they were."""
    for site in rewrite.sites:
        swap_back(site.layer)
    rewrite.sites = []


def find_rewrite_maybe(model: nn.Module) -> tuple[nn.Module, Rewrite] | None:
    """The transformed module, which is ``model`` or within it (torch.compile, DDP, ...), and what was done to it."""
    found = ((m, m.__dict__[REWRITE]) for m in model.modules() if REWRITE in m.__dict__)
    return next((pair for pair in found if not pair[1].undone), None)


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
