"""Which layers of each stack are routed, along which routes, and the share of the tokens each keeps."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ltd_fx.errors import LTDError
from ltd_fx.learn.call_site import CallSite
from ltd_fx.learn.find import Layer
from ltd_fx.passes.routed_layer import RoutedLayer

# Tokens leave at layer `start` of a stack and return after layer `end`; the share that stays, or None: as scheduled.
Route = tuple[int, int, float | None]


def plan(
    stacks: list[list[Layer]],
    skip_first: int,
    skip_last: int,
    routes: Sequence[Route] | None,
    keep: Mapping[str, float] | None,
) -> tuple[list[Layer], list[CallSite]]:
    """The layers to route, and a report entry for every target layer; see ``ltd_fx.transform`` for the arguments.

    Raises:
        LTDError: no layer is left to route, a layer cannot be or is routed already, a route or share does not fit.

    """
    planned = [layer for stack in stacks for layer in _plan_stack(stack, skip_first, skip_last, routes)]
    planned = _with_shares(planned, keep or {})
    routed = [layer for layer, reason in planned if not reason]
    if not routed:
        sizes = ", ".join(f"{len(stack)} in {_parent(stack[0].name) or 'the root'}" for stack in stacks)
        settings = f"skip_first={skip_first} and skip_last={skip_last}" if routes is None else f"routes={routes}"
        raise LTDError(f"ltd_fx: {settings} leave no layer to route (found {sizes}); change them")
    entries = [
        CallSite(
            layer.name,
            type(layer.module).__name__,
            _parent(layer.name),
            not reason,
            reason,
            share=layer.share,
            route=layer.route,
        )
        for layer, reason in planned
    ]
    return routed, entries


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _plan_stack(
    stack: list[Layer], skip_first: int, skip_last: int, routes: Sequence[Route] | None
) -> list[tuple[Layer, str]]:
    """Each layer, and why it is dense (empty where it is routed)."""
    planned: list[tuple[Layer, str]] = []
    for i, layer in enumerate(stack):
        if isinstance(layer.slot, RoutedLayer):
            raise LTDError(f"ltd_fx: {layer.name} is routed already; restore it, or leave it out with layers=...")
        if "forward" in layer.slot.__dict__:
            raise LTDError(
                f"ltd_fx: {layer.name} has a forward of its own, set on the instance, which routing would replace; "
                "transform the model before whatever sets it, or leave the layer out with layers=..."
            )
        reason = ""
        if i < skip_first:
            reason = f"skip_first={skip_first}"
        elif i >= len(stack) - skip_last:
            reason = f"skip_last={skip_last}"
        planned.append((layer, reason))
    if routes is None:
        return planned
    on_routes: dict[int, Layer] = {}
    for route in routes:
        start, end, share = _checked(route, stack)
        for i in range(start, end + 1):
            layer, reason = planned[i]
            if reason:
                raise LTDError(f"ltd_fx.transform: route {route} covers {layer.name}, which {reason} leaves dense")
            if i in on_routes:
                raise LTDError(f"ltd_fx.transform: {layer.name} lies on two routes; end one before the other starts")
            on_routes[i] = replace(layer, share=share, route=stack[start].name, leaves=i == end)
    return [
        (on_routes.get(i, layer), "" if i in on_routes else reason or "on no route")
        for i, (layer, reason) in enumerate(planned)
    ]


def _checked(route: Any, stack: list[Layer]) -> Route:
    if not isinstance(route, tuple) or len(route) != 3 or not all(type(i) is int for i in route[:2]):
        raise LTDError(
            f"ltd_fx.transform: a route is (first layer, last layer, share of the tokens or None), got {route!r}"
        )
    size, share = len(stack), route[2]
    start, end = (i + size if i < 0 else i for i in route[:2])
    if not 0 <= start <= end < size:
        raise LTDError(
            f"ltd_fx.transform: route {route} does not fit {_parent(stack[0].name) or 'the root'}, which has {size} "
            "layers: the first must not come after the last"
        )
    return start, end, None if share is None else _fraction(f"the share of route {route}", share)


def _fraction(what: str, share: Any) -> float:
    if not isinstance(share, float) or not 0 < share < 1:
        raise LTDError(f"ltd_fx.transform: {what} must be a number between 0 and 1, got {share!r}")
    return share


def _with_shares(planned: list[tuple[Layer, str]], keep: Mapping[str, float]) -> list[tuple[Layer, str]]:
    routed = {layer.name: layer for layer, reason in planned if not reason}
    for name, share in keep.items():
        if name not in routed:
            near = difflib.get_close_matches(str(name), routed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise LTDError(f"ltd_fx.transform: keep names {name!r}, which is no routed layer{hint}")
        if routed[name].route is not None:
            raise LTDError(f"ltd_fx.transform: keep names {name}, which lies on a route; give the route its share")
        routed[name] = replace(routed[name], share=_fraction(f"keep[{name!r}]", share))
    return [(routed.get(layer.name, layer), reason) for layer, reason in planned]
