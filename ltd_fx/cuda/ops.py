"""The CUDA kernels as the operators' implementations for CUDA tensors; where they cannot run, the torch ones."""

import torch
from torch import Tensor

from ltd_fx import ops
from ltd_fx.cuda import driver, launch


@torch.library.impl(ops.lib, "sample_tokens", "CUDA")
def sample_tokens(
    key: Tensor, site: Tensor, like: Tensor, batch: int, seq_len: int, keep: int, rank: Tensor | None = None
) -> Tensor:
    ops.check_sample(key, site, batch, seq_len, keep, rank)
    together = all(value is None or value.device == like.device for value in (key, site, rank))
    kernels = driver.kernels_on(like.device) if together else None
    if kernels is None:
        return ops.sample_kernel(key, site, like, batch, seq_len, keep, rank)
    return launch.sample_tokens(kernels, key, site, batch, seq_len, keep, rank)


@torch.library.impl(ops.lib, "gather_tokens", "CUDA")
def gather_tokens(hidden: Tensor, indices: Tensor, batch_first: bool = True) -> Tensor:
    ops.check_indices(hidden, indices, batch_first)
    kernels = driver.kernels_on(hidden.device)
    if kernels is None:
        return ops.gather_kernel(hidden, indices, batch_first)
    return launch.gather_rows(kernels, hidden, indices, batch_first)


@torch.library.impl(ops.lib, "scatter_tokens", "CUDA")
def scatter_tokens(hidden: Tensor, indices: Tensor, kept: Tensor, batch_first: bool = True) -> Tensor:
    ops.check_kept(hidden, indices, kept, batch_first)
    kernels = driver.kernels_on(hidden.device)
    if kernels is None:
        return ops.scatter_kernel(hidden, indices, kept, batch_first)
    return launch.merge_rows(kernels, hidden, indices, kept, batch_first)


@torch.library.impl(ops.lib, "gather_aligned", "CUDA")
def gather_aligned(values: list[Tensor], indices: Tensor, dims: list[int]) -> list[Tensor]:
    ops.check_aligned(values, indices, dims)
    kernels = driver.kernels_on(indices.device)
    if kernels is None:
        return ops.aligned_kernel(values, indices, dims)
    return launch.gather_aligned(kernels, values, indices, dims)


@torch.library.impl(ops.lib, "gather_mask", "CUDA")
def gather_mask(mask: Tensor, indices: Tensor) -> Tensor:
    ops.check_mask(mask, indices)
    kernels = driver.kernels_on(mask.device)
    if kernels is None:
        return ops.mask_kernel(mask, indices)
    return launch.gather_mask(kernels, mask, indices)
