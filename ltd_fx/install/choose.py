"""Which layers of each stack are routed, along which routes, and the share of the tokens each keeps."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ltd_fx.errors import LTDError
from ltd_fx.learn import CallSite
from ltd_fx.passes import RoutedLayer

# Tokens leave at layer `first` of a stack and return after layer `last`; the share that stays, or None: as scheduled.
RouteSpec = tuple[int, int, float | None]


def choose(
    stacks: list[list[CallSite]],
    skip_first: int,
    skip_last: int,
    routes: Sequence[RouteSpec] | None,
    keep: Mapping[str, float] | None,
) -> list[CallSite]:
    """All layers of ``stacks``, those to route marked as such; see ``ltd_fx.transform`` for the arguments.

    Raises:
        LTDError: no layer is left to route, a route or share does not fit.
    """
    layers = [layer for stack in stacks for layer in _choose_in_stack(stack, skip_first, skip_last, routes)]
    if not any(layer.routed for layer in layers):
        sizes = ", ".join(f"{len(stack)} in {stack[0].stack or 'the root'}" for stack in stacks)
        settings = f"skip_first={skip_first} and skip_last={skip_last}" if routes is None else f"routes={routes}"
        raise LTDError(f"ltd_fx: {settings} leave no layer to route (found {sizes}); change them")
    return _with_shares(layers, keep or {})


def check_free(model: nn.Module, layers: Sequence[CallSite]) -> None:
    """Raise :class:`LTDError` where one of ``layers`` is routed already, or cannot be in place."""
    modules = dict(model.named_modules())
    for layer in layers:
        if layer.name in modules:  # A layer without weights that a flat graph was traced from is not there.
            _check_slot(layer.name, modules[layer.name])


def _check_slot(name: str, slot: nn.Module) -> None:
    if isinstance(slot, RoutedLayer):
        raise LTDError(f"ltd_fx: {name} is routed already; restore it, or leave it out with layers=...")
    if "forward" in slot.__dict__:
        raise LTDError(
            f"ltd_fx: {name} has a forward of its own, set on the instance, which routing would replace; "
            "transform the model before whatever sets it, or leave the layer out with layers=..."
        )


def _choose_in_stack(
    stack: list[CallSite], skip_first: int, skip_last: int, routes: Sequence[RouteSpec] | None
) -> list[CallSite]:
    reasons = [_skipped(i, len(stack), skip_first, skip_last) for i in range(len(stack))]
    if routes is None:
        return [_marked(layer, why) for layer, why in zip(stack, reasons, strict=True)]
    chosen = [_marked(layer, why or "on no route") for layer, why in zip(stack, reasons, strict=True)]
    for route in routes:
        first, last, share = _checked(route, stack)
        for i in range(first, last + 1):
            name = stack[i].name
            if reasons[i]:
                raise LTDError(f"ltd_fx.transform: route {route} covers {name}, which {reasons[i]} leaves dense")
            if chosen[i].routed:
                raise LTDError(f"ltd_fx.transform: {name} lies on two routes; end one before the other starts")
            chosen[i] = replace(stack[i], routed=True, share=share, route=stack[first].name, leaves=i == last)
    return chosen


def _skipped(i: int, size: int, skip_first: int, skip_last: int) -> str:
    """Why the ``i``-th of ``size`` layers is left dense; empty where it is not."""
    if i < skip_first:
        return f"skip_first={skip_first}"
    return f"skip_last={skip_last}" if i >= size - skip_last else ""


def _marked(layer: CallSite, reason: str) -> CallSite:
    """The layer as dense for ``reason``, or as routed where there is none."""
    return replace(layer, reason=reason, pattern=None) if reason else replace(layer, routed=True)


def _checked(route: Any, stack: list[CallSite]) -> RouteSpec:
    if not isinstance(route, tuple) or len(route) != 3 or not all(type(i) is int for i in route[:2]):
        raise LTDError(
            f"ltd_fx.transform: a route is (first layer, last layer, share of the tokens or None), got {route!r}"
        )
    size, share = len(stack), route[2]
    first, last = (i + size if i < 0 else i for i in route[:2])
    if not 0 <= first <= last < size:
        raise LTDError(
            f"ltd_fx.transform: route {route} does not fit {stack[0].stack or 'the root'}, which has {size} "
            "layers: the first must not come after the last"
        )
    return first, last, None if share is None else _fraction(f"the share of route {route}", share)


def _fraction(what: str, share: Any) -> float:
    if not isinstance(share, float) or not 0 < share < 1:
        raise LTDError(f"ltd_fx.transform: {what} must be a number between 0 and 1, got {share!r}")
    return share


def _with_shares(layers: list[CallSite], keep: Mapping[str, float]) -> list[CallSite]:
    routed = {layer.name: layer for layer in layers if layer.routed}
    for name, share in keep.items():
        if name not in routed:
            near = difflib.get_close_matches(str(name), routed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise LTDError(f"ltd_fx.transform: keep names {name!r}, which is no routed layer{hint}")
        if routed[name].route is not None:
            raise LTDError(f"ltd_fx.transform: keep names {name}, which lies on a route; give the route its share")
        routed[name] = replace(routed[name], share=_fraction(f"keep[{name!r}]", share))
    return [routed.get(layer.name, layer) for layer in layers]
