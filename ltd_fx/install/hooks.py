"""The forward hooks of a transformed model: what its root does around each training forward."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ltd_fx.errors import LTDError
from ltd_fx.runtime import Batch, RouteState, Site, Span
from ltd_fx.torch_private import skip_code

REWRITE = "_ltd_rewrite"  # The root's attribute that holds its ``in_place.Rewrite``.


def no_graph(function: Any) -> None:
    """Have ``torch.compile`` leave ``function`` alone where it is called by itself.

    ``torch.compile(model)`` runs the root's hooks, and what they call, in frames of their own, outside the model's: not
    worth a graph. Where the root is inlined into a larger program they are traced.
    """
    skip_code(function.__code__)


def add_root_hook(root: nn.Module, hook: Any) -> RemovableHandle:
    """Register a forward pre-hook ``(root, args, kwargs)`` that is no graph of its own."""
    no_graph(hook)
    return root.register_forward_pre_hook(hook, with_kwargs=True)


def add_closing_hook(root: nn.Module, hook: Any) -> RemovableHandle:
    """Register a forward hook ``(root, args, output)`` that is no graph of its own."""
    no_graph(hook)
    return root.register_forward_hook(hook)


def add_forward_hooks(
    root: nn.Module, *, before: tuple[Any, ...] = (), after: tuple[Any, ...] = ()
) -> tuple[RemovableHandle, ...]:
    """The hooks of every transformed model; ``before`` and ``after`` come first."""
    for called in (*RouteState.AROUND_FORWARDS, Site.begin_forward, _refuse_cache):
        no_graph(called)
    return (
        *(add_root_hook(root, hook) for hook in (*before, _begin_forward)),
        *(add_closing_hook(root, hook) for hook in (*after, _end_forward)),
    )


def _begin_forward(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: a new key, and nothing drawn yet."""
    if root.training:
        rewrite = root.__dict__[REWRITE]
        _refuse_cache(rewrite.state, args, kwargs)
        rewrite.state.begin_forward(root, args, kwargs)
        for site in rewrite.sites:
            site.begin_forward()
            if site.span is not None:
                site.span.close()  # A forward that failed may have left it open.


def _refuse_cache(state: RouteState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what routed layers would refuse deep within the forward (of ``generate``, most often)."""
    for value in (*args, *kwargs.values()):
        if hasattr(value, "get_seq_length") and value.get_seq_length() > 0:
            state.refuse_cache(state.root)


def _end_forward(root: nn.Module, args: Any, output: Any) -> None:
    """Forward hook: layers that are called from now on are called alone."""
    if not root.training:
        return
    rewrite = root.__dict__[REWRITE]
    rewrite.state.end_forward()
    if not torch.compiler.is_compiling() and rewrite.state.batch.is_wrapped():
        # It ends with torch.func's transformation, and what was drawn by it cannot be told.
        rewrite.state.batch = Batch()
        for site in rewrite.sites:
            site.begin_forward()


def check_places(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: every routed layer is where it was."""
    if torch.compiler.is_compiling() or not root.training:
        return
    places = root.__dict__[REWRITE].places
    if places is not None:
        torch.compiler.disable(places.check)(root)


def check_routes(root: nn.Module, args: Any, output: Any) -> None:
    """Forward hook: every route came to its end, or the output has the kept tokens only."""
    for site in root.__dict__[REWRITE].sites:
        if site.span is not None and site.span.draw is not None:
            site.span.close()
            raise LTDError(
                f"ltd_fx: the forward left the route of {site.name} without its last layer (LayerDrop?), so dropped "
                "tokens did not return; give layers that may be skipped routes of their own"
            )


def watch_routes(root: nn.Module, sites: list[Site]) -> tuple[RemovableHandle, ...]:
    """Have the modules around the layers of routes refuse hidden states that lack the dropped tokens.

    They are given them where the last layer of a route is skipped: the loss may fail on them, or worse, may not.
    """
    spans = tuple(dict.fromkeys(site.span for site in sites if site.span is not None))
    if not spans:
        return ()
    routed = {site.name for site in sites}
    no_graph(_refuse_kept)
    return tuple(
        module.register_forward_pre_hook(partial(_refuse_kept, spans, name), with_kwargs=True)
        for name, module in _around(root, routed)
    )


def _around(root: nn.Module, routed: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that share a parent with a routed layer, or with a module that holds some; by name."""
    parts = [name.split(".") for name in routed]
    holders = {".".join(path[:i]) for path in parts for i in range(len(path))}
    for holder in sorted(holders):
        for child, module in root.get_submodule(holder).named_children():
            name = f"{holder}.{child}" if holder else child
            if name not in routed and name not in holders:
                yield name, module


def _refuse_kept(spans: tuple[Span, ...], name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    """Forward pre-hook of a module on no route."""
    if torch.compiler.is_compiling() or not module.training:
        return
    for span in spans:
        if span.hidden is not None and any(value is span.hidden for value in (*args, *kwargs.values())):
            span.close()
            raise LTDError(
                f"ltd_fx: {name} is given the hidden states from within a route, whose last layer was skipped "
                "(LayerDrop?), so dropped tokens did not return; give layers that may be skipped routes of their own"
            )


def refuse_unlearnt(layer: nn.Module, args: Any, kwargs: Any) -> None:
    """Forward pre-hook of layers whose patterns are yet to be learnt: the forward would be dense without a word."""
    if layer.training:
        raise LTDError(
            f"ltd_fx: a {type(layer).__name__} is called in training, but not by a call of the model that "
            "ltd_fx.transform was given (but by its forward method, which runs no hooks?), so how to route it was not "
            "learnt; pass example_inputs to ltd_fx.transform, or call that model itself"
        )
