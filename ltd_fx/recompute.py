"""Aligned arguments are computed again in the backward pass, not saved for it.

The layers of a dense model share one attention mask and one pair of rotary tables. A routed layer has its own of each:
saved, ``[B, 1, k, k]`` of mask in floating point and ``[B, k, D / heads]`` of tables would stay from its forward to its
backward. Computed again, they take the draw, ``[B, k]``, and the whole arguments, which the layers share.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy

_ALIGNED = "ltd_fx_aligned"


@contextmanager
def recomputed() -> Iterator[None]:
    """Tag what is traced within for AOTAutograd's partitioner."""
    mode = get_proxy_mode()
    if mode is None:
        yield
        return
    graph = mode.tracer.graph
    before = len(graph.nodes)
    yield
    for node in list(graph.nodes)[before:]:
        _tag(node)


def recompute_what_follows() -> None:
    """Tag what has been traced from tagged nodes alone, element by element: a mask in floating point, say.

    The partitioner, left to itself, saves what the backward hands to a kernel it cannot fuse with, such as attention.
    """
    mode = get_proxy_mode()
    if mode is None:
        return
    for node in mode.tracer.graph.nodes:
        if _ALIGNED not in node.meta and _is_elementwise(node):
            given = [arg for arg in node.all_input_nodes if not _is_constant(arg)]
            if given and all(_ALIGNED in arg.meta for arg in given):
                _tag(node)


def _tag(node: fx.Node) -> None:
    node.meta[_ALIGNED] = True
    node.meta.setdefault("recompute", CheckpointPolicy.MUST_RECOMPUTE)  # the user's own checkpointing comes first


def _is_elementwise(node: fx.Node) -> bool:
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in op.tags:
        return False
    # attention pads its mask
    return torch.Tag.pointwise in op.tags or op.is_view or op is torch.ops.aten.constant_pad_nd.default


def _is_constant(node: fx.Node) -> bool:
    """A size, or made of sizes: ``full([], -inf)``."""
    if not isinstance(node.meta.get("val"), Tensor):
        return True
    return node.op == "call_function" and all(_is_constant(arg) for arg in node.all_input_nodes)
