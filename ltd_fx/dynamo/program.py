"""The model whose graphs a backend is given: its layers, what their sites share, and the forwards, of many graphs."""

import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from ltd_fx.dynamo.origin import Origin
from ltd_fx.errors import LTDError
from ltd_fx.install import Settings, find_rewrite_maybe
from ltd_fx.learn import find_layers
from ltd_fx.runtime import Site
from ltd_fx.schedule import LTDScheduler
from ltd_fx.torch_private import ORIG_MOD
from ltd_fx.torch_private_dynamo import compiled_in_place
from ltd_fx.weights import held_by


class Program:
    """One model, as far as its graphs have been seen.

    Args:
        model: the root, which stays as it is.
        settings: of the user.
        scheduler: of the user; it drives this model from here on.

    Raises:
        LTDError: nothing to route, or ``settings`` that do not fit the model.
    """

    def __init__(self, model: nn.Module, settings: Settings, scheduler: LTDScheduler | None) -> None:
        if find_rewrite_maybe(model) is not None:
            raise LTDError("ltd_fx.backend: the model is transformed already; call ltd_fx.restore(model) first")
        self._model = weakref.ref(model)
        self.protect = settings.protect if isinstance(settings.protect, str) else None
        layers = settings.choose(model)
        self.state = settings.state(model, layers, scheduler)
        self.state.root, self.state.layers = type(model).__name__, layers
        if scheduler is not None:
            scheduler._attach(self.state)
        self.layers = {layer.name: layer for layer in layers}
        self.numbers = {layer.name: i for i, layer in enumerate(layer for layer in layers if layer.routed)}
        self.sites: dict[str, Site] = {}  # Those of the latest forward, by layer.
        self._ran: set[str] = set()  # The layers that have run in the latest forward.
        self._seen = False  # Whether a forward is over.

    @property
    def model(self) -> nn.Module:
        """Raises :class:`LTDError` where the model is no more, and a graph of it was kept for another."""
        model = self._model()
        if model is None:
            raise LTDError(
                "ltd_fx.backend: the model that it was given graphs of is gone; give each a backend of its own"
            )
        return model

    def names(self) -> dict[nn.Module, str]:
        """The model's modules, with their names."""
        return {module: name for name, module in self.model.named_modules()}

    def has(self, module: nn.Module) -> bool:
        """Whether ``module`` is the model, or one is within the other."""
        model = self.model
        return any(module is other for other in model.modules()) or any(model is other for other in module.modules())

    def weight_maybe(self, layer: str, name: str) -> Any:
        """The layer's parameter or buffer of that name, as it is now."""
        holder, _, last = f"{layer}.{name}".rpartition(".")
        with suppress(AttributeError):
            return getattr(self.model.get_submodule(holder), last)
        return None

    def begin(self, graph: nn.Module, sites: Mapping[str, Site], mask: Any) -> None:
        """A graph with these sites runs: in a new forward, where one of its layers has run in the latest.

        Raises:
            LTDError: routed layers were in no graph of the forward before.
        """
        if sites and (not self._ran or not self._ran.isdisjoint(sites)):
            if self._ran:
                self._check_seen()
            self._ran.clear()
            given = {} if self.protect is None else {self.protect: mask}
            self.state.begin_forward(graph, (), given)
            for site in {**self.sites, **sites}.values():
                site.begin_forward()
                if site.span is not None:
                    site.span.close()
        self._ran.update(sites)
        self.sites.update(sites)
        self.state.under_way = True

    def _check_seen(self) -> None:
        if self._seen:
            return
        unseen = (name for name in self.numbers if name not in self.sites)
        missing = [name for name in unseen if self.model.get_submodule(name).training]
        if missing:
            raise LTDError(
                f"ltd_fx.backend: {missing[0]} was in no graph of the model's first forward, so it saw all tokens: it "
                "was skipped, or runs outside of torch.compile; leave it out with layers=..., or use ltd_fx.transform"
            )
        self._seen = True


def find_model(origin: Origin, settings: Settings) -> nn.Module | None:
    """The model that a graph is of: of the modules that its frame found or that are being called, the one that is
    compiled, or else the smallest that has layers, unless a larger one takes it for a layer itself. ``None``: none has.
    """
    modules = dict.fromkeys(map(_unwrapped, (*origin.roots.values(), *origin.callers)))
    compiled = (module for module in origin.callers if held_by(module) == ORIG_MOD or compiled_in_place(module))
    first = dict.fromkeys(map(_unwrapped, compiled))
    found = [(module, selected) for module in {**first, **modules} if (selected := _selected(module, settings))]
    for module, _ in found:
        if not any(module in set(outer.get_submodule(name).modules()) for outer, names in found for name in names):
            return module
    return None


def _unwrapped(module: nn.Module) -> nn.Module:
    """The model in a wrapper of it: ``torch.compile``'s, DDP's."""
    child = held_by(module)
    return module if child is None else _unwrapped(module.get_submodule(child))


def _selected(module: nn.Module, settings: Settings) -> list[str]:
    with suppress(LTDError):
        return find_layers(module, settings.layers)
    return []
