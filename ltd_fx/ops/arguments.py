"""The operators ``torch.ops.ltd_fx.{gather_aligned, gather_mask}``: arguments that follow the tokens.

Both are functional. One kernel written in torch serves every device but CUDA (:mod:`ltd_fx.cuda.ops`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltd_fx.ops.tokens import check_rows, check_values, lib, require, to_front

lib.define("gather_aligned(Tensor[] values, Tensor indices, int[] dims) -> Tensor[]")
lib.define("gather_mask(Tensor mask, Tensor indices) -> Tensor")


def gather_by_indexing(value: Tensor, indices: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``value`` with only the kept rows along each of ``dims``, by torch's indexing.

    Args:
        value: ``[N, ...]`` with S in ``dims``, none of them 0. N is 1; a multiple of R, of which samples next to each
            other share a row of ``indices`` (batch times heads); or anything where R is 1.
        indices: ``[R, k]``.
        dims: that carry the sequence.

    Returns:
        The same with k in place of S and N, or R where N is 1, in front.
    """
    count = len(dims)
    here = tuple(range(1, count + 1))
    moved = value.movedim(dims, here)
    if moved.shape[0] == 1:  # [1, S, ...] to as many as there are rows
        return moved[0][_grid(indices, count)].movedim(here, dims)
    rows: slice | Tensor = slice(None)
    if indices.shape[0] == 1:
        indices = indices[0]
    else:
        indices = indices.repeat_interleave(moved.shape[0] // indices.shape[0], dim=0)
        rows = torch.arange(moved.shape[0], device=indices.device).view(-1, *[1] * count)
    return moved[(rows, *_grid(indices, count))].movedim(here, dims)


def _grid(indices: Tensor, count: int) -> tuple[Tensor, ...]:
    """``indices`` ``[..., k]`` once for each of ``count`` dimensions, shaped to broadcast to ``[..., k, k]``."""
    *batch, keep = indices.shape
    return tuple(indices.reshape(*batch, *(keep if i == axis else 1 for i in range(count))) for axis in range(count))


# ---- arguments


def check_aligned(values: list[Tensor], indices: Tensor, dims: list[int]) -> None:
    check_rows(indices)
    require(len(values) == len(dims), lambda: f"{len(values)} values need as many dims, got {len(dims)}")
    for value, dim in zip(values, dims, strict=True):
        _check_value(value, dim, indices)
        _check_length(value, dim, values[0].shape[dims[0]])


def check_mask(mask: Tensor, indices: Tensor) -> None:
    check_rows(indices)
    require(mask.ndim == 4, lambda: f"mask must be [N, H, S, S], got shape {tuple(mask.shape)}")
    _check_value(mask, 2, indices)
    _check_length(mask, 3, mask.shape[2])


def _check_value(value: Tensor, dim: int, indices: Tensor) -> None:
    rows, keep = indices.shape
    shape = tuple(value.shape)
    require(0 < dim < value.ndim, lambda: f"a value of shape {shape} has no dimension {dim} beyond its batch")
    fits = shape[0] == 1 or rows == 1 or shape[0] == rows
    require(fits, lambda: f"a value of shape {shape} must have a batch of {rows} or 1")
    require(keep <= shape[dim], lambda: f"indices keeps {keep} tokens, but a value has only {shape[dim]}")
    require(value.device == indices.device, lambda: f"a value is on {value.device}, indices on {indices.device}")


def _check_length(value: Tensor, dim: int, seq_len: int) -> None:
    shape = tuple(value.shape)
    require(shape[dim] == seq_len, lambda: f"a value of shape {shape} must have {seq_len} tokens in dimension {dim}")


# ---- kernels; also what Inductor sees in place of the operators


@torch.library.impl(lib, "gather_aligned", "CompositeExplicitAutograd")
def aligned_kernel(values: list[Tensor], indices: Tensor, dims: list[int]) -> list[Tensor]:
    check_aligned(values, indices, dims)
    if values:
        check_values(indices, values[0].shape[dims[0]])
    return aligned_by_indexing(values, indices, dims)


@torch.library.impl(lib, "gather_mask", "CompositeExplicitAutograd")
def mask_kernel(mask: Tensor, indices: Tensor) -> Tensor:
    check_mask(mask, indices)
    check_values(indices, mask.shape[2])
    return mask_by_indexing(mask, indices)


def aligned_by_indexing(values: list[Tensor], indices: Tensor, dims: list[int]) -> list[Tensor]:
    return [gather_by_indexing(value, indices, (dim,)).contiguous() for value, dim in zip(values, dims, strict=True)]


def mask_by_indexing(mask: Tensor, indices: Tensor) -> Tensor:
    return gather_by_indexing(mask, indices, (2, 3)).contiguous()


# ---- fake tensors


def gathered_shape(value: Tensor, indices: Tensor, dims: tuple[int, ...]) -> list[int]:
    rows, keep = indices.shape
    batch = rows if value.shape[0] == 1 else value.shape[0]
    return [batch, *(keep if dim in dims else value.shape[dim] for dim in range(1, value.ndim))]


@torch.library.register_fake("ltd_fx::gather_aligned", lib=lib)
def _aligned_fake(values: list[Tensor], indices: Tensor, dims: list[int]) -> list[Tensor]:
    check_aligned(values, indices, dims)
    return [value.new_empty(gathered_shape(value, indices, (dim,))) for value, dim in zip(values, dims, strict=True)]


@torch.library.register_fake("ltd_fx::gather_mask", lib=lib)
def _mask_fake(mask: Tensor, indices: Tensor) -> Tensor:
    check_mask(mask, indices)
    return mask.new_empty(gathered_shape(mask, indices, (2, 3)))


# ---- autograd: what was gathered is added back


def _gradient(grad: Tensor, shape: torch.Size, indices: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Of a value of ``shape``; a value with a batch of 1 has the sum over all rows of ``indices``."""
    here = tuple(range(1, len(dims) + 1))
    moved = grad.new_zeros(shape).movedim(dims, here)
    rows = torch.arange(shape[0], device=grad.device).view(-1, *[1] * len(dims))
    place = (rows, *_grid(indices.expand(grad.shape[0], -1), len(dims)))
    gradient: Tensor = moved.index_put(place, grad.movedim(dims, here), accumulate=True).movedim(here, dims)
    return gradient


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    values, indices, *dims = inputs
    ctx.save_for_backward(indices)
    ctx.shapes = [value.shape for value in values] if dims else values.shape
    ctx.dims = dims[0] if dims else None


def _aligned_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[list[Tensor | None], None, None]:
    (indices,) = ctx.saved_tensors
    each = zip(grads, ctx.shapes, ctx.dims, strict=True)
    return [None if grad is None else _gradient(grad, shape, indices, (dim,)) for grad, shape, dim in each], None, None


def _mask_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors
    return _gradient(grad, ctx.shapes, indices, (2, 3)), None


torch.library.register_autograd("ltd_fx::gather_aligned", _aligned_backward, setup_context=_save, lib=lib)
torch.library.register_autograd("ltd_fx::gather_mask", _mask_backward, setup_context=_save, lib=lib)


# ---- vmap: the mapped dimension joins the batch


def _mapped(op: Callable[..., Tensor], size: int, in_dims: tuple[Any, ...], value: Tensor, indices: Tensor) -> Tensor:
    value, indices = (to_front(each, dim, size) for each, dim in zip((value, indices), in_dims, strict=True))
    batch = max(value.shape[1], indices.shape[1])
    joined = (each.expand(size, batch, *each.shape[2:]).flatten(0, 1) for each in (value, indices))
    parted: Tensor = op(*joined).unflatten(0, (size, batch))
    return parted


@torch.library.register_vmap("ltd_fx::gather_aligned", lib=lib)
def _aligned_vmap(
    info: Any, in_dims: tuple[Any, ...], values: list[Tensor], indices: Tensor, dims: list[int]
) -> tuple[list[Tensor], list[int]]:
    def one(value: Tensor, value_dim: int | None, dim: int) -> Tensor:
        def gather(value: Tensor, indices: Tensor) -> Tensor:
            out: list[Tensor] = torch.ops.ltd_fx.gather_aligned([value], indices, [dim])
            return out[0]

        return _mapped(gather, info.batch_size, (value_dim, in_dims[1]), value, indices)

    return [one(*each) for each in zip(values, in_dims[0], dims, strict=True)], [0] * len(values)


@torch.library.register_vmap("ltd_fx::gather_mask", lib=lib)
def _mask_vmap(info: Any, in_dims: tuple[Any, ...], mask: Tensor, indices: Tensor) -> tuple[Tensor, int]:
    return _mapped(torch.ops.ltd_fx.gather_mask, info.batch_size, in_dims, mask, indices), 0
