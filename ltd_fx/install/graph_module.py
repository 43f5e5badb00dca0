"""A rewritten ``fx.GraphModule``: its graph in place, and copies of it that are routed as it is.

fx copies a ``GraphModule`` without its hooks, and pickles it as code to be traced again, which sites do not survive.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from ltd_fx.install.hooks import REWRITE, add_forward_hooks, add_root_hook
from ltd_fx.learn import CallSite, forward_signature, layer_in
from ltd_fx.passes import SCRIPTING, SITE, Target, refuse_replicas, refuse_scripting, rewrite
from ltd_fx.runtime import Site
from ltd_fx.torch_private import REPLICATE


def targets_of(layers: Sequence[CallSite], slots: Mapping[str, nn.Module]) -> dict[str, Target]:
    """What the passes are told of the routed layers, by name: the i-th one's site is the graph's attribute ``i``."""
    targets = {}
    for i, layer in enumerate(layers):
        signature = forward_signature(type(layer_in(slots[layer.name])))
        targets[layer.name] = Target(layer, signature, f"{SITE}_{i}")
    return targets


def route_graph(model: fx.GraphModule, targets: dict[str, Target], sites: list[Site]) -> fx.Graph:
    """Rewrite the graph of ``model``, and give it the sites and ways of copying that it needs then.

    Returns:
        The graph as it was.

    Raises:
        LTDError: a call cannot be routed; ``model`` is as it was.
    """
    original, graph = model.graph, copy.deepcopy(model.graph)
    graph.owning_module = None  # The passes name attributes that the module is given only after they succeed.
    rewrite(graph, targets=targets)
    _put_sites(model, sites)
    model.graph = graph
    return original


def unroute_graph(model: fx.GraphModule, original: fx.Graph) -> None:
    """Undo :func:`route_graph`."""
    for name in [name for name in model.__dict__ if name.startswith(SITE)]:
        delattr(model, name)
    leave_methods(model)
    model.graph = original


def leave_methods(model: fx.GraphModule) -> None:
    """Have the module be copied as any other again."""
    for method in _METHODS:
        if method in vars(type(model)):
            delattr(type(model), method)


def put_site(model: nn.Module, place: int, site: Site) -> None:
    """Have the rewritten graph's ``place``-th routed layer be ``site``."""
    setattr(model, f"{SITE}_{place}", site)


def _put_sites(model: fx.GraphModule, sites: list[Site]) -> None:
    for i, site in enumerate(sites):
        put_site(model, i, site)
    # The class is the module's own: fx makes one for each GraphModule, with its forward.
    for name, method in _METHODS.items():
        setattr(type(model), name, method)


def _deepcopy(self: Any, memo: dict[int, Any]) -> fx.GraphModule:
    copied: fx.GraphModule = super(type(self), self).__deepcopy__(memo)
    # fx has copied the record with the module, and these are the sites that the graph calls.
    rewritten = copy.deepcopy(self.__dict__[REWRITE], memo)
    _put_sites(copied, rewritten.sites)
    return _followed(copied, rewritten)


def _copy(self: Any) -> fx.GraphModule:
    copied: fx.GraphModule = super(type(self), self).__copy__()
    rewritten = copy.copy(self.__dict__[REWRITE])
    rewritten.sites = [copy.copy(site) for site in rewritten.sites]
    rewritten.copied = True
    _put_sites(copied, rewritten.sites)
    return _followed(copied, rewritten)


def _reduce(self: Any) -> tuple[Any, ...]:
    """Pickle as (module with the original graph, what was done to it)."""
    rewritten = copy.copy(self.__dict__[REWRITE])
    plain = fx.GraphModule.__new__(type(self))
    ours = (REWRITE, *(name for name in self.__dict__ if name.startswith(SITE)))
    plain.__dict__.update({name: value for name, value in self.__dict__.items() if name not in ours})
    plain.graph = copy.deepcopy(rewritten.original)
    rewritten.hooks, rewritten.pending, rewritten.original, rewritten.outlined = (), (), None, None
    return _rebuild, (plain, rewritten)


def _rebuild(plain: fx.GraphModule, rewritten: Any) -> fx.GraphModule:
    slots = {site.name: site.layer for site in rewritten.sites}
    rewritten.original = route_graph(plain, targets_of(rewritten.routed, slots), rewritten.sites)
    return _followed(plain, rewritten)


def _followed(model: fx.GraphModule, rewritten: Any) -> fx.GraphModule:
    """``model`` with the hooks of a transformed one, and what was done to it."""
    rewritten.pending = (add_root_hook(model, rewritten.first_hook),) if rewritten.untested else ()
    rewritten.hooks = add_forward_hooks(model)
    model.__dict__[REWRITE] = rewritten
    return model


_METHODS = {
    "__deepcopy__": _deepcopy,
    "__copy__": _copy,
    "__reduce__": _reduce,
    REPLICATE: refuse_replicas,
    SCRIPTING: refuse_scripting,
}
