"""Attention whose dropped keys can be blocked, models made of it, and routed layers held to it."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ltd_fx


class Attention(nn.Module):
    """Takes any mask, bool (True: may attend) or additive; ``blocked`` ``[B, S]`` bool are keys nobody attends to."""

    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.blocked = heads, None
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None, rope: Any = None, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = (self._split(f(t)) for f, t in ((self.q, x), (self.k, source), (self.v, source)))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        weights = self.scores(q, k, mask, context is not None).softmax(-1).to(v.dtype)
        return self.o((weights @ v).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def scores(self, q: Tensor, k: Tensor, mask: Tensor | None, cross: bool = False) -> Tensor:
        scores = q @ k.mT / q.shape[-1] ** 0.5
        lowest = torch.finfo(scores.dtype).min  # finite, for queries that see nothing
        if mask is not None:
            scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
        if self.blocked is not None and not cross:
            scores = scores.masked_fill(self.blocked[:, None, None], lowest)
        return scores


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` ``[B, H, S, D]`` by tables ``[B | 1, S, D]`` or ``[S, D]``."""
    cos, sin = (t[:, None] if t.ndim == 3 else t for t in (cos, sin))
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def tables(positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rotary tables ``[..., S, size]`` of positions ``[..., S]``."""
    angles = positions[..., None] * 0.7 ** torch.arange(size // 2).repeat(2)
    return angles.cos(), angles.sin()


def causal(batch: int, seq: int, padding: Tensor | None = None) -> Tensor:
    """``[B, 1, S, S]`` bool; ``padding`` ``[B, S]`` is 0 where nobody may attend."""
    mask = torch.ones(batch, 1, seq, seq, dtype=torch.bool).tril()
    return mask if padding is None else mask & padding[:, None, None].bool()


class Stack(nn.Module):
    """Layers called alike, whose hidden states are in ``slot`` of their output."""

    def __init__(self, make: Callable[[], nn.Module], slot: int | None = None, depth: int = 3) -> None:
        super().__init__()
        self.slot = slot
        self.layers = nn.ModuleList(make() for _ in range(depth))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for layer in self.layers:
            out = layer(x, *args, **kwargs)
            x = out if self.slot is None else out[self.slot]
        return x


def block(layer: nn.Module, kept: Tensor) -> nn.Module:
    """``layer`` with attention to the dropped tokens blocked."""
    for module in layer.modules():
        if isinstance(module, Attention):
            module.blocked = ~kept
    return layer


def check_routed(
    model: nn.Module,
    inputs: Any,
    keep: int | None = None,
    *,
    name: str = "layers.1",
    slot: int | None = None,
    batch_first: bool = True,
    real: Tensor | None = None,
    dense: Callable[[nn.Module, Tensor, Any, Any], Any] | None = None,
    tolerance: float = 1e-5,
    **options: Any,
) -> Any:
    """Learn the model's layers from ``inputs``; one must equal, in a training forward, its blocked dense copy.

    ``dense`` calls the copy with dropped keys blocked; ``real`` ``[B, S]`` leaves out queries that see nothing.
    Returns the routed layer's output and what its blocked dense copy was called with.
    """
    options.setdefault("example_inputs", inputs)
    model.train()
    layer = model.get_submodule(name)
    original = copy.deepcopy(layer)
    scheduler = keep and ltd_fx.LTDScheduler(keep, 1000, 10, kind="constant")
    ltd_fx.transform(model, scheduler, **options)
    calls: list[Any] = []
    handle = layer.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    handle.remove()
    args, kwargs, output = calls[-1]  # earlier ones, if patterns are learnt in the forward
    indices = ltd_fx.sampled_indices(model)[name]
    hidden = kwargs["x"] if "x" in kwargs else args[0]
    ours = output if slot is None else output[slot]
    with torch.no_grad():
        hidden, ours = (t if batch_first else t.transpose(0, 1) for t in (hidden, ours))
        kept = torch.zeros(hidden.shape[:2], dtype=torch.bool).scatter(1, indices, True)
        assert kept.sum(1).eq(keep or hidden.shape[1] // 2).all()
        result = dense(original, kept, args, kwargs) if dense else block(original, kept)(*args, **kwargs)
    theirs = result if isinstance(result, Tensor) else result[slot or 0]
    theirs = theirs if batch_first else theirs.transpose(0, 1)
    assert torch.equal(ours[~kept], hidden[~kept])
    rows = kept if real is None else kept & real.bool()
    assert rows.any()
    torch.testing.assert_close(
        ours[rows], theirs[rows], rtol=tolerance, atol=tolerance * float(theirs[rows].abs().max())
    )
    return output, args, kwargs


def block_keys(mask: Tensor | None, kept: Tensor, causal: bool) -> Tensor:
    """``mask`` [B, 1, S, S] with the columns of the dropped keys blocked; ``kept`` is [B, S] bool."""
    batch, seq = kept.shape
    if mask is None:
        mask = torch.ones(batch, 1, seq, seq, dtype=torch.bool)
        mask = mask.tril() if causal else mask
    keys = kept[:, None, None, :]
    return mask & keys if mask.dtype == torch.bool else mask.masked_fill(~keys, torch.finfo(mask.dtype).min)
