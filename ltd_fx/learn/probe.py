"""Run a model at other lengths and batch sizes, to see what follows: which of its inputs to resize, found by trying."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltd_fx.errors import LTDError
from ltd_fx.learn.observe import Call, TensorSpec, is_stream
from ltd_fx.runtime import BOUNDARIES
from ltd_fx.torch_private import pytree

# The decoder's side of an encoder-decoder, so that both lengths are told apart even where they are the same.
_DECODER_SIDE = ("decoder", "labels", "tgt", "target")
_MAX_SUBSETS_OF = 6


@dataclass(frozen=True)
class Edit:
    """Some dimensions of some inputs (by position among the inputs' leaves) that have ``size``."""

    size: int
    dims: Mapping[int, tuple[int, ...]]

    def resize(self, inputs: Any, size: int) -> Any:
        """The inputs, described or as values, with ``size`` in these dimensions; values can only be narrowed."""
        leaves, structure = pytree.tree_flatten(inputs, is_leaf=_is_tensor)
        for i, dims in self.dims.items():
            for dim in dims:
                leaves[i] = _resized(leaves[i], dim, size)
        return pytree.tree_unflatten(leaves, structure)


@dataclass(frozen=True)
class Probe:
    """A forward with some of its inputs resized, and how it called the layers."""

    edit: Edit
    calls: Mapping[str, Call]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (TensorSpec, Tensor))


def _resized(value: Any, dim: int, size: int) -> Any:
    if isinstance(value, TensorSpec):
        return value._replace(shape=torch.Size([*value.shape[:dim], size, *value.shape[dim + 1 :]]))
    return value.narrow(dim, 0, size)


# A forward of the model with these inputs: the first call of each layer.
Run = Callable[[Any], Mapping[str, Call]]


def by_name(calls: list[Call]) -> dict[str, Call]:
    """The first call of each layer."""
    return {call.name: call for call in reversed(calls)}


def stream(call: Call) -> Tensor | None:
    """The first argument that may hold hidden states."""
    return next(filter(is_stream, (*call.args, *call.kwargs.values())), None)


def length_probes(forward: Run, inputs: Any, calls: Mapping[str, Call], seq_dim: int) -> list[Probe]:
    """Forwards at other sequence lengths, such that each layer's hidden states changed along ``seq_dim`` in one.

    Encoder and decoder are resized apart where the model allows it. Layers whose length depends on no input's (an
    image's patches) have none.
    """
    found: list[Probe] = []
    streams = {name: stream(call) for name, call in calls.items()}
    sizes = {name: s.shape[seq_dim] for name, s in streams.items() if s is not None}
    for size in sorted(set(sizes.values()) - {1}):
        affected = {name for name, n in sizes.items() if n == size}
        for groups in _groupings(inputs, size):
            probes = [p for group in groups if (p := _try(forward, inputs, calls, group, size, seq_dim)) is not None]
            if affected & {name for p in probes for name in _moved(calls, p.calls, seq_dim)}:
                found += probes
                break
    return found


def batch_probes(
    forward: Run, inputs: Any, calls: Mapping[str, Call], lengths: list[Probe], seq_dim: int
) -> list[Probe]:
    """Forwards with one sequence less (or more), one for each way to see the batch in the inputs' dimensions."""
    size = next((s.shape[1 - seq_dim] for s in map(stream, calls.values()) if s is not None), 0)
    taken = {(i, dim) for probe in lengths for i, dims in probe.edit.dims.items() for dim in dims}
    free: dict[int, list[int]] = {}
    for i, leaf in enumerate(pytree.tree_leaves(inputs, is_leaf=_is_tensor)):
        if _is_tensor(leaf):
            free[i] = [d for d, n in enumerate(leaf.shape) if n == size and (i, d) not in taken]
    edits: list[Edit] = []
    for which in (0, -1):
        edit = Edit(size, {i: (dims[which],) for i, dims in free.items() if dims})
        if edit not in edits:
            edits.append(edit)
    probes = (_run(forward, inputs, calls, edit, size - 1 if size > 1 else 2, 1 - seq_dim) for edit in edits)
    return [probe for probe in probes if probe is not None]


def narrowed(inputs: Any, lengths: list[Probe], batches: list[Probe], tokens: int | None, sequences: int) -> Any:
    """``inputs``, as values, with at most so many tokens (``None``: all) and sequences, as probes resized them.

    Boundaries of documents count the tokens of all rows: they stay right where the batch is one row.
    """
    flat, _ = pytree.tree_flatten_with_path(inputs)
    given = {getattr(path[-1], "key", None) for path, _ in flat}
    if not given.isdisjoint(BOUNDARIES) and any(probe.edit.size > 1 for probe in batches[:1]):
        return inputs
    most_tokens = [(probe, tokens) for probe in lengths if tokens is not None]
    for probe, most in [*most_tokens, *((probe, sequences) for probe in batches[:1])]:
        inputs = probe.edit.resize(inputs, min(probe.edit.size, most))
    return inputs


def _groupings(inputs: Any, size: int) -> Iterator[list[list[int]]]:
    """Ways to part the inputs that have a dimension of ``size``, finest first; positions among the leaves."""
    flat, _ = pytree.tree_flatten_with_path(inputs, is_leaf=_is_tensor)
    names = {i: pytree.keystr(path) for i, (path, leaf) in enumerate(flat) if _is_tensor(leaf) and size in leaf.shape}
    if not names:
        return
    decoder = [i for i, name in names.items() if any(word in name for word in _DECODER_SIDE)]
    rest = [i for i in names if i not in decoder]
    if decoder and rest:
        yield [decoder, rest]
    # all, or without those whose size is the same by chance
    fewest = 1 if len(names) <= _MAX_SUBSETS_OF else len(names) - 1
    for count in range(len(names), fewest - 1, -1):
        for subset in itertools.combinations(names, count):
            yield [list(subset)]


def _try(
    forward: Run, inputs: Any, calls: Mapping[str, Call], group: list[int], size: int, seq_dim: int
) -> Probe | None:
    leaves = pytree.tree_leaves(inputs, is_leaf=_is_tensor)
    seen: list[dict[int, tuple[int, ...]]] = []
    # the same choice for all; then another for the first: hidden states may be [S, B, D] next to masks [B, S]
    for first, rest in sorted(itertools.product(_CHOICES, repeat=2), key=lambda pair: pair[0] is not pair[1]):
        dims = {}
        for i in group:
            choose = first if i == group[0] else rest
            dims[i] = choose([d for d, n in enumerate(leaves[i].shape) if n == size], leaves[i].shape)
        dims = {i: chosen for i, chosen in dims.items() if chosen}
        if not dims or dims in seen:
            continue
        seen.append(dims)
        probe = _run(forward, inputs, calls, Edit(size, dims), size // 2 + 1, seq_dim)
        if probe is not None:
            return probe
    return None


# Which of the dimensions of the right size carry the sequence? All; all but the batch; the first after it; the first.
_CHOICES: tuple[Callable[[list[int], torch.Size], tuple[int, ...]], ...] = (
    lambda dims, shape: tuple(dims),
    lambda dims, shape: tuple(d for d in dims if d or len(shape) == 1),
    lambda dims, shape: tuple([d for d in dims if d or len(shape) == 1][:1]),
    lambda dims, shape: tuple(dims[:1]),
)


def _run(forward: Run, inputs: Any, calls: Mapping[str, Call], edit: Edit, size: int, dim: int) -> Probe | None:
    """The forward with this edit, if it runs and changes the hidden states of some layers, along ``dim`` only."""
    if not edit.dims or size == edit.size:
        return None
    try:
        changed = forward(edit.resize(inputs, size))
    except (LTDError, RuntimeError):  # the latter where a value cannot be narrowed
        return None
    return Probe(edit, changed) if changed.keys() == calls.keys() and _moved(calls, changed, dim) else None


def _moved(calls: Mapping[str, Call], changed: Mapping[str, Call], dim: int) -> set[str]:
    """The layers whose hidden states changed; none if any changed in another dimension than ``dim``."""
    moved = set()
    for name, call in calls.items():
        before, after = stream(call), stream(changed[name])
        if before is None or after is None:
            continue
        dims = {d for d in range(3) if before.shape[d] != after.shape[d]}
        if dims - {dim}:
            return set()
        if dims:
            moved.add(name)
    return moved
