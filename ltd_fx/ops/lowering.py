"""What Inductor makes of the operators: indexing that fuses with the layer's own kernels, or calls of ours."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltd_fx.errors import LTDError
from ltd_fx.ops.arguments import aligned_by_indexing, mask_by_indexing
from ltd_fx.ops.recompute import recompute_what_follows, recomputed
from ltd_fx.ops.sampling import sample
from ltd_fx.ops.tokens import gather_rows, scatter_rows
from ltd_fx.torch_private import set_decompositions


def _sample_in_graph(
    key: Tensor, site: Tensor, like: Tensor, batch: int, seq_len: int, keep: int, rank: Tensor | None = None
) -> Tensor:
    # This is several times as fast as anything that Inductor makes, and nothing fuses with it.
    if key.device.type == "cpu":
        drawn: Tensor = torch.ops.ltd_fx._sample_on_cpu(key, site, batch, seq_len, keep, rank)
        return drawn
    return sample(key, site, batch, seq_len, keep, rank)


def _scatter_in_graph(hidden: Tensor, indices: Tensor, kept: Tensor, batch_first: bool = True) -> Tensor:
    recompute_what_follows()  # A layer ends here.
    return scatter_rows(hidden, indices, kept, batch_first)


def _aligned_in_graph(values: list[Tensor], indices: Tensor, dims: list[int]) -> list[Tensor]:
    with recomputed():
        return aligned_by_indexing(values, indices, dims)


def _mask_in_graph(mask: Tensor, indices: Tensor) -> Tensor:
    with recomputed():
        return mask_by_indexing(mask, indices)


_DECOMPOSITIONS: dict[str, Callable[..., Any]] = {
    "sample_tokens": _sample_in_graph,
    "gather_tokens": gather_rows,
    "scatter_tokens": _scatter_in_graph,
    "gather_aligned": _aligned_in_graph,
    "gather_mask": _mask_in_graph,
}
_KERNEL_TAG = "ltd_fx: LTD_FX_LOWERING=kernel"


def register_inductor_decompositions() -> None:
    """Let Inductor see through the operators, or with ``LTD_FX_LOWERING=kernel`` call their kernels.

    Harmless to repeat, needed once before the first compile. Not done on import: it loads Inductor, which
    ``import ltd_fx`` must not.

    Raises:
        LTDError: ``LTD_FX_LOWERING`` is neither fuse nor kernel.
    """
    lowering = os.environ.get("LTD_FX_LOWERING", "fuse")
    if lowering not in ("fuse", "kernel"):
        raise LTDError(f"ltd_fx: LTD_FX_LOWERING must be fuse or kernel, got {lowering!r}")
    # The caches on disk do not know of decompositions: without a tag they would hand out the other lowering's graphs.
    config = torch.compiler.config
    config.cache_key_tag = config.cache_key_tag.replace(_KERNEL_TAG, "") + (_KERNEL_TAG if lowering == "kernel" else "")
    table = {getattr(torch.ops.ltd_fx, name).default: function for name, function in _DECOMPOSITIONS.items()}
    set_decompositions(table, active=lowering == "fuse")
