"""Elements of floating point that a step reads and writes: eager by operator, compiled by kernel.

Reading k rows out of S through an index is k rows, not S.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Graphs:
    """Per compiled graph, in order: elements of floating point moved, and kernels."""

    elements: list[int] = field(default_factory=list)
    kernels: list[int] = field(default_factory=list)


@contextmanager
def counting() -> Iterator[Graphs]:
    """Count the graphs that Inductor compiles within, cold."""
    found = Graphs()

    def count(nodes: list[Any]) -> list[Any]:
        found.elements.append(sum(_elements(node) for node in nodes))
        found.kernels.append(sum(not _is_nothing(node) for node in nodes))
        return nodes

    torch._dynamo.reset()
    with torch._inductor.config.patch(_post_fusion_custom_pass=count, force_disable_caches=True):
        yield found


def _is_nothing(node: Any) -> bool:
    return "Nop" in type(node).__name__


def _elements(node: Any) -> int:
    """Loads and stores of a kernel; what only other loops of the same kernel read is none."""
    from torch._inductor.dependencies import MemoryDep, StarDep
    from torch._inductor.virtualized import V

    own = {part.get_name() for part in node.get_nodes()}
    inside = {
        buffer.get_name()
        for buffer in node.get_outputs()
        if all(user.node.get_name() in own for user in buffer.users if not user.is_weak)
    }
    total = 0
    for dep in node.read_writes.reads_and_writes():
        if dep.name in inside or not _floats(dep.name):
            continue
        if isinstance(dep, MemoryDep):
            # of the loop, not of the buffer, where an index picks some of its rows; read for all heads is read once
            sizes = (size for var, size in dep.ranges.items() if dep.is_indirect() or dep.index.has(var))
            total += math.prod(V.graph.sizevars.optimization_hint(size) for size in sizes)
        elif isinstance(dep, StarDep) and "Extern" in type(node).__name__:  # elsewhere it only orders a write in place
            total += dep.numbytes_hint() // V.graph.get_dtype(dep.name).itemsize
    return total


def _floats(name: str) -> bool:
    from torch._inductor.virtualized import V

    try:
        return V.graph.get_dtype(name).is_floating_point
    except NotImplementedError:  # several outputs in one
        return False


def compiled(step: Callable[[], Any]) -> Graphs:
    """Of the forward and the backward of ``step``, which compiles."""
    with counting() as found:
        step()
    return found


class Eager(TorchDispatchMode):
    """Counts the operators of the forward and of the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = [0, 0]
        self.kernels = [0, 0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func._schema.name not in _FREE:
            direction = int(torch._C._current_graph_task_id() != -1)
            self.elements[direction] += _moved(func._schema.name, args, out)
            self.kernels[direction] += 1
        return out


_FREE = {"aten::detach", "aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::empty_like"}
_PICKED = {"ltd_fx::gather_tokens", "aten::gather", "aten::index", "aten::index_select"}
_PLACED = {"ltd_fx::scatter_tokens", "aten::scatter", "aten::index_put", "aten::scatter_add"}
_PLACED_IN_PLACE = {"aten::scatter_", "aten::index_put_", "aten::scatter_add_", "aten::index_copy_"}


def _moved(name: str, args: Any, out: Any) -> int:
    if name in _PICKED:
        return 2 * _size(out)
    given = [_size(value) for value in pytree.tree_leaves(args)]
    if name in _PLACED:  # a copy of all, then the rows
        return 2 * _size(out) + 2 * given[-1 if name != "ltd_fx::scatter_tokens" else 2]
    if name in _PLACED_IN_PLACE:
        return 2 * given[-1]
    return sum(given) + sum(_size(value) for value in pytree.tree_leaves(out))


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, torch.Tensor) and value.is_floating_point() else 0


def eager(step: Callable[[], Any]) -> Eager:
    """Of one ``step``."""
    with Eager() as found:
        step()
    return found
