"""Which tokens one routed layer keeps in one forward: the first step of every rewritten call site."""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ltd_fx.errors import LTDError
from ltd_fx.state import RouteState


class Site:
    """One routed layer: its name and number, and the state it shares with the model's other sites.

    Kept in the layer's ``__dict__``, outside modules and buffers, so names and ``state_dict`` keys stay as they were.
    """

    def __init__(self, name: str, number: int, layer: nn.Module, state: RouteState) -> None:
        self.name = name
        # a tensor, not an int: as data, it lets identical layers compiled one by one share a graph
        self.number = torch.tensor(number)
        self.layer = layer
        self.state = state
        self.shape: tuple[int, int] | None = None  # (B, S) of the most recent training forward


class Draw(NamedTuple):
    """The tokens that a site keeps in this forward.

    ``indices`` is ``[B, k]`` int64, ascending in each row, or ``[1, k]`` where one draw serves the batch.
    """

    site: Site
    indices: Tensor
    batch: int
    seq_len: int


def hidden_shape(site: Site, hidden: Any, batch_first: bool) -> tuple[int, int]:
    """(B, S) of the hidden states.

    Raises:
        LTDError: they are not a 3-D floating-point tensor.
    """
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
        LTDError: ``hidden`` is not a 3-D floating-point tensor; ``torch.export`` in training mode; a key-value cache
            in a forward without gradients.
    """
    if not site.layer.training:
        return None
    batch, seq_len = hidden_shape(site, hidden, batch_first)
    state = site.state
    site.shape = (batch, seq_len)
    _warn_if_never_dense(state, seq_len)
    keep = state.keep(seq_len)
    if keep >= seq_len:
        return None
    if torch.compiler.is_exporting():
        raise LTDError(
            f"ltd_fx: {site.name}: exporting in training mode would freeze the reserved length and the draw into the "
            "program; call model.eval() before torch.export"
        )
    if cache is not None and not torch.is_grad_enabled():
        raise LTDError(
            f"ltd_fx: {site.name}: a key-value cache in training mode without gradients would lack the dropped tokens; "
            "call model.eval() before generating (or pass use_cache=False)"
        )
    return Draw(site, _indices(site, hidden, batch, seq_len, keep), batch, seq_len)


def _indices(site: Site, hidden: Tensor, batch: int, seq_len: int, keep: int) -> Tensor:
    rows = 1 if site.state.shared else batch
    # The zero-width view carries no data, only the device and whether vmap maps over the samples.
    like = hidden.detach()[..., :0] if not site.state.shared else site.state.key
    key, number = site.state.key.to(hidden.device), site.number.to(hidden.device)
    indices: Tensor = torch.ops.ltd_fx.sample_tokens(key, number, like, rows, seq_len, keep)
    return indices


def _warn_if_never_dense(state: RouteState, seq_len: int) -> None:
    scheduler = state.scheduler
    if scheduler is None or state.warned or seq_len <= scheduler.max_length:
        return
    state.warned = True
    warnings.warn(
        f"ltd_fx: sequences of {seq_len} tokens are longer than the scheduler's max_length={scheduler.max_length}: "
        "the layers would stay routed after the schedule's end. Set max_length to the sequence length.",
        stacklevel=2,
    )


def sampled_indices(site: Site) -> Tensor:
    """The rows ``[B, k]`` that the site kept in the most recent training forward, drawn again."""
    state = site.state
    if site.shape is None:
        raise LTDError(f"ltd_fx: {site.name} has not seen a training forward yet; run one first")
    batch, seq_len = site.shape
    keep = min(state.last_keep(seq_len), seq_len)
    if keep == seq_len:
        return torch.arange(seq_len, device=state.device).expand(batch, seq_len)
    rows = 1 if state.shared else batch
    key = state.last_key
    indices = torch.ops.ltd_fx.sample_tokens(key, site.number.to(key.device), key, rows, seq_len, keep)
    return indices.expand(batch, keep)
