"""Which tokens one routed layer keeps in one forward: the first step of every rewritten call site."""

import warnings
from typing import Any

import torch
from torch import Tensor, fx

from ltd_fx.errors import LTDError
from ltd_fx.runtime.eager import is_plain
from ltd_fx.runtime.kernels import refuse_window
from ltd_fx.runtime.records import Draw, Site
from ltd_fx.runtime.state import RouteState, record
from ltd_fx.torch_private import at_compile_time, constant_local_maybe, is_exporting, is_transforming


def hidden_shape(site: Site, hidden: Any, batch_first: bool) -> tuple[int, int]:
    """(B, S) of the hidden states.

    Raises:
        LTDError: they are not a 3-D floating-point tensor, or they are a DTensor.
    """
    # It is known by name: its module takes as long to import as the whole of ltd_fx.
    if type(hidden).__name__ == "DTensor":
        raise LTDError(
            f"ltd_fx: {site.name}: the hidden states are a DTensor, placed {hidden.placements}; route plain ones: "
            "gather before the layer (PrepareModuleInput, desired_input_layouts=Replicate(), use_local_output=True), "
            "and have sequence parallelism inside it only"
        )
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or not hidden.is_floating_point():
        got = f"{hidden.dtype} of shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
        raise LTDError(
            f"ltd_fx: {site.name}: hidden states must be a 3-D floating-point tensor, got {got}; leave this layer out "
            "with transform(..., layers=...), or name the right argument in its LayerPattern"
        )
    return (hidden.shape[0], hidden.shape[1]) if batch_first else (hidden.shape[1], hidden.shape[0])


def draw_tokens(site: Site, hidden: Tensor, batch_first: bool, cache: Any = None) -> Draw | None:
    """The site's draw for ``hidden``, or ``None`` where the layer runs dense: in eval, or at full reserved length.

    Raises:
        LTDError: ``hidden`` is not a plain 3-D floating-point tensor; ``torch.export`` or ``torch.jit.trace`` in
            training mode, ``torch.fx.symbolic_trace`` in any; a key-value cache with tokens in training mode.
    """
    state = site.state
    if isinstance(hidden, fx.Proxy):
        _refuse_tracing(site)
    if site.fixed is not None:
        return Draw(site, site.fixed, *hidden_shape(site, hidden, batch_first), state.protected)
    if not site.layer.training:
        return None
    if site.in_graph:
        site.begin_call()
    batch, seq_len = hidden_shape(site, hidden, batch_first)
    if state.scheduler is not None and not state.scheduler.relative and seq_len > state.scheduler.max_length:
        _warn_never_dense(state, seq_len, state.scheduler.max_length)
    _refuse_generation(site, cache, seq_len)
    keep = site.length.tokens(seq_len)
    if keep >= seq_len:
        record(site._set_drawn, batch, seq_len, seq_len)
        return None
    record(site._set_drawn, batch, seq_len, keep)
    refuse_window(site.name, site.attentions, seq_len)
    if is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise LTDError(
            f"ltd_fx: {site.name}: exporting in training mode would freeze the reserved length and the draw into the "
            "program; call model.eval() before torch.export or torch.jit.trace"
        )
    _refuse_few(site, keep)
    # torch.compile makes equal gathers one anyway.
    gathered: dict[str, Any] | None = None if site.span is None or torch.compiler.is_compiling() else {}
    # Shares of documents are a layer's own, and so are the later calls of a layer.
    if is_plain(hidden) and state.batch.documents is None and site.number is site.first:
        indices, plain = state.together.draw(site, state, hidden, batch, seq_len, keep, batch_first)
        return Draw(site, indices, batch, seq_len, state.protected, None, gathered, plain)
    indices = _indices(site, hidden, batch_first, batch, seq_len, keep)
    return Draw(site, indices, batch, seq_len, state.protected, None, gathered)


def _refuse_few(site: Site, keep: int) -> None:
    state = site.state
    if keep < state.protected:
        raise LTDError(
            f"ltd_fx: {site.name}: a reserved length of {keep} cannot hold the {state.protected} protected tokens; "
            "raise the scheduler's min_length, or lower protect"
        )


def _refuse_generation(site: Site, cache: Any, seq_len: int) -> None:
    """A cache of tokens from before this forward, an object of transformers or a tuple of keys and values."""
    if cache is None:
        return
    if isinstance(cache, (tuple, list)):
        before = any(isinstance(value, Tensor) for value in cache)
    else:  # A dense first layer has put this forward's tokens there already.
        before = hasattr(cache, "get_seq_length") and cache.get_seq_length() > seq_len
    if before:
        site.state.refuse_cache(site.name)


def _refuse_tracing(site: Site) -> None:
    raise LTDError(
        f"ltd_fx: {site.name}: torch.fx.symbolic_trace cannot record which tokens a layer keeps; trace the model "
        "first, then give the fx.GraphModule to ltd_fx.transform"
    )


def _indices(site: Site, hidden: Tensor, batch_first: bool, batch: int, seq_len: int, keep: int) -> Tensor:
    state = site.state
    rows = 1 if state.shared else batch
    # The zero-width view carries no data, only the device and whether vmap maps over the samples.
    view = hidden.detach()[..., :0]
    key, number = state.key.to(hidden.device), site.number.to(hidden.device)
    across = view if batch_first else view.transpose(0, 1)
    rank = state.preferences.rank(state.batch, key, number, across, keep, state.shared)
    like = state.key if state.shared else view
    numbers = _together(site) if torch.compiler.is_compiling() else None
    if numbers is not None and site.place is not None:
        # The same call in each layer, so that the graph keeps one.
        numbers, place = numbers.to(hidden.device), site.place.to(hidden.device)
        drawn: Tensor = torch.ops.ltd_fx.sample_tokens(key, numbers, key, rows, seq_len, keep, rank)
        return drawn.index_select(0, place)[0]
    indices: Tensor = torch.ops.ltd_fx.sample_tokens(key, number, like, rows, seq_len, keep, rank)
    return indices


def _together(site: Site) -> Tensor | None:
    """``[N]``: the sites that draw with this one in a compiled graph. By shares of documents it draws alone, in a
    further call of its layer, and under ``torch.func``, which may map over the samples.
    """
    numbers = site.state.numbers
    if numbers is None or site.state.batch.documents is not None or site._earlier or is_transforming():
        return None
    return numbers.get(site.share)


def _warn_never_dense(state: RouteState, seq_len: int, max_length: int) -> None:
    # Neither warnings nor flags can be traced here, so the warning is given once, while compiling.
    if torch.compiler.is_compiling():
        at_compile_time(_warn_while_compiling)
    elif not state.warned:
        state.warned = True
        warnings.warn(_NEVER_DENSE.format(seq_len, max_length), stacklevel=2)


_NEVER_DENSE = (
    "ltd_fx: sequences of {} tokens are longer than the scheduler's max_length={}: the layers would stay routed after "
    "the schedule's end. Set max_length to the sequence length."
)


def _warn_while_compiling(context: Any) -> None:
    seq_len, max_length = (constant_local_maybe(context, name) for name in ("seq_len", "max_length"))
    warnings.warn(_NEVER_DENSE.format("more" if seq_len is None else seq_len, max_length), stacklevel=2)
