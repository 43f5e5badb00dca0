"""The operators ``torch.ops.ltd_fx.{sample_tokens, gather_tokens, scatter_tokens}``.

All are functional: they return fresh tensors and change none. One kernel written in torch serves every device but CUDA
(:mod:`ltd_fx.cuda.ops`); the CPU also checks the values of the indices, which elsewhere would cost a device
synchronisation, and samples in numpy.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltd_fx.errors import LTDError
from ltd_fx.ops.sampling import sample, sample_on_cpu
from ltd_fx.torch_private import check_with

lib = torch.library.Library("ltd_fx", "DEF")
lib.define(
    "sample_tokens(Tensor key, Tensor site, Tensor like, SymInt batch, SymInt seq_len, SymInt keep, "
    "Tensor? rank=None) -> Tensor"
)
# On the CPU Inductor decomposes sample_tokens into this: an operator with a decomposition cannot also stay as it is.
lib.define(
    "_sample_on_cpu(Tensor key, Tensor site, SymInt batch, SymInt seq_len, SymInt keep, Tensor? rank=None) -> Tensor"
)
lib.define("gather_tokens(Tensor hidden, Tensor indices, bool batch_first=True) -> Tensor")
lib.define("scatter_tokens(Tensor hidden, Tensor indices, Tensor kept, bool batch_first=True) -> Tensor")


def require(condition: Any, message: Callable[[], str]) -> None:
    check_with(LTDError, condition, lambda: f"ltd_fx: {message()}")


# ---- arguments: what is checked in the kernels and under fake tensors alike


def check_sample(key: Tensor, site: Tensor, batch: int, seq_len: int, keep: int, rank: Tensor | None) -> None:
    scalars = key.ndim == 0 and site.ndim <= 1 and key.dtype == site.dtype == torch.int64
    require(
        scalars,
        lambda: (
            f"key and site must be 0-dim int64 (site 1-dim, too), got {key.ndim}-dim {key.dtype}, "
            f"{site.ndim}-dim {site.dtype}"
        ),
    )
    require(batch >= 0, lambda: f"batch must not be negative, got {batch}")
    require(keep >= 0, lambda: f"keep must not be negative, got {keep}")
    require(keep <= seq_len, lambda: f"keep={keep} tokens cannot be drawn from seq_len={seq_len}")
    if rank is not None:
        fits = rank.dtype == torch.int64 and rank.ndim == 2
        require(fits, lambda: f"rank must be a 2-dim int64 tensor, got {rank.ndim}-dim {rank.dtype}")
        fits = rank.shape[1] == seq_len and (rank.shape[0] == 1 or rank.shape[0] == batch)
        require(fits, lambda: f"rank must be [{batch} or 1, {seq_len}], got {tuple(rank.shape)}")


def check_rows(indices: Tensor) -> None:
    integers = indices.dtype in (torch.int32, torch.int64)
    require(integers, lambda: f"indices must be int32 or int64, got {indices.dtype}")
    require(indices.ndim == 2, lambda: f"indices must be [B, k], got shape {tuple(indices.shape)}")


def check_indices(hidden: Tensor, indices: Tensor, batch_first: bool) -> None:
    require(hidden.ndim == 3, lambda: f"hidden must have three dimensions, got shape {tuple(hidden.shape)}")
    require(hidden.is_floating_point(), lambda: f"hidden must be floating point, got {hidden.dtype}")
    check_rows(indices)
    batch, seq_len = (hidden.shape[0], hidden.shape[1]) if batch_first else (hidden.shape[1], hidden.shape[0])
    rows, keep = indices.shape
    require(rows == batch, lambda: f"indices has {rows} rows, but with batch_first={batch_first} hidden has {batch}")
    require(keep <= seq_len, lambda: f"indices keeps {keep} tokens, but hidden has only {seq_len}")
    require(hidden.device == indices.device, lambda: f"hidden is on {hidden.device}, indices on {indices.device}")


def check_kept(hidden: Tensor, indices: Tensor, kept: Tensor, batch_first: bool) -> None:
    check_indices(hidden, indices, batch_first)
    require(kept.ndim == 3, lambda: f"kept must have three dimensions, got shape {tuple(kept.shape)}")
    rows, keep = indices.shape
    expected = (rows, keep, hidden.shape[2]) if batch_first else (keep, rows, hidden.shape[2])
    for size, expected_size in zip(kept.shape, expected, strict=True):
        require(size == expected_size, lambda: f"kept must have shape {tuple(expected)}, but has {tuple(kept.shape)}")
    require(kept.dtype == hidden.dtype, lambda: f"kept is {kept.dtype}, hidden is {hidden.dtype}: cast one of them")
    require(kept.device == hidden.device, lambda: f"kept is on {kept.device}, hidden on {hidden.device}")


def check_values(indices: Tensor, seq_len: int) -> None:
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    require(bool((indices[:, 1:] > indices[:, :-1]).all()), lambda: "indices must be ascending and unique in each row")
    low, high = int(indices[:, 0].min()), int(indices[:, -1].max())
    require(low >= 0 and high < seq_len, lambda: f"indices must be in [0, {seq_len}), got values from {low} to {high}")


# ---- kernels


@torch.library.impl(lib, "sample_tokens", "CompositeExplicitAutograd")
def sample_kernel(
    key: Tensor, site: Tensor, like: Tensor, batch: int, seq_len: int, keep: int, rank: Tensor | None = None
) -> Tensor:
    check_sample(key, site, batch, seq_len, keep, rank)
    return sample(key, site, batch, seq_len, keep, rank)


@torch.library.impl(lib, "sample_tokens", "CPU")
def _sample_on_cpu(
    key: Tensor, site: Tensor, like: Tensor, batch: int, seq_len: int, keep: int, rank: Tensor | None = None
) -> Tensor:
    check_sample(key, site, batch, seq_len, keep, rank)
    return sample_on_cpu(key, site, batch, seq_len, keep, rank)


torch.library.impl(lib, "_sample_on_cpu", "CPU")(sample_on_cpu)


@torch.library.impl(lib, "gather_tokens", "CompositeExplicitAutograd")
def gather_kernel(hidden: Tensor, indices: Tensor, batch_first: bool = True) -> Tensor:
    check_indices(hidden, indices, batch_first)
    check_values(indices, hidden.shape[1 if batch_first else 0])
    return gather_rows(hidden, indices, batch_first)


@torch.library.impl(lib, "scatter_tokens", "CompositeExplicitAutograd")
def scatter_kernel(hidden: Tensor, indices: Tensor, kept: Tensor, batch_first: bool = True) -> Tensor:
    check_kept(hidden, indices, kept, batch_first)
    seq_len = hidden.shape[1 if batch_first else 0]
    check_values(indices, seq_len)
    out = hidden.clone(memory_format=torch.contiguous_format)
    out.flatten(0, 1).index_copy_(0, flat_rows(indices, indices.shape[0], seq_len, batch_first), kept.flatten(0, 1))
    return out


# ---- fake tensors


@torch.library.register_fake("ltd_fx::sample_tokens", lib=lib)
def _sample_fake(
    key: Tensor, site: Tensor, like: Tensor, batch: int, seq_len: int, keep: int, rank: Tensor | None = None
) -> Tensor:
    check_sample(key, site, batch, seq_len, keep, rank)
    return key.new_empty((*site.shape, batch, keep))


@torch.library.register_fake("ltd_fx::_sample_on_cpu", lib=lib)
def _sample_on_cpu_fake(
    key: Tensor, site: Tensor, batch: int, seq_len: int, keep: int, rank: Tensor | None = None
) -> Tensor:
    return key.new_empty((*site.shape, batch, keep))


@torch.library.register_fake("ltd_fx::gather_tokens", lib=lib)
def _gather_fake(hidden: Tensor, indices: Tensor, batch_first: bool = True) -> Tensor:
    check_indices(hidden, indices, batch_first)
    batch, keep = indices.shape
    return hidden.new_empty((batch, keep, hidden.shape[2]) if batch_first else (keep, batch, hidden.shape[2]))


@torch.library.register_fake("ltd_fx::scatter_tokens", lib=lib)
def _scatter_fake(hidden: Tensor, indices: Tensor, kept: Tensor, batch_first: bool = True) -> Tensor:
    check_kept(hidden, indices, kept, batch_first)
    return hidden.new_empty(hidden.shape)


# ---- autograd: each operator's backward is the other one


def _save_indices(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, indices, *_, batch_first = inputs
    ctx.save_for_backward(indices)
    ctx.hidden_shape, ctx.batch_first = hidden.shape, batch_first


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (indices,) = ctx.saved_tensors
    zeros = grad.new_zeros(ctx.hidden_shape)
    return torch.ops.ltd_fx.scatter_tokens(zeros, indices, grad, ctx.batch_first), None, None


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    (indices,) = ctx.saved_tensors
    grad_hidden = grad_kept = None
    if ctx.needs_input_grad[2]:
        grad_kept = torch.ops.ltd_fx.gather_tokens(grad, indices, ctx.batch_first)
    if ctx.needs_input_grad[0]:
        batch, keep = indices.shape
        zeros = grad.new_zeros((batch, keep, grad.shape[2]) if ctx.batch_first else (keep, batch, grad.shape[2]))
        grad_hidden = torch.ops.ltd_fx.scatter_tokens(grad, indices, zeros, ctx.batch_first)
    return grad_hidden, None, grad_kept, None


torch.library.register_autograd("ltd_fx::gather_tokens", _gather_backward, setup_context=_save_indices, lib=lib)
torch.library.register_autograd("ltd_fx::scatter_tokens", _scatter_backward, setup_context=_save_indices, lib=lib)


# ---- vmap: the mapped dimension joins the batch


def to_front(value: Tensor, dim: int | None, size: int) -> Tensor:
    return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)


def _join(value: Tensor, batch_dim: int) -> Tensor:
    """``[N, ...]`` with the batch at ``1 + batch_dim`` to ``[...]`` with N * B samples at ``batch_dim``."""
    return value.movedim(0, batch_dim).flatten(batch_dim, batch_dim + 1)


def _part(value: Tensor, batch_dim: int, size: int) -> Tensor:
    """The inverse of :func:`_join`, for the result."""
    parted: Tensor = value.unflatten(batch_dim, (size, value.shape[batch_dim] // size)).movedim(batch_dim, 0)
    return parted


@torch.library.register_vmap("ltd_fx::sample_tokens", lib=lib)
def _sample_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    key: Tensor,
    site: Tensor,
    like: Tensor,
    batch: int,
    seq_len: int,
    keep: int,
    rank: Tensor | None = None,
) -> tuple[Tensor, int]:
    if in_dims[0] is not None or in_dims[1] is not None:
        raise LTDError("ltd_fx: sample_tokens maps over `like`, never over its key or site; keep those unmapped")
    size = info.batch_size
    if in_dims[2] is not None:
        like = like.select(in_dims[2], 0)
    if rank is not None:
        dim = in_dims[6] if len(in_dims) > 6 else None
        rank = to_front(rank, dim, size).expand(size, batch, seq_len).flatten(0, 1)
    rows = torch.ops.ltd_fx.sample_tokens(key, site, like, size * batch, seq_len, keep, rank)
    return rows.unflatten(-2, (size, batch)), site.ndim


@torch.library.register_vmap("ltd_fx::gather_tokens", lib=lib)
def _gather_vmap(
    info: Any, in_dims: tuple[int | None, ...], hidden: Tensor, indices: Tensor, batch_first: bool = True
) -> tuple[Tensor, int]:
    batch_dim = 0 if batch_first else 1
    hidden, indices = (
        to_front(value, dim, info.batch_size) for value, dim in zip((hidden, indices), in_dims, strict=False)
    )
    out = torch.ops.ltd_fx.gather_tokens(_join(hidden, batch_dim), _join(indices, 0), batch_first)
    return _part(out, batch_dim, info.batch_size), 0


@torch.library.register_vmap("ltd_fx::scatter_tokens", lib=lib)
def _scatter_vmap(
    info: Any, in_dims: tuple[int | None, ...], hidden: Tensor, indices: Tensor, kept: Tensor, batch_first: bool = True
) -> tuple[Tensor, int]:
    batch_dim = 0 if batch_first else 1
    hidden, indices, kept = (
        to_front(value, dim, info.batch_size) for value, dim in zip((hidden, indices, kept), in_dims, strict=False)
    )
    out = torch.ops.ltd_fx.scatter_tokens(
        _join(hidden, batch_dim), _join(indices, 0), _join(kept, batch_dim), batch_first
    )
    return _part(out, batch_dim, info.batch_size), 0


# ---- as indexing: for Inductor, which fuses it with the layer's own kernels, and for any strides


def flat_rows(indices: Tensor, batch: int, seq_len: int, batch_first: bool) -> Tensor:
    """Row numbers ``[..., B * k]`` of the kept tokens ``[..., B | 1, k]`` in ``hidden.flatten(0, 1)``.

    Eager, copying whole rows beats indexing elements. Inductor for the CPU fuses loops over rows and D with a norm's,
    and none over B, k and D.
    """
    each = torch.arange(batch, device=indices.device)[:, None]
    if batch_first:
        return (indices + each * seq_len).flatten(-2)
    return (indices * batch + each).mT.flatten(-2)


def gather_rows(hidden: Tensor, indices: Tensor, batch_first: bool = True) -> Tensor:
    if not hidden.is_contiguous():
        return hidden[_positions(indices, batch_first)].contiguous()
    rows = flat_rows(indices, indices.shape[0], hidden.shape[1 if batch_first else 0], batch_first)
    shape = indices.shape if batch_first else indices.T.shape
    return hidden.flatten(0, 1).index_select(0, rows).view(*shape, hidden.shape[2])


def scatter_rows(hidden: Tensor, indices: Tensor, kept: Tensor, batch_first: bool = True) -> Tensor:
    if not hidden.is_contiguous():
        return hidden.index_put(_positions(indices, batch_first), kept)
    rows = flat_rows(indices, indices.shape[0], hidden.shape[1 if batch_first else 0], batch_first)
    return hidden.flatten(0, 1).index_copy(0, rows, kept.flatten(0, 1)).view(hidden.shape)


def _positions(indices: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    batch = torch.arange(indices.shape[0], device=indices.device)[:, None]
    return (batch, indices) if batch_first else (indices.T, batch.T)
