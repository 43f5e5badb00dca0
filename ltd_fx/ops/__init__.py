"""The ``torch.library`` operators: gather, scatter, sample, for torch, Inductor, vmap and autograd on any device.

They take tensors and know of no model, layer or schedule. What CUDA adds to them is in ``ltd_fx.cuda``.
"""

from ltd_fx.ops.arguments import (
    aligned_kernel,
    check_aligned,
    check_mask,
    gather_by_indexing,
    gathered_shape,
    mask_kernel,
)
from ltd_fx.ops.lowering import register_inductor_decompositions
from ltd_fx.ops.sampling import draw_key, hashes
from ltd_fx.ops.tokens import (
    check_indices,
    check_kept,
    check_sample,
    flat_rows,
    gather_kernel,
    lib,
    sample_kernel,
    scatter_kernel,
)
