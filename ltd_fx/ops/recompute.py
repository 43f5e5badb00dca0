"""Aligned arguments are computed again in the backward pass, not saved for it.

The layers of a dense model share one attention mask and one pair of rotary tables. A routed layer has its own of each:
saved, ``[B, 1, k, k]`` of mask in floating point and ``[B, k, D / heads]`` of tables would stay from its forward to its
backward. Computed again, they take the draw, ``[B, k]``, and the whole arguments, which the layers share.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile

import torch
from torch import Tensor, fx

from ltd_fx.torch_private import OpOverload, must_recompute, traced_graph_maybe

# This key is in a node's meta.
_ALIGNED, _SEEN = "ltd_fx_aligned", "ltd_fx_seen"


@contextmanager
def recomputed() -> Iterator[None]:
    """Tag what is traced within for AOTAutograd's partitioner."""
    graph = traced_graph_maybe()
    if graph is None:
        yield
        return
    before = len(graph.nodes)
    yield
    for node in list(graph.nodes)[before:]:
        _tag(node)


def recompute_what_follows() -> None:
    """Tag what has been traced from tagged nodes alone, element by element: a mask in floating point, say.

    The partitioner, left to itself, saves what the backward hands to a kernel it cannot fuse with, such as attention.
    """
    graph = traced_graph_maybe()
    if graph is None:
        return
    fresh = list(takewhile(lambda node: _SEEN not in node.meta, reversed(graph.nodes)))
    for node in reversed(fresh):
        node.meta[_SEEN] = True
        if _is_elementwise(node):
            given = [arg for arg in _tensors(node) if not _is_constant(arg)]
            if given and all(_ALIGNED in arg.meta for arg in given):
                _tag(node)


def _tag(node: fx.Node) -> None:
    node.meta[_ALIGNED] = True
    must_recompute(node)


def _is_elementwise(node: fx.Node) -> bool:
    op = node.target
    if not isinstance(op, OpOverload) or torch.Tag.nondeterministic_seeded in op.tags:
        return False
    # Attention pads its mask.
    return torch.Tag.pointwise in op.tags or op.is_view or op is torch.ops.aten.constant_pad_nd.default


def _is_constant(node: fx.Node) -> bool:
    """Made of sizes alone: ``full([], -inf)``."""
    return node.op == "call_function" and not _tensors(node)


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [arg for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), Tensor)]
