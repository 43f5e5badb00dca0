"""The eager path, where dispatch is what costs: one draw for all layers of a forward, rows taken by their numbers.

What is compiled, traced or mapped by ``torch.func`` goes by the operators, which check what they are given; here the
indices are ours, and an argument is checked once for each shape.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ltd_fx.ops import flat_rows
from ltd_fx.runtime.preferences import Batch
from ltd_fx.torch_private import is_transforming

Take = Callable[[Any, Tensor], Tensor]


class Member(Protocol):
    """A site (``records.Site``), as far as a draw for several looks at it."""

    length: Any
    index: int
    first: Tensor


class Plain(NamedTuple):
    """What the eager path needs of a draw, beside its indices.

    Attributes:
        tokens: ``[R * k]``, the indices joined; R is B, or 1 where one draw serves the batch.
        rows: ``[B * k]``, the kept tokens' numbers in hidden states with the first two dimensions joined.
        across: ``[R, k, 1]`` and ``[R, 1, k]``, the indices to look up a mask's rows and columns.
        shape: of kept hidden states, with -1 for D.
        batch_first: their layout.
        takes: how arguments are taken, by shape and entry; shared by the layers that draw together.
    """

    tokens: Tensor
    rows: Tensor
    across: tuple[Tensor, Tensor]
    shape: tuple[int, int, int]
    batch_first: bool
    takes: dict[Any, Take | None]


def is_plain(hidden: Tensor) -> bool:
    """Whether hidden states take the eager path: no compiler, subclass or transformation is at work."""
    return type(hidden) is Tensor and not torch.compiler.is_compiling() and not is_transforming()


class Together:
    """The draws of the forward in progress, each for all sites with one reserved length."""

    def __init__(self) -> None:
        self._key: Tensor | None = None
        self._said: Batch | None = None
        self._draws: dict[Any, dict[int, tuple[Tensor, Plain]]] = {}  # By the number of the site.
        self._sites: dict[Any, tuple[list[int], Tensor]] = {}  # Those that draw together, and their numbers.

    def draw(
        self, site: Member, state: Any, hidden: Tensor, batch: int, seq_len: int, keep: int, batch_first: bool
    ) -> tuple[Tensor, Plain]:
        """The indices ``[B | 1, k]`` of ``site``, a member of ``state``, which has its own key's and batch's draws."""
        if self._key is not state.key or self._said is not state.batch:
            self._key, self._said, self._draws = state.key, state.batch, {}
        kind = site.length, batch, seq_len, keep, batch_first, hidden.device
        draws = self._draws.get(kind)
        if draws is None:
            key = state.key.to(hidden.device)
            sites, numbers = self._numbers(site, state, hidden.device)
            across = hidden.detach()[..., :0]
            across = across if batch_first else across.transpose(0, 1)
            rank = state.preferences.rank(state.batch, key, numbers, across, keep, state.shared)
            rows = 1 if state.shared else batch
            indices = torch.ops.ltd_fx.sample_tokens(key, numbers, key, rows, seq_len, keep, rank)
            each = plain_draws(indices, batch, seq_len, batch_first)
            self._draws[kind] = draws = dict(zip(sites, each, strict=True))
        return draws[site.index]  # A copy of the model has other sites.

    def _numbers(self, site: Member, state: Any, device: torch.device) -> tuple[list[int], Tensor]:
        """Of all sites with the length of this one, as Python has them and ``[N]`` on the device."""
        kind = site.length, len(state.sites), device
        if kind not in self._sites:
            sites = [other for other in state.sites if other.length is site.length]
            numbers = torch.stack([other.first for other in sites]).to(device)
            self._sites[kind] = [other.index for other in sites], numbers
        return self._sites[kind]


def plain_draws(indices: Tensor, batch: int, seq_len: int, batch_first: bool) -> list[tuple[Tensor, Plain]]:
    """Of the draws ``[N, B | 1, k]`` of N sites, each with what the eager path needs of it."""
    keep = indices.shape[2]
    rows = flat_rows(indices, batch, seq_len, batch_first)
    shape = (batch, keep, -1) if batch_first else (keep, batch, -1)
    takes: dict[Any, Take | None] = {}
    parts = indices, indices.flatten(1), rows, indices[..., None], indices[:, :, None]
    return [
        (each, Plain(tokens, row, (down, along), shape, batch_first, takes))
        for each, tokens, row, down, along in zip(*(part.unbind(0) for part in parts), strict=True)
    ]


# ---- hidden states


# Up to so many elements, dispatch costs more than the bytes that torch's own formulas move in the backward. (A call of
# one of our operators took 57 to 129 microseconds on an H100's host, in which the H100 moves over a hundred megabytes.)
_SMALL, _SMALL_ON_ACCELERATORS = 1 << 15, 1 << 22


def _is_small(hidden: Tensor, plain: Plain) -> bool:
    return plain.batch_first and hidden.numel() <= (_SMALL if hidden.is_cpu else _SMALL_ON_ACCELERATORS)


def split(hidden: Tensor, indices: Tensor, plain: Plain) -> tuple[Tensor, Tensor]:
    """As ``split_merge.split_tokens``."""
    if _is_small(hidden, plain):
        return hidden, hidden.gather(1, plain.across[0].expand(hidden.shape[0], -1, hidden.shape[2]))
    rest, kept = Split.apply(hidden, indices, plain)
    return rest, kept


def merge(rest: Tensor, indices: Tensor, kept: Tensor, plain: Plain) -> Tensor:
    """As ``split_merge.merge_tokens``."""
    if _is_small(rest, plain):
        return rest.scatter(1, plain.across[0].expand(rest.shape[0], -1, rest.shape[2]), kept)
    merged: Tensor = Merge.apply(rest, indices, kept, plain)
    return merged


def _take(hidden: Tensor, indices: Tensor, plain: Plain) -> Tensor:
    if not hidden.is_cuda:
        return hidden.flatten(0, 1).index_select(0, plain.rows).view(plain.shape)
    indices = indices.expand(hidden.shape[0 if plain.batch_first else 1], -1)  # Its kernels move fewer bytes.
    taken: Tensor = torch.ops.ltd_fx.gather_tokens(hidden, indices, plain.batch_first)
    return taken


def _put(rest: Tensor, indices: Tensor, kept: Tensor, plain: Plain) -> Tensor:
    if not rest.is_cuda:
        return rest.flatten(0, 1).index_copy(0, plain.rows, kept.flatten(0, 1)).view(rest.shape)
    indices = indices.expand(rest.shape[0 if plain.batch_first else 1], -1)
    put: Tensor = torch.ops.ltd_fx.scatter_tokens(rest, indices, kept, plain.batch_first)
    return put


class Split(torch.autograd.Function):
    """As ``split_merge._Split``; without ``setup_context``, with which torch binds a signature at every call."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, indices: Tensor, plain: Plain) -> tuple[Tensor, Tensor]:
        ctx.indices, ctx.plain = indices, plain
        return hidden.view_as(hidden), _take(hidden, indices, plain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_rest, grad_kept = grads
        return _put(grad_rest, ctx.indices, grad_kept, ctx.plain), None, None


class Merge(torch.autograd.Function):
    """As ``split_merge._Merge``."""

    @staticmethod
    def forward(ctx: Any, rest: Tensor, indices: Tensor, kept: Tensor, plain: Plain) -> Tensor:
        ctx.indices, ctx.plain = indices, plain
        return _put(rest, indices, kept, plain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (grad,) = grads
        return grad, None, _take(grad, ctx.indices, ctx.plain), None


# ---- arguments


def take_maybe(value: Tensor, dims: tuple[int, ...], batch: int, shared: bool, batch_first: bool) -> Take | None:
    """How the kept rows of values like this one are taken in one or two calls of torch; ``None``: by the operators.

    Args:
        value: with the batch, or 1, in dimension 0.
        dims: that carry the sequence; those to broadcast left out.
        batch: B.
        shared: whether one draw serves the batch.
        batch_first: whether rows are numbered along the batch first.
    """
    one = value.shape[0] == 1
    if dims == (1,) and one:
        return _take_table
    if shared:
        return None
    if dims == (1,) and value.shape[0] == batch and batch_first:
        return _take_rows
    if value.ndim == 4 and value.shape[1] == 1 and (one or value.shape[0] == batch):
        if dims == (2, 3):
            return _take_mask_of_all if one else _take_mask
        if dims == (3,) and value.shape[2] == 1 and not one:
            return _take_padding
    return None


def _take_table(draw: Any, table: Tensor) -> Tensor:
    return table.index_select(1, draw.plain.tokens).view(*draw.indices.shape, *table.shape[2:])


def _take_rows(draw: Any, value: Tensor) -> Tensor:
    return value.flatten(0, 1).index_select(0, draw.plain.rows).view(*draw.indices.shape, *value.shape[2:])


def _take_mask_of_all(draw: Any, mask: Tensor) -> Tensor:
    return mask.squeeze((0, 1))[draw.plain.across].unsqueeze(1)


def _take_mask(draw: Any, mask: Tensor) -> Tensor:
    batch = torch.arange(len(mask), device=mask.device)[:, None, None]
    return mask.squeeze(1)[(batch, *draw.plain.across)].unsqueeze(1)


def _take_padding(draw: Any, mask: Tensor) -> Tensor:
    return mask.squeeze((1, 2)).gather(1, draw.indices)[:, None, None]
