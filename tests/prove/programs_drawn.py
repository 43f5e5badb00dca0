"""Random layers of known operators, and what each must equal on a subset of the tokens.

A program is a list of steps; each makes a value from earlier ones. Nothing here knows how a layer is traced or routed.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, TOKENS, DIM = 2, 23, 6
ROWS = 40


class Step(NamedTuple):
    """An operator's name, the places of its operands among the values so far, and a dimension or a small number."""

    name: str
    first: int
    second: int
    dim: int


def _attention(m: Any, a: Tensor, b: Tensor, d: int) -> Tensor:
    return _attend(m, a)


def _causal(m: Any, a: Tensor, b: Tensor, d: int) -> Tensor:
    if m.blocked is None:
        return F.scaled_dot_product_attention(m.query(a), m.key(a), a, is_causal=True)
    return _attend(m, a, torch.ones(a.shape[-2], a.shape[-2], dtype=torch.bool).tril())


def _attend(m: Any, a: Tensor, mask: Tensor | None = None) -> Tensor:
    if m.blocked is not None and a.shape[-2] == TOKENS:
        allowed = ~m.blocked
        mask = (
            allowed if mask is None else mask & allowed if mask.dtype == torch.bool else mask.where(allowed, -torch.inf)
        )
    return F.scaled_dot_product_attention(m.query(a), m.key(a), a, mask)


def _softmax(m: Any, a: Tensor, b: Tensor, d: int) -> Tensor:
    """Along the tokens it is attention: those that are dropped are blocked."""
    d = -1 - d % 2
    if m.blocked is not None and a.shape[d] == TOKENS:
        blocked = m.blocked[0] if d == -1 else m.blocked.mT
        a = a.masked_fill(blocked, -torch.inf)
    return a.softmax(d)


def _places(m: Any, a: Tensor, b: Tensor, d: int) -> Tensor:
    return torch.arange(m.x.shape[1])


def _column(a: Tensor, d: int) -> int:
    return (1 + d) % max(a.ndim, 1)


Operator = Callable[[Any, Tensor, Tensor, int], Any]
# The layer, two values, and a number.
OPERATORS: dict[str, Operator] = {
    "attention": _attention,
    "causal attention": _causal,
    "masked attention": lambda m, a, b, d: _attend(m, a, b),
    "softmax": _softmax,
    "softmax again": _softmax,
    "scores": lambda m, a, b, d: a @ b.mT / 2,
    "matmul": lambda m, a, b, d: a @ b,
    "linear": lambda m, a, b, d: m.linear(a),
    "norm": lambda m, a, b, d: m.norm(a),
    "sine": lambda m, a, b, d: a.sin(),
    "gelu": lambda m, a, b, d: F.gelu(a),
    "sigmoid": lambda m, a, b, d: a.sigmoid(),
    "power": lambda m, a, b, d: (-a.abs()).exp(),
    "add": lambda m, a, b, d: a + b,
    "subtract": lambda m, a, b, d: a - b,
    "multiply": lambda m, a, b, d: a * b,
    "divide": lambda m, a, b, d: a / (1 + b.abs()),
    "shift": lambda m, a, b, d: a + d,
    "maximum": lambda m, a, b, d: torch.maximum(a, b),
    "at least": lambda m, a, b, d: a >= b,
    "less": lambda m, a, b, d: a < b,
    "equal": lambda m, a, b, d: a == d,
    "both": lambda m, a, b, d: a & b,
    "not": lambda m, a, b, d: ~a,
    "where": lambda m, a, b, d: torch.where(a > 0, a, b),
    "mask": lambda m, a, b, d: a.masked_fill(b, -torch.inf),
    "mask by a number": lambda m, a, b, d: a.masked_fill(~b, -1e9),
    "to float": lambda m, a, b, d: a.to(m.linear.weight.dtype),
    "sum": lambda m, a, b, d: a.sum(_column(a, d), keepdim=True),
    "mean": lambda m, a, b, d: a.mean(_column(a, d)),
    "largest": lambda m, a, b, d: a.amax(-1 - d % 2, keepdim=True),
    "variance": lambda m, a, b, d: a.var(-1 - d % 2, keepdim=True),
    "mean square": lambda m, a, b, d: a * a.pow(2).mean(-1, keepdim=True).rsqrt(),
    "cumulative sum": lambda m, a, b, d: a.cumsum(_column(a, d)),
    "roll": lambda m, a, b, d: a.roll(1, _column(a, d)),
    "flip": lambda m, a, b, d: a.flip(_column(a, d)),
    "sort": lambda m, a, b, d: a.sort(_column(a, d)).values,
    "top": lambda m, a, b, d: a.topk(2, _column(a, d)).values,
    "argmax": lambda m, a, b, d: a.argmax(-1),
    "places": _places,
    "as column": lambda m, a, b, d: a[:, None] if a.ndim == 1 else a[..., None],
    "lower": lambda m, a, b, d: a.tril(d - 1),
    "upper": lambda m, a, b, d: a.triu(d - 1),
    "square of ones": lambda m, a, b, d: torch.ones(m.x.shape[1], m.x.shape[1], dtype=torch.bool),
    "by the length": lambda m, a, b, d: a / m.x.shape[1],
    "first": lambda m, a, b, d: a[:, :1],
    "last": lambda m, a, b, d: a[:, -1:],
    "without the first": lambda m, a, b, d: F.pad(a[:, 1:], (0, 0, 1, 0)),
    "every other": lambda m, a, b, d: a[:, ::2].repeat_interleave(2, 1)[:, : a.shape[1]],
    "rows of a table": lambda m, a, b, d: m.table[: m.x.shape[1]],
    "looked up": lambda m, a, b, d: F.embedding(a.long().clamp(0, ROWS - 1), m.table),
    "indexed": lambda m, a, b, d: m.table[a.long().clamp(0, ROWS - 1)],
    "other rows": lambda m, a, b, d: a.gather(1, b.long() % a.shape[1]),
    "other features": lambda m, a, b, d: a.gather(-1, b.long() % a.shape[-1]),
    "spread": lambda m, a, b, d: torch.zeros_like(a).scatter(-1, b.long() % a.shape[-1], a),
    "transpose": lambda m, a, b, d: a.mT,
    "flatten": lambda m, a, b, d: m.linear(a.flatten(0, 1)).view_as(a),
    "batch as tokens": lambda m, a, b, d: a.reshape(a.shape[1], a.shape[0], -1).transpose(0, 1),
    "join features": lambda m, a, b, d: torch.cat([a[..., 3:], b[..., :3]], -1),
    "join tokens": lambda m, a, b, d: torch.cat([a[:, 1:], b[:, :1]], 1),
    "sink": lambda m, a, b, d: torch.cat([a, b[..., :1]], -1),
    "without the sink": lambda m, a, b, d: a[..., :-1],
    "stack": lambda m, a, b, d: torch.stack([a, b], -1).sum(-1),
    "heads": lambda m, a, b, d: a.unflatten(-1, (2, 3)).transpose(1, 2),
    "heads back": lambda m, a, b, d: a.transpose(1, 2).flatten(2),
    "contract": lambda m, a, b, d: torch.einsum("bqk,bkd->bqd", a, b),
    "outer": lambda m, a, b, d: torch.einsum("bqd,bkd->bqk", a, b),
    "convolve": lambda m, a, b, d: m.conv(a.mT).mT,
    "convolve points": lambda m, a, b, d: m.point(a.mT).mT,
    "batch norm": lambda m, a, b, d: m.batch_norm(a.mT).mT,
    "norm of tokens": lambda m, a, b, d: F.layer_norm(a.mT, a.shape[1:2]).mT,
    "count": lambda m, a, b, d: a * m.calls.add_(1),
    "detach": lambda m, a, b, d: a.detach().clone(),
    "expand": lambda m, a, b, d: a.expand_as(b).contiguous(),
}


class Drawn(nn.Module):
    """A layer that runs a program; the last values that are as large as its hidden states, or smaller, are added."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps, self.added = steps, list[int]()
        self.blocked: Tensor | None = None
        self.norm = nn.LayerNorm(DIM)
        self.linear, self.query, self.key = (nn.Linear(DIM, DIM) for _ in range(3))
        self.conv, self.point = nn.Conv1d(DIM, DIM, 3, padding=1), nn.Conv1d(DIM, DIM, 1)
        self.batch_norm = nn.BatchNorm1d(DIM, track_running_stats=False)
        self.register_buffer("table", torch.randn(ROWS, DIM))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.x = x
        values = [mask[:, 0], self.linear(x), self.norm(x), x]
        for step in self.steps:
            values.append(self.run(step, values))
        for place in self.added:
            x = x + values[place] * 0.5
        return x

    def run(self, step: Step, values: list[Tensor]) -> Tensor:
        first, second = (values[-1 - place % len(values)] for place in step[1:3])
        made: Tensor = OPERATORS[step.name](self, first, second, step.dim)
        return made


def layer_of(steps: list[Step]) -> Drawn:
    """The layer of those steps that can be run, one after the other."""
    torch.manual_seed(0)
    layer = Drawn([]).double().train()
    x, mask = arguments()
    layer.x, values = x, [mask[:, 0], layer.linear(x), layer.norm(x), x]
    for step in steps:
        try:
            made = layer.run(step, values)
        except (RuntimeError, IndexError, TypeError, ValueError):
            continue
        if made.ndim <= 4 and made.numel() <= 1 << 15 and not made.isnan().any():
            values.append(made)
            layer.steps.append(step)
    layer.calls.zero_()
    layer.added = [i for i, value in enumerate(values) if i > 3 and _fits(value, x)][-2:]
    return layer


def _fits(value: Tensor, x: Tensor) -> bool:
    """Whether it can be added to the hidden states."""
    return value.ndim <= 3 and all(n in (1, m) for n, m in zip(value.shape[::-1], x.shape[::-1], strict=False))


def arguments() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, TOKENS, DIM, generator=generator, dtype=torch.float64)
    return x, torch.randn(BATCH, 1, TOKENS, TOKENS, generator=generator, dtype=torch.float64)


def error_of(layer: Drawn) -> float:
    """How far the kept rows are from those of all tokens with attention to the dropped ones blocked."""
    x, mask = arguments()
    kept = torch.tensor([1, 4, 6, 7, 11, 12, 15, 16, 20, 21])
    blocked = torch.ones(1, TOKENS, dtype=torch.bool)
    blocked[:, kept] = False
    with torch.no_grad():
        try:
            fewer = layer(x[:, kept], mask[:, :, kept][..., kept])
        except (RuntimeError, IndexError):
            return math.inf
        layer.calls.zero_()
        layer.blocked = blocked
        all_tokens = layer(x, mask)[:, kept]
        layer.blocked = None
        layer.calls.zero_()
    same = (fewer == all_tokens) | (fewer.isnan() & all_tokens.isnan())
    difference = (fewer - all_tokens).abs() / all_tokens.abs().clamp_min(1)
    return float(difference.nan_to_num(math.inf).masked_fill(same, 0).max())
