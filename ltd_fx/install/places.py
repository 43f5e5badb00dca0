"""Whether the routed layers are still where ``transform`` put them: a later change of the model may undo it in part."""

import inspect
import weakref
from typing import Any

from torch import nn

from ltd_fx.errors import LTDError
from ltd_fx.passes import SITE, RoutedLayer, is_routed_forward
from ltd_fx.runtime import Site
from ltd_fx.torch_private import child_slots

_REMEDY = "call ltd_fx.restore(model) before changing its layers, and transform it again"


class Places:
    """Where the routed layers of a model are.

    They may be wrapped, and modules within them replaced. Each check compares identities along the paths to them; only
    where one has changed are all modules visited.
    """

    def __init__(self, root: nn.Module, sites: list[Site]) -> None:
        self._sites = sites
        # A layer that shares its weights may have had several places from the start.
        self._counts = [len(names) for names in self._find(root)]
        self._seen = self._identities()

    def check(self, root: nn.Module) -> None:
        """Raise :class:`LTDError` if a routed layer was removed, copied, put elsewhere too, or given a forward."""
        if self._seen == self._identities():
            return
        for site, count, names in zip(self._sites, self._counts, self._find(root), strict=True):
            if not names:
                raise LTDError(f"ltd_fx: the routed layer {site.name} is no longer in the model; {_REMEDY}")
            if len(names) > count:
                raise LTDError(
                    f"ltd_fx: the routed layer {site.name} is in several places now, {' and '.join(names)}, which "
                    f"would keep the same tokens and count as one; {_REMEDY}"
                )
            if not _routes(site.layer):
                raise LTDError(
                    f"ltd_fx: the routed layer {site.name} was given another class or forward, which does not route; "
                    f"{_REMEDY}"
                )
        self._seen = self._identities()

    def _find(self, root: nn.Module) -> list[list[str]]:
        """The names of each site's layer; remembers the modules on the way to them."""
        modules = dict(root.named_modules(remove_duplicate=False))
        names: dict[int, list[str]] = {id(site.layer): [] for site in self._sites}
        for name, module in modules.items():
            if id(module) in names:
                names[id(module)].append(name)
            elif isinstance(module, RoutedLayer):
                raise LTDError(
                    f"ltd_fx: {name} is a copy of the routed layer {getattr(module, SITE).name}, which would keep the "
                    f"same tokens and not be counted; {_REMEDY}"
                )
        found = [part for each in names.values() for name in each for part in _parents(name)]
        # The references are weak, for the root keeps this object.
        self._parents = [weakref.ref(modules[name]) for name in dict.fromkeys(found)]
        return list(names.values())

    def __getstate__(self) -> dict[str, Any]:
        """Identities are of this process: to be found again."""
        return {**self.__dict__, "_seen": None, "_parents": []}

    def _identities(self) -> list[Any]:
        parents = (parent() for parent in self._parents)
        children = [None if parent is None else [*map(id, child_slots(parent).values())] for parent in parents]
        return [children, [(type(site.layer), site.layer.__dict__.get("forward")) for site in self._sites]]


def _parents(name: str) -> list[str]:
    """``"a.b.c"``: ``""``, ``"a"``, ``"a.b"``."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def _routes(layer: nn.Module) -> bool:
    """Whether the layer's forward is the routed one, or a wrapper around it (``functools.wraps``)."""
    return isinstance(layer, RoutedLayer) and is_routed_forward(
        inspect.unwrap(layer.__dict__.get("forward", layer.forward)), layer
    )
